import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** Whether this machine has a C compiler. */
export function hasCompiler(): boolean {
  return spawnSync('cc', ['--version']).status === 0
}

/**
 * A library to be preloaded into a daemon, from a C file of this directory.
 * @param directory where it is built, unless it is there already. @returns its path
 */
export function buildLibrary(directory: string, source: string): string {
  const library = join(directory, source.replace(/c$/, 'so'))
  if (existsSync(library)) return library
  const path = fileURLToPath(new URL(source, import.meta.url))
  const built = spawnSync('cc', ['-O1', '-shared', '-fPIC', '-o', library, path, '-ldl', '-lpthread'], {
    encoding: 'utf8',
  })
  if (built.status !== 0) throw new Error(`${source} does not build: ${built.stderr}`)
  return library
}
