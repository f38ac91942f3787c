/**
 * Which slot each stripe of a stage has; 0: none. A page of it covers as many stripes as a page of the volume's map, so it takes no more
 * memory than what the volume itself will need for these stripes, however large the volume is.
 */
import { MAP_PAGE_ENTRIES } from '../metadata/records.ts'
import type { FreedRun } from './freed-runs.ts'

const PAGE_STRIPES = MAP_PAGE_ENTRIES

export class FreshSlots {
  readonly #pages = new Map<number, Uint32Array>()

  /** The slots of stripes [first, first + count). */
  get(first: number, count: number): number[] {
    const slots: number[] = []
    for (let stripe = first; stripe < first + count; stripe++) {
      const page = this.#pages.get(Math.floor(stripe / PAGE_STRIPES))
      slots.push(page?.[stripe % PAGE_STRIPES] ?? 0)
    }
    return slots
  }

  /** Stripes from `first` on have these. */
  set(first: number, slots: readonly number[]): void {
    this.parts(first, slots.length, (stripe, count, page, at) => {
      for (let i = 0; i < count; i++) page[at + i] = slots[stripe - first + i] ?? 0
    })
  }

  /** Where the slots of stripes [first, first + count) are kept, to be changed there. */
  parts(
    first: number,
    count: number,
    action: (stripe: number, count: number, page: Uint32Array, at: number) => void,
  ): void {
    const end = first + count
    for (let stripe = first; stripe < end; ) {
      const number = Math.floor(stripe / PAGE_STRIPES)
      const stop = Math.min(end, (number + 1) * PAGE_STRIPES)
      action(stripe, stop - stripe, this.#page(number), stripe % PAGE_STRIPES)
      stripe = stop
    }
  }

  /** All slots, as runs of consecutive ones. */
  *runs(): Generator<FreedRun> {
    for (const page of this.#pages.values()) {
      for (let at = 0; at < page.length; ) {
        const slot = page[at] ?? 0
        let count = 1
        if (slot !== 0) {
          while (at + count < page.length && page[at + count] === slot + count) count++
          yield { slot, count, owner: 'thin' }
        }
        at += count
      }
    }
  }

  clear(): void {
    this.#pages.clear()
  }

  #page(number: number): Uint32Array {
    let page = this.#pages.get(number)
    if (page === undefined) {
      page = new Uint32Array(PAGE_STRIPES)
      this.#pages.set(number, page)
    }
    return page
  }
}
