/** Lets one through in a while, for each kind of thing that may happen very often, and counts the others. */
export class Throttle {
  readonly #intervalMs: number
  readonly #now: () => number
  readonly #kinds = new Map<string, { since: number; suppressed: number }>()

  constructor(intervalMs: number, now: () => number = () => performance.now()) {
    this.#intervalMs = intervalMs
    this.#now = now
  }

  /** @returns how many of the kind were held back since the last one that passed; undefined where this one is held back, too */
  pass(kind: string): number | undefined {
    const now = this.#now()
    const known = this.#kinds.get(kind)
    if (known !== undefined && now - known.since < this.#intervalMs) {
      known.suppressed++
      return undefined
    }
    // Kinds that are quiet are forgotten, so that their number is bounded by what happens in one interval.
    for (const [other, { since }] of this.#kinds) {
      if (now - since < this.#intervalMs) break
      if (other !== kind) this.#kinds.delete(other)
    }
    this.#kinds.delete(kind)
    this.#kinds.set(kind, { since: now, suppressed: 0 })
    return known?.suppressed ?? 0
  }
}
