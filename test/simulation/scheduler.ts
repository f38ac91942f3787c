import { AsyncLocalStorage } from 'node:async_hooks'
import { createHash, webcrypto } from 'node:crypto'
import { assert } from '../../src/base/assert.ts'
import { Random } from '../support/random.ts'

/**
 * One process without a real clock and without real I/O. Everything that would come from outside (a completion of a
 * device, a message of a client, a timer) is an event here, and one seed decides which of them happens next. Between two
 * events all promises run dry. So a run is a function of its seed: the same seed takes the same steps.
 *
 *   events      any of them may be next, however long it has waited: devices are slow and finish out of order
 *   immediates  in the order in which they were asked for, as node runs them; when, is chosen like an event
 *   timers      once virtual time has reached them; time moves a little with every step, jumps now and then, and
 *               goes straight to the next timer where nothing else is left to happen
 *
 * The product calls the timers and clocks of the global object. While a simulation runs, those are ours
 * (`installTime`), so nothing that is added to the product later can escape it.
 *
 * Where several processes are simulated, everything that is to happen has an *owner*: what runs on behalf of a process (`as`), and
 * whatever follows from it, asks for timers and events of that process. They go with it (`clear`), and no others do.
 */
export interface SimEvent {
  readonly kind: string // few of them: the schedule may prefer some kinds
  readonly detail: number // for the trace and its hash
  readonly run: () => void
  readonly slow: boolean
  readonly owner: object | undefined
}

interface Immediate {
  readonly run: () => void
  readonly owner: object | undefined
}

interface Timer {
  due: number // virtual ms
  readonly order: number
  readonly period: number | undefined
  readonly run: () => void
  readonly owner: object | undefined
}

/** How the next event is chosen; each life has one. */
const STYLES = ['even', 'even', 'starve', 'kinds', 'kinds', 'first', 'last'] as const
type Style = (typeof STYLES)[number]

/** Virtual time that passes without anything but timers until the run counts as stuck. */
const STUCK_MS = 120_000
/** Steps between two looks at the real world, so that whoever runs us can send signals. */
const STEPS_PER_TURN = 4_096

export class Scheduler {
  readonly random: Random
  /** Virtual milliseconds. */
  now = 1_000
  steps = 0
  #events: SimEvent[] = []
  #immediates: Immediate[] = []
  #timers: Timer[] = []
  #order = 0
  #style: Style = 'even'
  #preference = new Map<string, number>()
  #hash = 0x811c9dc5
  #idleSince = 0
  readonly #onTrace: ((line: string) => void) | undefined
  readonly #owned: boolean
  readonly #context = new AsyncLocalStorage<object | undefined>()

  /** @param owned several processes: nothing is asked for without an owner, except by `event` */
  constructor(random: Random, onTrace?: (line: string) => void, owned = false) {
    this.random = random
    this.#onTrace = onTrace
    this.#owned = owned
  }

  /** Of everything that has happened so far. */
  get hash(): string {
    return (this.#hash >>> 0).toString(16).padStart(8, '0')
  }

  /** A life begins: another style of scheduling. */
  restyle(): void {
    this.#style = this.random.pick(STYLES)
    this.#preference.clear()
  }

  /** Everything that was still to happen does not: the process is gone. @param owner which one; absent: all */
  clear(owner?: object): void {
    const stays = (of: { readonly owner: object | undefined }): boolean =>
      owner !== undefined && of.owner !== owner
    this.#events = this.#events.filter(stays)
    this.#immediates = this.#immediates.filter(stays)
    this.#timers = this.#timers.filter(stays)
  }

  /** @param owner of the event; absent: nobody, it comes whoever dies */
  event(kind: string, detail: number, run: () => void, owner?: object): void {
    this.#events.push({ kind, detail, run, slow: this.random.below(6) === 0, owner })
  }

  /** Runs `action`, and everything that follows from it, on behalf of `owner`. */
  as<T>(owner: object | undefined, action: () => T): T {
    return this.#owned ? this.#context.run(owner, action) : action()
  }

  #owner(what: string): object | undefined {
    if (!this.#owned) return undefined
    const owner = this.#context.getStore()
    assert(owner !== undefined, `${what} that belongs to no process`)
    return owner
  }

  mix(value: number): void {
    this.#hash = Math.imul(this.#hash ^ value, 0x01000193)
  }

  trace(line: () => string): void {
    this.#onTrace?.(`${String(this.steps).padStart(6)} ${this.now.toFixed(3)} ${line()}`)
  }

  /**
   * Takes steps until `done`.
   * @returns whether it came to that; false when nothing more can happen
   */
  async run(done: () => boolean): Promise<boolean> {
    this.#idleSince = this.now
    await drained()
    while (!done()) {
      if (!this.#step()) return false
      await drained()
      if (this.steps % STEPS_PER_TURN === 0) await turn()
    }
    return true
  }

  #step(): boolean {
    this.steps++
    const jump = this.random.below(2048)
    this.now += jump === 0 ? 1_500 : jump < 12 ? 40 : this.random.below(50) / 1_000
    const due = this.#nextTimer()
    const choices =
      this.#events.length +
      (this.#immediates.length > 0 ? 1 : 0) +
      (due !== undefined && due.due <= this.now ? 1 : 0)
    if (choices === 0) {
      if (due === undefined || due.due - this.#idleSince > STUCK_MS) return false
      this.now = Math.max(this.now, due.due)
      this.#fire(due)
      return true
    }
    // Immediates and timers do not wait long in a process that is not busy.
    const urgent = choices - this.#events.length
    if (urgent > 0 && (this.#events.length === 0 || this.random.below(choices + 1) <= urgent)) {
      if (
        due !== undefined &&
        due.due <= this.now &&
        (this.#immediates.length === 0 || this.random.below(2) === 0)
      ) {
        this.#fire(due)
        return true
      }
      this.#note('immediate', 0)
      const immediate = this.#takeImmediate()
      if (immediate !== undefined) this.as(immediate.owner, immediate.run)
      return true
    }
    this.#idleSince = this.now
    const index = this.#choose()
    const [event] = this.#events.splice(index, 1)
    assert(event !== undefined)
    this.#note(event.kind, event.detail)
    this.as(event.owner, event.run)
    return true
  }

  /** The first one of some process. */
  #takeImmediate(): Immediate | undefined {
    if (!this.#owned) return this.#immediates.shift()
    const { owner } = this.random.pick(this.#immediates)
    const index = this.#immediates.findIndex((each) => each.owner === owner)
    return this.#immediates.splice(index, 1)[0]
  }

  #choose(): number {
    const { random } = this
    const count = this.#events.length
    const any = random.below(count)
    if (count === 1) return 0
    switch (this.#style) {
      case 'even':
        return any
      case 'first':
        return random.below(8) === 0 ? any : 0
      case 'last':
        return random.below(4) === 0 ? any : count - 1
      case 'starve': {
        if (random.below(48) === 0) return any
        for (let i = 0; i < count; i++)
          if (this.#events[(any + i) % count]?.slow === false) return (any + i) % count
        return any
      }
      case 'kinds': {
        // Some kinds of completion are all slow: a member that lags behind, a commit that takes its time.
        if (random.below(12) === 0) return any
        let best = any
        for (let i = 1; i < count; i++) {
          const index = (any + i) % count
          if (this.#preferenceOf(index) > this.#preferenceOf(best)) best = index
        }
        return best
      }
    }
  }

  #preferenceOf(index: number): number {
    const kind = this.#events[index]?.kind ?? ''
    let preference = this.#preference.get(kind)
    if (preference === undefined) {
      preference = this.random.below(1_000)
      this.#preference.set(kind, preference)
    }
    return preference
  }

  #nextTimer(): Timer | undefined {
    let next: Timer | undefined
    for (const timer of this.#timers) {
      if (next === undefined || timer.due < next.due || (timer.due === next.due && timer.order < next.order))
        next = timer
    }
    return next
  }

  #fire(timer: Timer): void {
    this.#note('timer', timer.order)
    if (timer.period === undefined) this.#timers.splice(this.#timers.indexOf(timer), 1)
    else timer.due = this.now + timer.period
    this.as(timer.owner, timer.run)
  }

  #note(kind: string, detail: number): void {
    for (let i = 0; i < kind.length; i++) this.mix(kind.charCodeAt(i))
    this.mix(detail)
    this.trace(() => `${kind} ${detail}`)
  }

  // ---- the global timers -----------------------------------------------------------------------------------

  /** Puts virtual time in the place of the global timers and clocks. @returns what puts the real ones back */
  installTime(): () => void {
    const names = [
      'setTimeout',
      'setInterval',
      'setImmediate',
      'clearTimeout',
      'clearInterval',
      'clearImmediate',
    ] as const
    const before = names.map((name) => [name, globalThis[name]] as const)
    const { now: dateNow } = Date
    const start = (ms: number | undefined, run: () => void, repeats: boolean): object => {
      const delay = Math.max(1, ms ?? 1)
      const timer: Timer = {
        due: this.now + delay,
        order: this.#order++,
        period: repeats ? delay : undefined,
        run,
        owner: this.#owner('a timer'),
      }
      this.#timers.push(timer)
      return { ref: noop, unref: noop, timer }
    }
    const stop = (handle: unknown): void => {
      if (typeof handle !== 'object' || handle === null) return
      if ('timer' in handle) this.#timers = this.#timers.filter((timer) => timer !== handle.timer)
      if ('immediate' in handle)
        this.#immediates = this.#immediates.filter((each) => each !== handle.immediate)
    }
    const immediately = (action: (...given: unknown[]) => void, ...given: unknown[]): object => {
      const immediate = { run: () => action(...given), owner: this.#owner('an immediate') }
      this.#immediates.push(immediate)
      return { immediate }
    }
    type Action = (...given: unknown[]) => void
    Object.assign(globalThis, {
      setTimeout: (action: Action, ms?: number, ...given: unknown[]) =>
        start(ms, () => action(...given), false),
      setInterval: (action: Action, ms?: number, ...given: unknown[]) =>
        start(ms, () => action(...given), true),
      setImmediate: immediately,
      clearTimeout: stop,
      clearInterval: stop,
      clearImmediate: stop,
    })
    // Hashes are computed by threads, which are not ours.
    const digest = async (_algorithm: string, content: Uint8Array): Promise<ArrayBuffer> => {
      const hash = new Uint8Array(createHash('sha256').update(content).digest())
      await new Promise<void>((resolve) => this.event('hash', content.length, resolve, this.#owner('a hash')))
      return hash.buffer
    }
    Object.defineProperty(webcrypto.subtle, 'digest', { value: digest, configurable: true })
    performance.now = () => this.now
    Date.now = () => 1_700_000_000_000 + Math.floor(this.now)
    return () => {
      Object.assign(globalThis, Object.fromEntries(before))
      Reflect.deleteProperty(performance, 'now')
      Reflect.deleteProperty(webcrypto.subtle, 'digest')
      Date.now = dateNow
    }
  }
}

const noop = (): void => {}
const realSetImmediate = setImmediate

/** Resolves when no promise has anything left to run: node runs ticks only then. Streams have ticks of their own. */
async function drained(): Promise<void> {
  for (let n = 0; n < 3; n++) await new Promise<void>((resolve) => process.nextTick(resolve))
}

function turn(): Promise<void> {
  return new Promise((resolve) => realSetImmediate(resolve))
}

export function randomOf(seed: number): Random {
  return new Random(Math.imul(seed, 0x9e3779b1) ^ (seed >>> 7))
}
