import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { Random } from '../support/random.ts'
import { SECTOR, SectorModel } from '../support/sector-model.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS, readAll } from '../support/volumes.ts'

/**
 * Overlapping reads, writes, trims, zeroes and flushes from several connections, with the formatter and checkpoints at
 * work behind them. A read has to return what the order of requests and answers permits (test/support/sector-model.ts).
 * A run ends after so many requests, or so many seconds; FULLSTRIPE_TEST_SECONDS takes the first bound away and sets the
 * second. TEST_SEED repeats one.
 */
const CHUNK = 4096
const SECONDS = Number(process.env['FULLSTRIPE_TEST_SECONDS'] ?? 2)
const OPERATIONS = process.env['FULLSTRIPE_TEST_SECONDS'] === undefined ? 4000 : Number.POSITIVE_INFINITY
const CONNECTIONS = 4
const LANES = 6 // of each connection: requests in flight

interface Shape {
  readonly name: string
  readonly volume: Omit<VolumeCreateOptions, 'name' | 'size'>
  readonly members?: number
  /** Exactly as many slots as the volume can fill: what is given back is needed again at once. */
  readonly full?: boolean
}
const SHAPES: readonly Shape[] = [
  { name: 'thin', volume: {} },
  { name: 'thin, in a pool that is just large enough', volume: {}, full: true },
  { name: 'thin, format unit 3, fill 170', volume: { formatUnit: 3, fill: 0xaa } },
  { name: 'thick, formatted in the background', volume: { provision: 'thick', formatUnit: 2 } },
  { name: 'thin on 3 members', volume: { formatUnit: 2 }, members: 3 },
]

describe.each(DATAPATHS)('concurrent clients over %s', (datapath) => {
  let base: string
  let directory: string
  let served: ServedPool

  beforeEach(() => {
    base = mkdtempSync(join(tmpdir(), 'fullstripe-concurrency-'))
    directory = join(base, 'pool')
  })
  afterEach(async () => {
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  it.each(SHAPES)('see what their order permits: $name', async ({ volume, members, full }) => {
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    const stripe = CHUNK * (members ?? 1)
    const size = 50 * stripe + 3 * SECTOR
    const paths =
      members === undefined ? undefined : Array.from({ length: members }, (_, i) => join(base, `disk${i}`))
    const unit = stripe * (volume.formatUnit ?? 1)
    const capacity = Math.ceil(size / stripe) * stripe * (full === true ? 1 : 8)
    await createPool(directory, {
      capacity,
      chunkSize: CHUNK,
      ...(paths === undefined ? {} : { members: paths }),
    })
    served = await ServedPool.open(directory, datapath)
    await served.pool.createVolume({ name: 'v', size, ...volume })
    const clients = await Promise.all(Array.from({ length: CONNECTIONS }, () => served.connect('v')))
    const model = new SectorModel(size, volume.fill ?? 0)
    const deadline = performance.now() + SECONDS * 1000
    const problems: string[] = []
    const count = { operations: 0 }
    const lanes = clients.flatMap((client, c) =>
      Array.from({ length: LANES }, (_, l) => lane(client, new Random(seed + 100 * c + l))),
    )
    const background = volume.provision === 'thick' ? reformat() : Promise.resolve()
    await Promise.all([...lanes, background])
    await quietRead('at the end')
    expect(count.operations, `seed ${seed}`).toBeGreaterThan(2 * CONNECTIONS * LANES)
    await served.close()
    expect(await checkPool(directory), `seed ${seed}`).toMatchObject({ status: 'clean', findings: [] })
    served = await ServedPool.open(directory, datapath)
    await quietRead('after a restart')
    expect(problems, `seed ${seed}`).toEqual([])

    function running(): boolean {
      return performance.now() < deadline && count.operations < OPERATIONS
    }

    async function lane(client: NbdClient, random: Random): Promise<void> {
      while (running() && problems.length === 0) {
        const offset = random.below(size / SECTOR) * SECTOR
        const most = random.pick([1, 4, 20, (3 * unit) / SECTOR, (9 * unit) / SECTOR])
        const length = Math.min(size - offset, (1 + random.below(most)) * SECTOR)
        await operation(client, random, offset, length)
        count.operations++
      }
    }

    async function operation(
      client: NbdClient,
      random: Random,
      offset: number,
      length: number,
    ): Promise<void> {
      const kind = random.below(100)
      if (kind < 40) {
        const { data, answered } = model.write(offset, length)
        await client.write(data, offset, { durable: kind < 2 })
        answered()
      } else if (kind < 65) {
        const { check } = model.read(offset, length)
        const target = Buffer.alloc(length)
        await client.read(target, offset)
        const problem = check(target)
        if (problem !== undefined) problems.push(problem)
      } else if (kind < 84) {
        const { answered } = model.zero(offset, length)
        if (kind < 72) await client.trim({ offset, length }, { durable: kind === 71 })
        else await client.zero({ offset, length }, { release: kind < 80 })
        answered()
      } else if (kind < 98) {
        // Whole units again and again: their slots go round.
        const at = Math.floor(offset / unit) * unit
        const { answered } = model.zero(at, Math.min(unit, size - at))
        await client.trim({ offset: at, length: Math.min(unit, size - at) })
        answered()
      } else {
        await client.flush()
      }
    }

    async function reformat(): Promise<void> {
      while (running()) {
        await served.pool.volume('v').startFormatter()
        await new Promise((resolve) => setTimeout(resolve, 5))
      }
    }

    async function quietRead(when: string): Promise<void> {
      const { check } = model.read(0, size)
      const problem = check(await readAll(await served.connect('v')))
      if (problem !== undefined) problems.push(`${when}: ${problem}`)
    }
  })
})
