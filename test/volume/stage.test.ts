import { describe, expect, it, vi } from 'vitest'
import { Stage } from '../../src/volume/stage.ts'
import { VolumeTables } from '../../src/volume/tables.ts'

/** Slots are numbers here: a set of those that are taken, and what is freed later. */
const STRIPE = 4096

function staged(units: number, formatUnit = 1) {
  const unitBytes = formatUnit * STRIPE
  const tables = new VolumeTables(1, { size: units * unitBytes, stripeSize: STRIPE, formatUnit })
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
    stage.put(unit * unitBytes, Buffer.alloc(count * unitBytes))
  const hole = (unit: number, count = 1): void => stage.hole(unit * unitBytes, count * unitBytes)
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
    expect(released.mock.calls).toEqual([[1 << 21]])
    expect(tables.init.nextSet(0)).toBe(7)
    expect(tables.formattedUnits).toBe(1)
  })
})
