import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Bitmap } from '../../src/base/bitmap.ts'

const LENGTH = 203 // not a whole number of words

/** What a bitmap should be, in the plainest way. */
class Model {
  readonly bits = new Array<boolean>(LENGTH).fill(false)
  fill(start: number, end: number, value: boolean): void {
    for (let i = start; i < end; i++) this.bits[i] = value
  }
  next(start: number, end: number, value: boolean): number {
    for (let i = start; i < end; i++) if (this.bits[i] === value) return i
    return end
  }
  count(start: number, end: number): number {
    return this.bits.slice(start, end).filter((bit) => bit).length
  }
}

const range = fc
  .tuple(fc.integer({ min: 0, max: LENGTH }), fc.integer({ min: 0, max: LENGTH }))
  .map(([a, b]) => [Math.min(a, b), Math.max(a, b)] as const)
const change = fc.record({ what: fc.constantFrom('set', 'clear', 'setRange', 'clearRange'), range })

describe('Bitmap', () => {
  it('agrees with a plain array after any changes', () => {
    fc.assert(
      fc.property(fc.array(change, { maxLength: 30 }), range, (changes, [start, end]) => {
        const bitmap = new Bitmap(LENGTH)
        const model = new Model()
        for (const {
          what,
          range: [from, to],
        } of changes) {
          const one = Math.min(from, LENGTH - 1)
          if (what === 'set') {
            bitmap.set(one)
            model.fill(one, one + 1, true)
          } else if (what === 'clear') {
            bitmap.clear(one)
            model.fill(one, one + 1, false)
          } else if (what === 'setRange') {
            bitmap.setRange(from, to)
            model.fill(from, to, true)
          } else {
            bitmap.clearRange(from, to)
            model.fill(from, to, false)
          }
        }
        expect(model.bits.map((_, i) => bitmap.get(i))).toEqual(model.bits)
        expect(bitmap.nextSet(start, end)).toBe(model.next(start, end, true))
        expect(bitmap.nextClear(start, end)).toBe(model.next(start, end, false))
        expect(bitmap.count(start, end)).toBe(model.count(start, end))
        expect(bitmap.count()).toBe(model.count(0, LENGTH))
      }),
    )
  })

  it('keeps bit i in byte i >>> 3 at position i & 7, the layout on disk', () => {
    const bitmap = new Bitmap(64)
    for (const bit of [0, 9, 31, 32, 63]) bitmap.set(bit)
    const bytes = Buffer.from(bitmap.words.buffer)
    expect([...bytes]).toEqual([1, 2, 0, 0x80, 1, 0, 0, 0x80])
  })

  it('does not touch bits past its length in the last word', () => {
    const bitmap = new Bitmap(33)
    bitmap.setRange(0, 33)
    expect([...bitmap.words]).toEqual([0xffffffff, 1])
    expect(bitmap.nextClear(0)).toBe(33)
  })

  it('counts and searches beyond 2^31 bits', () => {
    const length = 2 ** 32 // untouched words are not backed by memory
    const bitmap = new Bitmap(length)
    bitmap.set(2 ** 31)
    bitmap.setRange(length - 40, length)
    expect(bitmap.get(2 ** 31)).toBe(true)
    expect(bitmap.get(length - 1)).toBe(true)
    expect(bitmap.nextSet(2 ** 31 + 1 - 64)).toBe(2 ** 31)
    expect(bitmap.nextSet(length - 1000)).toBe(length - 40)
    expect(bitmap.nextClear(length - 40)).toBe(length)
    expect(bitmap.count(2 ** 31 - 5, 2 ** 31 + 5)).toBe(1)
    expect(bitmap.count(length - 100, length)).toBe(40)
    bitmap.clearRange(length - 40, length - 1)
    expect(bitmap.count(length - 100, length)).toBe(1)
    bitmap.clear(length - 1)
    expect(bitmap.nextSet(length - 1000)).toBe(length)
  })

  it('clearing an empty bitmap leaves its memory unbacked', () => {
    const bitmap = new Bitmap(2 ** 31) // 256 MiB
    const before = process.memoryUsage.rss()
    bitmap.clearRange(0, bitmap.length)
    expect(process.memoryUsage.rss() - before).toBeLessThan(64 * 2 ** 20)
  })

  it('asserts its bounds', () => {
    const bitmap = new Bitmap(10)
    expect(() => bitmap.get(10)).toThrow('bitmap index')
    expect(() => bitmap.set(-1)).toThrow('bitmap index')
    expect(() => bitmap.setRange(5, 11)).toThrow('bitmap range')
    expect(() => bitmap.clearRange(6, 5)).toThrow('bitmap range')
    expect(() => bitmap.nextSet(0, 11)).toThrow('bitmap scan')
    expect(() => bitmap.count(0, 11)).toThrow('bitmap range')
    expect(() => new Bitmap(-1)).toThrow('bitmap length')
    expect(() => new Bitmap(2 ** 32 + 1)).toThrow('bitmap length')
    expect(() => new Bitmap(33, new Uint32Array(1))).toThrow('bitmap words')
  })
})
