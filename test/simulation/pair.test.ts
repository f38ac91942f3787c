import { describe, expect, it } from 'vitest'
import { runCampaign } from './campaign.ts'
import { runPair } from './pair.ts'
import { told } from './told.ts'

/**
 * A pair of daemons with a mirror between them, in the time that a test run has: seeds that are the same in every run, and then others, as
 * many as the rest of the time allows. `npm run simulate -- --pair` goes on for as long as one likes.
 * FULLSTRIPE_TEST_PAIR_MS is the time for both together.
 */
const FIXED_SEEDS = 60
const BUDGET_MS = Number(process.env['FULLSTRIPE_TEST_PAIR_MS'] ?? 40_000)
const OTHERS_MS_MIN = 2_000 // however slow the machine is
let usedMs = 0

describe('simulation of a pair', () => {
  it('takes the same steps for the same seed', async () => {
    for (const seed of [2, 11, 4_711]) {
      const first = await runPair(seed)
      expect(first.steps).toBeGreaterThan(100)
      expect(await runPair(seed)).toEqual(first)
      expect((await runPair(seed + 1)).hash).not.toBe(first.hash)
    }
  }, 120_000)

  /** Each stood for a bug once: of the mirrors, or of what this simulation takes for one. */
  it.each([14, 26, 49, 217, 373, 1028, 1136])('still does so with seed %i', async (seed) => {
    const totals = await runCampaign({ world: 'pair', from: seed, to: seed, failuresMax: 1 })
    expect(await told(totals.failures, 'pair')).toEqual([])
  })

  it(`holds a moment of the primary over there, and knows what differs, seeds 1 to ${FIXED_SEEDS}`, async () => {
    const start = performance.now()
    const totals = await runCampaign({ world: 'pair', from: 1, to: FIXED_SEEDS, failuresMax: 3 })
    usedMs = performance.now() - start
    expect(await told(totals.failures, 'pair')).toEqual([])
    // What these seeds are known to contain.
    expect(totals.seeds).toBe(FIXED_SEEDS)
    expect(totals.powerCuts).toBeGreaterThan(FIXED_SEEDS)
    expect(totals.images).toBeGreaterThan(2 * FIXED_SEEDS)
    expect(totals.bits).toBeGreaterThan(FIXED_SEEDS)
    expect(totals.answered).toBeGreaterThan(FIXED_SEEDS * 50)
  }, 600_000)

  it('does so with any other seed, while there is time', async () => {
    const from = Date.now() % 2 ** 31
    const forMs = Math.max(OTHERS_MS_MIN, BUDGET_MS - usedMs)
    const totals = await runCampaign({ world: 'pair', from, forMs, failuresMax: 3 })
    const { seeds, images, bits } = totals
    console.log(
      `pair: seeds ${from} to ${from + seeds - 1}, ${images} images, ${bits} comparisons with bitmaps`,
    )
    expect(await told(totals.failures, 'pair')).toEqual([])
  }, 600_000)
})
