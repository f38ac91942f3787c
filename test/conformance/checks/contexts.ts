/** The options that change how the transmission phase speaks: STRUCTURED_REPLY, EXTENDED_HEADERS, metadata contexts. */
import { applicable, type Check, expect, must, reading } from '../check.ts'
import { type Context, UNLIKELY_NAME } from '../context.ts'
import {
  contextRequest,
  exportRequest,
  type Handshake,
  isError,
  isString,
  namesOf,
  OPT,
  type OptionReply,
  REP,
  replyName,
  u32,
} from '../handshake.ts'
import { CHUNK_MODES, ERRNO, errnoName, errnoOf, type Mode, type Session, statusOf } from '../session.ts'
import { expectHaggling } from './greeting.ts'

const OPTION_TYPES = 'Option types'
const QUERYING = 'Metadata querying'
const BASE = 'The base: metadata namespace'
const FRAMING = [
  ['structured', OPT.STRUCTURED_REPLY],
  ['extended', OPT.EXTENDED_HEADERS],
] as const

// ----------------------------------------------------------------- STRUCTURED_REPLY and EXTENDED_HEADERS

const framingChecks = FRAMING.flatMap(([mode, option]): Check[] => {
  const extension = mode === 'extended' ? ' (extension)' : ''
  return [
    reading(
      'must',
      `${mode}.ack`,
      OPTION_TYPES,
      `The option for ${mode} replies gets ACK, and the session goes on${extension}`,
      async (context) => {
        context.needMode(mode)
        const handshake = await context.greet()
        const reply = await handshake.only(option)
        expect(reply.type === REP.ACK, `the reply is ${replyName(reply.type)}`)
        await expectHaggling(handshake, `the option for ${mode} replies`)
      },
    ),
    reading(
      'should',
      `${mode}.data`,
      OPTION_TYPES,
      `The option for ${mode} replies is refused with ERR_INVALID where it has data${extension}`,
      async (context) => {
        context.needMode(mode)
        const handshake = await context.greet()
        const reply = await handshake.only(option, Buffer.from('data'))
        expect(reply.type === REP.ERR_INVALID, `the reply is ${replyName(reply.type)}`)
        await expectHaggling(handshake, 'an option with data')
      },
    ),
    reading(
      'must',
      `${mode}.twice`,
      'Fixed newstyle negotiation',
      `The option for ${mode} replies, sent again, gets ACK or ERR_INVALID; what was agreed on stays${extension}`,
      async (context) => {
        const handshake = await context.negotiate(mode)
        const reply = await handshake.only(option)
        const allowed: number[] = [REP.ACK, REP.ERR_INVALID]
        expect(allowed.includes(reply.type), `the reply is ${replyName(reply.type)}`)
        await (await context.go(handshake, mode)).expectAlive('the same option twice')
      },
    ),
    reading(
      'must',
      `${mode}.refused-changes-nothing`,
      OPTION_TYPES,
      `Where the option for ${mode} replies was refused, replies stay simple${extension}`,
      async (context) => {
        context.needMode(mode)
        const handshake = await context.greet()
        const reply = await handshake.only(option, Buffer.from('data'))
        applicable(isError(reply), 'the option is taken also with data')
        await (await context.go(handshake, 'simple')).expectAlive('a refused option')
      },
    ),
  ]
})

const extendedChecks: readonly Check[] = [
  reading(
    'should',
    'extended.after-structured',
    OPTION_TYPES,
    'EXTENDED_HEADERS may follow STRUCTURED_REPLY and takes precedence (extension)',
    async (context) => {
      context.needMode('extended')
      const handshake = await context.negotiate('structured')
      const reply = await handshake.only(OPT.EXTENDED_HEADERS)
      expect(reply.type === REP.ACK, `the reply is ${replyName(reply.type)}`)
      await (await context.go(handshake, 'extended')).expectAlive('both options')
    },
  ),
  reading(
    'must',
    'extended.then-structured',
    OPTION_TYPES,
    'STRUCTURED_REPLY after EXTENDED_HEADERS gets ERR_EXT_HEADER_REQD and changes nothing (extension)',
    async (context) => {
      const handshake = await context.negotiate('extended')
      const reply = await handshake.only(OPT.STRUCTURED_REPLY)
      expect(reply.type === REP.ERR_EXT_HEADER_REQD, `the reply is ${replyName(reply.type)}`)
      await (await context.go(handshake, 'extended')).expectAlive('STRUCTURED_REPLY')
    },
  ),
  reading(
    'must',
    'extended.go',
    OPTION_TYPES,
    'After EXTENDED_HEADERS, GO is supported (extension)',
    async (context) => {
      await (await context.enter('extended')).expectAlive('GO')
    },
  ),
  reading(
    'must',
    'extended.contexts',
    OPTION_TYPES,
    'Metadata contexts can be selected with extended headers alone (extension)',
    async (context) => {
      context.needMode('extended')
      const session = await context.enter('extended', { contexts: context.needContexts() })
      expect(session.contexts.size > 0, 'no context was selected')
    },
  ),
]

// ------------------------------------------------------------------------------------ metadata contexts

interface Selected {
  readonly ids: readonly number[]
  readonly names: readonly string[]
  readonly last: OptionReply
}

/** The outcome of a LIST or SET option. */
function selectedIn(replies: readonly OptionReply[]): Selected {
  const contexts = replies.slice(0, -1)
  for (const { type, data } of contexts) {
    must(type === REP.META_CONTEXT, `among the replies is ${replyName(type)}`)
    must(data.length > 4 && isString(data.subarray(4)), 'a META_CONTEXT reply is malformed')
  }
  return {
    ids: contexts.map(({ data }) => data.readUInt32BE(0)),
    names: contexts.map(({ data }) => data.toString('utf8', 4)),
    last: replies.at(-1)!,
  }
}

async function query(
  context: Context,
  handshake: Handshake,
  option: number,
  ...queries: string[]
): Promise<Selected> {
  const replies = await handshake.option(option, contextRequest(context.exportName, queries))
  return selectedIn(replies)
}

/** A query that has to be ignored: ACK and no context. */
async function ignored(context: Context, mode: Mode, option: number, queryText: string): Promise<void> {
  context.needContexts()
  const handshake = await context.negotiate(mode)
  const { names, last } = await query(context, handshake, option, queryText)
  expect(last.type === REP.ACK, `"${queryText}" was answered with ${replyName(last.type)}`)
  expect(names.length === 0, `"${queryText}" found ${names.join()}`)
  await expectHaggling(handshake, 'a query')
}

const bytesOf = (name: string) => Buffer.concat([u32(Buffer.byteLength(name)), Buffer.from(name)])
const MALFORMED: readonly (readonly [string, (name: string) => Buffer])[] = [
  ['no data', () => Buffer.alloc(0)],
  ['a name length beyond the data', (name) => Buffer.concat([u32(name.length + 99), Buffer.from(name)])],
  ['no count of queries', bytesOf],
  ['fewer queries than counted', (name) => Buffer.concat([bytesOf(name), u32(2), bytesOf('base:')])],
  [
    'a query length beyond the data',
    (name) => Buffer.concat([bytesOf(name), u32(1, 200), Buffer.from('base:')]),
  ],
  [
    'a query length of 2^32 - 1',
    (name) => Buffer.concat([bytesOf(name), u32(1, 0xffffffff), Buffer.from('base:')]),
  ],
  ['a count of 2^32 - 1', (name) => Buffer.concat([bytesOf(name), u32(0xffffffff), bytesOf('base:')])],
  ['bytes after the last query', (name) => Buffer.concat([contextRequest(name, ['base:']), Buffer.alloc(3)])],
]

const bothOptions = (['list-contexts', 'set-contexts'] as const).flatMap((id): Check[] => {
  const option = id === 'list-contexts' ? OPT.LIST_META_CONTEXT : OPT.SET_META_CONTEXT
  const name = id === 'list-contexts' ? 'LIST_META_CONTEXT' : 'SET_META_CONTEXT'
  return [
    reading(
      'must',
      `${id}.unknown-namespace`,
      OPTION_TYPES,
      `${name} ignores queries in a namespace it does not know`,
      (context) => ignored(context, 'structured', option, 'x-nobody:nothing'),
    ),
    reading(
      'must',
      `${id}.unknown-leaf`,
      BASE,
      `${name} ignores a name in base: that does not exist`,
      (context) => ignored(context, 'structured', option, 'base:no-such-thing'),
    ),
    reading(
      'must',
      `${id}.no-namespace`,
      OPTION_TYPES,
      `${name} may refuse a query without a colon with ERR_INVALID; it finds nothing by it`,
      async (context) => {
        context.needContexts()
        const handshake = await context.negotiate('structured')
        const { names, last } = await query(context, handshake, option, 'allocation')
        const allowed: number[] = [REP.ACK, REP.ERR_INVALID]
        expect(allowed.includes(last.type), `the reply is ${replyName(last.type)}`)
        expect(names.length === 0, `it found ${names.join()}`)
      },
    ),
    reading(
      'must',
      `${id}.unknown-export`,
      OPTION_TYPES,
      `${name} for an export that does not exist gets an error, and the session goes on`,
      async (context) => {
        applicable(!context.facts.anyName, 'every export name exists')
        context.needContexts()
        const handshake = await context.negotiate('structured')
        const replies = await handshake.option(option, contextRequest(UNLIKELY_NAME, ['base:allocation']))
        expect(isError(replies.at(-1)!), `the replies are ${namesOf(replies)}`)
        await expectHaggling(handshake, 'an unknown export')
      },
    ),
    ...MALFORMED.map(([what, data]) =>
      reading(
        // Said of LIST; SET has the same data. That bytes too many are a mistake as well is not said.
        id === 'list-contexts' && !what.startsWith('bytes after') ? 'must' : 'should',
        `${id}.malformed-${what.replace(/[^a-z0-9]+/g, '-')}`,
        OPTION_TYPES,
        `${name} with ${what} gets ERR_INVALID, and the session goes on`,
        async (context) => {
          context.needContexts()
          const handshake = await context.negotiate('structured')
          const replies = await handshake.option(option, data(context.exportName))
          const last = replies.at(-1)!.type
          expect(last === REP.ERR_INVALID, `the reply is ${replyName(last)}`)
          await expectHaggling(handshake, `a malformed ${name}`)
        },
      ),
    ),
  ]
})

const listChecks: readonly Check[] = [
  reading(
    'must',
    'list-contexts.all',
    OPTION_TYPES,
    'LIST_META_CONTEXT without a query lists names of the form namespace:leaf, then ACK',
    async (context) => {
      context.needContexts()
      const handshake = await context.negotiate('structured')
      const { names, last } = await query(context, handshake, OPT.LIST_META_CONTEXT)
      expect(last.type === REP.ACK, `it ends with ${replyName(last.type)}`)
      for (const each of names) expect(each.indexOf(':') > 0, `"${each}" has no namespace`)
    },
  ),
  reading(
    'must',
    'list-contexts.base',
    BASE,
    'LIST_META_CONTEXT takes base: as a wildcard',
    async (context) => {
      const all = context.needContexts().filter((each) => each.startsWith('base:'))
      const handshake = await context.negotiate('structured')
      const { names, last } = await query(context, handshake, OPT.LIST_META_CONTEXT, 'base:')
      expect(last.type === REP.ACK, `it ends with ${replyName(last.type)}`)
      expect([...names].sort().join() === [...all].sort().join(), `base: lists ${names.join()}`)
    },
  ),
  reading(
    'must',
    'list-contexts.exact',
    OPTION_TYPES,
    'LIST_META_CONTEXT finds a context by its whole name, and only that one',
    async (context) => {
      for (const each of context.needContexts()) {
        const handshake = await context.negotiate('structured')
        const { names } = await query(context, handshake, OPT.LIST_META_CONTEXT, each)
        expect(names.join() === each, `the query "${each}" lists "${names.join()}"`)
      }
    },
  ),
  reading(
    'must',
    'list-contexts.several',
    OPTION_TYPES,
    'LIST_META_CONTEXT lists what any of several queries finds, unknown ones among them',
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate('structured')
      const queries = ['x-nobody:a', ...all, 'base:nothing']
      const { names, last } = await query(context, handshake, OPT.LIST_META_CONTEXT, ...queries)
      expect(last.type === REP.ACK, `it ends with ${replyName(last.type)}`)
      expect([...names].sort().join() === [...all].sort().join(), `it lists ${names.join()}`)
    },
  ),
  reading(
    'should',
    'list-contexts.zero-ids',
    OPTION_TYPES,
    'The ids in replies to LIST_META_CONTEXT are 0',
    async (context) => {
      context.needContexts()
      const handshake = await context.negotiate('structured')
      const { ids } = await query(context, handshake, OPT.LIST_META_CONTEXT)
      expect(
        ids.every((each) => each === 0),
        `the ids are ${ids.join()}`,
      )
    },
  ),
  reading(
    'must',
    'list-contexts.without-structured',
    OPTION_TYPES,
    'LIST_META_CONTEXT before STRUCTURED_REPLY gets an answer or an error, and the session goes on',
    async (context) => {
      const handshake = await context.greet()
      const { last } = await query(context, handshake, OPT.LIST_META_CONTEXT, 'base:')
      expect(last.type === REP.ACK || isError(last), `it ends with ${replyName(last.type)}`)
      expect(last.type !== REP.ERR_EXT_HEADER_REQD, 'base: needs no extended headers')
      await expectHaggling(handshake, 'LIST_META_CONTEXT')
    },
  ),
]

/** BLOCK_STATUS at the start of the export; the ids in its reply, or its error. */
async function statusIds(session: Session): Promise<{ errno: number; ids: number[] }> {
  const answer = await session.ask({ command: 7, offset: 0, length: 512 })
  return { errno: errnoOf(answer), ids: statusOf(answer).map((status) => status.context) }
}

async function expectNoStatus(session: Session): Promise<void> {
  const { errno } = await statusIds(session)
  expect(errno === ERRNO.EINVAL, `BLOCK_STATUS was answered with ${errnoName(errno)}`)
}

const setChecks = CHUNK_MODES.flatMap((mode): Check[] => [
  reading(
    'must',
    `set-contexts.all@${mode}`,
    OPTION_TYPES,
    `SET_META_CONTEXT selects each context that it names, with an id of its own, then ACK (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate(mode)
      const { names, ids, last } = await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      expect(last.type === REP.ACK, `it ends with ${replyName(last.type)}`)
      expect([...names].sort().join() === [...all].sort().join(), `it selected ${names.join()}`)
      expect(new Set(ids).size === ids.length, `the ids are ${ids.join()}`)
    },
  ),
  reading(
    'must',
    `set-contexts.none@${mode}`,
    OPTION_TYPES,
    `SET_META_CONTEXT without a query selects nothing (${mode})`,
    async (context) => {
      context.needContexts()
      const handshake = await context.negotiate(mode)
      const { names, last } = await query(context, handshake, OPT.SET_META_CONTEXT)
      expect(last.type === REP.ACK, `it ends with ${replyName(last.type)}`)
      expect(names.length === 0, `it selected ${names.join()}`)
    },
  ),
  reading(
    'must',
    `set-contexts.wildcard@${mode}`,
    BASE,
    `SET_META_CONTEXT ignores the wildcard base: (${mode})`,
    (context) => ignored(context, mode, OPT.SET_META_CONTEXT, 'base:'),
  ),
  reading(
    'must',
    `set-contexts.repeated@${mode}`,
    OPTION_TYPES,
    `A context that is named twice is selected once (${mode})`,
    async (context) => {
      const first = context.needContexts()[0]!
      const handshake = await context.negotiate(mode)
      const { names, ids } = await query(context, handshake, OPT.SET_META_CONTEXT, first, first)
      expect(names.join() === first, `it selected ${names.join()} with the ids ${ids.join()}`)
    },
  ),
  reading(
    'must',
    `set-contexts.ids-in-use@${mode}`,
    OPTION_TYPES,
    `BLOCK_STATUS speaks of the ids that the last SET_META_CONTEXT gave, also where it gave others before (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate(mode)
      await query(context, handshake, OPT.SET_META_CONTEXT, all.at(-1)!)
      await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      const { ids } = await query(context, handshake, OPT.SET_META_CONTEXT, ...[...all].reverse())
      const found = await statusIds(await context.go(handshake, mode))
      const same = [...found.ids].sort().join() === [...ids].sort().join()
      expect(same, `selected are ${ids.join()}, BLOCK_STATUS speaks of ${found.ids.join()}`)
    },
  ),
  reading(
    'must',
    `set-contexts.replaced@${mode}`,
    OPTION_TYPES,
    `SET_META_CONTEXT replaces what was selected before (${mode})`,
    async (context) => {
      const all = context.needContexts()
      applicable(all.length > 1, 'there is only one context')
      const handshake = await context.negotiate(mode)
      await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      const { ids } = await query(context, handshake, OPT.SET_META_CONTEXT, all[0]!)
      const found = await statusIds(await context.go(handshake, mode))
      expect(found.ids.join() === ids.join(), `selected is ${ids.join()}, told of are ${found.ids.join()}`)
    },
  ),
  reading(
    'should',
    `set-contexts.replaced-by-none@${mode}`,
    OPTION_TYPES,
    `After a SET_META_CONTEXT that selects nothing, BLOCK_STATUS gets EINVAL (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate(mode)
      await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      await query(context, handshake, OPT.SET_META_CONTEXT)
      await expectNoStatus(await context.go(handshake, mode))
    },
  ),
  reading(
    'should',
    `set-contexts.replaced-by-failure@${mode}`,
    OPTION_TYPES,
    `After a SET_META_CONTEXT that failed nothing is selected: BLOCK_STATUS gets EINVAL (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate(mode)
      await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      const failed = await handshake.option(OPT.SET_META_CONTEXT, Buffer.concat([u32(0x10000), u32(1)]))
      applicable(isError(failed.at(-1)!), 'a malformed SET_META_CONTEXT succeeds')
      await expectNoStatus(await context.go(handshake, mode))
    },
  ),
  reading(
    'must',
    `set-contexts.info-between@${mode}`,
    OPTION_TYPES,
    `INFO and LIST_META_CONTEXT between SET_META_CONTEXT and GO change nothing that is selected (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.negotiate(mode)
      const { ids } = await query(context, handshake, OPT.SET_META_CONTEXT, ...all)
      await handshake.option(OPT.INFO, exportRequest(context.exportName))
      await query(context, handshake, OPT.LIST_META_CONTEXT, 'x-nobody:')
      const found = await statusIds(await context.go(handshake, mode))
      expect(found.errno === 0, `BLOCK_STATUS failed with ${errnoName(found.errno)}`)
      expect([...found.ids].sort().join() === [...ids].sort().join(), 'it speaks of other contexts')
    },
  ),
  reading(
    'should',
    `set-contexts.other-export@${mode}`,
    QUERYING,
    `Contexts selected for one export are not selected for another: BLOCK_STATUS gets EINVAL (${mode})`,
    async (context) => {
      const all = context.needContexts()
      const other = context.facts.exports.find((name) => name !== context.exportName && name !== '')
      applicable(other !== undefined, 'there is only one export')
      const handshake = await context.negotiate(mode)
      const replies = await handshake.option(OPT.SET_META_CONTEXT, contextRequest(other, all))
      must(replies.at(-1)!.type === REP.ACK, `SET_META_CONTEXT was answered with ${namesOf(replies)}`)
      await expectNoStatus(await context.go(handshake, mode))
    },
  ),
  reading(
    'should',
    `set-contexts.only-listed@${mode}`,
    QUERYING,
    `Contexts that were listed and not selected are not there: BLOCK_STATUS gets EINVAL (${mode})`,
    async (context) => {
      context.needContexts()
      const handshake = await context.negotiate(mode)
      await query(context, handshake, OPT.LIST_META_CONTEXT)
      await expectNoStatus(await context.go(handshake, mode))
    },
  ),
])

const orderChecks: readonly Check[] = [
  reading(
    'should',
    'set-contexts.without-structured',
    OPTION_TYPES,
    'SET_META_CONTEXT before STRUCTURED_REPLY is refused with ERR_INVALID (extension: or ERR_EXT_HEADER_REQD)',
    async (context) => {
      const all = context.needContexts()
      const handshake = await context.greet()
      const { last } = await query(context, handshake, OPT.SET_META_CONTEXT, all[0]!)
      const allowed: number[] = [REP.ERR_INVALID, REP.ERR_EXT_HEADER_REQD]
      expect(allowed.includes(last.type), `the reply is ${replyName(last.type)}`)
      await expectHaggling(handshake, 'SET_META_CONTEXT')
    },
  ),
]

export const contextChecks: readonly Check[] = [
  ...framingChecks,
  ...extendedChecks,
  ...bothOptions,
  ...listChecks,
  ...setChecks,
  ...orderChecks,
]
