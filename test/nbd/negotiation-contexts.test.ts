import { describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { OPTION, OPTION_REPLY } from '../../src/nbd/constants.ts'
import { decodeMetaContext } from '../../src/nbd/handshake.ts'
import { CONTEXTS, catalogOf, description, go, meta, Talk, TWO } from './talk.ts'

describe('LIST_META_CONTEXT', () => {
  const listed = (...queries: string[]) => {
    const replies = new Talk().option(OPTION.LIST_META_CONTEXT, meta('disk', ...queries))
    expect(replies.at(-1)?.type).toBe(OPTION_REPLY.ACK)
    return replies.slice(0, -1).map((reply) => {
      expect(reply.type).toBe(OPTION_REPLY.META_CONTEXT)
      const context = decodeMetaContext(reply.data)
      expect(context.id).toBe(0)
      return context.name
    })
  }

  it('lists everything without a query', () => {
    expect(listed()).toEqual(['base:allocation', 'fullstripe:init'])
  })

  it('knows exact names and namespaces as wildcards, and ignores the rest', () => {
    expect(listed('base:')).toEqual(['base:allocation'])
    expect(listed('fullstripe:')).toEqual(['fullstripe:init'])
    expect(listed('fullstripe:init', 'base:', 'base:allocation')).toEqual([
      'base:allocation',
      'fullstripe:init',
    ])
    expect(listed('base:alloc', 'qemu:', 'x-none:at-all')).toEqual([])
  })

  it('does not know every export', () => {
    expect(new Talk().only(OPTION.LIST_META_CONTEXT, meta('nobody'))).toBe(OPTION_REPLY.ERR_UNKNOWN)
    expect(new Talk().only(OPTION.LIST_META_CONTEXT, meta(''))).toBe(OPTION_REPLY.ERR_UNKNOWN)
  })
})

describe('SET_META_CONTEXT', () => {
  const select = (talk: Talk, name: string, ...queries: string[]) => {
    const replies = talk.option(OPTION.SET_META_CONTEXT, meta(name, ...queries))
    expect(replies.at(-1)?.type).toBe(OPTION_REPLY.ACK)
    return replies.slice(0, -1).map((reply) => decodeMetaContext(reply.data))
  }
  const structured = (catalog = TWO) => {
    const talk = new Talk(catalog)
    talk.option(OPTION.STRUCTURED_REPLY)
    return talk
  }
  const contextsAfterGo = (talk: Talk, name: string) => {
    talk.option(OPTION.GO, go(name))
    return talk.outcome?.kind === 'transmission' ? talk.outcome.contexts : undefined
  }

  it('selects exact names once, and no wildcards', () => {
    const talk = structured()
    expect(select(talk, 'disk', 'base:', 'fullstripe:init', 'fullstripe:init', 'base:unknown')).toEqual([
      { id: 2, name: 'fullstripe:init' },
    ])
    expect(contextsAfterGo(talk, 'disk')).toEqual([2])
  })

  it('needs structured replies or extended headers', () => {
    expect(new Talk().only(OPTION.SET_META_CONTEXT, meta('disk', 'base:allocation'))).toBe(
      OPTION_REPLY.ERR_INVALID,
    )
    const extended = new Talk()
    extended.option(OPTION.EXTENDED_HEADERS)
    expect(select(extended, 'disk', 'base:allocation')).toHaveLength(1)
  })

  it('counts only the last time', () => {
    const talk = structured()
    select(talk, 'disk', 'base:allocation', 'fullstripe:init')
    select(talk, 'disk', 'base:allocation')
    expect(contextsAfterGo(talk, 'disk')).toEqual([1])
  })

  it('replaces the selection also when it fails', () => {
    for (const data of [
      meta('nobody', 'base:allocation'),
      Buffer.alloc(3),
      Buffer.alloc(LIMITS.nbdOptionDataMax + 1),
    ]) {
      const talk = structured()
      select(talk, 'disk', 'base:allocation')
      expect(talk.only(OPTION.SET_META_CONTEXT, data)).toBeGreaterThan(2 ** 31)
      expect(contextsAfterGo(talk, 'disk')).toEqual([])
    }
  })

  it('selects nothing without queries', () => {
    const talk = structured()
    select(talk, 'disk', 'base:allocation')
    expect(select(talk, 'disk')).toEqual([])
    expect(contextsAfterGo(talk, 'disk')).toEqual([])
  })

  it('counts only for the export it named', () => {
    const talk = structured()
    select(talk, 'disk', 'base:allocation')
    expect(contextsAfterGo(talk, 'größer')).toEqual([])
  })

  it('is not forgotten by an option in between', () => {
    const talk = structured()
    select(talk, 'disk', 'base:allocation')
    talk.option(OPTION.LIST_META_CONTEXT, meta('größer'))
    talk.option(OPTION.INFO, go('größer'))
    expect(contextsAfterGo(talk, 'disk')).toEqual([1])
  })

  it('knows the default export under both of its names', () => {
    const talk = structured(catalogOf(description('alone')))
    select(talk, '', 'base:allocation')
    expect(contextsAfterGo(talk, 'alone')).toEqual([1])
  })

  it('forgets contexts that the export lost since', () => {
    let contexts = CONTEXTS
    const talk = structured({
      list: () => [{ name: 'disk', description: '' }],
      find: () => description('disk', { contexts }),
    })
    select(talk, 'disk', 'base:allocation', 'fullstripe:init')
    contexts = CONTEXTS.slice(0, 1)
    expect(contextsAfterGo(talk, 'disk')).toEqual([1])
  })

  it('finds more contexts than it allows too big', () => {
    const contexts = Array.from({ length: 65 }, (_, i) => ({ id: i + 1, name: `fullstripe:c${i}` }))
    const talk = structured(catalogOf(description('disk', { contexts })))
    const all = meta('disk', ...contexts.map((context) => context.name))
    expect(talk.only(OPTION.SET_META_CONTEXT, all)).toBe(OPTION_REPLY.ERR_TOO_BIG)
    expect(select(talk, 'disk', ...contexts.slice(1).map((context) => context.name))).toHaveLength(64)
  })

  const hex = (text: string) => Buffer.from(text.replaceAll(' ', ''), 'hex')
  for (const [what, data] of [
    ['no data', Buffer.alloc(0)],
    ['a cut name', hex('00000004 6469')],
    ['no count', hex('00000004 6469736b')],
    ['a count without queries', hex('00000004 6469736b 00000001')],
    ['a count of 2^32 - 1', hex('00000004 6469736b ffffffff 00000000')],
    ['a query longer than the option', hex('00000004 6469736b 00000001 00000005 62617365')],
    ['bytes after the last query', Buffer.concat([meta('disk', 'base:'), Buffer.alloc(1)])],
    ['a query without a namespace', meta('disk', 'allocation')],
    ['a query with an empty namespace', meta('disk', ':allocation')],
    ['an empty query', meta('disk', '')],
    ['a query that is not UTF-8', hex('00000004 6469736b 00000001 00000003 613aff')],
    ['a query of 4097 bytes', meta('disk', `base:${'x'.repeat(4092)}`)],
  ] as const) {
    for (const option of [OPTION.SET_META_CONTEXT, OPTION.LIST_META_CONTEXT]) {
      it(`finds ${what} invalid (option ${option})`, () => {
        const talk = structured()
        expect(talk.only(option, data)).toBe(OPTION_REPLY.ERR_INVALID)
        expect(talk.option(OPTION.LIST)).toHaveLength(3)
      })
    }
  }
})
