import { describe, expect, it } from 'vitest'
import { Bitmap } from '../../src/base/bitmap.ts'
import { CopyMap, copyUnitsOf } from '../../src/metadata/copy.ts'
import { CHANGE, type Change } from '../../src/metadata/journal.ts'
import { type MetadataPage, REGION_PAGE_BITS } from '../../src/metadata/records.ts'
import { Random } from '../support/random.ts'

const P = REGION_PAGE_BITS
const change = (op: 'copySet' | 'copyClear', first: number, count = 1): Change => ({
  op: CHANGE[op],
  medium: 9,
  first,
  count,
  slot: 0,
})

/** What checkpoints have stored. */
class Stored {
  readonly pages = new Map<number, Buffer>()
  take(map: CopyMap): number {
    const taken = map.takeDirtyPages()
    for (const { medium, kind, index, bytes } of taken) {
      expect([medium, kind]).toEqual([9, 'copy'])
      if (bytes === undefined) this.pages.delete(index)
      else this.pages.set(index, bytes)
    }
    return taken.length
  }
  load(unitCount: number): CopyMap {
    const map = new CopyMap(9, unitCount)
    for (const [index, bytes] of this.pages) map.loadPage(index, bytes)
    expect(map.dirtyPages).toBe(0)
    return map
  }
}

const unitsOf = (map: CopyMap): number[] => {
  const units: number[] = []
  for (let at = map.nextSet(0); at < map.unitCount; at = map.nextSet(at + 1)) units.push(at)
  return units
}
const bitsOf = (length: number, units: Iterable<number>): Bitmap => {
  const bits = new Bitmap(length)
  for (const unit of units) bits.set(unit)
  return bits
}

describe('copy units on the disk', () => {
  it('counts them, also the one that the volume cuts short', () => {
    expect(copyUnitsOf(1024, 512)).toBe(2)
    expect(copyUnitsOf(1025, 512)).toBe(3)
  })

  it('has as many dirty pages as have changed, and none for what changes nothing', () => {
    const map = new CopyMap(9, 3 * P + 10)
    const stored = new Stored()
    map.apply(change('copySet', P - 1, P + 2)) // reaches into three pages
    expect([map.count, map.dirtyPages]).toEqual([P + 2, 3])
    expect(stored.take(map)).toBe(3)
    map.apply(change('copySet', P, P))
    map.apply(change('copyClear', 0, P - 1))
    map.setAll(bitsOf(3 * P, unitsOf(map)))()
    map.merge(bitsOf(3 * P, [P, P + 7]))
    expect(map.dirtyPages).toBe(0)
    map.apply(change('copyClear', P + 1))
    expect(map.dirtyPages).toBe(1)
    map.apply(change('copySet', 3 * P + 9, 1000)) // replayed from before a shrink
    expect([map.count, map.nextSet(2 * P + 1), map.nextClear(3 * P + 9)]).toEqual([
      P + 2,
      3 * P + 9,
      3 * P + 10,
    ])
    stored.take(map)
    expect(unitsOf(stored.load(map.unitCount))).toEqual(unitsOf(map))
    map.apply(change('copyClear', 0, map.unitCount))
    stored.take(map)
    expect(stored.pages.size).toBe(0)
  })

  it('takes back the replacement of all bits, and only that', () => {
    const map = new CopyMap(9, 2 * P)
    map.mark(1, 3)
    map.mark(P, P + 2)
    const undo = map.setAll(bitsOf(P + 2, [2, 500, P + 1]))
    expect(unitsOf(map)).toEqual([2, 500, P + 1])
    map.apply(change('copySet', 700))
    undo()
    expect(unitsOf(map)).toEqual([1, 2, 700, P, P + 1])
    expect(map.count).toBe(5)
    const unmerge = map.merge(bitsOf(2 * P, [1, 5, 2 * P - 1]))
    expect(unitsOf(map)).toEqual([1, 2, 5, 700, P, P + 1, 2 * P - 1])
    unmerge()
    expect(unitsOf(map)).toEqual([1, 2, 700, P, P + 1])
  })

  it('ignores what a longer bitmap says of units past its end', () => {
    const map = new CopyMap(9, 100)
    map.merge(bitsOf(200, [99, 100, 150]))
    map.setAll(bitsOf(P + 50, [98, 100, P]))
    expect([map.count, ...unitsOf(map)]).toEqual([1, 98])
    map.resize(200)
    expect(unitsOf(map)).toEqual([98])
  })

  it('stays fast and small with a great many units', () => {
    const count = 160_000_000
    const before = process.memoryUsage().rss
    const maps = Array.from({ length: 8 }, (_, id) => new CopyMap(id, count))
    const empty = new Bitmap(count) // one for all: freed memory that is handed out again is zeroed by writing to it
    for (const map of maps) {
      let found = 0
      for (let i = 0; i < 1_000_000; i++) if (map.nextSet(i) < count) found++
      expect(found).toBe(0)
      map.setAll(empty)
      map.resize(count - 1)()
      map.apply(change('copyClear', 0, count))
      expect([map.count, map.dirtyPages]).toEqual([0, 0])
    }
    const [map] = maps
    new CopyMap(8, 10 * count).resize(10 * count + P) // which needs a longer one
    expect(process.memoryUsage().rss - before).toBeLessThan(80e6) // of 560 MB, and 20 that were only read
    map?.apply(change('copySet', 0, count))
    expect([map?.count, map?.dirtyPages]).toEqual([count, Math.ceil(count / P)])
    const undo = map?.resize(10)
    expect(map?.count).toBe(10)
    undo?.()
    expect([map?.count, map?.nextClear(0)]).toEqual([count, count])
  })

  it('refuses pages that lie outside', () => {
    const map = new CopyMap(9, 100)
    expect(() => map.loadPage(1, Buffer.alloc(4, 1))).toThrow(/copy page 1 of medium 9 lies past/)
    expect(() => map.loadPage(0, Buffer.alloc(16, 0xff))).toThrow(/copy bit 100 of medium 9/)
    expect(map.count).toBe(0)
  })

  it('is what a plain set is, whatever happens and fails', () => {
    const random = new Random(23)
    let length = 3 * P
    let map = new CopyMap(9, length)
    const stored = new Stored()
    let model = new Set<number>()
    const some = (): number[] => Array.from({ length: random.below(30) }, () => random.below(length))
    for (let step = 0; step < 1500; step++) {
      const failed = random.below(2) === 0
      const kept = new Set(model)
      let undo = (): void => {}
      switch (random.below(6)) {
        case 0: {
          const units = some()
          undo = map.setAll(bitsOf(length, units))
          model = new Set(units)
          break
        }
        case 1: {
          const units = some()
          undo = map.merge(bitsOf(length, units))
          for (const unit of units) model.add(unit)
          break
        }
        case 2: {
          const next = P + random.below(3 * P)
          undo = map.resize(next)
          for (const unit of model) if (unit >= next) model.delete(unit)
          if (!failed) length = next
          break
        }
        case 3: {
          stored.take(map)
          map = stored.load(length)
          break
        }
        default: {
          const op = random.pick(['copySet', 'copyClear'] as const)
          const [first, count] = [random.below(length), 1 + random.below(40)]
          map.apply(change(op, first, count))
          for (let unit = first; unit < Math.min(first + count, length); unit++) {
            for (const set of [model, kept]) {
              if (op === 'copySet') set.add(unit)
              else set.delete(unit)
            }
          }
        }
      }
      if (failed) {
        if (random.below(2) === 0) {
          const taken: MetadataPage[] = map.takeDirtyPages()
          for (const page of taken) map.returnDirtyPage(page)
        }
        undo()
        model = kept
      }
      expect(map.count).toBe(model.size)
      if (step % 50 === 0) expect(unitsOf(map)).toEqual([...model].sort((a, b) => a - b))
    }
  })
})
