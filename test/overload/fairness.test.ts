import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { prepare, SERVERS } from '../concurrency/servers.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import type { LeanDaemon } from '../support/lean-daemon.ts'
import { within } from '../support/poll.ts'
import { CMD } from '../support/wire-client.ts'
import { Flood, REPLY, requests } from './flood.ts'

/**
 * A client with one small request in flight next to one that has 128 large ones in flight all the time. The small one
 * is slower than alone, which is measured and printed; what is asserted is that between one of its requests and the answer
 * the other gets few answers, as a rule: not those to the queue that it had there before.
 */
const MiB = 2 ** 20
const DEPTH = 128
const REQUESTS = 200 // of the victim
const SIZE = 256 * MiB
/** A turn of the datapath's, and what was on its way in the sockets when the victim asked. */
const ANSWERS_MAX = 32

vi.setConfig({ testTimeout: 120_000, hookTimeout: 60_000 })

const FLOODERS = [
  { name: 'reads', command: CMD.READ, reply: REPLY + MiB },
  { name: 'writes', command: CMD.WRITE, reply: REPLY },
] as const
const VICTIMS = [
  {
    name: 'reads',
    run: (client: NbdClient, at: number) => client.read(Buffer.alloc(4096), (at % 4096) * 4096),
  },
  {
    name: 'writes',
    run: (client: NbdClient, at: number) => client.write(Buffer.alloc(4096, at), (at % 4096) * 4096),
  },
  {
    name: 'first writes',
    run: (client: NbdClient, at: number) => client.write(Buffer.alloc(4096, at), 128 * MiB + at * 65_536),
  },
] as const
let nextFirst = 0

describe.each(SERVERS.filter(({ slow }) => slow === undefined))('sharing a server: $name', (kind) => {
  const temporary = { path: '', remove: (): void => {} }
  let server: LeanDaemon
  let uri = ''

  beforeEach(async () => {
    Object.assign(temporary, temporaryDirectory('fullstripe-fairness-'))
    const pool = join(temporary.path, 'pool')
    uri = `nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`
    server = prepare(kind, temporary.path)
    await createPool(pool, { capacity: 2 * SIZE })
    const made = await Pool.open(pool, { datapath: 'portable', log: pino({ level: 'silent' }) })
    await made.createVolume({ name: 'v', size: SIZE })
    await made.close()
    await server.open(pool, kind.datapath)
    const client = await NbdClient.connect(uri)
    await client.write(Buffer.alloc(64 * MiB, 1), 0)
    await client.close()
    nextFirst = 0
  })
  afterEach(async () => {
    await server.kill()
    temporary.remove()
  })

  it.each(FLOODERS)('one small request next to 128 large $name', async ({ command, reply }) => {
    const victim = await NbdClient.connect(uri)
    const alone = await pace(victim, () => 0)
    const flood = await Flood.connect(uri)
    let sent = 0
    const refill = (): void => {
      const wanted = Math.floor(flood.received / reply) + DEPTH - sent
      if (wanted <= 0 || flood.closed) return
      const offset = (): number => 16 * MiB + (sent++ % 32) * MiB
      const payload = command === CMD.WRITE ? { payload: large } : { length: MiB }
      for (let n = 0; n < wanted; n++) void flood.send(requests([{ command, offset: offset(), ...payload }]))
    }
    flood.onData = refill
    refill()
    await within(
      new Promise<void>((resolve) => {
        const poll = (): void => {
          if (flood.received > 2 * DEPTH * reply) resolve()
          else setTimeout(poll, 10)
        }
        poll()
      }),
      'the flood flows',
      60_000,
    )
    const flooded = await pace(victim, () => Math.floor(flood.received / reply))
    flood.destroy()
    await victim.close()
    for (const [index, { name }] of VICTIMS.entries()) {
      const [before, during] = [alone[index], flooded[index]]
      if (before === undefined || during === undefined) continue
      console.log(
        `${kind.name}: ${name} ${before.rate} a second alone, ${during.rate} next to the flood (1/${(before.rate / during.rate).toFixed(1)});`,
        `the other's answers between: ${during.median} in the middle, ${during.most} at most`,
      )
      expect(during.median, name).toBeLessThanOrEqual(ANSWERS_MAX)
    }
  })

  /** One request after the other, of each kind. @param others how many answers the other client has had */
  async function pace(client: NbdClient, others: () => number) {
    const results: { rate: number; median: number; most: number }[] = []
    for (const { name, run } of VICTIMS) {
      const between: number[] = []
      const start = performance.now()
      for (let n = 0; n < REQUESTS; n++) {
        const before = others()
        await within(
          run(client, name === 'first writes' ? nextFirst++ : n),
          `a request of the victim: ${name}`,
          60_000,
        )
        between.push(others() - before)
      }
      const rate = Math.round((REQUESTS * 1000) / (performance.now() - start))
      between.sort((a, b) => a - b)
      results.push({ rate, median: between[REQUESTS >> 1] ?? 0, most: between[REQUESTS - 1] ?? 0 })
    }
    return results
  }
})

const large = Buffer.alloc(MiB, 9)
