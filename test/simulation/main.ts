import { parseArgs } from 'node:util'
import {
  replayOf,
  runCampaign,
  shrink,
  type Totals,
  WORLDS,
  type World,
  workersByDefault,
} from './campaign.ts'
import type { SeedOptions } from './simulation.ts'

const USAGE = `npm run simulate -- [--pair] [--seeds FROM..TO | --minutes N] [--from SEED] [--workers N]
npm run simulate -- [--pair] --seed N [--requests N] [--lives N] [--trace]

  --pair     two daemons with a mirror between them (pair.ts); default: one (simulation.ts)
  --seeds    a range, each seed once; default 1..1000
  --minutes  as many seeds as that takes, from one that the clock chooses, or from --from
  --workers  threads; default: one a processor
  --seed     one seed; --trace prints every step. --requests and --lives cut it short`

const { values } = parseArgs({
  options: {
    pair: { type: 'boolean', default: false },
    seeds: { type: 'string' },
    minutes: { type: 'string' },
    from: { type: 'string' },
    workers: { type: 'string' },
    seed: { type: 'string' },
    requests: { type: 'string' },
    lives: { type: 'string' },
    trace: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
})

const world: World = values.pair ? 'pair' : 'pool'

if (values.help) console.log(USAGE)
else process.exitCode = values.seed === undefined ? await campaign() : await one(number(values.seed))

async function one(seed: number): Promise<number> {
  const options: SeedOptions = {
    ...(values.requests === undefined ? {} : { requestsMax: number(values.requests) }),
    ...(values.lives === undefined ? {} : { livesMax: number(values.lives) }),
    ...(values.trace ? { onTrace: (line: string) => console.log(line) } : {}),
  }
  const result = await WORLDS[world](seed, options)
  console.log(
    `seed ${seed}: ${result.lives} lives, ${result.answered} requests, ${result.steps} steps, trace hash ${result.hash}`,
  )
  console.log(result.failure ?? 'passed')
  return result.failure === undefined ? 0 : 1
}

async function campaign(): Promise<number> {
  const [first = '1', last = first] = (values.seeds ?? '1..1000').split('..')
  const minutes = values.minutes === undefined ? undefined : number(values.minutes)
  const from = values.from ?? (minutes === undefined ? first : String(Date.now() % 2 ** 31))
  const start = performance.now()
  let toldAt = start
  const totals = await runCampaign({
    world,
    from: number(from),
    ...(minutes === undefined ? { to: number(last) } : { forMs: minutes * 60_000 }),
    workers: values.workers === undefined ? workersByDefault() : number(values.workers),
    failuresMax: 20,
    onResult: (result, sofar) => {
      if (result.failure !== undefined) console.log(`seed ${result.seed}: ${result.failure}`)
      if (performance.now() - toldAt < 10_000) return
      toldAt = performance.now()
      console.log(summary(sofar, toldAt - start))
    },
  })
  console.log(summary(totals, performance.now() - start))
  for (const { seed } of totals.failures.slice(0, 5)) {
    console.log(`again: ${replayOf(seed, await shrink(seed, world), world)}`)
  }
  return totals.failures.length === 0 ? 0 : 1
}

function summary(totals: Totals, ms: number): string {
  const { seeds, answered, steps, deaths, powerCuts, faultyLives, images, bits, failures } = totals
  const pairs = world === 'pair' ? `${images} images, ${bits} comparisons with bitmaps, ` : ''
  const rate = Math.round((seeds * 60_000) / ms)
  return `${seeds} seeds (${rate} a minute): ${answered} requests, ${steps} steps, ${deaths} ends, ${powerCuts} power cuts, ${faultyLives} lives with faults, ${pairs}${failures.length} failures`
}

function number(text: string): number {
  const value = Number(text)
  if (!Number.isFinite(value) || value < 0) throw new Error(`${text} is not a number\n${USAGE}`)
  return value
}
