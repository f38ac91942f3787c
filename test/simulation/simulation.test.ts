import { describe, expect, it } from 'vitest'
import { runCampaign } from './campaign.ts'
import { runSeed } from './simulation.ts'
import { told } from './told.ts'

/**
 * The simulation in the time that a test run has: seeds that are the same in every run, and then others, as many as the rest
 * of the time allows. `npm run simulate` goes on for as long as one likes.
 * FULLSTRIPE_TEST_SIMULATION_MS is the time for both together.
 */
const FIXED_SEEDS = 400
const BUDGET_MS = Number(process.env['FULLSTRIPE_TEST_SIMULATION_MS'] ?? 80_000)
const OTHERS_MS_MIN = 2_000 // however slow the machine is
let usedMs = 0

describe('simulation', () => {
  it('takes the same steps for the same seed', async () => {
    for (const seed of [3, 17, 4_711, 81_234]) {
      const first = await runSeed(seed)
      expect(first.steps).toBeGreaterThan(100)
      expect(await runSeed(seed)).toEqual(first)
      expect((await runSeed(seed + 1)).hash).not.toBe(first.hash)
    }
  }, 60_000)

  it(`loses nothing that was promised and shows nothing of others, seeds 1 to ${FIXED_SEEDS}`, async () => {
    const start = performance.now()
    const totals = await runCampaign({ from: 1, to: FIXED_SEEDS, failuresMax: 3 })
    usedMs = performance.now() - start
    expect(await told(totals.failures)).toEqual([])
    // What these seeds are known to contain.
    expect(totals.seeds).toBe(FIXED_SEEDS)
    expect(totals.powerCuts).toBeGreaterThan(FIXED_SEEDS)
    expect(totals.faultyLives).toBeGreaterThan(FIXED_SEEDS / 8)
    expect(totals.answered).toBeGreaterThan(FIXED_SEEDS * 50)
  }, 300_000)

  // Frames of the journal that failed and counted all the same.
  it.each([1_005_518, 1_016_175, 16_619_149])('nor does it with seed %i', async (seed) => {
    const totals = await runCampaign({ from: seed, to: seed, failuresMax: 1 })
    expect(await told(totals.failures)).toEqual([])
  })

  it('nor with any other seed, while there is time', async () => {
    const from = Date.now() % 2 ** 31
    const forMs = Math.max(OTHERS_MS_MIN, BUDGET_MS - usedMs)
    const totals = await runCampaign({ from, forMs, failuresMax: 3 })
    console.log(
      `simulation: seeds ${from} to ${from + totals.seeds - 1}, ${totals.answered} requests, ${totals.powerCuts} power cuts`,
    )
    expect(await told(totals.failures)).toEqual([])
  }, 300_000)
})
