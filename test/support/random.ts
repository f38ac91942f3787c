/** A small seeded generator (xorshift32), so that a failure can be run again from its seed. */
export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = (seed ^ 0x9e3779b9) >>> 0 || 1
    for (let i = 0; i < 8; i++) this.next()
  }

  /** 0 .. 2^32 - 1 */
  next(): number {
    let x = this.#state
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    this.#state = x >>> 0
    return this.#state
  }

  /** 0 .. limit - 1 */
  below(limit: number): number {
    return Math.floor((this.next() / 2 ** 32) * limit)
  }

  pick<T>(values: readonly T[]): T {
    const value = values[this.below(values.length)]
    if (value === undefined) throw new Error('nothing to pick from')
    return value
  }

  bytes(length: number): Buffer {
    const out = Buffer.alloc(length)
    for (let at = 0; at + 4 <= length; at += 4) out.writeUInt32LE(this.next(), at)
    for (let at = length & ~3; at < length; at++) out.writeUInt8(this.below(256), at)
    return out
  }
}
