/**
 * One bit a slot, 1 = taken, under a pyramid of summaries: a bit of level n + 1 says that the word of level n with that
 * number is full. The top level is a single word.
 *
 *   level 2                      0                                   one word
 *   level 1        1 0 0 ...  (word 0 of level 0 is full)
 *   level 0   ffffffff 00000003 00000000 ...                          32 slots a word
 *
 * Finding the next free slot goes up until a word has a 0 further on, and down again: at most 13 words for 2^32 slots,
 * however full the map is. The summaries cost 1/31 of the map.
 *
 * What always holds: a summary bit is 1 exactly when its word is all ones. Bits past the end are 1 on every level, so
 * a partial last word fills up like any other and no search ever leaves the map. The words start untouched, so an empty
 * map of any length is not resident. Only one thread uses them, hence no Atomics.
 */
import { assert } from '../base/assert.ts'

const FULL = 0xffffffff

export class SlotMap {
  readonly length: number // slots
  readonly #levels: readonly Uint32Array[]
  readonly #slots: Uint32Array // level 0

  constructor(length: number) {
    assert(Number.isSafeInteger(length) && length > 0 && length < 2 ** 32, 'slot map length')
    this.length = length
    const levels: Uint32Array[] = []
    for (let bits = length; ; bits = Math.ceil(bits / 32)) {
      const level = new Uint32Array(Math.ceil(bits / 32))
      if (bits % 32 !== 0) level[level.length - 1] = (FULL << (bits % 32)) >>> 0
      levels.push(level)
      if (level.length === 1) break
    }
    this.#levels = levels
    this.#slots = levels[0] ?? new Uint32Array(0)
  }

  get(slot: number): boolean {
    return (((this.#slots[slot >>> 5] ?? 0) >>> (slot & 31)) & 1) === 1
  }

  /** Takes [start, end); every one of them was free. */
  take(start: number, end: number): void {
    this.#eachWord(start, end, (index, mask) => {
      const before = this.#slots[index] ?? 0
      assert((before & mask) === 0, 'slot is taken twice')
      const after = (before | mask) >>> 0
      this.#slots[index] = after
      if (after === FULL) this.#raise(index)
    })
  }

  /** Frees [start, end); every one of them was taken. */
  free(start: number, end: number): void {
    this.#eachWord(start, end, (index, mask) => {
      const before = this.#slots[index] ?? 0
      assert((before & mask) >>> 0 === mask, 'slot is freed twice')
      this.#slots[index] = (before & ~mask) >>> 0
      if (before === FULL) this.#lower(index)
    })
  }

  /** The first free slot at or after `start`; `length` where there is none. */
  nextFree(start: number): number {
    let level = 0
    let index = start
    for (;;) {
      const words = this.#levels[level]
      if (words === undefined) return this.length
      const word = Math.floor(index / 32)
      if (word < words.length) {
        const free = (~(words[word] ?? 0) & (FULL << (index & 31))) >>> 0
        if (free !== 0) {
          index = word * 32 + lowestBit(free)
          break
        }
      }
      // This word has no 0 at or after `index`; its successors are looked at a level up.
      level++
      index = word + 1
    }
    while (level > 0) {
      level--
      const free = ~(this.#levels[level]?.[index] ?? 0) >>> 0
      assert(free !== 0, 'slot map summary')
      index = index * 32 + lowestBit(free)
    }
    return index
  }

  /** The first taken slot in [start, end); `end` where there is none. Reads every word in between. */
  nextTaken(start: number, end: number): number {
    assert(end <= this.length, 'slot map range')
    if (start >= end) return end
    let word = start >>> 5
    let value = ((this.#slots[word] ?? 0) & (FULL << (start & 31))) >>> 0
    const last = (end - 1) >>> 5
    while (value === 0) {
      if (word === last) return end
      word++
      value = this.#slots[word] ?? 0
    }
    return Math.min(end, word * 32 + lowestBit(value))
  }

  #eachWord(start: number, end: number, action: (index: number, mask: number) => void): void {
    assert(start >= 0 && start < end && end <= this.length, 'slot map range')
    const first = start >>> 5
    const last = (end - 1) >>> 5
    for (let index = first; index <= last; index++) {
      const low = index === first ? FULL << (start & 31) : FULL
      const high = index === last ? FULL >>> (31 - ((end - 1) & 31)) : FULL
      action(index, (low & high) >>> 0)
    }
  }

  /** Word `index` of level 0 has become full. */
  #raise(index: number): void {
    for (let level = 1; level < this.#levels.length; level++) {
      const words = this.#levels[level]
      assert(words !== undefined, 'slot map level')
      const after = ((words[index >>> 5] ?? 0) | (1 << (index & 31))) >>> 0
      words[index >>> 5] = after
      if (after !== FULL) return
      index >>>= 5
    }
  }

  /** Word `index` of level 0 is full no more. */
  #lower(index: number): void {
    for (let level = 1; level < this.#levels.length; level++) {
      const words = this.#levels[level]
      assert(words !== undefined, 'slot map level')
      const before = words[index >>> 5] ?? 0
      words[index >>> 5] = (before & ~(1 << (index & 31))) >>> 0
      if (before !== FULL) return
      index >>>= 5
    }
  }
}

function lowestBit(value: number): number {
  return 31 - Math.clz32(value & -value)
}
