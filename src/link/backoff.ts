import { LIMITS } from '../base/limits.ts'

/**
 * Delays between attempts: each up to twice the one before, up to a limit, and each somewhere in the upper half of that, so that many
 * who lost the same peer do not come back at the same moment.
 */
export class Backoff {
  readonly #min: number
  readonly #max: number
  readonly #random: () => number
  #next: number

  /** @param random 0 <= x < 1 */
  constructor(
    min: number = LIMITS.linkRetryMsMin,
    max: number = LIMITS.linkRetryMsMax,
    random: () => number = Math.random,
  ) {
    this.#min = min
    this.#max = max
    this.#random = random
    this.#next = min
  }

  /** In milliseconds. */
  next(): number {
    const delay = this.#next
    this.#next = Math.min(this.#max, delay * 2)
    return delay * (0.5 + this.#random() / 2)
  }

  reset(): void {
    this.#next = this.#min
  }
}
