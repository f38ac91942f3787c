import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { prepare, SERVERS } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import type { LeanDaemon } from '../support/lean-daemon.ts'
import { until, within } from '../support/poll.ts'
import { CMD, encodeRequest } from '../support/wire-client.ts'
import { Flood, requests, usageOf } from './flood.ts'

/**
 * What a daemon's process takes up while two hundred clients send more than it can deal with, stop in mid-payload, or never
 * read: no more than the limits say, however long it lasts; and whoever comes now is served all the same.
 * FULLSTRIPE_TEST_CONNECTIONS changes their number.
 */
const MiB = 2 ** 20
const CONNECTIONS = Number(process.env['FULLSTRIPE_TEST_CONNECTIONS'] ?? 200)
/** Beside what is counted in LIMITS: buffers of a socket's input and output, and the connection itself. */
const PER_CONNECTION = 768 * 1024
/** Heaps grow in steps, and are not given back at once. */
const SLACK = 64 * MiB
const BOUND =
  LIMITS.payloadInFlightTotal + CONNECTIONS * (LIMITS.payloadAlwaysPerConnection + PER_CONNECTION) + SLACK
const SIZE = 512 * MiB
const FORMATTED = 64 * MiB

vi.setConfig({ testTimeout: 120_000, hookTimeout: 60_000 })

const payload = Buffer.alloc(LIMITS.requestPayloadMax, 7)
const write = requests([{ command: CMD.WRITE, offset: 64 * MiB, payload }])

interface FloodKind {
  readonly name: string
  readonly reads: boolean // whether the client takes its replies
  readonly send: (flood: Flood, index: number) => Promise<void>
}
const FLOODS: readonly FloodKind[] = [
  {
    name: 'write 32 MiB each, and stop in the middle',
    reads: true,
    send: (flood) => flood.send(write.subarray(0, write.length - MiB)),
  },
  {
    name: 'write 32 MiB each, again and again',
    reads: true,
    send: async (flood, index) => {
      for (let at = 0; !flood.closed; at++) {
        const offset = (2 + ((index + at) % 13)) * LIMITS.requestPayloadMax
        await flood.send(encodeRequest({ command: CMD.WRITE, offset, length: payload.length }, 'simple'))
        await flood.send(payload)
      }
    },
  },
  {
    name: 'read 1 MiB many times, and never take a reply',
    reads: false,
    send: (flood) =>
      flood.send(
        requests(
          Array.from({ length: 256 }, (_, i) => ({ command: CMD.READ, offset: (i % 64) * MiB, length: MiB })),
        ),
      ),
  },
  {
    name: 'read 32 MiB many times, and never take a reply',
    reads: false,
    send: (flood) =>
      flood.send(
        requests(Array.from({ length: 64 }, () => ({ command: CMD.READ, offset: 0, length: 32 * MiB }))),
      ),
  },
  {
    name: 'send thousands of small requests, and never take a reply',
    reads: false,
    send: (flood) =>
      flood.send(
        requests(
          Array.from({ length: 4000 }, (_, i) =>
            i % 500 === 0 ? { command: CMD.FLUSH } : { command: CMD.READ, offset: i * 512, length: 512 },
          ),
        ),
      ),
  },
]

/** Where members are slow, reads wait for the engine; where they are not, replies alone take memory. */
const KINDS = SERVERS.filter(({ name }) => ['portable', 'native', 'native, io_uring'].includes(name))

describe.each(KINDS)('memory of a server: $name', (kind) => {
  const temporary = { path: '', remove: (): void => {} }
  let pool = ''
  let server: LeanDaemon
  let floods: Flood[] = []
  const uri = (): string => `nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`

  beforeEach(async () => {
    Object.assign(temporary, temporaryDirectory('fullstripe-overload-'))
    pool = join(temporary.path, 'pool')
    server = prepare(kind, temporary.path)
    await createPool(pool, { capacity: 2 * SIZE })
    const made = await Pool.open(pool, { datapath: 'portable', log: pino({ level: 'silent' }) })
    await made.createVolume({ name: 'v', size: SIZE })
    await made.close()
    await server.open(pool, kind.datapath)
    const client = await NbdClient.connect(uri())
    await client.write(Buffer.alloc(FORMATTED, 1), 0)
    await client.close()
  })
  afterEach(async () => {
    for (const flood of floods) flood.destroy()
    floods = []
    await server.kill()
    temporary.remove()
  })

  const floodsOfKind = FLOODS.filter(({ reads }) => kind.name !== 'native' || !reads)
  it.each(floodsOfKind)(`is bounded when ${CONNECTIONS} clients $name`, async ({ reads, send }) => {
    const before = usageOf(server.pid)
    floods = await Promise.all(Array.from({ length: CONNECTIONS }, () => Flood.connect(uri(), { reads })))
    for (const [index, flood] of floods.entries()) void send(flood, index)
    let most = 0
    let settled = 0
    // Until it has not grown for a while; then what the last to come needs.
    const deadline = performance.now() + 10_000
    while (settled < 10 && performance.now() < deadline) {
      await sleep(100)
      const { resident } = usageOf(server.pid)
      settled = resident > most + MiB ? 0 : settled + 1
      most = Math.max(most, resident)
    }
    const late = await within(NbdClient.connect(uri()), 'a late client connects', 30_000)
    for (const length of [4096, MiB, 8 * MiB]) {
      const data = Buffer.alloc(length, length)
      await within(late.write(data, 500 * MiB), `a late write of ${length} bytes`, 60_000)
      const back = Buffer.alloc(length)
      await within(late.read(back, 500 * MiB), `a late read of ${length} bytes`, 60_000)
      expect(back.equals(data)).toBe(true)
    }
    await within(late.flush(), 'a late flush', 60_000)
    most = Math.max(most, usageOf(server.pid).resident)
    console.log(
      `${kind.name}: ${Math.round((most - before.resident) / MiB)} of ${Math.round(BOUND / MiB)} MiB`,
    )
    expect(most - before.resident).toBeLessThan(BOUND)
    for (const flood of floods) flood.destroy()
    await until(async () => (await server.command('sessions')) === 1, 'they are forgotten', 30_000)
    await late.close()
    await until(
      () => usageOf(server.pid).descriptors <= before.descriptors + 2,
      'no descriptor stays',
      30_000,
    )
    expect(usageOf(server.pid).threads).toBeLessThanOrEqual(before.threads + 16) // pools grow to their size
  })
})
