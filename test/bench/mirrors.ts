/**
 * What mirrors cost and how fast they copy. Both daemons, the client and the peers share the machine; rounds take turns, and medians of
 * their ratios count.
 *
 *   copy     an initial copy of a full volume, next to nbdcopy between two nbdkit file servers and to qemu's mirror job to qemu-nbd
 *   thin     1 TiB with a little in it, next to a volume that has just that
 *   sync     4 KiB random writes while both sides get them; one at a time over a line with a delay
 *   async    the same while cycles run; what travels after a break
 *   verify   a comparison of equal sides, next to plain reads of both
 *   ready    from nothing to a mirrored volume of 10 TiB, next to the time to write all of it
 */
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { Client } from '../../src/cli/client.ts'
import type { EventRecord } from '../../src/daemon/events.ts'
import type { MirrorInfo } from '../../src/mirror/types.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { FaultRelay } from '../support/fault-relay.ts'
import { type Load, runFio } from './fio.ts'
import { freePort, mirrorSeconds, nbdcopySeconds, roundTripMs } from './mirror-peers.ts'
import type { Background } from './processes.ts'
import type { Check } from './report.ts'
import { median } from './rows.ts'
import { controlSocket, fullstripe, serve } from './servers.ts'

const KiB = 1024
const MiB = 1024 * KiB
const GiB = 1024 * MiB
const TiB = 1024 * GiB

const WRITES: Load = { pattern: 'randwrite', block: 4 * KiB, depth: 32, connections: 1 }
const ONE_WRITE: Load = { pattern: 'randwrite', block: 4 * KiB, depth: 1, connections: 1 }
const READS: Load = { pattern: 'read', block: MiB, depth: 8, connections: 1 }
const FILL: Load = { pattern: 'write', block: MiB, depth: 8, connections: 1 }

/** Two daemons that know each other. */
class Two {
  readonly pools: readonly [string, string]
  readonly clients: readonly [Client, Client]
  readonly #daemons: readonly Background[]
  readonly port: number

  static async start(directory: string, datapath: 'native' | 'portable', capacity: string): Promise<Two> {
    mkdirSync(directory)
    const pools = [join(directory, 'one'), join(directory, 'two')] as const
    const port = await freePort()
    for (const pool of pools) await fullstripe(['pool', 'create', pool, '--capacity', capacity])
    const daemons = [serve(pools[0], datapath), serve(pools[1], datapath, ['--link', `127.0.0.1:${port}`])]
    const two = new Two(pools, daemons, port)
    for (const [index, daemon] of daemons.entries()) await daemon.listening(controlSocket(pools[index] ?? ''))
    return two
  }

  private constructor(pools: readonly [string, string], daemons: readonly Background[], port: number) {
    this.pools = pools
    this.port = port
    this.#daemons = daemons
    this.clients = [new Client(pools[0]), new Client(pools[1])]
  }

  uri(volume: string, side: 0 | 1 = 0): string {
    return `nbd+unix:///${volume}?socket=${join(this.pools[side], 'nbd.sock')}`
  }

  async volume(name: string, size: number, more: object = {}): Promise<void> {
    await this.clients[0].post('/v1/volumes', { name, size, ...more })
  }

  /** @returns seconds until it is in use */
  async mirror(
    volume: string,
    mode: MirrorInfo['mode'],
    port = this.port,
    more: object = {},
  ): Promise<number> {
    const [client] = this.clients
    const { nextEvent } = await client.get<{ nextEvent: number }>('/v1/status')
    const from = performance.now()
    await client.post(`/v1/volumes/${volume}/mirrors`, { peer: `127.0.0.1:${port}`, mode, ...more })
    await this.#told(volume, mode === 'sync' ? 'insync' : 'cycling', nextEvent)
    return (performance.now() - from) / 1000
  }

  /** Waits for the daemon to say so. Asking it all the time would take a tenth of the processors; nobody asks the peers. */
  async #told(volume: string, state: MirrorInfo['state'], since: number): Promise<void> {
    const stop = new AbortController()
    const path = `/v1/events?since=${since}&follow=true`
    try {
      for await (const event of this.clients[0].lines<EventRecord>(path, stop.signal)) {
        if (!event.object.startsWith(`${volume}/`)) continue
        if (event.kind === `mirror.${state}`) return
        if (event.kind === 'mirror.splitbrain') throw new Error(`${volume}: ${event.message}`)
      }
    } finally {
      stop.abort()
    }
    throw new Error(`${volume} did not become ${state}`)
  }

  async show(volume: string): Promise<MirrorInfo> {
    const { mirrors } = await this.clients[0].get<{ mirrors: MirrorInfo[] }>(`/v1/volumes/${volume}/mirrors`)
    const [mirror] = mirrors
    if (mirror === undefined) throw new Error(`volume ${volume} has no mirror`)
    return mirror
  }

  async reach(volume: string, state: MirrorInfo['state']): Promise<MirrorInfo> {
    for (;;) {
      const mirror = await this.show(volume)
      if (mirror.state === state) return mirror
      if (mirror.state === 'splitbrain') throw new Error(`${volume}: ${mirror.reason}`)
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
  }

  async say(volume: string, what: string): Promise<void> {
    const { name } = await this.show(volume)
    await this.clients[0].post(`/v1/volumes/${volume}/mirrors/${name}/${what}`, {})
  }

  async drop(volume: string): Promise<void> {
    const { name } = await this.show(volume)
    await this.clients[0].delete(`/v1/volumes/${volume}/mirrors/${name}`)
    await this.clients[1].delete(`/v1/volumes/${volume}`)
  }

  async stop(): Promise<void> {
    for (const daemon of this.#daemons) await daemon.stop()
  }
}

export async function mirrorFigures(
  directory: string,
  datapath: 'native' | 'portable',
  quick: boolean,
): Promise<Check[]> {
  const two = await Two.start(join(directory, `mirrors-${datapath}`), datapath, '64T')
  try {
    return [
      ...(await copies(two, join(directory, `mirrors-${datapath}`), datapath, quick)),
      ...(await writes(two, datapath, quick)),
      ...(await comparison(two, datapath, quick)),
      ...(await ready(two, datapath)),
    ]
  } finally {
    await two.stop()
  }
}

async function copies(two: Two, directory: string, datapath: string, quick: boolean): Promise<Check[]> {
  const size = (quick ? 256 : 1024) * MiB
  await two.volume('copy', size)
  await runFio(two.uri('copy'), FILL, { size })
  await two.volume('thin', TiB)
  await runFio(two.uri('thin'), FILL, { size })
  const ratios = { nbdcopy: [] as number[], qemu: [] as number[], thin: [] as number[] }
  for (let round = 0; round < (quick ? 3 : 5); round++) {
    const ours = await two.mirror('copy', 'async', two.port, { intervalMs: 3_600_000 })
    await two.drop('copy')
    ratios.nbdcopy.push((await nbdcopySeconds(directory, size)) / ours)
    ratios.qemu.push((await mirrorSeconds(directory, size)) / ours)
    const thin = await two.mirror('thin', 'async', two.port, { intervalMs: 3_600_000 })
    await two.drop('thin')
    ratios.thin.push(thin / ours)
  }
  const row = (
    title: string,
    list: number[],
    target: string,
    reached: (ratio: number) => boolean,
  ): Check => ({
    title: `${datapath}, ${title}`,
    value: `${median(list).toFixed(2)} x`,
    target,
    reached: reached(median(list)),
  })
  return [
    row('initial copy, speed next to nbdcopy between nbdkits', ratios.nbdcopy, '>= 1', (ratio) => ratio >= 1),
    row("initial copy, speed next to qemu's mirror job", ratios.qemu, '>= 1', (ratio) => ratio >= 1),
    row('initial copy of 1 TiB with as much in it: time', ratios.thin, '<= 1.3', (ratio) => ratio <= 1.3),
  ]
}

async function writes(two: Two, datapath: string, quick: boolean): Promise<Check[]> {
  const size = (quick ? 64 : 256) * MiB
  const seconds = quick ? 2 : 10
  for (const name of ['plain', 'both', 'later', 'far']) {
    await two.volume(name, size)
    await runFio(two.uri(name), FILL, { size })
  }
  await two.mirror('both', 'sync')
  await two.mirror('later', 'async')
  const ratios = { sync: [] as number[], async: [] as number[] }
  for (let round = 0; round < (quick ? 3 : 5); round++) {
    const rate = async (name: string): Promise<number> =>
      (await runFio(two.uri(name), WRITES, { size, seconds })).requests / seconds
    const plain = await rate('plain')
    ratios.sync.push((await rate('both')) / plain)
    ratios.async.push((await rate('later')) / plain)
  }
  const changed = await resynced(two, size)
  const relay = await FaultRelay.open({ port: two.port, delayMs: 1 })
  await two.mirror('far', 'sync', relay.port)
  const trips: number[] = []
  for (let round = 0; round < 3; round++) {
    const done = await runFio(two.uri('far'), ONE_WRITE, { size, seconds: 2 })
    trips.push(((2 / done.requests) * 1000) / (await roundTripMs(1)))
  }
  await two.drop('far')
  await relay.close()
  return [
    {
      title: `${datapath}, sync, 4K random writes at depth 32, of an unmirrored volume's`,
      value: `${median(ratios.sync).toFixed(2)} x`,
      target: '>= 0.5',
      reached: median(ratios.sync) >= 0.5,
    },
    {
      title: `${datapath}, sync, a write at depth 1 over a line with 1 ms delay, in round trips`,
      value: median(trips).toFixed(2),
      target: '<= 1.3',
      reached: median(trips) <= 1.3,
    },
    {
      title: `${datapath}, async, 4K random writes at depth 32, of an unmirrored volume's`,
      value: `${median(ratios.async).toFixed(2)} x`,
      target: '>= 0.85',
      reached: median(ratios.async) >= 0.85,
    },
    {
      title: `${datapath}, bytes on the wire after a break, of the units changed`,
      value: `${changed.toFixed(3)} x`,
      target: '<= 1.1',
      reached: changed <= 1.1,
    },
  ]
}

/** Breaks the mirror `later`, changes one unit in a hundred, and counts what travels then. */
async function resynced(two: Two, size: number): Promise<number> {
  while ((await two.show('later')).lag.bytes > 0) await new Promise((resolve) => setTimeout(resolve, 20))
  await two.say('later', 'pause')
  const { unitBytes } = await two.show('later')
  const client = await NbdClient.connect(two.uri('later'))
  const units = Math.max(1, Math.floor(size / unitBytes / 100))
  for (let unit = 0; unit < units; unit++)
    await client.write(Buffer.alloc(4 * KiB, 1), unit * 100 * unitBytes)
  await client.close()
  const before = (await two.show('later')).counters
  await two.say('later', 'resume')
  for (;;) {
    const { counters, lag } = await two.show('later')
    if (lag.bytes === 0) return (counters.wireBytes - before.wireBytes) / (units * unitBytes)
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

async function comparison(two: Two, datapath: string, quick: boolean): Promise<Check[]> {
  const size = (quick ? 256 : 1024) * MiB
  await two.mirror('copy', 'async', two.port, { intervalMs: 3_600_000 })
  const speeds: number[] = []
  let wire = 0
  for (let round = 0; round < 3; round++) {
    const read = async (side: 0 | 1): Promise<number> => {
      const from = performance.now()
      await runFio(two.uri('copy', side), READS, { size })
      return performance.now() - from
    }
    // One after the other: their sum is what reading both sides takes.
    const plain = (await read(0)) + (await read(1))
    const before = (await two.show('copy')).counters.wireBytes
    const from = performance.now()
    await two.say('copy', 'verify')
    let verify = (await two.show('copy')).verify
    while (verify === null || verify.ended === null) {
      await new Promise((resolve) => setTimeout(resolve, 5))
      verify = (await two.show('copy')).verify
    }
    if (verify.failure !== null || verify.differing > 0)
      throw new Error(`the sides differ: ${verify.failure}`)
    speeds.push(plain / (performance.now() - from))
    wire = Math.max(wire, (await two.show('copy')).counters.wireBytes - before)
  }
  return [
    {
      title: `${datapath}, comparing equal sides, speed next to plain reads of both (bound by SHA-256 on all processors)`,
      value: `${median(speeds).toFixed(2)} x`,
      target: '>= 0.7',
      reached: median(speeds) >= 0.7,
    },
    {
      title: `${datapath}, comparing equal sides, bytes on the wire`,
      value: `${((wire / size) * 100).toFixed(4)} %`,
      target: '<= 0.1 %',
      reached: wire <= size / 1000,
    },
  ]
}

async function ready(two: Two, datapath: string): Promise<Check[]> {
  const speed = await runFio(two.uri('plain'), FILL, { size: 64 * MiB })
  const checks: Check[] = []
  for (const provision of ['thin', 'thick']) {
    const from = performance.now()
    await two.volume(`huge-${provision}`, 10 * TiB, { provision })
    await two.mirror(`huge-${provision}`, 'async')
    const client = await NbdClient.connect(two.uri(`huge-${provision}`))
    await client.write(Buffer.alloc(4 * KiB, 1), 5 * TiB)
    const seconds = (performance.now() - from) / 1000
    await client.close()
    const hours = (10 * TiB) / (speed.bytes / speed.seconds) / 3600
    checks.push({
      title: `${datapath}, 10 TiB ${provision}, from nothing to mirrored and written (formatting it first: ${hours.toFixed(1)} h)`,
      value: `${seconds.toFixed(2)} s`,
      target: '< 2 s',
      reached: seconds < 2,
    })
  }
  return checks
}
