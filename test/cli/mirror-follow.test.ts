import { describe, expect, it } from 'vitest'
import { type Goal, reached } from '../../src/cli/mirror-follow.ts'
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
