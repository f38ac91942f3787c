import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { INFO, OPTION } from '../../src/nbd/constants.ts'
import { encodeClientFlags, encodeOption } from '../../src/nbd/handshake.ts'
import { Negotiation } from '../../src/nbd/negotiation.ts'
import { fc, test } from './property.ts'
import { FIXED, go, meta, TWO } from './talk.ts'

/** Everything a session can say, and how it ends. */
function run(chunks: readonly Buffer[]): { output: string; end: string } {
  const negotiation = new Negotiation(TWO)
  const output: Buffer[] = []
  let end = 'waiting'
  let leftover = Buffer.alloc(0)
  chunks.forEach((chunk, index) => {
    if (end === 'waiting') {
      try {
        const outcome = negotiation.receive(chunk)
        if (outcome !== undefined) end = JSON.stringify({ ...outcome, leftover: undefined })
        if (outcome?.kind === 'transmission')
          leftover = Buffer.concat([outcome.leftover, ...chunks.slice(index + 1)])
      } catch (error) {
        if (!(error instanceof ProtocolError)) throw error
        end = `protocol: ${error.message}`
      }
    }
    output.push(negotiation.takeOutput())
  })
  return { output: Buffer.concat(output).toString('hex'), end: `${end} ${leftover.toString('hex')}` }
}

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
    const whole = run([LONG_SESSION])
    expect(whole.end).toContain('"exportName":"disk"')
    for (let cut = 0; cut <= LONG_SESSION.length; cut++) {
      expect(run([LONG_SESSION.subarray(0, cut), LONG_SESSION.subarray(cut)])).toEqual(whole)
    }
    expect(run(Array.from(LONG_SESSION, (byte) => Buffer.from([byte])))).toEqual(whole)
  })

  it('just waits where it ends too early', () => {
    for (let end = 0; end < LONG_SESSION.length - 'the first request'.length; end++) {
      expect(run([LONG_SESSION.subarray(0, end)]).end).toBe('waiting ')
    }
  })

  const option = fc.record({
    option: fc.oneof(fc.integer({ min: 0, max: 13 }), fc.integer({ min: 0, max: 2 ** 32 - 1 })),
    data: fc.oneof(
      fc.uint8Array({ maxLength: 60 }).map((bytes) => Buffer.from(bytes)),
      fc.constantFrom(
        Buffer.alloc(0),
        Buffer.from('disk'),
        go('disk'),
        go('', [0, 1, 2, 3]),
        meta('disk', 'base:allocation'),
      ),
    ),
  })
  const session = fc
    .tuple(fc.constantFrom(FIXED, FIXED, FIXED, 1, 0, 2, 5), fc.array(option, { maxLength: 12 }))
    .map(([flags, options]) =>
      Buffer.concat([
        encodeClientFlags(flags),
        ...options.map((each) => encodeOption(each.option, each.data)),
      ]),
    )

  test.prop(
    {
      bytes: session,
      cuts: fc.array(fc.nat(400), { maxLength: 6 }),
      damage: fc.array(fc.tuple(fc.nat(400), fc.nat(255)), { maxLength: 2 }),
    },
    { numRuns: 1000 },
  )(
    'is answered, refused or ended, never anything else, and the same in pieces',
    ({ bytes, cuts, damage }) => {
      for (const [at, value] of damage) if (at < bytes.length) bytes[at] = value
      const whole = run([bytes])
      expect(whole.output.length / 2).toBeLessThan(18 + 13 * 2000)
      const edges = [0, ...cuts.filter((cut) => cut < bytes.length).sort((a, b) => a - b), bytes.length]
      const pieces = edges.slice(1).map((edge, index) => bytes.subarray(edges[index], edge))
      expect(run(pieces)).toEqual(whole)
    },
  )

  test.prop({ bytes: fc.uint8Array({ maxLength: 300 }) })('of garbage ends or waits', ({ bytes }) => {
    const { end } = run([encodeClientFlags(FIXED), Buffer.from(bytes)])
    expect(end).toMatch(/^(waiting|protocol)/)
  })
})
