import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import type { Channel, Message } from '../../src/link/channel.ts'
import { LinkError, PeerError } from '../../src/link/errors.ts'
import { FLAG, KIND, type Kind } from '../../src/link/frame.ts'
import type { ChannelOffer, Session } from '../../src/link/session.ts'
import { isPending, until, within } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { openPair, type Pair, type PairOptions } from './pair.ts'

const MiB = 1024 * 1024

/** A pair, and the channels that its server side accepted. */
async function talking(
  options: PairOptions = {},
  onAccept: (channel: Channel, offer: ChannelOffer) => void = () => undefined,
): Promise<Pair & { accepted: Channel[] }> {
  const accepted: Channel[] = []
  const pair = await openPair({
    ...options,
    server: {
      ...options.server,
      onSession: (session) =>
        session.onChannel((offer) => {
          const channel = offer.accept()
          accepted.push(channel)
          onAccept(channel, offer)
        }),
    },
  })
  return Object.assign(pair, { accepted })
}

/** Collects what a channel gets; `gate` holds each message back from being consumed. */
function collect(messages: Message[], gate?: () => Promise<void>) {
  return (channel: Channel): void =>
    channel.onMessage((message) => {
      messages.push(message)
      return gate?.()
    })
}

const texts = (messages: readonly Message[]): string[] => messages.map(({ payload }) => payload.toString())

describe('a channel', () => {
  it('carries its parameters, messages with their types, and replies', async () => {
    let params: unknown
    const pair = await talking({}, (channel, offer) => {
      params = offer.params
      channel.onMessage((message) => {
        if (message.type === 9) void channel.replyError(message, 'NO_SPACE', 'full')
        else if (message.type === 8) void channel.replyError(message, 'ODD', 'no\u001b[2J\nway')
        else void channel.reply(message, message.type + 1, [message.payload, Buffer.from('!')])
      })
    })
    const channel = await pair.clientSession.open('name', { volume: 'v', sizes: [1, 2] })
    expect(params).toEqual({ volume: 'v', sizes: [1, 2] })
    const replies = await Promise.all(
      ['a', 'b', 'c'].map((text, type) => channel.request(type, Buffer.from(text))),
    )
    expect(texts(replies)).toEqual(['a!', 'b!', 'c!'])
    expect(replies.map(({ type }) => type)).toEqual([1, 2, 3])
    await expect(channel.request(9, Buffer.alloc(0))).rejects.toThrow(new PeerError('NO_SPACE', 'full'))
    // Its words stand in logs and on terminals.
    await expect(channel.request(8, Buffer.alloc(0))).rejects.toThrow(new PeerError('ODD', 'no [2J way'))
    await pair[Symbol.asyncDispose]()
  })

  it('goes both ways, and either side may open it', async () => {
    const pair = await talking({}, (channel) =>
      channel.onMessage((message) => void channel.send(message.type, message.payload)),
    )
    pair.clientSession.onChannel((offer) => {
      const channel = offer.accept()
      channel.onMessage((message) => void channel.reply(message, 0, Buffer.from(offer.name)))
    })
    const received: Message[] = []
    const channel = await pair.clientSession.open('echo')
    channel.onMessage((message) => void received.push(message))
    for (let type = 0; type < 10; type++) await channel.send(type, Buffer.from([type]))
    await until(() => received.length === 10, 'all echoes')
    expect(received.map(({ type }) => type)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    const back = await pair.serverSession.open('back')
    expect((await back.request(0, Buffer.alloc(0))).payload.toString()).toBe('back')
    await pair[Symbol.asyncDispose]()
  })

  it.each([
    ['ordered and urgent', { ordered: true, bulk: false }],
    ['ordered and bulk', { ordered: true, bulk: true }],
  ])('that is %s delivers in the order of the calls, whatever the sizes', async (_, options) => {
    const messages: Message[] = []
    const pair = await talking({ client: { connections: 4 } }, collect(messages))
    const channel = await pair.clientSession.open('o', null, options)
    const random = new Random(8)
    const sizes = Array.from({ length: 300 }, () =>
      random.below(8) === 0 ? random.below(MiB) : random.below(5000),
    )
    const sends = sizes.map((size, index) => channel.send(index, Buffer.alloc(size, index)))
    await Promise.all(sends)
    await channel.settled()
    expect(messages.map(({ type }) => type)).toEqual(sizes.map((_size, index) => index))
    expect(
      messages.every(
        ({ type, payload }) => payload.length === sizes[type] && payload.every((byte) => byte === type % 256),
      ),
    ).toBe(true)
    await pair[Symbol.asyncDispose]()
  })

  it('without an order uses all connections for bulk, loses nothing and repeats nothing', async () => {
    const messages: Message[] = []
    const pair = await talking({ client: { connections: 4 } }, collect(messages))
    const channel = await pair.clientSession.open('u', null, { ordered: false, bulk: true })
    for (let index = 0; index < 200; index++) await channel.send(index, Buffer.alloc(200_000, index))
    await channel.settled()
    expect(messages.map(({ type }) => type).sort((a, b) => a - b)).toEqual(
      Array.from({ length: 200 }, (_, index) => index),
    )
    expect(messages.every(({ type, payload }) => payload[777] === type)).toBe(true)
    await pair[Symbol.asyncDispose]()
  })

  it('can be read with a loop, which consumes one message at a time', async () => {
    const seen: string[] = []
    let done = false
    const pair = await talking({}, (channel) => {
      void (async () => {
        for await (const message of channel) seen.push(message.payload.toString())
        done = true
      })()
    })
    const channel = await pair.clientSession.open('loop')
    for (const text of ['one', 'two', 'three']) await channel.send(0, Buffer.from(text))
    channel.close('enough')
    await until(() => done, 'the end of the loop')
    expect(seen).toEqual(['one', 'two', 'three'])
    await pair[Symbol.asyncDispose]()
  })

  it('keeps what comes before anybody consumes it', async () => {
    const pair = await talking()
    const channel = await pair.clientSession.open('later')
    for (const text of ['one', 'two']) await channel.send(0, Buffer.from(text))
    await until(() => pair.accepted.length === 1, 'the channel')
    const settled = channel.settled()
    expect(await isPending(settled)).toBe(true)
    const messages: Message[] = []
    const [other] = pair.accepted
    if (other !== undefined) collect(messages)(other)
    await settled
    expect(texts(messages)).toEqual(['one', 'two'])
    await pair[Symbol.asyncDispose]()
  })
})

describe('backpressure', () => {
  it('stops a sender whose messages are not consumed, keeps memory bounded, and lets it go on', async () => {
    const messages: Message[] = []
    let open: () => void = () => undefined
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    const pair = await talking(
      {},
      collect(messages, () => gate),
    )
    const channel = await pair.clientSession.open('slow')
    let sent = 0
    const sending = (async () => {
      for (; sent < 40; sent++) await channel.send(0, Buffer.alloc(MiB / 2))
    })()
    await until(() => channel.outstanding + MiB / 2 > LIMITS.linkChannelWindow, 'a full window')
    expect(await isPending(sending)).toBe(true)
    expect(sent).toBeLessThanOrEqual(LIMITS.linkChannelWindow / (MiB / 2))
    const settled = channel.settled()
    expect(await isPending(settled)).toBe(true)
    open()
    await sending
    await channel.settled()
    expect(messages).toHaveLength(40)
    await pair[Symbol.asyncDispose]()
  })

  it('of one channel does not stop another, also on one connection', async () => {
    const pair = await talking({ client: { connections: 1 } }, (channel, { name }) => {
      channel.onMessage((message) =>
        name === 'stuck'
          ? new Promise<void>(() => undefined)
          : void channel.reply(message, 0, message.payload),
      )
    })
    const stuck = await pair.clientSession.open('stuck', null, { bulk: true })
    const sending = Promise.all(Array.from({ length: 30 }, () => stuck.send(0, Buffer.alloc(MiB)))).catch(
      (error: Error) => error,
    )
    await until(() => stuck.outstanding + MiB > LIMITS.linkChannelWindow, 'a full window')
    const quick = await pair.clientSession.open('quick')
    for (let index = 0; index < 50; index++) await quick.request(0, Buffer.alloc(4096))
    expect(await isPending(sending)).toBe(true)
    await pair[Symbol.asyncDispose]()
    expect(await sending).toMatchObject({ code: 'CLOSED' })
  })

  it('ends in an error for a caller who does not wait', async () => {
    const pair = await talking()
    const channel = await pair.clientSession.open('flood')
    const payload = Buffer.alloc(MiB)
    const overflows: number[] = []
    const sends = Array.from({ length: LIMITS.linkSendsWaitingMax + 20 }, (_, index) =>
      channel.send(0, payload).catch((error: LinkError) => {
        if (error.code === 'OVERFLOW') overflows.push(index)
      }),
    )
    // Nobody consumes: the first ones fill the window, as many as may wait do so, the rest fail at once.
    await sends.at(-1)
    expect(overflows.length).toBeGreaterThan(10)
    expect(overflows[0]).toBeGreaterThanOrEqual(LIMITS.linkSendsWaitingMax)
    await pair[Symbol.asyncDispose]()
    await Promise.all(sends)
  })

  it('bulk cannot starve what is urgent', async () => {
    const pair = await talking({ client: { connections: 1 } }, (channel, { name }) =>
      channel.onMessage((message) => {
        if (name === 'urgent') void channel.reply(message, 0, Buffer.alloc(0))
      }),
    )
    const bulk = await pair.clientSession.open('bulk', null, { bulk: true, ordered: false })
    const urgent = await pair.clientSession.open('urgent')
    let moved = 0
    let stop = false
    const flood = Array.from({ length: 20 }, async () => {
      for (; !stop; moved++) await bulk.send(0, Buffer.alloc(MiB))
    })
    await until(() => moved > 10, 'a flood')
    const before = moved
    for (let index = 0; index < 50; index++) await urgent.request(0, Buffer.alloc(4096))
    // Fifty times there and back: if each had waited for a whole window of bulk, far more would have passed.
    expect(moved - before).toBeLessThan((50 * LIMITS.linkConnectionWindow) / MiB / 2)
    stop = true
    await Promise.all(flood)
    await pair[Symbol.asyncDispose]()
  })
})

describe('channels', () => {
  it('are refused with the words of the other side', async () => {
    const pair = await openPair({
      server: {
        onSession: (session) =>
          session.onChannel((offer) => {
            if (offer.name === 'throws') throw new ProtocolError('these parameters make no sense')
            offer.refuse(`no ${offer.name} here`)
          }),
      },
    })
    await expect(pair.clientSession.open('mirror')).rejects.toThrow(
      'refuses the channel mirror: no mirror here',
    )
    await expect(pair.clientSession.open('throws')).rejects.toThrow('make no sense')
    await expect(pair.serverSession.open('any')).rejects.toMatchObject({ code: 'CHANNEL_REFUSED' })
    expect(pair.clientSession.counters().channels).toBe(0)
    await pair[Symbol.asyncDispose]()
  })

  it('are bounded, on both sides, and their places come back', async () => {
    const pair = await talking()
    const open: Channel[] = []
    for (;;) {
      try {
        open.push(await pair.clientSession.open('many'))
      } catch (error) {
        expect(error).toMatchObject({ code: 'OVERFLOW' })
        break
      }
    }
    expect(open.length).toBe(LIMITS.linkChannelsPerSession)
    expect(open[0]?.window).toBe(LIMITS.linkChannelWindow)
    const windows = open.reduce((sum, { window }) => sum + window, 0)
    expect(windows).toBeLessThanOrEqual(LIMITS.linkSessionWindowMax)
    for (const channel of open) channel.close()
    await until(
      () => pair.serverSession.counters().channels === 0 && pair.clientSession.counters().channels === 0,
      'all closed',
    )
    for (let round = 0; round < 200; round++) {
      const channel = await pair.clientSession.open('again')
      await channel.send(0, Buffer.alloc(10))
      channel.close()
    }
    await until(() => pair.serverSession.counters().channels === 0, 'all closed again')
    await pair[Symbol.asyncDispose]()
  })

  it('of as many mirrors as one peer may have find room, and work, with questions beside them', async () => {
    const onSession = (session: Session): void =>
      session.onChannel((offer) => {
        const channel = offer.accept(offer.name === 'mirror-data' ? { window: LIMITS.mirrorDataWindow } : {})
        channel.onMessage((message) => channel.reply(message, 0, message.payload.subarray(0, 1)))
      })
    const pair = await openPair({ server: { onSession }, client: { onSession } })
    const data = { bulk: true, ordered: false, window: LIMITS.mirrorDataWindow }
    const open: Channel[] = []
    for (let mirror = 0; mirror < LIMITS.mirrorsPerPeerMax; mirror++) {
      open.push(await pair.clientSession.open('mirror'))
      open.push(await pair.clientSession.open('mirror-data', null, data))
    }
    for (const session of [pair.clientSession, pair.serverSession]) {
      for (let question = 0; question < 32; question++) open.push(await session.open('mirror-ask'))
    }
    // Also where a window is the least, and small messages before a large one are not acknowledged yet.
    for (const channel of open.slice(-68, -64)) {
      for (const length of [300_000, LIMITS.linkPayloadMax, 1, LIMITS.linkPayloadMax, LIMITS.linkPayloadMax])
        expect((await channel.request(0, Buffer.alloc(length))).payload).toHaveLength(Math.min(1, length))
    }
    await pair[Symbol.asyncDispose]()
  })

  it('deliver what was sent before they are closed, also over other connections', async () => {
    for (let round = 0; round < 10; round++) {
      const messages: Message[] = []
      const pair = await talking({ client: { connections: 3 } }, collect(messages))
      const channel = await pair.clientSession.open('c', null, { ordered: false, bulk: true })
      for (let index = 0; index < 8; index++) await channel.send(index, Buffer.alloc(300_000))
      channel.close('that was all')
      await expect(channel.send(0, Buffer.alloc(1))).rejects.toMatchObject({ code: 'CHANNEL_CLOSED' })
      const reason = await pair.accepted[0]?.ended
      expect(reason?.message).toContain('that was all')
      expect(messages).toHaveLength(8)
      await pair[Symbol.asyncDispose]()
    }
  })

  it('closed by both sides at once are closed', async () => {
    const pair = await talking()
    const channel = await pair.clientSession.open('c')
    for (let index = 0; index < 5; index++) await channel.send(0, Buffer.alloc(1000))
    pair.accepted[0]?.close()
    channel.close()
    await until(
      () => pair.serverSession.counters().channels + pair.clientSession.counters().channels === 0,
      'both closed',
    )
    await pair[Symbol.asyncDispose]()
  })

  it('fail what has no reply yet when they are closed', async () => {
    const pair = await talking({}, (channel) => channel.onMessage(() => undefined))
    const channel = await pair.clientSession.open('c')
    const request = channel.request(0, Buffer.alloc(1))
    request.catch(() => undefined)
    await channel.settled()
    pair.accepted[0]?.close('had enough')
    await expect(request).rejects.toThrow('had enough')
    await pair[Symbol.asyncDispose]()
  })
})

describe('the end of a session', () => {
  it('fails everything on both sides, with the reason', async () => {
    const pair = await talking({}, (channel) => channel.onMessage(() => new Promise<void>(() => undefined)))
    const channel = await pair.clientSession.open('c')
    const results = [
      channel.request(0, Buffer.alloc(10)),
      ...Array.from({ length: 10 }, () => channel.send(0, Buffer.alloc(MiB))),
      channel.settled(),
    ].map((promise) =>
      promise.then(
        () => 'sent',
        (error: LinkError) => error.code,
      ),
    )
    const ended = pair.accepted[0]?.ended
    pair.serverSession.close('maintenance')
    const codes = await Promise.all(results)
    expect(codes[0]).toBe('GOODBYE')
    expect(codes.at(-1)).toBe('GOODBYE')
    expect(codes.slice(1, 3)).toEqual(['sent', 'sent'])
    expect(codes.at(-2)).toBe('GOODBYE')
    expect((await ended)?.code).toBe('CLOSED')
    expect((await pair.clientSession.ended).message).toContain('maintenance')
    await expect(channel.send(0, Buffer.alloc(1))).rejects.toMatchObject({ code: 'GOODBYE' })
    await expect(pair.clientSession.open('d')).rejects.toMatchObject({ code: 'GOODBYE' })
    await pair[Symbol.asyncDispose]()
  })

  it('comes when a message makes no sense to its user, and the other side is told', async () => {
    const pair = await talking({}, (channel) =>
      channel.onMessage(async (message) => {
        if (message.type === 1) throw new ProtocolError('type 1 is unknown')
      }),
    )
    const channel = await pair.clientSession.open('c')
    await channel.send(1, Buffer.alloc(1))
    expect((await pair.serverSession.ended).code).toBe('BAD_FRAME')
    expect((await pair.clientSession.ended).message).toContain('type 1 is unknown')
    await pair[Symbol.asyncDispose]()
  })

  it.each([
    ['no code', '{"code":"","message":"no"}'],
    ['no object', '[]'],
    ['no JSON', 'no'],
  ])(
    'comes when an error that is the reply to a request makes no sense (%s), and the request fails',
    async (_, text) => {
      const pair = await talking({}, (channel) =>
        channel.onMessage(({ id }) => {
          pair.serverSession.transmit(channel, FLAG.reply | FLAG.failed, 0, id, [Buffer.from(text)])
        }),
      )
      const channel = await pair.clientSession.open('c')
      const requests = [1, 2].map((type) => channel.request(type, Buffer.alloc(1)))
      const outcomes = await within(Promise.allSettled(requests), 'the requests')
      expect(outcomes).toMatchObject([{ reason: { code: 'BAD_FRAME' } }, { reason: { code: 'BAD_FRAME' } }])
      expect((await pair.clientSession.ended).code).toBe('BAD_FRAME')
      await pair[Symbol.asyncDispose]()
    },
  )

  it.each<[string, Kind, string]>([
    ['opened, with no window', KIND.opened, '{}'],
    ['opened, with a window for nothing', KIND.opened, '{"window":1}'],
    ['refused, without a reason', KIND.rejected, '{}'],
    ['closed before it is open', KIND.close, '{"code":"CLOSED","message":"early"}'],
  ])('comes when a channel that was asked for is %s, and whoever asked is told', async (_, kind, text) => {
    const pair = await openPair()
    pair.serverSession.onChannel(() => {
      pair.serverSession.control(kind, 1, 0, [Buffer.from(text)])
      pair.serverSession.control(KIND.opened, 1, 0, [Buffer.from(`{"window":${LIMITS.linkChannelWindow}}`)])
    })
    await expect(within(pair.clientSession.open('c'), 'an answer')).rejects.toMatchObject({
      code: 'BAD_FRAME',
    })
    expect((await pair.clientSession.ended).code).toBe('BAD_FRAME')
    await pair[Symbol.asyncDispose]()
  })

  it('throws out of a loop over a channel', async () => {
    const pair = await talking()
    const channel = await pair.clientSession.open('c')
    const loop = (async () => {
      for await (const message of channel) message.payload.fill(0)
    })()
    pair.serverSession.close('gone')
    await expect(loop).rejects.toBeInstanceOf(LinkError)
    await pair[Symbol.asyncDispose]()
  })
})

it('requests are bounded', async () => {
  const pair = await talking({}, (channel) => channel.onMessage(() => undefined))
  const channel = await pair.clientSession.open('c')
  const requests = Array.from({ length: LIMITS.linkRequestsPerChannel }, () =>
    channel.request(0, Buffer.alloc(1)),
  )
  for (const request of requests) request.catch(() => undefined)
  await expect(channel.request(0, Buffer.alloc(1))).rejects.toMatchObject({ code: 'OVERFLOW' })
  await pair[Symbol.asyncDispose]()
  await expect(requests[0]).rejects.toBeInstanceOf(LinkError)
})

it('counts what is on the wire', async () => {
  const pair = await talking({}, (channel) => channel.onMessage(() => undefined))
  const channel = await pair.clientSession.open('c')
  const before = pair.clientSession.counters().bytesOut
  await channel.send(0, Buffer.alloc(100_000))
  await channel.settled()
  const out = pair.clientSession.counters().bytesOut
  expect(out - before).toBeGreaterThanOrEqual(100_040)
  expect(out - before).toBeLessThan(100_400)
  await until(() => pair.serverSession.counters().bytesIn >= out, 'all received')
  await pair[Symbol.asyncDispose]()
})
