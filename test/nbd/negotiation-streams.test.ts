import { describe, expect, it } from 'vitest'
import { INFO, OPTION } from '../../src/nbd/constants.ts'
import { encodeClientFlags, encodeOption } from '../../src/nbd/handshake.ts'
import { negotiate } from '../fuzz/streams.ts'
import { FIXED, go, meta } from './talk.ts'

/** One session, cut everywhere; test/fuzz does the same with any session, at random. */
const LONG_SESSION = Buffer.concat([
  encodeClientFlags(FIXED),
  encodeOption(OPTION.STARTTLS),
  encodeOption(99, Buffer.from('whatever this is')),
  encodeOption(OPTION.STRUCTURED_REPLY),
  encodeOption(OPTION.EXTENDED_HEADERS),
  encodeOption(OPTION.STRUCTURED_REPLY),
  encodeOption(OPTION.LIST),
  encodeOption(OPTION.LIST, Buffer.from('!')),
  encodeOption(OPTION.LIST_META_CONTEXT, meta('disk')),
  encodeOption(OPTION.SET_META_CONTEXT, meta('disk', 'base:allocation', 'fullstripe:init')),
  encodeOption(OPTION.INFO, go('disk', [INFO.NAME, INFO.BLOCK_SIZE])),
  encodeOption(OPTION.GO, go('nobody')),
  encodeOption(OPTION.GO, go('disk', [INFO.BLOCK_SIZE])),
  Buffer.from('the first request'),
])

describe('any stream', () => {
  it('means the same wherever it is cut', () => {
    const whole = negotiate([LONG_SESSION])
    expect(whole.end).toContain('"exportName":"disk"')
    for (let cut = 0; cut <= LONG_SESSION.length; cut++) {
      expect(negotiate([LONG_SESSION.subarray(0, cut), LONG_SESSION.subarray(cut)])).toEqual(whole)
    }
    expect(negotiate(Array.from(LONG_SESSION, (byte) => Buffer.from([byte])))).toEqual(whole)
  })

  it('just waits where it ends too early', () => {
    for (let end = 0; end < LONG_SESSION.length - 'the first request'.length; end++) {
      expect(negotiate([LONG_SESSION.subarray(0, end)]).end).toBe('waiting ')
    }
  })
})
