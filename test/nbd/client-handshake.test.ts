import { describe, expect, it } from 'vitest'
import { ProtocolError, UserError } from '../../src/base/errors.ts'
import { describeExport, HandshakeRun, listExports, openExport } from '../../src/nbd/client-handshake.ts'
import { HEADER, OPTION, OPTION_REPLY, type ReplyMode } from '../../src/nbd/constants.ts'
import { encodeGreeting, encodeInfoExport, encodeOptionReply } from '../../src/nbd/handshake.ts'
import { type ExportCatalog, Negotiation, type NegotiationOutcome } from '../../src/nbd/negotiation.ts'

const CONTEXTS = [
  { id: 7, name: 'base:allocation' },
  { id: 9, name: 'fullstripe:init' },
]
const CATALOG: ExportCatalog = {
  list: () => [
    { name: 'disk', description: 'words' },
    { name: 'other', description: '' },
  ],
  find: (name) =>
    name === 'disk'
      ? { name, description: 'words', size: 2 ** 45, readOnly: true, canMultiConn: true, contexts: CONTEXTS }
      : undefined,
}

/** Both ends of a handshake, face to face; every message travels in pieces of `pieceSize` bytes. */
function meet<Result>(handshake: ConstructorParameters<typeof HandshakeRun<Result>>[0], pieceSize: number) {
  const negotiation = new Negotiation(CATALOG)
  const toServer: Buffer[] = []
  let outcome: NegotiationOutcome | undefined
  const run = new HandshakeRun<Result>(handshake, (bytes) => toServer.push(bytes))
  for (;;) {
    const toClient = negotiation.takeOutput()
    let result: { value: Result; leftover: Buffer } | undefined
    for (let at = 0; at < toClient.length && result === undefined; at += pieceSize) {
      result = run.receive(toClient.subarray(at, at + pieceSize))
    }
    const asked = Buffer.concat(toServer.splice(0))
    for (let at = 0; at < asked.length && outcome === undefined; at += pieceSize) {
      outcome = negotiation.receive(asked.subarray(at, at + pieceSize))
    }
    if (result !== undefined) return { result: result.value, outcome }
    if (asked.length === 0) throw new Error('both wait for each other')
  }
}

const PIECES = [...Array.from({ length: 40 }, (_, i) => i + 1), 100_000]

describe('the client against our own negotiation, in pieces of any size', () => {
  for (const mode of ['simple', 'structured', 'extended'] as const) {
    it(`opens an export, ${mode}`, () => {
      for (const pieceSize of PIECES) {
        const contexts = ['fullstripe:init', 'x-none:at-all']
        const { result, outcome } = meet(openExport('disk', { mode, contexts }), pieceSize)
        const selected = mode === 'simple' ? [] : CONTEXTS.slice(1)
        expect(result).toMatchObject({
          size: 2 ** 45,
          name: 'disk',
          description: 'words',
          mode,
          contexts: selected,
        })
        expect(result.blockSizes).toEqual({ minimum: 1, preferred: 4096, maximum: 32 * 1024 * 1024 })
        expect(outcome).toMatchObject({
          kind: 'transmission',
          mode,
          contexts: selected.map((context) => context.id),
        })
      }
    })
  }

  it('lists and describes exports, and says goodbye', () => {
    for (const pieceSize of PIECES) {
      const listed = meet(listExports(), pieceSize)
      expect(listed).toEqual({ result: CATALOG.list(), outcome: { kind: 'aborted' } })
      const described = meet(describeExport('disk', { mode: 'extended', contexts: [] }), pieceSize)
      expect(described.result.contexts.map((context) => context.name)).toEqual(
        CONTEXTS.map((context) => context.name),
      )
      expect(described.outcome).toEqual({ kind: 'aborted' })
    }
  })

  it('learns that an export does not exist', () => {
    const attempt = () => meet(openExport('nobody', { mode: 'extended', contexts: [] }), 1000)
    expect(attempt).toThrow(UserError)
    expect(attempt).toThrow(/no export "nobody"/)
  })
})

/** Plays a server that says all of this at once, and returns what the client made of it. */
function hear(bytes: readonly Buffer[], mode: ReplyMode = 'simple') {
  const sent: Buffer[] = []
  const run = new HandshakeRun(openExport('disk', { mode, contexts: [] }), (each) => sent.push(each))
  return { heard: run.receive(Buffer.concat(bytes)), sent: Buffer.concat(sent) }
}

describe('the client against other servers', () => {
  const greeting = encodeGreeting(3)
  const info = encodeOptionReply(OPTION.GO, OPTION_REPLY.INFO, encodeInfoExport(512, 1))
  const ack = encodeOptionReply(OPTION.GO, OPTION_REPLY.ACK)
  const unsupported = (option: number) => encodeOptionReply(option, OPTION_REPLY.ERR_UNSUP)

  it('leaves what comes after the handshake', () => {
    const { heard } = hear([greeting, info, ack, Buffer.from('a reply')])
    expect(heard).toMatchObject({ value: { size: 512 }, leftover: Buffer.from('a reply') })
  })

  it('takes what is second best', () => {
    const { heard } = hear(
      [
        greeting,
        unsupported(OPTION.EXTENDED_HEADERS),
        encodeOptionReply(OPTION.STRUCTURED_REPLY, OPTION_REPLY.ACK),
        info,
        ack,
      ],
      'extended',
    )
    expect(heard?.value.mode).toBe('structured')
    const none = [
      greeting,
      unsupported(OPTION.EXTENDED_HEADERS),
      unsupported(OPTION.STRUCTURED_REPLY),
      info,
      ack,
    ]
    expect(hear(none, 'extended').heard?.value.mode).toBe('simple')
  })

  it('falls back to EXPORT_NAME, whose answer is padded where NO_ZEROES is missing', () => {
    const answer = Buffer.alloc(10 + HEADER.exportNamePadding)
    answer.writeBigUInt64BE(4096n)
    for (const [flags, length] of [
      [3, 10],
      [1, 134],
    ] as const) {
      const { heard } = hear([
        encodeGreeting(flags),
        unsupported(OPTION.GO),
        answer.subarray(0, length),
        Buffer.from('x'),
      ])
      expect(heard).toMatchObject({ value: { size: 4096, name: 'disk' }, leftover: Buffer.from('x') })
    }
  })

  it('refuses servers without GO that agreed on extended headers', () => {
    const script = [
      greeting,
      encodeOptionReply(OPTION.EXTENDED_HEADERS, OPTION_REPLY.ACK),
      unsupported(OPTION.GO),
    ]
    expect(() => hear(script, 'extended')).toThrow(ProtocolError)
  })

  it('ignores information that it does not know', () => {
    const strange = encodeOptionReply(OPTION.GO, OPTION_REPLY.INFO, Buffer.from('0fff0102', 'hex'))
    expect(hear([greeting, strange, info, strange, ack]).heard?.value.size).toBe(512)
  })

  const infoReply = (hex: string) => encodeOptionReply(OPTION.GO, OPTION_REPLY.INFO, Buffer.from(hex, 'hex'))
  for (const [what, script] of [
    ['no size', [greeting, ack]],
    ['an information without a type', [greeting, infoReply('00')]],
    ['a cut INFO_EXPORT', [greeting, infoReply('0000ffff')]],
    ['a size of 2^63', [greeting, infoReply(`0000${'8000000000000000'}0001`)]],
    [
      'block sizes that are no powers of 2',
      [greeting, infoReply(`0003${'00000003'}${'00001000'}${'02000000'}`)],
    ],
    ['a maximum below the minimum', [greeting, infoReply(`0003${'00001000'}${'00001000'}${'00000200'}`)]],
    [
      'a preferred size below the minimum',
      [greeting, infoReply(`0003${'00001000'}${'00000200'}${'02000000'}`)],
    ],
    [
      'an oldstyle greeting',
      [Buffer.concat([encodeGreeting(0).subarray(0, 8), Buffer.from(`${'0000420281861253'}0000`, 'hex')])],
    ],
    ['a reply to EXPORT_NAME', [greeting, encodeOptionReply(OPTION.EXPORT_NAME, OPTION_REPLY.ACK)]],
    ['an unknown kind of reply', [greeting, encodeOptionReply(OPTION.GO, 99)]],
  ] as const) {
    it(`refuses ${what}`, () => {
      expect(() => hear(script)).toThrow(ProtocolError)
    })
  }
})
