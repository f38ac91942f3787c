import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import { runPair } from './pair.ts'
import { runSeed, type SeedOptions, type SeedResult } from './simulation.ts'

/**
 * Many seeds: a range, or as many as a time allows; here, or in several threads. A failure is told with the command that
 * repeats it, with as few requests and lives as still lead to it.
 */
export const WORLDS = { pool: runSeed, pair: runPair } as const
/** One pool, or two with a mirror between them. */
export type World = keyof typeof WORLDS

export interface CampaignOptions {
  readonly world?: World
  readonly from: number
  /** The last seed; absent: until the time is over. */
  readonly to?: number
  /** Milliseconds of real time. */
  readonly forMs?: number
  /** Threads; 0: in this one. More than that only from compiled code. */
  readonly workers?: number
  readonly failuresMax?: number
  readonly onResult?: (result: SeedResult, totals: Totals) => void
}

export interface Totals {
  seeds: number
  steps: number
  answered: number // requests
  deaths: number
  powerCuts: number
  faultyLives: number
  images: number // of secondaries
  bits: number // comparisons of a pair with its bitmaps
  readonly failures: SeedResult[]
}

export async function runCampaign(options: CampaignOptions): Promise<Totals> {
  const {
    from,
    to = Number.MAX_SAFE_INTEGER,
    forMs = Number.POSITIVE_INFINITY,
    workers = 0,
    world = 'pool',
  } = options
  const totals: Totals = {
    seeds: 0,
    steps: 0,
    answered: 0,
    deaths: 0,
    powerCuts: 0,
    faultyLives: 0,
    images: 0,
    bits: 0,
    failures: [],
  }
  const start = performance.now()
  let next = from
  /** The next seed to run; undefined: enough. */
  const take = (): number | undefined => {
    const enough =
      next > to ||
      performance.now() - start >= forMs ||
      totals.failures.length >= (options.failuresMax ?? Number.POSITIVE_INFINITY)
    return enough ? undefined : next++
  }
  const note = (result: SeedResult): void => {
    totals.seeds++
    totals.steps += result.steps
    totals.answered += result.answered
    totals.deaths += result.deaths
    totals.powerCuts += result.powerCuts
    totals.faultyLives += result.faultyLives
    totals.images += result.images ?? 0
    totals.bits += result.bits ?? 0
    if (result.failure !== undefined) totals.failures.push(result)
    options.onResult?.(result, totals)
  }
  if (workers === 0) {
    for (let seed = take(); seed !== undefined; seed = take()) note(await WORLDS[world](seed))
  } else {
    await Promise.all(Array.from({ length: workers }, () => inThread(world, take, note)))
  }
  return totals
}

export function workersByDefault(): number {
  return availableParallelism()
}

function inThread(
  world: World,
  take: () => number | undefined,
  note: (result: SeedResult) => void,
): Promise<void> {
  const worker = new Worker(new URL('./worker.js', import.meta.url))
  return new Promise((resolve, reject) => {
    const go = (): void => {
      const seed = take()
      if (seed === undefined) worker.terminate().then(() => resolve(), reject)
      else worker.postMessage({ world, seed })
    }
    worker.on('message', (result: SeedResult) => {
      note(result)
      go()
    })
    worker.on('error', reject)
    go()
  })
}

/** The same failure with fewer requests or lives, where one is found among a few tries. */
export async function shrink(seed: number, world: World = 'pool'): Promise<SeedOptions> {
  const runSeed = WORLDS[world]
  let best: SeedOptions = {}
  for (const requestsMax of [3, 6, 12, 25, 50]) {
    if ((await runSeed(seed, { requestsMax })).failure === undefined) continue
    best = { requestsMax }
    break
  }
  for (const livesMax of [1, 2, 3, 4]) {
    if ((await runSeed(seed, { ...best, livesMax })).failure === undefined) continue
    return { ...best, livesMax }
  }
  return best
}

/** One line that runs it again. */
export function replayOf(seed: number, options: SeedOptions = {}, world: World = 'pool'): string {
  const pair = world === 'pair' ? '--pair ' : ''
  const requests = options.requestsMax === undefined ? '' : ` --requests ${options.requestsMax}`
  const lives = options.livesMax === undefined ? '' : ` --lives ${options.livesMax}`
  return `npm run simulate -- ${pair}--seed ${seed}${requests}${lives} --trace`
}
