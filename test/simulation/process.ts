import type { Random } from '../support/random.ts'
import type { Scheduler } from './scheduler.ts'

/**
 * One life of the daemon: what its devices do for it, how often they fail, and when it ends. A death is between any two
 * actions of its devices or within one; then nothing that it still asks for happens, and nothing comes back to it.
 */
export const FAULTS = ['read', 'write', 'journal write', 'member sync', 'journal sync', 'commit'] as const
export type Fault = (typeof FAULTS)[number]

/** What devices do for it. A life may be counted in one kind alone: so it ends often where it matters. */
export const ACTIONS = ['access', 'journal', 'sync', 'commit'] as const
export type Action = (typeof ACTIONS)[number]

/** A life of so many actions, of that kind or of any. */
export interface Lifetime {
  readonly actions: number
  readonly of?: Action | undefined
}

/** Chances in 10 000 for each action of that kind. */
export type FaultRates = Readonly<Partial<Record<Fault, number>>>

export class Process {
  readonly scheduler: Scheduler
  readonly random: Random
  /** May be exchanged: openings fail in other ways than a load does. */
  faults: FaultRates
  #of: Action | undefined
  #left: number // actions until it dies
  alive = true
  /** Any of its calls has failed. */
  faulted = false
  /** Members or journal: a sync has failed, so what was not durable before may never be. */
  syncFailed = false
  syncFailedAt = 0 // step
  /** It died while it was writing that down: nobody can know of it any more. */
  failureUntold = false
  syncsUnderWay = 0
  /** The disk failed under a commit: what it was to store is there after a restart, or is not. */
  commitUncertain = false

  constructor(scheduler: Scheduler, faults: FaultRates, lifetime: Lifetime) {
    this.scheduler = scheduler
    this.random = scheduler.random
    this.faults = faults
    this.#of = lifetime.of
    this.#left = lifetime.actions
  }

  /** From now on it has so long to live. */
  limit(lifetime: Lifetime): void {
    this.#of = lifetime.of
    this.#left = lifetime.actions
  }

  /** Runs `action` in this process: what it asks for ends with it. */
  run<T>(action: () => T): T {
    return this.scheduler.as(this, action)
  }

  /** Counts one action. @returns true when the process dies in the middle of it */
  dies(action: Action): boolean {
    if (!this.alive) return false
    if (this.#of !== undefined && this.#of !== action) return false
    this.#left--
    if (this.#left > 0) return false
    this.alive = false
    // A failure is told when the syncs of all members have ended.
    if (this.syncsUnderWay > 0) this.failureUntold = true
    this.scheduler.trace(() => '  the process dies')
    return true
  }

  fails(what: Fault): boolean {
    const chance = this.faults[what] ?? 0
    if (chance === 0 || this.random.below(10_000) >= chance) return false
    this.faulted = true
    this.scheduler.trace(() => `  ${what} fails`)
    return true
  }

  /** Something that a device does some time; never, once the process is dead. */
  event(kind: string, detail: number, run: () => void): void {
    if (this.alive) this.scheduler.event(kind, detail, run, this)
  }

  /** As `event`, or at once. */
  later(kind: string, detail: number, run: () => void): void {
    if (this.random.below(2) === 0) run()
    else this.event(kind, detail, run)
  }
}
