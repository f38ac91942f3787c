import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import type { Datapath, ExportId } from '../datapath/datapath.ts'
import { FreshSlots } from './fresh-slots.ts'
import type { FreedRun } from './reclaimer.ts'
import { slotRunsOf } from './runs.ts'
import type { VolumeTables } from './tables.ts'

/**
 * Content on its way into a thin volume that nobody writes to at present (a secondary): whole format units in fresh slots, and units that
 * are to be unformatted, until all of them take the place of what the volume has, at once.
 *
 * Crash rule: nothing of it is recorded before the switch. The slots belong to the volume with the transaction that names them, or they
 * are free again at the next opening. The slots that the switch replaces are freed after it is durable.
 */
export interface StageHost {
  readonly datapath: Pick<Datapath, 'adopt' | 'complete' | 'formatUnit'>
  readonly exportId: ExportId
  tables(): VolumeTables
  /** @throws StoreError NO_SPACE */
  allocate(first: number, count: number): Promise<number[]>
  unallocate(slots: readonly number[]): void
  freeLater(runs: readonly FreedRun[], sequence: number): void
}

export class Stage {
  readonly #host: StageHost
  readonly #slots = new FreshSlots()
  readonly #stripeCount: number
  readonly #staged: Bitmap // format units
  readonly #filled: Bitmap // those of them that have slots
  #units = 0
  #pending = 0 // puts under way
  /** Changed by a switch that is not durable yet: what is staged may have to come back. */
  #switching = false
  #closed = false
  #freed: FreedRun[] = []

  constructor(host: StageHost) {
    this.#host = host
    const { stripeCount, unitCount } = host.tables()
    this.#stripeCount = stripeCount
    this.#staged = new Bitmap(unitCount)
    this.#filled = new Bitmap(unitCount)
  }

  /** Format units that wait for the switch. */
  get units(): number {
    return this.#units
  }

  has(unit: number): boolean {
    return this.#staged.get(unit)
  }

  /**
   * Whole format units (the last one as far as the volume goes). What was staged there before is replaced; no two puts of a unit at a time.
   * @throws StoreError NO_SPACE, MEMBER_IO: the units are as they were
   */
  async put(offset: number, payload: Buffer): Promise<void> {
    this.#checkOpen()
    const { first, count, unit, units } = this.#range(offset, payload.length)
    this.#pending++
    try {
      const slots = await this.#host.allocate(first, count)
      const { datapath, exportId } = this.#host
      const length = payload.length
      const id = datapath.adopt(exportId, { kind: 'write', offset, length, payload })
      try {
        await datapath.formatUnit({ export: exportId, stripe: first, slots, overlays: [id] })
      } catch (error) {
        this.#host.unallocate(slots)
        throw error
      } finally {
        datapath.complete(id, 0)
      }
      this.#giveBack(unit, units)
      this.#slots.set(first, slots)
      this.#filled.setRange(unit, unit + units)
      this.#note(unit, units)
    } finally {
      this.#pending--
    }
  }

  /** These format units are to be unformatted. */
  hole(offset: number, length: number): void {
    this.#checkOpen()
    const { unit, units } = this.#range(offset, length)
    this.#giveBack(unit, units)
    this.#note(unit, units)
  }

  /** Changes the tables; in the turn in which a transaction copies their pages. @returns takes that back */
  switch(): () => void {
    this.#checkOpen()
    assert(this.#pending === 0, 'a stage is switched while something is put into it')
    const tables = this.#host.tables()
    assert(tables.stripeCount === this.#stripeCount, 'a stage of another size')
    const undo: (() => void)[] = []
    const freed: FreedRun[] = []
    for (
      let unit = this.#nextChange(tables, 0);
      unit < this.#staged.length;
      unit = this.#nextChange(tables, unit + 1)
    ) {
      const { first, count } = tables.unitStripes(unit)
      const before = [...tables.slots.subarray(first, first + count)]
      const after = this.#slots.get(first, count)
      const formatted = tables.init.get(unit)
      undo.push(() => put(tables, unit, first, before, formatted))
      for (const run of slotRunsOf(first, before)) {
        if (run.slot !== 0) freed.push({ slot: run.slot, count: run.count, owner: 'thin' })
      }
      put(tables, unit, first, after, after[0] !== 0)
    }
    this.#freed = freed
    this.#switching = true
    return () => {
      this.#switching = false
      for (const back of undo.reverse()) back()
    }
  }

  /** The switch is durable. The stage is empty again. */
  switched(): void {
    this.#switching = false
    this.#host.freeLater(this.#freed, 0)
    this.#freed = []
    this.#empty()
  }

  /** Gives everything back. Puts under way are waited for by whoever began them. */
  drop(): void {
    assert(!this.#switching, 'a stage is dropped while it is switched')
    this.#closed = true
    assert(this.#pending === 0, 'a stage is dropped while something is put into it')
    this.#giveBack(0, this.#filled.length)
    this.#empty()
  }

  /** Slots of a switch that is not durable yet are in the tables: given back, they would have two owners. */
  #checkOpen(): void {
    assert(!this.#closed, 'a stage that was dropped')
    assert(!this.#switching, 'a stage is changed while it is switched')
  }

  /** The first unit at or after `unit` that is staged and is not a hole already. A long hole costs what there is in it. */
  #nextChange({ init }: VolumeTables, unit: number): number {
    const { length } = this.#staged
    let at = this.#staged.nextSet(unit)
    while (at < length && !init.get(at) && !this.#filled.get(at)) {
      at = this.#staged.nextSet(Math.min(init.nextSet(at), this.#filled.nextSet(at)))
    }
    return at
  }

  #empty(): void {
    this.#staged.clearRange(0, this.#staged.length)
    this.#filled.clearRange(0, this.#filled.length)
    this.#slots.clear()
    this.#units = 0
  }

  /** What was put into these units. */
  #giveBack(unit: number, units: number): void {
    const { formatUnit } = this.#host.tables()
    const end = unit + units
    for (let at = this.#filled.nextSet(unit, end); at < end; at = this.#filled.nextSet(at + 1, end)) {
      const first = at * formatUnit
      const count = Math.min(formatUnit, this.#stripeCount - first)
      this.#host.unallocate(this.#slots.get(first, count))
      this.#slots.set(first, new Array<number>(count).fill(0))
    }
    this.#filled.clearRange(unit, end)
  }

  #note(unit: number, units: number): void {
    const end = unit + units
    this.#units += units - this.#staged.count(unit, end)
    this.#staged.setRange(unit, end)
  }

  #range(offset: number, length: number): { first: number; count: number; unit: number; units: number } {
    const { stripeSize, unitBytes, size } = this.#host.tables()
    const end = offset + length
    assert(length > 0 && offset % unitBytes === 0 && end <= size, 'whole format units are staged')
    assert(end % unitBytes === 0 || end === size, 'whole format units are staged')
    return {
      first: offset / stripeSize,
      count: Math.ceil(length / stripeSize),
      unit: offset / unitBytes,
      units: Math.ceil(length / unitBytes),
    }
  }
}

/** A unit with other slots, or without any. Readers find the old content or the new. */
function put(
  tables: VolumeTables,
  unit: number,
  first: number,
  slots: readonly number[],
  formatted: boolean,
): void {
  if (!formatted) tables.setReleased(unit)
  for (const run of slotRunsOf(first, slots)) tables.setSlots(run.first, run.count, run.slot)
  if (formatted) tables.setFormatted(unit)
}
