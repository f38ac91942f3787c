/**
 * What intents cost: 4 KiB random writes at depth 32 to two formatted volumes of one pool, one with intents and one without, in
 * turn, round after round, now the one first and now the other. The median of the rounds' ratios counts: what else the machine
 * does falls on both sides of each.
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
import { controlSocket, fullstripe, nbdUri, serve } from './servers.ts'

const KiB = 1024
const MiB = 1024 * KiB
const HOT_RATIO_MIN = 0.9
/** Small regions make a hot set that is small in bytes, but works as the large one does: hundreds cool with one flush. */
const COLD = { hotRegions: 1024, regionSize: 64 * KiB, times: 16 }
const WRITES: Load = { pattern: 'randwrite', block: 4 * KiB, depth: 32, connections: 1 }
const FILL: Load = { pattern: 'write', block: MiB, depth: 8, connections: 1 }

interface Setting {
  readonly name: string
  readonly size: number // bytes of each volume
  readonly serve: readonly string[]
  readonly create: readonly string[]
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
    create: [],
  })
  const cold = await measure(directory, datapath, quick, {
    name: 'cold',
    size: COLD.hotRegions * COLD.regionSize * COLD.times,
    serve: ['--hot-regions', String(COLD.hotRegions)],
    create: ['--region-size', String(COLD.regionSize)],
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
    const volumes = { without: [], with: ['--intents', ...setting.create] } as const
    const uri = (name: string) => nbdUri(join(pool, 'nbd.sock'), name)
    for (const [name, options] of Object.entries(volumes)) {
      const size = ['--size', String(setting.size)]
      await fullstripe(['volume', 'create', name, ...size, ...options, '--pool', pool])
      await runFio(uri(name), FILL, { size: setting.size })
    }
    const round = async (name: keyof typeof volumes): Promise<Sample> => {
      const cpu = cpuSeconds(daemon.pid)
      const done = await runFio(uri(name), WRITES, { size: setting.size, seconds: 1 })
      return sampleOf(done, cpuSeconds(daemon.pid) - cpu)
    }
    await round('with') // the first marks
    const before = await announced(pool)
    const samples: { without: Sample; with: Sample }[] = []
    for (let n = 0; n < (quick ? 3 : 15); n++) {
      const first = n % 2 === 0 ? await round('without') : undefined
      const kept = await round('with')
      samples.push({ without: first ?? (await round('without')), with: kept })
    }
    const marks = (await announced(pool)) - before
    const requests = samples.reduce((sum, sample) => sum + sample.with.requestsPerSecond, 0) // of a second each
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
  const { json } = await fullstripe(['volume', 'show', 'with', '--pool', pool])
  const count: unknown = Reflect.get(Object(Reflect.get(Object(json), 'intents')), 'announced')
  if (typeof count !== 'number') throw new Error('the volume keeps no intents')
  return count
}
