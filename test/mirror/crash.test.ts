import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, describe, expect, it } from 'vitest'
import type { MirrorInfo } from '../../src/mirror/types.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { connect } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { FaultRelay } from '../support/fault-relay.ts'
import { LeanDaemon } from '../support/lean-daemon.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import type { DatapathChoice } from '../support/served-pool.ts'
import { copyPool, DATAPATHS, readAll } from '../support/volumes.ts'
import { BLOCK, SMALL_POOL, Versions } from './versions.ts'

/**
 * Both sides as processes, killed (SIGKILL) in turn at any moment: in the first copy, in cycles, in sync, while they come together again. What
 * was answered is there, the secondary is a point in time at its death and at that of the primary, and afterwards both become equal.
 *
 * TEST_SEED repeats the choices (the moments of death are the machine's).
 */
const SIZE = 160 * BLOCK + 512
const LIVES = 5

class Process {
  readonly pool: string
  readonly #datapath: DatapathChoice
  #daemon: LeanDaemon
  #spare: LeanDaemon
  link: string | undefined

  constructor(pool: string, datapath: DatapathChoice, link: string | undefined) {
    this.pool = pool
    this.#datapath = datapath
    this.link = link
    this.#daemon = new LeanDaemon()
    this.#spare = this.#daemon
  }

  async open(): Promise<void> {
    this.#daemon = this.#spare
    await this.#daemon.loaded()
    await this.#daemon.command('open', { pool: this.pool, datapath: this.#datapath, link: this.link })
    if (this.link !== undefined) this.link = (await this.#daemon.command('listening')) as string
    this.#spare = new LeanDaemon()
  }

  async kill(): Promise<void> {
    await this.#daemon.kill()
  }

  async end(): Promise<void> {
    await Promise.all([this.#daemon.kill(), this.#spare.kill()])
  }

  async mirror(method: string, ...args: unknown[]): Promise<MirrorInfo> {
    return (await this.#daemon.command('mirror', { method, args })) as MirrorInfo
  }

  show(): Promise<MirrorInfo> {
    return this.mirror('show', 'data')
  }

  async content(): Promise<Buffer> {
    const client = await connect(this.pool, 'data')
    try {
      return await readAll(client)
    } finally {
      await client.close()
    }
  }
}

const ends: (() => Promise<void> | void)[] = []
afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end()
})

async function make(directory: string, volume: boolean): Promise<void> {
  await createPool(directory, SMALL_POOL)
  if (!volume) return
  const pool = await Pool.open(directory, { datapath: 'portable', log: pino({ level: 'silent' }) })
  await pool.createVolume({ name: 'data', size: SIZE })
  await pool.close()
}

describe.each(DATAPATHS)('a killed side, %s', (datapath) => {
  it.each(['async', 'sync'] as const)(
    '%s',
    async (mode) => {
      const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
      const random = new Random(seed)
      const temporary = temporaryDirectory('fullstripe-mirror-crash-')
      ends.push(temporary.remove)
      const [here, there] = ['one', 'two'].map((name) => join(temporary.path, name)) as [string, string]
      await make(here, true)
      await make(there, false)
      const two = new Process(there, datapath, '127.0.0.1:0')
      const one = new Process(here, datapath, undefined)
      ends.push(
        () => one.end(),
        () => two.end(),
      )
      await Promise.all([one.open(), two.open()])
      const relay = await FaultRelay.open({ port: Number(two.link?.split(':').at(-1)) })
      ends.push(() => relay.close())
      const versions = new Versions(SIZE, seed)
      let client: NbdClient = await connect(here, 'data')
      await versions.fill(client)
      const tell = (life: number, what: string): string => `seed ${seed} life ${life}: ${what}`
      const images = { one: 0, two: 0 }

      /** The state that the kill is to find, and clients that write. */
      async function live(life: number): Promise<MirrorInfo> {
        versions.start(client)
        const { answers } = versions
        const goal = answers + random.below(120)
        await until(() => versions.answers >= goal || versions.errors.length > 0, tell(life, 'clients write'))
        return one.show()
      }

      /** No session comes until `relay` says so: what a side has is looked at as it is. */
      async function inspect(life: number, side: Process, answeredBy: number): Promise<void> {
        expect(versions.check(await side.content(), answeredBy), tell(life, 'content')).toBeUndefined()
        images[side === one ? 'one' : 'two']++
      }

      async function settle(life: number): Promise<void> {
        relay.onConnect = 'forward'
        await one.mirror('change', 'data', undefined, { rate: null })
        await one.mirror('resume', 'data')
        const wanted = mode === 'sync' ? 'insync' : 'cycling'
        await until(
          async () => {
            const { state, lag } = await one.show()
            return state === wanted && lag.bytes === 0
          },
          tell(life, 'both sides are equal'),
          20_000,
        )
        expect((await two.content()).equals(await one.content()), tell(life, 'both sides are equal')).toBe(
          true,
        )
      }

      await one.mirror('add', {
        volume: 'data',
        peer: `127.0.0.1:${relay.port}`,
        mode,
        intervalMs: 10,
        rate: 400_000,
      })
      for (let life = 0; life < LIVES; life++) {
        const victim = life % 2 === 0 ? two : one
        if (life >= 2) await settle(life)
        const before = await live(life)
        const promised = before.state === 'insync'
        relay.onConnect = 'reset'
        const by = promised ? versions.now : 0
        await victim.kill()
        if (victim === two) {
          await two.open()
          if ((await two.show()).consistent) await inspect(life, two, by)
          await versions.stop()
          expect(versions.errors, tell(life, 'clients notice nothing')).toEqual([])
        } else {
          await versions.stop()
          client.destroy()
          if ((await two.show()).consistent) await inspect(life, two, promised ? versions.now : 0)
          await one.open()
          expect(versions.settle(await one.content()), tell(life, 'what was answered')).toBeUndefined()
          images.one++
          client = await connect(here, 'data')
          // And while they come together again.
          relay.onConnect = 'forward'
          await one.mirror('resume', 'data')
          for (let polls = random.below(12); polls > 0; polls--) await one.show()
          relay.onConnect = 'reset'
          await two.kill()
          await two.open()
        }
        const copy = join(temporary.path, 'copy')
        for (const pool of [here, there]) {
          copyPool(pool, copy)
          const { findings } = await checkPool(copy)
          const errors = findings.filter(({ severity }) => severity === 'error')
          expect(errors, tell(life, `check of ${pool}`)).toEqual([])
          rmSync(copy, { recursive: true })
        }
      }
      await settle(LIVES)
      expect(versions.check(await two.content(), versions.now), tell(LIVES, 'content')).toBeUndefined()
      expect(Math.min(images.one, images.two)).toBeGreaterThan(1)
    },
    120_000,
  )
})
