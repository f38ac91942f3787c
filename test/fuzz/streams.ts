/** Targets that read a stream from a peer: they make the same of it wherever it is cut. */
import fc from 'fast-check'
import { ProtocolError, UserError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import { BufferPool } from '../../src/datapath/buffer-pool.ts'
import { RequestStream } from '../../src/datapath/request-stream.ts'
import { describeExport, HandshakeRun, listExports, openExport } from '../../src/nbd/client-handshake.ts'
import { INFO, OPTION, OPTION_REPLY, type ReplyMode } from '../../src/nbd/constants.ts'
import {
  encodeClientFlags,
  encodeExportNameReply,
  encodeGreeting,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeListedExport,
  encodeMetaContext,
  encodeOption,
  encodeOptionReply,
} from '../../src/nbd/handshake.ts'
import { Negotiation } from '../../src/nbd/negotiation.ts'
import { ReplyReader } from '../../src/nbd/reply-reader.ts'
import {
  decodeStatusFilter,
  type Request,
  type SessionRules,
  validateStatusFilter,
} from '../../src/nbd/transmission.ts'
import { FIXED, go, meta, TWO } from '../nbd/talk.ts'
import { CMD, encodeRequest, statusFilter } from '../support/wire-client.ts'
import { expectSame, inPieces, type Target } from './fuzz.ts'

const MODES: readonly ReplyMode[] = ['simple', 'structured', 'extended']
const bytesOf = (maxLength: number) => fc.uint8Array({ maxLength }).map((bytes) => Buffer.from(bytes))
const word = fc.oneof(fc.nat(20), fc.nat(2 ** 31 - 1), fc.constantFrom(2 ** 31, 2 ** 32 - 1, 2 ** 16, 4096))
const joined = (parts: fc.Arbitrary<readonly Buffer[]>) => parts.map((list) => Buffer.concat(list))

/** The only error a reader of a peer's bytes may throw. */
function protocolMessage(error: unknown): string {
  if (!(error instanceof ProtocolError)) throw error
  return `protocol: ${error.message}`
}

// ------------------------------------------------------------------------------------ a client's handshake

/** Everything that the server's side says to a stream, and how it ends. */
export function negotiate(chunks: readonly Buffer[]): { output: string; end: string } {
  const negotiation = new Negotiation(TWO)
  const output: Buffer[] = [negotiation.takeOutput()]
  let end = 'waiting'
  let leftover: Buffer = Buffer.alloc(0)
  chunks.forEach((chunk, index) => {
    if (end === 'waiting') {
      try {
        const outcome = negotiation.receive(chunk)
        if (outcome !== undefined) end = JSON.stringify({ ...outcome, leftover: undefined })
        if (outcome?.kind === 'transmission') {
          leftover = Buffer.concat([outcome.leftover, ...chunks.slice(index + 1)])
        }
      } catch (error) {
        end = protocolMessage(error)
      }
    }
    output.push(negotiation.takeOutput())
  })
  return { output: Buffer.concat(output).toString('hex'), end: `${end} ${leftover.toString('hex')}` }
}

const option = fc
  .record({
    option: fc.oneof(fc.integer({ min: 0, max: 13 }), word),
    data: fc.oneof(
      bytesOf(60),
      fc.constantFrom(
        Buffer.alloc(0),
        Buffer.from('disk'),
        go('disk'),
        go('', [INFO.EXPORT, INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]),
        meta('disk', 'base:allocation'),
        meta('disk', 'base:', 'fullstripe:init', 'x-none:'),
      ),
    ),
  })
  .map(({ option, data }) => encodeOption(option, data))

const negotiation: Target = {
  name: 'negotiation',
  inputMax: 4096,
  built: joined(
    fc
      .tuple(fc.constantFrom(FIXED, FIXED, FIXED, 1, 0, 2, 5), fc.array(option, { maxLength: 12 }))
      .map(([flags, options]) => [encodeClientFlags(flags), ...options]),
  ),
  // An option's data is held once; each of a few dozen options is answered with a few hundred bytes; three runs.
  allocationMax: (length) => 64 * 1024 + 4 * (LIMITS.nbdOptionDataMax + 200 * length),
  check(input, random) {
    const whole = negotiate([input])
    expectSame(whole, negotiate(inPieces(input, random)), 'whole and in pieces')
    const options = input.length / 16
    if (whole.output.length / 2 > 18 + 2000 * (options + 1))
      throw new Error('the output is out of proportion')
  },
}

// --------------------------------------------------------------------------------------------- a client's requests

const CONTEXTS = [1, 2, 3]
const PAYLOAD_MAX = 1 << 16

/** The first two bytes of an input say which session its stream is for. */
function rulesOf(input: Buffer): SessionRules {
  const [first = 0, second = 0] = input
  const mode = MODES[first % 3]!
  return {
    mode,
    readOnly: (first & 0x10) !== 0,
    contexts: mode !== 'simple' && (first & 0x20) !== 0 ? CONTEXTS : [],
    size: 2 ** (second % 54) - (second % 54 === 53 ? 1 : 0),
    payloadMax: PAYLOAD_MAX,
  }
}

/** What the request stream makes of its bytes. */
function receiveRequests(rules: SessionRules, chunks: readonly Buffer[]): string[] {
  const events: string[] = []
  const pool = new BufferPool()
  let held = 0
  let over = false
  const inside = ({ command, offset, length, payloadLength }: Request) => {
    if (command === CMD.DISC || command === CMD.FLUSH) return
    if (command === CMD.STATUS && payloadLength > 0) return // its range is in its payload
    if (length === 0 || offset + length > rules.size)
      throw new Error(`command ${command} outside of the export`)
    if (command === CMD.READ && length > PAYLOAD_MAX)
      throw new Error('a read over the maximum is let through')
    if (rules.readOnly && [CMD.WRITE, CMD.TRIM, CMD.ZERO].some((writes) => writes === command)) {
      throw new Error('a write to a read-only export is let through')
    }
  }
  const stream: RequestStream = new RequestStream(rules, pool, {
    admits: () => true,
    grants: (left) => {
      held += left
      if (held > PAYLOAD_MAX) throw new Error(`${held} bytes of payload are held`)
      return left
    },
    partResult: () => 0,
    onRequest: (request) => {
      inside(request)
      events.push(
        `${request.command} ${request.flags} ${request.offset} ${request.length} ${request.cookieLow}`,
      )
    },
    onPayload: (part, answers, payload, owned) => {
      held -= payload.length
      inside(part)
      const filter = part.command === CMD.STATUS ? decodeStatusFilter(payload) : undefined
      const verdict = filter === undefined ? 0 : validateStatusFilter(filter, part, rules)
      if (filter !== undefined && verdict === 0 && part.offset + filter.length > rules.size) {
        throw new Error('a filter outside of the export is let through')
      }
      events.push(`${part.command} ${answers?.cookieLow} ${payload.toString('base64')} ${verdict}`)
      if (owned !== null) pool.give(owned)
    },
    onRefused: (request, errno) => events.push(`refused ${request.command} ${errno}`),
    onOutOfStep: () => {
      events.push('out of step')
      held -= stream.stop()
      over = true
    },
  })
  for (const chunk of chunks) if (!over) stream.feed(chunk)
  return events
}

const request = fc
  .record({
    mode: fc.constantFrom(...MODES),
    command: fc.oneof(fc.nat(9), fc.nat(0xffff)),
    flags: fc.oneof(fc.constantFrom(0, 1, 2, 4, 8, 16, 32), fc.nat(0xffff)),
    offset: fc.oneof(fc.nat(2 ** 20), fc.bigInt({ min: 0n, max: 2n ** 64n - 1n })),
    body: fc.oneof(
      bytesOf(200).map((payload) => ({ payload })),
      fc.nat(2 ** 20).map((length) => ({ length })),
      word.map((length) => ({ length })),
      fc
        .tuple(fc.nat(2 ** 20), fc.array(fc.integer({ min: 0, max: 4 }), { maxLength: 4 }))
        .map(([length, ids]) => ({ payload: statusFilter(length, ids) })),
    ),
  })
  .map(({ mode, body, ...rest }) => ({ mode, bytes: encodeRequest({ ...rest, ...body }, mode) }))

const requests: Target = {
  name: 'requests',
  inputMax: 16_384,
  built: fc
    .tuple(fc.nat(255), fc.nat(255), fc.array(request, { maxLength: 8 }), fc.boolean())
    .map(([first, second, list, mixed]) => {
      const mode = MODES[first % 3]
      const fitting = list.filter((each) => mixed || each.mode === mode)
      return Buffer.concat([Buffer.from([first, second]), ...fitting.map(({ bytes }) => bytes)])
    }),
  // One payload at once, in a buffer of the next power of two, in each of two runs; and what is written down of it.
  allocationMax: (length) => 64 * 1024 + 2 * (4 * PAYLOAD_MAX + 8192 * (1 + length / 28) + 4 * length),
  check(input, random) {
    const rules = rulesOf(input)
    const stream = input.subarray(2)
    const whole = receiveRequests(rules, [stream])
    expectSame(whole, receiveRequests(rules, inPieces(stream, random)), 'whole and in pieces')
  },
}

// ----------------------------------------------------------------------------------------------- a server's replies

/** What the reply reader makes of a stream. Requests with cookies below 256 are reads of as many bytes. */
function receiveReplies(mode: ReplyMode, chunks: readonly Buffer[]): string[] {
  const events: string[] = []
  const targets: Buffer[] = []
  const target = (length: number) => {
    if (length > 1024) throw new ProtocolError('nobody asked for so much')
    const buffer = Buffer.alloc(length)
    targets.push(buffer)
    return buffer
  }
  const reader = new ReplyReader(mode, {
    onSimple: (cookie, errno) => {
      events.push(`simple ${cookie} ${errno}`)
      return errno === 0 && cookie < 256 ? target(cookie) : undefined
    },
    onData: (cookie, offset, length) => {
      events.push(`data ${cookie} ${offset} ${length}`)
      return target(length)
    },
    onHole: (cookie, offset, length) => {
      if (length <= 0) throw new Error('a hole of no bytes')
      events.push(`hole ${cookie} ${offset} ${length}`)
    },
    onError: (cookie, error) => {
      if (error.message.length > LIMITS.nbdStringMax) throw new Error('a message that is no string')
      events.push(`error ${cookie} ${JSON.stringify(error)}`)
    },
    onStatus: (cookie, { context, extents }) => {
      if (extents.length === 0 || extents.some(({ length }) => length <= 0))
        throw new Error('an empty extent')
      events.push(`status ${cookie} ${context} ${JSON.stringify(extents)}`)
    },
    onDone: (cookie) => events.push(`done ${cookie}`),
  })
  try {
    for (const chunk of chunks) reader.receive(chunk)
    events.push(reader.idle ? 'idle' : 'in the middle')
  } catch (error) {
    events.push(protocolMessage(error))
  }
  return [...events, ...targets.map((bytes) => bytes.toString('base64'))]
}

/** A reply of a server, by hand: encoders of ours refuse to write what is wrong. */
const reply = fc
  .record({
    magic: fc.constantFrom(0x67446698, 0x668e33ef, 0x668e33ef, 0x6e8a278c, 0x6e8a278c),
    flags: fc.constantFrom(0, 1, 1, 2),
    type: fc.oneof(fc.constantFrom(0, 1, 2, 5, 6, 0x8001, 0x8002), fc.nat(0xffff)),
    cookie: fc.oneof(fc.nat(255), fc.nat(2 ** 31 - 1)),
    errno: fc.constantFrom(0, 0, 5, 22),
    payload: bytesOf(80),
    lie: fc.constantFrom(0, 0, 0, 1, -1, 2 ** 24, 2 ** 31),
  })
  .map(({ magic, flags, type, cookie, errno, payload, lie }) => {
    const simple = magic === 0x67446698
    const header = Buffer.alloc(simple ? 16 : magic === 0x668e33ef ? 20 : 32)
    header.writeUInt32BE(magic, 0)
    header.writeUInt32BE(cookie, 12)
    if (simple) header.writeUInt32BE(errno, 4)
    else {
      header.writeUInt16BE(flags, 4)
      header.writeUInt16BE(type, 6)
      header.writeUInt32BE(Math.max(0, payload.length + lie), header.length - 4)
    }
    return Buffer.concat([header, payload])
  })

const replies: Target = {
  name: 'replies',
  inputMax: 4096,
  built: joined(
    fc
      .tuple(fc.nat(2), fc.array(reply, { maxLength: 6 }))
      .map(([mode, list]) => [Buffer.from([mode]), ...list]),
  ),
  // A status chunk is believed up to 16 MiB; a stream that ends in one has one such buffer in each run.
  allocationMax: (length) => 2 * (17 * 2 ** 20 + 2 ** 17 + 200 * length),
  check(input, random) {
    const mode = MODES[(input[0] ?? 0) % 3]!
    const stream = input.subarray(1)
    expectSame(
      receiveReplies(mode, [stream]),
      receiveReplies(mode, inPieces(stream, random)),
      'whole and in pieces',
    )
  },
}

// ------------------------------------------------------------------------------------------- a server's handshake

const HANDSHAKES = [
  () => openExport('disk', { mode: 'extended', contexts: ['base:allocation', 'x-none:at-all'] }),
  () => openExport('disk', { mode: 'structured', contexts: ['base:allocation'] }),
  () => openExport('disk', { mode: 'simple', contexts: [] }),
  () => describeExport('disk', { mode: 'extended', contexts: [] }),
  () => listExports(),
]

/** What a client says to a stream, and how it ends. */
function meetServer(which: number, chunks: readonly Buffer[]): { said: string; end: string } {
  const said: Buffer[] = []
  const steps = HANDSHAKES[which % HANDSHAKES.length]!()
  const run = new HandshakeRun<unknown>(steps, (bytes) => said.push(bytes))
  let end = 'waiting'
  for (const [index, chunk] of chunks.entries()) {
    try {
      const result = run.receive(chunk)
      if (result === undefined) continue
      const leftover = Buffer.concat([result.leftover, ...chunks.slice(index + 1)]).toString('hex')
      end = `${JSON.stringify(result.value)} ${leftover}`
    } catch (error) {
      end = error instanceof UserError ? `refused: ${error.message}` : protocolMessage(error)
    }
    break
  }
  if (end !== 'waiting') return { said: Buffer.concat(said).toString('hex'), end }
  return { said: Buffer.concat(said).toString('hex'), end }
}

const information = fc.oneof(
  fc.constantFrom(
    encodeInfoExport(2 ** 40, 0x1fff),
    encodeInfoBlockSize({ minimum: 1, preferred: 4096, maximum: 2 ** 25 }),
    encodeInfoText(INFO.NAME, 'disk'),
    encodeInfoText(INFO.DESCRIPTION, 'größe'),
    encodeMetaContext({ id: 7, name: 'base:allocation' }),
    encodeListedExport({ name: 'disk', description: 'words' }),
    Buffer.alloc(0),
  ),
  bytesOf(40),
)
const optionReply = fc
  .record({
    option: fc.constantFrom(
      OPTION.EXTENDED_HEADERS,
      OPTION.STRUCTURED_REPLY,
      OPTION.SET_META_CONTEXT,
      OPTION.GO,
      OPTION.INFO,
      OPTION.LIST,
      OPTION.ABORT,
    ),
    type: fc.oneof(fc.constantFrom(...Object.values(OPTION_REPLY)), word),
    data: information,
  })
  .map(({ option, type, data }) =>
    encodeOptionReply(option, type, type === OPTION_REPLY.ACK ? undefined : data),
  )

const serverHandshake: Target = {
  name: 'server-handshake',
  inputMax: 4096,
  built: joined(
    fc
      .tuple(
        fc.nat(HANDSHAKES.length - 1),
        fc.constantFrom(3, 3, 3, 1, 0, 2),
        fc.array(optionReply, { maxLength: 8 }),
        fc.boolean(),
      )
      .map(([which, flags, list, old]) => [
        Buffer.from([which]),
        encodeGreeting(flags),
        ...(old ? [encodeExportNameReply(2 ** 30, 1, flags !== 1)] : list),
      ]),
  ),
  allocationMax: (length) => 64 * 1024 + 200 * length,
  check(input, random) {
    const which = input[0] ?? 0
    const stream = input.subarray(1)
    expectSame(
      meetServer(which, [stream]),
      meetServer(which, inPieces(stream, random)),
      'whole and in pieces',
    )
  },
}

export const STREAM_TARGETS: readonly Target[] = [negotiation, requests, replies, serverHandshake]
