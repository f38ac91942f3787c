import { describe, expect, it } from 'vitest'
import type { Datapath } from '../../src/datapath/datapath.ts'
import { Reclaimer } from '../../src/volume/reclaimer.ts'
import { memoryInUse } from '../support/memory.ts'
import { isPending } from '../support/poll.ts'

/** The reclaimer against a host that notes the order of steps; each step ends when the test says so. */
function setUp(options: { durable?: number } = {}) {
  const steps: string[] = []
  const barriers: (() => void)[] = []
  const flushes: (() => void)[] = []
  let heldBarriers = false
  const datapath: Pick<Datapath, 'barrier' | 'punch'> = {
    barrier: () => {
      steps.push('barrier')
      return heldBarriers ? new Promise((resolve) => barriers.push(resolve)) : Promise.resolve()
    },
    punch: async (slot, count) => {
      steps.push(`punch ${slot}+${count}`)
      return true
    },
  }
  const reclaimer = new Reclaimer(
    {
      datapath,
      free: (slot, count, owner) => steps.push(`free ${slot}+${count} ${owner}`),
      flush: () => {
        steps.push('flush')
        return new Promise((resolve) => flushes.push(resolve))
      },
      onTrouble: (message) => steps.push(message),
    },
    options.durable ?? 0,
  )
  return {
    reclaimer,
    steps,
    /** Everything recorded up to `sequence` is durable. */
    flushed(sequence: number): void {
      reclaimer.onDurable(sequence)
      for (const done of flushes.splice(0)) done()
    },
    holdBarriers(): void {
      heldBarriers = true
    },
    passBarriers(): void {
      heldBarriers = false
      for (const pass of barriers.splice(0)) pass()
    },
  }
}
const thin = (slot: number, count: number) => ({ slot, count, owner: 'thin' as const })

describe('reclaimer', () => {
  it('frees nothing before it is durable, and nothing before a barrier that came after', async () => {
    const { reclaimer, steps, flushed, holdBarriers, passBarriers } = setUp()
    reclaimer.freeLater([thin(5, 2)], 7)
    reclaimer.onDurable(6)
    expect(await isPending(reclaimer.reclaim())).toBe(true)
    expect(steps).toEqual(['flush'])
    holdBarriers()
    flushed(7)
    expect(await isPending(reclaimer.reclaim())).toBe(true)
    expect(steps).toEqual(['flush', 'barrier'])
    expect(reclaimer.pendingSlots).toBe(2)
    passBarriers()
    await reclaimer.reclaim()
    expect(steps).toEqual(['flush', 'barrier', 'punch 5+2', 'free 5+2 thin'])
    expect(reclaimer.pendingSlots).toBe(0)
    await reclaimer.close()
  })

  it('takes another barrier for what is freed while one is under way', async () => {
    const { reclaimer, steps, holdBarriers, passBarriers } = setUp({ durable: 9 })
    holdBarriers()
    reclaimer.freeLater([thin(1, 1)], 8)
    reclaimer.onDurable(9)
    reclaimer.freeLater([thin(2, 1)], 9) // a read may have begun on it since
    passBarriers()
    await reclaimer.reclaim()
    expect(steps).toEqual(['barrier', 'punch 1+1', 'free 1+1 thin', 'barrier', 'punch 2+1', 'free 2+1 thin'])
    await reclaimer.close()
  })

  it('frees all that waited at the call, also where the last of it is durable already and the first is not', async () => {
    const { reclaimer, steps, flushed } = setUp({ durable: 3 })
    reclaimer.freeLater([thin(10, 1)], 5)
    reclaimer.freeLater([{ slot: 20, count: 4, owner: 'thick' }], 0)
    const done = reclaimer.reclaim()
    await isPending(done)
    expect(steps).toEqual(['flush'])
    flushed(5)
    await done
    expect(steps.filter((step) => step.startsWith('free'))).toEqual(['free 10+1 thin', 'free 20+4 thick'])
    expect(reclaimer.pendingSlots).toBe(0)
    await reclaimer.close()
  })

  it('misses nothing that becomes free in the moment in which it finishes', async () => {
    // Whenever in the microtasks after a run the next slots come, they are freed.
    for (let turns = 0; turns < 12; turns++) {
      const { reclaimer } = setUp({ durable: 100 })
      reclaimer.freeLater([thin(1, 1)], 1)
      const first = reclaimer.reclaim()
      for (let turn = 0; turn < turns; turn++) await undefined
      reclaimer.freeLater([thin(2, 1)], 2)
      await reclaimer.reclaim()
      expect(reclaimer.pendingSlots, `after ${turns} turns`).toBe(0)
      await first
      await reclaimer.close()
    }
  })

  it('joins neighbours of one owner, however they came', async () => {
    const { reclaimer, steps } = setUp()
    reclaimer.freeLater([thin(7, 1), thin(3, 2), thin(9, 1)], 0)
    reclaimer.freeLater([{ slot: 10, count: 1, owner: 'thick' }], 0)
    reclaimer.freeLater([thin(5, 2), thin(8, 1)], 0)
    await reclaimer.reclaim()
    expect(steps.filter((step) => step.startsWith('free'))).toEqual(['free 3+7 thin', 'free 10+1 thick'])
    await reclaimer.close()
  })

  it('takes few bytes for each of many scattered runs, and lets others have their turns', async () => {
    const runs = 1 << 19
    let freed = 0
    const reclaimer = new Reclaimer(
      {
        datapath: { barrier: async () => {}, punch: async () => true },
        free: () => freed++,
        flush: async () => {},
        onTrouble: () => {},
      },
      0,
    )
    const before = memoryInUse()
    reclaimer.freeLater(
      (function* () {
        for (let n = 0; n < runs; n++) yield thin(2 * n + 1, 1)
      })(),
      0,
    )
    expect((memoryInUse() - before) / runs).toBeLessThan(40)
    let turns = 0
    const timer = setInterval(() => turns++, 0)
    await reclaimer.reclaim()
    clearInterval(timer)
    expect(freed).toBe(runs)
    expect(reclaimer.pendingSlots).toBe(0)
    expect(turns).toBeGreaterThan(5)
    await reclaimer.close()
  })
})
