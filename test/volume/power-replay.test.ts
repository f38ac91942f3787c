import { existsSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { connect } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { buildDiskLog, DiskLog, FATES, PowerCut, type Survival } from '../support/disk-log.ts'
import { DurableModel } from '../support/durable-model.ts'
import { LeanDaemon } from '../support/lean-daemon.ts'
import { Random } from '../support/random.ts'
import { newToken, SECTOR } from '../support/sector-data.ts'
import { ServedPool } from '../support/served-pool.ts'
import { copyPool, DATAPATHS, readAll } from '../support/volumes.ts'

/**
 * A short life of a daemon under load, noted write by write (test/support/disk-log.ts), and then every moment of it at which
 * something began or ceased to be at the mercy of the disk: for each, a pool is built as it may be found when the power
 * fails there, once with nothing of what was not synced, once with all of it, once with that of the members alone, once with that
 * of the metadata alone, and with random choices. Each has to check clean, to open, and to hold what was flushed.
 *
 * FULLSTRIPE_TEST_OPERATIONS makes the life longer, FULLSTRIPE_TEST_CUTS the number of random choices at each moment;
 * TEST_SEED repeats them.
 */
const OPERATIONS = Number(process.env['FULLSTRIPE_TEST_OPERATIONS'] ?? 12)
const CUTS = Number(process.env['FULLSTRIPE_TEST_CUTS'] ?? 1)
const STRIPE = 4096
const SIZE = 10 * STRIPE + SECTOR
const LANES = 3 // of each volume
const VOLUMES = [
  { name: 'thin', size: SIZE },
  { name: 'coarse', size: SIZE, formatUnit: 3 },
] as const
const WHOLE: readonly ((path: string) => Survival)[] = [
  () => 'none',
  () => 'all',
  (path) => (path.startsWith('member') ? 'all' : 'none'),
  (path) => (path.startsWith('member') ? 'none' : 'all'),
]
const WORKERS = 2

vi.setConfig({ testTimeout: 240_000 + OPERATIONS * CUTS * 2_000 })

describe.each(DATAPATHS)('every power failure in a short life under the %s datapath', (datapath) => {
  const temporary = { path: '', remove: (): void => {} }
  let daemon: LeanDaemon | undefined
  const parent = existsSync('/dev/shm') ? '/dev/shm' : tmpdir() // what is durable is reckoned: memory will do

  beforeEach(() => Object.assign(temporary, temporaryDirectory('fullstripe-replay-', parent)))
  afterEach(async () => {
    await daemon?.kill()
    daemon = undefined
    temporary.remove()
  })

  it('costs nothing that was flushed', async (context) => {
    const library = buildDiskLog(temporary.path)
    if (library === undefined) return context.skip('no C compiler to build the note-taker with')
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    const directory = join(temporary.path, 'pool')
    await make(directory)
    const base = join(temporary.path, 'base')
    copyPool(directory, base)
    const log = new DiskLog(
      library,
      temporary.path,
      'life',
      directory,
      '00000000-0000-4000-8000-000000000001',
    )
    const models = new Map(VOLUMES.map(({ name }) => [name, new DurableModel(SIZE, newToken)]))
    daemon = new LeanDaemon(log.env)
    await daemon.open(directory, datapath)
    // Each makes a checkpoint of everything.
    await daemon.command('guests', { size: 2 * STRIPE, on: true, changes: Math.ceil(OPERATIONS / 12) })
    await Promise.all(
      [...models].flatMap(([name, model], v) =>
        Array.from({ length: LANES }, async (_, l) => {
          const client = await connect(directory, name)
          await lane(client, model, log, new Random(seed + 10 * v + l), l)
          client.destroy()
        }),
      ),
    )
    await log.kill(daemon.exited)
    daemon = undefined

    const cut = new PowerCut(log, base, directory)
    const tasks = cut.boundaries().flatMap((position) => [
      ...WHOLE.map((fate) => ({ position, fate })),
      ...Array.from({ length: CUTS }, (_, n) => {
        const random = new Random(seed + position + n)
        const pick = random.pick(FATES)
        return { position, fate: (path: string) => pick(path, random) }
      }),
    ])
    const seen = new Set<string>()
    let next = 0
    await Promise.all(
      Array.from({ length: WORKERS }, async (_, worker) => {
        for (let task = tasks[next++]; task !== undefined; task = tasks[next++]) {
          const outcome = cut.outcome(task.position, new Random(seed + task.position), task.fate)
          // What the disk holds is often the same at neighbouring moments; what may be expected of it grows with each flush.
          const state = `${outcome.fingerprint} ${[...models.values()].map((model) => model.flushedBy(task.position))}`
          if (seen.has(state)) continue
          seen.add(state)
          const target = join(temporary.path, `cut-${worker}`)
          outcome.build(target)
          await look(target, task.position, `seed ${seed} failure at ${task.position} (${outcome.lost})`)
          rmSync(target, { recursive: true, force: true })
        }
      }),
    )
    console.log(`${datapath}: seed ${seed}, ${tasks.length} failures, ${seen.size} of them different`)
    expect(seen.size, `seed ${seed}`).toBeGreaterThan(OPERATIONS / 2)

    async function look(target: string, position: number, where: string): Promise<void> {
      const { findings } = await checkPool(target)
      expect(
        findings.filter(({ severity }) => severity === 'error'),
        where,
      ).toEqual([])
      const served = await ServedPool.open(target, datapath).catch((error: unknown) => {
        throw new Error(`${where}: ${String(error)}`)
      })
      for (const [name, model] of models) {
        const content = await readAll(await served.connect(name))
        expect(model.check(content, position), `${where} ${name}`).toBeUndefined()
      }
      await served.close()
    }
  })
})

async function lane(
  client: NbdClient,
  model: DurableModel,
  log: DiskLog,
  random: Random,
  index: number,
): Promise<void> {
  const sectors = SIZE / SECTOR
  const first = Math.floor((sectors / LANES) * index)
  const end = Math.floor((sectors / LANES) * (index + 1))
  for (let n = 0; n < OPERATIONS / LANES / VOLUMES.length; n++) {
    const sector = first + random.below(end - first)
    const offset = sector * SECTOR
    const length = Math.min(end - sector, 1 + random.below(20)) * SECTOR
    const kind = random.below(100)
    if (kind < 50) {
      const { data, answered } = model.write(offset, length, log.position)
      await client.write(data, offset, { durable: kind < 8 })
      answered(log.position, kind < 8)
    } else if (kind < 75) {
      const whole = { offset: first * SECTOR, length: (end - first) * SECTOR }
      const { answered } = model.zero(whole.offset, whole.length, log.position)
      await client.trim(whole)
      answered(log.position)
    } else {
      const answered = model.flush()
      await client.flush()
      answered(log.position)
    }
  }
}

async function make(directory: string): Promise<void> {
  await createPool(directory, { capacity: (2 * 11 + 8) * STRIPE, chunkSize: STRIPE })
  const pool = await Pool.open(directory, { datapath: 'portable', log: pino({ level: 'silent' }) })
  for (const volume of VOLUMES) await pool.createVolume(volume)
  await pool.close()
}
