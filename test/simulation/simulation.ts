import { assert } from '../../src/base/assert.ts'
import { messageOf } from '../../src/base/errors.ts'
import { COMMAND } from '../../src/nbd/constants.ts'
import type { Pool } from '../../src/volume/pool.ts'
import type { Volume } from '../../src/volume/volume.ts'
import type { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import type { Event } from './history.ts'
import { KINDS, Load, type LoadShape, type RequestKind } from './load.ts'
import { CHUNK, Machine } from './machine.ts'
import { ACTIONS, FAULTS, type FaultRates, type Lifetime, Process } from './process.ts'
import { randomOf, Scheduler } from './scheduler.ts'
import { SimClient } from './socket.ts'
import { intentsOf, type SimVolume, SimVolumes, sizeOf } from './volumes.ts'

/**
 * One seed: a pool on a machine, and the lives that its daemon has there.
 *
 *   life    opened, compared, used by clients and an operator, while devices are slow and may fail
 *   end     closed; or dead at any action of any device; then the power may fail, too
 *   after   `check` finds no error; every volume has what the histories allow, no sector of anybody else's
 *
 * What an end has cost is compared by the next life that gets so far: openings may fail or die as well.
 */
export interface SeedOptions {
  /** At most this many requests in each life, for finding a short way to the same failure. */
  readonly requestsMax?: number
  readonly livesMax?: number
  readonly onTrace?: (line: string) => void
}

export interface SeedResult {
  readonly seed: number
  readonly failure: string | undefined
  readonly hash: string // of all steps
  readonly steps: number
  readonly lives: number
  readonly answered: number // requests
  readonly deaths: number
  readonly powerCuts: number
  readonly faultyLives: number
  readonly images?: number // of secondaries that were looked at
  readonly bits?: number // times that all units of a pair were compared with the bitmaps
}

let running = false

/** Whatever is simulated: one pool, or a pair. */
export interface Simulated {
  readonly scheduler: Scheduler
  run(): Promise<void>
  fail(problem: string): void
}

export async function runSeed(seed: number, options: SeedOptions = {}): Promise<SeedResult> {
  const simulation = new Simulation(seed, options)
  await simulate(simulation)
  return simulation.result
}

/** One at a time in a thread, because each has the thread's timers to itself. */
export async function simulate(simulation: Simulated): Promise<void> {
  assert(!running, 'one simulation at a time')
  running = true
  const restore = simulation.scheduler.installTime()
  const onError = (error: unknown): void => simulation.fail(describe(error))
  process.on('uncaughtException', onError)
  process.on('unhandledRejection', onError)
  try {
    await simulation.run()
  } catch (error) {
    simulation.fail(describe(error))
  } finally {
    process.off('uncaughtException', onError)
    process.off('unhandledRejection', onError)
    restore()
    running = false
  }
}

class Simulation implements Simulated {
  readonly scheduler: Scheduler
  readonly #seed: number
  readonly #options: SeedOptions
  readonly #random: Random
  readonly #machine: Machine
  readonly #volumes: SimVolumes
  readonly #tight: boolean
  readonly #faulty: boolean
  #failure: string | undefined
  #lives = 0
  #answered = 0
  #deaths = 0
  #powerCuts = 0
  #faultyLives = 0
  /** What has happened since the content was compared last. */
  #event: Event | undefined
  #uncertain = false

  constructor(seed: number, options: SeedOptions) {
    this.#seed = seed
    this.#options = options
    const random = randomOf(seed)
    this.#random = random
    this.scheduler = new Scheduler(random, options.onTrace)
    const room = random.below(4)
    this.#tight = room < 3
    this.#faulty = random.below(2) === 0
    this.#machine = new Machine(
      this.scheduler,
      {
        members: random.pick([1, 1, 2, 3]),
        // Where there is hardly more room than content, what one gives back is soon another's.
        slots: room < 2 ? 14 + random.below(30) : room < 3 ? 50 + random.below(40) : 600,
        // A file has to hold what all stripes can change in one turn.
        journalBytes: CHUNK * random.pick(room < 2 ? [2, 3, 4] : [5, 6, 10]),
      },
      random.below(2) === 0,
    )
    this.#volumes = new SimVolumes(this.#machine.stripeSize)
  }

  get result(): SeedResult {
    return {
      seed: this.#seed,
      failure: this.#failure,
      hash: this.scheduler.hash,
      steps: this.scheduler.steps,
      lives: this.#lives,
      answered: this.#answered,
      deaths: this.#deaths,
      powerCuts: this.#powerCuts,
      faultyLives: this.#faultyLives,
    }
  }

  fail(problem: string): void {
    if (this.#failure !== undefined) return
    this.#failure = `life ${this.#lives}: ${problem}`
    this.scheduler.trace(() => `FAILED: ${problem}`)
  }

  async run(): Promise<void> {
    const lives = Math.min(2 + this.#random.below(4), this.#options.livesMax ?? Number.POSITIVE_INFINITY)
    for (let life = 0; life < lives && this.#failure === undefined; life++) await this.#life(life === 0)
    // The last end is looked at, too.
    if (this.#failure === undefined) await this.#life(false, true)
  }

  async #life(first: boolean, last = false): Promise<void> {
    const random = this.#random
    this.#lives++
    this.scheduler.restyle()
    const dies = !first && !last && random.below(6) > 0
    const lifetime: Lifetime = dies ? this.#lifetime() : { actions: Number.POSITIVE_INFINITY }
    const rates = this.#faulty && !first && !last ? this.#faultRates() : {}
    const process = new Process(
      this.scheduler,
      this.#faulty && !first && !last ? this.#openingFaultRates() : {},
      lifetime,
    )
    this.scheduler.trace(
      () =>
        `life ${this.#lives}: dies after ${lifetime.actions} actions of ${lifetime.of ?? 'any kind'}; faults ${JSON.stringify(rates)}`,
    )
    const pool = await this.#open(process)
    if (pool !== undefined) {
      process.faults = {}
      if (first) await this.#createVolumes(process, pool)
      else await this.#compare(process, pool)
      if (process.alive && this.#failure === undefined) {
        process.faults = rates
        if (random.below(2) === 0) await this.#acknowledge(process, pool)
        if (!last) await this.#use(process, pool, this.#loadShape(rates))
        if (process.alive && this.#failure === undefined && !dies) await this.#close(process, pool)
      }
    }
    if (process.faulted) this.#faultyLives++
    if (this.#failure === undefined) await this.#end(process)
  }

  async #open(process: Process): Promise<Pool | undefined> {
    const random = this.#random
    const shape = {
      inlineBytesMax: random.pick([0, CHUNK, 256 * 1024]),
      punches: random.below(2) === 0,
      hotSet: { regionsMax: random.pick([1, 2, 4, 64]), coolMs: random.pick([20, 1_000]) },
    }
    let outcome: Pool | 'failed' | undefined
    this.#machine.open(process, shape).then(
      (pool) => {
        outcome = pool
      },
      (error: unknown) => {
        this.scheduler.trace(() => `  the pool does not open: ${messageOf(error)}`)
        if (!process.faulted) this.fail(`the pool does not open: ${messageOf(error)}`)
        outcome = 'failed'
      },
    )
    await this.#until(process, () => outcome !== undefined, 'opening')
    return outcome === 'failed' ? undefined : outcome
  }

  async #createVolumes(process: Process, pool: Pool): Promise<void> {
    const random = this.#random
    const count = 1 + random.below(3)
    const { stripeSize, geometry } = this.#machine
    for (let index = 0; index < count; index++) {
      const stripes = 2 + random.below(random.pick([6, 24]))
      const formatUnit = random.pick([1, 1, 2, 3, 5])
      const options = {
        name: this.#volumes.newName(),
        size: sizeOf(stripes, stripeSize, random.below(2) * random.below(stripeSize / SECTOR)),
        provision:
          random.below(3) === 0 && stripes < geometry.slots / 3 ? ('thick' as const) : ('thin' as const),
        formatUnit,
        fill: random.below(4) === 0 ? 0xee : 0,
        ...intentsOf(random, formatUnit * stripeSize),
      }
      const volume = this.#volumes.add(options)
      let done = false
      pool.createVolume(options).then(
        () => {
          volume.state = 'there'
          done = true
        },
        (error: unknown) => {
          volume.state = 'deleted'
          done = true
          if (!this.#tight) this.fail(`creating ${volume.name}: ${messageOf(error)}`)
        },
      )
      await this.#until(process, () => done, 'creating volumes')
    }
  }

  /** Reads everything, over connections as clients have them. */
  async #compare(process: Process, pool: Pool): Promise<void> {
    const problem = this.#volumes.settle(pool)
    if (problem !== undefined) return this.fail(problem)
    const contents = new Map<SimVolume, Buffer>()
    const { there } = this.#volumes
    for (const [index, volume] of there.entries()) {
      const client = new SimClient(process, 1_000 + index, () => {})
      pool.datapath.serve(pool.volume(volume.name).exportId, {
        socket: client.server,
        received: Buffer.alloc(0),
        mode: 'simple',
        contexts: [],
        readOnly: false,
        onClose: () => {},
      })
      client.request(COMMAND.READ, 0, 0, volume.size, undefined, (errno, data) => {
        if (errno !== 0) this.fail(`reading ${volume.name} after the restart: error ${errno}`)
        contents.set(volume, Buffer.from(data))
        client.hangUp()
      })
    }
    await this.#until(process, () => contents.size === there.length, 'reading everything')
    if (contents.size < there.length || this.#failure !== undefined) return
    for (const [volume, content] of contents) {
      const lost: number[] = []
      const wrong = volume.history.restarted(content, this.#event ?? 'closed', this.#uncertain, (sector) =>
        lost.push(sector),
      )
      if (wrong !== undefined) return this.fail(`${volume.name}: ${wrong}`)
      const unannounced = this.#unannounced(pool.volume(volume.name), volume, content, lost)
      if (unannounced !== undefined) return this.fail(`${volume.name}: ${unannounced}`)
    }
    this.#machine.forgetUnsynced()
    this.#event = undefined
    this.#uncertain = false
  }

  /** Intents: whatever may differ from what was answered lies in a suspect region (DESIGN section 4). */
  #unannounced(
    found: Volume,
    { options }: SimVolume,
    content: Buffer,
    lost: readonly number[],
  ): string | undefined {
    if (options.intents !== true || this.#uncertain) return undefined
    const trusted = [...found.map()].filter(({ suspect }) => suspect !== true)
    const isTrusted = (sector: number): boolean =>
      trusted.some(({ offset, length }) => sector * SECTOR >= offset && sector * SECTOR < offset + length)
    const forgotten = lost.find(isTrusted)
    if (forgotten !== undefined) return `sector ${forgotten} has lost an answered change, and is not suspect`
    const perStripe = this.#machine.stripeSize / SECTOR
    for (let sector = 0; sector < content.length / SECTOR; sector++) {
      const slot = found.tables.slotOf(Math.floor(sector / perStripe))
      const plain = content.readUInt8(sector * SECTOR) === (options.fill ?? 0) // formatting is no change
      if (slot === 0 || plain || !this.#machine.wasUnsynced(slot, sector % perStripe)) continue
      if (isTrusted(sector)) return `sector ${sector} was written and not synced, and is not suspect`
    }
    return undefined
  }

  /** The operator has looked at what is suspect: so that the next stop shows what became so since. */
  async #acknowledge(process: Process, pool: Pool): Promise<void> {
    for (const { name, options } of this.#volumes.there) {
      if (options.intents !== true) continue
      let done = false
      const settled = (): void => {
        done = true
      }
      pool.volume(name).acknowledge().then(settled, settled)
      await this.#until(process, () => done, 'acknowledging')
    }
  }

  async #use(process: Process, pool: Pool, shape: LoadShape): Promise<void> {
    const fail = (problem: string): void => this.fail(problem)
    const load = new Load(process, pool, this.#volumes, shape, this.#machine.stripeSize, fail)
    load.start()
    await this.#until(
      process,
      () => load.done,
      'the load',
      () => load.story,
    )
    this.#answered += load.answered
    if (!process.alive || this.#failure !== undefined) return
    const wrong = tablesProblem(pool)
    if (wrong !== undefined) this.fail(wrong)
    load.hangUp()
  }

  async #close(process: Process, pool: Pool): Promise<void> {
    const flushes = this.#volumes.there.map(({ history }) => history.flush())
    let outcome: 'closed' | 'failed' | undefined
    pool.close().then(
      () => {
        outcome = 'closed'
      },
      (error: unknown) => {
        if (!process.faulted) this.fail(`closing: ${messageOf(error)}`)
        outcome = 'failed'
      },
    )
    await this.#until(process, () => outcome !== undefined, 'closing')
    // Where something has failed, the pool may have stopped promising anything, and was closed as it was.
    if (outcome !== 'closed' || process.faulted) return
    for (const answered of flushes) answered()
    this.#event ??= 'closed'
  }

  async #end(process: Process): Promise<void> {
    process.alive = false
    this.scheduler.clear()
    this.#deaths++
    if (process.syncFailed) this.#uncertain = true
    this.#machine.processDied(process)
    // A failed sync is the more interesting where the kernel lives on.
    if (this.#random.below(5) < (process.syncFailed ? 1 : 3)) {
      this.#powerCuts++
      const told = this.#machine.powerFailed()
      this.scheduler.trace(() => `the power fails: ${told}`)
      this.#event = 'lost power'
    } else if (this.#event !== 'lost power')
      this.#event = this.#event === 'closed' && process.faulted === false ? 'closed' : 'died'
    const report = await this.#machine.check()
    const errors = report.findings.filter(({ severity }) => severity === 'error')
    if (errors.length > 0)
      this.fail(`check: ${errors.map(({ object, message }) => `${object} ${message}`).join('; ')}`)
    this.#machine.digest()
  }

  async #until(
    process: Process,
    done: () => boolean,
    what: string,
    story: () => string = () => '',
  ): Promise<void> {
    const came = await this.scheduler.run(() => done() || !process.alive || this.#failure !== undefined)
    if (!came) this.fail(`${what}: nothing more happens; ${story()}`)
  }

  #lifetime(): Lifetime {
    const random = this.#random
    if (random.below(5) === 0) return { actions: 1 + random.below(60) } // while it opens, or soon after
    if (random.below(2) === 0) return { actions: 1 + random.below(random.pick([300, 1_000, 2_500])) }
    return { actions: 1 + random.below(random.pick([10, 100])), of: random.pick(ACTIONS) }
  }

  /** An opening makes few calls, so one that is to fail has to fail often. */
  #openingFaultRates(): FaultRates {
    const random = this.#random
    if (random.below(3) > 0) return {}
    // What the last life left in the page cache has to become durable now: mostly it is that which fails.
    const fault = random.below(3) === 0 ? random.pick(FAULTS) : 'member sync'
    return { [fault]: random.pick([1_500, 5_000]) }
  }

  #faultRates(): FaultRates {
    const random = this.#random
    const rates: Partial<Record<(typeof FAULTS)[number], number>> = {}
    for (let n = 1 + random.below(2); n > 0; n--) {
      rates[random.pick(FAULTS)] = random.pick([30, 200, 1_500, 6_000, 10_000])
    }
    // A failed sync is written down in the journal. Where that fails as well, nobody is left to be told.
    if (rates['journal write'] !== undefined) {
      rates['member sync'] = 0
      rates['journal sync'] = 0
    }
    return rates
  }

  #loadShape(rates: FaultRates): LoadShape {
    const random = this.#random
    // Each life has a taste of its own.
    const churns = random.below(3) === 0
    const mix: Record<RequestKind, number> = churns
      ? { write: 40, read: 30, trim: 30, zero: 4, flush: 12 }
      : { write: 40, read: 12, trim: 12, zero: 6, flush: 6 }
    mix[random.pick(KINDS)] *= random.pick([1, 1, 4])
    const requests = random.pick([20, 60, 120, 240])
    return {
      clients: 1 + random.below(4),
      requests: Math.min(requests, this.#options.requestsMax ?? requests),
      changes: random.pick(rates.commit === undefined ? [0, 0, 1, 2, 5, 8] : [5, 8]),
      depth: churns ? 6 : random.pick([1, 2, 6]),
      mix,
      tight: this.#tight,
    }
  }
}

/** Invariants of the tables (DESIGN, section 2), with nothing under way. */
function tablesProblem(pool: Pool): string | undefined {
  const owners = new Map<number, string>()
  for (const { name, tables } of pool.volumes()) {
    for (let stripe = 0; stripe < tables.stripeCount; stripe++) {
      const slot = tables.slotOf(stripe)
      const formatted = tables.init.get(tables.unitOf(stripe))
      if (tables.direct.get(stripe) && !formatted)
        return `${name}: stripe ${stripe} is direct and not formatted`
      if (formatted && slot === 0) return `${name}: stripe ${stripe} is formatted and has no slot`
      if (slot === 0) continue
      const other = owners.get(slot)
      if (other !== undefined) return `slot ${slot} belongs to ${other} and to ${name} stripe ${stripe}`
      owners.set(slot, `${name} stripe ${stripe}`)
    }
  }
  return undefined
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error)
}
