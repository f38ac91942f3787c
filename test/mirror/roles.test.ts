import { afterEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { Pair, type Side } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'
import type { DatapathChoice } from '../support/served-pool.ts'
import { DATAPATHS } from '../support/volumes.ts'
import { SMALL_POOL, Versions } from './versions.ts'

/** Who is primary, how that changes, and what becomes of what both sides have written. */
const SIZE = 127 * 4096 + 1024
const UNIT = 4096

const pairs: Pair[] = []
afterEach(async () => {
  await Promise.all(pairs.splice(0).map((pair) => pair.close()))
})

async function opened(datapath: DatapathChoice): Promise<Pair> {
  const pair = await Pair.open({ datapath, pool: SMALL_POOL })
  pairs.push(pair)
  return pair
}

async function mirrored(datapath: DatapathChoice, mode: 'sync' | 'async') {
  const pair = await opened(datapath)
  await pair.one.pool.createVolume({ name: 'data', size: SIZE })
  const client = await pair.one.connect('data')
  const versions = new Versions(SIZE)
  await versions.fill(client)
  await pair.one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 20 })
  await settled(pair.one)
  return { pair, client, versions }
}

/** The client has gone, and the daemon knows. */
async function leave(side: Side, client: NbdClient): Promise<void> {
  await client.close()
  await until(() => side.pool.volume('data').info().sessions === 0, 'nobody is connected')
}

async function settled(side: Side, volume = 'data'): Promise<void> {
  await side.reach(volume, side.show(volume).mode === 'sync' ? 'insync' : 'cycling')
  await until(() => side.show(volume).lag.bytes === 0, 'nothing is lacking')
}

async function equal({ one, two }: Pair, volume = 'data'): Promise<void> {
  expect((await two.content(volume)).equals(await one.content(volume))).toBe(true)
}

async function checked(pair: Pair): Promise<void> {
  for (const side of [pair.one, pair.two]) {
    await side.close()
    const { findings } = await checkPool(side.directory)
    expect(findings.filter(({ severity }) => severity === 'error')).toEqual([])
  }
}

describe.each(DATAPATHS)('roles, %s', (datapath) => {
  it.each(['sync', 'async'] as const)(
    'planned swap, and back: nothing is lost, only changes travel (%s)',
    async (mode) => {
      const { pair, client, versions } = await mirrored(datapath, mode)
      const { one, two } = pair
      await versions.write(client, 20)
      await expect(one.mirrors.demote('data')).rejects.toThrow(/connected client/)
      await expect(two.mirrors.promote('data')).rejects.toThrow(/the primary is connected/)
      await leave(one, client)
      await one.mirrors.demote('data')
      expect(versions.check(await two.content('data'), versions.now)).toBeUndefined()
      await two.mirrors.promote('data')
      expect(one.pool.volume('data').readOnly).toBe(true)
      const other = await two.connect('data')
      await settled(two)
      const { units } = two.show('data').counters
      expect(units, 'nothing has changed').toBe(0)
      await versions.write(other, 12)
      await settled(two)
      expect(two.show('data').counters.units).toBeLessThanOrEqual(12)
      expect(two.show('data').counters.signatures).toBe(0)
      expect(versions.check(await one.content('data'), versions.now)).toBeUndefined()
      await leave(two, other)
      await two.mirrors.demote('data')
      await one.mirrors.promote('data')
      await settled(one)
      const third = await one.connect('data')
      await versions.write(third, 5)
      await settled(one)
      expect(one.show('data').counters.signatures).toBe(0)
      expect(versions.check(await two.content('data'), versions.now)).toBeUndefined()
      await equal(pair)
      await checked(pair)
    },
  )

  it('a planned swap while clients write: what they were told is there', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'async')
    const { one, two } = pair
    versions.start(client)
    await until(() => versions.answers > 200, 'they write')
    await one.mirrors.demote('data', undefined, { force: true })
    await versions.stop()
    expect(versions.errors.length).toBeGreaterThan(0)
    expect(versions.check(await two.content('data'), versions.now)).toBeUndefined()
    await two.mirrors.promote('data')
    await settled(two)
    await equal(pair)
  })

  it('a secondary refuses the writes of clients, and is read', async () => {
    const { pair, versions } = await mirrored(datapath, 'sync')
    const reader = await pair.two.connect('data')
    expect(reader.readOnly).toBe(true)
    await expect(reader.write(Buffer.alloc(512), 0)).rejects.toThrow()
    await expect(pair.two.pool.volume('data').resize(SIZE * 2)).rejects.toThrow(/secondary/)
    const image = Buffer.alloc(SIZE)
    await reader.read(image, 0)
    expect(versions.check(image, versions.now)).toBeUndefined()
  })

  it.each(['sync', 'async'] as const)(
    'the primary dies, the secondary is promoted, failback (%s)',
    async (mode) => {
      const { pair, client, versions } = await mirrored(datapath, mode)
      const { one, two } = pair
      await versions.write(client, 30)
      await settled(one)
      await one.close()
      await until(() => !two.show('data').connected, 'it is noticed')
      expect(versions.check(await two.content('data'), versions.now)).toBeUndefined()
      await two.mirrors.promote('data')
      const writer = await two.connect('data')
      await versions.write(writer, 9)
      await one.open()
      await until(
        () => one.show('data').state === 'splitbrain' && two.show('data').state === 'splitbrain',
        'both know',
      )
      expect(one.show('data').remote?.role).toBe('primary')
      expect(two.show('data').remote?.role).toBe('primary')
      expect(one.show('data').local.generation).not.toBe(two.show('data').local.generation)
      await one.mirrors.resolve('data', undefined, 'local')
      await settled(two)
      expect(two.show('data').counters.units).toBeLessThanOrEqual(9)
      expect(two.show('data').counters.signatures).toBe(0)
      await equal(pair)
      await leave(two, writer)
      await two.mirrors.demote('data')
      await one.mirrors.promote('data')
      await settled(one)
      await equal(pair)
      await checked(pair)
    },
  )

  it.each(['local', 'remote'] as const)(
    'both were primary: resolve, discard %s, asked for on the first one',
    async (discard) => {
      const { pair, client, versions } = await mirrored(datapath, 'async')
      const { one, two } = pair
      pair.relay.onConnect = 'reset'
      pair.relay.cut()
      await until(() => !two.show('data').connected && !one.show('data').connected, 'it is noticed')
      await two.mirrors.promote('data')
      const there = new Versions(SIZE, 7)
      there.settle(await two.content('data'), false)
      const writer = await two.connect('data')
      await versions.write(client, 8)
      await there.write(writer, 11)
      pair.relay.onConnect = 'forward'
      await one.reach('data', 'splitbrain')
      await two.reach('data', 'splitbrain')
      await versions.write(client, 2)
      await there.write(writer, 2)
      const here = { one: await one.content('data'), two: await two.content('data') }
      expect(here.one.equals(here.two)).toBe(false)
      await client.close()
      await writer.close()
      const winner = discard === 'local' ? two : one
      const { units } = winner.show('data').counters
      await one.mirrors.resolve('data', undefined, discard)
      await settled(winner)
      expect((await winner.content('data')).equals(discard === 'local' ? here.two : here.one)).toBe(true)
      await equal(pair)
      expect(winner.show('data').counters.units - units).toBeLessThanOrEqual(23)
      expect(winner.show('data').counters.signatures).toBe(0)
      await checked(pair)
    },
  )

  it('a forced promotion while the primary is there splits the two, and is settled from the other side', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'sync')
    const { one, two } = pair
    await two.mirrors.promote('data', undefined, { force: true })
    await one.reach('data', 'splitbrain')
    await two.reach('data', 'splitbrain')
    await versions.write(client, 5)
    await two.mirrors.resolve('data', undefined, 'local')
    await settled(one)
    expect(versions.check(await two.content('data'), versions.now)).toBeUndefined()
    await equal(pair)
    expect(two.pool.volume('data').readOnly).toBe(true)
  })

  it('promotion is refused before the first copy has ended, unless forced', async () => {
    const pair = await opened(datapath)
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: SIZE })
    const client = await one.connect('data')
    await new Versions(SIZE).fill(client)
    await one.mirrors.add({ volume: 'data', peer: pair.address, rate: 65_536 })
    await one.reach('data', 'copying')
    await expect(two.mirrors.promote('data')).rejects.toThrow(/connected/)
    await expect(one.mirrors.demote('data')).rejects.toThrow()
    await one.close()
    await until(() => !two.show('data').connected, 'it is noticed')
    await expect(two.mirrors.promote('data')).rejects.toThrow(/not consistent/)
    await two.mirrors.promote('data', undefined, { force: true })
    await expect(two.mirrors.promote('data')).rejects.toThrow(/already/)
    expect(two.pool.volume('data').readOnly).toBe(false)
  })

  it.each(['one', 'two'] as const)(
    'removed on side %s: both sides are free, and can be mirrored again',
    async (where) => {
      const { pair, client, versions } = await mirrored(datapath, 'sync')
      const { one, two } = pair
      await pair[where].mirrors.remove('data')
      expect(one.mirrors.list()).toEqual([])
      expect(two.mirrors.list()).toEqual([])
      expect(two.pool.volume('data').readOnly).toBe(false)
      await versions.write(client, 4)
      await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 20 })
      await settled(one)
      expect(one.show('data').counters.units).toBeLessThanOrEqual(SIZE / UNIT + 1)
      await equal(pair)
      await checked(pair)
    },
  )

  it('two mirrors of one volume, sync and async, and one of them goes away and comes back', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'sync')
    const other = await Pair.open({ datapath, pool: SMALL_POOL })
    pairs.push(other)
    const { one } = pair
    await one.mirrors.add({
      volume: 'data',
      peer: other.address,
      mode: 'async',
      intervalMs: 20,
      name: 'far',
      target: 'copy',
    })
    const name = one.mirrors.list().find((mirror) => mirror.name !== 'far')?.name
    const both = (): boolean =>
      one.show('data', 'far').state === 'cycling' && one.show('data', name).state === 'insync'
    await until(both, 'both run')
    versions.start(client)
    await until(() => versions.answers > 300, 'they write')
    pair.relay.cut()
    await until(() => versions.answers > 500, 'they write')
    other.relay.cut()
    await until(() => versions.answers > 700, 'they write')
    await until(both, 'both run')
    await versions.stop()
    await until(() => one.mirrors.list().every(({ lag }) => lag.bytes === 0), 'nothing is lacking')
    expect(versions.errors).toEqual([])
    await equal(pair)
    expect((await other.two.content('copy')).equals(await one.content('data'))).toBe(true)
    await expect(one.mirrors.demote('data', name, { force: true })).rejects.toThrow(/other mirrors/)
  })

  it('mirrors in both directions between two daemons, each with a session of its own', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'sync')
    const { one, two } = pair
    await two.pool.createVolume({ name: 'back', size: SIZE })
    const other = await two.connect('back')
    const others = new Versions(SIZE, 3)
    versions.start(client)
    others.start(other)
    await two.mirrors.add({ volume: 'back', peer: `127.0.0.1:${one.port}`, mode: 'sync' })
    const { answers } = versions
    await until(() => versions.answers > answers + 100 && others.answers > 100, 'clients go on')
    await one.reach('data', 'insync')
    await two.reach('back', 'insync')
    await versions.stop()
    await others.stop()
    expect([...versions.errors, ...others.errors]).toEqual([])
    await equal(pair)
    await equal(pair, 'back')
  })

  it('a daemon that stops says to blocked writers that the secondary does not have it', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'sync')
    const { one } = pair
    await one.mirrors.change('data', undefined, { onLoss: 'block' })
    await settled(one)
    pair.relay.onConnect = 'reset'
    pair.relay.cut()
    await one.reach('data', 'degraded')
    const writing = versions.write(client, 1)
    await until(() => one.show('data').lag.bytes > 0, 'it is done here')
    expect(await isPending(writing)).toBe(true)
    const closing = one.close()
    await writing
    expect(versions.errors.length).toBe(1)
    await closing
    pair.relay.onConnect = 'forward'
    await one.open()
    await settled(one)
    await equal(pair)
  })
})
