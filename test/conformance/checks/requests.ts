/** What holds for requests of every command: framing, cookies, what is refused and how, and the end. */
import { CMD, type EncodableRequest, encodeRequest, FLAG } from '../../support/wire-client.ts'
import { applicable, type Check, expect, must, reading, writing } from '../check.ts'
import type { Context } from '../context.ts'
import { CAN } from '../handshake.ts'
import { patternAt, SCRATCH } from '../pattern.ts'
import {
  contentOf,
  ERRNO,
  errnoName,
  errnoOf,
  expectErrno,
  expectOk,
  MODES,
  type Mode,
  orTheEnd,
  type Session,
} from '../session.ts'

const TRANSMISSION = 'Transmission'
const TERMINATING = 'Terminating the transmission phase'
const COMMAND_FLAGS = 'Command flags'
const REQUEST_TYPES = 'Request types'
const ERROR_VALUES = 'Error values'
const SIZES = 'Size constraints'

const NAMES = ['READ', 'WRITE', 'DISC', 'FLUSH', 'TRIM', 'CACHE', 'WRITE_ZEROES', 'BLOCK_STATUS'] as const

interface Command {
  readonly command: number
  readonly name: string
  readonly capability: number // transmission flag that offers it; 0: always there
  readonly writes: boolean
  readonly hasRange: boolean
  readonly flags: number // that may be set, FUA aside
}
const command = (
  id: number,
  capability: number,
  writes: boolean,
  flags: number,
  hasRange = true,
): Command => ({
  command: id,
  name: NAMES[id]!,
  capability,
  writes,
  hasRange,
  flags,
})
/** All commands that are answered. */
export const COMMANDS: readonly Command[] = [
  command(CMD.READ, 0, false, FLAG.DF),
  command(CMD.WRITE, 0, true, FLAG.PAYLOAD_LEN),
  command(CMD.FLUSH, CAN.FLUSH, false, 0, false),
  command(CMD.TRIM, CAN.TRIM, true, 0),
  command(CMD.CACHE, CAN.CACHE, false, 0),
  command(CMD.ZERO, CAN.WRITE_ZEROES, true, FLAG.NO_HOLE | FLAG.FAST_ZERO),
  command(CMD.STATUS, 0, false, FLAG.REQ_ONE | FLAG.PAYLOAD_LEN),
]

/** The check writes where its command does. */
const about = (each: Command) => (each.writes ? writing : reading)

/** A session in which the command can be used. */
async function sessionFor(context: Context, mode: Mode, each: Command): Promise<Session> {
  if (each.capability !== 0) context.needFlag(mode, each.capability, `the flag for ${each.name}`)
  if (each.command !== CMD.STATUS) return await context.enter(mode)
  applicable(mode !== 'simple', 'BLOCK_STATUS needs replies with chunks')
  context.needMode(mode)
  return await context.enter(mode, { contexts: context.needContexts() })
}

/** A request of the command over that range; a write brings its payload. */
export function over(each: Command, offset: number | bigint, length: number, flags = 0): EncodableRequest {
  const { command } = each
  if (!each.hasRange) return { command, flags }
  if (command === CMD.WRITE)
    return { command, flags, offset, payload: patternAt(Number(offset) % 4096, length) }
  return { command, flags, offset, length }
}

/** Bits that `each` has no use for. FAST_ZERO and PAYLOAD_LEN have rules of their own. */
function strangeFlags(each: Command, mode: Mode): number[] {
  const known = [FLAG.NO_HOLE, FLAG.DF, FLAG.REQ_ONE, FLAG.FAST_ZERO]
  const unknown = [6, 7, 8, 15].map((bit) => 1 << bit)
  const compact = mode === 'extended' ? [] : [FLAG.PAYLOAD_LEN]
  const payload = each.flags & ~FLAG.PAYLOAD_LEN
  return [...known.filter((flag) => (payload & flag) === 0), ...compact, ...unknown]
}

const flagChecks = MODES.flatMap((mode) =>
  COMMANDS.flatMap((each): Check[] => {
    if (mode === 'simple' && each.command === CMD.STATUS) return []
    const id = each.name.toLowerCase()
    return [
      about(each)(
        'must',
        `fua.${id}@${mode}`,
        COMMAND_FLAGS,
        `${each.name} is accepted with FUA where the server offers it (${mode})`,
        async (context) => {
          context.needFlag(mode, CAN.FUA, 'SEND_FUA')
          const session = await sessionFor(context, mode, each)
          applicable(!(each.writes && session.can(CAN.READ_ONLY)), 'the export is read-only')
          const plain = errnoOf(await session.ask(over(each, 0, SCRATCH)))
          const answer = await session.ask(over(each, 0, SCRATCH, FLAG.FUA))
          const errno = errnoOf(answer)
          expect(errno === plain, `with FUA: ${errnoName(errno)}, without: ${errnoName(plain)}`)
        },
      ),
      about(each)(
        'should',
        `flags.${id}@${mode}`,
        ERROR_VALUES,
        `${each.name} with a flag that is unknown, or of another command, gets EINVAL (${mode})`,
        async (context) => {
          const session = await sessionFor(context, mode, each)
          applicable(!(each.writes && session.can(CAN.READ_ONLY)), 'the export is read-only')
          for (const flag of strangeFlags(each, mode)) {
            const answer = await session.ask(over(each, 0, SCRATCH, flag))
            expectErrno(answer, `${each.name} with flag 0x${flag.toString(16)}`, ERRNO.EINVAL)
          }
          await session.expectAlive('requests with wrong flags')
        },
      ),
    ]
  }),
)

/** Ranges that end beyond the export, by one block at least. */
function outside({ size, blockSize }: Session): [bigint, number][] {
  const block = blockSize?.minimum ?? 1
  return [
    [size, block],
    [size - BigInt(block), 2 * block],
    [size, SCRATCH],
    [size - BigInt(SCRATCH), 2 * SCRATCH],
    [size - (size % 4096n) + 4096n * 1024n, SCRATCH],
    [2n ** 62n, SCRATCH],
    [2n ** 64n - BigInt(SCRATCH), SCRATCH], // offset + length is 2^64
    [2n ** 64n - BigInt(SCRATCH), 2 * SCRATCH], // ... and beyond
  ]
}

const beyond = (each: Command, mode: Mode) =>
  about(each)(
    'must',
    `beyond.${each.name.toLowerCase()}@${mode}`,
    REQUEST_TYPES,
    `${each.name} beyond the end of the export does not succeed, and other requests are not harmed (${mode})`,
    async (context) => {
      const session = await sessionFor(context, mode, each)
      for (const [offset, length] of outside(session)) {
        const errno = errnoOf(await session.ask(over(each, offset, length)))
        expect(errno !== 0, `${each.name} of ${length} bytes at ${offset} succeeded`)
      }
      await session.expectAlive('requests beyond the end')
    },
  )

const rangeChecks = MODES.flatMap((mode) =>
  COMMANDS.filter(({ hasRange }) => hasRange).flatMap((each): Check[] => {
    if (mode === 'simple' && each.command === CMD.STATUS) return []
    const id = each.name.toLowerCase()
    const full = each.command === CMD.WRITE || each.command === CMD.ZERO
    const wanted = full ? ERRNO.ENOSPC : ERRNO.EINVAL
    // TRIM, CACHE and BLOCK_STATUS are free to be vague about a range; these three cannot do what is asked.
    const impossible = each.command === CMD.READ || full
    return [
      ...(impossible ? [beyond(each, mode)] : []),
      about(each)(
        'should',
        `beyond-errno.${id}@${mode}`,
        ERROR_VALUES,
        `${each.name} beyond the end of the export gets ${errnoName(wanted)} (${mode})`,
        async (context) => {
          const session = await sessionFor(context, mode, each)
          applicable(!(each.writes && session.can(CAN.READ_ONLY)), 'the export is read-only')
          for (const [offset, length] of outside(session)) {
            const answer = await session.ask(over(each, offset, length))
            expectErrno(answer, `${each.name} of ${length} bytes at ${offset}`, wanted)
          }
          await session.expectAlive('requests beyond the end')
        },
      ),
      about(each)(
        'should',
        `empty.${id}@${mode}`,
        REQUEST_TYPES,
        `${each.name} of no bytes is answered, somehow; the session does not end (${mode})`,
        async (context) => {
          const session = await sessionFor(context, mode, each)
          for (const offset of [0n, session.size, 2n ** 63n]) {
            await session.ask({ command: each.command, offset, length: 0 }, (bytes) => {
              if (mode === 'extended') bytes.writeUInt16BE(bytes.readUInt16BE(4) & ~FLAG.PAYLOAD_LEN, 4)
            })
          }
          await session.expectAlive('requests of no bytes')
        },
      ),
      about(each)(
        'should',
        `unaligned.${id}@${mode}`,
        SIZES,
        `${each.name} that is not aligned to the minimum block size gets EINVAL (${mode})`,
        async (context) => {
          const session = await sessionFor(context, mode, each)
          const minimum = session.blockSize?.minimum ?? 1
          applicable(minimum > 1, 'the minimum block size is 1')
          for (const [offset, length] of [
            [1, minimum],
            [0, minimum + 1],
          ] as const) {
            const answer = await session.ask(over(each, offset, length))
            expectErrno(answer, `${each.name} of ${length} bytes at ${offset}`, ERRNO.EINVAL)
          }
          await session.expectAlive('unaligned requests')
        },
      ),
    ]
  }),
)

const UNKNOWN_COMMANDS = [9, 42, 0x7fff, 0xffff]

const generalChecks = MODES.flatMap((mode): Check[] => [
  reading(
    'should',
    `unknown-command@${mode}`,
    ERROR_VALUES,
    `A command that nobody has defined gets EINVAL, and the session goes on (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      for (const each of UNKNOWN_COMMANDS) {
        const answer = await session.ask({ command: each, offset: 0, length: SCRATCH })
        expectErrno(answer, `command ${each}`, ERRNO.EINVAL)
      }
      await session.expectAlive('unknown commands')
    },
  ),
  reading(
    'must',
    `cookie.echo@${mode}`,
    TRANSMISSION,
    `Each reply repeats the cookie of its request, whatever its 64 bits (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const cookies = [0n, 1n, 2n ** 32n, 2n ** 53n + 1n, 2n ** 63n, 2n ** 64n - 1n, 0x67446698_668e33efn]
      for (const cookie of cookies) {
        await session.ask({ command: CMD.READ, offset: 0, length: SCRATCH, cookie })
        await session.ask({ command: 42, cookie })
      }
    },
  ),
  reading(
    'must',
    `cookie.reuse@${mode}`,
    TRANSMISSION,
    `A cookie may be used again once its request was answered (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      for (let round = 0; round < 20; round++) {
        const answer = await session.ask({
          command: CMD.READ,
          offset: 512 * round,
          length: SCRATCH,
          cookie: 7n,
        })
        expectOk(answer, 'a read')
      }
    },
  ),
  reading(
    'must',
    `interleaved@${mode}`,
    TRANSMISSION,
    `Requests in flight together are each answered once, in any order, with what each asked for (${mode})`,
    async (context) => {
      context.needSize(2 ** 20)
      const session = await context.enter(mode)
      const requests = Array.from({ length: 64 }, (_, index): EncodableRequest => {
        if (index % 8 === 7) return { command: 42 } // answered with an error
        if (index % 8 === 3) return { command: CMD.READ, offset: session.size, length: SCRATCH }
        return { command: CMD.READ, offset: 8192 * index, length: SCRATCH * (1 + (index % 5)) }
      })
      const prepared = requests.map((request) => session.prepare(request))
      session.wire.send(Buffer.concat(prepared.map(({ bytes }) => bytes)))
      const together = await session.answers(prepared.map(({ sent }) => sent))
      for (const [index, answer] of together.entries()) {
        const alone = await session.ask(requests[index]!)
        const errno = errnoOf(answer)
        const expected = errnoOf(alone)
        expect(errno === expected, `request ${index}: ${errnoName(errno)}, alone ${errnoName(expected)}`)
        if (errno === 0) {
          expect(contentOf(answer).equals(contentOf(alone)), `request ${index} has other data than alone`)
        }
      }
    },
  ),
  reading(
    'must',
    `fragmented@${mode}`,
    'Request message',
    `A request means the same when its bytes arrive one by one, and several when they arrive at once (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const one = session.prepare({ command: CMD.READ, offset: 512, length: SCRATCH })
      for (const byte of one.bytes) {
        session.wire.send(Buffer.from([byte]))
        await new Promise((resolve) => setImmediate(resolve))
      }
      const pieces = contentOf(await session.answer(one.sent))
      const more = [0, 1, 2].map(() => session.prepare({ command: CMD.READ, offset: 512, length: SCRATCH }))
      session.wire.send(Buffer.concat(more.map(({ bytes }) => bytes)))
      for (const answer of await session.answers(more.map(({ sent }) => sent))) {
        expect(contentOf(answer).equals(pieces), 'the same read has other data')
      }
    },
  ),
  reading(
    'should',
    `bad-magic@${mode}`,
    TERMINATING,
    `A request with another magic is not executed: the session ends, or the request gets an error (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      session.over = true
      const { sent, bytes } = session.prepare({ command: CMD.READ, offset: 0, length: SCRATCH }, (header) => {
        header.writeUInt32BE(0x12560953, 0) // of a Linux long ago
      })
      session.wire.send(bytes)
      await orTheEnd(session, async () => {
        const answer = await session.answer(sent)
        expect(errnoOf(answer) !== 0, 'it was executed')
      })
    },
  ),
  reading(
    'must',
    `disc.closes@${mode}`,
    TERMINATING,
    `After DISC the server closes the connection and sends no reply to it (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      await session.expectAlive('GO')
      await session.disconnect()
    },
  ),
  reading(
    'must',
    `disc.at-once@${mode}`,
    TERMINATING,
    `DISC may be the first request (${mode})`,
    async (context) => {
      await (await context.enter(mode)).disconnect()
    },
  ),
  writing(
    'must',
    `disc.handles-requests@${mode}`,
    REQUEST_TYPES,
    `Requests outstanding when DISC comes are handled: answered, or done; what succeeded is there (${mode})`,
    async (context) => {
      context.needSize(2 ** 20)
      const session = await context.enter(mode)
      applicable(!session.can(CAN.READ_ONLY), 'the export is read-only')
      const seed = Number(process.hrtime.bigint() % 250n)
      const writes = Array.from({ length: 16 }, (_, index) => {
        const payload = patternAt(seed + index, SCRATCH)
        const offset = 65536 + index * SCRATCH
        return { offset, payload, ...session.prepare({ command: CMD.WRITE, offset, payload }) }
      })
      session.over = true
      session.wire.send(
        Buffer.concat([...writes.map(({ bytes }) => bytes), encodeRequest({ command: CMD.DISC }, mode)]),
      )
      await orTheEnd(session, async () => {
        await session.answers(writes.map(({ sent }) => sent))
        await session.wire.readToEnd('the end of the connection after DISC')
      })
      const again = await context.enter(mode)
      for (const { offset, payload, sent } of writes) {
        const answer = session.soFar(sent)
        const answered = answer.simple !== undefined || answer.chunks.length > 0
        if (answered && errnoOf(answer) !== 0) continue
        const found = (await again.read(offset, SCRATCH)).equals(payload)
        expect(
          found,
          `the write at ${offset} ${answered ? 'succeeded' : 'was not answered'} and is not there`,
        )
      }
    },
  ),
  reading(
    'must',
    `error-values@${mode}`,
    ERROR_VALUES,
    `Errors are of the eight values that the specification lists (${mode})`,
    async (context) => {
      const session = await context.enter(mode)
      const known: readonly number[] = Object.values(ERRNO)
      const wrong: EncodableRequest[] = [
        { command: 42 },
        { command: CMD.READ, offset: session.size, length: SCRATCH },
        { command: CMD.READ, offset: 0, length: SCRATCH, flags: FLAG.NO_HOLE },
        { command: CMD.STATUS, offset: 0, length: SCRATCH },
        { command: CMD.READ, offset: 0, length: 0 },
      ]
      for (const request of wrong) {
        const errno = errnoOf(await session.ask(request))
        expect(errno === 0 || known.includes(errno), `command ${request.command} got error ${errno}`)
      }
    },
  ),
  reading(
    'should',
    `hang-up@${mode}`,
    TERMINATING,
    `A client that hangs up in the middle of a request harms no other connection (${mode})`,
    async (context) => {
      const other = await context.enter(mode)
      for (const length of [1, 4, 27, 28]) {
        const session = await context.enter(mode)
        session.over = true
        const { bytes } = session.prepare({ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(4096) })
        // No payload: without it nothing may be written.
        session.wire.send(bytes.subarray(0, length))
        await session.wire.drained()
        session.wire.destroy()
      }
      await other.expectAlive('clients that hung up')
      await (await context.enter(mode)).expectAlive('clients that hung up')
    },
  ),
])

const statusInSimple: readonly Check[] = [
  reading(
    'should',
    'status.in-simple-mode',
    'Metadata querying',
    'BLOCK_STATUS without a selected context gets EINVAL (simple)',
    async (context) => {
      const session = await context.enter('simple')
      const answer = await session.ask({ command: CMD.STATUS, offset: 0, length: SCRATCH })
      expectErrno(answer, 'BLOCK_STATUS', ERRNO.EINVAL)
      await session.expectAlive('BLOCK_STATUS')
    },
  ),
  reading(
    'should',
    'flags.df-in-simple-mode',
    ERROR_VALUES,
    'READ with DF where the server did not offer it gets EINVAL (simple)',
    async (context) => {
      const session = await context.enter('simple')
      must(!session.can(CAN.DF), 'SEND_DF is set although replies have no chunks')
      const answer = await session.ask({ command: CMD.READ, offset: 0, length: SCRATCH, flags: FLAG.DF })
      expectErrno(answer, 'READ with DF', ERRNO.EINVAL)
      await session.expectAlive('READ with DF')
    },
  ),
]

export const requestChecks: readonly Check[] = [
  ...flagChecks,
  ...rangeChecks,
  ...generalChecks,
  ...statusInSimple,
]
