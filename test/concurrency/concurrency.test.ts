import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, Pool, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import type { LeanDaemon } from '../support/lean-daemon.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import { readAll } from '../support/volumes.ts'
import { History } from './history.ts'
import { type Load, lane, leaver } from './load.ts'
import { connect, prepare, SERVERS } from './servers.ts'

/**
 * Overlapping reads, writes, trims, zeroes and flushes from many connections, some of which leave before the answers, with
 * the formatter and checkpoints at work behind them. What reads return is held against everything that the order of
 * requests and answers permits (history.ts, register.ts).
 *
 * A run ends after so many requests, or so many seconds; FULLSTRIPE_TEST_SECONDS takes the first bound away and sets the
 * second. TEST_SEED repeats the choices of one (the order of answers is the machine's).
 */
const CHUNK = 4096
const SECONDS = Number(process.env['FULLSTRIPE_TEST_SECONDS'] ?? 8)
const OPERATIONS = process.env['FULLSTRIPE_TEST_SECONDS'] === undefined ? 6000 : Number.POSITIVE_INFINITY
const ROUND = 2000 // requests between two looks at everything
const CONNECTIONS = 6
const LANES = 4 // of each connection: requests in flight
const LEAVERS = 2

interface Shape {
  readonly name: string
  readonly volume: Omit<VolumeCreateOptions, 'name' | 'size'>
  readonly members?: number
  /** Exactly as many slots as the volume can fill: what is given back is needed again at once. */
  readonly full?: boolean
}
const SHAPES: readonly Shape[] = [
  { name: 'thin, in a pool that is just large enough', volume: {}, full: true },
  { name: 'thin, format unit 3, fill 170', volume: { formatUnit: 3, fill: 0xaa } },
  { name: 'thick, formatted in the background', volume: { provision: 'thick', formatUnit: 2 } },
  { name: 'thin on 3 members, format unit 2', volume: { formatUnit: 2 }, members: 3 },
]

vi.setConfig({ testTimeout: 60_000 + SECONDS * 5_000 })

describe.each(SERVERS)('concurrent clients of a server: $name', (kind) => {
  const temporary = { path: '', remove: (): void => {} }
  let server: LeanDaemon | undefined

  beforeEach(() => Object.assign(temporary, temporaryDirectory('fullstripe-concurrency-')))
  afterEach(async () => {
    await server?.kill()
    server = undefined
    temporary.remove()
  })

  it.each(SHAPES)('see what their order permits: $name', async ({ volume, members, full }) => {
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    server = prepare(kind, temporary.path)
    const pool = join(temporary.path, 'pool')
    const stripe = CHUNK * (members ?? 1)
    const size = 50 * stripe + 3 * SECTOR
    const unit = stripe * (volume.formatUnit ?? 1)
    await make()
    const { engine } = await server.open(pool, kind.datapath)
    if (kind.engine !== undefined) expect(engine).toBe(kind.engine)
    if (volume.provision === 'thick') await server.command('format', { volume: 'v', rate: 2 ** 20 })
    else if (full !== true) await server.command('guests', { size: 2 * stripe, on: true })

    const clients = await Promise.all(Array.from({ length: CONNECTIONS }, () => connect(pool, 'v')))
    const history = new History(size, 'v', volume.fill ?? 0)
    const deadline = performance.now() + SECONDS * 1000
    const problems: string[] = []
    let answers = 0
    let looked = 0
    const over = (): boolean => problems.length > 0 || performance.now() > deadline || answers >= OPERATIONS
    const load: Load = {
      history,
      size,
      unit,
      connect: () => connect(pool, 'v'),
      running: () => !over() && answers - looked < ROUND,
      onProblem: (error) => problems.push(String(error)),
      onAnswer: () => answers++,
    }
    for (let round = 0; !over(); round++) {
      looked = answers
      const lanes = clients.flatMap((client, c) =>
        Array.from({ length: LANES }, (_, l) =>
          lane(load, client, new Random(seed + round * 1009 + c * 31 + l)),
        ),
      )
      const leavers = Array.from({ length: LEAVERS }, (_, l) =>
        leaver(load, new Random(seed + round * 1009 + 500 + l), 20),
      )
      await Promise.all([...lanes, ...leavers])
      await look(`round ${round}`, clients[0])
    }
    for (const client of clients) await client.close()
    await server.command('guests', { on: false })
    await server.stop()
    expect(problems, `seed ${seed}`).toEqual([])
    expect(answers, `seed ${seed}`).toBeGreaterThan(2 * CONNECTIONS * LANES)
    expect(await checkPool(pool), `seed ${seed}`).toMatchObject({ status: 'clean', findings: [] })
    server = prepare(kind, temporary.path)
    await server.open(pool, kind.datapath)
    await look('after a restart', await connect(pool, 'v'))
    expect(problems, `seed ${seed}`).toEqual([])

    /** Looks at the whole volume when the server is done with everybody, and judges all that happened. */
    async function look(when: string, client: NbdClient | undefined): Promise<void> {
      if (client === undefined || problems.length > 0) return
      const staying = when === 'after a restart' ? 1 : CONNECTIONS
      await until(async () => (await server?.command('sessions')) === staying, 'those who left are forgotten')
      history.cutOff()
      const problem = history.settle(await readAll(client))
      if (problem !== undefined) problems.push(`${when}: ${problem}`)
    }

    async function make(): Promise<void> {
      const paths = Array.from({ length: members ?? 0 }, (_, i) => join(temporary.path, `member-${i}`))
      const capacity = Math.ceil(size / stripe) * stripe * (full === true ? 1 : 8)
      const options = { capacity, chunkSize: CHUNK, ...(paths.length === 0 ? {} : { members: paths }) }
      await createPool(pool, options)
      const made = await Pool.open(pool, { datapath: 'portable', log: pino({ level: 'silent' }) })
      await made.createVolume({ name: 'v', size, ...volume })
      await made.close()
    }
  })
})
