import { assert } from '../base/assert.ts'

/**
 * The bytes that all connections of a datapath hold together: payloads on their way in, replies on their way out.
 * It only counts. Connections ask before they hold more.
 *
 * Nobody waits for anybody here: who is refused waits for what it holds itself, and who holds nothing goes on with the little
 * that is always there (LIMITS.payloadAlwaysPerConnection), in pieces where its request is larger. So clients that never
 * read, or stall in mid-payload, cannot keep anybody else from being served, however many they are.
 */
export class ByteBudget {
  readonly max: number
  #held = 0

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
  }
}
