/**
 * The contiguous runs that thick volumes own, as sorted intervals [first, end) that neither overlap nor touch. A
 * reservation of any length costs one entry, where bits would make a 16 TiB volume 32 MiB resident.
 */
import { assert } from '../base/assert.ts'

export interface SlotInterval {
  readonly first: number
  readonly end: number // exclusive
}

export class Reservations {
  #intervals: SlotInterval[] = []
  #count = 0

  /** Reserved slots. */
  get count(): number {
    return this.#count
  }

  get intervals(): readonly SlotInterval[] {
    return this.#intervals
  }

  /** The interval that holds `slot`. */
  find(slot: number): SlotInterval | undefined {
    const interval = this.#intervals[this.#firstEndingAfter(slot)]
    return interval !== undefined && interval.first <= slot ? interval : undefined
  }

  /** The first reserved slot in [first, end); `end` where there is none. */
  next(first: number, end: number): number {
    const interval = this.#intervals[this.#firstEndingAfter(first)]
    return interval === undefined ? end : Math.min(end, Math.max(first, interval.first))
  }

  /** How many slots of [first, end) are reserved. */
  countIn(first: number, end: number): number {
    let total = 0
    for (let i = this.#firstEndingAfter(first); i < this.#intervals.length; i++) {
      const interval = this.#intervals[i]
      if (interval === undefined || interval.first >= end) break
      total += Math.min(end, interval.end) - Math.max(first, interval.first)
    }
    return total
  }

  /** Adds [first, end), none of which is reserved. */
  add(first: number, end: number): void {
    assert(first < end && this.countIn(first, end) === 0, 'slots are reserved twice')
    // Neighbours that touch are joined, so at most `before` and `after` are affected.
    const at = this.#firstEndingAfter(first - 1)
    const before = this.#intervals[at]
    const joinsBefore = before !== undefined && before.end === first
    const after = this.#intervals[joinsBefore ? at + 1 : at]
    const joinsAfter = after !== undefined && after.first === end
    this.#intervals.splice(at, (joinsBefore ? 1 : 0) + (joinsAfter ? 1 : 0), {
      first: joinsBefore ? before.first : first,
      end: joinsAfter ? after.end : end,
    })
    this.#count += end - first
  }

  /** Removes [first, end), all of which is reserved. */
  remove(first: number, end: number): void {
    const at = this.#firstEndingAfter(first)
    const interval = this.#intervals[at]
    assert(first < end && interval !== undefined, 'slots are not reserved')
    assert(interval.first <= first && end <= interval.end, 'slots are not reserved')
    const rest: SlotInterval[] = []
    if (interval.first < first) rest.push({ first: interval.first, end: first })
    if (end < interval.end) rest.push({ first: end, end: interval.end })
    this.#intervals.splice(at, 1, ...rest)
    this.#count -= end - first
  }

  #firstEndingAfter(slot: number): number {
    let low = 0
    let high = this.#intervals.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if ((this.#intervals[middle]?.end ?? 0) > slot) high = middle
      else low = middle + 1
    }
    return low
  }
}
