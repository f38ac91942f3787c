import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import type { BufferPool } from './buffer-pool.ts'
import type { ByteBudget } from './byte-budget.ts'

/**
 * The replies of one connection on their way out. Small ones are written next to each other into a slab, large ones
 * have a buffer of their own; `flush` hands what there is to the socket in one write.
 *
 *   reserve(size) -> position in `slab`; fill it; commit(size)      a reply that is complete this turn
 *   take(size) -> buffer; fill it, in any time; append(buffer, n)   a reply that waits for its data
 *
 * The socket has one write of at most `writeBytesMax` at a time, the rest waits here: so memory comes back while a slow
 * client takes a long queue, and each write that ends is a sign of life. A buffer belongs to the socket until the
 * callback of its last write: only then has the kernel copied its bytes, and only then does it go back to the pool.
 * `heldBytes` counts whole buffers, not the bytes used in them, because whole buffers are what stays alive.
 */
const slabSizeMax = 256 * 1024
const writeBytesMax = 1024 * 1024
/** Above this much in one turn the socket gets it at once, so the client can start to read. */
const flushBytes = 1024 * 1024

interface Segment {
  readonly buffer: Buffer // what the bytes lie in
  bytes: Buffer // what is still to be sent
}

export class ReplyQueue {
  slab: Buffer
  readonly #socket: Socket
  readonly #pool: BufferPool
  readonly #budget: ByteBudget
  readonly #onReleased: () => void
  #used = 0 // committed bytes of the slab
  #unflushed = 0 // bytes committed and appended since the last flush
  readonly #segments: Segment[] = [] // sealed, in order
  #writing = false
  #heldBytes = 0
  #slabSize = 0 // what the next slab should hold, learned from the last batches

  /** @param onReleased called whenever the socket is done with a write, sent or not */
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

  /** Whether everything that was committed and appended has left. */
  get idle(): boolean {
    return !this.#writing && this.#segments.length === 0 && this.#used === 0
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
    this.#segments.push({ buffer, bytes: buffer.subarray(0, length) })
    this.#unflushed += length
  }

  discard(buffer: Buffer): void {
    this.#heldBytes -= buffer.length
    this.#budget.release(buffer.length)
    this.#pool.give(buffer)
  }

  flush(): void {
    if (this.#unflushed === 0) return
    this.#slabSize = Math.max(this.#unflushed, Math.floor(this.#slabSize * 0.75))
    this.#unflushed = 0
    this.#seal()
    if (!this.#writing) this.#write()
  }

  /** Hands the socket the next write. */
  #write(): void {
    this.#writing = true
    const parts: Buffer[] = []
    const done: Buffer[] = [] // buffers whose last byte is in this write
    let room = writeBytesMax
    for (let segment = this.#segments[0]; segment !== undefined && room > 0; segment = this.#segments[0]) {
      const { buffer, bytes } = segment
      if (bytes.length <= room) {
        parts.push(bytes)
        done.push(buffer)
        this.#segments.shift()
      } else {
        parts.push(bytes.subarray(0, room))
        segment.bytes = bytes.subarray(room)
      }
      room -= bytes.length
    }
    const written = (): void => {
      this.#writing = false
      for (const buffer of done) this.discard(buffer)
      if (this.#segments.length > 0) this.#write()
      this.#onReleased()
    }
    const last = parts.pop()
    assert(last !== undefined, 'a write of nothing')
    if (parts.length === 0) {
      this.#socket.write(last, written)
      return
    }
    this.#socket.cork()
    for (const part of parts) this.#socket.write(part)
    this.#socket.write(last, written)
    this.#socket.uncork()
  }

  #seal(): void {
    const slab = this.slab
    if (slab === noSlab) return
    this.slab = noSlab
    if (this.#used === 0) {
      this.discard(slab)
      return
    }
    this.#segments.push({ buffer: slab, bytes: slab.subarray(0, this.#used) })
    this.#used = 0
  }
}

const noSlab: Buffer = Buffer.alloc(0)
