import { assert } from '../base/assert.ts'

/**
 * Buffers for reply bytes and payloads, in sizes of powers of two (and a little more, so that 4 KiB of data fit
 * together with their reply header). A buffer that comes back is handed out again, so steady traffic allocates
 * nothing and touches no fresh pages: a fresh mebibyte costs 256 page faults.
 *
 * The pool keeps at most `keepBytesMax` of idle buffers and none above `pooledSizeMax`: those are allocated and
 * left to the garbage collector. Content is whatever the last user left: every user fills what it sends.
 */
const slack = 512
const pooledSizeMin = 4 * 1024
const pooledSizeMax = 2 * 1024 * 1024
const keepBytesMax = 16 * 1024 * 1024

export class BufferPool {
  readonly #idle: Buffer[][] = []
  #idleBytes = 0

  /** A buffer of at least `size` bytes. */
  take(size: number): Buffer {
    const rank = rankOf(size)
    const capacity = capacityOf(rank)
    if (capacity > pooledSizeMax + slack) return Buffer.allocUnsafeSlow(size)
    const buffer = this.#idle[rank]?.pop()
    if (buffer === undefined) return Buffer.allocUnsafeSlow(capacity)
    this.#idleBytes -= capacity
    return buffer
  }

  /** Gives back what `take` returned, once; nobody may read or write it any more. */
  give(buffer: Buffer): void {
    const size = buffer.length
    if (size > pooledSizeMax + slack || this.#idleBytes + size > keepBytesMax) return
    const rank = rankOf(size)
    assert(size === capacityOf(rank), 'a buffer of another origin was given to the pool')
    let idle = this.#idle[rank]
    if (idle === undefined) {
      idle = []
      this.#idle[rank] = idle
    }
    idle.push(buffer)
    this.#idleBytes += size
  }

  get idleBytes(): number {
    return this.#idleBytes
  }
}

/** 0 for sizes up to 4 KiB and slack, 1 up to 8 KiB and slack, ... */
function rankOf(size: number): number {
  return size <= pooledSizeMin + slack ? 0 : 32 - Math.clz32((size - slack - 1) >>> 12)
}

function capacityOf(rank: number): number {
  return (pooledSizeMin << rank) + slack
}
