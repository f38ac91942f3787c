import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import { StoreError } from '../base/errors.ts'
import { type MetadataPage, type PageKind, REGION_PAGE_BITS } from './records.ts'

/**
 * A bitmap that is kept like the tables of a volume: changes go to the journal, pages to LMDB with the checkpoint. It knows how many
 * of its bits are 1 and which pages are dirty. What is empty stays unbacked by memory, however long it is.
 */
const PAGE_WORDS = REGION_PAGE_BITS / 32

/** What a change of a page was: these bits had these values before. */
interface Before {
  readonly page: number
  readonly changed: Uint32Array
  readonly words: Uint32Array
}

export class PagedBitmap {
  readonly medium: number
  readonly kind: PageKind
  #bits: Bitmap
  #length: number
  #count = 0
  readonly #dirty = new Set<number>() // pages

  constructor(medium: number, kind: PageKind, length: number) {
    this.medium = medium
    this.kind = kind
    this.#length = length
    this.#bits = new Bitmap(length)
  }

  get length(): number {
    return this.#length
  }
  get count(): number {
    return this.#count
  }
  get dirtyPages(): number {
    return this.#dirty.size
  }

  get(index: number): boolean {
    return this.#bits.get(index)
  }

  /** The first bit at or after `index` that is 1 (or 0); `length` where there is none. */
  nextSet(index: number): number {
    return index < this.#length && this.#count > 0 ? this.#bits.nextSet(index, this.#length) : this.#length
  }
  nextClear(index: number): number {
    return index < this.#length ? this.#bits.nextClear(index, this.#length) : this.#length
  }

  /** Bits that are 1, in order. */
  *each(): Generator<number> {
    for (let at = this.nextSet(0); at < this.#length; at = this.nextSet(at + 1)) yield at
  }

  /** Bits [first, end) get the value; what lies past the end of the bitmap is left out. */
  put(first: number, end: number, value: boolean): void {
    const last = Math.min(end, this.#length)
    for (let at = first; at < last; ) {
      const page = Math.floor(at / REGION_PAGE_BITS)
      const stop = Math.min(last, (page + 1) * REGION_PAGE_BITS)
      const ones = this.#bits.count(at, stop)
      const change = value ? stop - at - ones : -ones
      if (change !== 0) {
        if (value) this.#bits.setRange(at, stop)
        else this.#bits.clearRange(at, stop)
        this.#count += change
        this.#dirty.add(page)
      }
      at = stop
    }
  }

  /** Bits from `from` on become 0. @returns takes that back */
  clear(from = 0): () => void {
    const changes: Before[] = []
    for (let at = this.nextSet(from); at < this.#length; ) {
      const page = Math.floor(at / REGION_PAGE_BITS)
      const next = this.#page(page)
      const first = Math.max(0, from - page * REGION_PAGE_BITS)
      new Bitmap(REGION_PAGE_BITS, next).clearRange(first, REGION_PAGE_BITS)
      changes.push(...this.#exchange(page, next))
      at = this.nextSet((page + 1) * REGION_PAGE_BITS)
    }
    return () => this.#restore(changes)
  }

  /** Every bit becomes what it is in `bits`; 0 where that is shorter. @returns takes that back */
  replace(bits: Bitmap): () => void {
    return this.#adopt(bits, true)
  }

  /** Bits that are 1 in `bits` become 1. @returns takes that back */
  merge(bits: Bitmap): () => void {
    return this.#adopt(bits, false)
  }

  /** Pages without a 1 stay untouched, and without memory behind them. */
  #longer(length: number): Bitmap {
    const { words } = this.#bits
    const longer = new Uint32Array(Bitmap.wordCount(length))
    for (let at = this.nextSet(0); at < this.#length; ) {
      const page = Math.floor(at / REGION_PAGE_BITS)
      longer.set(words.subarray(page * PAGE_WORDS, (page + 1) * PAGE_WORDS), page * PAGE_WORDS)
      at = this.nextSet((page + 1) * REGION_PAGE_BITS)
    }
    return new Bitmap(length, longer)
  }

  /** What lies past a new end is forgotten. @returns takes that back */
  resize(length: number): () => void {
    const before = this.#length
    const undo = this.clear(length)
    // A shorter one keeps its memory: it may have to come back.
    if (this.#bits.length < length) this.#bits = this.#longer(length)
    this.#length = length
    return () => {
      this.clear(before)
      this.#length = before
      undo()
    }
  }

  /** Takes over a stored page, before anything else happens. @throws StoreError DAMAGED when it lies past the end */
  loadPage(index: number, bytes: Buffer): void {
    const first = index * REGION_PAGE_BITS
    if (index < 0 || first >= this.#length || bytes.length > REGION_PAGE_BITS / 8) {
      throw new StoreError(
        'DAMAGED',
        `metadata: ${this.kind} page ${index} of medium ${this.medium} lies past the end of its volume`,
      )
    }
    const words = new Uint32Array(PAGE_WORDS)
    bytes.copy(Buffer.from(words.buffer))
    const past = new Bitmap(REGION_PAGE_BITS, words).nextSet(Math.min(REGION_PAGE_BITS, this.#length - first))
    if (past < REGION_PAGE_BITS) {
      throw new StoreError(
        'DAMAGED',
        `metadata: ${this.kind} bit ${first + past} of medium ${this.medium} lies past the end of its volume`,
      )
    }
    this.#exchange(index, words)
    this.#dirty.delete(index)
  }

  /** For whoever reads all of it. */
  get bits(): Bitmap {
    return this.#bits
  }

  takeDirtyPages(): MetadataPage[] {
    const pages: MetadataPage[] = []
    for (const index of this.#dirty) {
      const words = this.#page(index)
      const bytes = words.some((word) => word !== 0) ? Buffer.from(words.buffer) : undefined
      pages.push({ medium: this.medium, kind: this.kind, index, bytes })
    }
    this.#dirty.clear()
    return pages
  }

  returnDirtyPage({ kind, index }: MetadataPage): void {
    if (kind === this.kind) this.#dirty.add(index)
  }

  /** Removals for every page that may be stored. */
  removals(): MetadataPage[] {
    const count = Math.ceil(this.#bits.length / REGION_PAGE_BITS)
    return Array.from({ length: count }, (_, index) => ({
      medium: this.medium,
      kind: this.kind,
      index,
      bytes: undefined,
    }))
  }

  #adopt(bits: Bitmap, wholly: boolean): () => void {
    const changes: Before[] = []
    const limit = Math.min(bits.length, this.#length)
    // Each is looked for again only where it lies behind: what is empty is scanned once.
    let mine = wholly ? this.nextSet(0) : this.#length
    let theirs = bits.nextSet(0, limit)
    while (mine < this.#length || theirs < limit) {
      const page = Math.floor((theirs < limit ? Math.min(mine, theirs) : mine) / REGION_PAGE_BITS)
      const words = pageOf(bits, page, limit)
      if (!wholly) {
        this.#page(page).forEach((word, index) => {
          words[index] = (words[index] ?? 0) | word
        })
      }
      changes.push(...this.#exchange(page, words))
      const end = (page + 1) * REGION_PAGE_BITS
      if (mine < end) mine = this.nextSet(end)
      if (theirs < end) theirs = end < limit ? bits.nextSet(end, limit) : limit
    }
    return () => this.#restore(changes)
  }

  /** A copy of a page. */
  #page(index: number): Uint32Array<ArrayBuffer> {
    return pageOf(this.#bits, index, this.#bits.length)
  }

  #exchange(page: number, words: Uint32Array<ArrayBuffer>): Before[] {
    const before = this.#page(page)
    const changed = before.map((word, index) => word ^ (words[index] ?? 0))
    if (changed.every((word) => word === 0)) return []
    const first = page * PAGE_WORDS
    this.#bits.words.set(words.subarray(0, Math.min(PAGE_WORDS, this.#bits.words.length - first)), first)
    this.#count += ones(words) - ones(before)
    this.#dirty.add(page)
    return [{ page, changed, words: before }]
  }

  /** Only what was changed then: other bits of these pages may have changed since. */
  #restore(changes: readonly Before[]): void {
    for (const { page, changed, words } of changes) {
      const now = this.#page(page)
      changed.forEach((mask, index) => {
        now[index] = ((now[index] ?? 0) & ~mask) | ((words[index] ?? 0) & mask)
      })
      this.#exchange(page, now)
    }
  }
}

function pageOf(bits: Bitmap, page: number, limit: number): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(PAGE_WORDS)
  words.set(bits.words.subarray(page * PAGE_WORDS, (page + 1) * PAGE_WORDS))
  const used = Math.max(0, limit - page * REGION_PAGE_BITS)
  if (used < REGION_PAGE_BITS) new Bitmap(REGION_PAGE_BITS, words).clearRange(used, REGION_PAGE_BITS)
  return words
}

function ones(words: Uint32Array<ArrayBuffer>): number {
  assert(words.length === PAGE_WORDS)
  return new Bitmap(REGION_PAGE_BITS, words).count()
}
