/**
 * An exclusive lock that lives exactly as long as its holder: flock(2) on an open file.
 *
 * Node has no flock, and a lock file whose mere existence counts would outlive a kill -9. But a flock belongs to
 * the *open file description*, which a child shares when it inherits the descriptor. So flock(1) of util-linux runs
 * once with our descriptor as its fd 3: it takes the lock and exits, and the lock stays with the description, which
 * is now held by this process alone. The kernel drops it when the last descriptor closes, however we end. Other
 * children do not prolong it, because Node opens every file close-on-exec.
 *
 * What always holds:
 *  - The lock is the kernel's. The text in the file (pid, description) is only for messages and may be stale.
 *  - The file is never unlinked: whoever unlinks a locked file lets a third process lock another file of the
 *    same name.
 *  - Order: lock, then write the text. A loser may therefore read an empty file, and says so.
 */
import { spawnSync } from 'node:child_process'
import { closeSync, constants, fstatSync, ftruncateSync, openSync, readSync, writeSync } from 'node:fs'
import { messageOf, systemCode, UserError } from './errors.ts'

/** Exit code of flock(1) when another description holds the lock; its other failures have other codes. */
const FLOCK_CONFLICT = 1
const TEXT_BYTES_MAX = 1024

export interface LockFile {
  readonly path: string
  /** Gives the lock up. Calling it twice is harmless. */
  release(): void
}

/**
 * Takes the lock, or fails at once.
 * @param path the lock file; created with mode 0600 where it is missing
 * @param what whoever asks, a few words for the other side's message, for instance `serve`
 * @throws UserError BUSY naming the holder; FAILED where the file cannot be opened or flock(1) is missing
 */
export function acquireLock(path: string, what: string): LockFile {
  let fd: number
  try {
    // O_NOFOLLOW: the text below is written over whatever is there, so it must be ours.
    fd = openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600)
  } catch (error) {
    throw new UserError('FAILED', `cannot open the lock file ${path}: ${explain(error)}`, { cause: error })
  }
  try {
    if (!fstatSync(fd).isFile())
      throw new UserError('FAILED', `the lock file ${path} is not a regular file: remove it`)
    if (!lockDescriptor(fd, path))
      throw new UserError('BUSY', `${path} is locked by ${holderOf(fd)}: stop it first`)
    writeHolder(fd, path, what)
  } catch (error) {
    closeSync(fd)
    throw error
  }
  let open = true
  return {
    path,
    release(): void {
      if (!open) return
      open = false
      try {
        ftruncateSync(fd, 0) // nobody is named who no longer holds it
      } catch {
        // The text is decoration; closing is what gives the lock up.
      }
      closeSync(fd)
    },
  }
}

/**
 * Takes an exclusive flock on the open file description behind `fd`, without waiting. It lasts until every
 * descriptor of that description is closed.
 * @returns false where another description holds a lock
 * @throws UserError FAILED where flock(1) is missing or the file system has no locks
 */
export function lockDescriptor(fd: number, path: string): boolean {
  // Short options: util-linux and busybox agree on them.
  const result = spawnSync('flock', ['-x', '-n', '3'], { stdio: ['ignore', 'ignore', 'pipe', fd] })
  if (result.error !== undefined) {
    if (systemCode(result.error) === 'ENOENT') {
      throw new UserError('FAILED', `cannot lock ${path}: the flock command is missing, install util-linux`)
    }
    throw new UserError('FAILED', `cannot lock ${path}: ${messageOf(result.error)}`, { cause: result.error })
  }
  if (result.status === 0) return true
  if (result.status === FLOCK_CONFLICT) return false
  const detail = result.stderr.toString('utf8').trim().split('\n', 1)[0]
  throw new UserError(
    'FAILED',
    `cannot lock ${path}: ${detail || `flock ended with ${result.signal ?? result.status}`}`,
  )
}

function writeHolder(fd: number, path: string, what: string): void {
  const text = Buffer.from(`${process.pid}\n${what.replace(/\s+/g, ' ')}\n`, 'utf8').subarray(
    0,
    TEXT_BYTES_MAX,
  )
  try {
    ftruncateSync(fd, 0)
    writeSync(fd, text, 0, text.length, 0)
  } catch (error) {
    // A full disk must not keep a pool from being opened: trimming it may be the way out. The lock is held anyway.
    const code = systemCode(error)
    if (code === 'ENOSPC' || code === 'EDQUOT') return
    throw new UserError('FAILED', `cannot write the lock file ${path}: ${explain(error)}`, { cause: error })
  }
}

function holderOf(fd: number): string {
  const buffer = Buffer.alloc(TEXT_BYTES_MAX)
  const [pid, what] = buffer
    .subarray(0, readSync(fd, buffer, 0, buffer.length, 0))
    .toString('utf8')
    .split('\n')
  if (pid === undefined || !/^\d+$/.test(pid)) return 'another process'
  return what ? `process ${pid} (${what})` : `process ${pid}`
}

function explain(error: unknown): string {
  switch (systemCode(error)) {
    case 'ENOENT':
      return 'its directory does not exist'
    case 'EROFS':
      return 'the file system is read-only'
    case 'EACCES':
    case 'EPERM':
      return 'permission denied'
    case 'ELOOP':
      return 'it is a symbolic link, remove it'
    case 'EISDIR':
      return 'it is a directory, remove it'
    case 'ENOSPC':
      return 'the file system is full'
    default:
      return messageOf(error)
  }
}
