import { expect, it } from 'vitest'
import { Throttle } from '../../src/base/throttle.ts'

it('lets one of a kind through in an interval, and says how many it held back', () => {
  let now = 0
  const throttle = new Throttle(1000, () => now)
  expect(throttle.pass('a')).toBe(0)
  expect(throttle.pass('a')).toBeUndefined()
  expect(throttle.pass('b')).toBe(0)
  now = 999
  expect(throttle.pass('a')).toBeUndefined()
  now = 1000
  expect(throttle.pass('a')).toBe(2)
  expect(throttle.pass('a')).toBeUndefined()
  now = 5000
  expect(throttle.pass('c')).toBe(0)
  expect(throttle.pass('a')).toBe(0) // what was quiet for long is forgotten
})
