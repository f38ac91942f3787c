import { afterEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { Pair } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import type { DatapathChoice } from '../support/served-pool.ts'

const MIB = 1 << 20
const UNIT = 64 * 1024
const SIZE = 96 * MIB

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

const DATAPATHS: DatapathChoice[] = ['native', 'portable']

describe.each(DATAPATHS)('a peer behind a slow line, %s', (datapath) => {
  it('gets a point in time, although everything is overwritten before it is sent; clients do not wait for the line', async () => {
    pair = await Pair.open({ datapath })
    const { one, two, relay } = pair
    await one.pool.createVolume({ name: 'data', size: SIZE })
    const client = await one.connect('data', ['base:allocation', 'fullstripe:init'])
    const before = new Random(1).bytes(MIB)
    for (let at = 0; at < SIZE; at += MIB) await client.write(before, at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 10 })
    await one.reach('data', 'cycling')
    await until(() => one.show('data').lag.bytes === 0, 'nothing lacking', 30_000)

    // A cycle with all of it begins, over a line that takes minutes for it.
    relay.up.bytesPerSecond = MIB
    const point = new Random(2).bytes(MIB)
    await one.mirrors.pause('data')
    for (let at = 0; at < SIZE; at += MIB) await client.write(point, at)
    const { cycle } = one.show('data')
    await one.mirrors.resume('data')
    await until(() => one.show('data').progress?.what === 'cycle', 'a cycle', 30_000)
    await one.mirrors.change('data', undefined, { intervalMs: 3_600_000 }) // no other cycle follows it
    // Everything changes: more than memory may keep is saved meanwhile, and no write waits for the line.
    const after = new Random(3).bytes(MIB)
    for (let at = 0; at < SIZE; at += MIB) await client.write(after, at)
    expect(one.show('data').cycle).toBe(cycle)
    expect(one.show('data').counters.saves * UNIT).toBeGreaterThan(2 * LIMITS.mirrorSavedMax)
    expect((await two.content('data')).subarray(0, MIB).equals(before)).toBe(true)

    relay.up.bytesPerSecond = Number.POSITIVE_INFINITY
    await until(() => one.show('data').cycle > cycle, 'the commit', 30_000)
    // Exactly what was there at the close, whatever came since.
    const image = await two.content('data')
    for (let at = 0; at < SIZE; at += MIB) expect(image.subarray(at, at + MIB).equals(point)).toBe(true)
    await one.mirrors.change('data', undefined, { intervalMs: 10 })
    await until(() => one.show('data').lag.bytes === 0, 'nothing lacking', 30_000)
    const there = await two.content('data')
    for (let at = 0; at < SIZE; at += MIB) expect(there.subarray(at, at + MIB).equals(after)).toBe(true)
    await one.restart()
    expect(one.pool.info().used).toBe(SIZE)
  }, 60_000)
})
