import { describe, expect, it } from 'vitest'
import { type Goal, reached, verified } from '../../src/cli/mirror-follow.ts'
import type { MirrorInfo } from '../../src/mirror/types.ts'
import { MIRROR } from '../support/mirror-sample.ts'

const at = (state: MirrorInfo['state'], mode: MirrorInfo['mode'], goal: Goal, consistent = false) =>
  reached({ ...MIRROR, state, mode, consistent }, goal)

describe('waiting for a mirror', () => {
  it('ends where it is in operation, as its mode has it', () => {
    expect(at('copying', 'async', 'operation')).toBe(false)
    expect(at('cycling', 'async', 'operation')).toBe(true)
    expect(at('cycling', 'sync', 'operation')).toBe(false) // on its way from async to sync
    expect(at('insync', 'sync', 'operation')).toBe(true)
    expect(at('insync', 'async', 'operation')).toBe(false)
  })

  it('ends in the state that was asked for, or with a consistent secondary', () => {
    expect(at('paused', 'async', 'paused')).toBe(true)
    expect(at('degraded', 'sync', 'paused')).toBe(false)
    expect(at('degraded', 'sync', 'consistent', false)).toBe(false)
    expect(at('degraded', 'sync', 'consistent', true)).toBe(true)
    expect(at('splitbrain', 'sync', 'splitbrain')).toBe(true)
  })

  it('does not wait for what cannot come', () => {
    expect(() => at('copying', 'async', 'insync')).toThrow(
      'mirror data/site-b is async and never insync: wait for cycling',
    )
    expect(() => at('copying', 'sync', 'cycling')).toThrow('is sync and never cycling: wait for insync')
    expect(() => at('splitbrain', 'sync', 'operation')).toThrow(
      'fullstripe mirror resolve data site-b --discard local|remote',
    )
  })
})

describe('waiting for a comparison', () => {
  const { verify } = MIRROR
  if (verify === null) throw new Error('the sample has one')
  const later = { ...verify, started: '2026-01-02T05:00:00.000Z' }

  it('ends with the one that was begun, not with the one before', () => {
    expect(verified(MIRROR, null)).toBe(true)
    expect(verified(MIRROR, verify)).toBe(false)
    expect(verified({ ...MIRROR, verify: { ...later, ended: null } }, verify)).toBe(false)
    expect(verified({ ...MIRROR, verify: later }, verify)).toBe(true)
  })

  it('ends with an error where the role changes meanwhile: nobody compares any more', () => {
    expect(() => verified({ ...MIRROR, role: 'secondary', verify: null }, null)).toThrow(
      'mirror data/site-b: the comparison did not end: this side is the secondary now',
    )
    expect(() => verified({ ...MIRROR, verify: null }, verify)).toThrow('the role of this side changed')
  })
})
