import { assert } from '../base/assert.ts'
import type { Datapath } from '../datapath/datapath.ts'
import { CHANGE, type Change } from '../metadata/journal.ts'
import type { FreedRun } from './freed-runs.ts'
import { consecutive, slotRunsOf } from './runs.ts'
import type { VolumeTables } from './tables.ts'
import type { Work, Works } from './works.ts'

/**
 * Releases of whole units: those that come in one turn are recorded together.
 *
 * Order: direct bits cleared, barrier, record with init bits and slots cleared, reply; the slots are handed to `freeLater`, which waits
 * until the record is durable.
 */
export interface ReleaseHost {
  readonly datapath: Pick<Datapath, 'barrier'>
  freeLater(runs: readonly FreedRun[], sequence: number): void
  record(changes: readonly Change[], apply: (sequence: number) => void): Promise<unknown>
}

/** What the policy does for it. */
export interface ReleasePolicy {
  tables(): VolumeTables
  provision(): 'thin' | 'thick'
  /** Units of one record: however many trims came at once, it has to fit into a frame of the journal. */
  unitsMax(): number
  /** Answers the parts of the work, and ends it. */
  finish(unit: number, work: Work, errno: number): void
  finished(): void
  errnoOf(error: unknown): number
}

export class Releaser {
  readonly #host: ReleaseHost
  readonly #policy: ReleasePolicy
  readonly #works: Works
  #units: number[] = []

  constructor(host: ReleaseHost, policy: ReleasePolicy, works: Works) {
    this.#host = host
    this.#policy = policy
    this.#works = works
  }

  /** A unit with a new work in state `releasing`. */
  release(unit: number): void {
    if (this.#units.push(unit) === 1) queueMicrotask(() => this.#start())
  }

  async #start(): Promise<void> {
    const policy = this.#policy
    const units = this.#units.splice(0, policy.unitsMax()).sort((a, b) => a - b)
    if (this.#units.length > 0) queueMicrotask(() => this.#start())
    for (const unit of units) policy.tables().clearDirect(unit)
    let errno = 0
    try {
      await this.#release(units)
    } catch (error) {
      errno = policy.errnoOf(error)
    }
    for (const unit of units) {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'releasing')
      policy.finish(unit, work, errno)
    }
    policy.finished()
  }

  async #release(units: readonly number[]): Promise<void> {
    const { medium } = this.#policy.tables()
    const thick = this.#policy.provision() === 'thick'
    await this.#host.datapath.barrier()
    const tables = this.#policy.tables() // those of now: a resize may have come since
    const changes: Change[] = []
    const freed: FreedRun[] = []
    for (const run of consecutive(units)) {
      const firstUnit = run[0] ?? 0
      changes.push({ op: CHANGE.released, medium, first: firstUnit, count: run.length, slot: 0 })
      if (thick) continue // the reserved slots stay
      const first = firstUnit * tables.formatUnit
      const end = tables.unitStripes(run[run.length - 1] ?? 0)
      const count = end.first + end.count - first
      changes.push({ op: CHANGE.slots, medium, first, count, slot: 0 })
      const slots: number[] = []
      for (let stripe = first; stripe < first + count; stripe++) slots.push(tables.slotOf(stripe))
      for (const { slot, count: length } of slotRunsOf(first, slots)) {
        freed.push({ slot, count: length, owner: 'thin' })
      }
    }
    await this.#host.record(changes, (sequence) => {
      for (const change of changes) this.#policy.tables().apply(change)
      this.#host.freeLater(freed, sequence)
    })
    // The slots of a thick volume stay, and the next first write goes to them: reads that found the bits before they were
    // cleared have to be over by then, or they would show that write before it is there for all.
    if (thick) await this.#host.datapath.barrier()
  }
}
