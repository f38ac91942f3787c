import { describe, expect, it } from 'vitest'
import type { MirrorRecord } from '../../src/metadata/records.ts'
import { judge, type Verdict } from '../../src/mirror/judge.ts'
import type { RemoteHello } from '../../src/mirror/remote.ts'
import { mirrorRecord } from '../support/mirror-sample.ts'

const record = mirrorRecord({
  id: 1,
  volume: 1,
  init: 'full',
  initialized: true,
  base: 'G2',
  cycle: 7,
  clean: true,
})
const own = { current: 'G3', history: ['G2', 'G1'] }
const hello: RemoteHello = {
  role: 'secondary',
  generation: { current: 'G2', history: ['G1'] },
  base: 'G2',
  consistent: true,
  cycle: 7,
  size: 1,
  stage: '',
  changed: 0,
  blank: false,
}

const at = (current: string) => ({ generation: { current, history: [] } })
const CASES: [string, Partial<MirrorRecord>, Partial<RemoteHello>, Verdict['kind']][] = [
  ['has what the bitmap counts from', {}, {}, 'resume'],
  ['is a cycle ahead of what was noted here', {}, { cycle: 8 }, 'resume'],
  ['is further ahead: this side was set back after a change of roles', {}, { cycle: 9 }, 'compare'],
  ['is further ahead in our own generation', {}, { cycle: 9, ...at('G3') }, 'splitbrain'],
  ['is further ahead, and was never consistent', {}, { cycle: 9, consistent: false, ...at('G3') }, 'compare'],
  ['is further ahead in a generation that nobody here knows', {}, { cycle: 9, ...at('X') }, 'splitbrain'],
  ['has our generation, and that was not noted here any more', {}, at('G3'), 'resume'],
  ['was never consistent', {}, { consistent: false, generation: null }, 'resume'],
  ['was never compared', { clean: false }, {}, 'compare'],
  ['was set back to an earlier cycle', {}, { cycle: 6 }, 'compare'],
  ['has content of an earlier generation than we both had', {}, at('G1'), 'compare'],
  ['has a generation that nobody here knows', {}, at('X'), 'splitbrain'],
  ['has none, and says that it is consistent', {}, { generation: null }, 'splitbrain'],
  ['is primary', {}, { role: 'primary' }, 'splitbrain'],
  ['is primary, and was never compared', { clean: false }, { role: 'primary' }, 'splitbrain'],
]

describe('the other side of a mirror', () => {
  it.each(CASES)('%s', (_, change, answer, kind) => {
    expect(judge({ ...record, ...change }, own, { ...hello, ...answer }).kind).toBe(kind)
  })

  it('is compared as it was asked for at first, and never copied whole again', () => {
    expect(judge({ ...record, clean: false }, own, hello)).toMatchObject({ init: 'full' })
    expect(judge(record, own, { ...hello, cycle: 1 })).toMatchObject({ init: 'realized' })
    expect(judge({ ...record, init: 'signature' }, own, { ...hello, cycle: 1 })).toMatchObject({
      init: 'signature',
    })
  })
})
