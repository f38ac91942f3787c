/** Commands that change or keep the content: WRITE, WRITE_ZEROES, TRIM, CACHE, FLUSH; on one connection and on several. */
import { CMD, FLAG } from '../../support/wire-client.ts'
import { applicable, type Check, expect, must, reading, writing } from '../check.ts'
import type { Context } from '../context.ts'
import { CAN } from '../handshake.ts'
import { patternAt, SCRATCH } from '../pattern.ts'
import {
  ERRNO,
  errnoName,
  errnoOf,
  expectErrno,
  expectOk,
  MODES,
  type Mode,
  orTheEnd,
  type Session,
  statusOf,
} from '../session.ts'
import { COMMANDS, over } from './requests.ts'

const REQUEST_TYPES = 'Request types'
const ERROR_VALUES = 'Error values'
const TRANSMISSION_FLAGS = 'Transmission flags'
const SIZES = 'Size constraints'
const COMMAND_FLAGS = 'Command flags'

const KiB = 1024
/** A range of several 64 KiB pieces, and what surrounds it. */
const BASE = 256 * KiB
const AREA = 192 * KiB

async function enterWritable(context: Context, mode: Mode, askBlockSize = true): Promise<Session> {
  context.needSize(2 ** 20)
  const session = await context.enter(mode, { askBlockSize })
  applicable(!session.can(CAN.READ_ONLY), 'the export is read-only')
  return session
}

/** Fills the area with a pattern that no other call makes; returns it. */
async function fillArea(session: Session): Promise<Buffer> {
  const data = patternAt(Number(process.hrtime.bigint() % 997n), AREA)
  await session.write(BASE, data)
  return data
}

async function expectArea(session: Session, expected: Buffer, what: string): Promise<void> {
  const found = await session.read(BASE, AREA)
  if (found.equals(expected)) return
  const at = found.findIndex((byte, index) => byte !== expected[index])
  expect(false, `${what}: byte ${BASE + at} is ${found[at]}, not ${expected[at]}`)
}

/** Ranges inside the area: whole pieces, parts, single blocks. */
const RANGES: readonly (readonly [number, number])[] = [
  [0, SCRATCH],
  [64 * KiB, 64 * KiB],
  [60 * KiB, 72 * KiB],
  [AREA - SCRATCH, SCRATCH],
]

const zeroFlags: readonly (readonly [string, number])[] = [
  ['plain', 0],
  ['no-hole', FLAG.NO_HOLE],
]

const writeChecks = MODES.flatMap((mode): Check[] => [
  writing(
    'must',
    `write.content@${mode}`,
    REQUEST_TYPES,
    `WRITE stores its payload there and nowhere else (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      for (const [offset, length] of RANGES) {
        const payload = patternAt(offset + length + 5, length)
        payload.copy(expected, offset)
        await session.write(BASE + offset, payload, session.can(CAN.FUA) ? FLAG.FUA : 0)
      }
      await expectArea(session, expected, 'after writes')
    },
  ),
  writing(
    'should',
    `write.odd@${mode}`,
    SIZES,
    `Where the minimum block size is 1 or is not told, any offset and length can be written (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      applicable((session.blockSize?.minimum ?? 1) === 1, 'the minimum block size is above 1')
      const expected = await fillArea(session)
      for (const [offset, length] of [
        [1, 1],
        [511, 2],
        [4095, 4098],
        [65535, 70001],
      ] as const) {
        const payload = patternAt(offset, length)
        payload.copy(expected, offset)
        await session.write(BASE + offset, payload)
      }
      await expectArea(session, expected, 'after odd writes')
    },
  ),
  writing(
    'must',
    `write.last-block@${mode}`,
    REQUEST_TYPES,
    `The last block of the export can be written (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      const length = session.blockSize?.minimum ?? 512
      const offset = session.size - BigInt(length)
      const payload = patternAt(77, length)
      await session.write(offset, payload)
      expect((await session.read(offset, length)).equals(payload), 'it does not read back')
    },
  ),
  writing(
    'must',
    `write.maximum@${mode}`,
    SIZES,
    `A write of the maximum payload succeeds (32 MiB where none is told) (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      const length = Math.min(session.blockSize?.maximum ?? 2 ** 25, 2 ** 25)
      applicable(session.size >= BigInt(length), `the export is smaller than ${length} bytes`)
      await session.write(0, Buffer.alloc(length, 0x77))
      const end = await session.read(length - SCRATCH, SCRATCH)
      expect(end.equals(Buffer.alloc(SCRATCH, 0x77)), 'its end does not read back')
    },
  ),
  writing(
    'must',
    `write.over-maximum@${mode}`,
    SIZES,
    `A write over the maximum payload is stored, gets an error and changes nothing, or ends the session (${mode})`,
    async (context) => {
      const told = (await enterWritable(context, mode)).blockSize?.maximum
      applicable(told !== undefined && told < 2 ** 26, 'no maximum payload, or a huge one, is told')
      const session = await enterWritable(context, mode, false)
      const length = told + SCRATCH
      applicable(session.size >= BigInt(length), `the export is smaller than ${length} bytes`)
      const before = patternAt(3, SCRATCH)
      await session.write(0, before)
      let errno: number | undefined
      await orTheEnd(session, async () => {
        errno = errnoOf(await session.ask({ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(length) }))
        await session.expectAlive('a write over the maximum')
      })
      const again = await enterWritable(context, mode)
      const found = await again.read(0, SCRATCH)
      if (errno === 0) expect(found.equals(Buffer.alloc(SCRATCH)), 'it succeeded and does not read back')
      else if (errno !== undefined) expect(found.equals(before), `it failed (${errnoName(errno)}) and wrote`)
    },
  ),
  writing(
    'should',
    `write.refused-payload@${mode}`,
    REQUEST_TYPES,
    `The payload of a write that is refused is skipped: the next request is understood (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      const payload = patternAt(9, 64 * KiB)
      const sent = [
        session.send({ command: CMD.WRITE, offset: session.size, payload }),
        session.send({ command: CMD.READ, offset: 0, length: SCRATCH }),
        session.send({ command: CMD.WRITE, offset: 0, payload, flags: FLAG.REQ_ONE }),
        session.send({ command: CMD.READ, offset: 0, length: SCRATCH }),
      ]
      const answers = await session.answers(sent)
      expect(errnoOf(answers[0]!) !== 0 && errnoOf(answers[2]!) !== 0, 'a wrong write succeeded')
      expectOk(answers[1]!, 'the read after it')
      expectOk(answers[3]!, 'the read after it')
    },
  ),

  ...zeroFlags.map(([name, flags]) =>
    writing(
      'must',
      `zeroes.${name}@${mode}`,
      flags === 0 ? REQUEST_TYPES : COMMAND_FLAGS,
      `WRITE_ZEROES${flags === 0 ? '' : ' with NO_HOLE'} makes its range read as zero, and nothing else (${mode})`,
      async (context) => {
        context.needFlag(mode, CAN.WRITE_ZEROES, 'SEND_WRITE_ZEROES')
        const session = await enterWritable(context, mode)
        const expected = await fillArea(session)
        for (const [offset, length] of RANGES) {
          expected.fill(0, offset, offset + length)
          const answer = await session.ask({ command: CMD.ZERO, offset: BASE + offset, length, flags })
          expectOk(answer, `WRITE_ZEROES of ${length} bytes`)
          await expectArea(session, expected, `after WRITE_ZEROES of ${length} bytes`)
        }
      },
    ),
  ),
  writing(
    'must',
    `zeroes.fast@${mode}`,
    REQUEST_TYPES,
    `WRITE_ZEROES with FAST_ZERO succeeds or gets ENOTSUP; without it, never ENOTSUP (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FAST_ZERO, 'SEND_FAST_ZERO')
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      for (const [offset, length] of RANGES) {
        for (const flags of [FLAG.FAST_ZERO, FLAG.FAST_ZERO | FLAG.NO_HOLE, FLAG.NO_HOLE, 0]) {
          const answer = await session.ask({ command: CMD.ZERO, offset: BASE + offset, length, flags })
          const allowed = (flags & FLAG.FAST_ZERO) === 0 ? [0] : [0, ERRNO.ENOTSUP]
          expectErrno(answer, `WRITE_ZEROES with flags ${flags}`, ...allowed)
          if (errnoOf(answer) === 0) expected.fill(0, offset, offset + length)
        }
      }
      await expectArea(session, expected, 'after WRITE_ZEROES')
    },
  ),
  writing(
    'should',
    `zeroes.fast-changes-nothing@${mode}`,
    REQUEST_TYPES,
    `WRITE_ZEROES with FAST_ZERO that gets ENOTSUP leaves the content alone (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FAST_ZERO, 'SEND_FAST_ZERO')
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      for (const [offset, length] of RANGES) {
        const flags = FLAG.FAST_ZERO | FLAG.NO_HOLE
        const answer = await session.ask({ command: CMD.ZERO, offset: BASE + offset, length, flags })
        if (errnoOf(answer) === 0) expected.fill(0, offset, offset + length)
      }
      await expectArea(session, expected, 'after fast zeroes')
    },
  ),
  writing(
    'should',
    `zeroes.fast-not-offered@${mode}`,
    REQUEST_TYPES,
    `WRITE_ZEROES with FAST_ZERO where the server did not offer it gets EINVAL (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.WRITE_ZEROES, 'SEND_WRITE_ZEROES')
      const session = await enterWritable(context, mode)
      applicable(!session.can(CAN.FAST_ZERO), 'the server offers FAST_ZERO')
      const answer = await session.ask({
        command: CMD.ZERO,
        offset: BASE,
        length: SCRATCH,
        flags: FLAG.FAST_ZERO,
      })
      expectErrno(answer, 'WRITE_ZEROES with FAST_ZERO', ERRNO.EINVAL)
    },
  ),
  ...(
    [
      ['zeroes', CMD.ZERO, CAN.WRITE_ZEROES, 'WRITE_ZEROES'],
      ['trim', CMD.TRIM, CAN.TRIM, 'TRIM'],
      ['cache', CMD.CACHE, CAN.CACHE, 'CACHE'],
    ] as const
  ).map(([id, command, flag, name]) =>
    (command === CMD.CACHE ? reading : writing)(
      'should',
      `${id}.whole-export@${mode}`,
      SIZES,
      `${name} may be longer than the maximum payload: it succeeds, or gets EOVERFLOW or EINVAL (${mode})`,
      async (context) => {
        context.needFlag(mode, flag, `the flag for ${name}`)
        const session = await context.enter(mode)
        applicable(command === CMD.CACHE || !session.can(CAN.READ_ONLY), 'the export is read-only')
        const length = session.size - (session.size % 65536n)
        applicable(length < 2n ** 32n, 'the export is larger than 4 GiB')
        const answer = await session.ask({ command, offset: 0, length })
        expectErrno(answer, `${name} of ${length} bytes`, 0, ERRNO.EOVERFLOW, ERRNO.EINVAL)
        await session.expectAlive(`a long ${name}`)
      },
    ),
  ),
  writing(
    'must',
    `trim.only-there@${mode}`,
    REQUEST_TYPES,
    `TRIM leaves what is outside of its range alone (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.TRIM, 'SEND_TRIM')
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      const [offset, length] = [60 * KiB, 72 * KiB]
      expectOk(await session.ask({ command: CMD.TRIM, offset: BASE + offset, length }), 'TRIM')
      // What is inside may be anything; reading it shows what.
      ;(await session.read(BASE + offset, length)).copy(expected, offset)
      await expectArea(session, expected, 'after TRIM')
      const payload = patternAt(1, length)
      await session.write(BASE + offset, payload)
      payload.copy(expected, offset)
      await expectArea(session, expected, 'after TRIM and a write over it')
    },
  ),
  writing(
    'must',
    `cache.changes-nothing@${mode}`,
    REQUEST_TYPES,
    `CACHE changes no content, whether it succeeds or not (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.CACHE, 'SEND_CACHE')
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      await session.ask({ command: CMD.CACHE, offset: BASE, length: AREA })
      await expectArea(session, expected, 'after CACHE')
    },
  ),
  reading(
    'must',
    `cache.unknown-flags@${mode}`,
    REQUEST_TYPES,
    `CACHE, where it is offered, is refused with flags that the server does not know (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.CACHE, 'SEND_CACHE')
      const session = await context.enter(mode)
      for (const bit of [6, 7, 9, 15]) {
        const answer = await session.ask({ command: CMD.CACHE, offset: 0, length: SCRATCH, flags: 1 << bit })
        expect(errnoOf(answer) !== 0, `CACHE with flag 0x${(1 << bit).toString(16)} succeeded`)
      }
    },
  ),
  reading(
    'must',
    `flush@${mode}`,
    REQUEST_TYPES,
    `FLUSH, where it is offered, succeeds (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FLUSH, 'SEND_FLUSH')
      const session = await context.enter(mode)
      expectOk(await session.ask({ command: CMD.FLUSH }), 'FLUSH')
    },
  ),
  writing(
    'must',
    `flush.in-flight@${mode}`,
    'Ordering of messages and writes',
    `FLUSH among writes in flight is answered, and so are they; what was written reads back (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FLUSH, 'SEND_FLUSH')
      const session = await enterWritable(context, mode)
      const expected = await fillArea(session)
      const sent = Array.from({ length: 48 }, (_, index) => {
        if (index % 6 === 5) return session.send({ command: CMD.FLUSH })
        const offset = index * SCRATCH
        const payload = patternAt(index + 400, SCRATCH)
        payload.copy(expected, offset)
        return session.send({ command: CMD.WRITE, offset: BASE + offset, payload })
      })
      for (const answer of await session.answers(sent)) expectOk(answer, 'a write or a flush')
      await expectArea(session, expected, 'after writes and flushes in flight')
    },
  ),
  writing(
    'must',
    `read-after-write@${mode}`,
    'Transmission',
    `A read sent after a write was answered sees it, also while other writes are in flight (${mode})`,
    async (context) => {
      const session = await enterWritable(context, mode)
      await fillArea(session)
      for (let round = 0; round < 20; round++) {
        const payload = patternAt(round, SCRATCH)
        const others = [1, 2, 3].map((n) =>
          session.send({ command: CMD.WRITE, offset: BASE + n * 64 * KiB - SCRATCH, payload }),
        )
        await session.write(BASE, payload)
        expect((await session.read(BASE, SCRATCH)).equals(payload), `round ${round} reads older data`)
        for (const answer of await session.answers(others)) expectOk(answer, 'a write')
      }
    },
  ),
])

// --------------------------------------------------------------------------------------------- two connections

async function multiConn(context: Context, mode: Mode): Promise<[Session, Session]> {
  context.needFlag(mode, CAN.MULTI_CONN, 'CAN_MULTI_CONN')
  return [await enterWritable(context, mode), await enterWritable(context, mode)]
}

const multiConnChecks = MODES.flatMap((mode): Check[] => [
  writing(
    'must',
    `multi-conn.flush@${mode}`,
    TRANSMISSION_FLAGS,
    `With CAN_MULTI_CONN, what one connection wrote and flushed is what another reads (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FLUSH, 'SEND_FLUSH')
      const [one, two] = await multiConn(context, mode)
      for (let round = 0; round < 10; round++) {
        const payload = patternAt(round * 3 + 1, 3 * SCRATCH)
        // The other one has just read it, and so may have kept it.
        await two.read(BASE, 3 * SCRATCH)
        await one.write(BASE, payload)
        expectOk(await one.ask({ command: CMD.FLUSH }), 'FLUSH')
        expect((await two.read(BASE, 3 * SCRATCH)).equals(payload), `round ${round} reads older data`)
      }
    },
  ),
  writing(
    'must',
    `multi-conn.fua@${mode}`,
    TRANSMISSION_FLAGS,
    `With CAN_MULTI_CONN, what one connection wrote with FUA is what another reads (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FUA, 'SEND_FUA')
      const [one, two] = await multiConn(context, mode)
      for (let round = 0; round < 10; round++) {
        const payload = patternAt(round * 5 + 2, 3 * SCRATCH)
        await two.read(BASE, 3 * SCRATCH)
        await one.write(BASE, payload, FLAG.FUA)
        expect((await two.read(BASE, 3 * SCRATCH)).equals(payload), `round ${round} reads older data`)
      }
    },
  ),
  writing(
    'must',
    `multi-conn.flush-elsewhere@${mode}`,
    TRANSMISSION_FLAGS,
    `With CAN_MULTI_CONN, a flush on one connection covers answered writes of another (${mode})`,
    async (context) => {
      context.needFlag(mode, CAN.FLUSH, 'SEND_FLUSH')
      const [one, two] = await multiConn(context, mode)
      const three = await enterWritable(context, mode)
      for (let round = 0; round < 10; round++) {
        const payload = patternAt(round * 7 + 3, SCRATCH)
        await one.write(BASE, payload)
        expectOk(await two.ask({ command: CMD.FLUSH }), 'FLUSH')
        expect((await three.read(BASE, SCRATCH)).equals(payload), `round ${round} reads older data`)
      }
    },
  ),
])

// --------------------------------------------------------------------------------------------- read-only exports

/** A session on an export that takes no writes. */
async function enterReadOnly(context: Context, mode: Mode): Promise<Session> {
  context.needMode(mode)
  if (context.target.readOnly === undefined) {
    const flags = context.facts.modes.get(mode)?.flags ?? 0
    applicable((flags & CAN.READ_ONLY) !== 0, 'the export is not read-only')
  }
  const session = await context.enter(mode, { readOnly: true })
  must(session.can(CAN.READ_ONLY), 'the read-only export does not set READ_ONLY')
  return session
}

// They try to write: whoever trusts the flag does not want that of a server which does not keep it.
const readOnlyChecks = MODES.flatMap((mode) =>
  COMMANDS.filter(({ writes }) => writes).flatMap((each): Check[] => {
    const id = each.name.toLowerCase()
    const offered = (session: Session) =>
      applicable(
        each.capability === 0 || session.can(each.capability),
        `the export does not offer ${each.name}`,
      )
    return [
      writing(
        'must',
        `read-only.${id}@${mode}`,
        TRANSMISSION_FLAGS,
        `${each.name} to a read-only export gets an error and changes nothing (${mode})`,
        async (context) => {
          const session = await enterReadOnly(context, mode)
          offered(session)
          const before = await session.read(0, SCRATCH)
          const errno = errnoOf(await session.ask(over(each, 0, SCRATCH)))
          expect(errno !== 0, `${each.name} succeeded`)
          expect((await session.read(0, SCRATCH)).equals(before), `${each.name} failed and wrote`)
        },
      ),
      writing(
        'should',
        `read-only-errno.${id}@${mode}`,
        ERROR_VALUES,
        `${each.name} to a read-only export gets EPERM (${mode})`,
        async (context) => {
          const session = await enterReadOnly(context, mode)
          offered(session)
          expectErrno(await session.ask(over(each, 0, SCRATCH)), each.name, ERRNO.EPERM)
          await session.expectAlive('a write')
        },
      ),
    ]
  }),
)

// ----------------------------------------------------------------------------------------------- provisioning

const provisionChecks: readonly Check[] = [
  // That NO_HOLE provisions is a MUST, that a status tells what is provisioned is not.
  writing(
    'should',
    'zeroes.no-hole-provisioned',
    COMMAND_FLAGS,
    'After WRITE_ZEROES with NO_HOLE the range is no hole in base:allocation',
    async (context) => {
      context.needContexts()
      applicable(context.facts.contexts.includes('base:allocation'), 'there is no base:allocation')
      context.needFlag('structured', CAN.WRITE_ZEROES, 'SEND_WRITE_ZEROES')
      await enterWritable(context, 'structured')
      const session = await context.enter('structured', { contexts: ['base:allocation'] })
      const [offset, length] = [BASE, 64 * KiB]
      expectOk(await session.ask({ command: CMD.ZERO, offset, length }), 'WRITE_ZEROES')
      const answer = await session.ask({ command: CMD.ZERO, offset, length, flags: FLAG.NO_HOLE })
      expectOk(answer, 'WRITE_ZEROES with NO_HOLE')
      const status = await session.ask({ command: CMD.STATUS, offset, length, flags: FLAG.REQ_ONE })
      expectOk(status, 'BLOCK_STATUS')
      const extent = statusOf(status)[0]?.extents[0]
      must(extent !== undefined, 'BLOCK_STATUS has no extent')
      expect((extent.flags & 1n) === 0n, 'it is a hole')
    },
  ),
]

export const writingChecks: readonly Check[] = [
  ...writeChecks,
  ...multiConnChecks,
  ...readOnlyChecks,
  ...provisionChecks,
]
