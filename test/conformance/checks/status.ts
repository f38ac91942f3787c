/** BLOCK_STATUS, with both framings. */
import { CMD, FLAG } from '../../support/wire-client.ts'
import { applicable, type Check, expect, type Level, must, reading, writing } from '../check.ts'
import type { Context } from '../context.ts'
import { CAN } from '../handshake.ts'
import { patternAt, SCRATCH } from '../pattern.ts'
import {
  type Answer,
  CHUNK_MODES,
  ERRNO,
  type Extent,
  errnoOf,
  expectErrno,
  expectOk,
  type Mode,
  type Session,
  type Status,
  statusOf,
} from '../session.ts'

const CHUNK_TYPES = 'Structured reply types'
const REQUEST_TYPES = 'Request types'
const ALLOCATION = 'base:allocation metadata context'
const KiB = 1024
const HOLE = 1n
const ZERO = 2n

/** A session with every context, and some variety in the first 256 KiB where writing is allowed. */
async function enterWithContexts(context: Context, mode: Mode): Promise<Session> {
  context.needMode(mode)
  context.needSize(2 ** 20)
  const session = await context.enter(mode, { contexts: context.needContexts() })
  if (!context.mayWrite || session.can(CAN.READ_ONLY)) return session
  for (const offset of [0, 128 * KiB]) await session.write(offset, patternAt(offset / KiB, 64 * KiB))
  if (session.can(CAN.WRITE_ZEROES)) {
    for (const offset of [64 * KiB, 192 * KiB]) {
      expectOk(await session.ask({ command: CMD.ZERO, offset, length: 64 * KiB }), 'WRITE_ZEROES')
    }
  }
  return session
}

const ASKED: readonly (readonly [number, number])[] = [
  [0, 256 * KiB],
  [0, SCRATCH],
  [60 * KiB, 8 * KiB],
  [64 * KiB, 64 * KiB],
  [512, 100 * KiB],
  [0, 2 ** 20],
]

/** Queries of all kinds. */
async function traffic(session: Session): Promise<Answer[]> {
  const answers: Answer[] = []
  for (const [offset, length] of ASKED) {
    for (const flags of [0, FLAG.REQ_ONE]) {
      answers.push(await session.ask({ command: CMD.STATUS, flags, offset, length }))
    }
  }
  const tail = session.size % 65536n || 65536n
  answers.push(await session.ask({ command: CMD.STATUS, offset: session.size - tail, length: tail }))
  for (const answer of answers) expectOk(answer, 'BLOCK_STATUS')
  return answers
}

const describe = ({ request }: Answer) => `${request.length} bytes at ${request.offset}`
const total = (extents: readonly Extent[]) => extents.reduce((sum, { length }) => sum + length, 0n)

function statusRule(
  level: Level,
  id: string,
  section: string,
  rule: string,
  holds: (statuses: readonly Status[], answer: Answer, session: Session) => void,
): Check[] {
  return CHUNK_MODES.map((mode) =>
    reading(level, `status.${id}@${mode}`, section, `${rule} (${mode})`, async (context) => {
      const session = await enterWithContexts(context, mode)
      for (const answer of await traffic(session)) holds(statusOf(answer), answer, session)
    }),
  )
}

const statusRules: readonly Check[] = [
  ...statusRule(
    'must',
    'one-chunk-each',
    REQUEST_TYPES,
    'BLOCK_STATUS that succeeds has exactly one status chunk for each selected context',
    (statuses, answer, session) => {
      const got = statuses.map(({ context }) => context).sort()
      const wanted = [...session.contexts.keys()].sort()
      expect(
        got.join() === wanted.join(),
        `${describe(answer)}: contexts ${got.join()}, not ${wanted.join()}`,
      )
    },
  ),
  ...statusRule(
    'must',
    'lengths',
    CHUNK_TYPES,
    'Each status chunk has at least one extent, and no extent is empty',
    (statuses, answer) => {
      for (const { extents } of statuses) {
        const good = extents.length > 0 && extents.every(({ length }) => length > 0n)
        expect(good, `${describe(answer)}: lengths ${extents.map(({ length }) => length).join()}`)
      }
    },
  ),
  ...statusRule(
    'must',
    'within-request',
    CHUNK_TYPES,
    'All extents but the last lie within the range that was asked for',
    (statuses, answer) => {
      for (const { extents } of statuses) {
        const inner = total(extents.slice(0, -1))
        const fits = extents.length === 1 || inner < answer.request.length
        expect(fits, `${describe(answer)}: all but the last are ${inner} bytes`)
      }
    },
  ),
  ...statusRule(
    'must',
    'request-one',
    CHUNK_TYPES,
    'With REQ_ONE each chunk has one extent, not longer than what was asked for',
    (statuses, answer) => {
      if ((answer.request.flags & FLAG.REQ_ONE) === 0) return
      for (const { extents } of statuses) {
        expect(extents.length === 1, `${describe(answer)}: ${extents.length} extents`)
        expect(total(extents) <= answer.request.length, `${describe(answer)}: ${total(extents)} bytes`)
      }
    },
  ),
  ...statusRule(
    'must',
    'within-export',
    REQUEST_TYPES,
    'Extents are portions of the export: none reaches beyond its end',
    (statuses, answer, session) => {
      for (const { extents } of statuses) {
        const end = answer.request.offset + total(extents)
        expect(end <= session.size, `${describe(answer)}: up to ${end} of ${session.size}`)
      }
    },
  ),
  ...statusRule(
    'should',
    'different-neighbours',
    REQUEST_TYPES,
    'Neighbouring extents have different flags',
    (statuses, answer) => {
      for (const { extents } of statuses) {
        for (const [index, extent] of extents.slice(1).entries()) {
          const before = extents[index]!
          const long = before.length >= 2n ** 32n - 65536n // a 32-bit length may end before the run does
          expect(
            long || before.flags !== extent.flags,
            `${describe(answer)}: extent ${index + 1} repeats flags`,
          )
        }
      }
    },
  ),
  ...statusRule(
    'should',
    'aligned',
    REQUEST_TYPES,
    'The lengths of inner extents are multiples of 512',
    (statuses, answer) => {
      for (const { extents } of statuses) {
        let edge = answer.request.offset
        for (const { length } of extents.slice(0, -1)) {
          edge += length
          expect(edge % 512n === 0n, `${describe(answer)}: an edge at ${edge}`)
        }
      }
    },
  ),
  ...statusRule(
    'should',
    'base-flags',
    ALLOCATION,
    'base:allocation has no flags but HOLE and ZERO',
    (statuses, _answer, session) => {
      for (const { context, extents } of statuses) {
        if (session.contexts.get(context) !== 'base:allocation') continue
        for (const { flags } of extents) expect((flags & ~3n) === 0n, `the flags are 0x${flags.toString(16)}`)
      }
    },
  ),
  ...statusRule('should', 'count', CHUNK_TYPES, 'A status chunk has at most 2^20 extents', (statuses) => {
    for (const { extents } of statuses) expect(extents.length <= 2 ** 20, `it has ${extents.length}`)
  }),
]

const byMode = CHUNK_MODES.flatMap((mode): Check[] => [
  reading(
    'must',
    `status.zero-is-zero@${mode}`,
    ALLOCATION,
    `What base:allocation says is zero reads as zero (${mode})`,
    async (context) => {
      const session = await enterWithContexts(context, mode)
      const id = [...session.contexts].find(([, name]) => name === 'base:allocation')?.[0]
      applicable(id !== undefined, 'there is no base:allocation')
      const length = 2 ** 20
      const content = await session.read(0, length)
      const answer = await session.ask({ command: CMD.STATUS, offset: 0, length })
      expectOk(answer, 'BLOCK_STATUS')
      let at = 0
      for (const extent of statusOf(answer).find((each) => each.context === id)?.extents ?? []) {
        const end = Math.min(at + Number(extent.length), length)
        const zero = content.subarray(at, end).every((byte) => byte === 0)
        expect((extent.flags & ZERO) === 0n || zero, `${at} to ${end} has data and is said to be zero`)
        at = end
      }
    },
  ),
  writing(
    'must',
    `status.written@${mode}`,
    ALLOCATION,
    `What was written is not said to be zero, and not to be a hole (${mode})`,
    async (context) => {
      const session = await enterWithContexts(context, mode)
      applicable(!session.can(CAN.READ_ONLY), 'the export is read-only')
      const id = [...session.contexts].find(([, name]) => name === 'base:allocation')?.[0]
      applicable(id !== undefined, 'there is no base:allocation')
      await session.write(512 * KiB, patternAt(8, 64 * KiB))
      const answer = await session.ask({
        command: CMD.STATUS,
        offset: 512 * KiB,
        length: 64 * KiB,
        flags: FLAG.REQ_ONE,
      })
      expectOk(answer, 'BLOCK_STATUS')
      const extent = statusOf(answer).find((each) => each.context === id)?.extents[0]
      must(extent !== undefined, 'BLOCK_STATUS has no extent')
      expect((extent.flags & (ZERO | HOLE)) === 0n, `its flags are ${extent.flags}`)
    },
  ),
  reading(
    'must',
    `status.progress@${mode}`,
    REQUEST_TYPES,
    `Asking on from where the last answer ended, a client gets through the whole export (${mode})`,
    async (context) => {
      const session = await enterWithContexts(context, mode)
      for (const [id] of session.contexts) {
        let at = 0n
        for (let rounds = 0; at < session.size && rounds < 5000; rounds++) {
          const rest = session.size - at
          const length = rest > 2n ** 30n ? 2n ** 30n : rest
          const answer = await session.ask({ command: CMD.STATUS, offset: at, length })
          expectOk(answer, 'BLOCK_STATUS')
          const status = statusOf(answer).find((each) => each.context === id)
          must(status !== undefined && total(status.extents) > 0n, `no progress at ${at}`)
          at += total(status.extents)
        }
      }
    },
  ),
  reading(
    'should',
    `status.no-context@${mode}`,
    'Metadata querying',
    `BLOCK_STATUS without a selected context gets EINVAL (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const answer = await session.ask({ command: CMD.STATUS, offset: 0, length: SCRATCH })
      expectErrno(answer, 'BLOCK_STATUS', ERRNO.EINVAL)
      await session.expectAlive('BLOCK_STATUS')
    },
  ),
])

// --------------------------------------------------------------------------------------- extended headers only

/** The payload of a filter: the length of the range, then ids. */
function filter(length: bigint, ids: readonly number[], extraBytes = 0): Buffer {
  const payload = Buffer.alloc(8 + 4 * ids.length + extraBytes)
  payload.writeBigUInt64BE(length, 0)
  ids.forEach((id, index) => {
    payload.writeUInt32BE(id, 8 + 4 * index)
  })
  return payload
}

async function enterWithFilters(context: Context): Promise<Session> {
  context.needMode('extended')
  const session = await enterWithContexts(context, 'extended')
  applicable(session.can(CAN.BLOCK_STATUS_PAYLOAD), 'the server does not set BLOCK_STATUS_PAYLOAD')
  return session
}

const EXTENDED_REQUEST = 'Request message (extension)'

const extendedChecks: readonly Check[] = [
  reading(
    'must',
    'status.descriptor-count@extended',
    CHUNK_TYPES,
    'An extended status chunk counts its extents rightly (extension)',
    async (context) => {
      const session = await enterWithContexts(context, 'extended')
      for (const answer of await traffic(session)) {
        for (const { count, extents } of statusOf(answer)) {
          expect(count === extents.length, `it counts ${count}, there are ${extents.length}`)
        }
      }
    },
  ),
  reading(
    'must',
    'status.high-bits@extended',
    CHUNK_TYPES,
    'Extended status flags of contexts in base: use only their lower 32 bits (extension)',
    async (context) => {
      const session = await enterWithContexts(context, 'extended')
      for (const answer of await traffic(session)) {
        for (const status of statusOf(answer)) {
          if (!session.contexts.get(status.context)?.startsWith('base:')) continue
          expect(
            status.extents.every(({ flags }) => flags < 2n ** 32n),
            'a flag is above bit 31',
          )
        }
      }
    },
  ),
  reading(
    'must',
    'status.filter@extended',
    REQUEST_TYPES,
    'BLOCK_STATUS with a filter tells of the contexts in it and of no others (extension)',
    async (context) => {
      const session = await enterWithFilters(context)
      const ids = [...session.contexts.keys()]
      for (const chosen of [[ids[0]!], [ids.at(-1)!], ids, [...ids].reverse()]) {
        const payload = filter(65536n, chosen)
        const answer = await session.ask({ command: CMD.STATUS, offset: 0, payload })
        expectOk(answer, 'BLOCK_STATUS with a filter')
        const got = statusOf(answer).map((status) => status.context)
        expect(
          got.sort().join() === [...chosen].sort().join(),
          `asked for ${chosen.join()}, got ${got.join()}`,
        )
      }
    },
  ),
  ...(
    [
      [
        'unknown',
        'an unknown context',
        (ids: readonly number[]) => filter(65536n, [...ids.slice(1), 0xdeadbeef]),
      ],
      ['twice', 'a context twice', (ids: readonly number[]) => filter(65536n, [ids[0]!, ids[0]!])],
      ['short', 'a payload of 4 bytes', () => Buffer.alloc(4)],
      ['uneven', 'a payload of uneven length', (ids: readonly number[]) => filter(65536n, ids, 3)],
    ] as const
  ).map(([id, what, payload]) =>
    reading(
      'must',
      `status.filter-${id}@extended`,
      REQUEST_TYPES,
      `BLOCK_STATUS with a filter that has ${what} is read whole and gets EINVAL (extension)`,
      async (context) => {
        const session = await enterWithFilters(context)
        const bad = payload([...session.contexts.keys()])
        expectErrno(
          await session.ask({ command: CMD.STATUS, offset: 0, payload: bad }),
          'BLOCK_STATUS',
          ERRNO.EINVAL,
        )
        await session.expectAlive('a bad filter')
      },
    ),
  ),
  reading(
    'should',
    'payload.unexpected@extended',
    EXTENDED_REQUEST,
    'A payload that a command has no use for is read, and the command gets EINVAL (extension)',
    async (context) => {
      context.needMode('extended')
      const session = await context.enter('extended')
      for (const command of [CMD.READ, CMD.FLUSH, CMD.CACHE, CMD.STATUS, 42]) {
        for (const length of [1, SCRATCH, 65536]) {
          const answer = await session.ask({ command, offset: 0, payload: patternAt(length, length) })
          expectErrno(answer, `command ${command} with ${length} bytes`, ERRNO.EINVAL)
        }
      }
      await session.expectAlive('payloads that nobody expected')
    },
  ),
  reading(
    'should',
    'payload.over-maximum@extended',
    EXTENDED_REQUEST,
    'A payload over the maximum ends the session (extension)',
    async (context) => {
      context.needMode('extended')
      const session = await context.enter('extended')
      const length = BigInt(session.blockSize?.maximum ?? 2 ** 25) + 1n
      session.over = true
      session.send({ command: CMD.READ, flags: FLAG.PAYLOAD_LEN, offset: 0, length })
      await session.wire.readToEnd('the end of the session')
    },
  ),
  reading(
    'should',
    'payload.huge@extended',
    EXTENDED_REQUEST,
    'A payload of 2^63 bytes ends the session (extension)',
    async (context) => {
      context.needMode('extended')
      const session = await context.enter('extended')
      session.over = true
      session.send({ command: CMD.WRITE, flags: FLAG.PAYLOAD_LEN, offset: 0, length: 2n ** 63n })
      await session.wire.readToEnd('the end of the session')
    },
  ),
  writing(
    'should',
    'payload.missing@extended',
    'Command flags (extension)',
    'A write without PAYLOAD_LEN has no payload, gets EINVAL and writes nothing (extension)',
    async (context) => {
      context.needMode('extended')
      const session = await context.enter('extended')
      applicable(!session.can(CAN.READ_ONLY), 'the export is read-only')
      const before = await session.read(0, SCRATCH)
      const answer = await session.ask({ command: CMD.WRITE, offset: 0, length: SCRATCH })
      expectErrno(answer, 'WRITE without a payload', ERRNO.EINVAL)
      expect((await session.read(0, SCRATCH)).equals(before), 'something was written')
    },
  ),
  ...[CMD.READ, CMD.TRIM, CMD.CACHE, CMD.ZERO, CMD.STATUS].map((command) =>
    (command === CMD.TRIM || command === CMD.ZERO ? writing : reading)(
      'must',
      `wide.command-${command}@extended`,
      'Request message (extension)',
      `Lengths above 32 bits are understood, not cut: command ${command} of 2^32 + 4096 bytes is beyond the end (extension)`,
      async (context) => {
        context.needMode('extended')
        const contexts = command === CMD.STATUS ? context.needContexts() : []
        const session = await context.enter('extended', contexts.length > 0 ? { contexts } : {})
        applicable(session.size < 2n ** 32n, 'the export is larger than 4 GiB')
        applicable(command !== CMD.TRIM || session.can(CAN.TRIM), 'the server does not offer TRIM')
        applicable(command !== CMD.CACHE || session.can(CAN.CACHE), 'the server does not offer CACHE')
        const answer = await session.ask({ command, offset: 0, length: 2n ** 32n + 4096n })
        expect(errnoOf(answer) !== 0, 'it succeeded')
        await session.expectAlive('a wide request')
      },
    ),
  ),
]

export const statusChecks: readonly Check[] = [...statusRules, ...byMode, ...extendedChecks]
