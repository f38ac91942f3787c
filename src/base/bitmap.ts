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
    assert(Number.isSafeInteger(length) && length >= 0, 'bitmap length')
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

  setRange(start: number, end: number): void {
    this.#range(start, end, (word, mask) => Atomics.or(this.words, word, mask))
  }

  clearRange(start: number, end: number): void {
    this.#range(start, end, (word, mask) => Atomics.and(this.words, word, ~mask >>> 0))
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
    let total = 0
    // Not `at | 31`: that is signed, and bitmaps have up to 2^32 bits.
    for (let at = start; at < end; ) {
      const index = Math.floor(at / 32)
      const stop = Math.min(end, (index + 1) * 32)
      const word = this.words[index] ?? 0
      if (word !== 0) total += popcount((word & rangeMask(at - index * 32, stop - index * 32)) >>> 0)
      at = stop
    }
    return total
  }

  #word(index: number): number {
    assert(index >= 0 && index < this.length, 'bitmap index')
    return index >>> 5
  }

  #range(start: number, end: number, apply: (word: number, mask: number) => void): void {
    assert(start >= 0 && start <= end && end <= this.length, 'bitmap range')
    for (let at = start; at < end; ) {
      const word = Math.floor(at / 32)
      const stop = Math.min(end, (word + 1) * 32)
      apply(word, rangeMask(at - word * 32, stop - word * 32))
      at = stop
    }
  }

  #scan(start: number, end: number, skip: number): number {
    assert(start >= 0 && end <= this.length, 'bitmap scan')
    if (start >= end) return end
    let word = Math.floor(start / 32)
    let value = ((this.words[word] ?? 0) ^ skip) >>> 0
    value = (value & rangeMask(start - word * 32, 32)) >>> 0
    const wordEnd = Math.ceil(end / 32)
    while (value === 0) {
      word++
      if (word >= wordEnd) return end
      value = ((this.words[word] ?? 0) ^ skip) >>> 0
    }
    return Math.min(end, word * 32 + (31 - Math.clz32(value & -value)))
  }
}

/** Bits [from, to) of a word; 0 <= from <= to <= 32. */
function rangeMask(from: number, to: number): number {
  const low = from >= 32 ? 0 : (0xffffffff << from) >>> 0
  const high = to >= 32 ? 0xffffffff : ~(0xffffffff << to) >>> 0
  return (low & high) >>> 0
}

function popcount(word: number): number {
  let v = word - ((word >>> 1) & 0x55555555)
  v = (v & 0x33333333) + ((v >>> 2) & 0x33333333)
  return (((v + (v >>> 4)) & 0x0f0f0f0f) * 0x01010101) >>> 24
}
