/**
 * What intents cost: 4 KiB random writes at depth 32 to a formatted volume, with intents and without, switched on and off in turn
 * (two volumes are never quite the same: how they were filled decides what the page cache is made of), now the one first and now
 * the other. The median of the rounds' ratios counts: what else the machine does falls on both sides of each.
 *
 *   hot    the volume fits into the hot set: marks are made once, then every write goes in place
 *   cold   the volume is 16 times as large as the hot set: nearly every write waits for a mark, and others have to cool for it
 *
 * The second has no figure to reach: it is the price of a load that such volumes should not have, to be known.
 */
import { join } from 'node:path'
import { type Load, runFio } from './fio.ts'
import { cpuSeconds } from './processes.ts'
import type { Check } from './report.ts'
import { median, type Sample, sampleOf } from './rows.ts'
import { controlSocket, EXPORT, fullstripe, nbdUri, serve } from './servers.ts'

const KiB = 1024
const MiB = 1024 * KiB
const HOT_RATIO_MIN = 0.9
/** Small regions make a hot set that is small in bytes, but works as the large one does: hundreds cool with one flush. */
const COLD = { hotRegions: 1024, regionSize: 64 * KiB, times: 16 }
const WRITES: Load = { pattern: 'randwrite', block: 4 * KiB, depth: 32, connections: 1 }
const FILL: Load = { pattern: 'write', block: MiB, depth: 8, connections: 1 }

interface Setting {
  readonly name: string
  readonly size: number // bytes of the volume
  readonly serve: readonly string[]
  readonly regions: readonly string[]
}

interface Result {
  readonly throughput: number // with intents, times that without
  readonly cpu: number // of the server, a request; the same ratio
  readonly requestsPerSecond: number // with intents
  readonly announced: number // regions, for each request that was made with intents
}

export async function intentsCost(
  directory: string,
  datapath: 'native' | 'portable',
  quick: boolean,
): Promise<Check[]> {
  const hot = await measure(directory, datapath, quick, {
    name: 'hot',
    size: (quick ? 64 : 256) * MiB,
    serve: [],
    regions: [],
  })
  const cold = await measure(directory, datapath, quick, {
    name: 'cold',
    size: COLD.hotRegions * COLD.regionSize * COLD.times,
    serve: ['--hot-regions', String(COLD.hotRegions)],
    regions: ['--region-size', String(COLD.regionSize)],
  })
  const text = ({ throughput, cpu, requestsPerSecond }: Result) =>
    `${throughput.toFixed(2)} x without, CPU ${cpu.toFixed(2)} x (${requestsPerSecond.toFixed(0)}/s)`
  return [
    {
      title: `${datapath}, 4K random writes over a hot set, with intents: throughput`,
      value: text(hot),
      target: `>= ${HOT_RATIO_MIN}`,
      reached: hot.throughput >= HOT_RATIO_MIN,
    },
    {
      title: `${datapath}, the same spread over ${COLD.times} times the hot set (${(100 * cold.announced).toFixed(0)} % of writes announce)`,
      value: text(cold),
      target: '-',
      reached: true,
    },
  ]
}

async function measure(
  directory: string,
  datapath: 'native' | 'portable',
  quick: boolean,
  setting: Setting,
): Promise<Result> {
  const pool = join(directory, `intents-${setting.name}-${datapath}`)
  await fullstripe(['pool', 'create', pool])
  const daemon = serve(pool, datapath, setting.serve)
  try {
    await daemon.listening(controlSocket(pool))
    const uri = nbdUri(join(pool, 'nbd.sock'))
    await fullstripe(['volume', 'create', EXPORT, '--size', String(setting.size), '--pool', pool])
    await runFio(uri, FILL, { size: setting.size })
    let requests = 0
    let marks = 0
    const round = async (intents: 'on' | 'off'): Promise<Sample> => {
      const options = intents === 'on' ? setting.regions : []
      await fullstripe(['volume', 'set', EXPORT, '--intents', intents, ...options, '--pool', pool])
      const load = { size: setting.size, seconds: 1 }
      await runFio(uri, WRITES, load) // the first marks; and without intents, the first direct bits
      const before = intents === 'on' ? await announced(pool) : 0
      const cpu = cpuSeconds(daemon.pid)
      const done = await runFio(uri, WRITES, load)
      const sample = sampleOf(done, cpuSeconds(daemon.pid) - cpu)
      if (intents === 'on') {
        requests += done.requests
        marks += (await announced(pool)) - before
      }
      return sample
    }
    const samples: { without: Sample; with: Sample }[] = []
    for (let n = 0; n < (quick ? 3 : 11); n++) {
      const first = n % 2 === 0 ? await round('off') : undefined
      const kept = await round('on')
      samples.push({ without: first ?? (await round('off')), with: kept })
    }
    const ratio = (of: (sample: Sample) => number) =>
      median(samples.map((pair) => of(pair.with) / of(pair.without)))
    return {
      throughput: ratio(({ requestsPerSecond }) => requestsPerSecond),
      cpu: ratio(({ cpuMicroseconds }) => cpuMicroseconds),
      requestsPerSecond: median(samples.map((pair) => pair.with.requestsPerSecond)),
      announced: marks / requests,
    }
  } finally {
    await daemon.stop()
  }
}

async function announced(pool: string): Promise<number> {
  const { json } = await fullstripe(['volume', 'show', EXPORT, '--pool', pool])
  const count: unknown = Reflect.get(Object(Reflect.get(Object(json), 'intents')), 'announced')
  if (typeof count !== 'number') throw new Error('the volume keeps no intents')
  return count
}
