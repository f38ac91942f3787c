import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { Journal } from '../../src/metadata/journal.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import type { HotSetOptions } from '../../src/volume/hot-set.ts'
import { createPool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { failingCommits, failingSyncs, Gate, SyncGate } from '../support/faults.ts'
import { isPending, until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { ServedPool } from '../support/served-pool.ts'
import { copyPool, DATAPATHS, expectSame, readAll } from '../support/volumes.ts'

/** Intents through NBD, over both datapaths: what is announced before it is written, and what an unclean stop leaves. */
const KiB = 1024
const MiB = 1024 * KiB
const STRIPE = 4 * KiB
const REGION = 16 * KiB // four stripes, where nothing else is said
const REGIONS = 64

vi.setConfig({ testTimeout: 60_000 }) // much of it is processes and disks, on machines that do other things, too

describe.each(DATAPATHS)('intents over %s', (datapath) => {
  let base: string
  let directory: string
  let served: ServedPool
  let mend: () => void

  beforeEach(() => {
    base = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'fullstripe-intents-'))
    directory = join(base, 'pool')
    mend = () => {}
  })
  afterEach(async () => {
    mend()
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  async function start(
    volume: Partial<VolumeCreateOptions> = {},
    hotSet: HotSetOptions = { coolMs: 60_000 },
  ): Promise<NbdClient> {
    await createPool(directory, { capacity: 4 * MiB, chunkSize: STRIPE })
    served = await ServedPool.open(directory, datapath, { hotSet })
    const size = REGIONS * REGION
    await served.pool.createVolume({ name: 'v', size, intents: true, regionSize: REGION, ...volume })
    return served.connect('v')
  }
  const volume = () => served.pool.volume('v')
  const intents = () => {
    const info = volume().info().intents
    if (info === null) throw new Error('the volume keeps no intents')
    return info
  }
  /** Regions that the map shows as suspect. */
  const suspects = () => {
    const regions: number[] = []
    const { regionSize } = intents()
    for (const { offset, length, suspect } of volume().map()) {
      if (suspect !== true) continue
      for (let at = offset; at < offset + length; at += STRIPE) {
        if (regions.at(-1) !== Math.floor(at / regionSize)) regions.push(Math.floor(at / regionSize))
      }
    }
    return regions
  }
  /** Goes on with what a daemon that was killed now would leave. */
  async function crash(hotSet: HotSetOptions = { coolMs: 60_000 }): Promise<void> {
    const copy = join(base, `crashed-${Math.random()}`)
    copyPool(directory, copy)
    await served.close()
    directory = copy
    served = await ServedPool.open(directory, datapath, { hotSet })
  }
  async function restart(): Promise<void> {
    await served.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', findings: [] })
    served = await ServedPool.open(directory, datapath)
  }
  const write = (client: NbdClient, region: number, byte = 1, length = 512) =>
    client.write(Buffer.alloc(length, byte), region * REGION)
  const memberWrites = () => served.pool.datapath.memberCounters()[0]?.writes ?? 0
  const upcalls = () => volume().info().counters.upcalls

  it('announces a region once, and then writes go in place without a decision', async () => {
    const client = await start()
    await client.write(Buffer.alloc(REGION, 1), 5 * REGION)
    expect(intents()).toMatchObject({ hot: 1, announced: 1, regionSize: REGION, suspect: 0, stops: 0 })
    const before = upcalls()
    for (let i = 0; i < 50; i++) await client.write(Buffer.alloc(512, i), 5 * REGION + (i % 32) * 512)
    expect(upcalls()).toBe(before)
    expect(intents().announced).toBe(1)
  })

  it('costs nothing where nobody needs them', async () => {
    const client = await start({ intents: false })
    await client.write(Buffer.alloc(REGION, 1), 0)
    const before = upcalls()
    await client.write(Buffer.alloc(REGION, 2), 0)
    expect(upcalls()).toBe(before)
    expect(volume().info().intents).toBeNull()
    await crash()
    expect(served.events).toEqual([])
    await expect(volume().acknowledge()).rejects.toMatchObject({ code: 'REFUSED' })
  })

  it.each([
    ['a first write', (client: NbdClient) => client.write(Buffer.alloc(512, 2), 3 * REGION), 3],
    ['a write in place', (client: NbdClient) => client.write(Buffer.alloc(512, 2), 0), 0],
    ['zeroes in place', (client: NbdClient) => client.zero({ offset: 0, length: 512 }), 0],
    ['a trim', (client: NbdClient) => client.trim({ offset: 0, length: REGION }), 0],
  ])('changes nothing by %s before the mark is durable', async (_name, change, region) => {
    const client = await start()
    await write(client, 0, 1, REGION)
    await restart() // everything is cold
    const again = await served.connect('v')
    expect(intents().hot).toBe(0)
    const formatted = volume().info().stripesFormatted
    const gate = new SyncGate()
    mend = () => gate.open()
    const changed = change(again)
    await until(() => gate.held.length > 0, 'the journal is about to be synced')
    expect(await isPending(changed)).toBe(true)
    expect(memberWrites()).toBe(0)
    expect(volume().info().stripesFormatted).toBe(formatted)
    gate.open()
    await changed
    expect(intents()).toMatchObject({ hot: 1, announced: 1 })
    await crash()
    expect(suspects()).toEqual([region])
  })

  it('announces ahead of a sequential fill', async () => {
    const client = await start()
    for (let at = 0; at < REGIONS * REGION; at += STRIPE) await client.write(Buffer.alloc(STRIPE, 1), at)
    expect(intents()).toMatchObject({ announced: REGIONS, hot: REGIONS })
    expectSame(await readAll(client), Buffer.alloc(REGIONS * REGION, 1), 'the fill')
  })

  it('cools what nobody writes to, until nothing is hot, and keeps what is in use', async () => {
    const client = await start({}, { coolMs: 30 })
    for (let region = 0; region < 20; region++) await write(client, region)
    const busy = async (): Promise<boolean> => {
      await write(client, 7, 9)
      return intents().hot === 1
    }
    await until(busy, 'all but the busy one are cool')
    const { announced } = intents()
    await until(() => intents().hot === 0, 'an idle volume has no hot regions')
    expect(announced).toBeLessThanOrEqual(21)
    const before = upcalls()
    await write(client, 7)
    expect(upcalls()).toBe(before + 1)
    await crash()
    expect(suspects()).toEqual([7])
  })

  it('never marks more regions than it may, in memory and on the disk', async () => {
    await start({}, { coolMs: 60_000, regionsMax: 5 })
    const random = new Random(7)
    const model = Buffer.alloc(REGIONS * REGION)
    const lanes = await Promise.all([0, 1, 2, 3].map(() => served.connect('v')))
    await Promise.all(
      lanes.map(async (client, lane) => {
        for (let i = 0; i < 150; i++) {
          const sector = 4 * random.below((REGIONS * REGION) / 2048) + lane
          const data = Buffer.alloc(512, random.below(256))
          data.copy(model, sector * 512)
          await client.write(data, sector * 512)
          expect(intents().hot).toBeLessThanOrEqual(5)
        }
      }),
    )
    expectSame(await readAll(lanes[0]!), model, 'after all')
    const { hot } = intents()
    expect(hot).toBeGreaterThan(0)
    await crash()
    expect(suspects().length).toBeLessThanOrEqual(5)
    expect(suspects()).toHaveLength(hot)
    expectSame(await readAll(await served.connect('v')), model, 'after the crash')
  })

  it('has writes in place only where the mark is on the disk (invariant 1)', async () => {
    const client = await start({}, { coolMs: 5, regionsMax: 12 })
    const random = new Random(11)
    let checks = 0
    const check = (): void => {
      const { tables, intentMap } = volume()
      const { direct, init } = tables
      for (let stripe = direct.nextSet(0); stripe < tables.stripeCount; stripe = direct.nextSet(stripe + 1)) {
        expect(init.get(stripe)).toBe(true)
        expect(intentMap?.isHot(Math.floor((stripe * STRIPE) / REGION))).toBe(true)
        checks++
      }
    }
    for (let i = 0; i < 400; i++) {
      const region = random.below(20)
      const kind = random.below(10)
      if (kind < 8) await write(client, region, i, 512 * (1 + random.below(8)))
      else if (kind === 8) await client.trim({ offset: region * REGION, length: 2 * STRIPE })
      else await client.flush()
      check()
    }
    expect(checks).toBeGreaterThan(100)
  })

  it('reports after an unclean stop what was hot, until that is acknowledged', async () => {
    const client = await start()
    for (const region of [3, 4, 60]) await write(client, region)
    await client.flush() // hot all the same: nobody has waited long enough
    const copy = join(base, 'checked')
    copyPool(directory, copy)
    const report = await checkPool(copy)
    expect(report).toMatchObject({ status: 'clean' })
    expect(report.findings.map(({ message }) => message).join()).toMatch(/3 regions were hot/)
    await crash()
    expect(suspects()).toEqual([3, 4, 60])
    expect(intents()).toMatchObject({ hot: 0, suspect: 3 * REGION, stops: 1 })
    expect(intents().since).toMatch(/^\d{4}-/)
    expect(served.events).toMatchObject([{ kind: 'volume.suspect', object: 'v', level: 'warn' }])
    expect(served.events[0]?.message).toMatch(/3 regions \(48K\)/)

    // Another crash adds to it; one that hit nothing hot does not count.
    await write(await served.connect('v'), 10)
    await crash()
    expect(intents()).toMatchObject({ stops: 2, suspect: 4 * REGION })
    await crash()
    expect(intents()).toMatchObject({ stops: 2 })
    expect(served.events).toEqual([])
    expect(suspects()).toEqual([3, 4, 10, 60])
    await expect(volume().acknowledge(1)).rejects.toThrow(/2 times by now, not 1/)
    await volume().acknowledge(2)
    expect(intents()).toMatchObject({ stops: 0, since: null, suspect: 0 })
    expect(suspects()).toEqual([])
    await crash()
    expect(suspects()).toEqual([])
  })

  it('leaves nothing hot when it stops in order', async () => {
    const client = await start()
    for (let region = 0; region < 30; region++) await write(client, region)
    await restart()
    expect(intents()).toMatchObject({ hot: 0, suspect: 0, stops: 0 })
    expect(served.events).toEqual([])
  })

  it('suspects what was hot when it could not be stored that it is not', async () => {
    const client = await start()
    await write(client, 2)
    mend = failingCommits()
    await expect(served.close()).rejects.toThrow(/without a checkpoint/)
    mend()
    served = await ServedPool.open(directory, datapath)
    expect(suspects()).toEqual([2])
  })

  it('fails the write whose mark cannot be recorded, and takes it when it can', async () => {
    const client = await start()
    await write(client, 0)
    const { append } = Journal.prototype
    mend = () => {
      Journal.prototype.append = append
    }
    Journal.prototype.append = () => {
      throw new StoreError('MEMBER_IO', 'journal: write failed')
    }
    await expect(write(client, 1)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    await write(client, 0, 2) // its mark is there
    mend()
    await write(client, 1, 3)
    expect(intents()).toMatchObject({ hot: 2 })
    await crash()
    expect(suspects()).toEqual([0, 1])
  })

  it('takes no more changes when the sync of a mark fails', async () => {
    const client = await start()
    await write(client, 0)
    mend = failingSyncs()
    await expect(write(client, 1)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    mend()
    await expect(write(client, 0)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    await expect(write(client, 1)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    expect(served.pool.info()).toMatchObject({ state: 'read-only' })
    expect(served.events.map(({ kind }) => kind)).toContain('pool.failed')
    await served.close().catch(() => {})
    served = await ServedPool.open(directory, datapath)
    expect(suspects()).toEqual(expect.arrayContaining([0]))
  })

  it('does not wait for good for a place when nothing can cool', async () => {
    const client = await start({}, { coolMs: 60_000, regionsMax: 2 })
    await write(client, 0)
    const gate = new Gate(served.pool.datapath, 'sync')
    mend = () => gate.open()
    const late = [1, 2, 3].map((region) => write(client, region).catch((error: unknown) => error))
    await until(() => gate.held.length > 0, 'something is about to cool')
    const undo = failingSyncs()
    gate.open()
    const outcomes = await Promise.all(late)
    undo()
    expect(outcomes.some((outcome) => outcome !== undefined)).toBe(true)
  })

  it('is switched on and off while clients write', async () => {
    const client = await start({ intents: false })
    await client.write(Buffer.alloc(8 * REGION, 1), 0)
    let going = true
    const random = new Random(3)
    const model = Buffer.alloc(REGIONS * REGION)
    model.fill(1, 0, 8 * REGION)
    const load = (async () => {
      for (let i = 1; going; i++) {
        const sector = random.below((REGIONS * REGION) / 512)
        model.fill(i % 256, sector * 512, (sector + 1) * 512)
        await client.write(Buffer.alloc(512, i % 256), sector * 512)
      }
    })()
    for (let round = 0; round < 5; round++) {
      await volume().needIntents('test', REGION)
      await volume().needIntents('other')
      await volume().releaseIntents('test')
      const { announced } = intents()
      await until(() => intents().announced > announced, 'the load is announced')
      const { tables, intentMap } = volume()
      for (let stripe = 0; stripe < tables.stripeCount; stripe++) {
        if (!tables.direct.get(stripe)) continue
        expect(intentMap?.isHot(Math.floor((stripe * STRIPE) / REGION))).toBe(true)
      }
      await volume().releaseIntents('other')
      expect(volume().info().intents).toBeNull()
    }
    await volume().needIntents('test', REGION)
    going = false
    await load
    await client.write(Buffer.alloc(512), 0)
    model.fill(0, 0, 512)
    await crash()
    expect(suspects().length).toBeGreaterThan(0)
    expectSame(await readAll(await served.connect('v')), model, 'after the crash')
    await volume().releaseIntents('test')
    await crash()
    expect(volume().info().intents).toBeNull()
    await restart()
  })

  it('follows the size of the volume', async () => {
    const client = await start({ formatUnit: 3, size: 50 * STRIPE + 512 })
    const { regionSize } = intents()
    expect(regionSize).toBe(3 * STRIPE) // whole units
    await client.write(Buffer.alloc(20 * STRIPE, 1), 30 * STRIPE)
    await crash()
    expect(intents()).toMatchObject({ suspect: 20 * STRIPE + 512 }) // the last region is cut short
    await (await served.connect('v')).write(Buffer.alloc(512, 2), 50 * STRIPE)
    await volume().resize(40 * STRIPE, { force: true })
    expect(intents().suspect).toBe(10 * STRIPE)
    // The trim of what is cut off was announced, too, and forgotten with it; of the region at the new end some is left.
    expect(intents().hot).toBeLessThanOrEqual(1)
    await volume().resize(200 * STRIPE)
    expect(suspects().at(-1)).toBe(13)
    const grown = await served.connect('v')
    await grown.write(Buffer.alloc(512, 3), 199 * STRIPE)
    await crash()
    expect(suspects().at(-1)).toBe(66)
    await volume().acknowledge()
    await restart()
    expect(suspects()).toEqual([])
  })

  it('keeps its regions when a change of size cannot be stored', async () => {
    const client = await start()
    await write(client, 60)
    await crash()
    mend = failingCommits()
    await expect(volume().resize(8 * REGION, { force: true })).rejects.toThrow(/disk full/)
    mend()
    expect(suspects()).toEqual([60])
    await write(await served.connect('v'), 61)
    await crash()
    expect(suspects()).toEqual(expect.arrayContaining([60, 61]))
  })

  it('announces what a shrink blanks behind its new end', async () => {
    const client = await start()
    await write(client, 7, 1, REGION)
    await restart()
    expect(intents().hot).toBe(0)
    mend = failingCommits()
    // In the last stripe of region 7; nothing behind it holds anything.
    await expect(volume().resize(8 * REGION - 512, { force: true })).rejects.toThrow(/disk full/)
    mend()
    await crash()
    expect(suspects()).toContain(7)
  })

  it('goes with the volume, and stays with one whose deletion fails', async () => {
    const client = await start({}, { coolMs: 20 })
    await write(client, 1)
    mend = failingCommits(({ dropVolumes }) => dropVolumes !== undefined)
    await expect(served.pool.deleteVolume('v', { force: true })).rejects.toThrow(/disk full/)
    const again = await served.connect('v')
    await write(again, 2)
    mend()
    await until(() => intents().hot === 0, 'what was hot before cools, too')
    await write(again, 3)
    await served.pool.renameVolume('v', 'w')
    await served.pool.renameVolume('w', 'v')
    await served.pool.deleteVolume('v', { force: true })
    await served.pool.createVolume({ name: 'v', size: REGIONS * REGION, intents: true, regionSize: REGION })
    await crash()
    expect(suspects()).toEqual([])
    await restart()
  })

  it('leaves the background formatter alone, and announces what it formatted', async () => {
    await start({ provision: 'thick', size: 40 * REGION })
    await volume().startFormatter()
    await until(() => volume().info().formatter.state === 'done', 'all is formatted')
    expect(intents().announced).toBe(0)
    const client = await served.connect('v')
    await write(client, 9)
    const before = upcalls()
    await write(client, 9, 2, REGION)
    expect(upcalls()).toBe(before)
    await crash()
    expect(suspects()).toEqual([9])
  })

  it('does not announce a trim of what holds nothing', async () => {
    const client = await start()
    await client.trim({ offset: 0, length: REGIONS * REGION })
    await client.zero({ offset: 0, length: REGIONS * REGION })
    expect(intents().announced).toBe(0)
  })

  it('stores marks with the checkpoint: they outlive the journal', async () => {
    const client = await start()
    await write(client, 33)
    await volume().resize(REGIONS * REGION + STRIPE) // a checkpoint
    await crash()
    expect(suspects()).toEqual([33])
  })

  it('refuses sizes of regions that make no sense', async () => {
    await start()
    for (const regionSize of [0, -1, 1.5, 512, 2 ** 40]) {
      await expect(
        served.pool.createVolume({ name: 'x', size: STRIPE, intents: true, regionSize }),
      ).rejects.toMatchObject({ code: 'USAGE' })
    }
    await served.pool.createVolume({ name: 'x', size: MiB, intents: true, regionSize: 100 * KiB })
    expect(served.pool.volume('x').info().intents?.regionSize).toBe(64 * KiB)
    await served.pool.createVolume({ name: 'y', size: 8 * MiB, intents: true })
    expect(served.pool.volume('y').info().intents?.regionSize).toBe(MiB)
  })
})
