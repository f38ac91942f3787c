import { closeSync, existsSync, openSync, rmSync, statSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { ApiError, Client } from '../../src/cli/client.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { closeParts, createPool, openPoolParts, Pool } from '../../src/volume/pool.ts'
import { DaemonProcess, temporaryDirectory } from '../support/daemon.ts'
import { buildDiskLog, DiskLog, FATES, PowerCut } from '../support/disk-log.ts'
import { DurableModel } from '../support/durable-model.ts'
import { Random } from '../support/random.ts'
import { newToken, SECTOR, sectorData } from '../support/sector-data.ts'
import { ServedPool } from '../support/served-pool.ts'
import { copyPool, DATAPATHS, readAll } from '../support/volumes.ts'

/**
 * Power failures under load. A real daemon runs with a note of all it writes and syncs (test/support/disk-log.ts), is killed
 * and started again under the same kernel, and goes on. Then, for several positions in the note, a pool is built as the disk may
 * be found after a failure there, in which everything that was never synced is lost, or kept, or kept in part. It has to check
 * clean and open; what was flushed is there, what was not is as some request left it, and nothing of anybody else's shows,
 * nor what the disk held before. One of these pools is where the next life begins.
 *
 * Two of the volumes keep intents, with a hot set that is far too small for the load. Wherever they are not suspect after a
 * failure, everything is there that was answered. And where the power fails right behind a write to a member, which
 * survives while nothing of the journal does that was not synced: what it wrote lies in a suspect region.
 *
 * FULLSTRIPE_TEST_ROUNDS: lives; FULLSTRIPE_TEST_CUTS: failures in each; TEST_SEED repeats loads and choices.
 */
const LIVES = Number(process.env['FULLSTRIPE_TEST_ROUNDS'] ?? 2)
const CUTS = Number(process.env['FULLSTRIPE_TEST_CUTS'] ?? 3)
const STRIPE = 4096
const SIZE = 40 * STRIPE + SECTOR
const LANES = 3 // of each volume, each with a connection of its own
const REGION = 2 * STRIPE
const VOLUMES = [
  { name: 'thin', size: SIZE },
  { name: 'coarse', size: SIZE, formatUnit: 3 },
  { name: 'watched', size: SIZE, intents: true, regionSize: REGION },
  { name: 'thick', size: SIZE, provision: 'thick', formatUnit: 2, intents: true, regionSize: REGION },
] as const
const HOT_REGIONS = 6
const KEEPS_INTENTS = new Set<string>(VOLUMES.filter((volume) => 'intents' in volume).map(({ name }) => name))

vi.setConfig({ testTimeout: 60_000 + LIVES * (20_000 + CUTS * 10_000) })

describe.each(DATAPATHS)('a power failure under the %s datapath', (datapath) => {
  const temporary = { path: '', remove: (): void => {} }
  let daemon: DaemonProcess | undefined

  // What is durable is reckoned, not waited for: memory will do.
  const parent = existsSync('/dev/shm') ? '/dev/shm' : tmpdir()
  beforeEach(() => Object.assign(temporary, temporaryDirectory('fullstripe-power-', parent)))
  afterEach(async () => {
    await daemon?.stop('SIGKILL')
    daemon = undefined
    temporary.remove()
  })

  it('costs nothing that was flushed, and shows nothing that was not written there', async (context) => {
    const library = buildDiskLog(temporary.path)
    if (library === undefined) return context.skip('no C compiler to build the note-taker with')
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    console.log(`power cut, ${datapath}: seed ${seed}, ${LIVES} lives, ${CUTS} failures in each`)
    const random = new Random(seed)
    const directory = join(temporary.path, 'pool')
    await createPoisoned(directory)
    let announced = 0
    const models = new Map(VOLUMES.map(({ name }) => [name, new DurableModel(SIZE, newToken)]))

    for (let life = 0; life < LIVES; life++) {
      const base = join(temporary.path, `base-${life}`)
      copyPool(directory, base)
      const log = new DiskLog(library, temporary.path, `life-${life}`, directory, bootId(life))
      const restarts: number[] = []
      for (let run = 0; run < 2; run++) {
        daemon = await DaemonProcess.start(
          directory,
          ['--datapath', datapath, '--hot-regions', String(HOT_REGIONS)],
          {
            env: log.env,
          },
        )
        restarts.push(log.position)
        for (const [name, model] of models) {
          const problem = model.restarted(await contentOf(directory, name), log.position)
          expect(problem, `seed ${seed} life ${life} run ${run} ${name}`).toBeUndefined()
        }
        // What was hot in the run before was dealt with just now.
        for (const name of KEEPS_INTENTS) await new Client(directory).delete(`/v1/volumes/${name}/suspects`)
        await load(directory, log, seed + 100 * life + 10 * run, 100 + random.below(300))
        await log.kill(daemon.exited)
        daemon = undefined
      }
      await unannounced(log, base, life)
      await failures(log, base, life, restarts)
    }
    expect(announced, `seed ${seed}: sectors whose announcement was looked for`).toBeGreaterThan(0)

    async function failures(
      log: DiskLog,
      base: string,
      life: number,
      restarts: readonly number[],
    ): Promise<void> {
      const cut = new PowerCut(log, base, directory)
      for (let n = 0; n < CUTS; n++) {
        // Anywhere; but first right behind the restart, when what the journal brought back has just been stored, and
        // then nothing else survives.
        const position = n === 0 ? (restarts[1] ?? 0) : cut.position(random)
        const target = join(temporary.path, 'cut')
        const fate = n === 0 ? FATES[0] : random.pick(FATES)
        const lost = cut.build(target, position, random, (path) => fate?.(path, random) ?? 'none')
        const where = `seed ${seed} life ${life} failure ${n} at ${position} (${lost})`
        const report = await checkPool(target)
        expect(
          report.findings.filter(({ severity }) => severity === 'error'),
          where,
        ).toEqual([])
        const found = await openedAfter(target, where)
        for (const [name, model] of models) {
          const { content, suspect } = found.get(name) ?? NOTHING
          expect(model.check(content, position, suspect), `${where} ${name}`).toBeUndefined()
        }
        // Once it was opened and closed again:
        if (n === 0) {
          const { findings } = await checkPool(target)
          expect(
            findings.filter(({ message }) => !message.includes('suspect since')),
            where,
          ).toEqual([])
        }
        if (n === CUTS - 1 && life < LIVES - 1) {
          // The next life begins with what this failure left, as it was found: not opened by anybody yet.
          rmSync(target, { recursive: true })
          rmSync(directory, { recursive: true })
          cut.build(directory, position, new Random(seed + life), () => 'some')
          const begins = await openedAfter(copied(directory), where)
          for (const [name, model] of models) {
            const { content } = begins.get(name) ?? NOTHING
            expect(model.check(content, position), `${where} ${name}`).toBeUndefined()
            model.settle(content)
          }
        }
        rmSync(target, { recursive: true, force: true })
      }
    }

    /** The disk has kept a write to a member that had just been made, and of everything else only what was synced. */
    async function unannounced(log: DiskLog, base: string, life: number): Promise<void> {
      const cut = new PowerCut(log, base, directory)
      const tokens = new Set(
        [...models].flatMap(([name, model]) => (KEEPS_INTENTS.has(name) ? [...model.tokens()] : [])),
      )
      tokens.delete(0n) // zeros are anybody's
      const writes = [...cut.memberWrites()].filter(({ sectors }) =>
        sectors.some(({ token }) => tokens.has(token)),
      )
      let compared = 0
      for (let n = 0; n < 2 * CUTS && writes.length > 0; n++) {
        const { position, sectors } = random.pick(writes)
        const target = join(temporary.path, 'cut')
        const lost = cut.build(target, position, random, (path) =>
          path.startsWith('member') ? 'all' : 'none',
        )
        const where = `seed ${seed} life ${life} write ${n} at ${position} (${lost})`
        const found = await openedAfter(target, where)
        for (const [name, model] of models) {
          const { content, suspect } = found.get(name) ?? NOTHING
          expect(model.check(content, position, suspect), `${where} ${name}`).toBeUndefined()
          if (!KEEPS_INTENTS.has(name)) continue
          const own = model.tokens()
          for (const { token, sector } of sectors) {
            if (token === 0n || !own.has(token)) continue
            // Visible or not: somebody else, to whom it was sent at the same time, may have it.
            expect(
              suspect(sector * SECTOR),
              `${where} ${name}: ${token} in ${sector} was not announced`,
            ).toBe(true)
            compared++
          }
        }
        rmSync(target, { recursive: true, force: true })
      }
      announced += compared
    }

    function copied(from: string): string {
      const to = join(temporary.path, 'copy')
      rmSync(to, { recursive: true, force: true })
      copyPool(from, to)
      return to
    }

    async function load(pool: string, log: DiskLog, loadSeed: number, ms: number): Promise<void> {
      const deadline = performance.now() + ms
      const clients: NbdClient[] = []
      const lanes: Promise<void>[] = []
      for (const [name, model] of models) {
        for (let index = 0; index < LANES; index++) {
          const client = await NbdClient.connect(`nbd+unix:///${name}?socket=${join(pool, 'nbd.sock')}`)
          clients.push(client)
          // Lanes meet in the middle of stripes.
          const first = Math.floor((SIZE / SECTOR / LANES) * index)
          const end = Math.floor((SIZE / SECTOR / LANES) * (index + 1))
          lanes.push(lane(client, model, log, new Random(loadSeed * 31 + lanes.length), first, end, deadline))
        }
      }
      lanes.push(administer(pool, () => performance.now() < deadline))
      // The last requests are not waited for: the daemon dies with them in flight.
      let over = false
      const problems: unknown[] = []
      const all = lanes.map((each) =>
        each.catch((error: unknown) => (over ? undefined : problems.push(error))),
      )
      await Promise.race([Promise.all(all), new Promise((resolve) => setTimeout(resolve, ms))])
      over = true
      expect(problems, `seed ${seed}`).toEqual([])
      void Promise.all(all).then(() => {
        for (const client of clients) client.destroy()
      })
    }
  })

  async function contentOf(pool: string, name: string): Promise<Buffer> {
    const client = await NbdClient.connect(`nbd+unix:///${name}?socket=${join(pool, 'nbd.sock')}`)
    const content = await readAll(client)
    await client.close()
    return content
  }

  /** Opens the pool under the kernel that runs here, which is none of those that wrote it. */
  async function openedAfter(pool: string, where: string): Promise<Map<string, Found>> {
    const served = await ServedPool.open(pool, datapath).catch((error: unknown) => {
      throw new Error(`${where}: ${String(error)}`)
    })
    const found = new Map<string, Found>()
    for (const { name } of VOLUMES) {
      const content = await readAll(await served.connect(name))
      const volume = served.pool.volume(name)
      const extents = [...volume.map()]
      const suspect = (offset: number): boolean =>
        !KEEPS_INTENTS.has(name) ||
        extents.some((e) => e.suspect === true && e.offset <= offset && offset < e.offset + e.length)
      found.set(name, { content, suspect })
    }
    await served.close()
    return found
  }
})

/** A volume as it was found after a failure. */
interface Found {
  readonly content: Buffer
  readonly suspect: (offset: number) => boolean
}
const NOTHING: Found = { content: Buffer.alloc(0), suspect: () => true }

async function lane(
  client: NbdClient,
  model: DurableModel,
  log: DiskLog,
  random: Random,
  first: number,
  end: number,
  deadline: number,
): Promise<void> {
  while (performance.now() < deadline) {
    const sector = first + random.below(end - first)
    const length = Math.min(end - sector, 1 + random.below(random.pick([1, 8, 40]))) * SECTOR
    const offset = sector * SECTOR
    const kind = random.below(100)
    if (kind < 60) {
      const { data, answered } = model.write(offset, length, log.position)
      await client.write(data, offset, { durable: kind < 4 })
      answered(log.position, kind < 4)
    } else if (kind < 94) {
      // Mostly everything this lane has, so that whole units are given back.
      const range =
        kind < 80 ? { offset: first * SECTOR, length: (end - first) * SECTOR } : { offset, length }
      const { answered } = model.zero(range.offset, range.length, log.position)
      if (kind < 88) await client.trim(range)
      else await client.zero(range)
      answered(log.position)
    } else {
      const answered = model.flush()
      await client.flush()
      answered(log.position)
    }
  }
}

/** Volumes that come and go take slots, give them back, and make the daemon store everything at once. */
async function administer(pool: string, running: () => boolean): Promise<void> {
  const control = new Client(pool)
  await control.delete('/v1/volumes/guest?force=true').catch((error: unknown) => {
    if (!(error instanceof ApiError && error.code === 'NOT_FOUND')) throw error
  })
  while (running()) {
    await control.post('/v1/volumes', { name: 'guest', size: 8 * STRIPE })
    const guest = await NbdClient.connect(`nbd+unix:///guest?socket=${join(pool, 'nbd.sock')}`)
    await guest.write(sectorData(newToken(), 0, 8 * STRIPE), 0)
    await guest.close()
    await control.delete('/v1/volumes/guest?force=true')
  }
}

function bootId(life: number): string {
  return `00000000-0000-4000-8000-${String(life).padStart(12, '0')}`
}

/** A pool whose member holds something else's old data wherever nobody has written yet. */
async function createPoisoned(directory: string): Promise<void> {
  await createPool(directory, { capacity: (3 * 41 + 20) * STRIPE, chunkSize: STRIPE })
  const pool = await Pool.open(directory, { datapath: 'portable', log: pino({ level: 'silent' }) })
  for (const volume of VOLUMES) await pool.createVolume(volume)
  await pool.close()
  const parts = await openPoolParts(directory, 'test')
  const { dataOffset } = parts.geometry
  await closeParts(parts)
  const path = join(directory, 'member-0')
  const poison = Buffer.alloc(statSync(path).size - dataOffset, 0xdd)
  const fd = openSync(path, 'r+')
  writeSync(fd, poison, 0, poison.length, dataOffset)
  closeSync(fd)
}
