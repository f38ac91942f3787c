/**
 * Hands out slots. Two things are kept apart:
 *
 *   used      the slot holds a stripe of somebody's        one bit in a SlotMap
 *   reserved  a thick volume owns it, used or not          intervals in Reservations
 *
 *   used  reserved
 *    0       0      free: may be allocated to a thin volume, or reserved
 *    1       0      content of a thin volume
 *    0       1      a thick volume's, not formatted or trimmed: nobody else gets it
 *    1       1      content of a thick volume
 *
 * Thin volumes fill the pool from the bottom, thick runs are cut from the top. `top` is the end of what thin volumes
 * have ever used; above it everything outside reservations is free. Allocation is next-fit, so a sequential fill gets
 * ascending slots. At `top` it goes back to the start where at least an eighth of what lies below is free again, and
 * else moves `top` up: so trimmed space is used again before members grow by more than a seventh of their content.
 *
 * What always holds: slot 0 is never handed out; no slot is used twice or freed twice (asserted);
 * free = slots - 1 - reserved - used by thin volumes. A slot that is freed here can be allocated at once: whoever frees
 * it has already made sure that nobody reads it and no committed metadata refers to it.
 */
import { assert } from '../base/assert.ts'
import { Reservations } from './reservations.ts'
import { SlotMap } from './slot-map.ts'

/** Free runs that one allocation looks at before it takes scattered slots or moves `top` up. */
const RUNS_EXAMINED_MAX = 64
/** `top` stays where it is while this share (1/n) of what lies below it is free. */
const REUSE_SHARE = 8

export type SlotOwner = 'thin' | 'thick'

export class SlotAllocator {
  /** Slot numbers are below this. */
  readonly slots: number
  readonly #used: SlotMap
  readonly #reservations = new Reservations()
  #usedThin = 0
  #usedThick = 0
  #top = 1
  /** Free slots below `top`. */
  #holes = 0
  /** Where the next search begins; at most `top`. */
  #hint = 1

  constructor(slots: number) {
    assert(slots >= 2, 'a pool has at least one slot beside slot 0')
    this.slots = slots
    this.#used = new SlotMap(slots)
    this.#used.take(0, 1)
  }

  /** Slots with content, of thin and thick volumes. */
  get usedCount(): number {
    return this.#usedThin + this.#usedThick
  }

  /** Slots that thick volumes own, used or not. */
  get reservedCount(): number {
    return this.#reservations.count
  }

  /** Slots that `allocate` and `reserveRun` can still take. */
  get freeCount(): number {
    return this.slots - 1 - this.#reservations.count - this.#usedThin
  }

  isUsed(slot: number): boolean {
    assert(slot > 0 && slot < this.slots, 'slot number')
    return this.#used.get(slot)
  }

  isReserved(slot: number): boolean {
    return this.#reservations.find(slot) !== undefined
  }

  /**
   * Takes `count` slots for a thin volume: contiguous where such a run is found quickly, else the next free ones.
   * @returns them in ascending order of the search, or undefined, nothing taken, where fewer are free
   */
  allocate(count: number): number[] | undefined {
    assert(Number.isSafeInteger(count) && count > 0, 'slots to allocate')
    if (count > this.freeCount) return undefined
    const first = this.#findRun(count)
    if (first !== undefined) {
      this.#takeThin(first, first + count)
      this.#hint = first + count
      return Array.from({ length: count }, (_, index) => first + index)
    }
    const taken: number[] = []
    while (taken.length < count) {
      let slot = this.#nextFree(this.#hint)
      if (slot >= this.slots) slot = this.#nextFree(1)
      assert(slot < this.slots, 'the count of free slots')
      this.#takeThin(slot, slot + 1)
      this.#hint = slot + 1
      taken.push(slot)
    }
    return taken
  }

  /**
   * Reserves a contiguous run for a thick volume, as high as it goes.
   * @returns its first slot, or undefined, nothing taken, where no free run is that long
   */
  reserveRun(count: number): number | undefined {
    assert(Number.isSafeInteger(count) && count > 0, 'slots to reserve')
    if (count > this.freeCount) return undefined
    let end = this.slots
    for (const interval of this.#reservations.intervals.toReversed()) {
      const first = this.#runEndingBelow(interval.end, end, count)
      if (first !== undefined) return this.#reserve(first, count)
      end = interval.first
    }
    const first = this.#runEndingBelow(1, end, count)
    return first === undefined ? undefined : this.#reserve(first, count)
  }

  /** Reserves exactly these, at load. @returns false, nothing changed, where any of them is used, reserved or no slot */
  reserve(first: number, count: number): boolean {
    if (!this.#isRange(first, count)) return false
    const end = first + count
    if (this.#reservations.next(first, end) !== end || this.#used.nextTaken(first, end) !== end) return false
    this.#reserve(first, count)
    return true
  }

  /** Gives a run, or a part of one, back (a thick volume is deleted or shrunk); none of it is used any more. */
  unreserve(first: number, count: number): void {
    const end = first + count
    assert(this.#isRange(first, count), 'slots to unreserve')
    assert(this.#used.nextTaken(first, end) === end, 'reserved slots are still used')
    this.#reservations.remove(first, end)
    this.#holes += Math.max(0, Math.min(end, this.#top) - first)
  }

  /**
   * Marks slots as used: those of a thin volume at load, those of a thick volume also whenever one is formatted.
   * @returns false, nothing changed, where any of them is used already, is no slot, or is reserved (thin) or not (thick)
   */
  markUsed(first: number, count: number, owner: SlotOwner): boolean {
    if (!this.#isRange(first, count)) return false
    const end = first + count
    if (count === 1 ? this.#used.get(first) : this.#used.nextTaken(first, end) !== end) return false
    if (owner === 'thin') {
      if (this.#reservations.next(first, end) !== end) return false
      // A pool that was just opened goes on above what it holds, by the same rule as before.
      const follow = this.#hint === this.#top
      this.#takeThin(first, end)
      if (follow) this.#hint = this.#top
      return true
    }
    if ((this.#reservations.find(first)?.end ?? 0) < end) return false
    this.#used.take(first, end)
    this.#usedThick += count
    return true
  }

  /**
   * Marks a whole table (stripe -> slot, 0 = none) as used, at load.
   * @returns the index of the first entry that `markUsed` refuses, those before it being marked; -1 where all were good
   */
  markTable(table: Uint32Array, owner: SlotOwner, start = 0, end = table.length): number {
    for (let index = start; index < end; index++) {
      const slot = table[index] ?? 0
      if (slot !== 0 && !this.markUsed(slot, 1, owner)) return index
    }
    return -1
  }

  /** Slots [first, first + count) hold nothing any more; a thick volume's stay reserved. All are of one kind. */
  free(first: number, count: number): void {
    assert(this.#isRange(first, count), 'slots to free')
    const end = first + count
    const reserved = this.#reservations.countIn(first, end)
    assert(reserved === 0 || reserved === count, 'slots to free are of one kind')
    this.#used.free(first, end)
    if (reserved > 0) {
      this.#usedThick -= count
    } else {
      assert(end <= this.#top, 'slots of thin volumes are below the top')
      this.#usedThin -= count
      this.#holes += count
    }
  }

  /** Recounts what is kept as running totals; for tests and for `check`. Reads the whole map. */
  checkInvariants(): void {
    let thin = 0
    let thick = 0
    let slot = this.#used.nextTaken(1, this.slots)
    for (; slot < this.slots; slot = this.#used.nextTaken(slot + 1, this.slots)) {
      if (this.isReserved(slot)) {
        thick++
      } else {
        thin++
        assert(slot < this.#top, 'allocator: slot above the top')
      }
    }
    assert(thin === this.#usedThin, 'allocator: used by thin volumes')
    assert(thick === this.#usedThick, 'allocator: used by thick volumes')
    assert(
      this.#holes === this.#top - 1 - thin - this.#reservations.countIn(1, this.#top),
      'allocator: holes',
    )
    assert(this.#hint >= 1 && this.#hint <= this.#top, 'allocator: hint')
  }

  /** Where a run of `count` begins, looking in the order that the file comment gives. */
  #findRun(count: number): number | undefined {
    const ahead = this.#searchRun(this.#hint, this.#top, count)
    if (ahead !== undefined) return ahead
    const reuse = this.#holes * REUSE_SHARE >= this.#top
    if (reuse && this.#hint >= this.#top) {
      this.#hint = 1
      const behind = this.#searchRun(1, this.#top, count)
      if (behind !== undefined) return behind
    }
    return this.#searchRun(this.#top, this.slots, count) ?? this.#searchRun(1, this.#top, count)
  }

  /** A free run that begins in [start, limit). Gives up after some tries, and leaves the hint where it stopped. */
  #searchRun(start: number, limit: number, count: number): number | undefined {
    let at = start
    for (let tries = 0; tries < RUNS_EXAMINED_MAX; tries++) {
      const first = this.#nextFree(at)
      if (first >= limit) {
        at = limit
        break
      }
      if (first + count > this.slots) break
      const end = this.#runEnd(first, first + count)
      if (end === first + count) return first
      at = end
    }
    if (at <= this.#top) this.#hint = Math.max(1, at)
    return undefined
  }

  /** The first free slot at or after `start`; `slots` where there is none. */
  #nextFree(start: number): number {
    let slot = start
    for (;;) {
      slot = this.#used.nextFree(slot)
      if (slot >= this.slots) return this.slots
      const interval = this.#reservations.find(slot)
      if (interval === undefined) return slot
      slot = interval.end
    }
  }

  /** How far the free run that begins at `first` goes, at most to `end`. */
  #runEnd(first: number, end: number): number {
    return this.#used.nextTaken(first, this.#reservations.next(first, end))
  }

  /** The highest free run of `count` in [start, end), which has no reservations. */
  #runEndingBelow(start: number, end: number, count: number): number | undefined {
    // Every word is read at most once: a used slot in the window moves the window below it, and what was found free
    // above that slot need not be looked at again. Above `top` nothing need be looked at.
    let windowEnd = end
    let knownFree = Math.min(end, Math.max(start, this.#top))
    while (windowEnd - count >= start) {
      const first = windowEnd - count
      const blocker =
        first < knownFree ? this.#used.nextTaken(first, Math.min(knownFree, windowEnd)) : windowEnd
      if (blocker >= Math.min(knownFree, windowEnd)) return first
      knownFree = first
      windowEnd = blocker
    }
    return undefined
  }

  #takeThin(first: number, end: number): void {
    this.#used.take(first, end)
    this.#usedThin += end - first
    if (end <= this.#top) {
      this.#holes -= end - first
      return
    }
    // Above the old top: what is skipped becomes holes, apart from reservations. Below it: a hole is filled.
    if (first > this.#top) this.#holes += first - this.#top - this.#reservations.countIn(this.#top, first)
    else this.#holes -= this.#top - first
    this.#top = end
  }

  #reserve(first: number, count: number): number {
    const end = first + count
    this.#reservations.add(first, end)
    this.#holes -= Math.max(0, Math.min(end, this.#top) - first)
    return first
  }

  #isRange(first: number, count: number): boolean {
    return Number.isSafeInteger(first) && first > 0 && count > 0 && first + count <= this.slots
  }
}
