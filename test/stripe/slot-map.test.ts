import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { SlotMap } from '../../src/stripe/slot-map.ts'

describe('SlotMap', () => {
  it('agrees with a plain array, at lengths around the borders of every level', () => {
    const length = fc.oneof(
      fc.constantFrom(1, 31, 32, 33, 1023, 1024, 1025, 32_768, 32_769),
      fc.integer({ min: 1, max: 3000 }),
    )
    const ranges = fc.array(fc.tuple(fc.nat(40_000), fc.integer({ min: 1, max: 1500 })), { maxLength: 25 })
    fc.assert(
      fc.property(
        length,
        ranges,
        fc.array(fc.nat(40_000), { minLength: 5, maxLength: 5 }),
        (bits, changes, starts) => {
          const map = new SlotMap(bits)
          const model = new Array<boolean>(bits).fill(false)
          for (const [at, count] of changes) {
            // The longest stretch from here on that is all free or all taken is toggled.
            const start = at % bits
            const value = model[start] ?? false
            let end = start
            while (end < bits && end < start + count && model[end] === value) end++
            if (value) map.free(start, end)
            else map.take(start, end)
            model.fill(!value, start, end)
          }
          for (const each of [...starts.map((start) => start % bits), 0, bits - 1, bits]) {
            const free = model.indexOf(false, each)
            expect(map.nextFree(each)).toBe(free < 0 ? bits : free)
            const taken = model.indexOf(true, each)
            expect(map.nextTaken(each, bits)).toBe(taken < 0 ? bits : taken)
            const end = Math.min(bits, each + 70)
            expect(map.nextTaken(each, end)).toBe(taken < 0 || taken > end ? end : taken)
          }
          expect(model.map((_, slot) => map.get(slot))).toEqual(model)
        },
      ),
      { numRuns: 60 },
    )
  })

  it('finds the one free slot of a full map of 2^32-1 at once', () => {
    const length = 2 ** 32 - 1
    const map = new SlotMap(2 ** 26) // full for real: 8 MiB of words
    map.take(0, 2 ** 26)
    expect(map.nextFree(0)).toBe(2 ** 26)
    map.free(2 ** 26 - 1, 2 ** 26)
    // A scan for each would take minutes: this ends in time because there is none.
    let right = 0
    for (let i = 0; i < 100_000; i++) right += map.nextFree(5) === 2 ** 26 - 1 ? 1 : 0
    expect(right).toBe(100_000)
    const huge = new SlotMap(length)
    huge.take(length - 1, length)
    huge.take(2 ** 31, 2 ** 31 + 100)
    expect(huge.nextFree(2 ** 31 + 50)).toBe(2 ** 31 + 100)
    expect(huge.nextFree(length - 1)).toBe(length)
    expect(huge.get(length - 1)).toBe(true)
  })

  it('asserts that nothing is taken or freed twice', () => {
    const map = new SlotMap(100)
    map.take(10, 20)
    expect(() => map.take(19, 21)).toThrow('taken twice')
    expect(() => map.free(9, 12)).toThrow('freed twice')
    expect(() => map.take(90, 101)).toThrow('slot map range')
    expect(() => map.take(5, 5)).toThrow('slot map range')
    expect(() => new SlotMap(2 ** 32)).toThrow('slot map length')
  })
})
