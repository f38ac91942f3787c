import { describe, expect, it, vi } from 'vitest'
import type { FreedRun } from '../../src/volume/freed-runs.ts'
import { Stage } from '../../src/volume/stage.ts'
import { VolumeTables } from '../../src/volume/tables.ts'
import { memoryInUse } from '../support/memory.ts'
import { Random } from '../support/random.ts'

/** Slots are numbers here: a set of those that are taken, and what is freed later. */
const STRIPE = 4096

function staged(units: number, formatUnit = 1, cut = 0) {
  const unitBytes = formatUnit * STRIPE
  const size = units * unitBytes - cut
  const tables = new VolumeTables(1, { size, stripeSize: STRIPE, formatUnit })
  const taken = new Set<number>()
  const freed: number[] = []
  let last = 0
  const stage = new Stage({
    datapath: { adopt: () => 1, complete: () => undefined, formatUnit: async () => undefined },
    exportId: 1,
    tables: () => tables,
    allocate: async (_first, count) => {
      const slots = Array.from({ length: count }, () => ++last)
      for (const slot of slots) taken.add(slot)
      return slots
    },
    unallocate: (slots) => {
      for (const slot of slots) expect(taken.delete(slot)).toBe(true)
    },
    freeLater: (runs) => {
      for (const { slot, count } of runs) for (let n = 0; n < count; n++) freed.push(slot + n)
    },
  })
  const put = (unit: number, count = 1): Promise<void> =>
    stage.put(unit * unitBytes, Buffer.alloc(bytes(unit, count)))
  const bytes = (unit: number, count: number): number =>
    Math.min(size, (unit + count) * unitBytes) - unit * unitBytes
  const hole = (unit: number, count = 1): void => stage.hole(unit * unitBytes, bytes(unit, count))
  return { tables, stage, taken, freed, put, hole }
}

describe('a stage', () => {
  it.each([1, 3])(
    'units and holes take the place of each other, and of what there was: %s stripes',
    async (n) => {
      const { tables, stage, taken, freed, put, hole } = staged(40, n)
      await put(0, 8)
      stage.switch()
      stage.switched()
      expect(tables.formattedUnits).toBe(8)
      const before = [...tables.slots.subarray(0, 8 * n)]
      await put(1, 4)
      await put(3, 4)
      hole(4, 30)
      await put(6)
      expect(stage.units).toBe(33)
      expect(taken.size).toBe((8 + 4) * n) // 1, 2, 3, 6
      const undo = stage.switch()
      undo()
      expect([...tables.slots.subarray(0, 8 * n)]).toEqual(before)
      stage.switch()
      stage.switched()
      expect(stage.units).toBe(0)
      expect([...Array(40).keys()].filter((unit) => tables.init.get(unit))).toEqual([0, 1, 2, 3, 6])
      expect(freed).toEqual(before.slice(n))
      const used = [...tables.slots].filter((slot) => slot !== 0)
      expect(new Set(used).size).toBe(5 * n)
      expect(used.every((slot) => taken.has(slot))).toBe(true)
    },
  )

  it('gives everything back when it is dropped, once', async () => {
    const { stage, taken, put, hole } = staged(10)
    await put(0, 6)
    await put(2, 2)
    hole(4, 6)
    stage.drop()
    expect(taken.size).toBe(0)
    await expect(put(0)).rejects.toThrow(/dropped/)
  })

  it('is not changed between a switch and the word that it is durable', async () => {
    const { stage, taken, put, hole } = staged(10)
    await put(0, 4)
    const refuses = async (): Promise<void> => {
      await expect(put(0)).rejects.toThrow(/while it is switched/)
      expect(() => hole(0)).toThrow(/while it is switched/)
      expect(taken.size).toBe(4)
    }
    const undo = stage.switch()
    await refuses()
    undo()
    stage.switch()
    await refuses()
    stage.switched()
    await put(0)
  })

  it('a long hole where nothing is changes nothing', async () => {
    const { tables, stage, put, hole } = staged(1 << 22)
    const released = vi.spyOn(tables, 'setReleased')
    await put(1 << 21)
    stage.switch()
    stage.switched()
    hole(0, 1 << 22)
    await put(7)
    expect(stage.units).toBe(1 << 22)
    stage.switch()
    stage.switched()
    expect(released.mock.calls).toEqual([[1 << 21, 1]])
    expect(tables.init.nextSet(0)).toBe(7)
    expect(tables.formattedUnits).toBe(1)
  })

  it('a switch of many units takes few bytes a unit for what would take it back', async () => {
    const units = 1 << 19
    const tables = new VolumeTables(1, { size: units * STRIPE, stripeSize: STRIPE, formatUnit: 1 })
    for (let unit = 0; unit < units / 2; unit++) {
      tables.setSlots(unit, 1, 1 + unit)
      tables.setFormatted(unit)
    }
    let last = units
    let freed: Iterable<FreedRun> = []
    const stage = new Stage({
      datapath: { adopt: () => 1, complete: () => undefined, formatUnit: async () => undefined },
      exportId: 1,
      tables: () => tables,
      allocate: async (_first, count) => {
        last += 2 * count
        return Array.from({ length: count }, (_, index) => last + 2 * index)
      },
      unallocate: () => {},
      freeLater: (runs) => {
        freed = [...runs]
      },
    })
    const content = Buffer.alloc(64 * STRIPE)
    stage.hole(0, (units / 4) * STRIPE)
    for (let unit = units / 4; unit < units; unit += 64) await stage.put(unit * STRIPE, content)
    const before = memoryInUse()
    const undo = stage.switch()
    expect((memoryInUse() - before) / units).toBeLessThan(16)
    undo()
    stage.switch()
    stage.switched()
    expect(tables.formattedUnits).toBe((units / 4) * 3)
    let count = 0
    for (const run of freed) count += run.count
    expect(count).toBe(units / 2)
  })

  it.each([1, 3, 40])('a switch is what a model says, and its undo what there was: %s stripes', async (n) => {
    const seed = n + 100
    const random = new Random(seed)
    const units = Math.ceil(5000 / n)
    const { tables, stage, taken, freed, put, hole } = staged(units, n, n === 1 ? 512 : STRIPE + 512)
    const stored = new VolumeTables(1, tables)
    const state = () => ({
      slots: [...tables.slots],
      init: [...tables.init.words],
      formatted: tables.formattedUnits,
      mapped: tables.mappedStripes,
    })
    const formattedIn = (map: VolumeTables): boolean[] =>
      Array.from({ length: units }, (_, u) => map.init.get(u))
    for (let round = 0; round < 8; round++) {
      const model = formattedIn(tables)
      const touched = new Set<number>()
      for (let step = random.below(60); step >= 0; step--) {
        const unit = random.below(units)
        const count = Math.min(units - unit, 1 + random.below(random.pick([1, 4, 100, units])))
        const fills = random.below(3) > 0
        if (fills) await put(unit, count)
        else hole(unit, count)
        for (let u = unit; u < unit + count; u++) {
          touched.add(u)
          model[u] = fills
        }
      }
      expect(stage.units, `seed ${seed}`).toBe(touched.size)
      const before = state()
      const inUse = [...taken].sort()
      for (let again = random.below(3); again > 0; again--) {
        stage.switch()()
        expect(state(), `seed ${seed}`).toEqual(before)
        expect(stage.units).toBe(touched.size)
      }
      freed.splice(0)
      stage.switch()
      expect(formattedIn(tables), `seed ${seed}`).toEqual(model)
      // What a checkpoint takes in this turn is all of it.
      for (const { kind, index, bytes } of tables.takeDirtyPages())
        stored.loadPage(kind, index, bytes ?? Buffer.alloc(kind === 'map' ? 8192 : 4096))
      expect([...stored.slots]).toEqual([...tables.slots])
      expect(formattedIn(stored)).toEqual(model)
      stage.switched()
      // Each slot has one owner: the volume, or whoever frees it.
      for (const slot of freed) expect(taken.delete(slot), `seed ${seed}: slot ${slot}`).toBe(true)
      const used = [...tables.slots].filter((slot) => slot !== 0)
      expect(new Set(used).size).toBe(used.length)
      expect(used.sort()).toEqual([...taken].sort())
      expect(used.length).toBe(tables.mappedStripes)
      expect([...used, ...freed].sort()).toEqual(inUse)
      expect(tables.formattedUnits).toBe(model.filter((formatted) => formatted).length)
    }
    await put(0, units)
    stage.switch()()
    const before = state()
    stage.drop()
    expect(state()).toEqual(before)
    expect([...taken].sort()).toEqual([...tables.slots].filter((slot) => slot !== 0).sort())
  })
})
