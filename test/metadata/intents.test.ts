import { describe, expect, it } from 'vitest'
import { IntentMap, regionUnitsOf } from '../../src/metadata/intents.ts'
import { CHANGE, type Change } from '../../src/metadata/journal.ts'
import { type MetadataPage, REGION_PAGE_BITS } from '../../src/metadata/records.ts'
import { Random } from '../support/random.ts'

const KiB = 1024
const MiB = 1024 * KiB
const mark = (op: 'hot' | 'cool', first: number, count = 1): Change => ({
  op: CHANGE[op],
  medium: 7,
  first,
  count,
  slot: 0,
})

/** What a checkpoint would store, page by page. */
class Stored {
  readonly #pages = new Map<string, MetadataPage>()
  take(map: IntentMap): void {
    for (const page of map.takeDirtyPages()) {
      const key = `${page.kind} ${page.index}`
      if (page.bytes === undefined) this.#pages.delete(key)
      else this.#pages.set(key, page)
    }
  }
  get size(): number {
    return this.#pages.size
  }
  load(units: number): IntentMap {
    const map = new IntentMap(7, 4, units)
    for (const { kind, index, bytes } of this.#pages.values()) {
      if ((kind === 'hot' || kind === 'suspect') && bytes !== undefined) map.loadPage(kind, index, bytes)
    }
    return map
  }
}

const suspects = (map: IntentMap): number[] => {
  const regions: number[] = []
  for (let at = map.nextSuspect(0); at < map.regionCount; at = map.nextSuspect(at + 1)) regions.push(at)
  return regions
}

describe('intents on the disk', () => {
  it('has regions of a power of two of units, about as large as wanted', () => {
    expect(regionUnitsOf(64 * KiB)).toBe(16)
    expect(regionUnitsOf(4 * KiB)).toBe(256)
    expect(regionUnitsOf(3 * 64 * KiB)).toBe(4)
    expect(regionUnitsOf(16 * MiB)).toBe(1)
    expect(regionUnitsOf(64 * KiB, 8 * MiB)).toBe(128)
    expect(regionUnitsOf(64 * KiB, 4 * KiB)).toBe(1)
  })

  it('counts, and stores exactly what changed', () => {
    const map = new IntentMap(7, 4, 4 * 2 * REGION_PAGE_BITS + 1)
    expect(map.regionCount).toBe(2 * REGION_PAGE_BITS + 1)
    const stored = new Stored()
    map.apply(mark('hot', 5, 3))
    map.apply(mark('hot', 6, 3)) // again, as in a replay
    map.apply(mark('hot', 2 * REGION_PAGE_BITS))
    expect(map.hotCount).toBe(5)
    expect(map.dirtyPages).toBe(2)
    stored.take(map)
    expect(map.dirtyPages).toBe(0)
    expect([...stored.load(4 * map.regionCount).hot()]).toEqual([5, 6, 7, 8, 2 * REGION_PAGE_BITS])
    map.apply(mark('cool', 0, 2 * REGION_PAGE_BITS))
    stored.take(map)
    expect(stored.size).toBe(1) // an empty page is not stored
    expect([...stored.load(4 * map.regionCount).hot()]).toEqual([2 * REGION_PAGE_BITS])
  })

  it('keeps pages dirty whose commit failed', () => {
    const map = new IntentMap(7, 4, 4000)
    map.apply(mark('hot', 1))
    const [page] = map.takeDirtyPages()
    if (page === undefined) throw new Error('no page')
    map.returnDirtyPage(page)
    map.returnDirtyPage({ ...page, kind: 'map' }) // not its business
    expect(map.takeDirtyPages()).toEqual([page])
  })

  it('turns what was hot into suspects, once, and forgets them when told', () => {
    const map = new IntentMap(7, 4, 4000)
    map.apply(mark('hot', 10, 2))
    expect(map.suspectHot()).toBe(2)
    expect(map.suspectHot()).toBe(0)
    map.apply(mark('hot', 11, 2))
    expect(map.suspectHot()).toBe(2)
    expect(suspects(map)).toEqual([10, 11, 12])
    expect(map.nextTrusted(10)).toBe(13)
    expect([map.hotCount, map.suspectCount]).toEqual([0, 3])
    const undo = map.acknowledge()
    expect(suspects(map)).toEqual([])
    undo()
    expect(suspects(map)).toEqual([10, 11, 12])
    expect(map.suspectCount).toBe(3)
  })

  it('follows the size, and comes back when that could not be stored', () => {
    const map = new IntentMap(7, 4, 400)
    const stored = new Stored()
    map.apply(mark('hot', 20))
    map.apply(mark('hot', 90, 10))
    map.suspectHot()
    map.apply(mark('hot', 80))
    stored.take(map)
    const undo = map.resize(330)
    expect(map.regionCount).toBe(83)
    expect(suspects(map)).toEqual([20])
    expect([...map.hot()]).toEqual([80])
    map.apply(mark('hot', 82, 5)) // replayed from before the shrink
    expect([...map.hot()]).toEqual([80, 82])
    map.apply(mark('cool', 82))
    undo()
    expect(suspects(map)).toEqual([20, ...Array.from({ length: 10 }, (_, i) => 90 + i)])
    map.resize(330)
    map.resize(4 * (REGION_PAGE_BITS + 5))
    expect(suspects(map)).toEqual([20]) // nothing of what was cut off
    map.apply(mark('hot', REGION_PAGE_BITS + 4))
    stored.take(map)
    expect([...stored.load(4 * (REGION_PAGE_BITS + 5)).hot()]).toEqual([80, REGION_PAGE_BITS + 4])
  })

  it('refuses pages that lie outside', () => {
    const map = new IntentMap(7, 4, 400)
    expect(() => map.loadPage('hot', 1, Buffer.alloc(4, 1))).toThrow(/hot page 1 of medium 7 lies past/)
    expect(() => map.loadPage('suspect', 0, Buffer.alloc(16, 0xff))).toThrow(/suspect bit 100 of medium 7/)
    expect(() => map.loadPage('hot', 0, Buffer.alloc(8192))).toThrow(/lies past/)
  })

  it('is what a plain set is, whatever happens', () => {
    const random = new Random(5)
    const map = new IntentMap(7, 1, 3 * REGION_PAGE_BITS)
    const stored = new Stored()
    const hot = new Set<number>()
    for (let step = 0; step < 2000; step++) {
      const first = random.below(map.regionCount)
      const count = Math.min(1 + random.below(50), map.regionCount - first)
      const op = random.pick(['hot', 'cool'] as const)
      map.apply(mark(op, first, count))
      for (let region = first; region < first + count; region++) {
        if (op === 'hot') hot.add(region)
        else hot.delete(region)
      }
      if (random.below(10) === 0) stored.take(map)
    }
    stored.take(map)
    const expected = [...hot].sort((a, b) => a - b)
    expect([...map.hot()]).toEqual(expected)
    expect(map.hotCount).toBe(expected.length)
    for (const region of map.removals()) expect(region.bytes).toBeUndefined()
  })
})
