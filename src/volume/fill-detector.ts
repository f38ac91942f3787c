/**
 * Tells whether a first write belongs to a sequential fill. If so its stripe may wait a moment for the writes that
 * are about to follow, so that the fill writes every stripe once (DESIGN invariant 2). Waiting pays only where the
 * client keeps more in flight than one stripe; where it does not, holds run out one after another, and the next ones are
 * tried ever more rarely, so a shallow queue loses next to nothing. One that runs out among many that do not says only that
 * the client was late once.
 */
const STREAMS = 16
const FAILURES_FREE = 2
const SKIP_MIN = 16
const SKIP_MAX = 4096

export class FillDetector {
  readonly #ends = new Float64Array(STREAMS).fill(-1)
  #next = 0
  #failures = 0 // holds that ran out, one after another
  #skipping = 0 // holds that are not tried

  /** Notes a write; true when it continues a recent one. */
  observe(offset: number, length: number): boolean {
    const stream = this.#ends.indexOf(offset)
    const slot = stream >= 0 ? stream : this.#next
    if (stream < 0) this.#next = (this.#next + 1) % STREAMS
    this.#ends[slot] = offset + length
    return stream >= 0
  }

  worthHolding(): boolean {
    if (this.#skipping === 0) return true
    this.#skipping--
    return false
  }

  /** A hold ended: the stripe became full, or time ran out. */
  held(full: boolean): void {
    if (full) {
      this.#failures = 0
      return
    }
    this.#failures++
    if (this.#failures <= FAILURES_FREE) return
    this.#skipping = Math.min(SKIP_MIN * 2 ** (this.#failures - FAILURES_FREE - 1), SKIP_MAX)
  }
}
