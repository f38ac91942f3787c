import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { FormatUnit } from '../../src/datapath/datapath.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { failingCommits, Gate } from '../support/faults.ts'
import { until } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS, expectSame, readAll } from '../support/volumes.ts'

/** Resizes against whatever else goes on at the same time, and against a store that fails in the middle of them. */
const STRIPE = 64 * 1024

describe.each(DATAPATHS)('resizing over %s', (datapath) => {
  let base: string
  let directory: string
  let served: ServedPool

  beforeEach(() => {
    base = mkdtempSync(join(tmpdir(), 'fullstripe-resize-'))
    directory = join(base, 'pool')
  })
  let mend = (): void => {}
  afterEach(async () => {
    mend()
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  async function start(volume: Omit<VolumeCreateOptions, 'name'>, slots = 64): Promise<NbdClient> {
    await createPool(directory, { capacity: slots * STRIPE })
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', ...volume })
    return served.connect('v')
  }
  async function restart(): Promise<NbdClient> {
    await served.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', findings: [] })
    served = await ServedPool.open(directory, datapath)
    return served.connect('v')
  }

  it('never shows again what a shrink cut off, after growth and a restart', async () => {
    const client = await start({ size: 20 * STRIPE })
    await client.write(Buffer.alloc(20 * STRIPE, 0xcc), 0)
    await client.flush()
    const second = await restart() // the pages of the maps are in LMDB, and clean
    const expected = Buffer.alloc(20 * STRIPE)
    expected.fill(0xcc, 0, 5 * STRIPE)
    await served.pool.volume('v').resize(5 * STRIPE, { force: true })
    await served.pool.volume('v').resize(20 * STRIPE)
    expectSame(await readAll(second), expected, 'before the restart')
    expectSame(await readAll(await restart()), expected, 'after the restart')
  })

  it('gives back the slots of stripes that are first written past the new end while it shrinks', async () => {
    const client = await start({ size: 16 * STRIPE }, 16)
    await client.write(Buffer.alloc(4 * STRIPE, 1), 0)
    const gate = new Gate(served.pool.datapath, 'formatUnit', (request: FormatUnit) => request.stripe >= 8)
    const late = Array.from({ length: 8 }, (_, i) =>
      client.write(Buffer.alloc(4096, 2), (8 + i) * STRIPE).catch((e) => e),
    )
    await until(() => gate.held.length > 0, 'the writes past the new end are being formatted')
    const shrunk = served.pool.volume('v').resize(6 * STRIPE, { force: true })
    // More of them come while the shrink is under way.
    const later = Array.from({ length: 8 }, (_, i) =>
      client.write(Buffer.alloc(512, 3), (8 + i) * STRIPE + 8192).catch((e) => e),
    )
    await new Promise((resolve) => setTimeout(resolve, 20))
    gate.open()
    await shrunk
    await Promise.all([...late, ...later]) // answered, one way or the other
    await served.pool.volume('v').resize(16 * STRIPE)
    const expected = Buffer.alloc(16 * STRIPE)
    expected.fill(1, 0, 4 * STRIPE)
    const larger = await served.connect('v')
    expectSame(await readAll(larger), expected, 'grown again')
    // Every slot is free or in use: the pool takes exactly as much as it has room for.
    await larger.write(Buffer.alloc(12 * STRIPE, 4), 4 * STRIPE)
    expected.fill(4, 4 * STRIPE)
    expectSame(await readAll(await restart()), expected, 'full')
  })

  it('leaves nothing of a write that waited at the new end beyond it', async () => {
    const client = await start({ size: 4 * STRIPE, fill: 7 })
    await client.write(Buffer.alloc(512, 1), 2 * STRIPE)
    const gate = new Gate(served.pool.datapath, 'writeSlot') // the shrink blanks the rest of its last stripe
    const shrunk = served.pool.volume('v').resize(2 * STRIPE + 4096, { force: true })
    await until(() => gate.held.length > 0, 'the shrink is at its last stripe')
    const zeroed = client.zero({ offset: 2 * STRIPE, length: 2 * STRIPE }).catch((e) => e)
    const written = client.write(Buffer.alloc(STRIPE, 2), 2 * STRIPE).catch((e) => e)
    await new Promise((resolve) => setTimeout(resolve, 20))
    gate.open()
    await Promise.all([shrunk, zeroed, written])
    await served.pool.volume('v').resize(4 * STRIPE)
    const target = Buffer.alloc(2 * STRIPE - 4096)
    await (await served.connect('v')).read(target, 2 * STRIPE + 4096)
    expectSame(target, Buffer.alloc(2 * STRIPE - 4096, 7), 'past the cut')
  })

  it('is as it was when a shrink cannot be stored, and can be tried again', async () => {
    const client = await start({ size: 16 * STRIPE, formatUnit: 2 }, 16)
    await client.write(Buffer.alloc(16 * STRIPE, 1), 0)
    mend = failingCommits()
    await expect(served.pool.volume('v').resize(5 * STRIPE, { force: true })).rejects.toThrow(/disk full/)
    expect(served.pool.volume('v').size).toBe(16 * STRIPE)
    await client.write(Buffer.alloc(STRIPE, 2), 12 * STRIPE) // past the end that was refused
    await client.write(Buffer.alloc(STRIPE, 3), 1 * STRIPE)
    mend()
    const target = Buffer.alloc(STRIPE)
    await client.read(target, 12 * STRIPE)
    expectSame(target, Buffer.alloc(STRIPE, 2), 'written after the failed shrink')
    await served.pool.volume('v').resize(5 * STRIPE, { force: true })
    await served.pool.volume('v').resize(16 * STRIPE)
    const expected = Buffer.alloc(16 * STRIPE)
    expected.fill(1, 0, 5 * STRIPE)
    expected.fill(3, STRIPE, 2 * STRIPE)
    expectSame(await readAll(await restart()), expected, 'shrunk at the second attempt')
    expect(served.pool.info().slotsUsed).toBe(6)
  })

  it('is as it was when a growth cannot be stored, and can be tried again', async () => {
    const client = await start({ size: 3 * STRIPE, formatUnit: 2 }, 16)
    await client.write(Buffer.alloc(3 * STRIPE, 1), 0)
    mend = failingCommits()
    await expect(served.pool.volume('v').resize(12 * STRIPE)).rejects.toThrow(/disk full/)
    await client.write(Buffer.alloc(STRIPE, 2), 2 * STRIPE)
    mend()
    await served.pool.volume('v').resize(12 * STRIPE)
    const larger = await served.connect('v')
    const expected = Buffer.alloc(12 * STRIPE)
    expected.fill(1, 0, 2 * STRIPE)
    expected.fill(2, 2 * STRIPE, 3 * STRIPE)
    expectSame(await readAll(larger), expected, 'grown at the second attempt')
    expectSame(await readAll(await restart()), expected, 'after a restart')
  })

  it('keeps what is written past the old end from a trim that began before the growth', async () => {
    const units = 1100 // a trim takes 1024 in one step
    const stripe = 4096
    await createPool(directory, { capacity: 16 * 1024 * 1024, chunkSize: stripe })
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', size: (2 * units - 1) * stripe, formatUnit: 2 })
    const client = await served.connect('v')
    await client.write(Buffer.alloc(client.size, 1), 0)
    let barriers = 0
    const gate = new Gate(served.pool.datapath, 'barrier', () => barriers++ === 0)
    const trimmed = client.trim({ offset: 0, length: client.size })
    await until(() => gate.held.length > 0, 'the first step of the trim')
    await served.pool.volume('v').resize(2 * units * stripe)
    const larger = await served.connect('v')
    const written = Buffer.alloc(stripe, 9)
    await larger.write(written, (2 * units - 1) * stripe)
    gate.open()
    await trimmed
    const expected = Buffer.concat([Buffer.alloc((2 * units - 1) * stripe), written])
    expectSame(await readAll(larger), expected, 'trimmed up to the old end')
  })
})
