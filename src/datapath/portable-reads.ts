import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { COMMAND_FLAG, type ReplyMode } from '../nbd/constants.ts'
import { ERRNO_OF, NBD_ERRNO } from '../nbd/errno.ts'
import type { Request } from '../nbd/transmission.ts'
import type { ByteBudget } from './byte-budget.ts'
import type { PortableExport } from './portable-export.ts'
import type { PortableMembers } from './portable-members.ts'
import { composeRead, type ReadLayout, readReplySize } from './read-reply.ts'
import type { ReplyQueue } from './reply-queue.ts'
import { readPieces } from './table-lookup.ts'

/**
 * The reads of one connection. A reply is made whole, inline or in the thread pool, as the gate of the members says. Where
 * there is no memory for that, and nothing else of the connection is in flight, it is made and sent in parts, each when
 * the client has taken the one before.
 *
 * A part that fails: the first one fails the request; a later one ends the reply with an error chunk, or, where data was
 * promised in one go (simple replies, DF), the connection.
 */
export interface ReadHost {
  readonly export: PortableExport
  readonly mode: ReplyMode
  readonly members: PortableMembers
  readonly budget: ByteBudget
  readonly replies: ReplyQueue
  /** Whether the client is gone: nothing that is still to be sent matters. */
  gone(): boolean
  /** A read is not answered in this turn. */
  begun(): void
  /** It is now. */
  ended(): void
  fail(request: Request, errno: number): void
  /** The promise that a reply made cannot be kept. */
  breakOff(): void
}

interface Stream {
  readonly request: Request
  done: number // bytes
  busy: boolean // a part is being read
}

const partBytesMax = 512 * 1024
/** Where memory is short: with its headers no more than a connection may always have. */
const partBytesMin = 48 * 1024
assert(partBytesMin < LIMITS.payloadAlwaysPerConnection)

export class PortableReads {
  readonly #host: ReadHost
  #stream: Stream | null = null

  constructor(host: ReadHost) {
    this.#host = host
  }

  /** Whether a reply is under way in parts: nothing else may be sent meanwhile. */
  get streaming(): boolean {
    return this.#stream !== null
  }

  /** Whether the reply has to be made in parts at present. */
  needsStream(request: Request): boolean {
    return request.length > partBytesMin && !this.#host.budget.admits(request.length)
  }

  /** @returns bytes of the reply that were made in this turn, for the turn's budget */
  read(request: Request): number {
    const { counts } = this.#host.export
    counts.reads++
    counts.readBytes += request.length
    if (this.needsStream(request)) {
      assert(this.#stream === null)
      this.#stream = { request, done: 0, busy: false }
      this.#host.begun()
      this.resume()
      return 0
    }
    const { bytes, later } = this.#part(request, 0, request.length, (errno, wasLater) => {
      if (errno !== 0) this.#host.fail(request, errno)
      if (wasLater) this.#host.ended()
    })
    if (later) this.#host.begun()
    return bytes
  }

  /** The client may have taken what was sent so far. */
  resume(): void {
    const { replies, budget } = this.#host
    const stream = this.#stream
    if (stream === null || stream.busy) return
    if (this.#host.gone()) {
      this.#end()
      return
    }
    if (!replies.idle) return
    const { request, done } = stream
    if (request.offset + request.length > this.#host.export.tables.size) {
      this.#failed(stream, NBD_ERRNO.EINVAL) // it shrank meanwhile
      return
    }
    const most = budget.admits(partBytesMax) ? partBytesMax : partBytesMin
    const length = Math.min(most, request.length - done)
    stream.busy = true
    this.#part(request, done, length, (errno) => {
      stream.busy = false
      if (errno !== 0) {
        this.#failed(stream, errno)
        return
      }
      stream.done += length
      if (stream.done === request.length) this.#end()
      else replies.flush() // its end calls back here
    })
  }

  #failed(stream: Stream, errno: number): void {
    const { request, done } = stream
    const promised = this.#host.mode === 'simple' || (request.flags & COMMAND_FLAG.DF) !== 0
    if (done > 0 && promised) this.#host.breakOff()
    else this.#host.fail(request, errno)
    this.#end()
  }

  #end(): void {
    this.#stream = null
    this.#host.ended()
  }

  /**
   * Makes the part [start, start + length) of a reply. `done` is called in this turn, or later where the members are
   * waited for; without an error the part is queued by then.
   */
  #part(
    request: Request,
    start: number,
    length: number,
    done: (errno: number, later: boolean) => void,
  ): { bytes: number; later: boolean } {
    const { members, replies, mode } = this.#host
    const { spec, tables } = this.#host.export
    const pieces = readPieces(spec, tables, members.contiguous, request.offset + start, length)
    const layout: ReadLayout = {
      request,
      start,
      length,
      mode,
      // A hole says zeros; an export that is filled with something else sends it as data.
      holes: spec.fill === 0 && (request.flags & COMMAND_FLAG.DF) === 0,
      fill: spec.fill,
      pieces,
    }
    const bytes = readReplySize(layout)
    let ioBytes = 0
    for (const piece of pieces) if (piece.slot !== 0) ioBytes += piece.length
    if (ioBytes === 0 || members.readGate.allows(ioBytes)) {
      const at = replies.reserve(bytes)
      const buffer = replies.slab
      let errno = 0
      try {
        composeRead(layout, buffer, at, (piece, target) => {
          members.readNow(piece.slot, piece.offset, buffer, target, piece.length)
        })
      } catch (error) {
        if (!(error instanceof StoreError)) throw error
        errno = ERRNO_OF[error.code]
      }
      if (errno === 0) replies.commit(bytes)
      done(errno, false)
      return { bytes, later: false }
    }
    const buffer = replies.take(bytes)
    let left = 1 // held by this turn
    let errno = 0
    const pieceDone = (error: StoreError | null): void => {
      if (error !== null) errno = ERRNO_OF[error.code]
      left--
      if (left > 0) return
      if (errno === 0) replies.append(buffer, bytes)
      else replies.discard(buffer)
      done(errno, true)
    }
    composeRead(layout, buffer, 0, (piece, target) => {
      left++
      members.readLater(piece.slot, piece.offset, buffer, target, piece.length, pieceDone)
    })
    left-- // no access calls back before this turn ends
    return { bytes, later: true }
  }
}
