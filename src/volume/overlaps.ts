import { assert } from '../base/assert.ts'

/**
 * Requests whose ranges overlap, one after the other in the order of arrival: two sides that do each request at their own pace end up
 * with the same content only then. A request enters at once where nothing overlaps with it, neither under way nor waiting before it.
 *
 * Ranges are looked up by buckets; what covers many of them (a large trim) is kept in a list of its own, which everybody looks at.
 */
export interface Entry {
  readonly start: number // bytes
  readonly end: number
  readonly buckets: readonly number[] | undefined // undefined: wide
  readonly go: () => void
  /** Entries that it waits for. */
  blockers: number
  readonly blocked: Entry[]
}

const BUCKET_BYTES = 1 << 18
const BUCKETS_MAX = 8

export class Overlaps {
  readonly #buckets = new Map<number, Set<Entry>>()
  readonly #wide = new Set<Entry>()
  #count = 0

  get size(): number {
    return this.#count
  }

  /** @param go called later where the entry has blockers; without any it may begin at once. `leave` ends it */
  enter(offset: number, length: number, go: () => void): Entry {
    const end = offset + length
    const entry: Entry = { start: offset, end, buckets: bucketsOf(offset, end), go, blockers: 0, blocked: [] }
    for (const other of this.#wide) meet(entry, other)
    if (entry.buckets === undefined) {
      for (const bucket of this.#buckets.values()) for (const other of bucket) meet(entry, other)
      this.#wide.add(entry)
    }
    for (const index of entry.buckets ?? []) {
      let bucket = this.#buckets.get(index)
      if (bucket === undefined) {
        bucket = new Set()
        this.#buckets.set(index, bucket)
      }
      for (const other of bucket) meet(entry, other)
      bucket.add(entry)
    }
    this.#count++
    return entry
  }

  leave(entry: Entry): void {
    assert(entry.blockers === 0, 'a request ends before it began')
    this.#count--
    if (entry.buckets === undefined) assert(this.#wide.delete(entry), 'a request ends twice')
    for (const index of entry.buckets ?? []) {
      const bucket = this.#buckets.get(index)
      assert(bucket?.delete(entry) === true, 'a request ends twice')
      if (bucket.size === 0) this.#buckets.delete(index)
    }
    for (const next of entry.blocked) {
      next.blockers--
      if (next.blockers === 0) next.go()
    }
  }
}

function meet(entry: Entry, other: Entry): void {
  if (other.start >= entry.end || entry.start >= other.end || other.blocked.includes(entry)) return
  other.blocked.push(entry)
  entry.blockers++
}

function bucketsOf(start: number, end: number): number[] | undefined {
  const first = Math.floor(start / BUCKET_BYTES)
  const last = Math.floor((end - 1) / BUCKET_BYTES)
  if (last - first >= BUCKETS_MAX) return undefined
  return Array.from({ length: last - first + 1 }, (_, index) => first + index)
}
