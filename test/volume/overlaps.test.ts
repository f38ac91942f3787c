import { describe, expect, it } from 'vitest'
import { type Entry, Overlaps } from '../../src/volume/overlaps.ts'
import { Random } from '../support/random.ts'

describe('requests that overlap', () => {
  it('begin in the order of arrival, each when nothing before it overlaps any more', () => {
    const overlaps = new Overlaps()
    const began: string[] = []
    const first = overlaps.enter(0, 4096, () => began.push('first'))
    const second = overlaps.enter(2048, 4096, () => began.push('second'))
    const apart = overlaps.enter(8192, 512, () => began.push('apart'))
    const third = overlaps.enter(0, 512, () => began.push('third'))
    expect([first, second, apart, third].map(({ blockers }) => blockers)).toEqual([0, 1, 0, 1])
    const wide = overlaps.enter(0, 1 << 20, () => began.push('wide'))
    expect(wide.blockers).toBe(4)
    const behind = overlaps.enter(900_000, 512, () => began.push('behind'))
    expect(behind.blockers).toBe(1)
    overlaps.leave(apart)
    overlaps.leave(first)
    expect(began).toEqual(['second', 'third'])
    overlaps.leave(third)
    overlaps.leave(second)
    expect(began).toEqual(['second', 'third', 'wide'])
    overlaps.leave(wide)
    overlaps.leave(behind)
    expect(began).toEqual(['second', 'third', 'wide', 'behind'])
    expect(overlaps.size).toBe(0)
    expect(() => overlaps.leave(behind)).toThrow()
  })

  it('never run together, and all run, whatever comes', () => {
    const random = new Random(11)
    for (let round = 0; round < 200; round++) {
      const overlaps = new Overlaps()
      const order: number[] = []
      const running = new Map<number, { start: number; end: number; entry: Entry }>()
      const begin = (n: number, start: number, end: number, entry: Entry): void => {
        for (const other of running.values()) expect(other.start >= end || start >= other.end).toBe(true)
        running.set(n, { start, end, entry })
        order.push(n)
      }
      const ranges: { start: number; end: number }[] = []
      for (let n = 0; n < 60; n++) {
        const start = random.below(40) * 65_536
        const length = (1 + random.below(random.below(4) === 0 ? 30 : 3)) * 65_536
        const end = start + length
        ranges.push({ start, end })
        const entry: Entry = overlaps.enter(start, length, () => begin(n, start, end, entry))
        if (entry.blockers === 0) begin(n, start, end, entry)
        while (running.size > 0 && random.below(3) === 0) {
          const [key, ended] = [...running][random.below(running.size)] ?? []
          if (key === undefined || ended === undefined) break
          running.delete(key)
          overlaps.leave(ended.entry)
        }
      }
      for (let left = running.entries().next(); left.done !== true; left = running.entries().next()) {
        running.delete(left.value[0])
        overlaps.leave(left.value[1].entry)
      }
      expect(overlaps.size).toBe(0)
      expect([...order].sort((a, b) => a - b)).toEqual(ranges.map((_, n) => n))
      // Of two that overlap, the one that came first ran first.
      const place = new Map(order.map((n, at) => [n, at]))
      ranges.forEach((a, i) => {
        ranges.slice(i + 1).forEach((b, k) => {
          if (a.start < b.end && b.start < a.end)
            expect(place.get(i) ?? 0).toBeLessThan(place.get(i + 1 + k) ?? 0)
        })
      })
    }
  })
})
