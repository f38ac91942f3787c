import { assert } from './assert.ts'

/**
 * Bitmaps are 32-bit words, bit i in word i >>> 5 at position i & 31. In memory (little endian) and on disk
 * that is the same as bytes with bit i in byte i >>> 3 at position i & 7.
 *
 * The words are read by I/O threads while this thread changes them, hence Atomics: a store here is a release,
 * seen by the datapath's acquire loads, so what was written before a bit is visible to whoever sees the bit.
 */
export class Bitmap {
  readonly words: Uint32Array
  readonly length: number // bits

  /** Zeroed, untouched memory stays unbacked by pages: an empty bitmap of any length costs nothing resident. */
  constructor(length: number, words = new Uint32Array(Bitmap.wordCount(length))) {
    assert(Number.isSafeInteger(length) && length >= 0 && length <= 2 ** 32, 'bitmap length')
    assert(words.length >= Bitmap.wordCount(length), 'bitmap words')
    this.length = length
    this.words = words
  }

  static wordCount(length: number): number {
    return Math.ceil(length / 32)
  }

  get(index: number): boolean {
    return ((Atomics.load(this.words, this.#word(index)) >>> (index & 31)) & 1) === 1
  }

  set(index: number): void {
    Atomics.or(this.words, this.#word(index), (1 << (index & 31)) >>> 0)
  }

  clear(index: number): void {
    Atomics.and(this.words, this.#word(index), ~(1 << (index & 31)) >>> 0)
  }

  /** Words that need no change are not written: clearing what is empty leaves it unbacked. */
  setRange(start: number, end: number): void {
    this.#checkRange(start, end)
    if (start === end) return
    const last = (end - 1) >>> 5
    for (let word = start >>> 5; word <= last; word++) {
      const mask = wordMask(word, start, end)
      if (((this.words[word] ?? 0) & mask) >>> 0 !== mask) Atomics.or(this.words, word, mask)
    }
  }

  clearRange(start: number, end: number): void {
    this.#checkRange(start, end)
    if (start === end) return
    const last = (end - 1) >>> 5
    for (let word = start >>> 5; word <= last; word++) {
      const mask = wordMask(word, start, end)
      if (((this.words[word] ?? 0) & mask) !== 0) Atomics.and(this.words, word, ~mask >>> 0)
    }
  }

  /** The first 1 at or after `start` and before `end`; `end` where there is none. */
  nextSet(start: number, end = this.length): number {
    return this.#scan(start, end, 0)
  }

  /** The first 0 at or after `start` and before `end`; `end` where there is none. */
  nextClear(start: number, end = this.length): number {
    return this.#scan(start, end, 0xffffffff)
  }

  /** How many bits are 1 in [start, end). */
  count(start = 0, end = this.length): number {
    this.#checkRange(start, end)
    if (start === end) return 0
    let total = 0
    const last = (end - 1) >>> 5
    for (let word = start >>> 5; word <= last; word++) {
      const value = this.words[word] ?? 0
      if (value !== 0) total += popcount((value & wordMask(word, start, end)) >>> 0)
    }
    return total
  }

  #word(index: number): number {
    assert(index >= 0 && index < this.length, 'bitmap index')
    return index >>> 5
  }

  #checkRange(start: number, end: number): void {
    assert(start >= 0 && start <= end && end <= this.length, 'bitmap range')
  }

  #scan(start: number, end: number, skip: number): number {
    assert(start >= 0 && end <= this.length, 'bitmap scan')
    if (start >= end) return end
    // `>>> 5` is right up to 2^32 - 1, and that is the last bit of the longest bitmap.
    const last = (end - 1) >>> 5
    let word = start >>> 5
    let value = (((this.words[word] ?? 0) ^ skip) & (0xffffffff << (start & 31))) >>> 0
    while (value === 0) {
      if (word === last) return end
      word++
      value = ((this.words[word] ?? 0) ^ skip) >>> 0
    }
    return Math.min(end, word * 32 + (31 - Math.clz32(value & -value)))
  }
}

/** Several bitmaps of one length, read as one that has the bits of all. */
export class BitmapUnion {
  readonly #parts: readonly Uint32Array[]
  readonly length: number

  constructor(length: number, parts: readonly Bitmap[]) {
    assert(
      parts.every((part) => part.length === length),
      'bitmaps of one length',
    )
    this.length = length
    this.#parts = parts.map(({ words }) => words)
  }

  /** The first 1 at or after `start`; the length where there is none. */
  nextSet(start: number): number {
    return this.#scan(start, 0)
  }

  /** The first 0 at or after `start`; the length where there is none. */
  nextClear(start: number): number {
    return this.#scan(start, 0xffffffff)
  }

  /** How many bits are 1 in [start, end). */
  count(start: number, end: number): number {
    assert(start >= 0 && start <= end && end <= this.length, 'bitmap range')
    if (start === end) return 0
    let total = 0
    const last = (end - 1) >>> 5
    for (let word = start >>> 5; word <= last; word++) {
      const value = this.#word(word)
      if (value !== 0) total += popcount((value & wordMask(word, start, end)) >>> 0)
    }
    return total
  }

  #word(word: number): number {
    let value = 0
    for (const words of this.#parts) value |= words[word] ?? 0
    return value >>> 0
  }

  #scan(start: number, skip: number): number {
    if (start >= this.length) return this.length
    const last = (this.length - 1) >>> 5
    let word = start >>> 5
    let value = ((this.#word(word) ^ skip) & (0xffffffff << (start & 31))) >>> 0
    while (value === 0) {
      if (word === last) return this.length
      word++
      value = (this.#word(word) ^ skip) >>> 0
    }
    return Math.min(this.length, word * 32 + (31 - Math.clz32(value & -value)))
  }
}

/** The bits of word `word` that lie in [start, end), which reaches into it. */
function wordMask(word: number, start: number, end: number): number {
  const low = word === start >>> 5 ? 0xffffffff << (start & 31) : 0xffffffff
  const high = word === (end - 1) >>> 5 ? 0xffffffff >>> (31 - ((end - 1) & 31)) : 0xffffffff
  return (low & high) >>> 0
}

function popcount(word: number): number {
  let v = word - ((word >>> 1) & 0x55555555)
  v = (v & 0x33333333) + ((v >>> 2) & 0x33333333)
  return (((v + (v >>> 4)) & 0x0f0f0f0f) * 0x01010101) >>> 24
}
