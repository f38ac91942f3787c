/** How a client learns of exports and chooses one: LIST, EXPORT_NAME, INFO, GO. */
import { applicable, type Check, expect, must, reading } from '../check.ts'
import { type Context, UNLIKELY_NAME } from '../context.ts'
import {
  type BlockSize,
  CAN,
  CLIENT,
  exportRequest,
  FIXED_NO_ZEROES,
  INFO,
  infoItem,
  isError,
  isString,
  namesOf,
  OPT,
  type OptionReply,
  optionBytes,
  REP,
  readExportFacts,
  replyName,
  u16,
  u32,
} from '../handshake.ts'
import { MODES, type Mode, orTheEnd } from '../session.ts'
import { Ended } from '../wire.ts'
import { expectHaggling } from './greeting.ts'

const OPTION_TYPES = 'Option types'
const REPLY_TYPES = 'Option reply types'
const NEWSTYLE = 'Newstyle negotiation'
const SIZES = 'Size constraints'
const TRANSMISSION_FLAGS = 'Transmission flags'
const INTEROPERABILITY = 'Maximum interoperability'
const BASELINE = 'Baseline'

// ------------------------------------------------------------------------------------------------- LIST

interface Listed {
  readonly name: string
  readonly description: string
}

async function list(context: Context): Promise<Listed[]> {
  const replies = await (await context.greet()).option(OPT.LIST)
  applicable(replies.at(-1)?.type === REP.ACK, `LIST was answered with ${namesOf(replies)}`)
  return replies.slice(0, -1).map(({ data }) => {
    must(data.length >= 4 && data.readUInt32BE(0) <= data.length - 4, 'an entry of LIST is malformed')
    const end = 4 + data.readUInt32BE(0)
    return { name: data.toString('utf8', 4, end), description: data.toString('utf8', end) }
  })
}

const listChecks: readonly Check[] = [
  reading(
    'must',
    'list.reply',
    BASELINE,
    'LIST gets any number of SERVER replies, then ACK or an error',
    async (context) => {
      const replies = await (await context.greet()).option(OPT.LIST)
      const last = replies.at(-1)!
      const servers = replies.slice(0, -1).every(({ type }) => type === REP.SERVER)
      expect(servers, `LIST was answered with ${namesOf(replies)}`)
      expect(last.type === REP.ACK || isError(last), `LIST ends with ${replyName(last.type)}`)
    },
  ),
  reading(
    'must',
    'list.entries',
    REPLY_TYPES,
    'A SERVER reply holds a name within its length, and a description; both are strings',
    async (context) => {
      const replies = await (await context.greet()).option(OPT.LIST)
      applicable(replies.at(-1)?.type === REP.ACK, 'LIST is refused')
      for (const { data } of replies.slice(0, -1)) {
        expect(data.length >= 4, `a SERVER reply has ${data.length} bytes`)
        const length = data.readUInt32BE(0)
        expect(length <= data.length - 4, `a name of ${length} bytes in a reply of ${data.length}`)
        expect(isString(data.subarray(4, 4 + length)), 'the name is no string')
        expect(isString(data.subarray(4 + length)), 'the description is no string')
      }
    },
  ),
  reading(
    'must',
    'list.names-exist',
    REPLY_TYPES,
    'INFO knows the names that LIST tells',
    async (context) => {
      const listed = await list(context)
      applicable(listed.length > 0, 'LIST tells no names')
      const handshake = await context.greet()
      for (const { name } of listed.slice(0, 8)) {
        const replies = await handshake.option(OPT.INFO, exportRequest(name))
        expect(replies.at(-1)?.type === REP.ACK, `INFO "${name}" was answered with ${namesOf(replies)}`)
      }
    },
  ),
  reading(
    'should',
    'list.data',
    OPTION_TYPES,
    'LIST with data is refused with ERR_INVALID',
    async (context) => {
      const handshake = await context.greet()
      const replies = await handshake.option(OPT.LIST, Buffer.from('data'))
      const type = replies.at(-1)!.type
      expect(type === REP.ERR_INVALID, `LIST with data was answered with ${replyName(type)}`)
      await expectHaggling(handshake, 'LIST with data')
    },
  ),
]

// ------------------------------------------------------------------------------------------ EXPORT_NAME

/** Sends EXPORT_NAME and reads the fixed part of its answer. */
async function exportName(context: Context, clientFlags: number, padded: boolean) {
  const handshake = await context.greet(clientFlags)
  handshake.send(OPT.EXPORT_NAME, Buffer.from(context.exportName))
  let head: Buffer
  try {
    head = await handshake.wire.read(10, 'the answer to EXPORT_NAME')
  } catch (error) {
    if (error instanceof Ended) applicable(false, 'the server does not take EXPORT_NAME')
    throw error
  }
  const padding = padded ? await handshake.wire.read(124, 'the zeroes after EXPORT_NAME') : Buffer.alloc(0)
  const facts = { size: head.readBigUInt64BE(0), flags: head.readUInt16BE(8), blockSize: undefined }
  return { facts, padding, session: context.session(handshake, 'simple', facts) }
}

const exportNameChecks: readonly Check[] = [
  reading(
    'should',
    'export-name.supported',
    INTEROPERABILITY,
    'EXPORT_NAME works beside GO, for older clients',
    async (context) => {
      const handshake = await context.greet()
      handshake.send(OPT.EXPORT_NAME, Buffer.from(context.exportName))
      const answer = await handshake.wire.read(10, 'the answer to EXPORT_NAME')
      expect(answer.readBigUInt64BE(0) > 0n, 'the export has no bytes')
    },
  ),
  ...[
    ['zeroes', 'without NO_ZEROES', CLIENT.FIXED_NEWSTYLE],
    ['plain-newstyle', 'without any client flag', 0],
  ].map(([name, how, flags]) =>
    reading(
      'must',
      `export-name.${name}`,
      NEWSTYLE,
      `${how}, the answer to EXPORT_NAME ends in 124 bytes of zero; then requests are taken`.replace(
        /^w/,
        'W',
      ),
      async (context) => {
        const { padding, session } = await exportName(context, Number(flags), true)
        expect(
          padding.every((byte) => byte === 0),
          'the padding is not zero',
        )
        await session.expectAlive('EXPORT_NAME')
      },
    ),
  ),
  reading(
    'must',
    'export-name.no-zeroes',
    'Handshake flags',
    'With NO_ZEROES agreed on, the answer to EXPORT_NAME is 10 bytes; then requests are taken',
    async (context) => {
      const { session } = await exportName(context, FIXED_NO_ZEROES, false)
      await session.expectAlive('EXPORT_NAME')
    },
  ),
  reading(
    'must',
    'export-name.same-facts',
    REPLY_TYPES,
    'EXPORT_NAME tells the same size and flags as INFO_EXPORT',
    async (context) => {
      const { facts } = await exportName(context, FIXED_NO_ZEROES, false)
      const info = await infoFacts(context, 'simple')
      expect(facts.size === info.size, `sizes ${facts.size} and ${info.size}`)
      expect(facts.flags === info.flags, `flags 0x${facts.flags.toString(16)}, 0x${info.flags.toString(16)}`)
    },
  ),
  reading(
    'must',
    'export-name.unknown',
    OPTION_TYPES,
    'EXPORT_NAME with a name that does not exist ends the session without a word',
    async (context) => {
      applicable(!context.facts.anyName, 'every export name exists')
      const handshake = await context.greet()
      handshake.send(OPT.EXPORT_NAME, Buffer.from(UNLIKELY_NAME))
      const said = await handshake.wire.readToEnd('the end of the session')
      expect(said.length === 0, `the server said ${said.subarray(0, 32).toString('hex')}`)
    },
  ),
]

// ----------------------------------------------------------------------------------------- INFO and GO

async function infoFacts(context: Context, mode: Mode) {
  const handshake = await context.negotiate(mode)
  return readExportFacts(
    await handshake.option(OPT.INFO, exportRequest(context.exportName, [INFO.BLOCK_SIZE])),
  )
}

/** The replies to a successful INFO or GO. */
async function told(context: Context, option: number, infos: readonly number[]): Promise<OptionReply[]> {
  const handshake = await context.greet()
  const replies = await handshake.option(option, exportRequest(context.exportName, infos))
  const last = replies.at(-1)!
  if (infos.length === 0) {
    applicable(last.type !== REP.ERR_BLOCK_SIZE_REQD, 'the server wants its block sizes to be asked for')
  }
  must(last.type === REP.ACK, `it was answered with ${namesOf(replies)}`)
  return replies
}

const canonical = (replies: readonly OptionReply[]) =>
  replies
    .map(({ type, data }) => `${type}:${data.toString('hex')}`)
    .sort()
    .join()

/** Requests for an export whose lengths contradict each other. */
const MALFORMED: readonly (readonly [string, (name: string) => Buffer])[] = [
  ['no data', () => Buffer.alloc(0)],
  ['3 bytes', () => Buffer.alloc(3)],
  [
    'a name length beyond the data',
    (name) => Buffer.concat([u32(name.length + 9), Buffer.from(name), u16(0)]),
  ],
  ['a name length of 2^32 - 1', (name) => Buffer.concat([u32(0xffffffff), Buffer.from(name), u16(0)])],
  ['no count of requests', (name) => Buffer.concat([u32(Buffer.byteLength(name)), Buffer.from(name)])],
  ['fewer requests than counted', (name) => Buffer.concat([exportRequest(name).subarray(0, -2), u16(2, 3)])],
  ['more requests than counted', (name) => Buffer.concat([exportRequest(name), u16(3)])],
  ['half a request', (name) => Buffer.concat([exportRequest(name, [3]), Buffer.alloc(1)])],
]

const infoGoChecks = (['INFO', 'GO'] as const).flatMap((name): Check[] => {
  const option = OPT[name]
  const id = name.toLowerCase()
  return [
    reading(
      'must',
      `${id}.export`,
      REPLY_TYPES,
      `${name} tells INFO_EXPORT, 12 bytes, before its ACK`,
      async (context) => {
        const replies = await told(context, option, [INFO.BLOCK_SIZE])
        const item = infoItem(replies, INFO.EXPORT)
        expect(item !== undefined, `there is no INFO_EXPORT among ${namesOf(replies)}`)
        expect(item.length === 12, `INFO_EXPORT has ${item.length} bytes`)
      },
    ),
    reading(
      'must',
      `${id}.only-info`,
      OPTION_TYPES,
      `${name} is answered with INFO replies and one final reply, each INFO with a type`,
      async (context) => {
        const replies = await told(context, option, [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE])
        for (const { type, data } of replies.slice(0, -1)) {
          expect(type === REP.INFO && data.length >= 2, `among the replies is ${replyName(type)}`)
        }
      },
    ),
    reading('should', `${id}.once`, REPLY_TYPES, 'Each type of information comes once', async (context) => {
      const replies = await told(context, option, [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE])
      const types = replies.slice(0, -1).map(({ data }) => data.readUInt16BE(0))
      expect(new Set(types).size === types.length, `the types are ${types.join()}`)
    }),
    reading(
      'must',
      `${id}.unknown-request`,
      OPTION_TYPES,
      'Requests for information that nobody has defined are ignored',
      async (context) => {
        const replies = await told(context, option, [0x7777, INFO.BLOCK_SIZE, 0xffff])
        readExportFacts(replies)
      },
    ),
    reading(
      'must',
      `${id}.unknown-export`,
      OPTION_TYPES,
      `${name} to an export that does not exist gets ERR_UNKNOWN, and the session goes on`,
      async (context) => {
        applicable(!context.facts.anyName, 'every export name exists')
        const handshake = await context.greet()
        const replies = await handshake.option(option, exportRequest(UNLIKELY_NAME, [INFO.NAME]))
        const last = replies.at(-1)!.type
        const hidden = context.facts.tls === 'offered' && last === REP.ERR_TLS_REQD
        expect(last === REP.ERR_UNKNOWN || hidden, `the reply is ${replyName(last)}`)
        await expectHaggling(handshake, 'an unknown export')
      },
    ),
    reading(
      'should',
      `${id}.unknown-export-untold`,
      OPTION_TYPES,
      'Of an export that does not exist nothing is told',
      async (context) => {
        applicable(!context.facts.anyName, 'every export name exists')
        const handshake = await context.greet()
        const replies = await handshake.option(option, exportRequest(UNLIKELY_NAME, [INFO.BLOCK_SIZE]))
        expect(replies.length === 1, `the replies are ${namesOf(replies)}`)
      },
    ),
    reading(
      'must',
      `${id}.block-size-asked`,
      OPTION_TYPES,
      'ERR_BLOCK_SIZE_REQD is no answer to a client that asks for block sizes',
      async (context) => {
        const handshake = await context.greet()
        const replies = await handshake.option(option, exportRequest(context.exportName, [INFO.BLOCK_SIZE]))
        expect(replies.at(-1)!.type !== REP.ERR_BLOCK_SIZE_REQD, 'ERR_BLOCK_SIZE_REQD')
      },
    ),
    ...MALFORMED.map(([what, data]) =>
      reading(
        'should',
        `${id}.malformed-${what.replace(/[^a-z0-9]+/g, '-')}`,
        REPLY_TYPES,
        `${name} whose data has ${what} gets ERR_INVALID, and the session goes on`,
        async (context) => {
          const handshake = await context.greet()
          const replies = await handshake.option(option, data(context.exportName))
          const last = replies.at(-1)!.type
          expect(last === REP.ERR_INVALID, `the reply is ${replyName(last)}`)
          await expectHaggling(handshake, `a malformed ${name}`)
        },
      ),
    ),
  ]
})

const infoChecks: readonly Check[] = [
  reading(
    'must',
    'info.stays',
    OPTION_TYPES,
    'INFO does not enter the transmission phase: options go on',
    async (context) => {
      const handshake = await context.greet()
      for (let round = 0; round < 3; round++) {
        const replies = await handshake.option(OPT.INFO, exportRequest(context.exportName, [INFO.BLOCK_SIZE]))
        must(replies.at(-1)!.type === REP.ACK, `INFO was answered with ${namesOf(replies)}`)
      }
      await expectHaggling(handshake, 'INFO')
    },
  ),
  reading(
    'must',
    'info.same-as-go',
    OPTION_TYPES,
    'GO directly after INFO with the same parameters tells the same',
    async (context) => {
      for (const mode of MODES) {
        if (!context.facts.modes.has(mode)) continue
        const handshake = await context.negotiate(mode)
        const request = exportRequest(context.exportName, [INFO.NAME, INFO.BLOCK_SIZE, INFO.DESCRIPTION])
        const info = canonical(await handshake.option(OPT.INFO, request))
        const go = canonical(await handshake.option(OPT.GO, request))
        expect(info === go, `in ${mode} mode INFO told ${info}, GO told ${go}`)
      }
    },
  ),
  reading(
    'must',
    'info.name',
    REPLY_TYPES,
    'INFO_NAME, where it is told, is the name by which LIST knows the export',
    async (context) => {
      const item = infoItem(await told(context, OPT.INFO, [INFO.NAME, INFO.BLOCK_SIZE]), INFO.NAME)
      applicable(item !== undefined, 'the server does not tell INFO_NAME')
      expect(isString(item.subarray(2)), 'INFO_NAME is no string')
      const name = item.toString('utf8', 2)
      const listed = await list(context)
      applicable(listed.length > 0, 'LIST tells no names')
      expect(
        listed.some((each) => each.name === name),
        `INFO_NAME is "${name}", which LIST does not tell`,
      )
    },
  ),
  reading(
    'must',
    'info.description',
    REPLY_TYPES,
    'INFO_DESCRIPTION, where it is told, is the string that LIST tells after the name',
    async (context) => {
      const replies = await told(context, OPT.INFO, [INFO.DESCRIPTION, INFO.NAME, INFO.BLOCK_SIZE])
      const item = infoItem(replies, INFO.DESCRIPTION)
      applicable(item !== undefined, 'the server does not tell INFO_DESCRIPTION')
      expect(isString(item.subarray(2)), 'INFO_DESCRIPTION is no string')
      const name = infoItem(replies, INFO.NAME)?.toString('utf8', 2) ?? context.exportName
      const same = (await list(context)).find((each) => each.name === name)
      applicable(same !== undefined && same.description !== '', 'LIST does not describe the export')
      expect(same.description === item.toString('utf8', 2), `LIST says "${same.description}"`)
    },
  ),
  reading(
    'must',
    'go.no-padding',
    OPTION_TYPES,
    'After the ACK to GO come no zeroes, also where NO_ZEROES was not agreed on',
    async (context) => {
      const handshake = await context.greet(CLIENT.FIXED_NEWSTYLE)
      await (await context.go(handshake, 'simple')).expectAlive('GO')
    },
  ),
  reading(
    'must',
    'go.same-in-one-segment',
    OPTION_TYPES,
    'The first request may follow GO as soon as its ACK is there, in any pieces',
    async (context) => {
      const session = await context.enter('simple')
      const { sent, bytes } = session.prepare({ command: 0, length: session.blockSize?.minimum ?? 512 })
      for (const byte of bytes) {
        session.wire.send(Buffer.from([byte]))
        await new Promise((resolve) => setImmediate(resolve))
      }
      await session.answer(sent)
    },
  ),
  reading(
    'should',
    'go.then-option',
    OPTION_TYPES,
    'An option in the transmission phase is no option any more: it has no option reply',
    async (context) => {
      const session = await context.enter('simple')
      session.over = true
      session.wire.send(optionBytes(OPT.LIST, Buffer.alloc(12))) // as long as a request
      await orTheEnd(session, async () => {
        const magic = (await session.wire.read(4, 'the end of the session, or an error')).readUInt32BE(0)
        expect(magic === 0x67446698, `the reply begins with 0x${magic.toString(16)}`)
      })
    },
  ),
]

// -------------------------------------------------------------------------------------------- block sizes

async function blockSize(context: Context): Promise<BlockSize & { size: bigint }> {
  const replies = await told(context, OPT.INFO, [INFO.BLOCK_SIZE])
  const item = infoItem(replies, INFO.BLOCK_SIZE)
  applicable(item !== undefined, 'the server does not tell INFO_BLOCK_SIZE')
  const { size, blockSize } = readExportFacts(replies)
  must(blockSize !== undefined, `INFO_BLOCK_SIZE has ${item.length} bytes, not 14`)
  return { size, ...blockSize }
}
const isPowerOf2 = (value: number) => value > 0 && Number.isInteger(Math.log2(value))

const blockSizeChecks: readonly Check[] = [
  reading('must', 'block-size.layout', REPLY_TYPES, 'INFO_BLOCK_SIZE has 14 bytes', async (context) => {
    await blockSize(context)
  }),
  reading(
    'must',
    'block-size.minimum',
    SIZES,
    'The minimum block size is a power of 2, at most 65536',
    async (context) => {
      const { minimum } = await blockSize(context)
      expect(isPowerOf2(minimum) && minimum <= 65536, `the minimum is ${minimum}`)
    },
  ),
  reading(
    'must',
    'block-size.preferred',
    SIZES,
    'The preferred block size is a power of 2, at least 512 and at least the minimum',
    async (context) => {
      const { minimum, preferred } = await blockSize(context)
      const large = preferred >= minimum && preferred >= 512
      expect(isPowerOf2(preferred) && large, `the preferred size is ${preferred}, the minimum ${minimum}`)
    },
  ),
  reading(
    'must',
    'block-size.maximum',
    SIZES,
    'The maximum payload is at least the preferred block size',
    async (context) => {
      const { preferred, maximum } = await blockSize(context)
      expect(maximum >= preferred, `the maximum is ${maximum}, the preferred size ${preferred}`)
    },
  ),
  reading(
    'should',
    'block-size.maximum-1m',
    SIZES,
    'The maximum payload is at least 1 MiB where the export is that large',
    async (context) => {
      const { maximum, size } = await blockSize(context)
      applicable(size >= 2n ** 20n, 'the export is smaller than 1 MiB')
      expect(maximum >= 2 ** 20, `the maximum is ${maximum}`)
    },
  ),
  reading(
    'should',
    'block-size.whole-export',
    SIZES,
    'The size of the export is a multiple of the minimum block size',
    async (context) => {
      const { minimum, size } = await blockSize(context)
      expect(size % BigInt(minimum) === 0n, `${size} bytes in blocks of ${minimum}`)
    },
  ),
]

// -------------------------------------------------------------------------------------- transmission flags

const flagChecks = MODES.flatMap((mode): Check[] => {
  const withFlags = (level: 'must' | 'should', id: string, rule: string, ok: (flags: number) => boolean) =>
    reading(level, `flags.${id}@${mode}`, TRANSMISSION_FLAGS, `${rule} (${mode})`, async (context) => {
      const { flags } = await infoFacts(context, mode)
      expect(ok(flags), `the flags are 0x${flags.toString(16)}`)
    })
  return [
    withFlags('must', 'has-flags', 'HAS_FLAGS is set', (flags) => (flags & CAN.HAS_FLAGS) !== 0),
    withFlags(
      'must',
      'fast-zero',
      'SEND_FAST_ZERO is not set without SEND_WRITE_ZEROES',
      (flags) => (flags & CAN.FAST_ZERO) === 0 || (flags & CAN.WRITE_ZEROES) !== 0,
    ),
    withFlags('must', 'unknown', 'Flags that nobody has defined are not set', (flags) => flags >> 13 === 0),
    ...(mode === 'simple'
      ? [
          withFlags(
            'must',
            'df',
            'SEND_DF is not set where replies have no chunks',
            (flags) => (flags & CAN.DF) === 0,
          ),
        ]
      : []),
    mode === 'extended'
      ? withFlags(
          'should',
          'status-payload',
          'BLOCK_STATUS_PAYLOAD is not set where no metadata context was selected (extension)',
          (flags) => (flags & CAN.BLOCK_STATUS_PAYLOAD) === 0,
        )
      : withFlags(
          'must',
          'status-payload',
          'BLOCK_STATUS_PAYLOAD is not set without extended headers (extension)',
          (flags) => (flags & CAN.BLOCK_STATUS_PAYLOAD) === 0,
        ),
  ]
})

export const exportChecks: readonly Check[] = [
  ...listChecks,
  ...exportNameChecks,
  ...infoGoChecks,
  ...infoChecks,
  ...blockSizeChecks,
  ...flagChecks,
]
