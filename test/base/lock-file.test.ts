import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { acquireLock, type LockFile } from '../../src/base/lock-file.ts'

let directory: string
let path: string
const children: ChildProcess[] = []

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'fullstripe-lock-'))
  path = join(directory, 'lock')
})
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill('SIGKILL')
      await once(child, 'exit')
    }
  }
  rmSync(directory, { recursive: true })
})

/** Another process with the lock, the way any flock user holds it: `exec` so that the pid is the holder's. */
async function holder(): Promise<ChildProcess> {
  const script = 'exec 9<>"$0"; flock -x 9; echo "$$" >&9; echo "sh test" >&9; echo held; exec sleep 1000'
  const child = spawn('bash', ['-c', script, path], { stdio: ['ignore', 'pipe', 'inherit'] })
  children.push(child)
  await once(child.stdout, 'data')
  return child
}

function attempt(): LockFile | unknown {
  try {
    return acquireLock(path, 'test')
  } catch (error) {
    return error
  }
}

describe('acquireLock', () => {
  it('creates the file for its owner only, names the holder in it, and empties it on release', () => {
    const lock = acquireLock(path, 'serve\n/srv/pool')
    expect(statSync(path).mode & 0o777).toBe(0o600)
    expect(readFileSync(path, 'utf8')).toBe(`${process.pid}\nserve /srv/pool\n`)
    lock.release()
    expect(readFileSync(path, 'utf8')).toBe('')
    lock.release() // harmless
    acquireLock(path, 'again').release()
  })

  it('excludes a second lock of the same process, whose pid it names', () => {
    const lock = acquireLock(path, 'serve')
    expect(attempt()).toMatchObject({
      name: 'UserError',
      code: 'BUSY',
      message: `${path} is locked by process ${process.pid} (serve): stop it first`,
    })
    lock.release()
    acquireLock(path, 'serve').release()
  })

  it('still holds after flock(1) has exited: another process cannot take it', async () => {
    const lock = acquireLock(path, 'serve')
    const other = spawn('flock', ['-x', '-n', path, 'true'])
    expect(await once(other, 'exit')).toEqual([1, null])
    lock.release()
    const later = spawn('flock', ['-x', '-n', path, 'true'])
    expect(await once(later, 'exit')).toEqual([0, null])
  })

  it('is not inherited by other children, who would prolong it', async () => {
    const lock = acquireLock(path, 'serve')
    const child = spawn('sleep', ['1000'])
    children.push(child)
    await once(child, 'spawn')
    lock.release()
    acquireLock(path, 'next').release()
  })

  it('names another process, and gets the lock the moment that is killed with SIGKILL', async () => {
    const child = await holder()
    expect(attempt()).toMatchObject({
      code: 'BUSY',
      message: expect.stringContaining(`process ${child.pid} (sh test)`),
    })
    child.kill('SIGKILL')
    await once(child, 'exit')
    const lock = acquireLock(path, 'serve') // the stale text of the killed one does not count
    expect(readFileSync(path, 'utf8')).toBe(`${process.pid}\nserve\n`)
    lock.release()
  })

  it('leaves no descriptor behind when it is refused', async () => {
    const count = (): number => readdirSync('/proc/self/fd').length
    const lock = acquireLock(path, 'serve')
    const before = count()
    for (let i = 0; i < 5; i++) attempt()
    expect(count()).toBe(before)
    lock.release()
  })

  it('says what is wrong with the path', () => {
    path = join(directory, 'missing', 'lock')
    expect(attempt()).toMatchObject({
      code: 'FAILED',
      message: expect.stringContaining('directory does not exist'),
    })
    path = join(directory, 'directory')
    mkdirSync(path)
    expect(attempt()).toMatchObject({ code: 'FAILED', message: expect.stringContaining('is a directory') })
    const target = join(directory, 'precious')
    writeFileSync(target, 'precious')
    path = join(directory, 'link')
    symlinkSync(target, path)
    expect(attempt()).toMatchObject({ code: 'FAILED', message: expect.stringContaining('symbolic link') })
    expect(readFileSync(target, 'utf8')).toBe('precious')
    path = '/dev/null'
    expect(attempt()).toMatchObject({
      code: 'FAILED',
      message: expect.stringContaining('not a regular file'),
    })
  })

  it('says what to install when flock(1) is missing', () => {
    vi.stubEnv('PATH', directory)
    try {
      expect(attempt()).toMatchObject({
        code: 'FAILED',
        message: expect.stringContaining('install util-linux'),
      })
    } finally {
      vi.unstubAllEnvs()
    }
  })
})
