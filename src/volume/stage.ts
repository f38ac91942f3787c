import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import type { Datapath, ExportId } from '../datapath/datapath.ts'
import type { FreedRun } from './freed-runs.ts'
import { FreshSlots } from './fresh-slots.ts'
import type { VolumeTables } from './tables.ts'

/**
 * Content on its way into a thin volume that nobody writes to at present (a secondary): whole format units in fresh slots, and units that
 * are to be unformatted, until all of them take the place of what the volume has, at once.
 *
 * Crash rule: nothing of it is recorded before the switch. The slots belong to the volume with the transaction that names them, or they
 * are free again at the next opening. The slots that the switch replaces are freed after it is durable.
 *
 * The switch is made in one turn, whatever there is, because no checkpoint may copy the tables in between, and nobody who reads may find
 * half of it for long. So it costs little: stage and tables exchange slots and bits, run by run, and exchanging them again takes it back.
 *
 *   staged  filled  init     the switch makes of it
 *     1       1      1       other slots: the stage has those that there were
 *     1       1      0       formatted: the stage has nothing
 *     1       0      1       unformatted: the stage has the slots that there were
 *     1       0      0       nothing: a hole already
 *     0       0     any      nothing
 */
export interface StageHost {
  readonly datapath: Pick<Datapath, 'adopt' | 'complete' | 'formatUnit'>
  readonly exportId: ExportId
  tables(): VolumeTables
  /** @throws StoreError NO_SPACE */
  allocate(first: number, count: number): Promise<number[]>
  unallocate(slots: readonly number[]): void
  freeLater(runs: Iterable<FreedRun>, sequence: number): void
}

/** Slots that are given back in one call, or those of one unit. */
const SLOTS_GIVEN_BACK = 1024

export class Stage {
  readonly #host: StageHost
  readonly #slots = new FreshSlots()
  readonly #stripeCount: number
  readonly #staged: Bitmap // format units
  readonly #filled: Bitmap // those of them that have slots; while it is switched: those that were formatted before
  #units = 0
  #pending = 0 // puts under way
  /** Changed by a switch that is not durable yet: what is staged may have to come back. */
  #switching = false
  #closed = false

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
    this.#exchange()
    this.#switching = true
    return () => {
      assert(this.#switching, 'a switch is taken back once, and before it is durable')
      this.#switching = false
      this.#exchange()
    }
  }

  /** The switch is durable. The stage is empty again. */
  switched(): void {
    assert(this.#switching, 'a stage that was not switched is not durable')
    this.#switching = false
    this.#host.freeLater(this.#slots.runs(), 0)
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

  /** What the table above says. Readers find the old content or the new: a slot is set before the init bit, and cleared after it. */
  #exchange(): void {
    const tables = this.#host.tables()
    assert(tables.stripeCount === this.#stripeCount, 'a stage of another size')
    const { words: init } = tables.init
    const { words: staged } = this.#staged
    const { words: filled } = this.#filled
    for (let word = 0; word < staged.length; word++) {
      const due = staged[word] ?? 0
      if (due === 0) continue
      const before = init[word] ?? 0
      const after = filled[word] ?? 0
      eachRun(due & before & ~after, (bit, count) => {
        tables.setReleased(word * 32 + bit, count)
        this.#filled.setRange(word * 32 + bit, word * 32 + bit + count)
      })
      eachRun(due & (before | after), (bit, count) => this.#exchangeSlots(tables, word * 32 + bit, count))
      eachRun(due & ~before & after, (bit, count) => {
        tables.setFormatted(word * 32 + bit, count)
        this.#filled.clearRange(word * 32 + bit, word * 32 + bit + count)
      })
    }
  }

  #exchangeSlots(tables: VolumeTables, unit: number, units: number): void {
    const first = unit * tables.formatUnit
    const count = Math.min(units * tables.formatUnit, this.#stripeCount - first)
    this.#slots.parts(first, count, (stripe, n, page, at) => tables.exchangeSlots(stripe, n, page, at))
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
    const most = Math.ceil(SLOTS_GIVEN_BACK / formatUnit)
    for (let at = this.#filled.nextSet(unit, end); at < end; at = this.#filled.nextSet(at, end)) {
      const stop = this.#filled.nextClear(at, Math.min(end, at + most))
      const first = at * formatUnit
      const count = Math.min(stop * formatUnit, this.#stripeCount) - first
      this.#host.unallocate(this.#slots.get(first, count))
      this.#slots.set(first, new Array<number>(count).fill(0))
      at = stop
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

/** Runs of bits of a word that are 1. */
function eachRun(word: number, action: (bit: number, count: number) => void): void {
  for (let left = word; left !== 0; ) {
    const bit = lowestBit(left)
    const rest = ~(left >>> bit)
    const count = rest === 0 ? 32 : lowestBit(rest)
    action(bit, count)
    const end = bit + count
    left = end === 32 ? 0 : left & (-1 << end)
  }
}

function lowestBit(word: number): number {
  return 31 - Math.clz32(word & -word)
}
