import { afterEach, describe, expect, it, vi } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import type { Channel, Message } from '../../src/link/channel.ts'
import { LinkError } from '../../src/link/errors.ts'
import type { LinkServer } from '../../src/link/server.ts'
import type { ChannelOffer, Session } from '../../src/link/session.ts'
import { type ExpectedWire, SideDoor } from '../../src/link/side-wires.ts'
import { ask } from '../../src/mirror/asks.ts'
import { LinkRemote } from '../../src/mirror/link-remote.ts'
import {
  CHANNELS,
  encodeEnds,
  encodePage,
  encodeRanges,
  json,
  LANES_CAPABILITY,
  MESSAGE,
  NO_MORE,
  readOperations,
} from '../../src/mirror/protocol.ts'
import type { PrimaryHello, RemoteHello, RemoteOperation } from '../../src/mirror/remote.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { connect, listen, openPair } from '../link/pair.ts'
import { failingCommits } from '../support/faults.ts'
import { Pair, Side } from '../support/mirror-pair.ts'
import { isPending, until, within } from '../support/poll.ts'
import { SMALL_POOL } from './versions.ts'

/**
 * Peers that have proved who they are and then say what makes no sense, or nothing; and more at once than the link takes. The mirror ends
 * its session, says which peer it was, and tries again; the daemon and other mirrors go on, and whoever waits is told.
 */
const NOTHING = Buffer.alloc(0)
const UNIT = 4096

const HELLO: PrimaryHello = {
  generation: { current: 'one', history: [] },
  base: 'one',
  cycle: 0,
  size: 1 << 20,
  initialized: false,
  changed: 0,
  mode: 'sync',
  intervalMs: 1000,
  onLoss: 'continue',
  unitBytes: UNIT,
}
const GOOD_HELLO: RemoteHello = {
  role: 'secondary',
  generation: null,
  base: '',
  consistent: false,
  cycle: 0,
  size: 1 << 20,
  stage: 'stage',
  changed: 0,
  blank: true,
}
const LONG_HISTORY = Array.from({ length: LIMITS.generationsKept + 1 }, (_, index) => `g${index}`)
const NEWER_HELLO = { ...GOOD_HELLO, generation: { current: 'two', history: LONG_HISTORY } }

type Answer = (message: Message, channel: Channel) => unknown

const closers: (() => Promise<unknown>)[] = []
afterEach(async () => {
  vi.restoreAllMocks()
  for (const close of closers.splice(0).reverse()) await close()
})

/** Takes a mirror's channels, and answers as it is told. */
function secondary(answer: Answer): (offer: ChannelOffer) => void {
  return (offer) => {
    const channel = offer.accept()
    channel.onMessage((message) => {
      const pending = answer(message, channel)
      return pending instanceof Promise ? pending : undefined
    })
  }
}

async function remoteOf(
  answer: Answer,
  side: 'dials' | 'listens' = 'dials',
): Promise<{ session: Session; remote: LinkRemote }> {
  const capabilities = [{ name: LANES_CAPABILITY, required: false }]
  const pair = await openPair({ server: { capabilities }, client: { capabilities } })
  closers.push(async () => pair[Symbol.asyncDispose]())
  const [session, other] =
    side === 'dials' ? [pair.clientSession, pair.serverSession] : [pair.serverSession, pair.clientSession]
  other.onChannel(secondary(answer))
  return { session, remote: await LinkRemote.open(session, 'relation') }
}

const replying =
  (...parts: Buffer[]): Answer =>
  (message, channel) =>
    channel.reply(message, message.type, parts)

const write = (length: number, payload: RemoteOperation['payload'] = () => {}): RemoteOperation => ({
  kind: 'write',
  offset: 0,
  length,
  flags: 0,
  payload,
})

describe('an answer that makes no sense', () => {
  const hello = (remote: LinkRemote): Promise<unknown> => remote.hello(HELLO)
  const bitmap = async (remote: LinkRemote): Promise<void> => {
    for await (const _ of remote.bitmap('realized'));
  }
  const signatures = (remote: LinkRemote): Promise<unknown> =>
    remote.signatures([
      { offset: 0, length: UNIT },
      { offset: UNIT, length: UNIT },
    ])
  const lanes = (remote: LinkRemote): Promise<unknown> => remote.lanes(2)

  it.each([
    ['hello: no JSON', hello, Buffer.from('{'), /not JSON/],
    ['hello: no object', hello, json([1]), /an object is due/],
    ['hello: a newer one, which remembers more', hello, json(NEWER_HELLO), /history has more than/],
    ['a page of a bitmap: cut short', bitmap, Buffer.alloc(7), /cut short/],
    ['a page of a bitmap: a number without bounds', bitmap, Buffer.alloc(16, 255), /too large/],
    ['a page of a bitmap: the same again and again', bitmap, Buffer.alloc(17), /does not end/],
    ['signatures: one is missing', signatures, Buffer.alloc(32), /32 bytes, 64 are due/],
    ['signatures: none', signatures, NOTHING, /0 bytes, 64 are due/],
    ['signatures: too many', signatures, Buffer.alloc(96), /96 bytes, 64 are due/],
    ['lanes: no tokens', lanes, json({ count: 2 }), /tokens is not a list/],
    ['lanes: tokens that are none', lanes, json({ count: 2, tokens: ['0', '1'] }), /a token/],
  ])('%s', async (_, question, answer, what) => {
    const { session, remote } = await remoteOf(replying(answer))
    const failure = await question(remote).catch((error: unknown) => error)
    expect(failure).toMatchObject({ name: 'RemoteError', fate: 'lost' })
    expect(String(failure)).toMatch(/an answer of the peer accepting makes no sense/)
    expect(String(failure)).toMatch(what)
    expect(await within(remote.ended, 'the end')).toBe(failure)
    await expect(remote.flush()).rejects.toBe(failure)
    // Others use the session, and the mirror may try again.
    expect(session.endReason).toBeUndefined()
    await until(() => session.counters().channels === 0, 'both channels are gone')
    await LinkRemote.open(session, 'relation')
  })

  it('that is an error, and no sense: the session ends, and whoever asked is told', async () => {
    const { session, remote } = await remoteOf((message, channel) => channel.replyError(message, '', ''))
    await expect(within(remote.hello(HELLO), 'an answer')).rejects.toMatchObject({ fate: 'lost' })
    expect((await session.ended).code).toBe('BAD_FRAME')
  })
})

describe('the end of an operation', () => {
  it('that was not sent is none: no request is over before its payload is read', async () => {
    const ids: number[] = []
    let control: Channel | undefined
    const { session, remote } = await remoteOf((message, channel) => {
      if (message.type !== MESSAGE.operations) return
      control = channel
      ids.push(...readOperations(message.payload).map(({ id }) => id))
      return new Promise<void>(() => {}) // not consumed: the window fills
    })
    let read = 0
    const outcomes = Array.from({ length: 64 }, () =>
      remote.apply(write(128 * 1024, () => read++)).then(
        () => 'done',
        (error: { fate: string }) => error.fate,
      ),
    )
    await until(() => ids.length > 20, 'a full window')
    expect(await isPending(Promise.race(outcomes))).toBe(true)
    expect(read).toBeLessThan(64)
    const before = read
    await control?.send(MESSAGE.ends, encodeEnds([{ id: 64, errno: 0 }]))
    expect((await session.ended).message).toMatch(/operation 64 ends, and was not sent/)
    expect(new Set(await Promise.all(outcomes))).toEqual(new Set(['lost']))
    expect(read).toBe(before)
  })
})

describe('more at once than a channel takes', () => {
  it('flushes are shared: each is answered by one that began after it was asked for', async () => {
    const asked: (() => void)[] = []
    const { remote } = await remoteOf((message, channel) => {
      if (message.type === MESSAGE.flush) asked.push(() => void channel.reply(message, message.type, NOTHING))
    })
    const first = remote.flush()
    await until(() => asked.length === 1, 'the first one')
    const rest = Promise.all(
      Array.from({ length: LIMITS.linkRequestsPerChannel + 1000 }, () => remote.flush()),
    )
    asked[0]?.()
    await first
    await until(() => asked.length === 2, 'the next one')
    expect(await isPending(rest)).toBe(true)
    asked[1]?.()
    await within(rest, 'all of them')
    expect(asked).toHaveLength(2)
  })

  it('requests: it is the end of the session for this mirror, and all are told', async () => {
    const { session, remote } = await remoteOf(() => {})
    const fences = Array.from({ length: LIMITS.linkRequestsPerChannel + 1 }, () => remote.fence())
    const results = await within(Promise.allSettled(fences), 'all of them')
    expect(results.every(({ status }) => status === 'rejected')).toBe(true)
    expect(await remote.ended).toMatchObject({
      fate: 'lost',
      message: expect.stringMatching(/too many requests/),
    })
    expect(session.endReason).toBeUndefined()
  })

  it('operations: likewise, and none is forgotten', async () => {
    const { remote } = await remoteOf(() => new Promise<void>(() => {}))
    const large = { ...HELLO, base: 'x'.repeat(1 << 20) }
    const hellos = Array.from({ length: 4 }, () => remote.hello(large)) // the last one does not fit into the window
    const fences = Array.from({ length: LIMITS.linkSendsWaitingMax - 1 }, () => remote.fence())
    const all = Promise.allSettled([...hellos, ...fences])
    expect(await isPending(Promise.race([all, remote.ended]))).toBe(true)
    await expect(within(remote.apply(write(512)), 'the operation')).rejects.toMatchObject({ fate: 'lost' })
    expect(await remote.ended).toMatchObject({ message: expect.stringMatching(/too many messages/) })
    await within(all, 'all of them')
  })

  it('channels: the mirror is refused, and leaves none behind', async () => {
    const { session, remote } = await remoteOf(() => {})
    remote.close('enough')
    await until(() => session.counters().channels === 0, 'both are gone')
    const others = LIMITS.linkChannelsPerSession - 1
    for (let index = 0; index < others; index++) await session.open('other')
    await expect(LinkRemote.open(session, 'relation')).rejects.toMatchObject({
      fate: 'refused',
      message: expect.stringMatching(/too many channels/),
    })
    await until(() => session.counters().channels === others, 'only the others are left')
  })

  it('connections that are waited for: there are no lanes, and the places of those come back', async () => {
    const asked: number[] = []
    const { session, remote } = await remoteOf((message, channel) => {
      asked.push(message.type)
      return channel.reply(message, message.type, NOTHING)
    }, 'listens')
    const { sideWires } = session
    if (sideWires?.side !== 'listens') throw new Error('the primary listens')
    const expected: ExpectedWire[] = []
    for (let index = 0; index < LIMITS.linkHandshakesMax - 3; index++) expected.push(sideWires.expect())
    expect(await remote.lanes(4)).toEqual([])
    expect(asked).toEqual([])
    for (let index = 0; index < 3; index++) expected.push(sideWires.expect())
    for (const { cancel } of expected) cancel()
    await remote.fence()
  })
})

describe('a mirror whose secondary makes no sense', () => {
  let side: Side
  let server: LinkServer

  /** A daemon, and a peer that is none: it says what `answers` has for a type of message, or nothing. */
  async function started(answers: Record<number, Answer>, unitBytes: unknown = UNIT) {
    const asks: string[] = []
    const messages: number[] = []
    side = await Side.create({ datapath: 'portable', pool: SMALL_POOL })
    closers.push(() => side.destroy())
    server = await listen({
      name: 'stranger',
      capabilities: [{ name: 'mirror-1', required: true }],
      onSession: (session) =>
        session.onChannel((offer) => {
          secondary((message, channel) => {
            if (offer.name !== CHANNELS.ask) {
              messages.push(message.type)
              return message.id === 0
                ? undefined
                : (answers[message.type] ?? replying(NOTHING))(message, channel)
            }
            const { kind } = JSON.parse(message.payload.toString()) as { kind: string }
            asks.push(kind)
            return channel.reply(message, 1, kind === 'create' ? json({ unitBytes }) : json([]))
          })(offer)
        }),
    })
    closers.push(() => server.close())
    await side.pool.createVolume({ name: 'data', size: 1 << 20 })
    const client = await side.connect('data')
    await client.write(Buffer.alloc(UNIT, 1), 0)
    const peer = `127.0.0.1:${server.address.port}`
    const add = (): Promise<unknown> =>
      side.mirrors.add({ volume: 'data', peer, mode: 'async', init: 'signature', intervalMs: 20 })
    return { client, add, asks, messages }
  }

  it('at hello: it says so, and goes on when that is mended', async () => {
    let hello: unknown = NEWER_HELLO
    const { client, add } = await started({
      [MESSAGE.hello]: (message, channel) => channel.reply(message, message.type, json(hello)),
      [MESSAGE.bitmap]: replying(...encodePage(0, NO_MORE, NOTHING)),
      [MESSAGE.signatures]: replying(Buffer.alloc(32)),
    })
    await add()
    const said = /an answer of the peer stranger makes no sense: hello of a secondary: history has more/
    await until(() => said.test(side.show('data').reason ?? ''), 'it says so')
    expect(side.show('data').state).toBe('connecting')
    await client.write(Buffer.alloc(UNIT, 2), UNIT)
    hello = GOOD_HELLO
    await side.reach('data', 'cycling')
    await until(() => side.show('data').lag.bytes === 0, 'nothing is lacking')
  })

  it('when sides are compared: it says so, and the daemon goes on', async () => {
    const { client, add, messages } = await started({
      [MESSAGE.hello]: replying(json(GOOD_HELLO)),
      [MESSAGE.signatures]: replying(Buffer.alloc(5)),
    })
    await add()
    const said = /an answer of the peer stranger makes no sense: signatures of 5 bytes, 32 are due/
    await until(() => said.test(side.show('data').reason ?? ''), 'it says so')
    const times = (): number => messages.filter((type) => type === MESSAGE.signatures).length
    const before = times()
    await until(() => times() > before, 'it tries again')
    await client.write(Buffer.alloc(UNIT, 2), UNIT)
  })

  it.each([
    ['no number', '4096', /unitBytes is not a whole number/],
    ['a unit that is none here', UNIT + 1, /unitBytes is no multiple of 4096/],
  ])('when it is added, %s: it is not added, and not left over there', async (_, unitBytes, what) => {
    const { add, asks } = await started({}, unitBytes)
    const failure = await add().catch((error: unknown) => error)
    expect(failure).toMatchObject({ name: 'UserError', message: expect.stringMatching(what) })
    expect(String(failure)).toMatch(/an answer of the peer stranger makes no sense/)
    expect(asks).toEqual(['create', 'remove'])
    expect(side.mirrors.list()).toEqual([])
  })

  it('when it is removed: it is removed here, and that is said', async () => {
    const { add, asks } = await started({ [MESSAGE.hello]: replying(json(GOOD_HELLO)) })
    await add()
    await side.mirrors.remove('data')
    expect(asks).toEqual(['create', 'remove'])
    const told = side.events.find(({ kind }) => kind === 'mirror.removed')
    expect(told?.message).toMatch(/the other side could not be told/)
  })
})

describe('a primary that makes no sense', () => {
  it('is cut off when it asks for more signatures than a message has room for; the daemon goes on', async () => {
    const side = await Side.create({ datapath: 'portable', pool: SMALL_POOL })
    closers.push(() => side.destroy())
    const sessions: Session[] = []
    const capabilities = [{ name: 'mirror-1', required: true }]
    const client = connect(side.port, { capabilities, onSession: (session) => sessions.push(session) })
    closers.push(() => client.close())
    await until(() => sessions.length > 0, 'a session')
    const session = sessions[0] as Session
    const size = 1 << 20
    const { mode, intervalMs, onLoss, unitBytes } = HELLO
    const record = { mode, intervalMs, onLoss, unitBytes, size, fill: 0, init: 'full' }
    await ask(session, 'create', {
      ...record,
      relation: 'one',
      name: 'stranger',
      from: 'data',
      volume: 'data',
    })
    const control = await session.open(CHANNELS.control, { relation: 'one' })
    const data = await session.open(CHANNELS.data, { relation: 'one' }, { bulk: true, ordered: false })
    const hello = { ...HELLO, unitBytes: side.show('data').unitBytes }
    await control.request(MESSAGE.hello, json(hello))
    const sign = (count: number): Promise<Message> =>
      data.request(
        MESSAGE.signatures,
        encodeRanges(Array.from({ length: count }, (_, offset) => ({ offset, length: 1 }))),
      )
    const { payload } = await sign(5_000)
    expect(payload.length).toBe(5_000 * 32)
    await expect(within(sign(40_000), 'an answer')).rejects.toMatchObject({ name: 'LinkError' })
    expect((await session.ended).message).toMatch(/40000 ranges, \d+ are the most/)
    await until(() => sessions.length > 1, 'it is let in again')
  })
})

describe('a pair of daemons', () => {
  async function opened(datapath: 'native' | 'portable'): Promise<Pair> {
    const pair = await Pair.open({ datapath, pool: SMALL_POOL })
    closers.push(() => pair.close())
    await pair.one.pool.createVolume({ name: 'data', size: 1 << 20 })
    return pair
  }

  it('answers thousands of flushes that its clients ask for at once', async () => {
    const pair = await opened('portable')
    const { one } = pair
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await one.reach('data', 'insync')
    const inFlightMax = LIMITS.requestsInFlightPerConnection
    const connect = (): Promise<NbdClient> => NbdClient.connect(one.uri('data'), { inFlightMax })
    const clients = await Promise.all(Array.from({ length: 20 }, connect))
    const { upcalls } = one.pool.volume('data').info().counters
    pair.relay.stall()
    const flushes = Promise.all(
      clients.flatMap((client) => Array.from({ length: 250 }, () => client.flush())),
    )
    await until(
      () => one.pool.volume('data').info().counters.upcalls >= upcalls + 5000,
      'all of them are under way',
    )
    pair.relay.resume()
    await within(flushes, 'all of them')
    expect(one.show('data').state).toBe('insync')
    await Promise.all(clients.map((client) => client.close()))
  })

  it('does without lanes, on either side, where too many connections are waited for', async () => {
    const pair = await opened('native')
    const { one, two } = pair
    const expecting = vi.spyOn(SideDoor.prototype, 'expect').mockImplementation(() => {
      throw new LinkError('OVERFLOW', 'too many further connections are waited for')
    })
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await one.reach('data', 'insync') // the secondary listens
    expect(expecting).toHaveBeenCalledTimes(1)
    await one.mirrors.demote('data', undefined, { force: true })
    await two.mirrors.promote('data', undefined, {})
    await two.reach('data', 'insync') // the primary listens
    expect(expecting).toHaveBeenCalledTimes(2)
    const client = await two.connect('data')
    for (let n = 0; n < 5; n++) await client.write(Buffer.alloc(UNIT, n), UNIT)
    expect(two.pool.volume('data').info().counters.laneWrites).toBe(0)
    expect((await one.content('data')).equals(await two.content('data'))).toBe(true)
  })

  it('says so where the secondary cannot store the mirror', async () => {
    const pair = await opened('portable')
    const { one, two } = pair
    const mend = failingCommits(({ putMirrors = [] }) => putMirrors.some(({ role }) => role === 'secondary'))
    await expect(one.mirrors.add({ volume: 'data', peer: pair.address }).finally(mend)).rejects.toThrow(
      /the peer says: .*disk full/,
    )
    expect(one.mirrors.list()).toEqual([])
    expect(two.pool.volumes()).toEqual([])
    await one.mirrors.add({ volume: 'data', peer: pair.address })
    await one.reach('data', 'cycling')
  })
})
