import { assert } from '../base/assert.ts'

/**
 * Requests whose ranges overlap, one after the other in the order of arrival: two sides that do each request at their own pace end up
 * with the same content only then. A request enters at once where nothing overlaps with it, neither under way nor waiting before it.
 *
 * Requests within one bucket of the address space look at those of their bucket only; the others are in a list that everybody looks at.
 */
export interface Entry {
  readonly start: number // bytes
  readonly end: number
  readonly bucket: number // WIDE where it lies in several
  readonly go: () => void
  /** Entries that it waits for. */
  blockers: number
  blocked: Entry[] | undefined
}

const BUCKET_BYTES = 1 << 18
const WIDE = -1

export class Overlaps {
  readonly #buckets = new Map<number, Entry[]>()
  readonly #wide = new Set<Entry>()
  #count = 0

  get size(): number {
    return this.#count
  }

  /** @param go called later where the entry has blockers; without any it may begin at once. `leave` ends it */
  enter(offset: number, length: number, go: () => void): Entry {
    const end = offset + length
    const first = Math.floor(offset / BUCKET_BYTES)
    const bucket = first === Math.floor((end - 1) / BUCKET_BYTES) ? first : WIDE
    const entry: Entry = { start: offset, end, bucket, go, blockers: 0, blocked: undefined }
    if (this.#wide.size > 0) for (const other of this.#wide) meet(entry, other)
    if (bucket === WIDE) {
      for (const others of this.#buckets.values()) for (const other of others) meet(entry, other)
      this.#wide.add(entry)
    } else {
      const others = this.#buckets.get(bucket)
      if (others === undefined) {
        this.#buckets.set(bucket, [entry])
      } else {
        for (const other of others) meet(entry, other)
        others.push(entry)
      }
    }
    this.#count++
    return entry
  }

  leave(entry: Entry): void {
    assert(entry.blockers === 0, 'a request ends before it began')
    this.#count--
    if (entry.bucket === WIDE) {
      assert(this.#wide.delete(entry), 'a request ends twice')
    } else {
      const others = this.#buckets.get(entry.bucket)
      const at = others?.indexOf(entry) ?? -1
      assert(others !== undefined && at >= 0, 'a request ends twice')
      if (others.length === 1) this.#buckets.delete(entry.bucket)
      else others.splice(at, 1)
    }
    for (const next of entry.blocked ?? []) {
      next.blockers--
      if (next.blockers === 0) next.go()
    }
  }
}

/** Each meets each other once: a bucket and the wide ones have no entry in common. */
function meet(entry: Entry, other: Entry): void {
  if (other.start >= entry.end || entry.start >= other.end) return
  other.blocked ??= []
  other.blocked.push(entry)
  entry.blockers++
}
