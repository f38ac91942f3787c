import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { History } from '../concurrency/history.ts'
import { type Load, lane } from '../concurrency/load.ts'
import { connect, prepare, SERVERS } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import type { LeanDaemon } from '../support/lean-daemon.ts'
import { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import { copyPool, readAll } from '../support/volumes.ts'

/**
 * Daemons that are killed (SIGKILL), one after the other, at any moment: while they open the pool, which the one before left
 * as it was; under load from several connections to volumes that take each other's slots; and while they store everything
 * at once, again and again. Each one that gets as far is asked for everything: what was answered is there, what was
 * not is there or not, in an order that the requests permit, and nothing is anybody else's (test/concurrency/history.ts).
 * Every few deaths the pool is checked as it was left.
 *
 * FULLSTRIPE_TEST_SECONDS makes it longer, TEST_SEED repeats the load (the moments of death are the machine's).
 */
const SECONDS = Number(process.env['FULLSTRIPE_TEST_SECONDS'] ?? 18)
const CHECK_EVERY = 4
const LOAD_MS_MAX = 150
const STRIPE = 4096
const SIZE = 48 * STRIPE + SECTOR
const CONNECTIONS = 2 // to each volume
const LANES = 3 // of each connection
const VOLUMES = [
  { name: 'thin', size: SIZE },
  { name: 'coarse', size: SIZE, formatUnit: 3 },
  { name: 'thick', size: SIZE, provision: 'thick', formatUnit: 2 },
] as const
type Moment = 'opening' | 'load' | 'checkpoints'
const MOMENTS: readonly Moment[] = ['load', 'opening', 'checkpoints', 'load', 'opening']

vi.setConfig({ testTimeout: 60_000 + SECONDS * 3_000 })

describe.each(SERVERS.filter(({ name }) => name !== 'portable, slow members'))(
  'a killed server: $name',
  (kind) => {
    const temporary = { path: '', remove: (): void => {} }
    const daemons = new Set<LeanDaemon>()

    beforeEach(() => Object.assign(temporary, temporaryDirectory('fullstripe-crash-')))
    afterEach(async () => {
      for (const daemon of daemons) await daemon.kill()
      daemons.clear()
      temporary.remove()
    })

    it('has every answered request, and nothing of others, when it is started again', async () => {
      const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
      const random = new Random(seed)
      const directory = join(temporary.path, 'pool')
      await make(directory)
      const histories = VOLUMES.map(({ name }) => new History(SIZE, name))
      const deaths: Record<Moment, number> = { opening: 0, load: 0, checkpoints: 0 }
      // The time that a daemon has taken to open the pool, so that deaths are spread over it.
      let openMs = 200
      let answers = 0
      let checking: Promise<void> = Promise.resolve()
      let spare = loading()
      const started = performance.now()
      const deadline = started + SECONDS * 1000
      for (let life = 0; performance.now() < deadline; life++) {
        const where = `seed ${seed} life ${life}`
        const daemon = spare
        spare = loading()
        const moment = MOMENTS[life % MOMENTS.length] ?? 'load'
        await daemon.loaded()
        const begun = performance.now()
        if (moment === 'opening' && life > 0) {
          const opening = daemon.open(directory, kind.datapath).then(
            () => true,
            () => false,
          )
          await sleep(random.below(openMs))
          await kill(daemon)
          if (!(await opening)) deaths.opening++
        } else {
          const { engine } = await daemon.open(directory, kind.datapath)
          openMs = Math.round((openMs + performance.now() - begun) / 2)
          if (kind.engine !== undefined) expect(engine).toBe(kind.engine)
          await live(daemon, moment, where)
        }
        if (life % CHECK_EVERY === 0) {
          await checking
          checking = check(where)
        }
      }
      await checking
      const lives = deaths.opening + deaths.load + deaths.checkpoints
      console.log(
        `${kind.name}: seed ${seed}, ${lives} deaths in ${Math.round((performance.now() - started) / 1000)} s`,
        `(${deaths.opening} while opening, ${deaths.load} under load, ${deaths.checkpoints} with checkpoints), ${answers} answers`,
      )
      expect(Math.min(deaths.load, deaths.checkpoints), where(seed)).toBeGreaterThan(0)
      expect(answers, where(seed)).toBeGreaterThan(lives)

      async function live(daemon: LeanDaemon, moment: Moment, where: string): Promise<void> {
        const problems: string[] = []
        await Promise.all(
          VOLUMES.map(async ({ name }, index) => {
            const reader = await connect(directory, name)
            const problem = histories[index]?.settle(await readAll(reader))
            if (problem !== undefined) problems.push(problem)
            await reader.close()
          }),
        )
        expect(problems, `${where}: after the restart`).toEqual([])
        await daemon.command('format', { volume: 'thick', rate: 4 * 2 ** 20 })
        if (moment === 'checkpoints') await daemon.command('guests', { size: 2 * STRIPE, on: true })
        let dead = false
        const lanes = VOLUMES.flatMap(({ name, ...volume }, index) => {
          const history = histories[index]
          if (history === undefined) return []
          const load: Load = {
            history,
            size: SIZE,
            unit: STRIPE * ('formatUnit' in volume ? volume.formatUnit : 1),
            connect: () => connect(directory, name),
            running: () => !dead,
            onProblem: (error) => {
              if (!dead) problems.push(String(error))
            },
            onAnswer: () => answers++,
          }
          return Array.from({ length: CONNECTIONS }, async (_, c) => {
            const client = await load.connect().catch(load.onProblem)
            if (client === undefined) return
            const own = (l: number) => new Random(random.next() + 100 * index + 10 * c + l)
            await Promise.all(Array.from({ length: LANES }, (_, l) => lane(load, client, own(l))))
            client.destroy()
          })
        })
        await sleep(random.below(LOAD_MS_MAX))
        dead = true
        const { own, said } = await kill(daemon)
        await Promise.all(lanes)
        for (const history of histories) history.cutOff()
        deaths[moment === 'opening' ? 'load' : moment]++
        const ending = own ? `; the daemon had ended by itself: ${said}` : ''
        expect(problems, `${where}: ${problems[0] ?? ''}${ending}`).toEqual([])
      }

      /** Looks at the pool as it was left, while the next daemon opens it. */
      function check(where: string): Promise<void> {
        const copy = join(temporary.path, 'copy')
        rmSync(copy, { recursive: true, force: true })
        copyPool(directory, copy)
        return checkPool(copy).then((report) => {
          const errors = report.findings.filter(({ severity }) => severity === 'error')
          expect(errors, `${where}: check`).toEqual([])
        })
      }

      function loading(): LeanDaemon {
        const daemon = prepare(kind, temporary.path)
        daemons.add(daemon)
        return daemon
      }

      /** How it ended: by itself before this, and what it said last. */
      async function kill(daemon: LeanDaemon): Promise<{ own: boolean; said: string }> {
        await daemon.kill()
        daemons.delete(daemon)
        const { code, signal } = await daemon.exited
        return {
          own: signal !== 'SIGKILL',
          said: `exit code ${code}, signal ${signal}, standard error: ${daemon.stderr}`,
        }
      }
    })
  },
)

function where(seed: number): string {
  return `seed ${seed}`
}

async function make(directory: string): Promise<void> {
  // Hardly more slots than the volumes can fill: what one gives back, another one gets.
  await createPool(directory, { capacity: (3 * 49 + 12) * STRIPE, chunkSize: STRIPE })
  const pool = await Pool.open(directory, { datapath: 'portable', log: pino({ level: 'silent' }) })
  for (const volume of VOLUMES) await pool.createVolume(volume)
  await pool.close()
}
