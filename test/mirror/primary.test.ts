import { afterEach, describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { CommitGate, failing, failingCommits, Gate } from '../support/faults.ts'
import { Pair } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'

/** What a primary does when something of it, or of the other side, does not go on. */
const MIB = 1 << 20
const UNIT = 65536
const datapath = 'native' // it has lanes, too; all else is the same with the other

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

async function inStep(one: Pair['one']): Promise<void> {
  await one.reach('data', 'cycling', 'insync')
  await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
}

describe('a primary', () => {
  it('commits what its failed pool cannot note, and nobody is left without an answer', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 16 * MIB })
    const client = await one.connect('data')
    await client.write(Buffer.alloc(MIB, 1), 0)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 100 })
    await inStep(one)
    const gate = new CommitGate(({ putMirrors = [] }) => putMirrors.some(({ role }) => role === 'secondary'))
    await client.write(Buffer.alloc(UNIT, 2), 0)
    await until(() => gate.held.length > 0, 'the other side commits')
    const mend = failing(one.pool.datapath, 'sync', () => new StoreError('MEMBER_IO', 'member-0: no sync'))
    await expect(client.flush()).rejects.toThrow()
    gate.open()
    await one.reach('data', 'degraded')
    expect(one.show('data').reason).toContain('takes no changes')
    expect((await two.content('data')).subarray(0, UNIT).equals(Buffer.alloc(UNIT, 2))).toBe(true)
    mend()
    await one.close().catch(() => {})
    await one.open()
  })

  it('sends holes that are written to again while it waits for the other side', async () => {
    pair = await Pair.open({ datapath, pool: { chunkSize: 4096, capacity: 64 * MIB } })
    const { one, two, relay } = pair
    const size = 32 * MIB
    await one.pool.createVolume({ name: 'data', size })
    const client = await one.connect('data')
    for (let at = 0; at < size; at += MIB) await client.write(Buffer.alloc(MIB, 1), at)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 20 })
    await inStep(one)
    await one.mirrors.pause('data')
    // As much as may be on its way, and then more holes than a channel takes messages.
    for (let at = 0; at < 20 * MIB; at += MIB) await client.write(Buffer.alloc(MIB, 2), at)
    await client.trim({ offset: 20 * MIB, length: 12 * MIB })
    relay.up.bytesPerSecond = 4 * MIB
    await one.mirrors.resume('data')
    await until(() => one.show('data').progress?.what === 'cycle', 'a cycle is under way')
    const { events } = one
    const before = events.length
    const all: Promise<void>[] = []
    for (let n = 0; n < 1600; n++) all.push(client.write(Buffer.alloc(4096, 3), 20 * MIB + n * 4096))
    await Promise.all(all)
    relay.up.bytesPerSecond = Number.POSITIVE_INFINITY
    await until(() => one.show('data').lag.bytes === 0, 'nothing lacking', 20_000)
    expect(events.slice(before)).toEqual([])
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })

  it('does not let clients wait for good for the commit that makes both sides equal', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 16 * MIB })
    const client = await one.connect('data')
    await client.write(Buffer.alloc(MIB, 1), 0)
    const gate = new CommitGate(({ putMirrors = [] }) =>
      putMirrors.some(({ role, cycle }) => role === 'secondary' && cycle >= 2),
    )
    await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await until(() => gate.held.length > 0, 'the last commit')
    const write = client.write(Buffer.alloc(4096, 2), 0)
    expect(await isPending(write)).toBe(true)
    await write
    expect(gate.held.length).toBeGreaterThan(0)
    gate.open()
    await one.reach('data', 'insync')
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })

  it('goes on by itself with a session that takes the place of another', async () => {
    pair = await Pair.open({ datapath })
    const { one, two, relay } = pair
    await one.pool.createVolume({ name: 'data', size: 16 * MIB })
    const client = await one.connect('data')
    await client.write(Buffer.alloc(MIB, 1), 0)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 100 })
    await inStep(one)
    // A mirror the other way brings a session of its own; the first one cannot say that it ends.
    await two.pool.createVolume({ name: 'back', size: MIB })
    relay.stall('down')
    await two.mirrors.add({ volume: 'back', peer: `127.0.0.1:${one.port}` })
    await one.reach('data', 'degraded', 'connecting', 'negotiating')
    relay.resume()
    await inStep(one)
  })
  it('sees what clients change in a volume that could not be deleted', async () => {
    pair = await Pair.open({ datapath })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 16 * MIB })
    const client = await one.connect('data')
    await client.write(Buffer.alloc(MIB, 1), 0)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 50 })
    await inStep(one)
    await client.close()
    const mend = failingCommits(({ dropVolumes = [] }) => dropVolumes.length > 0)
    const gate = new Gate(one.pool.datapath, 'barrier')
    const deleted = one.pool.deleteVolume('data', { force: true })
    deleted.catch(() => {})
    const served = (): boolean => one.pool.volumes().some(({ name }) => name === 'data')
    // Its primary begins in a quiet moment, after a barrier.
    const watched = until(
      () => one.mirrors.list().length > 0 && gate.held.length > 0,
      'the mirror begins again',
    )
    await Promise.race([watched, deleted.catch(() => {})])
    expect(served()).toBe(false)
    gate.open()
    await expect(deleted).rejects.toThrow('not deleted')
    mend()
    expect(served()).toBe(true)
    const again = await one.connect('data')
    await again.write(Buffer.alloc(UNIT, 3), 5 * UNIT)
    await inStep(one)
    await until(() => one.show('data').counters.units > 0, 'it is sent')
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  })
})
