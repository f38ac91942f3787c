import { describe, expect, it } from 'vitest'
import { formatDuration, parseDuration } from '../../src/base/durations.ts'

describe('durations', () => {
  it.each([
    ['0s', 0],
    ['500ms', 500],
    ['5s', 5000],
    ['1.5s', 1500],
    ['0.001s', 1],
    ['1.005s', 1005],
    ['2m', 120_000],
    ['1.5 h', 5_400_000],
    ['1d', 86_400_000],
  ])('%s is %d ms', (text, ms) => {
    expect(parseDuration(text)).toBe(ms)
    expect(parseDuration(formatDuration(ms))).toBe(ms)
  })

  it.each([
    ['5', /is not a duration/],
    ['', /is not a duration/],
    ['-5s', /is not a duration/],
    ['5 sec', /is not a duration/],
    ['5M', /is not a duration/], // not five megaseconds, nor minutes
    ['1s500ms', /is not a duration/],
    ['0.5ms', /not a whole number of milliseconds/],
    ['0.0001s', /not a whole number of milliseconds/],
    ['99999999999999999d', /longer than this program can count/],
  ])('%j is refused', (text, message) => {
    expect(() => parseDuration(text, '--interval')).toThrow(message)
    expect(() => parseDuration(text, '--interval')).toThrow('--interval')
  })

  it('are written with the largest unit that is exact', () => {
    expect([0, 999, 1000, 1500, 60_000, 90_000, 7_200_000, 172_800_000].map(formatDuration)).toEqual([
      '0ms',
      '999ms',
      '1s',
      '1500ms',
      '1m',
      '90s',
      '2h',
      '2d',
    ])
  })
})
