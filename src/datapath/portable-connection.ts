import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import { StoreError, systemCode } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { COMMAND, COMMAND_FLAG, type ReplyMode } from '../nbd/constants.ts'
import { ERRNO_OF, NBD_ERRNO } from '../nbd/errno.ts'
import {
  chunkHeaderSize,
  clipExtents,
  decodeStatusFilter,
  type Request,
  type SessionRules,
  statusChunkSize,
  validateStatusFilter,
  writePlainReply,
  writeStatusChunk,
} from '../nbd/transmission.ts'
import type { BufferPool } from './buffer-pool.ts'
import type { ByteBudget } from './byte-budget.ts'
import type { SessionEnd, SessionId, SessionSpec, StatusResult, UpcallKind } from './datapath.ts'
import type { PortableExport } from './portable-export.ts'
import type { PortableMembers } from './portable-members.ts'
import { PortableReads } from './portable-reads.ts'
import { ReplyQueue } from './reply-queue.ts'
import { type RequestSink, RequestStream } from './request-stream.ts'
import { directPieces, readPieces } from './table-lookup.ts'

/**
 * One NBD connection in the transmission phase, on the event loop.
 *
 *   socket -> request-stream.ts -> tables -> member access | upcall -> reply-queue.ts -> socket
 *                                  reads: portable-reads.ts
 *             stalled, while there is no room: the socket is paused
 *
 * Tables are looked at after the payload is complete, and in the same turn the member access begins. So a client
 * that stalls holds only its own buffers: no slot, no epoch (access-epochs.ts), no turn.
 *
 * What one connection holds is bounded: requests in flight, payload bytes, reply bytes not yet taken by the client,
 * and the sum over all connections (byte-budget.ts). A connection that holds nothing may always start one request, and goes
 * through it in small parts where that sum is used up.
 *
 * Endings: reading stops at once, requests in flight are answered, replies leave as far as the client takes them
 * within a deadline, the socket is closed, and `onClose` is called when nothing is left, once.
 */
type ConnectionState = 'open' | 'draining' | 'flushing' | 'closed'
const NEXT: Record<ConnectionState, readonly ConnectionState[]> = {
  open: ['draining'], // requests are read
  draining: ['flushing', 'closed'], // no more are read; those in flight go on
  flushing: ['closed'], // all are answered; the last replies are on their way
  closed: [],
}

/** What connections of one datapath share. */
export interface ConnectionHost {
  readonly members: PortableMembers
  readonly pool: BufferPool
  readonly budget: ByteBudget
  /** Queues an upcall for the next batch. */
  upcall(request: PendingRequest, kind: UpcallKind): void
  connectionClosed(connection: PortableConnection): void
}

/** A request that is not answered in the turn in which it was parsed. */
export interface PendingRequest {
  readonly connection: PortableConnection
  readonly request: Request // or a part of one (request-stream.ts)
  readonly answers: Request | null // what is answered in the end; null for a part that is not the last
  readonly length: number // bytes of the volume; with a status filter not what the header says
  readonly contexts: readonly number[]
  payload: Buffer | null // exactly `length` bytes of a write
  owned: Buffer | null // the pooled buffer that `payload` lies in
  upcall: number // id while the policy decides, else 0
  uses: number // member accesses that use the payload now; a request that is used cannot be answered
  kind: UpcallKind
}

const none: readonly number[] = []

/** A request that has parsed or read this much in one turn lets the other connections run. */
const turnBytesMax = 4 * 1024 * 1024
/** A payload in a received piece this many times its size is copied before it waits, so it keeps little alive. */
const borrowedShareMax = 4

export class PortableConnection implements SessionRules, RequestSink {
  readonly id: SessionId
  readonly export: PortableExport
  readonly mode: ReplyMode
  readonly readOnly: boolean
  readonly contexts: readonly number[]
  readonly payloadMax = LIMITS.requestPayloadMax

  readonly #host: ConnectionHost
  readonly #socket: Socket
  readonly #onClose: (reason: SessionEnd) => void
  readonly #replies: ReplyQueue
  readonly #requests: RequestStream
  readonly #reads: PortableReads
  readonly #extended: boolean

  #state: ConnectionState = 'open'
  #reason: SessionEnd = 'closed'
  #socketGone = false
  #lingerTimer: NodeJS.Timeout | null = null

  #requestsInFlight = 0
  #payloadBytes = 0
  #turnBytes = 0
  #partResult: number | undefined // of the last part of a write that comes in parts
  #resumePlanned = false
  #flushPlanned = false
  readonly #wake = (): void => this.#resume()

  constructor(host: ConnectionHost, exported: PortableExport, id: SessionId, session: SessionSpec) {
    this.#host = host
    this.export = exported
    this.id = id
    this.mode = session.mode
    this.readOnly = session.readOnly
    this.contexts = session.contexts
    this.#socket = session.socket
    this.#onClose = session.onClose
    this.#extended = session.mode === 'extended'
    this.#requests = new RequestStream(this, host.pool, this)
    this.#replies = new ReplyQueue(session.socket, host.pool, host.budget, () => this.#released())
    this.#reads = new PortableReads({
      export: exported,
      mode: session.mode,
      members: host.members,
      budget: host.budget,
      replies: this.#replies,
      gone: () => this.#socketGone || session.socket.destroyed,
      begun: () => {
        this.#requestsInFlight++
      },
      ended: () => {
        this.#left()
        this.#planFlush()
      },
      fail: (request, errno) => this.#reply(request, errno),
      breakOff: () => {
        this.end('error')
        this.#socket.destroy()
      },
    })
    this.#attach(session.received)
  }

  /** SessionRules: follows a resize. */
  get size(): number {
    return this.export.tables.size
  }

  /** Ends the session: no more requests are read, those in flight are answered. */
  end(reason: SessionEnd): void {
    if (this.#state !== 'open') return
    this.#reason = reason
    this.#enter('draining')
    this.#socket.pause()
    if (this.#reads.streaming) this.#armLinger()
    this.#unhold(this.#requests.stop())
    this.#settle()
  }

  /** Answers an upcall of this connection. */
  completed(pending: PendingRequest, errno: number): void {
    this.#finish(pending, errno)
    this.#planFlush()
  }

  /** Answers a block-status upcall. */
  completedStatus(pending: PendingRequest, results: readonly StatusResult[]): void {
    const { request, length } = pending
    const requestOne = (request.flags & COMMAND_FLAG.REQ_ONE) !== 0
    results.forEach((result, index) => {
      const extents = clipExtents(result.extents, length, requestOne, this.#extended)
      const size = statusChunkSize(this.#extended, extents.length)
      const at = this.#replies.reserve(size)
      const done = index === results.length - 1
      writeStatusChunk(this.#replies.slab, at, request, this.#extended, done, result.context, extents)
      this.#replies.commit(size)
    })
    this.#left()
    this.#planFlush()
  }

  // ------------------------------------------------------------------------------------------ socket

  #attach(received: Buffer): void {
    const socket = this.#socket
    // A client may close its sending half and still wait for answers.
    socket.allowHalfOpen = true
    socket.setNoDelay(true)
    socket.setTimeout(0)
    socket.on('error', (error) => {
      const code = systemCode(error)
      this.end(code === 'ECONNRESET' || code === 'EPIPE' ? 'hangup' : 'error')
    })
    socket.on('close', () => {
      this.#socketGone = true
      this.end('hangup')
      this.#settle()
    })
    socket.on('end', () => this.end('hangup'))
    socket.on('data', (piece: Buffer) => this.#receive(piece))
    if (socket.destroyed) {
      // It ended between negotiation and now, and tells nobody any more.
      setImmediate(() => {
        this.#socketGone = true
        this.end('hangup')
        this.#settle()
      })
      return
    }
    if (received.length > 0) this.#receive(received)
    // Its end may have been read together with those bytes, and is not told twice.
    if (socket.readableEnded) this.end('hangup')
    if (!this.#requests.stalled && this.#state === 'open') socket.resume()
  }

  #receive(piece: Buffer): void {
    if (this.#state !== 'open') return
    const stalled = this.#requests.stalled
    this.#turnBytes = 0
    this.#requests.feed(piece)
    this.#replies.flush()
    if (stalled || !this.#requests.stalled) return
    this.#socket.pause()
    this.#waitForRoom()
  }

  /** Takes up parsing where it stopped for want of room. */
  #resume(): void {
    this.#resumePlanned = false
    if (this.#state !== 'open' || !this.#requests.stalled) return
    this.#turnBytes = 0
    this.#requests.resume()
    this.#replies.flush()
    if (this.#requests.stalled) this.#waitForRoom()
    else if (this.#isOpen()) this.#socket.resume()
  }

  /** As a call, because parsing may have ended the session. */
  #isOpen(): boolean {
    return this.#state === 'open'
  }

  // ---------------------------------------------------------------------- RequestSink, called while parsing

  grants(left: number): number {
    const bytes = this.#host.budget.admits(left) ? left : Math.min(left, LIMITS.payloadAlwaysPerConnection)
    this.#payloadBytes += bytes
    this.#host.budget.hold(bytes)
    return bytes
  }

  partResult(): number | undefined {
    return this.#partResult
  }

  onRefused(request: Request, errno: number): void {
    this.#reply(request, errno)
  }

  onOutOfStep(): void {
    this.end('protocol')
  }

  onPayload(
    request: Request,
    answers: Request | null,
    payload: Buffer,
    owned: Buffer | null,
    kept: number,
  ): void {
    this.#turnBytes += payload.length
    this.#partResult = undefined
    const pending = this.#pending(request, payload.length, none, answers)
    pending.payload = payload
    pending.owned = owned
    if (request.command === COMMAND.BLOCK_STATUS) this.#filteredStatus(pending)
    else this.#write(pending, payload, kept)
  }

  // ------------------------------------------------------------------------------------- backpressure

  admits(request: Request): boolean {
    if (this.#turnBytes > turnBytesMax || this.#reads.streaming) return false
    if (this.#requestsInFlight >= LIMITS.requestsInFlightPerConnection) return false
    const replyHeld = this.#replies.heldBytes
    const held = this.#payloadBytes + replyHeld
    if (held === 0) {
      // In parts, where it has to be.
      return (
        request.command !== COMMAND.READ || this.#requestsInFlight === 0 || !this.#reads.needsStream(request)
      )
    }
    // What is refused later, for its length or its flags, holds nothing.
    const payload = request.payloadLength <= this.payloadMax ? request.payloadLength : 0
    const reply = request.command === COMMAND.READ && request.length <= this.payloadMax ? request.length : 0
    return (
      this.#payloadBytes + payload <= LIMITS.payloadInFlightPerConnection &&
      replyHeld + reply <= LIMITS.replyBytesQueuedPerConnection &&
      this.#host.budget.admits(payload + reply)
    )
  }

  /** Arranges for #resume, by whatever can make room. */
  #waitForRoom(): void {
    // Its own releases wake it, in #released and #left.
    if (this.#turnBytes > turnBytesMax || this.#isIdle) this.#planResume()
  }

  /** Whether nothing of its own will wake it. */
  get #isIdle(): boolean {
    return this.#requestsInFlight === 0 && this.#payloadBytes + this.#replies.heldBytes === 0
  }

  #planResume(): void {
    if (this.#resumePlanned) return
    this.#resumePlanned = true
    setImmediate(this.#wake)
  }

  // ------------------------------------------------------------------------------------------ running

  /** Runs a valid request without a payload. */
  onRequest(request: Request): void {
    const counts = this.export.counts
    switch (request.command) {
      case COMMAND.READ:
        this.#turnBytes += this.#reads.read(request)
        return
      case COMMAND.DISC:
        this.end('disconnect')
        return
      case COMMAND.FLUSH:
        counts.flushes++
        this.#upcall(this.#pending(request, 0, none), 'sync')
        return
      case COMMAND.TRIM:
        counts.trims++
        this.#upcall(this.#pending(request, request.length, none), 'trim')
        return
      case COMMAND.WRITE_ZEROES:
        counts.zeroes++
        this.#upcall(this.#pending(request, request.length, none), 'zero')
        return
      case COMMAND.BLOCK_STATUS:
        this.#upcall(this.#pending(request, request.length, this.contexts), 'status')
        return
      case COMMAND.CACHE:
        this.#cache(request)
        return
      default:
        assert(false, `command ${request.command} passed validation`)
    }
  }

  /** @param kept bytes of memory that the payload keeps alive */
  #write(pending: PendingRequest, payload: Buffer, kept: number): void {
    const { request } = pending
    assert(request.command === COMMAND.WRITE, 'only writes carry data')
    // The volume may have shrunk since the header was read.
    if (request.offset + pending.length > this.size) {
      this.#releasePayload(pending)
      this.#answer(pending, NBD_ERRNO.ENOSPC)
      return
    }
    const { counts, spec, tables } = this.export
    counts.writes++
    counts.writeBytes += pending.length
    const { members } = this.#host
    const pieces = directPieces(spec, tables, members.contiguous, request.offset, pending.length)
    if (pieces === undefined) {
      this.#ownPayload(pending, kept)
      this.#upcall(pending, 'write')
      return
    }
    counts.inPlaceWrites++
    if (!members.writeGate.allows(pending.length)) {
      const stable = this.#ownPayload(pending, kept)
      this.#requestsInFlight++
      let left = pieces.length
      let errno = 0
      for (const piece of pieces) {
        members.writeLater(piece.slot, piece.offset, stable, piece.start, piece.length, (error) => {
          if (error !== null) errno = ERRNO_OF[error.code]
          left--
          if (left === 0) this.#writtenLater(pending, errno)
        })
      }
      return
    }
    try {
      for (const piece of pieces) {
        members.writeNow(piece.slot, piece.offset, payload, piece.start, piece.length)
      }
    } catch (error) {
      this.#releasePayload(pending)
      this.#answer(pending, errnoOf(error))
      return
    }
    if ((request.flags & COMMAND_FLAG.FUA) !== 0) {
      this.#ownPayload(pending, kept)
      this.#upcall(pending, 'sync')
      return
    }
    this.#releasePayload(pending)
    this.#answer(pending, 0)
  }

  #writtenLater(pending: PendingRequest, errno: number): void {
    if (errno === 0 && (pending.request.flags & COMMAND_FLAG.FUA) !== 0) {
      this.#requestsInFlight--
      this.#upcall(pending, 'sync')
      return
    }
    this.#finish(pending, errno)
    this.#planFlush()
  }

  /** Reads what is in slots, for the page cache to keep; the data goes nowhere. Bounded: the command is a hint. */
  #cache(request: Request): void {
    const { spec, tables } = this.export
    const { members, pool } = this.#host
    const length = Math.min(request.length, this.payloadMax)
    const pieces = readPieces(spec, tables, members.contiguous, request.offset, length)
    const pending = this.#pending(request, length, none)
    const buffer = pool.take(cacheStepBytes)
    this.#requestsInFlight++
    let index = 0
    let done = 0
    const step = (error: StoreError | null): void => {
      let piece = pieces[index]
      while (piece !== undefined && (piece.slot === 0 || done === piece.length)) {
        index++
        done = 0
        piece = pieces[index]
      }
      if (error !== null || piece === undefined) {
        pool.give(buffer)
        this.#finish(pending, 0)
        this.#planFlush()
        return
      }
      const part = Math.min(cacheStepBytes, piece.length - done)
      const offset = piece.offset + done
      done += part
      members.readLater(piece.slot, offset, buffer, 0, part, step)
    }
    step(null)
  }

  #filteredStatus(pending: PendingRequest): void {
    const { request } = pending
    assert(pending.payload !== null)
    const filter = decodeStatusFilter(pending.payload)
    const errno = validateStatusFilter(filter, request, this)
    this.#releasePayload(pending)
    if (errno !== 0) {
      this.#reply(request, errno)
      return
    }
    this.#upcall(this.#pending(request, filter.length, filter.contexts), 'status')
  }

  #upcall(pending: PendingRequest, kind: UpcallKind): void {
    this.#requestsInFlight++
    this.export.counts.upcalls++
    this.#host.upcall(pending, kind)
  }

  #pending(
    request: Request,
    length: number,
    contexts: readonly number[],
    answers: Request | null = request,
  ): PendingRequest {
    return {
      connection: this,
      request,
      answers,
      length,
      contexts,
      payload: null,
      owned: null,
      upcall: 0,
      uses: 0,
      kind: 'write',
    }
  }

  // ---------------------------------------------------------------------------------------- answering

  /** Answers a request that is in flight. */
  #finish(pending: PendingRequest, errno: number): void {
    this.#releasePayload(pending)
    this.#answer(pending, errno)
    this.#left()
  }

  #answer(pending: PendingRequest, errno: number): void {
    if (pending.answers === null) this.#partResult = errno
    else this.#reply(pending.answers, errno)
  }

  /** Writes a reply without data. */
  #reply(request: Request, errno: number): void {
    if (errno !== 0) this.export.counts.errors++
    const at = this.#replies.reserve(plainReplySizeMax)
    this.#replies.commit(writePlainReply(this.#replies.slab, at, request, this.mode, errno) - at)
  }

  #left(): void {
    this.#requestsInFlight--
    assert(this.#requestsInFlight >= 0, 'more requests answered than were in flight')
    if (this.#requests.stalled) this.#planResume()
  }

  /** The socket is done with a batch of replies. */
  #released(): void {
    this.#reads.resume()
    if (this.#requests.stalled) this.#planResume()
    if (this.#state === 'draining' && this.#reads.streaming) this.#armLinger()
    if (this.#state !== 'flushing') return
    this.#armLinger()
    this.#endSocket()
  }

  /** Replies of one turn leave together. Answers come from many places, so the flush waits until all have run. */
  #planFlush(): void {
    if (this.#flushPlanned) return
    this.#flushPlanned = true
    queueMicrotask(() => {
      this.#flushPlanned = false
      this.#replies.flush()
      this.#settle()
    })
  }

  /** Payload bytes that lie in a much larger received piece are moved before they wait for a decision. */
  #ownPayload(pending: PendingRequest, kept: number): Buffer {
    const { payload } = pending
    assert(payload !== null)
    if (pending.owned !== null || kept <= borrowedShareMax * payload.length) return payload
    const owned = this.#host.pool.take(payload.length)
    payload.copy(owned)
    pending.owned = owned
    pending.payload = owned.subarray(0, payload.length)
    return pending.payload
  }

  #releasePayload(pending: PendingRequest): void {
    const { payload, owned } = pending
    if (payload === null) return
    assert(pending.uses === 0, 'a payload is in use')
    pending.payload = null
    pending.owned = null
    if (owned !== null) this.#host.pool.give(owned)
    this.#unhold(payload.length)
  }

  #unhold(payloadBytes: number): void {
    this.#payloadBytes -= payloadBytes
    this.#host.budget.release(payloadBytes)
  }

  // ------------------------------------------------------------------------------------------- ending

  #enter(next: ConnectionState): void {
    assert(NEXT[this.#state].includes(next), `connection: ${this.#state} -> ${next}`)
    this.#state = next
  }

  /** Moves on towards closed, as far as what is in flight allows. */
  #settle(): void {
    if (this.#state === 'open' || this.#requestsInFlight > 0) return
    if (this.#socketGone) {
      if (this.#state === 'closed') return
      this.#enter('closed')
      if (this.#lingerTimer !== null) clearTimeout(this.#lingerTimer)
      this.#host.connectionClosed(this)
      this.#onClose(this.#reason)
      return
    }
    if (this.#state !== 'draining') return
    this.#replies.flush()
    this.#enter('flushing')
    this.#armLinger()
    this.#endSocket()
  }

  /** Closes the socket once the replies are with the kernel: what the client sent behind the end is not read. */
  #endSocket(): void {
    if (this.#replies.idle) this.#socket.end(() => this.#socket.destroy())
  }

  /** A client that takes no reply for that long is not waited for. */
  #armLinger(): void {
    if (this.#lingerTimer !== null) clearTimeout(this.#lingerTimer)
    this.#lingerTimer = setTimeout(() => this.#socket.destroy(), LIMITS.closeLingerMsMax)
  }
}

const plainReplySizeMax = chunkHeaderSize(true) + 6
const cacheStepBytes = 256 * 1024

function errnoOf(error: unknown): number {
  if (error instanceof StoreError) return ERRNO_OF[error.code]
  throw error
}
