import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Reservations } from '../../src/stripe/reservations.ts'

const LENGTH = 60

describe('Reservations', () => {
  it('agrees with a plain array, and stays sorted and joined', () => {
    const changes = fc.array(fc.tuple(fc.nat(LENGTH - 1), fc.integer({ min: 1, max: 12 })), { maxLength: 40 })
    fc.assert(
      fc.property(changes, fc.nat(LENGTH), fc.nat(LENGTH), (list, a, b) => {
        const reservations = new Reservations()
        const model = new Array<boolean>(LENGTH).fill(false)
        for (const [first, count] of list) {
          const value = model[first] ?? false
          let end = first
          while (end < LENGTH && end < first + count && model[end] === value) end++
          if (value) reservations.remove(first, end)
          else reservations.add(first, end)
          model.fill(!value, first, end)
        }
        expect(model.map((_, slot) => reservations.find(slot) !== undefined)).toEqual(model)
        expect(reservations.count).toBe(model.filter((reserved) => reserved).length)
        const [start, end] = [Math.min(a, b), Math.max(a, b)]
        expect(reservations.countIn(start, end)).toBe(
          model.slice(start, end).filter((reserved) => reserved).length,
        )
        const next = model.indexOf(true, start)
        expect(reservations.next(start, end)).toBe(next < 0 || next > end ? end : next)
        let previousEnd = -1
        for (const interval of reservations.intervals) {
          expect(interval.first).toBeGreaterThan(previousEnd) // joined where they touch
          expect(interval.end).toBeGreaterThan(interval.first)
          previousEnd = interval.end
        }
      }),
    )
  })

  it('asserts that nothing is reserved or given back twice', () => {
    const reservations = new Reservations()
    reservations.add(10, 20)
    expect(() => reservations.add(19, 25)).toThrow('reserved twice')
    expect(() => reservations.remove(5, 12)).toThrow('not reserved')
    expect(() => reservations.remove(15, 21)).toThrow('not reserved')
    reservations.remove(10, 20)
    expect(() => reservations.remove(10, 20)).toThrow('not reserved')
  })
})
