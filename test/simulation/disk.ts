import { assert } from '../../src/base/assert.ts'
import type { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'

/**
 * A file on a disk that can lose its power, sector by sector.
 *
 *   cache    what the running kernel shows: every write is in it at once, and the death of a process does not touch it
 *   log      writes that no sync covers yet, in order; the disk may hold any of their sectors, or none
 *   stable   what is certainly on the disk
 *
 * A sync covers what was written before it began. One that fails leaves its pages in the cache, but clean: later syncs
 * succeed without them, and the kernel may forget them whenever it likes.
 */
export interface LoggedWrite {
  readonly offset: number
  readonly bytes: Buffer
}

/** What becomes of the writes in the log when the power fails. */
export const FATES = ['none', 'all', 'some', 'writes', 'last', 'all but one', 'first'] as const
export type Fate = (typeof FATES)[number]

export class SimFile {
  readonly name: string
  readonly size: number
  readonly cache: Buffer
  readonly #stable: Buffer
  #log: LoggedWrite[] = []
  #base = 0 // writes that have left the log
  /** Ranges that a failed sync has left in the cache only. */
  #dropped: { offset: number; length: number }[] = []

  constructor(name: string, size: number, fill = 0) {
    this.name = name
    this.size = size
    this.cache = Buffer.alloc(size, fill)
    this.#stable = Buffer.alloc(size, fill)
  }

  read(target: Buffer, offset: number): number {
    return this.cache.copy(target, 0, offset, Math.min(this.size, offset + target.length))
  }

  write(source: Buffer, offset: number): void {
    if (source.length === 0) return
    assert(offset + source.length <= this.size, `${this.name}: a write past the end, at ${offset}`)
    source.copy(this.cache, offset)
    this.#log.push({ offset, bytes: Buffer.from(source) })
  }

  /** Makes all content stable, as when the file was made. */
  settle(): void {
    this.cache.copy(this.#stable)
    this.#base += this.#log.length
    this.#log = []
    this.#dropped = []
  }

  /** Where a sync begins. */
  mark(): number {
    return this.#base + this.#log.length
  }

  /** A sync that began at `mark` has ended well. */
  synced(mark: number): void {
    for (const { offset, bytes } of this.#take(mark)) bytes.copy(this.#stable, offset)
  }

  /** A sync that began at `mark` has failed: some of it got down, none of it will be tried again. */
  syncFailed(mark: number, random: Random): void {
    for (const write of this.#take(mark)) {
      this.#settleSome(write, random)
      this.#dropped.push({ offset: write.offset, length: write.bytes.length })
    }
  }

  /** The kernel forgets what a failed sync left behind. */
  evict(): void {
    if (this.#dropped.length === 0) return
    for (const { offset, length } of this.#dropped)
      this.#stable.copy(this.cache, offset, offset, offset + length)
    for (const { offset, bytes } of this.#log) bytes.copy(this.cache, offset)
    this.#dropped = []
  }

  /** The kernel tries again what a failed sync left behind, as if it had not failed. */
  retry(): void {
    for (const { offset, length } of this.#dropped) {
      this.#log.push({ offset, bytes: Buffer.from(this.cache.subarray(offset, offset + length)) })
    }
    this.#dropped = []
  }

  /** The power fails. */
  cut(fate: Fate, random: Random): void {
    const log = this.#log
    const one = random.below(Math.max(1, log.length))
    log.forEach((write, index) => {
      switch (fate) {
        case 'none':
          return
        case 'all':
          this.#settle(write)
          return
        case 'some':
          this.#settleSome(write, random)
          return
        case 'writes':
          if (random.below(2) === 0) this.#settle(write)
          return
        case 'last':
          if (index === log.length - 1) this.#settle(write)
          return
        case 'all but one':
          if (index !== one) this.#settle(write)
          return
        case 'first':
          if (index < one) this.#settle(write)
          else if (index === one) this.#settleSome(write, random)
          return
      }
    })
    this.#stable.copy(this.cache)
    this.#base += log.length
    this.#log = []
    this.#dropped = []
  }

  get unsynced(): number {
    return this.#log.length
  }

  /** Sectors that were written since the last sync. */
  *unsyncedSectors(): Generator<number> {
    for (const { offset, bytes } of this.#log) {
      const end = offset + bytes.length
      for (let sector = Math.floor(offset / SECTOR); sector * SECTOR < end; sector++) yield sector
    }
  }

  #take(mark: number): LoggedWrite[] {
    const count = Math.max(0, mark - this.#base)
    this.#base += count
    return this.#log.splice(0, count)
  }

  #settle({ offset, bytes }: LoggedWrite): void {
    bytes.copy(this.#stable, offset)
  }

  #settleSome({ offset, bytes }: LoggedWrite, random: Random): void {
    for (let at = 0; at < bytes.length; ) {
      const end = Math.min(bytes.length, at + SECTOR - ((offset + at) % SECTOR))
      if (random.below(2) === 0) bytes.copy(this.#stable, offset + at, at, end)
      at = end
    }
  }
}
