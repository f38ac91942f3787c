import { describe, expect, it } from 'vitest'
import { bar, duration, pairs, percent, progressBar, table, textWidth, truncate } from '../../src/cli/text.ts'

describe('text for terminals', () => {
  it('knows how wide characters are', () => {
    expect(textWidth('data')).toBe(4)
    expect(textWidth('ä')).toBe(1)
    expect(textWidth('a\u0308')).toBe(1) // a and a combining diaeresis
    expect(textWidth('数据')).toBe(4)
    expect(textWidth('👍')).toBe(2)
  })

  it('lines columns up, numbers at their end, also with wide characters', () => {
    const lines = table(
      [{ title: 'name' }, { title: 'size', right: true }, { title: 'state' }],
      [
        ['数据', '10G', ''],
        ['a', '512', 'busy'],
      ],
    )
    expect(lines).toEqual(['NAME  SIZE  STATE', '数据   10G', 'a      512  busy'])
    expect(
      pairs([
        ['a', '1'],
        ['long', '2'],
      ]),
    ).toEqual(['a     1', 'long  2'])
  })

  it('cuts lines to a width, between characters', () => {
    expect(truncate('abcdef', 6)).toBe('abcdef')
    expect(truncate('abcdefg', 6)).toBe('abcde…')
    expect(truncate('数据数据', 6)).toBe('数据…')
  })

  it('counts no escape sequences, and cuts them off with the rest', () => {
    const red = '\x1b[31mabc\x1b[0m'
    expect(textWidth(red)).toBe(3)
    expect(truncate(red, 3)).toBe(red)
    expect(truncate(red, 2)).toBe('a…')
  })

  it('draws how far something is, how fast and how long it goes on', () => {
    const progress = { done: 1, total: 4, speed: 2 ** 20, remaining: 93, state: 'running' }
    expect(progressBar('x', progress, 45, false)).toBe('x  ###.........  25.0 %      1M/s  1m33s left')
    expect(progressBar('x', { ...progress, remaining: null }, 40, false)).toMatch(/ {6}1M\/s$/)
    expect(progressBar('x', { ...progress, speed: null }, 40, false)).toMatch(/ 25\.0 % {2}running$/)
    expect(progressBar('x', { ...progress, done: 0, total: 0 }, 80, false)).toMatch(/^x {2}#{40} {7}- /)
  })

  it('never calls something nothing, nor almost all all', () => {
    expect(percent(0, 1000)).toBe('0 %')
    expect(percent(1, 1e9)).toBe('<0.1 %')
    expect(percent(124, 1000)).toBe('12.4 %')
    expect(percent(1e9 - 1, 1e9)).toBe('>99.9 %')
    expect(percent(1000, 1000)).toBe('100 %')
    expect(percent(0, 0)).toBe('-')
  })

  it('writes times as people do', () => {
    expect([0, 59.4, 60, 93, 3600, 7384, 90000].map(duration)).toEqual([
      '0s',
      '59s',
      '1m00s',
      '1m33s',
      '1h00m',
      '2h03m',
      '1d01h',
    ])
    expect(duration(Number.POSITIVE_INFINITY)).toBe('unknown')
  })

  it('draws bars of the width asked for', () => {
    for (const unicode of [true, false]) {
      for (const share of [-1, 0, 0.01, 0.5, 0.99, 1, 2]) expect(textWidth(bar(share, 10, unicode))).toBe(10)
    }
    expect(bar(0, 4, false)).toBe('....')
    expect(bar(0.5, 4, false)).toBe('##..')
    expect(bar(1, 4, true)).toBe('████')
    expect(bar(0.375, 4, true)).toBe('█▌  ')
  })
})
