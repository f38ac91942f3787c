/**
 * What intents cost: 4 KiB random writes at depth 32 to two formatted volumes of one pool, one with intents and one without, in
 * turn, round after round.
 *
 *   hot    the volume fits into the hot set: marks are made once, then every write goes in place
 *   cold   the volume is 16 times as large as the hot set: nearly every write waits for a mark, and others have to cool for it
 *
 * The second has no figure to reach: it is the price of a load that such volumes should not have, to be known.
 */
import { join } from 'node:path'
import { type Extent, type Load, runFio } from './fio.ts'
import type { Check } from './report.ts'
import { median } from './rows.ts'
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
  readonly without: number // requests a second
  readonly with: number
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
  const ratio = hot.with / hot.without
  return [
    {
      title: `${datapath}, 4K random writes over a hot set, with intents: throughput`,
      value: `${ratio.toFixed(2)} x without (${hot.with.toFixed(0)}/s)`,
      target: `>= ${HOT_RATIO_MIN}`,
      reached: ratio >= HOT_RATIO_MIN,
    },
    {
      title: `${datapath}, the same spread over ${COLD.times} times the hot set (${(100 * cold.announced).toFixed(0)} % of writes announce)`,
      value: `${(cold.with / cold.without).toFixed(2)} x without (${cold.with.toFixed(0)}/s)`,
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
    const volumes = [
      { name: 'without', options: [], samples: [] as number[], requests: 0 },
      { name: 'with', options: ['--intents', ...setting.create], samples: [] as number[], requests: 0 },
    ]
    const run = async (name: string, load: Load, extent: Extent) =>
      runFio(nbdUri(join(pool, 'nbd.sock'), name), load, extent)
    for (const { name, options } of volumes) {
      const size = ['--size', String(setting.size)]
      await fullstripe(['volume', 'create', name, ...size, ...options, '--pool', pool])
      await run(name, FILL, { size: setting.size })
    }
    const before = await announced(pool)
    const seconds = quick ? 1 : 3
    for (let round = 0; round < (quick ? 3 : 7); round++) {
      for (const volume of volumes) {
        const done = await run(volume.name, WRITES, { size: setting.size, seconds })
        volume.samples.push(done.requests / done.seconds)
        volume.requests += done.requests
      }
    }
    const marks = (await announced(pool)) - before
    const [without, kept] = volumes
    return {
      without: median(without?.samples ?? []),
      with: median(kept?.samples ?? []),
      announced: marks / (kept?.requests ?? 1),
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
