import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool } from '../../src/volume/pool.ts'
import { until } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS, expectSame } from '../support/volumes.ts'

/** No room: in the pool, and in the file system under it. Nothing breaks, and it heals as soon as there is room. */
const MiB = 2 ** 20
const STRIPE = 64 * 1024

describe.each(DATAPATHS)('space over %s', (datapath) => {
  let base: string
  let served: ServedPool | undefined
  let mounted: string | undefined

  beforeEach(() => {
    base = mkdtempSync(join(tmpdir(), 'fullstripe-space-'))
    served = undefined
    mounted = undefined
  })
  afterEach(async () => {
    await served?.close().catch(() => {})
    if (mounted !== undefined) spawnSync('umount', ['-l', mounted])
    rmSync(base, { recursive: true, force: true })
  })

  async function open(directory: string): Promise<ServedPool> {
    served = await ServedPool.open(directory, datapath)
    return served
  }

  /** A file system of its own. @returns why that is not possible here */
  function mount(bytes: number): string | undefined {
    const at = join(base, 'mount')
    mkdirSync(at)
    const result = spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'fullstripe-test', at], {
      encoding: 'utf8',
    })
    if (result.status !== 0)
      return `cannot mount a file system: ${result.stderr?.trim() || 'mount is missing'}`
    mounted = at
    return undefined
  }
  function remount(options: string): void {
    const { status, stderr } = spawnSync('mount', ['-o', `remount,${options}`, mounted ?? ''], {
      encoding: 'utf8',
    })
    expect(status, stderr).toBe(0)
  }

  /** Writes stripe after stripe, each with its number, until it fails. @returns how many there was room for, and the error */
  async function fill(
    client: NbdClient,
    from: number,
    to: number,
  ): Promise<{ count: number; error: unknown }> {
    for (let stripe = from; stripe < to; stripe++) {
      try {
        await client.write(Buffer.alloc(STRIPE, stripe + 1), stripe * STRIPE)
      } catch (error) {
        return { count: stripe - from, error }
      }
    }
    return { count: to - from, error: undefined }
  }
  async function expectStripes(client: NbdClient, from: number, to: number): Promise<void> {
    const target = Buffer.alloc(STRIPE)
    for (let stripe = from; stripe < to; stripe++) {
      await client.read(target, stripe * STRIPE)
      expectSame(target, Buffer.alloc(STRIPE, stripe + 1), `stripe ${stripe}`)
    }
  }

  it('fails just the writes that need a slot when the pool is full, tells of it, and heals', async () => {
    const directory = join(base, 'pool')
    await createPool(directory, { capacity: 100 * STRIPE })
    const { pool, events, connect } = bound(await open(directory))
    await pool.createVolume({ name: 'a', size: 200 * STRIPE })
    await pool.createVolume({ name: 'b', size: 200 * STRIPE, formatUnit: 4 })
    const a = await connect('a')
    const b = await connect('b')
    const first = await fill(a, 0, 60)
    expect(first.count).toBe(60)
    const second = await fill(b, 0, 60)
    expect(second).toMatchObject({ count: 40, error: { code: 'NO_SPACE' } })
    expect(events.filter(({ kind }) => kind === 'pool.space').map(({ message }) => message)).toEqual([
      '80 % of the capacity is taken',
      '92 % of the capacity is taken', // four slots at a time
      '96 % of the capacity is taken',
      'full: writes that need space fail',
    ])
    // What is formatted is written and read as ever, and is flushed.
    await a.write(Buffer.alloc(STRIPE, 1), 0, { durable: true })
    await expectStripes(a, 0, 60)
    await expectStripes(b, 0, 40)
    // A write over what has room and what has not fails, and takes nothing for good.
    await expect(a.write(Buffer.alloc(4 * STRIPE, 9), 59 * STRIPE)).rejects.toMatchObject({
      code: 'NO_SPACE',
    })
    await a.write(Buffer.alloc(STRIPE, 60), 59 * STRIPE)
    await expect(pool.createVolume({ name: 'thick', size: STRIPE, provision: 'thick' })).rejects.toThrow(
      /no contiguous 64K is free/,
    )
    // Room for two of four stripes of a unit is not enough; for four it is.
    await a.trim({ offset: 0, length: 2 * STRIPE })
    await expect(b.write(Buffer.alloc(512, 1), 40 * STRIPE)).rejects.toMatchObject({ code: 'NO_SPACE' })
    await a.trim({ offset: 2 * STRIPE, length: 2 * STRIPE })
    expect((await fill(b, 40, 44)).count).toBe(4)
    await expectStripes(a, 4, 60)
    await pool.deleteVolume('a', { force: true })
    expect((await fill(b, 44, 100)).count).toBe(56)
    await expectStripes(b, 0, 100)
    await served?.close()
    served = undefined
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', slotsUsed: 100 })
  })

  it('gives a thick volume, and a growing one, what was trimmed just before', async () => {
    const directory = join(base, 'pool')
    await createPool(directory, { capacity: 100 * STRIPE })
    const { pool, connect } = bound(await open(directory))
    await pool.createVolume({ name: 'thin', size: 100 * STRIPE })
    const thin = await connect('thin')
    expect((await fill(thin, 0, 100)).count).toBe(100)
    // Nobody flushes: the slots wait for their record to be durable.
    await thin.trim({ offset: 0, length: 40 * STRIPE })
    await pool.createVolume({ name: 'thick', size: 40 * STRIPE, provision: 'thick' })
    await thin.trim({ offset: 40 * STRIPE, length: 20 * STRIPE })
    await pool.volume('thick').resize(60 * STRIPE)
    const thick = await connect('thick')
    expect((await fill(thick, 0, 60)).count).toBe(60)
    await expectStripes(thin, 60, 100)
    await expect(pool.volume('thick').resize(61 * STRIPE)).rejects.toThrow(/no contiguous 64K is free/)
  })

  it('goes on serving when the file system under it is full, and heals when that grows or stripes are trimmed', async (context) => {
    const obstacle = mount(32 * MiB)
    if (obstacle !== undefined) return context.skip(obstacle)
    const directory = join(mounted ?? '', 'pool')
    await createPool(directory, { capacity: 256 * MiB })
    const { pool, connect } = bound(await open(directory))
    await pool.createVolume({ name: 'v', size: 128 * MiB })
    const client = await connect('v')
    const { count, error } = await fill(client, 0, 1000)
    expect(error).toMatchObject({ code: 'NO_SPACE' })
    expect(count).toBeGreaterThan(100)
    await client.flush() // the journal's room was taken when the pool was made
    await expectStripes(client, 0, count)
    await client.write(Buffer.alloc(STRIPE, 1), 0) // in place
    await expect(client.write(Buffer.alloc(512, 1), 1500 * STRIPE)).rejects.toMatchObject({
      code: 'NO_SPACE',
    })
    // Trimmed space goes back to the file system, and is there for others.
    await client.trim({ offset: 0, length: 64 * STRIPE })
    await client.flush()
    await until(async () => (await fill(client, 1000, 1032)).count === 32, 'there is room again')
    await expectStripes(client, 64, count)
    remount(`size=${64 * MiB}`)
    expect((await fill(client, 1100, 1200)).count).toBe(100)
    await pool.createVolume({ name: 'w', size: 1 * MiB })
    await served?.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', volumes: 2 })
    const again = await (await open(directory)).connect('v')
    await expectStripes(again, 64, count)
    await expectStripes(again, 1100, 1200)
  })

  it('keeps everything in the journal while there is no room for metadata, over a restart, too', async (context) => {
    const obstacle = mount(24 * MiB)
    if (obstacle !== undefined) return context.skip(obstacle)
    const directory = join(mounted ?? '', 'pool')
    const disk = join(base, 'disk') // the data lies elsewhere
    await createPool(directory, { capacity: 64 * MiB, members: [disk] })
    let { pool, events, connect } = bound(await open(directory))
    await pool.createVolume({ name: 'v', size: 32 * MiB })
    const client = await connect('v')
    expect((await fill(client, 0, 50)).count).toBe(50)
    const ballast = spawnSync('dd', ['if=/dev/zero', `of=${join(mounted ?? '', 'ballast')}`, 'bs=4096'], {
      encoding: 'utf8',
    })
    expect(ballast.stderr).toMatch(/No space left/)
    expect((await fill(client, 50, 300)).count).toBe(250)
    await client.flush()
    await until(
      () => events.some(({ kind }) => kind === 'metadata.checkpoint'),
      'it is told that LMDB has no room',
    )
    await expect(pool.createVolume({ name: 'w', size: 1 * MiB })).rejects.toThrow(
      /w was not created.*(space|full)/i,
    )
    expect((await fill(client, 300, 400)).count).toBe(100)
    await expect(served?.close()).rejects.toThrow(/closed without a checkpoint/)
    // Whether it opens without room is the metadata's luck; with room it does, and nothing is missing.
    rmSync(join(mounted ?? '', 'ballast'))
    ;({ pool, events, connect } = bound(await open(directory)))
    await expectStripes(await connect('v'), 0, 400)
    await served?.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', slotsUsed: 400 })
  })

  it('names a read-only file system instead of opening on it', async (context) => {
    const obstacle = mount(24 * MiB)
    if (obstacle !== undefined) return context.skip(obstacle)
    const directory = join(mounted ?? '', 'pool')
    await createPool(directory, { capacity: 16 * MiB })
    remount('ro')
    await expect(open(directory)).rejects.toThrow(/read-only/)
    await expect(checkPool(directory)).rejects.toThrow(/read-only/)
    await expect(createPool(join(mounted ?? '', 'other'))).rejects.toThrow(/read-only/)
    remount('rw')
    await open(directory)
  })
})

/** Its parts, for destructuring. */
function bound(served: ServedPool) {
  return { pool: served.pool, events: served.events, connect: served.connect.bind(served) }
}
