import { spawnSync } from 'node:child_process'
import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** Tests that start processes run dist/: it is built here, once a run, where a source is newer. */
const root = fileURLToPath(new URL('../..', import.meta.url))

export default function build(): void {
  const built = statSync(join(root, 'dist/program/fullstripe.js'), { throwIfNoEntry: false })?.mtimeMs ?? 0
  if (newest(join(root, 'src')) < built) return
  const { status, stdout, stderr } = spawnSync('scripts/build', { cwd: root, encoding: 'utf8' })
  // Types are checked by scripts/test; what compiles all the same can be tested.
  if (status !== 0) console.error(`src/ has type errors:\n${stdout}${stderr}`)
}

function newest(directory: string): number {
  const entries = readdirSync(directory, { recursive: true, withFileTypes: true })
  return Math.max(...entries.map((entry) => statSync(join(entry.parentPath, entry.name)).mtimeMs))
}
