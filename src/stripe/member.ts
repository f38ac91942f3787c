/**
 * A member holds chunks: a row of every slot, at `dataOffset + slot * chunkSize`. `Member` is the one interface through
 * which the rest of the program knows it; a file or a block device is today's only kind. Nothing above this folder
 * may rely on `fd`, except to hand it to a datapath that can use one.
 *
 * What always holds:
 *  - One process uses a member. A file is held with flock(2), a device with O_EXCL, which the kernel also refuses to
 *    mount, mkfs, md and LVM meanwhile. The pool's lock file is not enough: a pool directory can be copied, and
 *    then two pools with the same uuid name the same members.
 *  - `read` and `write` transfer everything or reject; a failed call has written any part of its range, or none.
 *  - `sync` makes every write that resolved before the call durable.
 */
import { spawn } from 'node:child_process'
import type { BigIntStats } from 'node:fs'
import {
  close,
  closeSync,
  constants,
  fdatasync,
  fstat,
  fstatSync,
  openSync,
  read,
  readFileSync,
  readSync,
  write,
} from 'node:fs'
import { stat } from 'node:fs/promises'
import { promisify } from 'node:util'
import { assert } from '../base/assert.ts'
import { messageOf, StoreError, systemCode, UserError } from '../base/errors.ts'
import { lockDescriptor } from '../base/lock-file.ts'
import { Mutex } from '../base/locks.ts'
import { formatSize } from '../base/sizes.ts'
import type { SuperblockReading } from './superblock.ts'
import { readSuperblocks, SUPERBLOCK_AREA } from './superblock.ts'

export type MemberKind = 'file' | 'device'

export interface Member {
  readonly index: number
  readonly path: string
  /** `member 1 (/dev/sdb)`, for messages. */
  readonly name: string
  readonly kind: MemberKind
  /** Bytes when it was opened; for a sparse file its logical size. */
  readonly size: number
  /** For a datapath that works on descriptors; undefined for a member that has none. */
  readonly fd: number | undefined

  /** @throws StoreError MEMBER_IO that names member and offset; also where the member ends before the range does */
  read(target: Buffer, offset: number): Promise<void>
  /** @throws StoreError MEMBER_IO, or NO_SPACE where the file system below is full */
  write(source: Buffer, offset: number): Promise<void>
  /** @throws StoreError MEMBER_IO */
  sync(): Promise<void>
  /** Gives the space of a range back; it reads as zeros afterwards. False, and nothing changed, where that is not possible. */
  punch(offset: number, length: number): Promise<boolean>
  /** What its superblocks say now. */
  identify(): Promise<SuperblockReading>
  /** What happened to it since it was opened (removed, replaced, cut short), with the remedy; undefined while all is well. */
  probe(): Promise<string | undefined>
  close(): Promise<void>
}

const readAsync = promisify(read)
const writeAsync = promisify(write)
const fdatasyncAsync = promisify(fdatasync)
const fstatAsync = promisify(fstat)
const closeAsync = promisify(close)

/** Devices are measured in 512-byte sectors by the kernel, whatever their own sector size. */
const SYSFS_SECTOR = 512

export class FileMember implements Member {
  readonly index: number
  readonly path: string
  readonly name: string
  readonly kind: MemberKind
  readonly fd: number
  readonly #identity: string
  readonly #punching = new Mutex()
  #size: number
  #open = true

  private constructor(index: number, path: string, fd: number, stats: BigIntStats) {
    this.index = index
    this.path = path
    this.name = memberName(index, path)
    this.kind = stats.isBlockDevice() ? 'device' : 'file'
    this.fd = fd
    this.#identity = identityOf(stats)
    this.#size = this.kind === 'device' ? deviceSize(stats.rdev, fd) : Number(stats.size)
  }

  /**
   * Opens for reading and writing, and claims it for this process.
   * @param mode `create` makes a new file (mode 0600) and fails where anything has that name
   * @throws UserError NOT_FOUND, EXISTS, BUSY or REFUSED, each naming the member and what to do
   */
  static open(index: number, path: string, mode: 'create' | 'existing' = 'existing'): FileMember {
    const fd = openDescriptor(index, path, mode)
    try {
      const member = new FileMember(index, path, fd, fstatSync(fd, { bigint: true }))
      if (member.kind === 'file' && !lockDescriptor(fd, path)) {
        throw new UserError('BUSY', `${member.name} is in use by another process: stop it first`)
      }
      return member
    } catch (error) {
      closeSync(fd)
      throw error
    }
  }

  get size(): number {
    return this.#size
  }

  async read(target: Buffer, offset: number): Promise<void> {
    assert(this.#open, 'read of a closed member')
    for (let done = 0; done < target.length; ) {
      const count = await this.#io('read', target.length, offset, () =>
        readAsync(this.fd, target, done, target.length - done, offset + done).then(
          (result) => result.bytesRead,
        ),
      )
      if (count === 0)
        throw this.#error('read', target.length, offset, new Error(`it ends at ${offset + done}`))
      done += count
    }
  }

  async write(source: Buffer, offset: number): Promise<void> {
    assert(this.#open, 'write of a closed member')
    for (let done = 0; done < source.length; ) {
      done += await this.#io('write', source.length, offset, () =>
        writeAsync(this.fd, source, done, source.length - done, offset + done).then(
          (result) => result.bytesWritten,
        ),
      )
    }
  }

  async sync(): Promise<void> {
    assert(this.#open, 'sync of a closed member')
    try {
      await fdatasyncAsync(this.fd)
    } catch (error) {
      throw new StoreError('MEMBER_IO', `${this.name}: sync failed: ${messageOf(error)}`, { cause: error })
    }
  }

  /** Node has no fallocate(2); fallocate(1) works on files and devices alike. One at a time: each is a process. */
  punch(offset: number, length: number): Promise<boolean> {
    assert(this.#open, 'punch of a closed member')
    return this.#punching.run(() => punchHole(this.fd, offset, length))
  }

  async identify(): Promise<SuperblockReading> {
    const area = Buffer.alloc(SUPERBLOCK_AREA)
    await this.read(area.subarray(0, Math.min(this.#size, area.length)), 0)
    return readSuperblocks(area)
  }

  async probe(): Promise<string | undefined> {
    assert(this.#open, 'probe of a closed member')
    try {
      return (await this.#probeDescriptor()) ?? (await this.#probePath())
    } catch (error) {
      if (systemCode(error) === undefined) throw error
      return `${this.name} does not answer (${messageOf(error)}): stop the daemon and examine it`
    }
  }

  async #probeDescriptor(): Promise<string | undefined> {
    const now = await fstatAsync(this.fd, { bigint: true })
    if (this.kind === 'file' && now.nlink === 0n) {
      return `${this.name} was deleted: copy /proc/${process.pid}/fd/${this.fd} to a safe place before this process ends`
    }
    const size = this.kind === 'device' ? deviceSize(now.rdev, this.fd) : Number(now.size)
    if (size >= this.#size) return undefined
    const lengths = `${formatSize(size)} instead of ${formatSize(this.#size)}`
    return `${this.name} was cut short (${lengths}): stop the daemon and restore it`
  }

  async #probePath(): Promise<string | undefined> {
    try {
      const there = await stat(this.path, { bigint: true })
      if (identityOf(there) === this.#identity) return undefined
      return `${this.name} is no longer at its path, another one is: put the original back before the next start`
    } catch (error) {
      if (systemCode(error) !== 'ENOENT') throw error
      return `${this.name} is no longer at its path: put it back before the next start`
    }
  }

  async close(): Promise<void> {
    if (!this.#open) return
    this.#open = false
    await closeAsync(this.fd)
  }

  /** The size was changed on purpose (creation); `probe` compares with the new one. */
  resized(): void {
    assert(this.kind === 'file', 'resize of a device')
    this.#size = Number(fstatSync(this.fd, { bigint: true }).size)
  }

  async #io(
    what: 'read' | 'write',
    length: number,
    offset: number,
    action: () => Promise<number>,
  ): Promise<number> {
    try {
      return await action()
    } catch (error) {
      throw this.#error(what, length, offset, error)
    }
  }

  #error(what: 'read' | 'write', length: number, offset: number, cause: unknown): StoreError {
    const code = systemCode(cause)
    const full = what === 'write' && (code === 'ENOSPC' || code === 'EDQUOT')
    const message = `${this.name}: ${what} of ${length} bytes at ${offset} failed: ${messageOf(cause)}`
    return new StoreError(full ? 'NO_SPACE' : 'MEMBER_IO', message, { cause })
  }
}

export function memberName(index: number, path: string): string {
  return `member ${index} (${path})`
}

/** The same for two names of one file or device, however they are spelled or linked. */
export function identityOf(stats: BigIntStats): string {
  return stats.isBlockDevice() ? `device ${stats.rdev}` : `file ${stats.dev}:${stats.ino}`
}

function openDescriptor(index: number, path: string, mode: 'create' | 'existing'): number {
  const name = memberName(index, path)
  try {
    if (mode === 'create')
      return openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL, 0o600)
    // O_NONBLOCK keeps a fifo or a drive without medium from hanging the program; regular I/O ignores it.
    const fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK)
    const stats = fstatSync(fd, { bigint: true })
    if (stats.isFile()) return fd
    closeSync(fd)
    if (!stats.isBlockDevice()) throw new UserError('REFUSED', `${name} is neither a file nor a block device`)
    // The kernel opens a read-only device for writing, and fails the writes.
    if (deviceAttribute(stats.rdev, 'ro') === '1')
      throw new UserError('REFUSED', `${name} is read-only: make it writable`)
    // Without O_CREAT, O_EXCL on a device claims it: EBUSY while it is mounted or belongs to another claimant.
    return openSync(path, constants.O_RDWR | constants.O_NONBLOCK | constants.O_EXCL)
  } catch (error) {
    switch (systemCode(error)) {
      case undefined:
        throw error
      case 'ENOENT':
        if (mode === 'create')
          throw new UserError('NOT_FOUND', `${name}: its directory does not exist`, { cause: error })
        throw new UserError('NOT_FOUND', `${name} is missing: put it back at this path`, { cause: error })
      case 'ENXIO':
      case 'ENODEV':
      case 'ENOMEDIUM':
        throw new UserError('NOT_FOUND', `${name} is missing: the device is not there`, { cause: error })
      case 'EEXIST':
        throw new UserError('EXISTS', `${name} exists already: remove it or choose another directory`, {
          cause: error,
        })
      case 'EBUSY':
        throw new UserError('BUSY', `${name} is in use: unmount it or stop what holds it`, { cause: error })
      case 'EISDIR':
        throw new UserError('REFUSED', `${name} is a directory: a member is a file or a block device`, {
          cause: error,
        })
      case 'EACCES':
      case 'EPERM':
        throw new UserError('REFUSED', `${name} is not writable: permission denied`, { cause: error })
      case 'EROFS':
        throw new UserError('REFUSED', `${name} is read-only: make it writable`, { cause: error })
      default:
        throw new UserError('FAILED', `${name} cannot be opened: ${messageOf(error)}`, { cause: error })
    }
  }
}

/** stat says 0 for a device, and Node cannot seek: the kernel's own tables know the size; reading finds it without them. */
function deviceSize(rdev: bigint, fd: number): number {
  const sectors = deviceAttribute(rdev, 'size')
  return sectors === undefined ? readableSize(fd) : Number(sectors) * SYSFS_SECTOR
}

/** Undefined where /sys is not mounted, or the device is gone. */
function deviceAttribute(rdev: bigint, attribute: 'size' | 'ro'): string | undefined {
  // The encoding of dev_t: 12 + 20 bits of major, 8 + 24 bits of minor, interleaved.
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & ~0xfffn)
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & ~0xffn)
  try {
    return readFileSync(`/sys/dev/block/${major}:${minor}/${attribute}`, 'latin1').trim()
  } catch (error) {
    if (systemCode(error) === undefined) throw error
    return undefined
  }
}

/** The size of whatever `fd` is, found by reading single bytes: a read at or past the end gives none. */
export function readableSize(fd: number): number {
  const byte = Buffer.alloc(1)
  const readable = (offset: number): boolean => {
    try {
      return readSync(fd, byte, 0, 1, offset) === 1
    } catch (error) {
      if (systemCode(error) === 'EINVAL' || systemCode(error) === 'ENXIO') return false // past the end, to some drivers
      throw error
    }
  }
  if (!readable(0)) return 0
  let inside = 0
  let outside = 1
  while (outside < 2 ** 52 && readable(outside)) outside *= 2
  while (outside - inside > 1) {
    const middle = inside + Math.floor((outside - inside) / 2)
    if (readable(middle)) inside = middle
    else outside = middle
  }
  return outside
}

function punchHole(fd: number, offset: number, length: number): Promise<boolean> {
  // The descriptor, not the path: another file may lie at the path by now.
  const range = ['--offset', String(offset), '--length', String(length)]
  const child = spawn('fallocate', ['--punch-hole', ...range, '/proc/self/fd/3'], {
    stdio: ['ignore', 'ignore', 'ignore', fd],
  })
  return new Promise((resolve) => {
    child.once('error', () => resolve(false))
    child.once('close', (code) => resolve(code === 0))
  })
}
