import { describe, expect, it } from 'vitest'
import { CopyBits } from '../../src/mirror/copy-bits.ts'
import { Random } from '../support/random.ts'

/** Units that a secondary lacks, in whatever state they are. */
describe('copy bits', () => {
  /** Of each kind some, by seed. */
  function some(units: number, seed: number): { bits: CopyBits; lacking: Set<number> } {
    const bits = new CopyBits(units)
    const random = new Random(seed)
    const lacking = new Set<number>()
    const change = (count: number): void => {
      for (let n = 0; n < count; n++) {
        const unit = random.below(units)
        bits.change(unit)
        lacking.add(unit)
      }
    }
    change(units / 8)
    bits.close()
    for (let unit = bits.nextSending(0); unit < units; unit = bits.nextSending(unit + 1 + random.below(3))) {
      bits.capture(unit)
      if (random.below(2) === 0) bits.acknowledge(unit)
    }
    change(units / 16)
    return { bits, lacking }
  }

  it('are found and counted whatever their state', () => {
    for (let seed = 1; seed <= 20; seed++) {
      const units = 1 + seed * 61
      const { bits, lacking } = some(units, seed)
      const naive = Array.from({ length: units }, (_, unit) => lacking.has(unit))
      const next = (from: number, what: boolean): number => {
        const found = naive.indexOf(what, from)
        return found < 0 ? units : found
      }
      for (let unit = 0; unit <= units; unit++) {
        expect(bits.nextLacking(unit)).toBe(next(unit, true))
        expect(bits.nextPresent(unit)).toBe(next(unit, false))
        expect(bits.lackingIn(0, unit)).toBe(naive.slice(0, unit).filter(Boolean).length)
        expect(bits.lackingIn(unit, units)).toBe(naive.slice(unit).filter(Boolean).length)
      }
      const union = bits.union()
      expect(naive.every((is, unit) => union.get(unit) === is)).toBe(true)
    }
  })

  it('are found in one walk, however many there are', () => {
    const units = 1 << 24 // a terabyte; looking for each of them through all the others would take hours
    const bits = new CopyBits(units)
    bits.changeRange(0, units)
    let found = 0
    for (let unit = bits.nextLacking(0); unit < units; unit = bits.nextLacking(unit + 64)) found++
    expect(found).toBe(units / 64)
    for (let cell = 0; cell < 1024; cell++)
      expect(bits.lackingIn(cell * 16384, (cell + 1) * 16384)).toBe(16384)
    bits.close()
    for (let unit = 0; unit < units; unit += 2) bits.capture(unit)
    expect(bits.nextPresent(0)).toBe(units)
    expect(bits.lackingIn(0, units)).toBe(units)
    expect(bits.union().count()).toBe(units)
  })
})
