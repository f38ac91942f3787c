import { afterEach, describe, expect, it } from 'vitest'
import type { MirrorInfo } from '../../src/mirror/types.ts'
import { Pair } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'
import type { DatapathChoice } from '../support/served-pool.ts'
import { DATAPATHS } from '../support/volumes.ts'
import { SMALL_POOL, snapshot, Versions } from './versions.ts'

/**
 * A bad network between the two sides, in every state of a mirror, while clients write: it comes back by itself, what the secondary holds
 * is a point in time at every moment from its first consistent commit on, and clients notice nothing.
 */
const SIZE = 255 * 4096 + 512
const STATES = ['copying', 'cycling', 'insync'] as const
type State = (typeof STATES)[number]

const pairs: Pair[] = []
afterEach(async () => {
  await Promise.all(pairs.splice(0).map((pair) => pair.close()))
})

interface Fault {
  readonly name: string
  hurt(pair: Pair): void
  heal(pair: Pair): void
  /** Whether the session ends by it; else it goes on afterwards. */
  readonly ends: boolean
}

const latest = (pair: Pair, back: number): number => pair.relay.accepted - back

const FAULTS: readonly Fault[] = [
  { name: 'cut', ends: true, hurt: ({ relay }) => relay.cut(), heal: () => {} },
  {
    name: 'cut, and nobody there for a while',
    ends: true,
    hurt: ({ relay }) => {
      relay.onConnect = 'reset'
      relay.cut()
    },
    heal: ({ relay }) => {
      relay.onConnect = 'forward'
    },
  },
  {
    name: 'stalled for a while',
    ends: false,
    hurt: ({ relay }) => relay.stall(),
    heal: ({ relay }) => relay.resume(),
  },
  {
    name: 'stalled one way',
    ends: false,
    hurt: ({ relay }) => relay.stall('down'),
    heal: ({ relay }) => relay.resume(),
  },
  {
    name: 'a damaged frame',
    ends: true,
    hurt: (pair) => {
      for (const back of [1, 2]) pair.relay.corrupt('up', 100, latest(pair, back))
    },
    heal: () => {},
  },
  {
    name: 'a damaged frame of the secondary',
    ends: true,
    hurt: (pair) => {
      for (const back of [1, 2]) pair.relay.corrupt('down', 60, latest(pair, back))
    },
    heal: () => {},
  },
  {
    name: 'a frame cut short',
    ends: true,
    hurt: (pair) => {
      for (const back of [1, 2]) pair.relay.truncate('up', 500, latest(pair, back))
    },
    heal: () => {},
  },
  {
    name: 'half open, the primary is gone',
    ends: true,
    hurt: ({ relay }) => relay.halfOpen('near'),
    heal: () => {},
  },
  {
    name: 'half open, the secondary is gone',
    ends: true,
    hurt: ({ relay }) => relay.halfOpen('far'),
    heal: () => {},
  },
]

async function prepared(datapath: DatapathChoice, state: State, onLoss: 'continue' | 'block' = 'continue') {
  const pair = await Pair.open({ datapath, pool: SMALL_POOL })
  pairs.push(pair)
  await pair.one.pool.createVolume({ name: 'data', size: SIZE })
  const client = await pair.one.connect('data')
  const versions = new Versions(SIZE)
  await versions.fill(client)
  const rate = state === 'copying' ? 1 << 20 : null
  const mode = state === 'insync' ? 'sync' : 'async'
  await pair.one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 20, onLoss, rate })
  if (state === 'copying')
    await until(() => pair.one.show('data').counters.units > 20, 'the copy is under way')
  else await pair.one.reach('data', state)
  return { pair, client, versions }
}

/** Reads the secondary again and again. */
class Watch {
  #stop = false
  readonly #done: Promise<void>
  readonly problems: string[] = []
  images = 0

  constructor(pair: Pair, versions: Versions) {
    const look = async (): Promise<void> => {
      while (!this.#stop) {
        await new Promise((resolve) => setImmediate(resolve))
        if (!pair.two.show('data').consistent) continue
        const problem = versions.check(await snapshot(() => pair.two.content('data')))
        if (problem !== undefined) this.problems.push(problem)
        this.images++
      }
    }
    this.#done = look()
  }

  async stop(): Promise<void> {
    this.#stop = true
    await this.#done
  }
}

async function goOn(pair: Pair, state: State): Promise<MirrorInfo> {
  await pair.one.mirrors.change('data', undefined, { rate: null })
  const info = await pair.one.reach('data', state === 'insync' ? 'insync' : 'cycling')
  await until(() => pair.one.show('data').lag.bytes === 0, 'nothing is lacking', 20_000)
  return info
}

describe.each(DATAPATHS)('a bad network, %s', (datapath) => {
  it.each(FAULTS)(
    '$name: it comes back by itself',
    async (fault) => {
      await Promise.all(
        STATES.map(async (state) => {
          const { pair, client, versions } = await prepared(datapath, state)
          const watch = new Watch(pair, versions)
          versions.start(client)
          const before = pair.two.events.length
          fault.hurt(pair)
          if (fault.ends) {
            await until(
              () => pair.one.events.some(({ message }) => /(degraded|connecting): /.test(message)),
              'it is noticed',
              20_000,
            )
          } else {
            const { counters } = pair.one.show('data')
            const { answers } = versions
            if (state !== 'insync') await until(() => versions.answers > answers + 20, 'clients go on')
            expect(pair.one.show('data').counters.cycles).toBeLessThanOrEqual(counters.cycles + 1)
          }
          fault.heal(pair)
          const { answers } = versions
          await until(() => versions.answers > answers + 20, 'clients go on', 20_000)
          await pair.one.reach(
            'data',
            state === 'copying' ? 'copying' : state,
            state === 'insync' ? 'insync' : 'cycling',
          )
          await versions.stop()
          await goOn(pair, state)
          await watch.stop()
          expect(watch.problems, `${state}, ${fault.name}`).toEqual([])
          expect(versions.errors).toEqual([])
          const content = await pair.two.content('data')
          expect(versions.check(content, versions.now), `${state}, ${fault.name}`).toBeUndefined()
          expect(content.equals(await pair.one.content('data'))).toBe(true)
          expect(pair.two.events.length).toBeGreaterThanOrEqual(before)
        }),
      )
    },
    60_000,
  )

  it('a slow peer lengthens the cycles, and clients do not wait for it', async () => {
    const { pair, client, versions } = await prepared(datapath, 'cycling')
    pair.relay.up.bytesPerSecond = 500_000
    const watch = new Watch(pair, versions)
    versions.start(client)
    const { cycles } = pair.one.show('data').counters
    await until(() => pair.one.show('data').counters.cycles > cycles + 3, 'some cycles', 30_000)
    const { answers } = versions
    await until(() => versions.answers > answers + 100, 'clients go on', 30_000)
    await versions.stop()
    pair.relay.up.bytesPerSecond = Number.POSITIVE_INFINITY
    await goOn(pair, 'cycling')
    await watch.stop()
    expect(watch.images).toBeGreaterThan(0)
    expect(watch.problems).toEqual([])
    expect((await pair.two.content('data')).equals(await pair.one.content('data'))).toBe(true)
  })

  it.each(['cycling', 'insync'] as const)('after a break only what changed is sent: %s', async (state) => {
    const { pair, client, versions } = await prepared(datapath, state)
    await until(() => pair.one.show('data').lag.bytes === 0, 'nothing is lacking')
    pair.relay.onConnect = 'reset'
    pair.relay.cut()
    await pair.one.reach('data', 'degraded')
    const before = pair.one.show('data').counters
    await versions.write(client, 10)
    const { bytes } = pair.one.show('data').lag
    expect(bytes).toBeGreaterThan(0)
    expect(bytes).toBeLessThanOrEqual(10 * 4096)
    const passed = pair.relay.passed.up
    pair.relay.onConnect = 'forward'
    await goOn(pair, state)
    const after = pair.one.show('data').counters
    expect(after.sentBytes - before.sentBytes).toBeLessThanOrEqual(10 * 4096)
    expect(after.units - before.units).toBe(bytes / 4096)
    expect(after.signatures).toBe(before.signatures)
    expect(pair.relay.passed.up - passed).toBeLessThan(10 * 4096 + 16_384)
    expect((await pair.two.content('data')).equals(await pair.one.content('data'))).toBe(true)
  })

  it('on-loss block: what was asked for during a break is answered when both have it', async () => {
    const { pair, client, versions } = await prepared(datapath, 'insync', 'block')
    pair.relay.onConnect = 'reset'
    pair.relay.cut()
    await pair.one.reach('data', 'degraded')
    const writing = versions.write(client, 1).then(async () => {
      const image = await pair.two.content('data')
      return versions.check(image, versions.now)
    })
    const flushing = client.flush()
    await until(() => pair.one.show('data').lag.bytes > 0, 'the write is done here')
    expect(await isPending(writing)).toBe(true)
    expect(await isPending(flushing)).toBe(true)
    pair.relay.onConnect = 'forward'
    expect(await writing).toBeUndefined()
    await flushing
    expect(pair.one.show('data').state).toBe('insync')
    expect(versions.errors).toEqual([])
  })

  it('on-loss block: whoever pauses the mirror, or says `continue`, lets clients go on', async () => {
    for (const way of ['pause', 'continue'] as const) {
      const { pair, client, versions } = await prepared(datapath, 'insync', 'block')
      pair.relay.onConnect = 'reset'
      pair.relay.cut()
      await pair.one.reach('data', 'degraded')
      const writing = versions.write(client, 3)
      await until(() => pair.one.show('data').lag.bytes > 0, 'the write is done here')
      if (way === 'pause') await pair.one.mirrors.pause('data')
      else await pair.one.mirrors.change('data', undefined, { onLoss: 'continue' })
      await writing
      pair.relay.onConnect = 'forward'
      if (way === 'pause') await pair.one.mirrors.resume('data')
      await goOn(pair, 'insync')
      expect((await pair.two.content('data')).equals(await pair.one.content('data'))).toBe(true)
    }
  })

  it('on-loss block, asked for while the link is down: no write goes past it', async () => {
    const { pair, client, versions } = await prepared(datapath, 'insync', 'continue')
    pair.relay.onConnect = 'reset'
    pair.relay.cut()
    await pair.one.reach('data', 'degraded')
    await versions.fill(client) // from here on writes would go in place
    await pair.one.mirrors.change('data', undefined, { onLoss: 'block' })
    const writing = versions.write(client, 1)
    await client.read(Buffer.alloc(4096), 0)
    expect(await isPending(writing)).toBe(true)
    pair.relay.onConnect = 'forward'
    await writing
    expect(versions.check(await pair.two.content('data'), versions.now)).toBeUndefined()
  })

  it('more isolated units than a channel takes requests at a time', async () => {
    const pair = await Pair.open({ datapath, pool: { ...SMALL_POOL, capacity: 256 << 20 } })
    pairs.push(pair)
    const { one, two } = pair
    const size = 48 << 20
    await one.pool.createVolume({ name: 'data', size })
    const client = await one.connect('data')
    for (let at = 0; at < size; at += 16 << 20) await client.write(Buffer.alloc(16 << 20, 7), at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 20 })
    await one.reach('data', 'cycling')
    pair.relay.onConnect = 'reset'
    pair.relay.cut()
    await one.reach('data', 'degraded')
    for (let at = 0; at < size; at += 8 << 20) {
      const trims = Array.from({ length: 1024 }, (_, i) => ({ offset: at + i * 8192, length: 4096 }))
      await Promise.all(trims.map((range) => client.trim(range)))
    }
    pair.relay.onConnect = 'forward'
    await one.reach('data', 'cycling')
    await until(() => one.show('data').lag.bytes === 0, 'nothing is lacking', 20_000)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  }, 60_000)
})
