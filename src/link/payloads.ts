/**
 * Memory for payloads that arrive in pieces. Large ones share buffers of one size, which are used again when they are released: to
 * allocate a megabyte for every message, have its pages zeroed, and collect it costs more than to receive it.
 *
 * What is kept is bounded, and given up when it is not used for a while (`trim`). A buffer that nobody releases is garbage as any other.
 */
import { LIMITS } from '../base/limits.ts'

const BUFFER_BYTES = LIMITS.linkPayloadMax
/** As many as a connection has on its way. */
const KEPT_MAX = Math.floor(LIMITS.linkConnectionWindow / BUFFER_BYTES)

export class Payloads {
  #kept: Buffer[] = []
  #keptLeast = 0 // since the last trim

  take(length: number): Buffer {
    // Shorter ones would take up more than twice what the windows count.
    if (length * 2 < BUFFER_BYTES || length > BUFFER_BYTES) return Buffer.allocUnsafeSlow(length)
    const buffer = this.#kept.pop() ?? Buffer.allocUnsafeSlow(BUFFER_BYTES)
    this.#keptLeast = Math.min(this.#keptLeast, this.#kept.length)
    return buffer.subarray(0, length)
  }

  /** @returns gives back what was taken, once; undefined where that is of no use */
  releaseOf(payload: Buffer): (() => void) | undefined {
    if (payload.length === 0 || payload.buffer.byteLength !== BUFFER_BYTES) return undefined
    let buffer: Buffer | undefined = Buffer.from(payload.buffer, 0, BUFFER_BYTES)
    return () => {
      if (buffer !== undefined && this.#kept.length < KEPT_MAX) this.#kept.push(buffer)
      buffer = undefined
    }
  }

  /** Gives up what was not needed since the last time. */
  trim(): void {
    this.#kept.splice(0, this.#keptLeast)
    this.#keptLeast = this.#kept.length
  }
}
