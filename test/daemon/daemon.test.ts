import { writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { resolveConfig } from '../../src/daemon/config.ts'
import { Daemon } from '../../src/daemon/daemon.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { createPool } from '../../src/volume/pool.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { until } from '../support/poll.ts'

const log = pino({ level: 'silent' })
let directory: { path: string; remove: () => void }
let pool: string
const daemons: Daemon[] = []

beforeEach(async () => {
  directory = temporaryDirectory()
  pool = join(directory.path, 'pool')
  await createPool(pool)
})
afterEach(async () => {
  for (const daemon of daemons.splice(0)) await daemon.stop()
  directory.remove()
})

async function start(listen?: readonly string[]): Promise<Daemon> {
  const daemon = await Daemon.start(
    resolveConfig(pool, { datapath: 'portable', ...(listen === undefined ? {} : { listen }) }),
    log,
  )
  daemons.push(daemon)
  return daemon
}

describe('a daemon', () => {
  it('serves the volumes of its pool under their names, their uuids and, when alone, without a name', async () => {
    const daemon = await start()
    const volume = await daemon.pool.createVolume({ name: 'a b', size: 1 << 20 })
    const socket = `socket=${join(pool, 'nbd.sock')}`
    for (const name of ['a%20b', volume.info().uuid, '']) {
      const client = await NbdClient.connect(`nbd+unix:///${name}?${socket}`)
      expect(client.size).toBe(1 << 20)
      await client.close()
    }
    await daemon.pool.createVolume({ name: 'other', size: 1 << 20 })
    await expect(NbdClient.connect(`nbd+unix:///?${socket}`)).rejects.toThrow()
    await expect(NbdClient.connect(`nbd+unix:///none?${socket}`)).rejects.toThrow(/none/)
  })

  it('listens on a unix socket and a free TCP port at once, and says where', async () => {
    const daemon = await start([`nbd+unix:///?socket=${join(pool, 'nbd.sock')}`, 'nbd://127.0.0.1:0'])
    await daemon.pool.createVolume({ name: 'v', size: 1 << 20 })
    const [unix, tcp] = daemon.listening
    expect(unix).toBe(`nbd+unix:///?socket=${join(pool, 'nbd.sock')}`)
    expect(tcp).toMatch(/^nbd:\/\/127\.0\.0\.1:\d+$/)
    const client = await NbdClient.connect(`${tcp}/v`)
    expect(client.size).toBe(1 << 20)
    await client.close()
  })

  it('refuses a pool that another daemon has, by name', async () => {
    await start()
    await expect(start()).rejects.toMatchObject({ code: 'BUSY', message: expect.stringContaining(pool) })
  })

  it('gives the pool back when it cannot listen', async () => {
    const other = createServer()
    await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve))
    const address = other.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    await expect(start([`nbd://127.0.0.1:${port}`])).rejects.toMatchObject({ code: 'BUSY' })
    other.close()
    const daemon = await start()
    expect(daemon.state).toBe('serving')
  })

  it('refuses what lies in the way of its socket', async () => {
    writeFileSync(join(pool, 'nbd.sock'), 'precious')
    await expect(start()).rejects.toMatchObject({ code: 'EXISTS' })
  })

  it('stops once: front ends first, then the pool, whoever asks', async () => {
    const daemon = await start()
    const order: string[] = []
    daemon.addFrontEnd({
      close: async () => {
        order.push(`front end closed while ${daemon.state}`)
      },
    })
    await Promise.all([daemon.stop(), daemon.stop()])
    expect(order).toEqual(['front end closed while draining'])
    expect(daemon.state).toBe('stopped')
    await start() // the pool is free
  })

  it('ends sessions and keeps what they wrote', async () => {
    let daemon = await start()
    await daemon.pool.createVolume({ name: 'v', size: 1 << 20 })
    const uri = `nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`
    const client = await NbdClient.connect(uri)
    await client.write(Buffer.alloc(4096, 7), 8192)
    await daemon.stop()
    await client.gone
    daemon = await start()
    const again = await NbdClient.connect(uri)
    const target = Buffer.alloc(4096)
    await again.read(target, 8192)
    expect(target.equals(Buffer.alloc(4096, 7))).toBe(true)
    await again.close()
  })

  it('keeps events: its own and the pool’s, in order', async () => {
    const daemon = await start()
    await daemon.pool.createVolume({ name: 'v', size: 1 << 20 })
    await until(() => daemon.events.next > 2, 'two events')
    const { events } = daemon.events.page(1, 100)
    expect(events.map((event) => [event.sequence, event.kind, event.object])).toEqual([
      [1, 'daemon.started', pool],
      [2, 'volume.created', 'v'],
    ])
  })
})
