import { mkdtempSync, rmSync, truncateSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import type { FormatUnit } from '../../src/datapath/datapath.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { CommitGate, failing, failingCommits, Gate } from '../support/faults.ts'
import { isPending, until, within } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS, expectSame, readAll } from '../support/volumes.ts'

/** Members and metadata that fail in the middle of a change, and changes that get in each other's way. */
const KiB = 1024
const MiB = 1024 * KiB
const STRIPE = 64 * KiB
const broken = new StoreError('MEMBER_IO', 'member 0: no such luck')

vi.setConfig({ testTimeout: 60_000 }) // much of it is processes and disks, on machines that do other things, too

describe.each(DATAPATHS)('policy over %s', (datapath) => {
  let base: string
  let directory: string
  let served: ServedPool
  let mend: () => void

  beforeEach(() => {
    base = mkdtempSync(join(tmpdir(), 'fullstripe-policy-'))
    directory = join(base, 'pool')
    mend = () => {}
  })
  afterEach(async () => {
    mend()
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  async function start(
    volume: Omit<VolumeCreateOptions, 'name'>,
    capacity = 64 * STRIPE,
    chunkSize = STRIPE,
  ): Promise<NbdClient> {
    await createPool(directory, { capacity, chunkSize })
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', ...volume })
    return served.connect('v')
  }
  const volume = () => served.pool.volume('v')
  async function restart(): Promise<void> {
    await served.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', findings: [] })
    served = await ServedPool.open(directory, datapath)
  }

  it('answers writes to what the background formatter could not format', async () => {
    const client = await start({ size: 16 * STRIPE, provision: 'thick' })
    await client.write(Buffer.alloc(512, 1), 3 * STRIPE) // so that one step of the formatter has two parts
    mend = failing(served.pool.datapath, 'formatUnit', (request: FormatUnit) =>
      request.overlays.length === 0 ? broken : undefined,
    )
    await volume().startFormatter()
    await until(() => volume().info().formatter.state === 'failed', 'the formatter gives up')
    expect(volume().info().formatter.message).toMatch(/v: formatting failed at unit 0/)
    for (let stripe = 0; stripe < 16; stripe++) {
      await within(
        client.write(Buffer.alloc(512, stripe + 1), stripe * STRIPE + 512),
        `write to stripe ${stripe}`,
      )
    }
    mend()
    await volume().startFormatter()
    await until(() => volume().info().formatter.state === 'done', 'the formatter finds nothing left')
  })

  it('ends the formatter in order when the end of it cannot be stored', async () => {
    await start({ size: 16 * STRIPE, provision: 'thick' })
    mend = failingCommits(({ putVolumes }) => putVolumes?.[0]?.formatter.state === 'done')
    await volume().startFormatter()
    await until(() => served.events.some(({ kind }) => kind === 'formatter.done'), 'it is done')
    expect(served.events.find(({ kind }) => kind === 'formatter.done')?.message).toMatch(/disk full/)
    mend()
    await restart() // it looks again and finds nothing to do
    await until(() => volume().info().formatter.state === 'done', 'it is done again')
  })

  it('fails a first write whose record cannot be kept, and the next attempt finds the slots free', async () => {
    const client = await start({ size: 64 * STRIPE }, 8 * STRIPE)
    let left = 3
    mend = failing(served.pool.datapath, 'formatUnit', () => (left-- > 0 ? broken : undefined))
    for (let i = 0; i < 3; i++) {
      await expect(client.write(Buffer.alloc(4 * STRIPE, 1), 0)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    }
    await client.write(Buffer.alloc(8 * STRIPE, 2), 0) // all there is
    expectSame(
      (await readAll(client)).subarray(0, 8 * STRIPE),
      Buffer.alloc(8 * STRIPE, 2),
      'the last attempt',
    )
  })

  it('leaves a stripe as it was when its trim cannot be recorded', async () => {
    const client = await start({ size: 4 * STRIPE })
    const expected = Buffer.alloc(4 * STRIPE, 5)
    await client.write(expected, 0)
    mend = failing(served.pool.datapath, 'barrier', () => broken)
    await expect(client.trim({ offset: 0, length: 2 * STRIPE })).rejects.toMatchObject({ code: 'MEMBER_IO' })
    mend()
    expectSame(await readAll(client), expected, 'after the failed trim')
    await client.write(Buffer.alloc(512, 6), STRIPE)
    expected.fill(6, STRIPE, STRIPE + 512)
    expectSame(await readAll(client), expected, 'written again')
  })

  describe('after a failed sync', () => {
    /** A pool with four stripes flushed, four not, whose members cannot be synced for once. */
    async function failed(volumeOptions: Partial<VolumeCreateOptions> = {}): Promise<NbdClient> {
      const client = await start({ size: 16 * STRIPE, ...volumeOptions })
      await client.write(Buffer.alloc(4 * STRIPE, 1), 0)
      await client.flush()
      await client.write(Buffer.alloc(4 * STRIPE, 2), 4 * STRIPE)
      let left = 1
      mend = failing(served.pool.datapath, 'sync', () => (left-- > 0 ? broken : undefined))
      await expect(client.flush()).rejects.toMatchObject({ code: 'MEMBER_IO' })
      return client // the kernel has forgotten it, this daemon has not
    }
    const io = { code: 'MEMBER_IO' } // EIO

    it.each([{}, { intents: true }, { provision: 'thick' } as const])(
      'takes no changes, and reads on: %o',
      async (options) => {
        const client = await failed(options)
        // One that comes later is told at once that it may not write.
        const late = await served.connect('v')
        for (const each of [client, late]) {
          const refused = each === client ? io : { code: 'READ_ONLY' }
          await expect(each.write(Buffer.alloc(512, 3), 0)).rejects.toMatchObject(refused) // in place until now
          await expect(each.write(Buffer.alloc(512, 3), 8 * STRIPE)).rejects.toMatchObject(refused)
          await expect(each.write(Buffer.alloc(512, 3), 0, { durable: true })).rejects.toMatchObject(refused)
          await expect(each.trim({ offset: 0, length: STRIPE })).rejects.toMatchObject(refused)
          await expect(each.zero({ offset: 512, length: 512 })).rejects.toMatchObject(refused)
          await expect(each.flush()).rejects.toMatchObject(io)
          const expected = Buffer.alloc(16 * STRIPE)
          expected.fill(1, 0, 4 * STRIPE).fill(2, 4 * STRIPE, 8 * STRIPE)
          expectSame(await readAll(each), expected, 'while it is read-only')
        }
        await expect(served.pool.createVolume({ name: 'w', size: STRIPE })).rejects.toThrow(
          /takes no changes.*restart/,
        )
        await expect(served.pool.deleteVolume('v', { force: true })).rejects.toThrow(/takes no changes/)
        await expect(volume().resize(32 * STRIPE)).rejects.toMatchObject(io)
        await expect(volume().rename('w')).rejects.toMatchObject(io)
      },
    )

    it('says so wherever somebody may look, once', async () => {
      await failed()
      await (await served.connect('v')).flush().catch(() => {})
      const words = /member 0: no such luck; mend the cause, then restart the daemon/
      expect(served.events.map(({ kind, level }) => [kind, level])).toContainEqual(['pool.failed', 'error'])
      expect(served.events.filter(({ kind }) => kind === 'pool.failed')).toHaveLength(1)
      expect(served.events.find(({ kind }) => kind === 'pool.failed')?.message).toMatch(words)
      expect(served.pool.info()).toMatchObject({ state: 'read-only' })
      expect(served.pool.info().failure).toMatch(words)
      expect(volume().info()).toMatchObject({ readOnly: true })
      expect(volume().info().failure).toMatch(words)
      expect((await served.connect('v')).readOnly).toBe(true)
    })

    it('has after a restart what was flushed, and nothing that may not be on the disk', async () => {
      await failed()
      mend()
      await expect(served.close()).rejects.toThrow(/closed without a checkpoint.*no such luck/)
      expect(await checkPool(directory)).toMatchObject({ status: 'clean', slotsUsed: 4 })
      served = await ServedPool.open(directory, datapath)
      const expected = Buffer.alloc(16 * STRIPE).fill(1, 0, 4 * STRIPE)
      const client = await served.connect('v')
      expectSame(await readAll(client), expected, 'after the restart')
      expect(served.pool.info()).toMatchObject({ state: 'online', failure: null })
      await client.write(Buffer.alloc(STRIPE, 5), 15 * STRIPE)
      await client.flush()
      await restart()
      expected.fill(5, 15 * STRIPE)
      expectSame(await readAll(await served.connect('v')), expected, 'healed')
    })

    it('ends the background formatter, which says why', async () => {
      const client = await start({ size: 64 * STRIPE, provision: 'thick' }, 128 * STRIPE)
      await volume().startFormatter({ rate: 20 * STRIPE })
      mend = failing(served.pool.datapath, 'sync', () => broken)
      await expect(client.flush()).rejects.toMatchObject(io)
      await until(() => volume().info().formatter.state === 'failed', 'the formatter gives up')
      mend()
    })

    it('lets nobody wait who was in the middle of something', async () => {
      const client = await start({ size: 16 * STRIPE, intents: true })
      await client.write(Buffer.alloc(4 * STRIPE, 1), 0)
      const gate = new Gate(served.pool.datapath, 'sync')
      const barrier = new Gate(served.pool.datapath, 'barrier')
      mend = () => barrier.open()
      const flushed = client.flush().catch((error: unknown) => error)
      await until(() => gate.held.length > 0, 'a flush is under way')
      const trimmed = client.trim({ offset: 0, length: 2 * STRIPE }).catch((error: unknown) => error)
      await until(() => barrier.held.length > 0, 'a trim is under way')
      const written = client.write(Buffer.alloc(STRIPE, 2), 0).catch((error: unknown) => error)
      await isPending(written) // behind the trim
      const undo = failing(served.pool.datapath, 'sync', () => broken)
      gate.held.shift()?.() // this one goes on
      gate.open()
      undo()
      const second = failing(served.pool.datapath, 'sync', () => broken)
      await flushed
      await expect(client.flush()).rejects.toMatchObject(io)
      second()
      barrier.open()
      for (const outcome of await within(Promise.all([trimmed, written]), 'the answers')) {
        expect(outcome).toMatchObject(io)
      }
    })
  })

  it('reads and writes on after errors of a member, and tells of them now and then', async () => {
    const client = await start({ size: 64 * STRIPE })
    await client.write(Buffer.alloc(STRIPE, 1), 0)
    mend = failing(served.pool.datapath, 'formatUnit', () => broken)
    for (let i = 0; i < 20; i++) {
      await expect(client.write(Buffer.alloc(512, 1), STRIPE)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    }
    mend()
    const told = served.events.filter(({ kind }) => kind === 'volume.error')
    expect(told).toMatchObject([{ object: 'v', level: 'warn', message: 'member 0: no such luck' }])
    expect(served.pool.info().state).toBe('online')
    await client.write(Buffer.alloc(STRIPE, 2), STRIPE)
    await client.flush()
    expect(volume().info().counters.errors).toBe(20)
    for (let i = 0; i < 3; i++) await served.pool.probeMembers()
    expect(served.events.filter(({ kind }) => kind === 'volume.errors')).toMatchObject([
      { object: 'v', level: 'warn', message: '20 requests were answered with an error, 20 in all' },
    ])
  })

  it('keeps serving with a full journal while LMDB takes nothing, and catches up', async () => {
    await createPool(directory, { capacity: 16 * MiB, chunkSize: 4 * KiB })
    for (const name of ['journal-0', 'journal-1']) truncateSync(join(directory, name), 64 * KiB)
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', size: 16 * MiB })
    const client = await served.connect('v')
    mend = failingCommits()
    let written = 0
    const expected = Buffer.alloc(16 * MiB)
    for (; written < 4000; written++) {
      // Every other stripe: each is a record of its own.
      const at = written * 8 * KiB
      if (at >= expected.length) break
      const error = await client.write(Buffer.alloc(512, written % 251), at).catch((e: unknown) => e)
      if (error !== undefined) {
        expect(error).toMatchObject({ code: 'NO_SPACE' })
        break
      }
      expected.fill(written % 251, at, at + 512)
    }
    expect(written).toBeGreaterThan(500)
    expect(written).toBeLessThan(2000)
    for (let i = 0; i < 20; i++) await client.flush() // room for its mark was kept
    await client.write(Buffer.alloc(512, 9), 0) // in place
    expected.fill(9, 0, 512)
    await expect(client.trim({ offset: 0, length: 4 * KiB })).rejects.toMatchObject({ code: 'NO_SPACE' })
    expectSame(await readAll(client), expected, 'while the journal is full')
    expect(served.events.map(({ kind }) => kind)).toContain('metadata.checkpoint')
    mend()
    await until(async () => {
      const error = await client.write(Buffer.alloc(512, 7), written * 8 * KiB).catch((e: unknown) => e)
      return error === undefined
    }, 'LMDB takes it all')
    expected.fill(7, written * 8 * KiB, written * 8 * KiB + 512)
    await restart()
    expectSame(await readAll(await served.connect('v')), expected, 'after a restart')
  })

  it('takes any number of trims of scattered stripes at once', async () => {
    const stripe = 4 * KiB
    const stripes = 48_000 // every second one formatted: each is a change of its own, more than a frame of the journal holds
    const client = await start({ size: stripes * stripe }, 128 * MiB, stripe)
    await Promise.all(
      Array.from({ length: 64 }, async (_, lane) => {
        for (let at = 2 * lane; at < stripes; at += 128)
          await client.write(Buffer.alloc(stripe, 1), at * stripe)
      }),
    )
    expect(volume().info().stripesFormatted).toBe(stripes / 2)
    const part = 1500 * stripe
    const trims = Array.from({ length: stripes / 1500 }, (_, i) =>
      client.trim({ offset: i * part, length: part }),
    )
    await within(Promise.all(trims), 'the trims')
    expect(volume().info().stripesFormatted).toBe(0)
    await restart()
    expect(volume().info().stripesFormatted).toBe(0)
  })

  it('finds room in what trims and deletions before it have given back, without waiting for a flush', async () => {
    const client = await start({ size: 64 * STRIPE }, 16 * STRIPE)
    await served.pool.createVolume({ name: 'other', size: 64 * STRIPE })
    const other = await served.connect('other')
    await client.write(Buffer.alloc(8 * STRIPE, 1), 0)
    await other.write(Buffer.alloc(8 * STRIPE, 2), 0)
    await client.flush()
    await client.trim({ offset: 0, length: 4 * STRIPE }) // not durable yet
    await other.close()
    await until(() => served.pool.volume('other').info().sessions === 0, 'the end of the session')
    await served.pool.deleteVolume('other')
    await client.write(Buffer.alloc(12 * STRIPE, 3), 16 * STRIPE)
    const expected = Buffer.alloc(64 * STRIPE)
    expected.fill(1, 4 * STRIPE, 8 * STRIPE)
    expected.fill(3, 16 * STRIPE, 28 * STRIPE)
    expectSame(await readAll(client), expected, 'full again')
  })

  it('lets a shrunken thick volume and a deleted one make room for another', async () => {
    const client = await start({ size: 8 * STRIPE, provision: 'thick' }, 16 * STRIPE)
    await client.write(Buffer.alloc(8 * STRIPE, 1), 0)
    await served.pool.createVolume({ name: 'thin', size: 8 * STRIPE })
    await (await served.connect('thin')).write(Buffer.alloc(8 * STRIPE, 2), 0)
    await volume().resize(4 * STRIPE, { force: true })
    const thin = await served.connect('thin')
    await thin.trim({ offset: 0, length: 8 * STRIPE })
    await served.pool.createVolume({ name: 'more', size: 64 * STRIPE })
    const more = await served.connect('more')
    await more.write(Buffer.alloc(12 * STRIPE, 3), 0)
    await expect(more.write(Buffer.alloc(512, 3), 20 * STRIPE)).rejects.toMatchObject({ code: 'NO_SPACE' })
    await restart()
    const target = Buffer.alloc(12 * STRIPE)
    await (await served.connect('more')).read(target, 0)
    expectSame(target, Buffer.alloc(12 * STRIPE, 3), 'more')
    expectSame(await readAll(await served.connect('v')), Buffer.alloc(4 * STRIPE, 1), 'v')
  })

  it('keeps a new name when the formatter stores its end at the same moment', async () => {
    await start({ size: STRIPE, provision: 'thick' })
    const gate = new CommitGate(({ putVolumes }) => putVolumes?.[0]?.formatter.state === 'done')
    mend = () => gate.open()
    await volume().startFormatter()
    await until(() => gate.held.length > 0, 'the formatter stores that it is done')
    const renamed = served.pool.renameVolume('v', 'w')
    await isPending(renamed) // as far as it gets
    gate.open()
    await renamed
    await restart()
    expect(served.pool.volumes().map(({ record }) => [record.name, record.formatter.state])).toEqual([
      ['w', 'done'],
    ])
  })

  it('refuses changes that waited for the end of a volume, and the volume stays deleted', async () => {
    const client = await start({ size: 4 * STRIPE })
    await client.write(Buffer.alloc(4 * STRIPE, 1), 0)
    const gone = volume()
    const gate = new Gate(served.pool.datapath, 'barrier')
    const trimmed = client.trim({ offset: 0, length: STRIPE })
    await until(() => gate.held.length > 0, 'a trim is in flight')
    const deleted = served.pool.deleteVolume('v', { force: true })
    await until(() => served.pool.volumes().length === 0, 'the deletion has begun')
    const late = [gone.resize(8 * STRIPE), gone.resize(2 * STRIPE, { force: true }), gone.rename('w')].map(
      (p) => p.catch((e) => e),
    )
    gate.open()
    await trimmed.catch(() => {}) // answered, or its connection is gone
    await deleted
    for (const outcome of await Promise.all(late)) expect(outcome).toMatchObject({ code: 'BUSY' })
    await restart()
    expect(served.pool.volumes()).toEqual([])
    expect(served.pool.info().slotsUsed).toBe(0)
  })

  it('serves a volume again whose deletion cannot be stored', async () => {
    const client = await start({ size: 4 * STRIPE })
    await client.write(Buffer.alloc(4 * STRIPE, 7), 0)
    mend = failingCommits()
    await expect(served.pool.deleteVolume('v', { force: true })).rejects.toThrow(
      /v was not deleted: .*disk full/,
    )
    const again = await served.connect('v')
    await again.write(Buffer.alloc(512, 8), STRIPE)
    mend()
    const expected = Buffer.alloc(4 * STRIPE, 7)
    expected.fill(8, STRIPE, STRIPE + 512)
    await restart()
    expectSame(await readAll(await served.connect('v')), expected, 'after the failed deletion')
  })

  it('refuses what comes after its end', async () => {
    await start({ size: STRIPE })
    const { pool } = served
    const closed = pool.close()
    const late = [
      pool.createVolume({ name: 'late', size: STRIPE }),
      pool.deleteVolume('v'),
      pool.renameVolume('v', 'w'),
    ]
    for (const outcome of await Promise.allSettled(late)) {
      expect(outcome).toMatchObject({ status: 'rejected', reason: { code: 'BUSY' } })
    }
    await closed
    await pool.close()
  })
})
