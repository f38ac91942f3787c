import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { prepare, SERVERS } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import type { LeanDaemon } from '../support/lean-daemon.ts'
import { until } from '../support/poll.ts'
import { CMD, type WireRequest } from '../support/wire-client.ts'
import { Flood, REPLY, requests, type Usage, usageOf } from './flood.ts'

/**
 * Requests by the hundred thousand and connections by the thousand, most of which end badly: afterwards the daemon takes up
 * what it took up before. FULLSTRIPE_TEST_SECONDS goes on for so long instead.
 */
const MiB = 2 ** 20
const SECONDS = Number(process.env['FULLSTRIPE_TEST_SECONDS'] ?? 0)
const ROUNDS = 5 // in CI; the first one is to warm up
const BATCHES = 1000 // of a round, each of BATCH requests
const BATCH = 200
const RECONNECTS = 600 // of a round
const CONNECTIONS = 4
const SIZE = 64 * MiB
/** Heaps breathe. What leaks a byte with each request, or a buffer with each connection, shows above this. */
const GROWTH = 48 * MiB

vi.setConfig({ testTimeout: 300_000 + SECONDS * 2000, hookTimeout: 60_000 })

describe.each(SERVERS.filter(({ name }) => name === 'portable' || name === 'native'))(
  'a long day of a server: $name',
  (kind) => {
    const temporary = { path: '', remove: (): void => {} }
    let server: LeanDaemon
    let uri = ''

    beforeEach(async () => {
      Object.assign(temporary, temporaryDirectory('fullstripe-soak-'))
      const pool = join(temporary.path, 'pool')
      uri = `nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`
      server = prepare(kind, temporary.path)
      await createPool(pool, { capacity: 2 * SIZE })
      const made = await Pool.open(pool, { datapath: 'portable', log: pino({ level: 'silent' }) })
      await made.createVolume({ name: 'v', size: SIZE })
      await made.close()
      await server.open(pool, kind.datapath)
    })
    afterEach(async () => {
      await server.kill()
      temporary.remove()
    })

    it('leaves no memory, descriptor or thread behind', async () => {
      let before: Usage | undefined
      let asked = 0
      let came = 0
      const started = performance.now()
      const enough = (round: number): boolean =>
        SECONDS > 0 ? performance.now() - started > SECONDS * 1000 : round >= ROUNDS
      for (let round = 0; !enough(round); round++) {
        await Promise.all(Array.from({ length: CONNECTIONS }, () => traffic()))
        for (let n = 0; n < RECONNECTS; n += 20) {
          await Promise.all(Array.from({ length: 20 }, (_, index) => visit(n + index)))
        }
        await until(async () => (await server.command('sessions')) === 0, 'all are forgotten', 60_000)
        const { descriptors } = before ?? {}
        if (descriptors !== undefined)
          await until(() => usageOf(server.pid).descriptors <= descriptors, 'no descriptor stays', 60_000)
        before ??= usageOf(server.pid)
      }
      const after = usageOf(server.pid)
      expect(before).toBeDefined()
      if (before === undefined) return
      console.log(
        `${kind.name}: ${asked} requests, ${came} connections in ${Math.round((performance.now() - started) / 1000)} s;`,
        `resident ${Math.round(before.resident / MiB)} MiB after the first round, ${Math.round(after.resident / MiB)} at the end`,
      )
      expect(after.resident - before.resident).toBeLessThan(GROWTH)
      expect(after.threads).toBeLessThanOrEqual(before.threads + 8) // pools grow to their size when there is work
      expect(after.descriptors).toBeLessThanOrEqual(before.descriptors)

      /** Small requests of every kind in batches, two batches in flight. */
      async function traffic(): Promise<void> {
        const flood = await Flood.connect(uri)
        const batch = Array.from({ length: BATCH }, (_, index): WireRequest => {
          const offset = ((index * 7919) % (SIZE / 4096)) * 4096
          if (index % 50 === 49) return { command: CMD.FLUSH }
          if (index % 25 === 24) return { command: CMD.TRIM, offset, length: 65_536 - (offset % 65_536) }
          return index % 2 === 0
            ? { command: CMD.WRITE, offset, payload: Buffer.alloc(512, index) }
            : { command: CMD.READ, offset, length: 512 }
        })
        const bytes = requests(batch)
        const replies = batch.reduce((sum, { command }) => sum + REPLY + (command === CMD.READ ? 512 : 0), 0)
        for (let n = 0; n < BATCHES / CONNECTIONS; n++) {
          void flood.send(bytes)
          asked += BATCH
          await flood.until(n * replies)
        }
        await flood.until((BATCHES / CONNECTIONS) * replies)
        expect(flood.received).toBe((BATCHES / CONNECTIONS) * replies)
        flood.destroy()
      }

      /** One connection, in one of the ways in which they end. */
      async function visit(index: number): Promise<void> {
        came++
        if (index % 6 === 0) {
          const client = await NbdClient.connect(uri)
          await client.write(Buffer.alloc(4096, index), 4096 * (index % 1000))
          await client.close()
          return
        }
        const flood = await Flood.connect(uri, { reads: index % 6 !== 3 })
        if (index % 6 === 1) await flood.send(half)
        else if (index % 6 === 2) await flood.send(Buffer.from('no NBD at all, but as long as a request'))
        else if (index % 6 === 3) await flood.send(unread)
        else if (index % 6 === 4) void flood.send(undecided)
        flood.destroy()
      }
    })
  },
)

const half = requests([{ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(8 * MiB) }]).subarray(
  0,
  100_000,
)
const unread = requests(Array.from({ length: 8 }, () => ({ command: CMD.READ, offset: 0, length: MiB })))
const undecided = requests(
  Array.from({ length: 8 }, (_, index) => ({
    command: CMD.WRITE,
    offset: index * 65_536,
    payload: Buffer.alloc(20_000),
  })),
)
