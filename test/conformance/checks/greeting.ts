/** The first bytes of both sides, and how options are framed whatever they are. */
import { applicable, type Check, expect, must, reading } from '../check.ts'
import type { Context } from '../context.ts'
import {
  CLIENT,
  exportRequest,
  FIXED_NO_ZEROES,
  Handshake,
  isError,
  isString,
  namesOf,
  OPT,
  optionBytes,
  REP,
  replyName,
} from '../handshake.ts'

const NEWSTYLE = 'Newstyle negotiation'
const HANDSHAKE_FLAGS = 'Handshake flags'
const CLIENT_FLAGS = 'Client flags'
const FIXED = 'Fixed newstyle negotiation'
const BASELINE = 'Baseline'
const TERMINATION = 'Termination of the session during option haggling'
const OPTION_TYPES = 'Option types'
const REPLY_TYPES = 'Option reply types'
const NOTLS = 'NOTLS mode'

/** An option nobody has assigned, with this much data, is refused and the next one is understood. */
async function skipsUnknown(context: Context, option: number, length: number): Promise<void> {
  const handshake = await context.greet()
  const reply = await handshake.only(option, Buffer.alloc(length, 0x5a))
  expect(
    reply.type === REP.ERR_UNSUP,
    `option ${option} was answered with ${replyName(reply.type)}, not ERR_UNSUP`,
  )
  await expectHaggling(handshake, 'an unknown option')
}

/** The server still takes options: LIST gets an answer, if only an error. Servers may refuse to answer it twice. */
export async function expectHaggling(handshake: Handshake, after: string): Promise<void> {
  const last = (await handshake.option(OPT.LIST)).at(-1)!
  expect(last.type === REP.ACK || isError(last), `after ${after}, LIST got ${replyName(last.type)}`)
}

/** The connection ends and nothing is said. */
async function expectDropped(handshake: Handshake, because: string): Promise<void> {
  handshake.send(OPT.ABORT)
  const said = await handshake.wire.readToEnd(`the end of the connection after ${because}`)
  expect(said.length === 0, `after ${because} the server still answers`)
}

export const greetingChecks: readonly Check[] = [
  reading(
    'must',
    'greeting.magic',
    NEWSTYLE,
    'The server speaks first: NBDMAGIC, then IHAVEOPT, then 16 bits of flags',
    async (context) => {
      const { init, magic } = await new Handshake(await context.open()).greeting()
      expect(init.toString('latin1') === 'NBDMAGIC', `the first word is ${init.toString('hex')}`)
      expect(magic.toString('latin1') === 'IHAVEOPT', `the second word is ${magic.toString('hex')}`)
    },
  ),
  reading(
    'must',
    'greeting.length',
    NEWSTYLE,
    'The greeting is 18 bytes; then the server waits for the client',
    async (context) => {
      // The reply to LIST follows directly; its magic is checked where replies are read.
      await expectHaggling(await context.greet(), 'the greeting')
    },
  ),
  reading(
    'must',
    'greeting.fixed-newstyle',
    HANDSHAKE_FLAGS,
    'FIXED_NEWSTYLE is set: the fixed newstyle handshake is part of the baseline',
    async (context) => {
      const { flags } = await new Handshake(await context.open()).greeting()
      expect((flags & CLIENT.FIXED_NEWSTYLE) !== 0, `the handshake flags are ${flags}`)
    },
  ),
  reading(
    'must',
    'greeting.no-other-flags',
    HANDSHAKE_FLAGS,
    'No handshake flags are set but FIXED_NEWSTYLE and NO_ZEROES',
    async (context) => {
      const { flags } = await new Handshake(await context.open()).greeting()
      expect((flags & ~3) === 0, `the handshake flags are 0x${flags.toString(16)}`)
    },
  ),
  ...[2, 3, 16, 31].map((bit) =>
    reading(
      'must',
      `client-flags.unknown-bit-${bit}`,
      CLIENT_FLAGS,
      `The server drops a client that sets client flag bit ${bit}, which nobody has defined`,
      async (context) => {
        const handshake = await context.greet((FIXED_NO_ZEROES | (2 ** bit)) >>> 0)
        await expectDropped(handshake, 'an unknown client flag')
      },
    ),
  ),
  reading(
    'must',
    'client-flags.unoffered',
    CLIENT_FLAGS,
    'The server drops a client that sets NO_ZEROES where the server did not',
    async (context) => {
      const handshake = new Handshake(await context.open())
      const { flags } = await handshake.greeting()
      applicable((flags & CLIENT.NO_ZEROES) === 0, 'the server offers NO_ZEROES')
      handshake.clientFlags(FIXED_NO_ZEROES)
      await expectDropped(handshake, 'a flag that was not offered')
    },
  ),
  reading(
    'must',
    'client-flags.only-fixed',
    CLIENT_FLAGS,
    'A client may leave NO_ZEROES out; options work all the same',
    async (context) => {
      await expectHaggling(await context.greet(CLIENT.FIXED_NEWSTYLE), 'flags without NO_ZEROES')
    },
  ),
  ...[0, 1, 4096].map((length) =>
    reading(
      'must',
      `option.unknown-${length}`,
      BASELINE,
      `An unknown option with ${length} bytes of data gets ERR_UNSUP, and the next option is parsed`,
      (context) => skipsUnknown(context, 0x40, length),
    ),
  ),
  ...[
    ['peek-export', OPT.PEEK_EXPORT],
    ['zero', 0],
    ['high', 0xffffffff],
  ].map(([name, option]) =>
    reading(
      'must',
      `option.unknown-${name}`,
      BASELINE,
      `Option ${option}, which is nobody's, gets ERR_UNSUP, and the next option is parsed`,
      (context) => skipsUnknown(context, Number(option), 5),
    ),
  ),
  reading(
    'must',
    'option.many',
    FIXED,
    'A client may send several options before it chooses an export',
    async (context) => {
      const handshake = await context.greet()
      for (let round = 0; round < 4; round++) {
        must((await handshake.option(OPT.LIST)).length > 0, 'LIST has no reply')
        await handshake.option(OPT.INFO, exportRequest(context.exportName))
        await handshake.only(0x41, Buffer.from('again'))
      }
      await expectHaggling(handshake, '12 options')
    },
  ),
  reading(
    'must',
    'option.fragmented',
    FIXED,
    'An option means the same when its bytes arrive one by one',
    async (context) => {
      const handshake = await context.greet()
      for (const byte of optionBytes(OPT.INFO, exportRequest(context.exportName))) {
        handshake.wire.send(Buffer.from([byte]))
        await new Promise((resolve) => setImmediate(resolve))
      }
      const replies = await handshake.replies(OPT.INFO)
      expect(replies.at(-1)?.type === REP.ACK, `INFO in pieces was answered with ${namesOf(replies)}`)
      await expectHaggling(handshake, 'an option in pieces')
    },
  ),
  reading(
    'must',
    'option.error-text',
    REPLY_TYPES,
    'Data in an error reply is a string for people: UTF-8, no NUL, at most 4096 bytes',
    async (context) => {
      const handshake = await context.greet()
      const refused = [
        await handshake.only(0x42),
        (await handshake.option(OPT.INFO, exportRequest('no-such-export-6f1d2c'))).at(-1)!,
      ].filter(isError)
      for (const { data } of refused) expect(isString(data), `the message is ${data.toString('hex')}`)
    },
  ),
  reading('must', 'option.ack-without-data', REPLY_TYPES, 'ACK carries no data', async (context) => {
    const handshake = await context.greet()
    const replies = [
      ...(await handshake.option(OPT.LIST)),
      ...(await handshake.option(OPT.INFO, exportRequest(context.exportName))),
      ...(await handshake.option(OPT.STRUCTURED_REPLY)),
    ]
    for (const { type, data } of replies) {
      if (type === REP.ACK) expect(data.length === 0, `an ACK has ${data.length} bytes`)
    }
  }),
  reading(
    'must',
    'option.errors-then-go',
    OPTION_TYPES,
    'After an error a client may go on with further options, and at last with GO',
    async (context) => {
      const handshake = await context.greet()
      applicable(!context.facts.anyName, 'every export name exists')
      const failed = await handshake.option(OPT.GO, exportRequest('no-such-export-6f1d2c'))
      expect(isError(failed.at(-1)!), 'GO to an export that does not exist succeeded')
      await handshake.only(0x43)
      const session = await context.go(handshake, 'simple')
      await session.expectAlive('options that failed')
    },
  ),
  reading(
    'should',
    'option.bad-magic',
    TERMINATION,
    'Where an option has another magic, the server ends the session; it cannot know where the next one starts',
    async (context) => {
      const handshake = await context.greet()
      const bytes = optionBytes(OPT.LIST)
      bytes.writeUInt8(0x58, 0)
      handshake.wire.send(bytes)
      const said = await handshake.wire.readToEnd('the end of the session')
      expect(said.length === 0 || said.readUInt32BE(12) >= 0x80000000, 'the option was executed')
    },
  ),

  reading('must', 'abort.ack', OPTION_TYPES, 'ABORT gets ACK', async (context) => {
    const reply = await (await context.greet()).only(OPT.ABORT)
    expect(reply.type === REP.ACK, `ABORT was answered with ${replyName(reply.type)}`)
  }),
  reading('should', 'abort.data', OPTION_TYPES, 'Data sent with ABORT is ignored', async (context) => {
    const reply = await (await context.greet()).only(OPT.ABORT, Buffer.from('so long'))
    expect(reply.type === REP.ACK, `ABORT with data was answered with ${replyName(reply.type)}`)
  }),
  reading(
    'should',
    'abort.no-wait',
    OPTION_TYPES,
    'A client that sends ABORT and hangs up does no harm',
    async (context) => {
      for (let round = 0; round < 5; round++) {
        const handshake = await context.greet()
        handshake.send(OPT.ABORT)
        handshake.wire.destroy()
      }
      await expectHaggling(await context.greet(), 'clients that hung up')
    },
  ),
  reading(
    'should',
    'handshake.hang-up',
    TERMINATION,
    'A client that hangs up in the middle of an option does no harm',
    async (context) => {
      const whole = optionBytes(OPT.INFO, exportRequest(context.exportName))
      for (const length of [1, 8, 15, 16, 17, whole.length - 1]) {
        const handshake = await context.greet()
        handshake.wire.send(whole.subarray(0, length))
        handshake.wire.destroy()
      }
      await expectHaggling(await context.greet(), 'clients that hung up')
    },
  ),

  reading(
    'must',
    'starttls.reply',
    NOTLS,
    'STARTTLS gets ACK, or an error that says why not: ERR_UNSUP, ERR_POLICY, ERR_PLATFORM or ERR_INVALID',
    async (context) => {
      const reply = await (await context.greet()).only(OPT.STARTTLS)
      const allowed: number[] = [
        REP.ACK,
        REP.ERR_UNSUP,
        REP.ERR_POLICY,
        REP.ERR_PLATFORM,
        REP.ERR_INVALID,
        REP.ERR_SHUTDOWN,
      ]
      expect(allowed.includes(reply.type), `STARTTLS was answered with ${replyName(reply.type)}`)
    },
  ),
  reading(
    'must',
    'starttls.data',
    OPTION_TYPES,
    'STARTTLS with data gets ACK or an error, and after an error the session goes on',
    async (context) => {
      const handshake = await context.greet()
      const reply = await handshake.only(OPT.STARTTLS, Buffer.from('data'))
      expect(reply.type === REP.ACK || isError(reply), `the reply is ${replyName(reply.type)}`)
      if (isError(reply)) await expectHaggling(handshake, 'STARTTLS with data')
    },
  ),
  reading(
    'must',
    'starttls.refused-goes-on',
    NOTLS,
    'After STARTTLS was refused the client may continue without TLS',
    async (context) => {
      applicable(context.facts.tls === 'none', 'the server offers TLS')
      const handshake = await context.greet()
      const reply = await handshake.only(OPT.STARTTLS)
      must(isError(reply), `STARTTLS was answered with ${replyName(reply.type)}`)
      await (await context.go(handshake, 'simple')).expectAlive('STARTTLS')
    },
  ),
  reading(
    'must',
    'tls.not-required',
    NOTLS,
    'A server without TLS never answers ERR_TLS_REQD',
    async (context) => {
      applicable(context.facts.tls === 'none', 'the server offers TLS')
      const handshake = await context.greet()
      const replies = [
        ...(await handshake.option(OPT.LIST)),
        ...(await handshake.option(OPT.INFO, exportRequest(context.exportName))),
        ...(await handshake.option(OPT.INFO, exportRequest('no-such-export-6f1d2c'))),
        await handshake.only(0x44),
        await handshake.only(OPT.STARTTLS),
      ]
      const required = replies.some(({ type }) => type === REP.ERR_TLS_REQD)
      expect(!required, 'ERR_TLS_REQD from a server that has no TLS')
    },
  ),
]
