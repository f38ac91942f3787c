import { afterEach, describe, expect, it } from 'vitest'
import { Pair } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import type { DatapathChoice } from '../support/served-pool.ts'

const MIB = 1 << 20

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

const DATAPATHS: DatapathChoice[] = ['native', 'portable']

describe.each(DATAPATHS)('a mirror, %s', (datapath) => {
  it('async: what was there before, and what comes while it runs', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 64 * MIB })
    const client = await one.connect('data')
    const random = new Random(1)
    for (let i = 0; i < 20; i++) {
      await client.write(random.bytes(65536), random.below(1000) * 65536)
    }
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 100 })
    for (let i = 0; i < 200; i++) {
      await client.write(random.bytes(4096), random.below(16000) * 4096)
      if (i % 20 === 0) await client.trim({ offset: random.below(900) * 65536, length: 5 * 65536 })
    }
    await one.reach('data', 'cycling')
    const info = await settled(one)
    expect(info.consistent).toBe(true)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })

  it('a volume that nobody writes to is copied with one commit', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 64 * MIB })
    const client = await one.connect('data')
    const random = new Random(2)
    for (let at = 0; at < 40 * MIB; at += MIB) await client.write(random.bytes(MIB), at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 3_600_000 })
    await one.reach('data', 'cycling')
    expect((await settled(one)).counters.cycles).toBe(1)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })

  it('a volume that is written to while it is copied is one point in time in the end', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 64 * MIB })
    const client = await one.connect('data')
    const random = new Random(3)
    for (let at = 0; at < 64 * MIB; at += MIB) await client.write(random.bytes(MIB), at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 100 })
    // What is staged already, and what is still to be sent, changes again, or goes away.
    while (one.show('data').state !== 'cycling') {
      await client.write(random.bytes(65536), random.below(1000) * 65536)
      await client.trim({ offset: random.below(1000) * 65536, length: 3 * 65536 })
    }
    await settled(one)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })

  it('sync: every answered write is on both sides', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 64 * MIB })
    const client = await one.connect('data')
    const random = new Random(1)
    for (let i = 0; i < 20; i++) await client.write(random.bytes(65536), random.below(1000) * 65536)
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await one.reach('data', 'insync')
    for (let i = 0; i < 200; i++) {
      await client.write(random.bytes(4096), random.below(16000) * 4096)
      if (i % 20 === 0) await client.trim({ offset: random.below(900) * 65536, length: 5 * 65536 })
    }
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })
})

describe('a mirror', () => {
  it('compares volumes of large copy units', async () => {
    pair = await Pair.open({ datapath: 'native' })
    const { one, two } = pair
    const unit = 16 * MIB
    const size = 17 * unit // more than one question may ask about
    for (const side of [one, two]) {
      await side.pool.createVolume({ name: 'data', size, formatUnit: unit / 65536 })
      const client = await side.connect('data')
      for (let at = 0; at < size; at += unit) await client.write(Buffer.alloc(4096, 1), at)
      await client.close()
    }
    await (await one.connect('data')).write(Buffer.alloc(4096, 2), 5 * unit)
    await one.mirrors.add({ volume: 'data', peer: pair.address })
    await one.reach('data', 'cycling')
    expect((await settled(one)).counters.units).toBe(1)
    await one.mirrors.verify('data', undefined)
    await until(() => one.show('data').verify?.ended !== null, 'the end of the comparison')
    expect(one.show('data').verify).toMatchObject({ failure: null, differing: 0, compared: size })
  })

  it('has all of its rate after each interruption', async () => {
    pair = await Pair.open({ datapath: 'portable' })
    const { one } = pair
    await one.pool.createVolume({ name: 'data', size: 64 * MIB })
    const client = await one.connect('data')
    const random = new Random(4)
    for (let at = 0; at < 64 * MIB; at += MIB) await client.write(random.bytes(MIB), at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, rate: 8 * MIB })
    // What waits for its turn when it is interrupted is two seconds' worth: it must not be paid for.
    for (let round = 0; round < 20; round++) {
      const before = one.show('data').counters.sentBytes
      await until(() => one.show('data').counters.sentBytes > before, 'something is sent')
      await one.mirrors.pause('data')
      await one.mirrors.resume('data')
    }
  })
})

async function settled(one: Pair['one']) {
  await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
  return one.show('data')
}
