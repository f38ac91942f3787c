/**
 * Tells whether a first write belongs to a sequential fill. If so its stripe may wait a moment for the writes that
 * are about to follow, so that the fill writes every stripe once (DESIGN invariant 2). Waiting pays only where the
 * client keeps more in flight than one stripe; where it does not, a hold runs out, and the next ones are tried ever
 * more rarely, so a shallow queue loses next to nothing.
 */
const STREAMS = 16
const SKIP_MIN = 16
const SKIP_MAX = 4096

export class FillDetector {
  readonly #ends = new Float64Array(STREAMS).fill(-1)
  #next = 0
  #skip = SKIP_MIN // holds to be skipped after the next one that runs out
  #skipping = 0

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
      this.#skip = SKIP_MIN
    } else {
      this.#skipping = this.#skip
      this.#skip = Math.min(this.#skip * 2, SKIP_MAX)
    }
  }
}
