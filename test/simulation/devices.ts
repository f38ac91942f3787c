import { StoreError } from '../../src/base/errors.ts'
import type { MemberCalls } from '../../src/datapath/portable-members.ts'
import type { JournalFile } from '../../src/metadata/journal.ts'
import type { Member } from '../../src/stripe/member.ts'
import type { SuperblockReading } from '../../src/stripe/superblock.ts'
import { SECTOR } from '../support/sector-data.ts'
import type { SimFile } from './disk.ts'
import type { Process } from './process.ts'

/**
 * Members and journal files as one process sees them: system calls on SimFiles which are slow, come back in any order, do
 * half of what they were asked for, and fail. The process may die within any of them; from then on nothing has an effect, and
 * nothing comes back.
 */
const FD_BASE = 100

/** The system calls of the portable datapath. */
export class SimCalls implements MemberCalls {
  readonly #process: Process
  readonly #files: readonly SimFile[]

  constructor(process: Process, files: readonly SimFile[]) {
    this.#process = process
    this.#files = files
  }

  readSync(fd: number, target: Buffer, start: number, length: number, position: number): number {
    const { process } = this
    if (!process.alive || process.dies('access')) return length
    this.#stall()
    if (process.fails('read')) throw systemError('EIO', 'read')
    return this.#file(fd).read(target.subarray(start, start + this.#short(length)), position)
  }

  writeSync(fd: number, source: Buffer, start: number, length: number, position: number): number {
    const { process } = this
    const file = this.#file(fd)
    if (!process.alive) return length
    if (process.dies('access')) {
      file.write(source.subarray(start, start + sectors(process, length)), position)
      return length
    }
    this.#stall()
    const error = this.#writeError()
    if (error !== undefined) {
      file.write(source.subarray(start, start + sectors(process, length)), position)
      throw error
    }
    const count = this.#short(length)
    file.write(source.subarray(start, start + count), position)
    process.scheduler.trace(() => `  ${file.name} has ${count} bytes at ${position}`)
    return count
  }

  read(
    fd: number,
    target: Buffer,
    start: number,
    length: number,
    position: number,
    done: (error: Error | null, count: number) => void,
  ): void {
    const { process } = this
    const file = this.#file(fd)
    this.#pieces('read', position, this.#short(length), (from, to, last) => {
      if (last && process.fails('read')) {
        done(systemError('EIO', 'read'), 0)
        return
      }
      file.read(target.subarray(start + from, start + to), position + from)
      if (last) done(null, to)
    })
  }

  write(
    fd: number,
    source: Buffer,
    start: number,
    length: number,
    position: number,
    done: (error: Error | null, count: number) => void,
  ): void {
    const { process } = this
    const file = this.#file(fd)
    const error = this.#writeError()
    this.#pieces(
      'write',
      position,
      this.#short(length),
      (from, to, last) => {
        const end = error !== undefined && last ? from + sectors(process, to - from) : to
        file.write(source.subarray(start + from, start + end), position + from)
        process.scheduler.trace(() => `  ${file.name} has ${end - from} bytes at ${position + from}`)
        if (!last) return
        // What is in the page cache is not told at once.
        process.later('written', position, () => (error === undefined ? done(null, to) : done(error, 0)))
      },
      (from, to) =>
        file.write(
          source.subarray(start + from, start + from + sectors(process, to - from)),
          position + from,
        ),
    )
  }

  fdatasync(fd: number, done: (error: Error | null) => void): void {
    syncLater(this.#process, this.#file(fd), 'member sync', done)
  }

  /** An access in one to three steps. @param torn the process dies within this one */
  #pieces(
    kind: string,
    position: number,
    length: number,
    step: (from: number, to: number, last: boolean) => void,
    torn: (from: number, to: number) => void = () => {},
  ): void {
    const { process } = this
    const cut = process.random.below(3) === 0 ? sectors(process, length) : 0
    const next = (from: number, to: number): void => {
      process.event(kind, position / SECTOR, () => {
        if (process.dies('access')) {
          torn(from, to)
          return
        }
        step(from, to, to === length)
        if (to < length) next(to, length)
      })
    }
    next(0, cut > 0 ? cut : length)
  }

  /** A call that takes so long that the datapath prefers its threads for a while. */
  #stall(): void {
    const { process } = this
    if (process.random.below(400) === 0) process.scheduler.now += 5
  }

  #short(length: number): number {
    const { process } = this
    if (length <= SECTOR || process.random.below(12) > 0) return length
    return SECTOR * (1 + process.random.below(length / SECTOR))
  }

  #writeError(): Error | undefined {
    if (!this.process.fails('write')) return undefined
    return systemError(this.process.random.below(2) === 0 ? 'EIO' : 'ENOSPC', 'write')
  }

  get process(): Process {
    return this.#process
  }

  #file(fd: number): SimFile {
    const file = this.#files[fd - FD_BASE]
    if (file === undefined) throw new Error(`no such descriptor: ${fd}`)
    return file
  }
}

/** A member as opening and checking a pool see it. */
export class SimMember implements Member {
  readonly index: number
  readonly path: string
  readonly name: string
  readonly kind = 'file'
  readonly size: number
  readonly fd: number
  readonly #process: Process
  readonly #file: SimFile
  readonly #reading: SuperblockReading

  constructor(process: Process, index: number, file: SimFile, reading: SuperblockReading) {
    this.index = index
    this.path = file.name
    this.name = `member ${index} (${file.name})`
    this.size = file.size
    this.fd = FD_BASE + index
    this.#process = process
    this.#file = file
    this.#reading = reading
  }

  async read(target: Buffer, offset: number): Promise<void> {
    this.#file.read(target, offset)
  }

  async write(source: Buffer, offset: number): Promise<void> {
    this.#file.write(source, offset)
  }

  sync(): Promise<void> {
    return new Promise((resolve, reject) => {
      syncLater(this.#process, this.#file, 'member sync', (error) => {
        if (error === null) resolve()
        else reject(new StoreError('MEMBER_IO', `${this.name}: sync failed`, { cause: error }))
      })
    })
  }

  punch(offset: number, length: number): Promise<boolean> {
    return new Promise((resolve) => {
      this.#process.event('punch', offset / SECTOR, () => {
        if (this.#process.dies('access')) return
        this.#file.write(Buffer.alloc(length), offset)
        resolve(true)
      })
    })
  }

  async identify(): Promise<SuperblockReading> {
    return this.#reading
  }

  async probe(): Promise<undefined> {}
  async close(): Promise<void> {}
}

/** A journal file: writes are at once in the page cache, or fail with some of their sectors there. */
export function simJournalFile(process: Process, file: SimFile): JournalFile {
  return {
    size: file.size,
    read(target, position) {
      file.read(target, position)
    },
    write(source, position) {
      if (!process.alive) return
      const ends = process.dies('journal')
      if (ends && process.syncFailedAt === process.scheduler.steps) process.failureUntold = true
      const fails = !ends && process.fails('journal write')
      if (ends || fails) file.write(source.subarray(0, words(process, source.length)), position)
      else file.write(source, position)
      process.scheduler.trace(
        () => `  ${file.name} has ${source.length} bytes at ${position}${fails ? ', not all' : ''}`,
      )
      if (fails) throw systemError(process.random.below(2) === 0 ? 'EIO' : 'ENOSPC', 'write')
    },
    sync: () =>
      new Promise((resolve, reject) => {
        syncLater(process, file, 'journal sync', (error) => (error === null ? resolve() : reject(error)))
      }),
    close() {},
  }
}

function syncLater(
  process: Process,
  file: SimFile,
  kind: 'member sync' | 'journal sync',
  done: (error: Error | null) => void,
): void {
  const mark = file.mark()
  process.syncsUnderWay++
  process.event(kind, mark, () => {
    if (process.dies('sync')) return
    if (process.fails(kind)) {
      process.later(kind, mark, () => {
        file.syncFailed(mark, process.random)
        process.syncsUnderWay--
        process.syncFailed = true
        process.syncFailedAt = process.scheduler.steps
        done(systemError('EIO', 'fdatasync'))
      })
      return
    }
    file.synced(mark)
    process.later('synced', mark, () => {
      process.syncsUnderWay--
      if (process.syncFailed) process.syncFailedAt = process.scheduler.steps // it is told when the last one has ended
      done(null)
    })
  })
}

/** Fewer bytes than `length`, whole sectors. */
function sectors(process: Process, length: number): number {
  return SECTOR * process.random.below(Math.max(1, length / SECTOR))
}

/** Fewer bytes than `length`: a write that is short or cut off by death ends anywhere in the page cache. */
function words(process: Process, length: number): number {
  return 8 * process.random.below(length / 8)
}

function systemError(code: string, call: string): Error {
  return Object.assign(new Error(`${code}: ${call}`), { code })
}
