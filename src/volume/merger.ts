import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { Datapath, ExportId } from '../datapath/datapath.ts'
import type { Change } from '../metadata/journal.ts'
import { FillDetector } from './fill-detector.ts'
import { consecutive, formatChanges, slotRunsOf } from './runs.ts'
import type { VolumeTables } from './tables.ts'
import type { Work, Works } from './works.ts'

/**
 * The first writes of units (DESIGN invariant 2): what comes for a unit that is not formatted is gathered, and becomes one
 * full-stripe write, together with its neighbours that are ready too. A unit of a sequential fill that is about to bring the rest
 * waits for it, at most LIMITS.mergeHoldMs.
 *
 * Order: slots taken, data written, record, then slot, init bit and direct bits in the tables. A failure before the record gives
 * the slots back: nobody saw them.
 */
export interface MergeHost {
  readonly datapath: Pick<Datapath, 'formatUnit'>
  allocate(first: number, count: number): Promise<number[]>
  unallocate(slots: readonly number[]): void
  record(changes: readonly Change[], apply: () => void): Promise<unknown>
}

/** What the policy does for it. */
export interface MergePolicy {
  tables(): VolumeTables
  exportId(): ExportId
  /** Sets the direct bits of a unit, where nothing forbids it. */
  setDirect(unit: number): void
  /** Answers the parts of the work, and ends it. */
  finish(unit: number, work: Work, errno: number): void
  errnoOf(error: unknown): number
}

export class Merger {
  readonly #host: MergeHost
  readonly #policy: MergePolicy
  readonly #works: Works
  readonly #fills = new FillDetector()
  readonly #gathering = new Set<number>()
  #holdTimer: NodeJS.Timeout | undefined

  constructor(host: MergeHost, policy: MergePolicy, works: Works) {
    this.#host = host
    this.#policy = policy
    this.#works = works
  }

  /** Notes a write; true when it continues a recent one. */
  observe(offset: number, length: number): boolean {
    return this.#fills.observe(offset, length)
  }

  /** A new work in state `gathering`; `start` comes when the batch is done. */
  gather(unit: number, work: Work, sequential: boolean): void {
    if (sequential && this.#fills.worthHolding()) work.heldUntil = performance.now() + LIMITS.mergeHoldMs
    this.#gathering.add(unit)
  }

  /** Starts every gathered merge that is not held; neighbours go out in one write. */
  start(): void {
    if (this.#gathering.size === 0) return
    const { unitBytes } = this.#policy.tables()
    const ready: number[] = []
    let holdMs = 0
    const now = performance.now()
    for (const unit of this.#gathering) {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'gathering')
      const full = work.covered >= this.#policy.tables().bytesOf(unit)
      if (!full && work.heldUntil > now && work.queue.length === 0) {
        holdMs = Math.max(holdMs, work.heldUntil - now)
        continue
      }
      if (work.heldUntil > 0) this.#fills.held(full)
      ready.push(unit)
    }
    for (const unit of ready) {
      this.#gathering.delete(unit)
      const work = this.#works.get(unit)
      assert(work !== undefined)
      work.state = 'writing'
    }
    if (holdMs > 0 && this.#holdTimer === undefined) {
      this.#holdTimer = setTimeout(() => {
        this.#holdTimer = undefined
        this.start()
      }, Math.ceil(holdMs))
    }
    const unitsMax = Math.max(1, Math.floor(LIMITS.formatUnitBytesMax / unitBytes))
    for (const run of consecutive(
      ready.sort((a, b) => a - b),
      unitsMax,
    )) {
      this.format(run)
    }
  }

  /** Writes consecutive units, each with a work in state `writing`, whole and publishes them. Never rejects. @returns errno */
  async format(units: readonly number[]): Promise<number> {
    const tables = this.#policy.tables()
    const firstUnit = units[0] ?? 0
    const works = units.map((unit) => {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'writing')
      return work
    })
    const first = firstUnit * tables.formatUnit
    const end = tables.unitStripes(units[units.length - 1] ?? 0)
    const count = end.first + end.count - first
    let errno = 0
    let slots: number[] | undefined
    try {
      slots = await this.#host.allocate(first, count)
      assert(slots.length === count && !slots.includes(0))
      const requests = new Set(works.flatMap((work) => work.parts.map((part) => part.request)))
      const overlays = [...requests].sort((a, b) => a.order - b.order).map((request) => request.upcall.id)
      const exportId = this.#policy.exportId()
      await this.#host.datapath.formatUnit({ export: exportId, stripe: first, slots, overlays })
      const taken = slots
      await this.#host.record(formatChanges(tables.medium, first, taken, firstUnit, units.length), () => {
        this.#publish(first, taken, units)
        slots = undefined // they belong to the volume now
      })
    } catch (error) {
      if (slots !== undefined) this.#host.unallocate(slots)
      // Almost full: what is left may still do for some of them.
      if (
        slots === undefined &&
        units.length > 1 &&
        error instanceof StoreError &&
        error.code === 'NO_SPACE'
      ) {
        const half = units.length >> 1
        const errnos = [await this.format(units.slice(0, half)), await this.format(units.slice(half))]
        return Math.max(...errnos)
      }
      errno = this.#policy.errnoOf(error)
    }
    units.forEach((unit, index) => {
      const work = works[index]
      if (work !== undefined) this.#policy.finish(unit, work, errno)
    })
    return errno
  }

  /** Forgets timers. */
  close(): void {
    clearTimeout(this.#holdTimer)
  }

  #publish(first: number, slots: readonly number[], units: readonly number[]): void {
    const tables = this.#policy.tables() // those of now: a resize may have come since
    for (const run of slotRunsOf(first, slots)) tables.setSlots(run.first, run.count, run.slot)
    for (const unit of units) {
      tables.setFormatted(unit)
      this.#policy.setDirect(unit)
    }
  }
}
