/** The link over a bad network: whatever happens, what arrives is what was sent, once; what does not is reported; and it comes back. */
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { afterEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import type { Channel, ChannelOptions } from '../../src/link/channel.ts'
import type { LinkClient } from '../../src/link/client.ts'
import { crc32c } from '../../src/link/crc32c.ts'
import { LinkError } from '../../src/link/errors.ts'
import { newIdentity } from '../../src/link/identity.ts'
import type { LinkServer } from '../../src/link/server.ts'
import type { Session } from '../../src/link/session.ts'
import { FaultRelay, type FaultRelayOptions } from '../support/fault-relay.ts'
import { isPending, until, within } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { connect, listen } from './pair.ts'

const MiB = 1024 * 1024
/** Short enough to wait for, long enough for a busy machine. */
const SILENCE_MS = 1000

interface Rig {
  readonly server: LinkServer
  readonly relay: FaultRelay
  readonly client: LinkClient
  readonly received: ReadonlyMap<number, number> // number of a message -> how often it came
  readonly damaged: readonly number[]
  readonly serverEnds: readonly LinkError[]
  readonly clientEnds: readonly LinkError[]
  /** The session that stands now, on both sides. */
  session(): Promise<Session>
  open(options?: ChannelOptions): Promise<Channel>
  close(): Promise<void>
}

let rigs: Rig[] = []
afterEach(async () => {
  for (const rig of rigs) await rig.close()
  rigs = []
})

interface RigOptions extends Partial<FaultRelayOptions> {
  readonly connections?: number
  readonly silenceMs?: number
}

/** Two ends with a relay between them, and what became of each of their sessions. */
async function openRig({
  connections = 2,
  silenceMs = SILENCE_MS,
  ...network
}: RigOptions = {}): Promise<Rig> {
  const received = new Map<number, number>()
  const damaged: number[] = []
  const serverEnds: LinkError[] = []
  const clientEnds: LinkError[] = []
  const common = { silenceMs, handshakeMs: 3000 }
  const server = await listen({
    ...common,
    onSession: (session) => {
      void session.ended.then((reason) => serverEnds.push(reason))
      session.onChannel((offer) => {
        const channel = offer.accept()
        channel.onMessage((message) => {
          const number = message.payload.readUInt32LE(0)
          received.set(number, (received.get(number) ?? 0) + 1)
          if (crc32c(message.payload.subarray(8)) !== message.payload.readUInt32LE(4)) damaged.push(number)
          if (message.id !== 0)
            channel.reply(message, 0, message.payload.subarray(0, 4)).catch(() => undefined)
        })
      })
    },
  })
  const relay = await FaultRelay.open({ port: server.address.port, ...network })
  let session: Session | undefined
  const client = connect(relay.port, {
    ...common,
    connections,
    retryMs: { min: 10, max: 200 },
    onSession: (found) => {
      session = found
    },
    onLost: (reason) => void clientEnds.push(reason),
    onRefused: (reason) => void clientEnds.push(reason),
  })
  const rig: Rig = {
    server,
    relay,
    client,
    received,
    damaged,
    serverEnds,
    clientEnds,
    async session(): Promise<Session> {
      await until(
        () => client.state === 'connected' && server.sessions().some(({ id }) => id === session?.id),
        'a session on both sides',
      )
      if (session === undefined) throw new Error('no session')
      return session
    },
    async open(options: ChannelOptions = {}): Promise<Channel> {
      return (await rig.session()).open('test', null, options)
    },
    async close(): Promise<void> {
      await client.close()
      await server.close()
      await relay.close()
    },
  }
  rigs.push(rig)
  return rig
}

let lastNumber = 0
/** A message that tells whether it arrived as it was sent. */
function numbered(size: number): { number: number; payload: Buffer } {
  const number = ++lastNumber
  const payload = Buffer.alloc(Math.max(8, size), number)
  payload.writeUInt32LE(number, 0)
  payload.writeUInt32LE(crc32c(payload.subarray(8)), 4)
  return { number, payload }
}

interface Traffic {
  readonly replied: Set<number>
  readonly failed: LinkError[]
  readonly done: Promise<void>
  stop(): void
}

/** Requests of many sizes, some at a time, until the session fails or somebody stops them. */
function traffic(channel: Channel, random: Random, atOnce = 8): Traffic {
  const replied = new Set<number>()
  const failed: LinkError[] = []
  let stopped = false
  const one = async (): Promise<void> => {
    while (!stopped && failed.length === 0) {
      const { number, payload } = numbered(random.below(4) === 0 ? random.below(MiB) : random.below(9000))
      try {
        const reply = await channel.request(0, payload)
        expect(reply.payload.readUInt32LE(0)).toBe(number)
        replied.add(number)
      } catch (error) {
        if (!(error instanceof LinkError)) throw error
        failed.push(error)
      }
    }
  }
  const all = Array.from({ length: atOnce }, one)
  return {
    replied,
    failed,
    done: Promise.all(all).then(() => undefined),
    stop: () => {
      stopped = true
    },
  }
}

/** What was replied to arrived; nothing arrived twice or changed. */
function checkReceived(rig: Rig, replied: Iterable<number>): void {
  for (const number of replied) expect(rig.received.get(number)).toBe(1)
  expect([...rig.received.values()].every((count) => count === 1)).toBe(true)
  expect(rig.damaged).toEqual([])
}

describe('a link', () => {
  it('that is cut fails what was on its way, and comes back, again and again', async () => {
    const rig = await openRig()
    const random = new Random(11)
    for (let round = 0; round < 8; round++) {
      const flow = traffic(await rig.open(), random)
      await until(() => flow.replied.size > round, 'traffic')
      rig.relay.cut(round % 2 === 0 ? undefined : rig.relay.accepted - 1)
      await within(flow.done, 'the end of the traffic')
      expect(flow.failed.length).toBeGreaterThan(0)
      for (const { fate } of flow.failed) expect(fate).toBe('loss')
      checkReceived(rig, flow.replied)
    }
    await rig.session()
  })

  it('that stalls is lost on both sides, and comes back', async () => {
    const rig = await openRig()
    const flow = traffic(await rig.open(), new Random(12))
    await until(() => flow.replied.size > 5, 'traffic')
    rig.relay.stall()
    await within(flow.done, 'the end of the traffic')
    expect(new Set(flow.failed.map(({ code }) => code))).toEqual(new Set(['SILENT']))
    await until(() => rig.serverEnds.length === 1, 'the end on the other side')
    // The client may be back before the other side has given up: then it takes the place of the old session.
    expect(['SILENT', 'REPLACED']).toContain(rig.serverEnds[0]?.code)
    checkReceived(rig, flow.replied)
    await rig.session()
  })

  it('that stalls in one direction is lost, whichever it is', async () => {
    for (const direction of ['up', 'down'] as const) {
      const rig = await openRig({ connections: 1 })
      await rig.session()
      rig.relay.stall(direction)
      await until(
        () => rig.clientEnds.length > 0 && rig.serverEnds.length > 0,
        `the end on both sides: ${direction}`,
      )
    }
  })

  it.each(['near', 'far'] as const)('whose %s end is gone without a word is lost', async (gone) => {
    const rig = await openRig()
    await rig.session()
    rig.relay.halfOpen(gone)
    const ends = gone === 'near' ? rig.serverEnds : rig.clientEnds
    await until(() => ends.length > 0, 'the end on the side that is left')
    expect(['SILENT', 'REPLACED']).toContain(ends[0]?.code)
    await rig.session()
  })

  it('that damages a byte anywhere ends that session, delivers nothing wrong, and comes back', async () => {
    const rig = await openRig()
    const random = new Random(13)
    for (let round = 0; round < 12; round++) {
      const flow = traffic(await rig.open(), random, 4)
      await until(() => flow.replied.size > 3, 'traffic')
      const session = await rig.session()
      rig.relay.corrupt(round % 3 === 0 ? 'down' : 'up', random.below(5000), rig.relay.accepted - 2)
      const reason = await within(session.ended, 'the end of the session')
      await within(flow.done, 'the end of the traffic')
      expect(reason).toBeInstanceOf(LinkError)
      checkReceived(rig, flow.replied)
    }
    const codes = new Set([...rig.serverEnds, ...rig.clientEnds].map(({ code }) => code))
    expect([...codes].some((code) => code.startsWith('BAD_'))).toBe(true)
    await rig.session()
  })

  it('that ends inside a frame ends with that, and comes back', async () => {
    const rig = await openRig({ connections: 1 })
    const channel = await rig.open()
    const request = channel.request(0, numbered(100_000).payload)
    rig.relay.truncate('up', 50_000, 0)
    await expect(request).rejects.toBeInstanceOf(LinkError)
    await until(() => rig.serverEnds.length > 0, 'the end on the accepting side')
    expect(rig.serverEnds[0]?.code).toBe('TRUNCATED')
    expect(rig.received.size).toBe(0)
    await rig.session()
  })

  it('that is damaged during the handshake makes no session out of it, and comes back', async () => {
    const rig = await openRig({ connections: 1 })
    await rig.session()
    for (let offset = 0; offset < 900; offset += 83) {
      // The next connection is damaged at that offset.
      const accepted = rig.relay.accepted
      rig.relay.cut()
      await until(() => rig.relay.accepted > accepted && rig.relay.connections > 0, 'a new connection')
      rig.relay.corrupt(offset % 2 === 0 ? 'up' : 'down', offset, rig.relay.accepted - 1)
      await rig.session()
      if (rig.client.state === 'waiting') rig.client.retryNow()
    }
    // What is damaged further on than a handshake reaches has not come up yet.
    rig.relay.cut()
    await until(() => rig.client.state !== 'connected', 'the end of the last session')
    const channel = await rig.open()
    const { number, payload } = numbered(1000)
    await channel.request(0, payload)
    checkReceived(rig, [number])
  })

  it('to a peer that accepts and says nothing is given up, and tried again', async () => {
    const rig = await openRig()
    await rig.session()
    rig.relay.onConnect = 'mute'
    rig.relay.cut()
    await until(() => rig.clientEnds.some(({ code }) => code === 'LATE'), 'a handshake that is late')
    rig.relay.onConnect = 'reset'
    const before = rig.clientEnds.length
    const reset = (): boolean =>
      rig.clientEnds.slice(before).some(({ code }) => code === 'UNREACHABLE' || code === 'CUT')
    await until(reset, 'a connection that is reset')
    rig.relay.onConnect = 'forward'
    await rig.session()
  })

  it('with delays, jitter and connections of different length keeps order where it was asked for', async () => {
    const rig = await openRig({
      connections: 4,
      delayMs: 2,
      jitterMs: 6,
      delayOfConnection: (index) => (index % 4) * 7,
    })
    const ordered = await rig.open({ ordered: true, bulk: true })
    const free = await rig.open({ ordered: false, bulk: true })
    const [inOrder, mixed] = [ordered, free].map(() =>
      Array.from({ length: 60 }, () => numbered(40_000)),
    ) as [ReturnType<typeof numbered>[], ReturnType<typeof numbered>[]]
    await Promise.all([
      ...inOrder.map(({ payload }) => ordered.send(0, payload)),
      ...mixed.map(({ payload }) => free.send(0, payload)),
    ])
    await Promise.all([ordered.settled(), free.settled()])
    checkReceived(
      rig,
      [...inOrder, ...mixed].map(({ number }) => number),
    )
    const order = (messages: typeof inOrder): number[] => {
      const wanted = new Set(messages.map(({ number }) => number))
      return [...rig.received.keys()].filter((number) => wanted.has(number))
    }
    expect(order(inOrder)).toEqual(inOrder.map(({ number }) => number))
    expect(order(mixed)).not.toEqual(mixed.map(({ number }) => number))
  })

  it('that is slow is not lost for that, and what is urgent does not wait behind what is not', async () => {
    const rig = await openRig({ bytesPerSecond: 8 * MiB })
    const bulk = await rig.open({ bulk: true, ordered: false })
    const urgent = await rig.open()
    const sending = (async () => {
      for (let index = 0; index < 16; index++) await bulk.send(0, numbered(MiB).payload)
      await bulk.settled()
    })()
    let requests = 0
    while (await isPending(sending)) {
      await urgent.request(0, numbered(4096).payload)
      requests++
    }
    await sending
    // Two seconds of bulk: had each request waited for it, there would be a handful.
    expect(requests).toBeGreaterThan(20)
    expect([...rig.clientEnds, ...rig.serverEnds]).toEqual([])
  })

  it('full of bulk has room for what is urgent at once, also with one connection', async () => {
    const rig = await openRig({ connections: 1, silenceMs: 60_000 })
    const urgent = await rig.open()
    const bulk: Channel[] = []
    for (let index = 0; index < 3; index++) bulk.push(await rig.open({ bulk: true }))
    rig.relay.stall()
    const flood = bulk.flatMap((channel) =>
      Array.from({ length: 4 }, () => channel.send(0, numbered(MiB).payload)),
    )
    await until(async () => isPending(flood.at(-1) ?? Promise.resolve()), 'bulk that waits')
    await within(urgent.send(0, numbered(MiB).payload), 'an urgent message')
    expect(await isPending(flood.at(-1) ?? Promise.resolve())).toBe(true)
    rig.relay.resume()
    await Promise.all([urgent, ...bulk].map((channel) => channel.settled()))
    expect(rig.received.size).toBe(13)
  })

  it('that has room again lets go what is urgent first, however long bulk has waited', async () => {
    const rig = await openRig({ connections: 1, silenceMs: 60_000 })
    const bulk = await rig.open({ bulk: true })
    const urgent: Channel[] = []
    for (let index = 0; index < 4; index++) urgent.push(await rig.open())
    rig.relay.stall()
    const session = await rig.session()
    const first = urgent.flatMap((channel) =>
      Array.from({ length: 3 }, () => channel.send(0, numbered(MiB).payload)),
    )
    expect(session.counters().outstanding).toBeGreaterThan(LIMITS.linkConnectionWindow - 2 * MiB)
    const late = numbered(MiB)
    const later = numbered(MiB)
    const sends = [bulk.send(0, late.payload), urgent[0]?.send(0, later.payload)]
    expect(await isPending(Promise.any(sends))).toBe(true)
    rig.relay.resume()
    await Promise.all([...first, ...sends])
    await Promise.all([bulk, ...urgent].map((channel) => channel.settled()))
    const order = [...rig.received.keys()]
    expect(order).toHaveLength(14)
    expect(order.indexOf(later.number)).toBeLessThan(order.indexOf(late.number))
  })

  it('that takes nothing for a while holds the sender back, with bounded memory', async () => {
    const rig = await openRig({ silenceMs: 60_000 })
    const channel = await rig.open({ bulk: true, ordered: false })
    const session = await rig.session()
    rig.relay.stall()
    let sent = 0
    const sending = (async () => {
      for (; sent < 64; sent++) await channel.send(0, numbered(MiB).payload)
    })()
    await until(() => channel.outstanding + MiB > LIMITS.linkChannelWindow, 'a full window')
    expect(await isPending(sending)).toBe(true)
    expect(session.counters().outstanding).toBeLessThan(LIMITS.linkConnectionWindow + MiB)
    expect(sent).toBeLessThanOrEqual(LIMITS.linkChannelWindow / MiB)
    rig.relay.resume()
    await sending
    await channel.settled()
    expect(rig.received.size).toBe(64)
  })
})

it('thousands of connections come and go and leave nothing behind', async () => {
  setFlagsFromString('--expose-gc')
  const collectGarbage: () => void = runInNewContext('gc')
  const server = await listen({ onSession: (session) => session.onChannel((offer) => void offer.accept()) })
  const identities = Array.from({ length: 4 }, () => newIdentity())
  const count = (): number =>
    process.getActiveResourcesInfo().filter((kind) => kind.startsWith('TCPSocket')).length
  const round = async (index: number): Promise<void> => {
    const identity = identities[index % 4] as (typeof identities)[number]
    let client: ReturnType<typeof connect> | undefined
    const session = await new Promise<Session>((resolve) => {
      client = connect(server.address.port, {
        identity,
        name: `peer ${index % 4}`,
        purpose: `purpose ${index}`,
        connections: 1 + (index % 3),
        onSession: resolve,
      })
    })
    if (index % 2 === 0) await (await session.open('c')).send(0, Buffer.alloc(10_000))
    if (index % 5 === 0) session.fail(new LinkError('CUT', 'cut by the test'))
    await client?.close()
  }
  const run = async (from: number, rounds: number): Promise<void> => {
    let next = from
    await Promise.all(
      Array.from({ length: 4 }, async () => {
        while (next < from + rounds) await round(next++)
      }),
    )
    await until(() => server.sessions().length === 0 && server.handshakes === 0, 'no session left')
    await until(() => count() === 0, 'no socket left')
  }
  await run(0, 120)
  collectGarbage()
  const before = process.memoryUsage().heapUsed
  await run(120, 900)
  collectGarbage()
  // Less than a kilobyte a connection is what the garbage collector leaves lying about.
  expect(process.memoryUsage().heapUsed - before).toBeLessThan(1800 * 1024)
  await server.close()
}, 150_000)
