import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import { checkPool } from '../../src/volume/check.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { DaemonProcess, temporaryDirectory } from '../support/daemon.ts'
import { Random } from '../support/random.ts'
import { SECTOR, SectorModel } from '../support/sector-model.ts'
import { DATAPATHS, readAll } from '../support/volumes.ts'

/**
 * A real daemon, killed again and again at any moment under load from several connections to volumes that take each
 * other's slots. After each death: the pool checks clean, every answered request is there, nothing of anybody else's is.
 * FULLSTRIPE_TEST_ROUNDS makes it longer, TEST_SEED repeats the load (the moments of death are the machine's).
 */
const ROUNDS = Number(process.env['FULLSTRIPE_TEST_ROUNDS'] ?? 5)
const LOAD_MS_MAX = 400
const STRIPE = 4096
const SIZE = 48 * STRIPE + SECTOR
const CONNECTIONS = 2 // to each volume
const LANES = 3 // of each connection
const VOLUMES = [
  { name: 'thin', size: SIZE },
  { name: 'coarse', size: SIZE, formatUnit: 3 },
  { name: 'thick', size: SIZE, provision: 'thick', formatUnit: 2 },
] as const

vi.setConfig({ testTimeout: 60_000 + ROUNDS * 10_000 })

describe.each(DATAPATHS)('a daemon that is killed, %s', (datapath) => {
  const temporary = { path: '', remove: (): void => {} }
  let daemon: DaemonProcess | undefined

  beforeEach(() => Object.assign(temporary, temporaryDirectory('fullstripe-crash-')))
  afterEach(async () => {
    await daemon?.stop('SIGKILL')
    daemon = undefined
    temporary.remove()
  })

  it('has every answered request, and nothing of others, when it is started again', async () => {
    const seed = Number(process.env['TEST_SEED'] ?? Date.now() % 1e9)
    console.log(`crash, ${datapath}: seed ${seed}, ${ROUNDS} rounds`)
    const random = new Random(seed)
    const directory = join(temporary.path, 'pool')
    // Hardly more slots than the volumes can fill: what one gives back, another one gets.
    await createPool(directory, { capacity: (3 * 49 + 8) * STRIPE, chunkSize: STRIPE })
    const pool = await Pool.open(directory, { datapath: 'portable', log: pino({ level: 'silent' }) })
    for (const volume of VOLUMES) await pool.createVolume(volume)
    await pool.close()
    const models = VOLUMES.map(() => new SectorModel(SIZE))
    let answered = 0
    for (let round = 0; round < ROUNDS; round++) {
      const where = `seed ${seed} round ${round}`
      daemon = await DaemonProcess.start(directory, ['--datapath', datapath])
      const problems: string[] = []
      for (const [index, { name }] of VOLUMES.entries()) {
        const reader = await connect(name)
        const problem = models[index]?.settle(await readAll(reader))
        if (problem !== undefined) problems.push(`${name}: ${problem}`)
        await reader.close()
      }
      expect(problems, `${where}: after the restart`).toEqual([])
      await daemon.client.post('/v1/volumes/thick/format', { rate: 4 * 2 ** 20 })

      const clients = await Promise.all(
        VOLUMES.flatMap(({ name }) => Array.from({ length: CONNECTIONS }, () => connect(name))),
      )
      let dead = false
      const load = clients.flatMap((client, c) => {
        const model = models[Math.floor(c / CONNECTIONS)]
        if (model === undefined) return []
        return Array.from({ length: LANES }, (_, l) =>
          lane(client, model, new Random(seed + 1000 * round + 10 * c + l)),
        )
      })
      await new Promise((resolve) => setTimeout(resolve, 20 + random.below(LOAD_MS_MAX)))
      dead = true
      await daemon.stop('SIGKILL')
      await Promise.all(load)
      for (const client of clients) client.destroy()
      expect(problems, where).toEqual([])
      const report = await checkPool(directory)
      expect(
        report.findings.filter(({ severity }) => severity === 'error'),
        where,
      ).toEqual([])

      async function lane(client: NbdClient, model: SectorModel, own: Random): Promise<void> {
        try {
          for (;;) {
            const problem = await operation(client, model, own)
            if (problem !== undefined) problems.push(problem)
            answered++
          }
        } catch (error) {
          if (!dead) problems.push(String(error))
        }
      }
    }
    expect(answered, `seed ${seed}`).toBeGreaterThan(ROUNDS * 10)

    function connect(name: string): Promise<NbdClient> {
      return NbdClient.connect(`nbd+unix:///${name}?socket=${join(directory, 'nbd.sock')}`)
    }
  })
})

async function operation(client: NbdClient, model: SectorModel, random: Random): Promise<string | undefined> {
  const offset = random.below(SIZE / SECTOR) * SECTOR
  const most = random.pick([1, 8, 64])
  const length = Math.min(SIZE - offset, (1 + random.below(most)) * SECTOR)
  const kind = random.below(100)
  if (kind < 55) {
    const { data, answered } = model.write(offset, length)
    await client.write(data, offset, { durable: kind < 3 })
    answered()
  } else if (kind < 70) {
    const { check } = model.read(offset, length)
    const target = Buffer.alloc(length)
    await client.read(target, offset)
    return check(target)
  } else if (kind < 97) {
    const unit = 6 * STRIPE // whole units of every volume
    const at = Math.floor(offset / unit) * unit
    const range = kind < 85 ? { offset: at, length: Math.min(unit, SIZE - at) } : { offset, length }
    const { answered } = model.zero(range.offset, range.length)
    if (kind < 92) await client.trim(range)
    else await client.zero(range, { release: kind < 95 })
    answered()
  } else {
    await client.flush()
  }
  return undefined
}
