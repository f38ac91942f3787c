import { assert } from '../base/assert.ts'

/**
 * The bytes that all connections of a datapath hold together: payloads on their way in, replies on their way out.
 * It only counts. Connections ask before they read the next request off their socket, and wait here when the
 * answer is no; they are woken, all at once and in a turn of their own, when the sum is below the limit again.
 *
 * A connection that holds nothing may always hold one request, whatever the sum is (portable-connection.ts): so
 * clients that never read, or stall in mid-payload, cannot keep anybody else from being served.
 */
export class ByteBudget {
  readonly max: number
  #held = 0
  readonly #waiting = new Set<() => void>()
  #wakePlanned = false

  constructor(max: number) {
    this.max = max
  }

  get held(): number {
    return this.#held
  }

  admits(bytes: number): boolean {
    return this.#held + bytes <= this.max
  }

  hold(bytes: number): void {
    this.#held += bytes
  }

  release(bytes: number): void {
    this.#held -= bytes
    assert(this.#held >= 0, 'more bytes released than held')
    if (this.#waiting.size === 0 || this.#wakePlanned || this.#held >= this.max) return
    this.#wakePlanned = true
    setImmediate(() => {
      this.#wakePlanned = false
      const woken = [...this.#waiting]
      this.#waiting.clear()
      for (const wake of woken) wake()
    })
  }

  /** Calls `wake` once, when it is worth asking again. */
  wait(wake: () => void): void {
    this.#waiting.add(wake)
  }

  cancel(wake: () => void): void {
    this.#waiting.delete(wake)
  }
}
