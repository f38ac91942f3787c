import { describe, expect, it } from 'vitest'
import {
  differenceLines,
  lagText,
  mirrorBar,
  mirrorLines,
  mirrorStateText,
  mirrorTable,
  modeText,
  roleText,
  verifyText,
} from '../../src/cli/mirror-text.ts'
import { textWidth } from '../../src/cli/text.ts'
import type { MirrorInfo, VerifyResult } from '../../src/mirror/types.ts'
import { MIRROR } from '../support/mirror-sample.ts'

const mirror = (change: Partial<MirrorInfo>): MirrorInfo => ({ ...MIRROR, reason: null, ...change })
const lag = (bytes: number, seconds: number | null) => lagText(mirror({ lag: { bytes, seconds } }))

describe('mirrors in words', () => {
  it('have roles, and what a change of roles leaves behind is told', () => {
    const side = (role: 'primary' | 'secondary', changed: number) =>
      roleText(mirror({ role, local: { ...MIRROR.local, role, changed } }))
    expect(side('primary', 65536)).toBe('mirror data/site-b: this side is the primary now')
    expect(side('secondary', 0)).toBe('mirror data/site-b: this side is the secondary now')
    expect(side('secondary', 65536)).toContain('lacks 64K of what was changed here')
    const alone = { role: 'primary', mode: 'sync', onLoss: 'block', connected: false } as const
    expect(roleText(mirror(alone))).toContain('writes wait until the other side is back')
    expect(roleText(mirror({ ...alone, connected: true }))).toBe(side('primary', 0))
    expect(roleText(mirror({ ...alone, onLoss: 'continue' }))).toBe(side('primary', 0))
  })

  it('have a state, with what is done there and why', () => {
    expect(mirrorStateText(mirror({}))).toBe('copying 25.0 %')
    expect(mirrorStateText(MIRROR)).toBe('copying 25.0 %: the rate is limited')
    expect(mirrorStateText(mirror({ state: 'insync', progress: null }))).toBe('insync')
    expect(mirrorStateText(mirror({ state: 'degraded', progress: null, reason: 'no route' }))).toBe(
      'degraded: no route',
    )
    const progress = { what: 'cycle', done: 0, total: 9, speed: 0, remainingMs: null } as const
    expect(mirrorStateText(mirror({ state: 'cycling', progress }))).toBe('cycling, sending 0 %')
    expect(mirrorStateText(mirror({ state: 'insync', progress: { ...progress, what: 'verifying' } }))).toBe(
      'insync, verifying 0 %',
    )
  })

  it('lag in bytes and time, as far as that is known', () => {
    expect(lag(0, 0)).toBe('0')
    expect(lag(0, null)).toBe('0')
    expect(lag(0, 3.14)).toBe('3.1s')
    expect(lag(4096, 3.14)).toBe('4K, 3.1s')
    expect(lag(4096, 93)).toBe('4K, 1m33s')
    expect(lag(4096, null)).toBe('4K')
  })

  it('have a mode', () => {
    expect(modeText(mirror({ rate: null }))).toBe('async every 5s')
    expect(modeText(MIRROR)).toBe('async every 5s, at most 50M/s')
    expect(modeText(mirror({ mode: 'sync', rate: null }))).toBe('sync, writes go on when the peer is lost')
    expect(modeText(mirror({ mode: 'sync', onLoss: 'block', rate: null }))).toBe(
      'sync, writes wait when the peer is lost',
    )
  })

  it('stand in a table, NBD exports by their URI', () => {
    const uri = 'nbd://store:10809/copy'
    expect(mirrorTable([MIRROR, mirror({ name: 'nbd', kind: 'nbd', peer: uri, role: 'secondary' })])).toEqual(
      [
        'VOLUME  MIRROR  ROLE       MODE   TARGET                  LAG       STATE',
        'data    site-b  primary    async  copy of site-b          3M, 2.5s  copying 25.0 %: the rate is limited',
        'data    nbd     secondary  async  nbd://store:10809/copy  3M, 2.5s  copying 25.0 %',
      ],
    )
  })

  it('are shown with all that matters to a person', () => {
    const text = mirrorLines(MIRROR).join('\n')
    expect(text).toMatch(/^copying +1M of 4M, 1M\/s, 3s left$/m)
    expect(text).toMatch(/^this side +primary, 4M, generation 0f3c1a52, 64K changed since both were equal$/m)
    expect(text).toMatch(/^other side +secondary, 4M, generation 1f3c1a52, not consistent$/m)
    expect(text).toMatch(/^secondary +not consistent yet$/m)
    expect(text).toMatch(/^verified +4M compared, 128K differ$/m)
    const other = mirrorLines(mirror({ remote: null, address: null, verify: null, consistent: true })).join(
      '\n',
    )
    expect(other).toMatch(/^address +the peer connects to this side$/m)
    expect(other).toMatch(/^other side +not known yet$/m)
    expect(other).toMatch(/^secondary +a point in time$/m)
    expect(other).not.toMatch(/^verified/m)
  })
})

describe('the bar of a mirror', () => {
  it('says how fast and how long', () => {
    expect(mirrorBar(MIRROR, 60, false)).toBe('data/site-b copying  ###.........  25.0 %      1M/s  3s left')
    expect(mirrorBar(MIRROR, 60, true)).toBe('data/site-b copying  ███           25.0 %      1M/s  3s left')
    const waits = {
      ...MIRROR,
      progress: { what: 'cycle', done: 0, total: 9, speed: 0, remainingMs: null } as const,
    }
    expect(mirrorBar(waits, 60, false)).toMatch(/^data\/site-b sending {2}\.+ {5}0 % {2}waiting$/)
  })

  it('is as wide as the terminal, and 8 columns at least', () => {
    for (const columns of [60, 70, 80]) expect(textWidth(mirrorBar(MIRROR, columns, true))).toBe(columns)
    expect(mirrorBar(MIRROR, 20, false)).toContain('  ##......  ')
  })

  it('is the state where nothing goes on', () => {
    expect(mirrorBar(mirror({ state: 'paused', progress: null }), 80, true)).toBe('data/site-b  paused')
  })
})

describe('a comparison', () => {
  const result = (change: Partial<VerifyResult>): VerifyResult => ({
    started: '2026-01-02T03:04:05.678Z',
    ended: '2026-01-02T03:05:05.678Z',
    compared: 4096,
    differences: [],
    differing: 0,
    repaired: false,
    failure: null,
    ...change,
  })

  it('is a sentence', () => {
    expect(verifyText(result({}))).toBe('4K compared, no differences')
    expect(verifyText(result({ ended: null }))).toBe('4K compared so far, no differences')
    expect(verifyText(result({ differing: 512 }))).toBe('4K compared, 512 differ')
    expect(verifyText(result({ differing: 512, repaired: true }))).toBe('4K compared, 512 differ, repaired')
    expect(verifyText(result({ failure: 'the link is lost' }))).toBe(
      '4K compared, then failed: the link is lost',
    )
  })

  it('lists differences, and says where there are more', () => {
    expect(differenceLines(result({}))).toEqual([])
    const differences = [
      { offset: 0, length: 65536 },
      { offset: 2 ** 20, length: 512 },
    ]
    const lines = differenceLines(result({ differences, differing: 65536 + 512 }))
    expect(lines.map((line) => line.trim().split(/ +/))).toEqual([
      ['OFFSET', 'LENGTH'],
      ['0', '64K'],
      ['1M', '512'],
    ])
    expect(differenceLines(result({ differences, differing: 2 ** 20 + 65536 + 512 })).at(-1)).toBe(
      'and more: 1M are not listed',
    )
  })
})
