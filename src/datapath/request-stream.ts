import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { COMMAND_FLAG, MAGIC } from '../nbd/constants.ts'
import {
  decodeRequest,
  HANG_UP,
  type Request,
  requestHeaderSize,
  type SessionRules,
  validateRequest,
} from '../nbd/transmission.ts'
import type { BufferPool } from './buffer-pool.ts'

/**
 * Cuts received bytes into requests and their payloads. It knows the protocol and its own buffers, no socket, volume or
 * clock.
 *
 *   piece -> header -> admitted? -> valid? -> payload, whole or in parts -> sink
 *                      no: stalled   no: payload skipped, then refused
 *
 * A header that lies whole in a piece is decoded where it lies, and so is a payload used where it lies. A payload that is
 * cut is collected in a buffer of its final size, which the sink then owns. Where the sink has no memory for all of a payload it
 * comes in parts, each after the sink is done with the one before. While stalled nothing is consumed: what was received
 * behind the request or part that waits stays in `#unparsed`, and the caller stops feeding until `resume` went through.
 */
export interface RequestSink {
  /** Whether there is room for one more; `stalled` is true after a no. */
  admits(request: Request): boolean
  /** Of a valid request's payload `left` bytes are still to be received: how many of them next. They are held from now on. */
  grants(left: number): number
  /** A valid request without payload. */
  onRequest(request: Request): void
  /**
   * A valid request and its payload, or a part of both.
   * @param answers the request to answer when this is done; null for a part that is not the last
   * @param owned the pooled buffer that it lies in, the sink's to give back; null where it lies in the received piece
   * @param kept bytes of memory that the payload keeps alive
   */
  onPayload(
    request: Request,
    answers: Request | null,
    payload: Buffer,
    owned: Buffer | null,
    kept: number,
  ): void
  /** How the last part went: 0 or an error number when that is known, undefined while it is not. */
  partResult(): number | undefined
  /** A request that breaks a rule; its payload has been skipped. */
  onRefused(request: Request, errno: number): void
  /** Nothing that follows can be understood. The sink stops the stream. */
  onOutOfStep(): void
}

interface Filling {
  readonly owned: Buffer
  readonly length: number
  received: number
}

interface Receiving {
  readonly request: Request
  done: number // bytes of its payload that the sink has
}

interface Skipping {
  readonly request: Request
  readonly errno: number
  left: number // bytes
}

export class RequestStream {
  readonly #extended: boolean
  readonly #rules: SessionRules
  readonly #pool: BufferPool
  readonly #sink: RequestSink
  readonly #headerSize: number

  readonly #header: Buffer // a header that was cut by the end of a piece
  #headerFill = 0
  #receiving: Receiving | null = null // whose payload is coming
  #filling: Filling | null = null // a part of it that is cut
  #skipping: Skipping | null = null
  #waiting: Request | null = null // decoded, not admitted
  #unparsed: Buffer | null = null // received behind that, or behind a part; null exactly if nothing waits
  #stopped = false

  constructor(rules: SessionRules, pool: BufferPool, sink: RequestSink) {
    this.#extended = rules.mode === 'extended'
    this.#rules = rules
    this.#pool = pool
    this.#sink = sink
    this.#headerSize = requestHeaderSize(this.#extended)
    this.#header = Buffer.allocUnsafeSlow(this.#headerSize)
  }

  get stalled(): boolean {
    return this.#unparsed !== null
  }

  feed(piece: Buffer): void {
    if (this.#stopped) return
    // Where the socket was paused too late for this piece, it queues up.
    if (this.#unparsed === null) this.#parse(piece)
    else this.#unparsed = Buffer.concat([this.#unparsed, piece])
  }

  /** Goes on after a stall, if the sink admits the request that waits. */
  resume(): void {
    const { waiting, unparsed } = { waiting: this.#waiting, unparsed: this.#unparsed }
    if (unparsed === null || (waiting !== null && !this.#sink.admits(waiting))) return
    this.#waiting = null
    this.#unparsed = null
    const at = waiting === null ? 0 : this.#begin(waiting, unparsed, 0)
    if (!this.#stopped && at < unparsed.length) this.#parse(unparsed.subarray(at))
  }

  /** Drops everything that is not with the sink. Returns the payload bytes that were expected and will not come. */
  stop(): number {
    const filling = this.#filling
    this.#stopped = true
    this.#receiving = null
    this.#filling = null
    this.#skipping = null
    this.#waiting = null
    this.#unparsed = null
    if (filling === null) return 0
    this.#pool.give(filling.owned)
    return filling.length
  }

  #parse(piece: Buffer): void {
    const end = piece.length
    let at = 0
    while (at < end && !this.#stopped) {
      if (this.#filling !== null) {
        at += this.#fill(this.#filling, piece, at)
        continue
      }
      if (this.#skipping !== null) {
        at += this.#skip(this.#skipping, end - at)
        continue
      }
      if (this.#receiving !== null) {
        const { request, done } = this.#receiving
        const errno = this.#sink.partResult()
        if (errno === undefined) {
          this.#unparsed = piece.subarray(at)
          return
        }
        if (errno === 0) at = this.#collect(this.#receiving, piece, at)
        else {
          this.#receiving = null
          this.#skipping = { request, errno, left: request.payloadLength - done }
        }
        continue
      }
      let header = piece
      let headerAt = at
      if (this.#headerFill > 0 || end - at < this.#headerSize) {
        const count = piece.copy(this.#header, this.#headerFill, at, at + this.#headerSize - this.#headerFill)
        this.#headerFill += count
        at += count
        if (this.#headerFill < this.#headerSize) {
          this.#checkMagic()
          return
        }
        this.#headerFill = 0
        header = this.#header
        headerAt = 0
      } else at += this.#headerSize
      const request = this.#decode(header, headerAt)
      if (request === null) return
      if (!this.#sink.admits(request)) {
        this.#waiting = request
        this.#unparsed = piece.subarray(at)
        return
      }
      at = this.#begin(request, piece, at)
    }
  }

  /** A stream that is out of step is ended as soon as that shows: the rest of the header may never come. */
  #checkMagic(): void {
    if (this.#headerFill < 4) return
    const magic = this.#extended ? MAGIC.extendedRequest : MAGIC.request
    if (this.#header.readUInt32BE(0) !== magic) this.#sink.onOutOfStep()
  }

  /** Null when the stream cannot be followed any further. */
  #decode(header: Buffer, at: number): Request | null {
    try {
      return decodeRequest(header, this.#extended, at)
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.#sink.onOutOfStep()
      return null
    }
  }

  /** Starts an admitted request whose header ends at `at`; returns the position behind what it used of the piece. */
  #begin(request: Request, piece: Buffer, at: number): number {
    const { payloadLength } = request
    const errno = validateRequest(request, this.#rules)
    if (errno === HANG_UP) {
      this.#sink.onOutOfStep()
      return piece.length
    }
    if (errno !== 0) {
      if (payloadLength === 0) this.#sink.onRefused(request, errno)
      else this.#skipping = { request, errno, left: payloadLength }
      return at
    }
    if (payloadLength === 0) {
      this.#sink.onRequest(request)
      return at
    }
    this.#receiving = { request, done: 0 }
    return this.#collect(this.#receiving, piece, at)
  }

  /** Starts on the next part of a payload; returns the position behind what it used of the piece. */
  #collect(receiving: Receiving, piece: Buffer, at: number): number {
    const left = receiving.request.payloadLength - receiving.done
    const length = this.#sink.grants(left)
    assert(length > 0 && length <= left, 'a part of what is left')
    if (at + length > piece.length) {
      this.#filling = { owned: this.#pool.take(length), length, received: 0 }
      return at
    }
    this.#deliver(receiving, piece.subarray(at, at + length), null, piece.length)
    return at + length
  }

  #fill(filling: Filling, piece: Buffer, at: number): number {
    const { owned, length } = filling
    const end = Math.min(piece.length, at + length - filling.received)
    const count = piece.copy(owned, filling.received, at, end)
    filling.received += count
    assert(filling.received <= length, 'a payload that outgrew its request')
    if (filling.received === length) {
      const receiving = this.#receiving
      assert(receiving !== null)
      this.#filling = null
      this.#deliver(receiving, owned.subarray(0, length), owned, length)
    }
    return count
  }

  #deliver(receiving: Receiving, payload: Buffer, owned: Buffer | null, kept: number): void {
    const { request, done } = receiving
    const { length } = payload
    receiving.done += length
    const last = receiving.done === request.payloadLength
    if (last) this.#receiving = null
    if (last && done === 0) {
      this.#sink.onPayload(request, request, payload, owned, kept)
      return
    }
    // Whoever makes the last part durable makes all of them durable.
    const flags = last ? request.flags : request.flags & ~COMMAND_FLAG.FUA
    const part = { ...request, flags, offset: request.offset + done, length, payloadLength: length }
    this.#sink.onPayload(part, last ? request : null, payload, owned, kept)
  }

  #skip(skipping: Skipping, available: number): number {
    const count = Math.min(available, skipping.left)
    skipping.left -= count
    if (skipping.left === 0) {
      this.#skipping = null
      this.#sink.onRefused(skipping.request, skipping.errno)
    }
    return count
  }
}
