import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import type { BufferPool } from './buffer-pool.ts'
import type { ByteBudget } from './byte-budget.ts'

/**
 * The replies of one connection on their way out. Small ones are written next to each other into a slab, large
 * ones have a buffer of their own; `flush` hands everything to the socket in one write.
 *
 *   reserve(size) -> position in `slab`; fill it; commit(size)      a reply that is complete this turn
 *   take(size) -> buffer; fill it, in any time; append(buffer, n)   a reply that waits for its data
 *
 * A buffer belongs to the socket from flush until the write's callback: only then has the kernel copied its
 * bytes, and only then does it go back to the pool. `heldBytes` counts whole buffers, not the bytes used in
 * them, because whole buffers are what a client that does not read keeps alive.
 */
const slabSizeMax = 256 * 1024
/** Above this much in one turn the socket gets it at once, so the client can start to read. */
const flushBytes = 1024 * 1024

export class ReplyQueue {
  slab: Buffer
  readonly #socket: Socket
  readonly #pool: BufferPool
  readonly #budget: ByteBudget
  readonly #onReleased: () => void
  #used = 0 // committed bytes of the slab
  #unflushed = 0 // bytes committed and appended since the last flush
  #segments: Buffer[] = [] // sealed, in order
  #buffers: Buffer[] = [] // what the segments lie in
  #heldBytes = 0
  #slabSize = 0 // what the next slab should hold, learned from the last batches

  /** @param onReleased called when the socket is done with a batch, sent or not */
  constructor(socket: Socket, pool: BufferPool, budget: ByteBudget, onReleased: () => void) {
    this.#socket = socket
    this.#pool = pool
    this.#budget = budget
    this.#onReleased = onReleased
    this.slab = noSlab
  }

  /** Bytes of memory: taken, committed, or with the socket. */
  get heldBytes(): number {
    return this.#heldBytes
  }

  get isEmpty(): boolean {
    return this.#unflushed === 0
  }

  /** Makes room for `size` bytes in `slab`; returns where. Valid until the next call of anything here. */
  reserve(size: number): number {
    if (this.slab.length - this.#used < size) {
      this.#seal()
      this.slab = this.take(Math.max(size, Math.min(this.#slabSize, slabSizeMax)))
    }
    return this.#used
  }

  commit(size: number): void {
    this.#used += size
    this.#unflushed += size
    assert(this.#used <= this.slab.length, 'a reply outgrew its reservation')
    if (this.#unflushed >= flushBytes) this.flush()
  }

  /** A buffer for one reply. It must come back: `append` or `discard`. */
  take(size: number): Buffer {
    const buffer = this.#pool.take(size)
    this.#heldBytes += buffer.length
    this.#budget.hold(buffer.length)
    return buffer
  }

  append(buffer: Buffer, length: number): void {
    this.#seal()
    this.#segments.push(buffer.subarray(0, length))
    this.#buffers.push(buffer)
    this.#unflushed += length
  }

  discard(buffer: Buffer): void {
    this.#heldBytes -= buffer.length
    this.#budget.release(buffer.length)
    this.#pool.give(buffer)
  }

  /** One write for all that was committed and appended. */
  flush(): void {
    if (this.#unflushed === 0) return
    this.#seal()
    const segments = this.#segments
    const buffers = this.#buffers
    this.#slabSize = Math.max(this.#unflushed, Math.floor(this.#slabSize * 0.75))
    this.#segments = []
    this.#buffers = []
    this.#unflushed = 0
    const sent = (): void => {
      for (const buffer of buffers) this.discard(buffer)
      this.#onReleased()
    }
    const last = segments.length - 1
    if (last > 0) this.#socket.cork()
    for (let index = 0; index <= last; index++) {
      const segment = segments[index]
      assert(segment !== undefined)
      if (index === last) this.#socket.write(segment, sent)
      else this.#socket.write(segment)
    }
    if (last > 0) this.#socket.uncork()
  }

  #seal(): void {
    const slab = this.slab
    if (slab === noSlab) return
    this.slab = noSlab
    if (this.#used === 0) {
      this.discard(slab)
      return
    }
    this.#segments.push(slab.subarray(0, this.#used))
    this.#buffers.push(slab)
    this.#used = 0
  }
}

const noSlab: Buffer = Buffer.alloc(0)
