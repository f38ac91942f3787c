/** Which fresh slot each stripe of a stage has; 0: none. Takes up memory for what is staged only, however large the volume is. */
const PAGE_STRIPES = 4096

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
    for (const [index, slot] of slots.entries()) {
      const stripe = first + index
      const number = Math.floor(stripe / PAGE_STRIPES)
      let page = this.#pages.get(number)
      if (page === undefined) {
        page = new Uint32Array(PAGE_STRIPES)
        this.#pages.set(number, page)
      }
      page[stripe % PAGE_STRIPES] = slot
    }
  }

  clear(): void {
    this.#pages.clear()
  }
}
