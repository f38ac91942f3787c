import { describe, expect, it } from 'vitest'
import { type Overlay, overlayStripe, planStripe } from '../../src/datapath/format-image.ts'
import { pattern } from '../support/datapath-rig.ts'
import { Random } from '../support/random.ts'

const stripe = 64

/** Carries a plan out the way a datapath does, and says what it read. */
function carryOut(
  overlays: readonly Overlay[],
  start: number,
  base: Buffer | null,
): { image: Buffer; read: boolean } {
  const plan = planStripe(overlays, start, stripe, base === null ? 0 : 7)
  if (plan.direct !== null) {
    const { payload, offset } = plan.direct
    const image =
      payload === null ? Buffer.alloc(stripe) : payload.subarray(start - offset, start - offset + stripe)
    return { image, read: false }
  }
  const image = plan.base === 'slot' && base !== null ? Buffer.from(base) : Buffer.alloc(stripe, 0xf1)
  if (plan.base === 'covered') image.fill(0xee) // must not stay visible
  overlayStripe(image, plan.overlays, start)
  return { image, read: plan.base === 'slot' }
}

describe('image of a format unit', () => {
  it('is what laying every overlay over what lies under gives, whatever they are', () => {
    let direct = 0
    let reads = 0
    for (let seed = 1; seed <= 3000; seed++) {
      const random = new Random(seed)
      const start = stripe * random.below(3)
      const overlays = Array.from({ length: random.below(7) }, (_, index) => {
        const offset = random.below(5 * stripe) - stripe
        const length = random.below(3) === 0 ? 2 * stripe : 1 + random.below(stripe)
        const payload = random.below(3) === 0 ? null : pattern(length, seed * 10 + index)
        return { offset, length, payload }
      })
      const base = random.below(2) === 0 ? null : pattern(stripe, seed)
      const expected = base === null ? Buffer.alloc(stripe, 0xf1) : Buffer.from(base)
      let visible = stripe
      const covered = new Set<number>()
      for (const { offset, length, payload } of overlays) {
        for (let at = Math.max(start, offset); at < Math.min(start + stripe, offset + length); at++) {
          expected[at - start] = payload === null ? 0 : (payload[at - offset] ?? 0)
          covered.add(at)
        }
      }
      visible -= covered.size
      const { image, read } = carryOut(overlays, start, base)
      expect(image.equals(expected), `seed ${seed}`).toBe(true)
      expect(read, `seed ${seed}`).toBe(base !== null && visible > 0)
      if (planStripe(overlays, start, stripe, 0).direct !== null) direct++
      if (read) reads++
    }
    expect(direct).toBeGreaterThan(100)
    expect(reads).toBeGreaterThan(100)
  })

  it('is a payload itself, uncopied, where the last overlay covers the stripe', () => {
    const payload = pattern(3 * stripe)
    const plan = planStripe([{ offset: -10, length: 3 * stripe, payload }], stripe, stripe, 9)
    expect(plan).toMatchObject({ direct: { payload }, overlays: [] })
  })
})
