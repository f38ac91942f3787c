import { describe, expect, it } from 'vitest'
import { FillDetector } from '../../src/volume/fill-detector.ts'

/** Asks until a hold is worth trying again. @returns how many were refused before */
function refused(fills: FillDetector): number {
  let count = 0
  while (!fills.worthHolding()) count++
  return count
}

describe('fill detector', () => {
  it('knows writes that continue one another, in several streams at once', () => {
    const fills = new FillDetector()
    expect(fills.observe(0, 4096)).toBe(false)
    expect(fills.observe(1 << 20, 4096)).toBe(false)
    expect(fills.observe(4096, 4096)).toBe(true)
    expect(fills.observe((1 << 20) + 4096, 8192)).toBe(true)
    expect(fills.observe(8192, 512)).toBe(true)
    expect(fills.observe(8192, 512)).toBe(false) // again, not further
  })

  it('forgives single holds that ran out among others that did not', () => {
    const fills = new FillDetector()
    for (let n = 0; n < 100; n++) {
      fills.held(n % 3 === 0)
      expect(fills.worthHolding()).toBe(true)
    }
  })

  it('tries ever more rarely where holds run out one after another', () => {
    const fills = new FillDetector()
    const gaps: number[] = []
    for (let n = 0; n < 14; n++) {
      gaps.push(refused(fills))
      fills.held(false)
    }
    expect(gaps).toEqual([0, 0, 0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096, 4096])
    refused(fills)
    fills.held(true)
    expect(refused(fills)).toBe(0)
  })
})
