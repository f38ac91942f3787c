import { fdatasync, read, readSync, write, writeSync } from 'node:fs'
import { assert } from '../base/assert.ts'
import { messageOf, StoreError, systemCode } from '../base/errors.ts'
import { AccessEpochs } from './access-epochs.ts'
import type { MemberCounters, StoreLayout } from './datapath.ts'
import { InlineGate } from './inline-gate.ts'

/**
 * Member access of the portable datapath: ranges of slots to system calls on the member files.
 *
 * Every access exists twice. `readNow` and `writeNow` run inline and throw; `readLater` and `writeLater` go
 * through the thread pool of node:fs and call back, never before they return. Which one is right at the moment
 * the gates say (inline-gate.ts). Later ones count in `epochs` from the call to the callback, so a barrier sees
 * them; an inline one is over before anybody could ask.
 *
 * Bytes past a member's current end read as zeros: member files are sparse and may be shorter than the pool says.
 *
 * A range may run over the end of its slot only where the store has one member: there slot s + 1 follows slot s,
 * and callers join neighbours into one system call.
 */
export type Done = (error: StoreError | null) => void

/** The system calls that are made on members, as node:fs has them; the simulation has its own. */
export interface MemberCalls {
  /** @returns bytes transferred: fewer than asked for at the end of the file, or whenever the kernel likes */
  readSync(fd: number, target: Buffer, start: number, length: number, position: number): number
  writeSync(fd: number, source: Buffer, start: number, length: number, position: number): number
  read(fd: number, target: Buffer, start: number, length: number, position: number, done: Transferred): void
  write(fd: number, source: Buffer, start: number, length: number, position: number, done: Transferred): void
  fdatasync(fd: number, done: (error: Error | null) => void): void
}
type Transferred = (error: Error | null, count: number) => void

const SYSTEM: MemberCalls = { readSync, writeSync, read, write, fdatasync }

/** What one member counts; the writable form of MemberCounters. */
interface Counts {
  reads: number
  readBytes: number
  writes: number
  writeBytes: number
  syncs: number
}

interface SyncRound {
  readonly promise: Promise<void>
  readonly resolve: () => void
  readonly reject: (error: StoreError) => void
}

export class PortableMembers {
  readonly stripeSize: number // bytes
  /** True where slots follow each other on one member. */
  readonly contiguous: boolean
  readonly epochs = new AccessEpochs()
  readonly readGate: InlineGate
  readonly writeGate: InlineGate

  readonly #calls: MemberCalls
  readonly #fds: readonly number[]
  readonly #chunkSize: number
  readonly #dataOffset: number
  readonly #counts: Counts[]

  // Set by #locate: the part of a range that lies on one member.
  #member = 0
  #position = 0
  #part = 0

  #syncRunning: SyncRound | null = null
  #syncNext: SyncRound | null = null
  #syncFailed: StoreError | null = null

  /** @param inlineBytesMax see InlineGate */
  constructor(layout: StoreLayout, inlineBytesMax?: number, calls = SYSTEM) {
    assert(layout.memberFds.length === layout.dataMembers + layout.parityMembers, 'k + p member descriptors')
    assert(layout.parityMembers === 0, 'parity members are not supported yet')
    this.stripeSize = layout.dataMembers * layout.chunkSize
    this.contiguous = layout.memberFds.length === 1
    this.readGate = new InlineGate(inlineBytesMax)
    this.writeGate = new InlineGate(inlineBytesMax)
    this.#calls = calls
    this.#fds = layout.memberFds
    this.#chunkSize = layout.chunkSize
    this.#dataOffset = layout.dataOffset
    this.#counts = layout.memberFds.map(() => ({
      reads: 0,
      readBytes: 0,
      writes: 0,
      writeBytes: 0,
      syncs: 0,
    }))
  }

  /** Fills target[start, start + length) from byte `offset` of `slot`. @throws StoreError */
  readNow(slot: number, offset: number, target: Buffer, start: number, length: number): void {
    const startMs = this.readGate.now()
    for (let done = 0; done < length; done += this.#part) {
      this.#locate(slot, offset + done, length - done)
      this.#countRead(this.#member, this.#part)
      let got = 0
      try {
        const fd = this.#fd(this.#member)
        while (got < this.#part) {
          const at = start + done + got
          const count = this.#calls.readSync(fd, target, at, this.#part - got, this.#position + got)
          if (count === 0) break
          got += count
        }
      } catch (error) {
        throw memberError('read', this.#member, this.#position, this.#part, error)
      }
      if (got < this.#part) target.fill(0, start + done + got, start + done + this.#part)
    }
    this.readGate.note(length, startMs)
  }

  /** Writes source[start, start + length) at byte `offset` of `slot`. @throws StoreError */
  writeNow(slot: number, offset: number, source: Buffer, start: number, length: number): void {
    const startMs = this.writeGate.now()
    for (let done = 0; done < length; done += this.#part) {
      this.#locate(slot, offset + done, length - done)
      this.#countWrite(this.#member, this.#part)
      try {
        const fd = this.#fd(this.#member)
        for (let put = 0; put < this.#part; ) {
          const at = start + done + put
          put += this.#calls.writeSync(fd, source, at, this.#part - put, this.#position + put)
        }
      } catch (error) {
        throw memberError('write', this.#member, this.#position, this.#part, error)
      }
    }
    this.writeGate.note(length, startMs)
  }

  /** `readNow` off this thread; `target` is the access's own until `done`. */
  readLater(slot: number, offset: number, target: Buffer, start: number, length: number, done: Done): void {
    this.#later(slot, offset, length, done, (member, position, at, part, partDone) => {
      this.#countRead(member, part)
      const fd = this.#fd(member)
      const from = start + at
      let got = 0
      const step = (error: Error | null, count: number): void => {
        if (error !== null) {
          partDone(memberError('read', member, position, part, error))
          return
        }
        got += count
        if (count === 0) target.fill(0, from + got, from + part)
        if (count === 0 || got === part) {
          partDone(null)
          return
        }
        this.#calls.read(fd, target, from + got, part - got, position + got, step)
      }
      this.#calls.read(fd, target, from, part, position, step)
    })
  }

  /** `writeNow` off this thread; nobody may change `source` until `done`. */
  writeLater(slot: number, offset: number, source: Buffer, start: number, length: number, done: Done): void {
    this.#later(slot, offset, length, done, (member, position, at, part, partDone) => {
      this.#countWrite(member, part)
      const fd = this.#fd(member)
      const from = start + at
      let put = 0
      const step = (error: Error | null, count: number): void => {
        if (error !== null) {
          partDone(memberError('write', member, position, part, error))
          return
        }
        put += count
        if (put === part) {
          partDone(null)
          return
        }
        this.#calls.write(fd, source, from + put, part - put, position + put, step)
      }
      this.#calls.write(fd, source, from, part, position, step)
    })
  }

  /** One read the way the gate says, for callers that can afford a promise. */
  read(slot: number, offset: number, target: Buffer): Promise<void> {
    if (!this.readGate.allows(target.length)) {
      return promised((done) => this.readLater(slot, offset, target, 0, target.length, done))
    }
    return promised((done) => {
      this.readNow(slot, offset, target, 0, target.length)
      done(null)
    })
  }

  /** `readLater` for callers that can afford a promise. */
  readInPool(slot: number, offset: number, target: Buffer): Promise<void> {
    return promised((done) => this.readLater(slot, offset, target, 0, target.length, done))
  }

  write(slot: number, offset: number, source: Buffer): Promise<void> {
    if (!this.writeGate.allows(source.length)) {
      return promised((done) => this.writeLater(slot, offset, source, 0, source.length, done))
    }
    return promised((done) => {
      this.writeNow(slot, offset, source, 0, source.length)
      done(null)
    })
  }

  /**
   * Makes all completed writes durable. Callers that arrive while a sync runs share the next one, never the
   * running one: it may have passed their file before their write was done.
   *
   * A failed sync fails all later ones too: after an error the kernel may count the lost pages as clean, so a
   * second fdatasync would succeed and promise what is not there.
   */
  sync(): Promise<void> {
    if (this.#syncFailed !== null) return Promise.reject(this.#syncFailed)
    if (this.#syncRunning === null) {
      this.#syncRunning = syncRound()
      this.#startSync(this.#syncRunning)
      return this.#syncRunning.promise
    }
    this.#syncNext ??= syncRound()
    return this.#syncNext.promise
  }

  counters(): readonly MemberCounters[] {
    return this.#counts.map((counts) => ({ ...counts }))
  }

  #startSync(round: SyncRound): void {
    const epoch = this.epochs.begin()
    let left = this.#fds.length
    let failure = this.#syncFailed
    const memberDone = (member: number, error: Error | null): void => {
      if (error !== null) {
        failure ??= new StoreError('MEMBER_IO', `member ${member}: sync failed: ${messageOf(error)}`, {
          cause: error,
        })
      }
      left--
      if (left > 0) return
      this.epochs.end(epoch)
      this.#syncFailed = failure
      this.#syncRunning = this.#syncNext
      this.#syncNext = null
      if (this.#syncRunning !== null) this.#startSync(this.#syncRunning)
      if (failure === null) round.resolve()
      else round.reject(failure)
    }
    this.#fds.forEach((fd, member) => {
      this.#count(member).syncs++
      this.#calls.fdatasync(fd, (error) => memberDone(member, error))
    })
  }

  /** Runs `start` for each member part of the range; `done` once, with the first error. */
  #later(
    slot: number,
    offset: number,
    length: number,
    done: Done,
    start: (member: number, position: number, at: number, part: number, partDone: Done) => void,
  ): void {
    assert(length > 0, 'an access has a length')
    const epoch = this.epochs.begin()
    let left = 1 // held by this loop
    let failure: StoreError | null = null
    const partDone = (error: StoreError | null): void => {
      failure ??= error
      left--
      if (left > 0) return
      this.epochs.end(epoch)
      done(failure)
    }
    for (let at = 0; at < length; ) {
      this.#locate(slot, offset + at, length - at)
      const part = this.#part
      left++
      start(this.#member, this.#position, at, part, partDone)
      at += part
    }
    left--
  }

  /** Where byte `offset` of `slot` lies, and how many of `length` bytes lie there in one piece (datapath.ts). */
  #locate(slot: number, offset: number, length: number): void {
    assert(slot > 0, 'slot 0 is never handed out')
    if (this.contiguous) {
      this.#member = 0
      this.#position = this.#dataOffset + slot * this.#chunkSize + offset
      this.#part = length
      return
    }
    assert(offset + length <= this.stripeSize, 'a range within its slot')
    const chunk = Math.floor(offset / this.#chunkSize)
    const within = offset - chunk * this.#chunkSize
    this.#member = (slot + chunk) % this.#fds.length
    this.#position = this.#dataOffset + slot * this.#chunkSize + within
    this.#part = Math.min(length, this.#chunkSize - within)
  }

  #fd(member: number): number {
    const fd = this.#fds[member]
    assert(fd !== undefined, 'member index')
    return fd
  }

  #count(member: number): Counts {
    const counts = this.#counts[member]
    assert(counts !== undefined, 'member index')
    return counts
  }

  #countRead(member: number, bytes: number): void {
    const counts = this.#count(member)
    counts.reads++
    counts.readBytes += bytes
  }

  #countWrite(member: number, bytes: number): void {
    const counts = this.#count(member)
    counts.writes++
    counts.writeBytes += bytes
  }
}

function promised(start: (done: Done) => void): Promise<void> {
  return new Promise((resolve, reject) => {
    start((error) => (error === null ? resolve() : reject(error)))
  })
}

function syncRound(): SyncRound {
  let resolve = (): void => {}
  let reject = (_error: StoreError): void => {}
  const promise = new Promise<void>((ok, failed) => {
    resolve = ok
    reject = failed
  })
  return { promise, resolve, reject }
}

function memberError(
  what: string,
  member: number,
  position: number,
  length: number,
  cause: unknown,
): StoreError {
  const code = systemCode(cause)
  const kind = code === 'ENOSPC' || code === 'EDQUOT' || code === 'EFBIG' ? 'NO_SPACE' : 'MEMBER_IO'
  const message = `member ${member}: ${what} of ${length} bytes at offset ${position} failed: ${messageOf(cause)}`
  return new StoreError(kind, message, { cause })
}
