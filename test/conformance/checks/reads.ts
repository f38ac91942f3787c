/** READ, and the rules of chunks: each rule is held against every answer of a traffic of many kinds. */
import { CMD, type EncodableRequest, FLAG } from '../../support/wire-client.ts'
import { applicable, type Check, expect, type Level, reading, writing } from '../check.ts'
import type { Context } from '../context.ts'
import { CAN, isString } from '../handshake.ts'
import { patternAt, SCRATCH } from '../pattern.ts'
import {
  type Answer,
  CHUNK,
  CHUNK_MODES,
  contentChunks,
  contentOf,
  ERRNO,
  errnoName,
  errnoOf,
  expectErrno,
  expectOk,
  isContent,
  isErrorChunk,
  MODES,
  type Mode,
  orTheEnd,
  type Session,
} from '../session.ts'

const CHUNK_TYPES = 'Structured reply types'
const CHUNK_MESSAGE = 'Structured reply chunk message'
const CHUNK_FLAGS = 'Structured reply flags'
const REQUEST_TYPES = 'Request types'
const SIZES = 'Size constraints'
const SIMPLE = 'Simple reply message'

const KiB = 1024
/** Where the traffic happens: data, zeroes, data, trimmed; 64 KiB each. */
const REGION = 256 * KiB

/** Lays data and holes next to each other, as far as the server can make holes. */
async function layOut(session: Session): Promise<Buffer> {
  const expected = Buffer.alloc(REGION)
  for (const offset of [0, 128 * KiB]) {
    const data = patternAt(offset / KiB, 64 * KiB)
    data.copy(expected, offset)
    await session.write(offset, data)
  }
  for (const offset of [64 * KiB, 192 * KiB]) {
    if (session.can(CAN.WRITE_ZEROES)) {
      expectOk(await session.ask({ command: CMD.ZERO, offset, length: 64 * KiB }), 'WRITE_ZEROES')
    } else {
      await session.write(offset, Buffer.alloc(64 * KiB))
    }
  }
  return expected
}

/** Reads that touch data, holes, both, edges and ends. */
const READS: readonly (readonly [number, number])[] = [
  [0, SCRATCH],
  [0, REGION],
  [32 * KiB, 64 * KiB],
  [60 * KiB, 8 * KiB],
  [64 * KiB, 64 * KiB],
  [68 * KiB, 16 * KiB],
  [96 * KiB, 160 * KiB],
  [512, 512],
  [60 * KiB + 512, 190 * KiB + 1024],
]

interface Traffic {
  readonly answers: readonly Answer[]
  readonly session: Session
}

/** Requests of every kind, each answered; the content is laid out first where writing is allowed. */
async function traffic(context: Context, mode: Mode): Promise<Traffic> {
  context.needSize(2 ** 20)
  const contexts = mode === 'simple' ? [] : context.facts.contexts
  const session = await context.enter(mode, contexts.length > 0 ? { contexts } : {})
  const maySet = context.mayWrite && !session.can(CAN.READ_ONLY)
  if (maySet) await layOut(session)
  const requests: EncodableRequest[] = READS.map(([offset, length]) => ({
    command: CMD.READ,
    offset,
    length,
  }))
  if (session.can(CAN.DF)) {
    for (const [offset, length] of READS) requests.push({ command: CMD.READ, flags: FLAG.DF, offset, length })
  }
  const tail = Number(session.size % 65536n) || 65536
  requests.push(
    { command: CMD.READ, offset: session.size - BigInt(tail), length: tail },
    { command: CMD.READ, offset: session.size, length: SCRATCH },
    { command: CMD.READ, offset: 0, length: SCRATCH, flags: FLAG.NO_HOLE },
    { command: 42, offset: 0, length: SCRATCH },
  )
  if (contexts.length > 0) {
    requests.push(
      { command: CMD.STATUS, offset: 0, length: REGION },
      { command: CMD.STATUS, offset: SCRATCH, length: SCRATCH, flags: FLAG.REQ_ONE },
      { command: CMD.STATUS, offset: session.size, length: SCRATCH },
    )
  }
  if (session.can(CAN.CACHE)) requests.push({ command: CMD.CACHE, offset: 0, length: REGION })
  if (session.can(CAN.FLUSH)) requests.push({ command: CMD.FLUSH })
  if (maySet) {
    requests.push(
      { command: CMD.WRITE, offset: 0, payload: patternAt(0, SCRATCH) },
      { command: CMD.WRITE, offset: session.size, payload: patternAt(0, SCRATCH) },
    )
    if (session.can(CAN.TRIM)) requests.push({ command: CMD.TRIM, offset: 192 * KiB, length: 64 * KiB })
    if (session.can(CAN.WRITE_ZEROES)) {
      requests.push({ command: CMD.ZERO, offset: 64 * KiB, length: 64 * KiB, flags: FLAG.NO_HOLE })
    }
  }
  const answers: Answer[] = []
  for (const request of requests) answers.push(await session.ask(request))
  return { answers, session }
}

/** A rule about every answer of the traffic. Traffic reads what is there where writing is not allowed. */
function replyRule(
  level: Level,
  id: string,
  section: string,
  rule: string,
  holds: (answer: Answer, session: Session) => void,
): Check[] {
  return CHUNK_MODES.map((mode) =>
    reading(level, `${id}@${mode}`, section, `${rule} (${mode})`, async (context) => {
      const { answers, session } = await traffic(context, mode)
      for (const answer of answers) holds(answer, session)
    }),
  )
}

const isRead = (answer: Answer) => answer.request.command === CMD.READ
const describe = ({ request }: Answer) =>
  `command ${request.command} of ${request.length} at ${request.offset}`

const chunkRules: readonly Check[] = [
  ...replyRule(
    'must',
    'chunk.done-last',
    CHUNK_MESSAGE,
    'The last chunk of a reply has DONE, and only the last',
    ({ chunks }) => {
      const done = chunks.map(({ flags }) => flags & 1)
      const last = done.lastIndexOf(1)
      expect(
        chunks.length === 0 || (last === chunks.length - 1 && done.indexOf(1) === last),
        `DONE in ${done}`,
      )
    },
  ),
  ...replyRule('must', 'chunk.flags', CHUNK_FLAGS, 'Chunks have no flags but DONE', ({ chunks }) => {
    for (const { flags } of chunks) expect((flags & ~1) === 0, `the flags are 0x${flags.toString(16)}`)
  }),
  ...replyRule(
    'must',
    'chunk.types',
    CHUNK_TYPES,
    'Replies hold only chunks of types that are valid for their command and mode',
    (answer, session) => {
      const { command } = answer.request
      const allowed: number[] = [CHUNK.NONE, CHUNK.ERROR]
      if (command === CMD.READ) allowed.push(CHUNK.DATA, CHUNK.HOLE)
      if (command === CMD.STATUS) allowed.push(session.mode === 'extended' ? CHUNK.STATUS_EXT : CHUNK.STATUS)
      if (command !== CMD.FLUSH && command <= CMD.STATUS) allowed.push(CHUNK.ERROR_OFFSET)
      for (const { type } of answer.chunks) {
        expect(allowed.includes(type), `${describe(answer)} got a chunk of type ${type}`)
      }
    },
  ),
  ...replyRule(
    'must',
    'chunk.none',
    CHUNK_TYPES,
    'A NONE chunk has no payload and has DONE',
    ({ chunks }) => {
      for (const { type, flags, payload } of chunks) {
        if (type === CHUNK.NONE) expect(payload.length === 0 && (flags & 1) === 1, 'a NONE chunk is wrong')
      }
    },
  ),
  ...replyRule(
    'must',
    'chunk.data-length',
    CHUNK_TYPES,
    'A data chunk has an offset and at least one byte',
    ({ chunks }) => {
      for (const { type, payload } of chunks) {
        if (type === CHUNK.DATA) expect(payload.length >= 9, `a data chunk has ${payload.length} bytes`)
      }
    },
  ),
  ...replyRule(
    'must',
    'chunk.hole-length',
    CHUNK_TYPES,
    'A hole chunk has 12 bytes and tells of at least one byte',
    ({ chunks }) => {
      for (const { type, payload } of chunks) {
        if (type !== CHUNK.HOLE) continue
        expect(payload.length === 12, `a hole chunk has ${payload.length} bytes`)
        expect(payload.readUInt32BE(8) > 0, 'a hole of no bytes')
      }
    },
  ),
  ...replyRule(
    'must',
    'chunk.bounds',
    CHUNK_TYPES,
    'Content chunks lie within the range that was asked for',
    (answer) => {
      const { offset, length } = answer.request
      for (const chunk of contentChunks(answer)) {
        const inside = chunk.offset >= offset && chunk.offset + chunk.length <= offset + length
        expect(inside, `${describe(answer)}: a chunk of ${chunk.length} bytes at ${chunk.offset}`)
      }
    },
  ),
  ...replyRule('must', 'chunk.no-overlap', CHUNK_TYPES, 'Content chunks do not overlap', (answer) => {
    const sorted = contentChunks(answer).sort((a, b) => (a.offset < b.offset ? -1 : 1))
    for (const [index, chunk] of sorted.entries()) {
      const next = sorted[index + 1]
      if (next === undefined) continue
      const apart = chunk.offset + chunk.length <= next.offset
      expect(
        apart,
        `${describe(answer)}: ${chunk.kind} at ${chunk.offset} and ${next.kind} at ${next.offset}`,
      )
    }
  }),
  ...replyRule(
    'must',
    'chunk.complete',
    REQUEST_TYPES,
    'The chunks of a read that succeeded describe all of it',
    (answer) => {
      if (!isRead(answer) || errnoOf(answer) !== 0) return
      const total = contentChunks(answer).reduce((sum, { length }) => sum + length, 0n)
      expect(total === answer.request.length, `${describe(answer)}: chunks of ${total} bytes`)
    },
  ),
  ...replyRule(
    'must',
    'chunk.read-kind',
    CHUNK_MESSAGE,
    'A read is never answered with a simple reply, not even an invalid one',
    (answer) => {
      expect(!isRead(answer) || answer.simple === undefined, `${describe(answer)} got a simple reply`)
    },
  ),
  ...replyRule(
    'must',
    'chunk.error',
    CHUNK_TYPES,
    'An error chunk has an error that is not 0, and a message that fits and is a string',
    (answer) => {
      for (const { type, payload } of answer.chunks.filter(isErrorChunk)) {
        const fixed = type === CHUNK.ERROR_OFFSET ? 14 : 6
        expect(payload.length >= fixed, `an error chunk has ${payload.length} bytes`)
        expect(payload.readUInt32BE(0) !== 0, 'its error is 0')
        const length = payload.readUInt16BE(4)
        expect(length <= payload.length - fixed, `its message has ${length} bytes`)
        expect(isString(payload.subarray(6, 6 + length)), 'its message is no string')
      }
    },
  ),
  ...replyRule(
    'should',
    'chunk.one-error',
    CHUNK_TYPES,
    'A reply has at most one chunk of type ERROR',
    (answer) => {
      const errors = answer.chunks.filter(({ type }) => type === CHUNK.ERROR)
      expect(errors.length <= 1, `${describe(answer)} got ${errors.length}`)
    },
  ),
  ...replyRule(
    'must',
    'chunk.error-offset',
    CHUNK_TYPES,
    'The offset of an error lies within the range that was asked for',
    (answer) => {
      const { offset, length } = answer.request
      for (const { type, payload } of answer.chunks) {
        if (type !== CHUNK.ERROR_OFFSET) continue
        const at = payload.readBigUInt64BE(6 + payload.readUInt16BE(4))
        expect(at >= offset && at < offset + length, `${describe(answer)}: an error at ${at}`)
      }
    },
  ),
  ...replyRule(
    'must',
    'chunk.maximum',
    CHUNK_TYPES,
    'What a chunk carries is not longer than the maximum payload that was advertised',
    (answer, session) => {
      const maximum = session.blockSize?.maximum ?? Number.POSITIVE_INFINITY
      for (const chunk of contentChunks(answer)) {
        expect(chunk.data.length <= maximum, `a chunk of ${chunk.data.length} bytes`)
      }
    },
  ),
  ...replyRule(
    'should',
    'chunk.aligned',
    REQUEST_TYPES,
    'Inner edges of content chunks lie at multiples of 512',
    (answer) => {
      const { offset, length } = answer.request
      for (const chunk of contentChunks(answer)) {
        for (const edge of [chunk.offset, chunk.offset + chunk.length]) {
          const outer = edge === offset || edge === offset + length
          expect(outer || edge % 512n === 0n, `${describe(answer)}: an edge at ${edge}`)
        }
      }
    },
  ),
  ...replyRule(
    'must',
    'df.one-chunk',
    REQUEST_TYPES,
    'A read with DF gets at most one content chunk',
    (answer) => {
      if (!isRead(answer) || (answer.request.flags & FLAG.DF) === 0) return
      const count = answer.chunks.filter(isContent).length
      expect(count <= 1, `${describe(answer)} got ${count}`)
    },
  ),
  ...replyRule(
    'should',
    'chunk.error-kind',
    CHUNK_MESSAGE,
    'Errors are told by chunks, where a message has room, rather than by simple replies',
    (answer) => {
      expect((answer.simple?.errno ?? 0) === 0, `${describe(answer)} got a simple reply with an error`)
    },
  ),
  reading(
    'must',
    'chunk.repeated-offset@extended',
    'Extended reply chunk message',
    'Extended chunks repeat the offset of the request, whatever it was (extension)',
    async (context) => {
      const { answers, session } = await traffic(context, 'extended')
      const strange: Answer[] = []
      for (const offset of [2n ** 63n, 2n ** 64n - 1n]) {
        strange.push(await session.ask({ command: 42, offset, length: 1 }))
      }
      for (const answer of [...answers, ...strange]) {
        for (const { repeatedOffset } of answer.chunks) {
          expect(repeatedOffset === answer.request.offset, `${describe(answer)} got ${repeatedOffset}`)
        }
      }
    },
  ),
]

const readChecks = MODES.flatMap((mode): Check[] => [
  writing(
    'must',
    `read.content@${mode}`,
    REQUEST_TYPES,
    `READ returns what was written, over data and holes alike (${mode})`,
    async (context) => {
      context.needSize(2 ** 20)
      const session = await context.enter(mode)
      applicable(!session.can(CAN.READ_ONLY), 'the export is read-only')
      const expected = await layOut(session)
      for (const [offset, length] of READS) {
        for (const flags of session.can(CAN.DF) ? [0, FLAG.DF] : [0]) {
          const answer = await session.ask({ command: CMD.READ, offset, length, flags })
          const tooLong = flags === FLAG.DF && length > 65536 && errnoOf(answer) === ERRNO.EOVERFLOW
          if (tooLong) continue
          const right = contentOf(answer).equals(expected.subarray(offset, offset + length))
          expect(right, `the read of ${length} bytes at ${offset} is wrong`)
        }
      }
    },
  ),
  reading(
    'must',
    `read.last-byte@${mode}`,
    REQUEST_TYPES,
    `The last block of the export can be read (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const length = session.blockSize?.minimum ?? 512
      contentOf(await session.ask({ command: CMD.READ, offset: session.size - BigInt(length), length }))
    },
  ),
  reading(
    'should',
    `read.odd@${mode}`,
    SIZES,
    `Where the minimum block size is 1 or is not told, any offset and length can be read (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      applicable((session.blockSize?.minimum ?? 1) === 1, 'the minimum block size is above 1')
      const whole = await session.read(0, 3 * SCRATCH)
      for (const [offset, length] of [
        [0, 1],
        [4095, 2],
        [1, 511],
        [4097, 4093],
      ] as const) {
        const part = await session.read(offset, length)
        const same = part.equals(whole.subarray(offset, offset + length))
        expect(same, `${length} bytes at ${offset} differ from the same bytes of a larger read`)
      }
    },
  ),
  reading(
    'must',
    `read.maximum@${mode}`,
    SIZES,
    `A read of the maximum payload succeeds (32 MiB where none is told) (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const maximum = session.blockSize?.maximum ?? 2 ** 25
      const length = Math.min(maximum, 2 ** 25)
      applicable(session.size >= BigInt(length), `the export is smaller than ${length} bytes`)
      contentOf(await session.ask({ command: CMD.READ, offset: 0, length }))
    },
  ),
  reading(
    'must',
    `read.over-maximum@${mode}`,
    SIZES,
    `A read over the maximum payload is answered: with all of it, with an error, or by ending the session (${mode})`,
    async (context) => {
      const session = await context.enter(mode, { askBlockSize: false })
      const maximum = (await context.enter(mode)).blockSize?.maximum
      applicable(maximum !== undefined && maximum < 2 ** 27, 'no maximum payload, or a huge one, is told')
      const length = maximum + 65536
      applicable(session.size >= BigInt(length), `the export is smaller than ${length} bytes`)
      await orTheEnd(session, async () => {
        const answer = await session.ask({ command: CMD.READ, offset: 0, length })
        if (errnoOf(answer) === 0) contentOf(answer)
        await session.expectAlive('a read over the maximum')
      })
    },
  ),
])

const dfChecks = CHUNK_MODES.flatMap((mode): Check[] => [
  reading(
    'must',
    `df.64k@${mode}`,
    REQUEST_TYPES,
    `A read of up to 64 KiB with DF succeeds (${mode})`,
    async (context) => {
      context.needSize(2 ** 20)
      context.needFlag(mode, CAN.DF, 'SEND_DF')
      const session = await context.enter(mode)
      for (const [offset, length] of [
        [0, 65536],
        [32 * KiB, 65536],
        [60 * KiB, SCRATCH],
      ] as const) {
        contentOf(await session.ask({ command: CMD.READ, flags: FLAG.DF, offset, length }))
      }
    },
  ),
  reading(
    'must',
    `df.long@${mode}`,
    REQUEST_TYPES,
    `A longer read with DF succeeds in one chunk, or gets EOVERFLOW and no content (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.DF, 'SEND_DF')
      const session = await context.enter(mode)
      const length = Math.min(session.blockSize?.maximum ?? 2 ** 25, 2 ** 23)
      applicable(session.size >= BigInt(length), `the export is smaller than ${length} bytes`)
      const answer = await session.ask({ command: CMD.READ, flags: FLAG.DF, offset: 0, length })
      const errno = errnoOf(answer)
      const count = answer.chunks.filter(isContent).length
      if (errno === 0) expect(count === 1, `${count} content chunks`)
      else expect(errno === ERRNO.EOVERFLOW && count === 0, `${errnoName(errno)}, ${count} content chunks`)
    },
  ),
  reading(
    'should',
    `df.not-offered@${mode}`,
    'Error values',
    `READ with DF where the server did not offer it gets EINVAL (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      applicable(!session.can(CAN.DF), 'the server offers DF')
      const answer = await session.ask({ command: CMD.READ, flags: FLAG.DF, offset: 0, length: SCRATCH })
      expectErrno(answer, 'READ with DF', ERRNO.EINVAL)
    },
  ),
])

const simpleChecks: readonly Check[] = [
  reading(
    'must',
    'simple.errors-have-no-data',
    SIMPLE,
    'A simple reply with an error has no data: the next reply follows directly',
    async (context) => {
      const session = await context.enter('simple')
      const sent = [0, 1, 2, 3].map((index) =>
        session.send(
          index % 2 === 0
            ? { command: CMD.READ, offset: session.size, length: SCRATCH }
            : { command: CMD.READ, offset: 0, length: SCRATCH },
        ),
      )
      const answers = await session.answers(sent)
      expect(errnoOf(answers[1]!) === 0 && errnoOf(answers[3]!) === 0, 'good reads between bad ones fail')
    },
  ),
  reading(
    'must',
    'simple.only',
    SIMPLE,
    'Where chunks were not negotiated, every reply is a simple one',
    async (context) => {
      // Chunks have another magic, which is a breach where replies are read.
      const { answers } = await traffic(context, 'simple')
      for (const answer of answers) expect(answer.simple !== undefined, `${describe(answer)} got chunks`)
    },
  ),
]

export const readingChecks: readonly Check[] = [...readChecks, ...chunkRules, ...dfChecks, ...simpleChecks]
