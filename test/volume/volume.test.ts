import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { Random } from '../support/random.ts'
import { type DatapathChoice, ServedPool } from '../support/served-pool.ts'

/** Volumes seen through NBD, over both datapaths: what is stored, when it is stored, and what it costs. */
const KiB = 1024
const MiB = 1024 * KiB
const STRIPE = 64 * KiB
const DATAPATHS: DatapathChoice[] =
  process.env['FULLSTRIPE_TEST_DATAPATHS'] === 'portable' ? ['portable'] : ['portable', 'native']

/** Stops at the first difference and says where. */
function expectSame(actual: Buffer, expected: Buffer, what: string): void {
  if (actual.equals(expected)) return
  const at = actual.findIndex((byte, index) => byte !== expected[index])
  expect.fail(`${what}: byte ${at} is ${actual[at]}, expected ${expected[at]}`)
}

/** What a daemon that was killed now would leave behind: the kernel's view of every file. */
function copyPool(from: string, to: string): void {
  const copied = spawnSync('cp', ['-r', '--sparse=always', from, to])
  expect(copied.status, copied.stderr.toString()).toBe(0)
}

describe.each(DATAPATHS)('volume over %s', (datapath) => {
  let base: string
  let directory: string
  let served: ServedPool

  beforeEach(() => {
    base = mkdtempSync(join(tmpdir(), 'fullstripe-volume-'))
    directory = join(base, 'pool')
  })
  afterEach(async () => {
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  async function start(
    volume: Omit<VolumeCreateOptions, 'name'>,
    capacity = 256 * MiB,
    members?: number,
  ): Promise<NbdClient> {
    const paths =
      members === undefined ? undefined : Array.from({ length: members }, (_, i) => join(base, `disk${i}`))
    await createPool(directory, {
      capacity,
      ...(paths === undefined ? {} : { members: paths, chunkSize: STRIPE / paths.length }),
    })
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', ...volume })
    return served.connect('v')
  }

  const info = () => served.pool.volume('v').info()
  const member = () => served.pool.datapath.memberCounters()[0]!
  async function readAll(client: NbdClient): Promise<Buffer> {
    const target = Buffer.alloc(client.size)
    await client.read(target, 0)
    return target
  }

  it('reads formatting data with no I/O until something is written', async () => {
    const client = await start({ size: 4 * MiB })
    expectSame(await readAll(client), Buffer.alloc(4 * MiB), 'fresh volume')
    expect(member().reads + member().writes).toBe(0)
    expect(info().stripesFormatted).toBe(0)
  })

  it('writes each stripe once and whole, and reads nothing, however small the first write', async () => {
    const client = await start({ size: 4 * MiB, fill: 0xab })
    const data = Buffer.alloc(100, 7)
    await client.write(data, 3 * STRIPE + 17)
    expect(info()).toMatchObject({ stripesFormatted: 1, counters: { fullStripeWrites: 1 } })
    expect(member()).toMatchObject({ reads: 0, writeBytes: STRIPE })
    const expected = Buffer.alloc(4 * MiB, 0xab)
    data.copy(expected, 3 * STRIPE + 17)
    expectSame(await readAll(client), expected, 'after one write')
    const { writes } = member()
    await client.write(data, 3 * STRIPE + 4096) // now in place
    expect(member().writes - writes).toBe(1)
    expect(info().counters).toMatchObject({ fullStripeWrites: 1, inPlaceWrites: 1 })
  })

  it('merges writes that wait for the same stripe into one', async () => {
    const client = await start({ size: 4 * MiB })
    const expected = Buffer.alloc(STRIPE)
    await Promise.all(
      Array.from({ length: 16 }, (_, i) => {
        const block = Buffer.alloc(4 * KiB, i + 1)
        block.copy(expected, i * 4 * KiB)
        return client.write(block, i * 4 * KiB)
      }),
    )
    expect(info().counters.fullStripeWrites).toBe(1)
    expect(member().writeBytes).toBeLessThanOrEqual(2 * STRIPE)
    expectSame((await readAll(client)).subarray(0, STRIPE), expected, 'merged stripe')
  })

  it('a sequential fill of small writes writes hardly more than the client sent', async () => {
    const client = await start({ size: 16 * MiB })
    const block = Buffer.alloc(4 * KiB, 0x5a)
    let next = 0
    await Promise.all(
      Array.from({ length: 32 }, async () => {
        while (next < 16 * MiB) {
          const at = next
          next += block.length
          await client.write(block, at)
        }
      }),
    )
    expect(member().writeBytes / (16 * MiB)).toBeLessThanOrEqual(1.05)
    expect(member().reads).toBe(0)
    expectSame(await readAll(client), Buffer.alloc(16 * MiB, 0x5a), 'filled volume')
  })

  it('trims whole stripes without data I/O and gives them back; parts become zeros', async () => {
    const client = await start({ size: 4 * MiB })
    await client.write(Buffer.alloc(1 * MiB, 1), 0)
    expect(info().stripesFormatted).toBe(16)
    const { writes } = member()
    await client.trim({ offset: 2 * STRIPE, length: 4 * STRIPE })
    expect(member().writes).toBe(writes)
    expect(info().stripesFormatted).toBe(12)
    await client.trim({ offset: 8 * STRIPE + 100, length: 2 * STRIPE }) // one whole stripe, two parts
    const expected = Buffer.alloc(4 * MiB)
    expected.fill(1, 0, 1 * MiB)
    expected.fill(0, 2 * STRIPE, 6 * STRIPE)
    expected.fill(0, 8 * STRIPE + 100, 10 * STRIPE + 100)
    expectSame(await readAll(client), expected, 'after trims')
    expect(info().stripesFormatted).toBe(11)
    await client.zero({ offset: 0, length: 4 * MiB })
    expect(info().stripesFormatted).toBe(0)
    expectSame(await readAll(client), Buffer.alloc(4 * MiB), 'after zeroing all')
  })

  it('gives the space of trimmed stripes back to the file system', async () => {
    const client = await start({ size: 16 * MiB })
    const used = (): number => {
      const paths = served.pool.info().members.map((each) => resolve(directory, each.path))
      return paths.reduce((sum, path) => sum + statSync(path).blocks * 512, 0)
    }
    await client.write(Buffer.alloc(16 * MiB, 1), 0)
    await client.flush()
    expect(used()).toBeGreaterThan(15 * MiB)
    await client.trim({ offset: 0, length: 16 * MiB })
    await expect.poll(used, { timeout: 20_000 }).toBeLessThan(2 * MiB)
  })

  it('writes zeros out where the fill pattern is not zero, and where the client wants no hole', async () => {
    const client = await start({ size: 1 * MiB, fill: 0xff })
    await client.trim({ offset: 0, length: 3 * STRIPE })
    const expected = Buffer.alloc(1 * MiB, 0xff)
    expected.fill(0, 0, 3 * STRIPE)
    expectSame(await readAll(client), expected, 'trimmed, fill 255')
    expect(info().stripesFormatted).toBe(3)
    await served.pool.createVolume({ name: 'w', size: 1 * MiB })
    const other = await served.connect('w')
    await other.zero({ offset: 0, length: 2 * STRIPE + 5 }, { release: false })
    expect(served.pool.volume('w').info().stripesFormatted).toBe(3)
  })

  it('is fast at zeroing or says that it is not', async () => {
    const client = await start({ size: 1 * MiB })
    await client.write(Buffer.alloc(4 * STRIPE, 1), 0)
    await client.zero({ offset: 0, length: 2 * STRIPE }, { fast: true })
    await expect(client.zero({ offset: 2 * STRIPE, length: 4096 }, { fast: true })).rejects.toMatchObject({
      code: 'NOT_SUPPORTED',
    })
    await expect(
      client.zero({ offset: 0, length: STRIPE }, { fast: true, release: false }),
    ).rejects.toMatchObject({ code: 'NOT_SUPPORTED' })
    await client.zero({ offset: 8 * STRIPE, length: 4096 }, { fast: true }) // unformatted: nothing to do
  })

  it('hands a trimmed slot out again, never with what it held', async () => {
    const client = await start({ size: 2 * MiB }, 16 * STRIPE)
    await client.write(Buffer.alloc(1 * MiB, 0xee), 0) // all 16 slots
    await expect(client.write(Buffer.alloc(1), 20 * STRIPE)).rejects.toMatchObject({ code: 'NO_SPACE' })
    expect(served.events.map((event) => event.kind)).toContain('pool.space')
    await client.trim({ offset: 0, length: 8 * STRIPE })
    for (let stripe = 20; stripe < 28; stripe++) await client.write(Buffer.from([1]), stripe * STRIPE + 9)
    const expected = Buffer.alloc(2 * MiB)
    expected.fill(0xee, 8 * STRIPE, 16 * STRIPE)
    for (let stripe = 20; stripe < 28; stripe++) expected[stripe * STRIPE + 9] = 1
    expectSame(await readAll(client), expected, 'reused slots')
  })

  it('keeps every answered write through the death of the daemon, flushed or not', async () => {
    const client = await start({ size: 8 * MiB })
    const expected = Buffer.alloc(8 * MiB)
    for (let i = 0; i < 40; i++) {
      const at = (i * 977 * 4096) % (8 * MiB)
      expected.fill(i + 1, at, at + 4096)
      await client.write(Buffer.alloc(4096, i + 1), at)
      if (i === 20) await client.flush()
      if (i === 30) {
        await client.trim({ offset: 0, length: 2 * MiB })
        expected.fill(0, 0, 2 * MiB)
      }
    }
    const copy = join(base, 'copy')
    copyPool(directory, copy)
    expect(await checkPool(copy)).toMatchObject({ status: 'clean' })
    const second = await ServedPool.open(copy, datapath)
    const reader = await second.connect('v')
    expectSame(await readAll(reader), expected, 'after the crash')
    await second.close()
    expect(await checkPool(copy)).toMatchObject({ status: 'clean' })
  })

  it('formats a thick volume in the background, through pause, restart and client writes', async () => {
    const client = await start({ size: 8 * MiB, provision: 'thick', fill: 0x33 })
    expect(served.pool.info().reserved).toBe(8 * MiB)
    await client.write(Buffer.alloc(4096, 1), 5 * STRIPE)
    await served.pool.volume('v').startFormatter({ rate: 20 * MiB })
    await served.pool.volume('v').pauseFormatter()
    const paused = info().formatter
    expect(paused).toMatchObject({ state: 'paused', total: 128 })
    expect(paused.done).toBeLessThan(128)
    await served.pool.volume('v').startFormatter({ rate: 40 * MiB })
    await served.close()
    served = await ServedPool.open(directory, datapath) // goes on by itself
    await expect.poll(() => info().formatter.state, { timeout: 10_000 }).toBe('done')
    expect(info().formatter.done).toBe(128)
    const expected = Buffer.alloc(8 * MiB, 0x33)
    expected.fill(1, 5 * STRIPE, 5 * STRIPE + 4096)
    expectSame(await readAll(await served.connect('v')), expected, 'formatted volume')
    await served.pool.volume('v').startFormatter({ rate: 1 * MiB })
    await served.pool.volume('v').resize(10 * MiB) // goes on over the new end
    await served.pool.volume('v').startFormatter({ rate: null })
    await expect.poll(() => info().formatter, { timeout: 10_000 }).toMatchObject({ state: 'done', done: 160 })
    await expect(
      served.pool.createVolume({ name: 't', size: MiB }).then((v) => v.startFormatter()),
    ).rejects.toThrow(/thin/)
  })

  it('grows online, with whatever format unit, and shrinks only by force', async () => {
    const client = await start({ size: 5 * STRIPE + 512, formatUnit: 4, fill: 9 })
    const expected = Buffer.alloc(20 * STRIPE, 9)
    await client.write(Buffer.alloc(512, 1), 5 * STRIPE)
    expected.fill(1, 5 * STRIPE, 5 * STRIPE + 512)
    await served.pool.volume('v').resize(20 * STRIPE)
    const larger = await served.connect('v')
    expect(larger.size).toBe(20 * STRIPE)
    expectSame(await readAll(larger), expected, 'grown')
    await larger.write(Buffer.alloc(STRIPE, 2), 7 * STRIPE + 100)
    expected.fill(2, 7 * STRIPE + 100, 8 * STRIPE + 100)
    await larger.write(Buffer.alloc(STRIPE, 3), 18 * STRIPE)
    expected.fill(3, 18 * STRIPE, 19 * STRIPE)
    expectSame(await readAll(larger), expected, 'written past the old end')
    await expect(served.pool.volume('v').resize(6 * STRIPE)).rejects.toMatchObject({ code: 'REFUSED' })
    await served.pool.volume('v').resize(6 * STRIPE + 1024, { force: true })
    await served.pool.volume('v').resize(20 * STRIPE)
    expected.fill(9, 6 * STRIPE + 1024)
    await served.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', findings: [] })
    served = await ServedPool.open(directory, datapath)
    expectSame(await readAll(await served.connect('v')), expected, 'shrunk and grown')
  })

  it('tells allocation and formatting apart in block status', async () => {
    const client = await start({ size: 1 * MiB })
    await client.write(Buffer.alloc(STRIPE, 1), 2 * STRIPE)
    const status = await client.blockStatus({ offset: 0, length: 1 * MiB })
    const byName = Object.fromEntries(
      [...status].map(([name, extents]) => [name, extents.map((e) => [e.length, e.flags])]),
    )
    expect(byName).toEqual({
      'base:allocation': [
        [2 * STRIPE, 3],
        [STRIPE, 0],
        [13 * STRIPE, 3],
      ],
      'fullstripe:init': [
        [2 * STRIPE, 0],
        [STRIPE, 1],
        [13 * STRIPE, 0],
      ],
    })
    expect([...served.pool.volume('v').map()]).toEqual([
      { offset: 0, length: 2 * STRIPE, formatted: false },
      { offset: 2 * STRIPE, length: STRIPE, formatted: true },
      { offset: 3 * STRIPE, length: 13 * STRIPE, formatted: false },
    ])
  })

  const shapes: [string, Omit<VolumeCreateOptions, 'name' | 'size'>, number | undefined][] = [
    ['thin', {}, undefined],
    ['thin, format unit 3, fill 170', { formatUnit: 3, fill: 0xaa }, undefined],
    ['thick, format unit 2', { provision: 'thick', formatUnit: 2 }, undefined],
    ['thin on 4 members', {}, 4],
  ]
  it.each(shapes)('holds what a buffer would: %s', async (_, options, members) => {
    const size = 40 * STRIPE + 512 * 3
    let client = await start({ size, ...options }, 64 * MiB, members)
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    const random = new Random(seed)
    const model = Buffer.alloc(size, options.fill ?? 0)
    for (let round = 0; round < 60; round++) {
      // Requests in flight together must not overlap, or their order would be anybody's guess.
      const lanes = 8
      await Promise.all(
        Array.from({ length: lanes }, async (_, lane) => {
          const from = Math.floor((size * lane) / lanes)
          const to = Math.floor((size * (lane + 1)) / lanes)
          for (let n = 0; n < 4; n++) {
            const offset = from + random.below(to - from)
            const length = 1 + random.below(Math.min(to - offset, random.pick([512, 5000, 3 * STRIPE])))
            const kind = random.below(10)
            if (kind < 6) {
              const data = random.bytes(length)
              data.copy(model, offset)
              await client.write(data, offset, { durable: kind === 5 })
            } else if (kind < 8) {
              model.fill(0, offset, offset + length)
              if (kind === 6) await client.trim({ offset, length })
              else await client.zero({ offset, length }, { release: random.below(2) === 0 })
            } else {
              const target = Buffer.alloc(length)
              await client.read(target, offset)
              expectSame(
                target,
                model.subarray(offset, offset + length),
                `seed ${seed} round ${round} read ${offset}+${length}`,
              )
            }
          }
        }),
      )
      if (round % 15 === 7) await client.flush()
      if (round % 20 === 19) {
        await served.close()
        served = await ServedPool.open(directory, datapath)
        client = await served.connect('v')
        expectSame(await readAll(client), model, `seed ${seed} round ${round} after a restart`)
      }
    }
    await served.close()
    expect(await checkPool(directory), `seed ${seed}`).toMatchObject({ status: 'clean' })
  })

  it('reports a damaged store instead of serving it', async () => {
    const client = await start({ size: 1 * MiB })
    await client.write(Buffer.alloc(STRIPE, 1), 0)
    await served.close()
    writeFileSync(join(directory, 'metadata', 'data.mdb'), Buffer.alloc(64 * KiB, 0x6d), { flag: 'r+' })
    await expect(ServedPool.open(directory, datapath)).rejects.toThrow(/metadata is damaged/)
    await expect(checkPool(directory)).rejects.toThrow(/metadata is damaged/)
  })
})
