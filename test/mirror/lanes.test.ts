import { afterEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { Pair, type Side } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { SMALL_POOL } from './versions.ts'

/**
 * Lanes: writes of a sync mirror that the datapath makes on both sides by itself. What is shown here is that they are used where they can be,
 * and that the sides stay equal whatever writes overlap and whatever is lost.
 */
const SIZE = 255 * 4096 + 512
const SECTOR = 512

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

const laneWrites = (side: Side): number => side.pool.volume('data').info().counters.laneWrites
const upcalls = (side: Side): number => side.pool.volume('data').info().counters.upcalls

async function full(client: NbdClient): Promise<void> {
  await client.write(Buffer.alloc(SIZE, 1), 0)
}

async function expectEqual({ one, two }: Pair): Promise<void> {
  expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
}

async function mirrored(
  threads = 1,
  more: { hotRegions?: number } = {},
): Promise<{ pair: Pair; client: NbdClient }> {
  const side = { datapath: 'native', pool: SMALL_POOL, threads } as const
  const made = await Pair.open({ ...side, ...more }, side)
  pair = made
  await made.one.pool.createVolume({ name: 'data', size: SIZE })
  const client = await made.one.connect('data')
  await full(client)
  await made.one.mirrors.add({ volume: 'data', peer: made.address, mode: 'sync' })
  await made.one.reach('data', 'insync')
  // Both sides make the regions hot, and set direct bits.
  await full(client)
  return { pair: made, client }
}

describe('lanes', () => {
  it('take writes of what is formatted and hot, without a decision on either side', async () => {
    const { pair, client } = await mirrored()
    const { one, two } = pair
    await client.write(Buffer.alloc(4096, 2), 8192)
    const before = { lanes: laneWrites(one), one: upcalls(one), two: upcalls(two) }
    for (let n = 0; n < 50; n++) await client.write(Buffer.alloc(1 + ((n * 37) % 9000), n), 100 * n * 3)
    // All of them, but for what meets a look at who still writes to a region (hot-set.ts).
    expect(laneWrites(one) - before.lanes).toBeGreaterThan(45)
    expect(upcalls(one) - before.one).toBeLessThan(5)
    expect(upcalls(two) - before.two).toBeLessThan(5)
    expect(one.show('data').counters.forwarded).toBeGreaterThan(45)
    await expectEqual(pair)
    await expect(two.connect('data')).resolves.toBeDefined()
    expect(two.pool.volume('data').info().sessions).toBe(1) // lanes are no clients
  })

  it('leave alone what they cannot take: first writes, trims, zeroes, large ones, hard ones', async () => {
    const { pair, client } = await mirrored()
    const { one } = pair
    await client.write(Buffer.alloc(4096, 2), 8192)
    const before = laneWrites(one)
    await client.trim({ offset: 40_960, length: 8192 })
    await client.write(Buffer.alloc(512, 3), 40_960)
    await client.write(Buffer.alloc(200_000, 4), 100_000)
    await client.zero({ offset: 512, length: 512 }, {})
    await client.write(Buffer.alloc(4096, 5), 4096, { durable: true })
    await client.flush()
    expect(laneWrites(one)).toBe(before)
    await expectEqual(pair)
  })

  it('go on after a change of roles, whoever dials', async () => {
    const { pair, client } = await mirrored()
    const { one, two } = pair
    await client.close()
    await one.mirrors.demote('data', undefined, { force: true })
    await two.mirrors.promote('data', undefined, {})
    await two.reach('data', 'insync')
    const there = await two.connect('data')
    await full(there)
    const before = laneWrites(two)
    for (let n = 0; n < 20; n++) await there.write(Buffer.alloc(4096, n), 4096 * n)
    expect(laneWrites(two) - before).toBeGreaterThan(15)
    await expectEqual(pair)
  })

  it('are done without where one side has none', async () => {
    pair = await Pair.open(
      { datapath: 'native', pool: SMALL_POOL },
      { datapath: 'portable', pool: SMALL_POOL },
    )
    const { one } = pair
    await one.pool.createVolume({ name: 'data', size: SIZE })
    const client = await one.connect('data')
    await full(client)
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await one.reach('data', 'insync')
    await full(client)
    await client.write(Buffer.alloc(4096, 2), 8192)
    expect(laneWrites(one)).toBe(0)
    await expectEqual(pair)
  })

  it('are done without where their connections do not come through, and had again later', async () => {
    const { pair, client } = await mirrored()
    const { one, relay } = pair
    await one.mirrors.pause('data')
    relay.onConnect = 'reset' // the session stands; nothing further gets through
    await client.write(Buffer.alloc(4096, 2), 8192)
    const before = laneWrites(one)
    await one.mirrors.resume('data')
    await one.reach('data', 'insync')
    await full(client)
    for (let n = 0; n < 20; n++) await client.write(Buffer.alloc(4096, n), 4096 * n)
    expect(laneWrites(one)).toBe(before)
    await expectEqual(pair)
    relay.onConnect = 'forward'
    await one.mirrors.pause('data')
    await one.mirrors.resume('data')
    await one.reach('data', 'insync')
    await full(client)
    for (let n = 0; n < 20; n++) await client.write(Buffer.alloc(4096, n + 1), 4096 * n)
    expect(laneWrites(one) - before).toBeGreaterThan(15)
    await expectEqual(pair)
  })

  it('of an old session write nothing behind the back of the next one', async () => {
    const { pair, client } = await mirrored()
    const { one, two } = pair
    const volume = two.pool.volume('data')
    const onWay = upcalls(two)
    let over = false
    // Over there requests are held: a write that came on a lane is under way, and cannot be done.
    const held = volume.quiesce(async () => {
      const write = client.write(Buffer.alloc(4096, 7), 8192)
      await until(() => upcalls(two) > onWay, 'it has come')
      await one.mirrors.pause('data')
      await write // goes on alone
      await one.mirrors.resume('data')
      await one.reach('data', 'negotiating')
      // The other side is asked, and does not say how it stands before that write is over.
      await expect(until(() => one.show('data').state !== 'negotiating', 'answered', 500)).rejects.toThrow()
      over = true
    })
    await held
    expect(over).toBe(true)
    await one.reach('data', 'insync')
    await expectEqual(pair)
  })

  it('that a peer does not answer on hold up their own volume, and no other', async () => {
    const { pair, client } = await mirrored(1, { hotRegions: 2 })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'other', size: 8 << 20, intents: true })
    const other = await one.connect('other')
    await other.write(Buffer.alloc(4096, 1), 0)
    await client.write(Buffer.alloc(4096, 6), 8192)
    const onWay = { lanes: laneWrites(one), upcalls: upcalls(two) }
    let write: Promise<void> | undefined
    await two.pool.volume('data').quiesce(async () => {
      write = client.write(Buffer.alloc(4096, 7), 8192)
      await until(() => upcalls(two) > onWay.upcalls, 'it has come')
      expect(laneWrites(one)).toBe(onWay.lanes + 1)
      // First writes to more regions than may be hot at a time, trims, and what finds a quiet moment.
      for (let region = 0; region < 8; region++) await other.write(Buffer.alloc(4096, region), region << 20)
      await other.trim({ offset: 0, length: 1 << 20 })
      await other.flush()
      await one.pool.volume('other').resize(9 << 20)
      await one.mirrors.add({ volume: 'other', peer: pair.address, mode: 'sync' })
      await one.reach('other', 'insync')
      // Meanwhile its region has to be known as one that may differ.
      expect(one.pool.volume('data').intentMap?.hotCount).toBe(1)
      expect(await isPending(write)).toBe(true)
    })
    await write
    expect(one.show('data').state).toBe('insync')
    await expectEqual(pair)
    expect((await two.content('other')).equals(await one.content('other'))).toBe(true)
  })

  it('end before the volume gets another size, while clients write', async () => {
    const { pair } = await mirrored(2)
    const { one, two } = pair
    const random = new Random(11)
    let sizes = 0
    const resizing = async (): Promise<void> => {
      for (const size of [SIZE - 512 - 8 * 4096, SIZE, SIZE - 512 - 20 * 4096, SIZE - 512]) {
        const lanes = laneWrites(one)
        await until(() => laneWrites(one) > lanes + 50, 'writes go on lanes')
        await one.pool.volume('data').resize(size, { force: true })
        await until(() => two.pool.volume('data').size === size, 'the other side follows')
        await one.reach('data', 'insync')
        sizes++
      }
    }
    const resized = resizing()
    await Promise.all([resized, overlapping(one, random, () => sizes < 4)])
    await expectEqual(pair)
  }, 60_000)

  it.each([1, 3])(
    'with %i threads: everything at once, over each other, and the sides are equal',
    async (threads) => {
      const { pair } = await mirrored(threads)
      const { one } = pair
      const random = new Random(threads)
      const before = laneWrites(one)
      await overlapping(one, random, () => laneWrites(one) - before < 5000)
      await expectEqual(pair)
    },
    60_000,
  )

  it('with a network that is cut, damaged and cut short again and again: clients notice nothing, the sides are equal', async () => {
    const { pair } = await mirrored(2)
    const { one, relay } = pair
    const random = new Random(7)
    let hurts = 0
    const hurting = async (): Promise<void> => {
      for (; hurts < 6; hurts++) {
        await one.reach('data', 'insync')
        const lanes = laneWrites(one)
        await until(() => laneWrites(one) > lanes + 50, 'writes go on lanes', 20_000)
        // Lanes are the connections that came last; one of them, or all of a session's.
        const last = relay.accepted - 1 - random.below(2)
        if (hurts % 4 === 0) relay.cut(last)
        else if (hurts % 4 === 1) relay.corrupt(hurts < 4 ? 'up' : 'down', random.below(5000), last)
        else if (hurts % 4 === 2) relay.truncate('up', random.below(5000), last)
        else relay.cut()
        await until(() => one.show('data').state !== 'insync', 'it is noticed', 20_000)
      }
    }
    const hurt = hurting()
    await Promise.all([hurt, overlapping(one, random, () => hurts < 6)])
    relay.resume()
    await one.reach('data', 'insync')
    await until(() => one.show('data').lag.bytes === 0, 'nothing is lacking')
    await expectEqual(pair)
  }, 120_000)
})

/** Eight connections with four requests each, on a little of the volume. */
async function overlapping(side: Side, random: Random, running: () => boolean): Promise<void> {
  const area = 160 * 1024
  await Promise.all(
    Array.from({ length: 8 }, async () => {
      const client = await side.connect('data')
      const one = async (): Promise<void> => {
        while (running()) {
          const most = random.pick([1, 1, 8, 8, 40, 200])
          const length = (1 + random.below(most)) * SECTOR
          const offset = random.below(area / SECTOR) * SECTOR
          const kind = random.below(100)
          if (kind < 88) await client.write(random.bytes(length), offset, { durable: kind === 0 })
          else if (kind < 92) await client.trim({ offset, length })
          else if (kind < 97) await client.zero({ offset, length }, { release: kind < 94 })
          else await client.flush()
        }
      }
      await Promise.all([one(), one(), one(), one()])
      await client.close()
    }),
  )
}
