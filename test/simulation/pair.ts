import { messageOf, UserError } from '../../src/base/errors.ts'
import type { MirrorRecord } from '../../src/metadata/records.ts'
import type { MirrorState } from '../../src/mirror/state.ts'
import type { MirrorAddOptions } from '../../src/mirror/types.ts'
import type { VolumeCreateOptions } from '../../src/volume/pool.ts'
import type { Random } from '../support/random.ts'
import { SECTOR, sectorData } from '../support/sector-data.ts'
import { KINDS, Load, type LoadShape, type RequestKind } from './load.ts'
import { CHUNK } from './machine.ts'
import { SimNetwork } from './network.ts'
import { ACTIONS, type Lifetime, Process } from './process.ts'
import { randomOf, Scheduler } from './scheduler.ts'
import { Side, VOLUME } from './side.ts'
import { type SeedOptions, type SeedResult, type Simulated, simulate } from './simulation.ts'
import { MirroredHistory } from './timeline.ts'
import { type SimVolume, SimVolumes, STRIPES_MAX, sizeOf } from './volumes.ts'

/**
 * One seed: two machines, a mirror from one to the other, and a bad network between them.
 *
 *   begin   a volume with some content, perhaps one with other content over there; the mirror is added
 *   round   clients change the volume; connections are cut or stand still, the operator changes and pauses the mirror, daemons die at any
 *           step, with or without the power, and come back
 *   end     of a round: both stop in some way, and are compared before they meet again; or everything heals, and they are equal
 *
 * What is compared:
 *  - Whatever a secondary holds after its restart, or while it runs, is its primary's volume at one moment (async: timeline.ts); or, in
 *    sync, everything that was answered until the two parted (block: ever).
 *  - With both at rest: a copy unit that differs is marked on one of the sides.
 *  - After a planned change of roles nothing that was answered is missing; after any other, the new primary's clients find what the
 *    secondary had, and what the old one had changed alone is gone once it was discarded.
 *  - The primary's own promises (history.ts); `check` after every end.
 */
export async function runPair(seed: number, options: SeedOptions = {}): Promise<SeedResult> {
  const pair = new PairSimulation(seed, options)
  await simulate(pair)
  return pair.result
}

/** Virtual time that something may take. */
const PATIENCE_MS = 900_000
const STEPS_MAX = 60_000

/** A time during which both sides had every request. */
interface Following {
  readonly cycle: number
  readonly from: number
  to: number
  /** What began later reached the secondary by no request: the parting was over by then. */
  reach: number
}

class PairSimulation implements Simulated {
  readonly scheduler: Scheduler
  readonly #seed: number
  readonly #options: SeedOptions
  readonly #random: Random
  readonly #network: SimNetwork
  readonly #one: Side
  readonly #two: Side
  readonly #sides: readonly [Side, Side]
  #primary: Side
  #secondary: Side
  /** Of the last change of roles: before a later one the secondary holds what it had as a primary. */
  #swapCycle = -1
  readonly #volumes: SimVolumes
  readonly #history: MirroredHistory
  readonly #volume: SimVolume
  readonly #add: MirrorAddOptions
  #failure: string | undefined
  #load: Load | undefined
  #loadOf: Process | undefined
  #requests = 0 // left in this round
  #answered = 0
  #deaths = 0
  #powerCuts = 0
  #images = 0
  #bits = 0
  #mortal = false
  #disturbances = 0 // left in this round
  #changing = false // by the operator
  #nextTry = 0 // of the operator: a step
  #added = false
  #floor = 0 // moment that the secondary's image is not before
  #following: Following | undefined
  /** The secondary's power has failed since: only what was flushed is sure to be there. */
  #lost = false
  /** Every answer waits for the secondary since then. */
  #blocking = false
  #doing = ''

  constructor(seed: number, options: SeedOptions) {
    this.#seed = seed
    this.#options = options
    const random = randomOf(seed)
    this.#random = random
    this.scheduler = new Scheduler(random, options.onTrace, true)
    this.#network = new SimNetwork(this.scheduler)
    const shape = (members: number) => ({
      members,
      slots: 400,
      journalBytes: CHUNK * random.pick([6, 8, 12]),
    })
    const members = random.pick([1, 1, 2])
    const other = random.below(3) === 0 ? 3 - members : members
    this.#one = new Side('one', this.scheduler, this.#network, shape(members), (kind) =>
      this.#onEvent(this.#one, kind),
    )
    this.#two = new Side('two', this.scheduler, this.#network, shape(other), (kind) =>
      this.#onEvent(this.#two, kind),
    )
    this.#sides = [this.#one, this.#two]
    this.#primary = this.#one
    this.#secondary = this.#two
    const { stripeSize } = this.#one.machine
    this.#volumes = new SimVolumes(stripeSize)
    const stripes = 2 + random.below(random.pick([6, 24]))
    const formatUnit = members === other ? random.pick([1, 1, 2, 3]) : random.pick([1, 2])
    const fill = random.below(4) === 0 ? 0xee : 0
    const size = sizeOf(stripes, stripeSize, random.below(2) * random.below(stripeSize / SECTOR))
    this.#history = new MirroredHistory(STRIPES_MAX * stripeSize, fill)
    this.#volume = this.#volumes.add(
      {
        name: VOLUME,
        size,
        provision: random.below(5) === 0 ? 'thick' : 'thin',
        formatUnit,
        fill,
        ...this.#regions(formatUnit * stripeSize),
      },
      this.#history,
    )
    this.#add = {
      volume: VOLUME,
      peer: this.#two.address,
      name: 'mirror',
      mode: random.pick(['sync', 'async']),
      init: random.pick(['realized', 'realized', 'signature', 'full']),
      intervalMs: random.pick([10, 10, 40, 400]),
      onLoss: random.pick(['continue', 'continue', 'block']),
    }
  }

  get result(): SeedResult {
    return {
      seed: this.#seed,
      failure: this.#failure,
      hash: this.scheduler.hash,
      steps: this.scheduler.steps,
      lives: this.#one.boots + this.#two.boots,
      answered: this.#answered,
      deaths: this.#deaths,
      powerCuts: this.#powerCuts,
      faultyLives: 0,
      images: this.#images,
      bits: this.#bits,
    }
  }

  fail(problem: string): void {
    if (this.#failure !== undefined) return
    this.#failure = `${this.#doing}: ${problem}`
    this.scheduler.trace(() => `FAILED: ${problem}`)
  }

  async run(): Promise<void> {
    const random = this.#random
    await this.#begin()
    const rounds = Math.min(1 + random.below(4), this.#options.livesMax ?? Number.POSITIVE_INFINITY)
    for (let round = 1; round <= rounds && this.#failure === undefined; round++) {
      this.#doing = `round ${round}`
      this.scheduler.restyle()
      await this.#round()
      if (this.#failure !== undefined) return
      const end = random.below(8)
      if (end < 4) await this.#rest(false)
      else await this.#heal()
      if (this.#failure !== undefined) return
      if (end === 6) await this.#swap()
      else if (end === 7) await this.#take()
    }
    if (this.#failure !== undefined) return
    this.#doing = 'the end'
    await this.#heal()
    if (this.#failure === undefined) await this.#rest(true)
  }

  // ---- the beginning

  #regions(unitBytes: number): Pick<VolumeCreateOptions, 'intents' | 'regionSize'> {
    return { intents: true, regionSize: unitBytes * this.#random.pick([1, 1, 2, 4]) }
  }

  async #begin(): Promise<void> {
    this.#doing = 'the beginning'
    const random = this.#random
    for (const side of this.#sides) this.#boot(side, true)
    await this.#until('opening', () => this.#sides.every(({ phase }) => phase === 'up'))
    if (this.#failure !== undefined) return
    const { options } = this.#volume
    const { stripeSize } = this.#one.machine
    await this.#do(this.#one, 'create', async () => {
      await this.#one.pool.createVolume(options)
    })
    this.#volume.state = 'there'
    if (random.below(3) > 0) {
      const sameStripes = this.#two.machine.stripeSize === stripeSize
      const formatUnit = sameStripes ? (options.formatUnit ?? 1) * random.pick([1, 1, 2]) : 2
      const unitBytes = formatUnit * this.#two.machine.stripeSize
      await this.#do(this.#two, 'create over there', async () => {
        const there = { ...options, formatUnit, ...this.#regions(unitBytes) }
        const volume = await this.#two.pool.createVolume(there)
        for (let n = random.below(8); n > 0; n--) {
          const offset = SECTOR * random.below(options.size / SECTOR)
          const length = Math.min(options.size - offset, SECTOR * (1 + random.below(20)))
          const data = sectorData(this.#volumes.newToken(), offset, length)
          await volume.submit('write', offset, length, 0, data)
        }
      })
    }
    this.#requests = random.pick([0, 10, 40])
    await this.#until('the first requests', () => this.#loadDone())
    this.#requests = random.pick([0, 10])
    await this.#do(this.#one, 'mirror add', async () => {
      await this.#one.mirrors.add(this.#add)
    })
    if (this.#failure !== undefined) return
    this.#added = true
    // The mirror needs intents now; with its own need alone, what it has dealt with is forgotten.
    for (const side of this.#sides) {
      if (random.below(4) === 0) continue
      await this.#do(side, 'intents', async () => side.volume?.keepIntents(false))
    }
    this.#volume.resizes++ // requests that were sent before are judged as after a resize
  }

  // ---- rounds

  async #round(): Promise<void> {
    const random = this.#random
    this.#mortal = true
    for (const { process } of this.#sides) if (random.below(2) === 0) process?.limit(this.#lifetime())
    const requests = random.pick([10, 40, 100])
    this.#requests = Math.min(requests, this.#options.requestsMax ?? requests)
    this.#disturbances = random.pick([0, 1, 3, 8])
    this.#disturbLater()
    const abrupt =
      random.below(3) === 0 ? this.scheduler.steps + random.below(3_000) : Number.POSITIVE_INFINITY
    await this.#until('the load', () => {
      this.#tendMirror(['splitbrain']) // clients may wait for the end of one
      return this.scheduler.steps > abrupt || this.#loadDone()
    })
    this.#mortal = false
    for (const { process } of this.#sides) process?.limit({ actions: Number.POSITIVE_INFINITY })
    this.#disturbances = 0
  }

  #lifetime(): Lifetime {
    const random = this.#random
    if (random.below(2) === 0) return { actions: 1 + random.below(random.pick([60, 300, 1_000])) }
    return { actions: 1 + random.below(random.pick([6, 50])), of: random.pick(ACTIONS) }
  }

  #disturbLater(): void {
    if (this.#disturbances === 0) return
    this.#disturbances--
    this.scheduler.event('disturb', this.#disturbances, () => {
      if (!this.#mortal) return
      // Not the next thing that happens: some steps later.
      if (this.#random.below(60) > 0 && this.#disturbances > 0) this.#disturbances++
      else this.#disturb()
      this.#disturbLater()
    })
  }

  #disturb(): void {
    const random = this.#random
    const { connections, still } = this.#network
    switch (random.below(8)) {
      case 0:
      case 1:
        this.scheduler.trace(() => 'all connections are cut')
        this.#network.cut()
        return
      case 2:
        if (connections > 0) this.#network.cut(random.below(connections))
        return
      case 3:
      case 4:
        this.scheduler.trace(() => `the network ${still ? 'goes on' : 'stands still'}`)
        if (still) this.#network.go()
        else this.#stopNetwork()
        return
      default:
        this.#operate()
    }
  }

  #stopNetwork(): void {
    this.#network.stop()
    let patience = 1 + this.#random.below(400)
    const wait = (): void => {
      if (patience-- > 0 && this.#network.still) this.scheduler.event('network', 0, wait)
      else this.#network.go()
    }
    wait()
  }

  /** What an operator does to the mirror. */
  #operate(): void {
    const { process, phase } = this.#primary
    if (process === undefined || phase !== 'up' || this.#changing || !this.#added) return
    const random = this.#random
    const { mirrors } = this.#primary
    const { state, mode } = mirrors.show(VOLUME)
    this.#changing = true
    const act = async (): Promise<void> => {
      switch (random.below(6)) {
        case 0:
        case 1:
          if (state !== 'paused') {
            this.#parts()
            await mirrors.pause(VOLUME)
            if (random.below(3) === 0) return // for a while
          }
          await mirrors.resume(VOLUME)
          return
        case 2:
          this.#parts()
          await mirrors.change(VOLUME, undefined, { mode: mode === 'sync' ? 'async' : 'sync' })
          return
        case 3:
          this.#parts()
          await mirrors.change(VOLUME, undefined, { onLoss: random.pick(['continue', 'block']) })
          return
        case 4:
          await mirrors.change(VOLUME, undefined, { rate: random.pick([null, 100_000, 1_000_000]) })
          return
        default:
          await mirrors.change(VOLUME, undefined, { intervalMs: random.pick([10, 100]) })
      }
    }
    this.#changes(process, act)
  }

  #changes(process: Process, act: () => Promise<unknown>): void {
    const over = (): void => {
      this.#changing = false
    }
    process.run(act).then(over, (error: unknown) => {
      over()
      if (!(error instanceof UserError)) this.fail(`the operator: ${describe(error)}`)
    })
  }

  // ---- the load

  #loadDone(): boolean {
    return this.#requests <= 0 && (this.#load === undefined || this.#load.done)
  }

  /** After each step: clients come where they can. */
  #tendLoad(): void {
    const { process, phase } = this.#primary
    if (process === undefined || phase !== 'up') return
    if (this.#load !== undefined && this.#loadOf === process) {
      if (!this.#load.done) return
      this.#answered += this.#load.answered
      this.#load.hangUp()
      this.#load = undefined
    }
    if (this.#requests <= 0) return
    const shape = this.#loadShape(this.#requests)
    this.#requests = 0
    const load = new Load(
      process,
      this.#primary.pool,
      this.#volumes,
      shape,
      this.#primary.machine.stripeSize,
      (problem) => this.fail(problem),
    )
    this.#load = load
    this.#loadOf = process
    process.run(() => load.start())
  }

  #loadShape(requests: number): LoadShape {
    const random = this.#random
    const mix: Record<RequestKind, number> = { write: 50, read: 8, trim: 14, zero: 6, flush: 8 }
    mix[random.pick(KINDS)] *= random.pick([1, 1, 3])
    return {
      clients: 1 + random.below(3),
      requests,
      changes: 0,
      depth: random.pick([1, 2, 6]),
      mix,
      tight: false,
    }
  }

  // ---- deaths and boots

  /** After each step: who has died. */
  #tendDead(): void {
    for (const side of this.#sides) {
      if (side.process === undefined || side.process.alive) continue
      this.#kill(side, this.#random.below(5) < 2)
      this.#bootLater(side, 1 + this.#random.below(this.#random.pick([1, 30, 200])))
    }
  }

  #kill(side: Side, power: boolean, closed = false): void {
    this.#deaths++
    this.#changing = false // it may never end
    if (power) this.#powerCuts++
    if (side === this.#primary) {
      this.#parts()
      if (this.#load !== undefined) {
        this.#answered += this.#load.answered
        this.#load = undefined
        if (this.#mortal) this.#requests = this.#random.pick([0, 5, 30])
      }
    }
    side.died(power, closed)
  }

  #bootLater(side: Side, steps: number): void {
    this.scheduler.event('boot', steps, () => {
      if (side.phase !== 'down') return
      if (steps > 1) this.#bootLater(side, steps - 1)
      else this.#boot(side, true, this.#mortal && this.#random.below(2) === 0)
    })
  }

  #boot(side: Side, listens: boolean, mortal = false): void {
    side.phase = 'opening'
    this.#network.machineRuns(side.name)
    const lifetime = mortal ? this.#lifetime() : { actions: Number.POSITIVE_INFINITY }
    const open = async (): Promise<void> => {
      const problem = await side.check()
      if (problem !== undefined) return this.fail(problem)
      const process = new Process(this.scheduler, {}, lifetime)
      await process.run(async () => {
        await side.open(process)
        await this.#look(side)
        side.looked = true
        if (listens) await side.listen()
      })
    }
    open().catch((error: unknown) => this.fail(`opening ${side.name}: ${describe(error)}`))
  }

  /** What the side holds after it was opened. */
  async #look(side: Side): Promise<void> {
    const { volume } = side
    if (volume === undefined || this.#volume.state !== 'there') return
    const content = await side.content(volume)
    if (side === this.#primary) {
      const wrong = this.#history.restarted(content, side.event, false)
      if (wrong !== undefined) this.fail(`the primary: ${wrong}`)
      if (this.#random.below(2) === 0 && (volume.record.intents?.stops ?? 0) > 0) await volume.acknowledge()
    } else {
      this.#checkImage(content, side.event !== 'lost power', this.#record(side))
    }
    side.event = 'closed'
  }

  // ---- what a secondary may hold

  /** An event of the primary's mirror. */
  #onEvent(side: Side, kind: string): void {
    if (side !== this.#primary) return
    if (kind === 'mirror.insync') {
      const record = this.#record(this.#primary)
      if (record === undefined) return
      this.#following = {
        cycle: record.cycle,
        from: this.#history.timeline.now(),
        to: Number.POSITIVE_INFINITY,
        reach: Number.POSITIVE_INFINITY,
      }
      this.#blocking = record.onLoss === 'block'
      this.#lost = false
    } else if (kind.startsWith('mirror.') && this.#following !== undefined && !this.#blocking) {
      this.#parts()
      this.#following.reach = Math.min(this.#following.reach, this.#history.timeline.now())
    }
  }

  /** From now on the secondary may lack what is answered; it may still get it, until the mirror says that it is in another state. */
  #parts(): void {
    const following = this.#following
    if (following === undefined) return
    following.to = Math.min(following.to, this.#history.timeline.now())
    this.#blocking = false
  }

  #record(side: Side) {
    const { volume } = side
    if (volume === undefined) return undefined
    return side.pool.mirrors.of(volume.record.id)[0]?.record
  }

  /** @param survived the kernel of the secondary has lived on since */
  #checkImage(content: Buffer, survived: boolean, record: MirrorRecord | undefined): void {
    if (record?.role !== 'secondary' || !record.initialized || record.cycle <= this.#swapCycle) return
    this.#images++
    if (!survived) this.#lost = true
    const { timeline } = this.#history
    const following = this.#following
    this.scheduler.trace(
      () =>
        `the image of cycle ${record.cycle}, ${following === undefined ? 'never in step' : `in step from cycle ${following.cycle}: ${following.from}..${following.to}`}`,
    )
    if (following !== undefined && record.cycle === following.cycle) {
      const wrong = timeline.followed(
        content,
        following.from,
        Math.min(following.to, timeline.now()),
        following.reach,
        !this.#lost,
      )
      if (wrong !== undefined) this.fail(`the secondary: ${wrong}`)
      return
    }
    const from = following !== undefined && record.cycle > following.cycle ? following.to : 0
    const cut = timeline.cutOf(content, Math.max(this.#floor, Math.min(from, timeline.now())))
    if (typeof cut === 'string') this.fail(`the secondary at cycle ${record.cycle}: ${cut}`)
    else this.#floor = cut
  }

  // ---- the ends of rounds

  /** Both stop, and are compared before they meet again. */
  async #rest(orderly: boolean): Promise<void> {
    const random = this.#random
    const first = random.below(2)
    for (const side of [this.#sides[first], this.#sides[1 - first]]) {
      if (side === undefined) return
      await this.#stop(side, orderly ? 9 : random.below(5))
      if (!orderly) await this.#go(random.below(200))
      if (this.#failure !== undefined) return
    }
    this.#network.go()
    for (const side of this.#sides) {
      if (side.phase !== 'down') await this.#stop(side, 0) // it came back
      this.#boot(side, false)
    }
    await this.#until('opening both', () => this.#sides.every(({ looked }) => looked))
    if (this.#failure !== undefined) return
    await this.#compare(orderly)
    if (this.#failure !== undefined) return
    for (const side of this.#sides) await this.#do(side, 'listen', () => side.listen())
  }

  async #stop(side: Side, how: number): Promise<void> {
    if (side.phase === 'down') return
    const { process } = side
    const quiet = side === this.#secondary || this.#loadDone()
    if (how >= 3 && process !== undefined && side.phase === 'up' && quiet) {
      const flushed = side === this.#primary ? this.#history.flush() : () => {}
      if (side === this.#primary) this.#parts()
      await this.#do(side, `closing ${side.name}`, () => side.close())
      flushed()
      if (this.#failure === undefined) this.#kill(side, false, true)
      return
    }
    this.#kill(side, how < 2)
  }

  /** With nothing under way. */
  async #compare(equal: boolean): Promise<void> {
    const contents: Buffer[] = []
    for (const side of [this.#primary, this.#secondary]) {
      const content = await this.#contentOf(side)
      if (content !== undefined) contents.push(content)
    }
    const [one, two] = contents
    const record = this.#record(this.#primary)
    if (one === undefined || two === undefined || record === undefined) return
    if (equal && !one.equals(two)) return this.fail(`the two differ after all: ${different(one, two)}`)
    if (!record.clean || record.role !== 'primary' || this.#record(this.#secondary)?.role !== 'secondary')
      return
    this.#bits++
    const { unitBytes } = record
    const marked = [
      ...this.#marked(this.#primary),
      ...this.#marked(this.#secondary),
      ...this.#suspect(this.#secondary),
    ]
    for (let unit = 0; unit * unitBytes < one.length; unit++) {
      const from = unit * unitBytes
      const to = Math.min(one.length, from + unitBytes)
      if (one.compare(two, from, to, from, to) === 0) continue
      if (marked.some(({ offset, length }) => offset < to && offset + length > from)) continue
      const where = different(one.subarray(from, to), two.subarray(from, to))
      return this.fail(`copy unit ${unit} (sectors ${from / SECTOR}..) differs, and nobody knows: ${where}`)
    }
  }

  #marked(side: Side): { offset: number; length: number }[] {
    const extents = side.mirrors.copyExtents(
      VOLUME,
      this.#record(side)?.name ?? '',
      0,
      side.volume?.size ?? 0,
    )
    return [...extents].filter(({ copied }) => !copied)
  }

  #suspect(side: Side): { offset: number; length: number }[] {
    return [...(side.volume?.map() ?? [])].filter(({ suspect }) => suspect === true)
  }

  /** Everything works again; then nothing is lacking. */
  async #heal(): Promise<void> {
    this.#network.go()
    await this.#until(
      'healing',
      () => {
        this.#tendMirror()
        return this.#loadDone() && this.#isWhole()
      },
      () => {
        if (this.#primary.phase !== 'up') return 'the primary is down'
        const { state, reason, lag, connected } = this.#primary.mirrors.show(VOLUME)
        return `${state} (${reason}), ${connected ? 'connected' : 'not connected'}, ${lag.bytes} bytes lacking`
      },
    )
    if (this.#failure !== undefined) return
    await this.#compareLive()
  }

  /** What only an operator can settle. */
  #tendMirror(bad: readonly MirrorState[] = ['paused', 'splitbrain']): void {
    if (this.#changing || this.scheduler.steps < this.#nextTry) return
    const { process, phase } = this.#primary
    if (process === undefined || phase !== 'up' || this.#secondary.phase !== 'up') return
    const { mirrors } = this.#primary
    const { state } = mirrors.show(VOLUME)
    if (!bad.includes(state)) return
    this.#nextTry = this.scheduler.steps + 100
    this.#changing = true
    if (state === 'paused') {
      this.#changes(process, () => mirrors.resume(VOLUME))
      return
    }
    const other = this.#secondary
    if (this.#random.below(2) === 0 || other.process === undefined) {
      this.#changes(process, () => mirrors.resolve(VOLUME, undefined, 'remote'))
    } else {
      this.#changes(other.process, () => other.mirrors.resolve(VOLUME, undefined, 'local'))
    }
  }

  #isWhole(): boolean {
    if (this.#changing || this.#sides.some(({ phase }) => phase !== 'up')) return false
    const { state, lag, connected } = this.#primary.mirrors.show(VOLUME)
    return connected && lag.bytes === 0 && (state === 'insync' || state === 'cycling')
  }

  async #compareLive(): Promise<void> {
    const contents: Buffer[] = []
    for (const side of [this.#primary, this.#secondary]) {
      const content = await this.#contentOf(side)
      if (content !== undefined) contents.push(content)
    }
    const [one, two] = contents
    if (one === undefined || two === undefined) return
    if (!one.equals(two)) return this.fail(`the two differ when nothing is lacking: ${different(one, two)}`)
    this.#checkImage(two, true, this.#record(this.#secondary))
  }

  // ---- roles

  /** A planned change of roles, with nothing under way. */
  async #swap(): Promise<void> {
    const { timeline } = this.#history
    const [one, two] = [this.#primary, this.#secondary]
    this.#parts()
    let demoted = true
    if (this.#random.below(3) === 0) this.#cutLater(this.#random.below(60))
    await this.#do(one, 'demote', () =>
      one.mirrors.demote(VOLUME, undefined, { force: true }).catch((error: unknown) => {
        if (!(error instanceof UserError)) throw error
        demoted = false
      }),
    )
    if (!demoted || this.#failure !== undefined) return
    await this.#do(two, 'promote', () => two.mirrors.promote(VOLUME, undefined, { force: true }))
    if (this.#failure !== undefined) return
    const content = await this.#contentOf(two)
    if (content === undefined) return
    const wrong = this.#history.restarted(content, 'closed', false)
    if (wrong !== undefined) return this.fail(`the new primary: ${wrong}`)
    this.#rolesAre(two, one, timeline.now())
  }

  #cutLater(steps: number): void {
    this.scheduler.event('network', steps, () => {
      if (steps > 0) this.#cutLater(steps - 1)
      else this.#network.cut()
    })
  }

  /** The primary dies, and the secondary takes its place. The old one comes back as a primary, and may have changed something more. */
  async #take(): Promise<void> {
    const random = this.#random
    const [one, two] = [this.#primary, this.#secondary]
    const record = this.#record(two)
    if (record?.initialized !== true) return
    this.#requests = random.pick([0, 10, 30])
    const end = this.scheduler.steps + random.below(800)
    await this.#until('some more load', () => this.scheduler.steps >= end || this.#loadDone())
    if (this.#failure !== undefined) return
    this.#requests = 0
    this.#kill(one, random.below(2) === 0)
    this.#requests = 0
    await this.#go(random.below(100))
    const before = this.#record(two)
    await this.#do(two, 'promote', () => two.mirrors.promote(VOLUME, undefined, { force: true }))
    const content = await this.#contentOf(two)
    if (content === undefined) return
    this.#checkImage(content, true, before)
    if (this.#failure !== undefined) return
    this.#history.replaced(content)
    this.#rolesAre(two, one, this.#history.timeline.now())
    this.#requests = random.pick([0, 10, 30])
    this.#bootLater(one, 1 + random.below(200))
    await this.#until('the old primary', () => one.phase === 'up')
    const alone = random.below(3)
    await this.#do(one, 'changes over there', async () => {
      const { volume } = one
      for (let n = 0; n < alone && volume !== undefined; n++) {
        const offset = SECTOR * random.below(volume.size / SECTOR)
        const length = Math.min(volume.size - offset, SECTOR * (1 + random.below(12)))
        const data = sectorData(this.#volumes.newToken(), offset, length)
        // Where it was told to give up already, nobody may write.
        const own = this.#record(one)
        const blocks = own?.mode === 'sync' && own.onLoss === 'block'
        if (own?.role === 'primary' && !blocks) await volume.submit('write', offset, length, 0, data)
      }
    })
    if (random.below(2) === 0) await this.#heal()
  }

  #rolesAre(primary: Side, secondary: Side, at: number): void {
    this.scheduler.trace(() => `${primary.name} is the primary now`)
    this.#primary = primary
    this.#secondary = secondary
    this.#swapCycle = this.#record(primary)?.cycle ?? -1
    this.#following = undefined
    this.#blocking = false
    this.#lost = false
    this.#floor = at
    this.#load = undefined
  }

  async #contentOf(side: Side): Promise<Buffer | undefined> {
    let content: Buffer | undefined
    await this.#do(side, 'reading all', async () => {
      if (side.volume !== undefined) content = await side.content(side.volume)
    })
    return content
  }

  // ---- steps

  /** Something that a side does, as soon as it is done; nothing else is waited for. */
  async #do(side: Side, what: string, action: () => Promise<unknown>): Promise<void> {
    if (this.#failure !== undefined) return
    const { process } = side
    if (process === undefined) return this.fail(`${what}: ${side.name} is down`)
    let done = false
    process.run(action).then(
      () => {
        done = true
      },
      (error: unknown) => this.fail(`${what}: ${describe(error)}`),
    )
    await this.#until(what, () => done)
  }

  /** Some steps, if as many are to be taken. */
  async #go(count: number): Promise<void> {
    const end = this.scheduler.steps + count
    await this.scheduler.run(() => {
      this.#tendDead()
      return this.scheduler.steps >= end || this.#failure !== undefined
    })
  }

  async #until(what: string, done: () => boolean, story: () => string = () => ''): Promise<void> {
    const time = this.scheduler.now + PATIENCE_MS
    const steps = this.scheduler.steps + STEPS_MAX
    let late = false
    const came = await this.scheduler.run(() => {
      this.#tendDead()
      this.#tendLoad()
      if (this.#failure !== undefined || done()) return true
      late = this.scheduler.now > time || this.scheduler.steps > steps
      return late
    })
    if ((!came || late) && this.#failure === undefined)
      this.fail(
        `${what}: takes for ever: ${story()}${this.#load === undefined ? '' : `; ${this.#load.story}`}`,
      )
  }
}

function different(one: Buffer, two: Buffer): string {
  const sectors: string[] = []
  for (let at = 0; at < one.length && sectors.length < 8; at += SECTOR) {
    if (one.compare(two, at, at + SECTOR, at, at + SECTOR) === 0) continue
    sectors.push(`${at / SECTOR} has ${one.readBigUInt64LE(at)} and ${two.readBigUInt64LE(at)}`)
  }
  return `sector ${sectors.join(', ')}`
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? messageOf(error)) : String(error)
}
