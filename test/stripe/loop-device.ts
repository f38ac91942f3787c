/** Real block devices and small file systems for tests, where this machine lets us have them. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmdirSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export interface LoopDevice {
  readonly path: string // /dev/loopN
  readonly backing: string
  detach(): void
}

export function attachLoop(backing: string, size: number): LoopDevice {
  writeFileSync(backing, '')
  truncateSync(backing, size)
  const path = execFileSync('losetup', ['--find', '--show', backing], {
    encoding: 'utf8',
    stdio: 'pipe',
  }).trim()
  const detach = (): void => {
    // The read-only flag would stay with the number, for whoever gets it next.
    execFileSync('blockdev', ['--setrw', path], { stdio: 'pipe' })
    execFileSync('losetup', ['--detach', path], { stdio: 'pipe' })
  }
  return { path, backing, detach }
}

/** Why no file system can be mounted here, for the name of a skipped test; undefined where one can. */
export function mountProblem(): string | undefined {
  if (process.getuid?.() !== 0) return 'not root'
  const mountPoint = mkdtempSync(join(tmpdir(), 'fullstripe-mount-'))
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mountPoint], { stdio: 'pipe' })
    execFileSync('umount', [mountPoint], { stdio: 'pipe' })
    return undefined
  } catch {
    return 'mount is not permitted'
  } finally {
    rmdirSync(mountPoint)
  }
}

/** Why there are no loop devices here, for the name of a skipped test; undefined where there are. */
export function loopProblem(): string | undefined {
  const problem = mountProblem()
  if (problem !== undefined) return problem
  try {
    execFileSync('losetup', ['--find'], { stdio: 'pipe' })
    return undefined
  } catch {
    return 'no loop devices'
  }
}
