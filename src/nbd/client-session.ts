import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import { messageOf, ProtocolError, StoreError } from '../base/errors.ts'
import type { NegotiatedExport } from './client-handshake.ts'
import { COMMAND } from './constants.ts'
import {
  type ContextExtents,
  type DecodedError,
  encodeFilteredStatusRequest,
  writeRequest,
} from './replies.ts'
import { ReplyReader, type ReplySink } from './reply-reader.ts'
import { requestHeaderSize } from './transmission.ts'

/**
 * The transmission phase of a client: requests are pipelined on one socket, `inFlightMax` of them on the wire, the
 * others waiting in order; replies come in any order and are matched by cookie.
 *
 * What a server may not do ends the connection: unknown cookies, data that nobody asked for or that comes twice, success
 * without all of the data. Then every request rejects, those that come later as well.
 */

/** One request as it goes to the wire, with nothing checked and nothing cut. */
export interface RawRequest {
  readonly command: number
  readonly flags?: number
  readonly offset?: number
  readonly length?: number // of a payload: its length
  readonly payload?: Buffer
  readonly target?: Buffer // read: where the data goes, `length` bytes
  readonly contexts?: readonly number[] // block status: only these wire ids, sent as its payload (extended headers)
}

export interface RawReply {
  readonly errno: number // 0, or the first error
  readonly message: string // the server's words about it
  readonly statuses: readonly ContextExtents[]
}

interface Pending {
  readonly request: RawRequest
  readonly resolve: (reply: RawReply) => void
  readonly reject: (error: Error) => void
  error: DecodedError | undefined
  /** Read: disjoint ranges of the export that have arrived, in order. */
  readonly covered: { start: number; end: number }[]
  readonly statuses: ContextExtents[]
}

/** How long a server may take to close after a disconnect before the client does it. */
const CLOSE_MS_MAX = 1000

export class NbdSession {
  readonly #where: string // for messages
  readonly #negotiated: NegotiatedExport
  readonly #socket: Socket
  readonly #reader: ReplyReader
  readonly #extended: boolean
  readonly #inFlightMax: number
  readonly #pending = new Map<number, Pending>()
  readonly #waiting: Pending[] = [] // a queue; its head is at `#waitingHead`
  #waitingHead = 0
  #nextCookie = 1
  #corked = false
  #failure: Error | undefined
  #closing: Promise<void> | undefined
  /** Called after each request that settled; `close` waits through it for the last one. */
  #onSettled: () => void = () => undefined
  /** Resolves when the connection has ended, for whatever reason. */
  readonly gone: Promise<void>

  /** @param leftover the bytes that came with the end of the handshake */
  constructor(
    where: string,
    socket: Socket,
    negotiated: NegotiatedExport,
    leftover: Buffer,
    inFlightMax: number,
  ) {
    assert(inFlightMax > 0, 'client requests in flight')
    this.#where = where
    this.#negotiated = negotiated
    this.#socket = socket
    this.#extended = negotiated.mode === 'extended'
    this.#inFlightMax = inFlightMax
    this.#reader = new ReplyReader(negotiated.mode, this.#sink())
    this.gone = new Promise((resolve) => socket.once('close', () => resolve()))
    socket.on('error', (error) => this.#fail(this.#lost(messageOf(error), error)))
    socket.on('close', () => this.#fail(this.#lost('the server closed it')))
    socket.on('data', (chunk) => this.#receive(chunk))
    if (leftover.length > 0) this.#receive(leftover)
    socket.resume()
  }

  get failure(): Error | undefined {
    return this.#failure
  }
  get bytesWritten(): number {
    return this.#socket.bytesWritten
  }

  /**
   * Sends one request exactly as given and reports what came back, also when it is an error.
   * @throws StoreError or ProtocolError only when the connection is gone
   */
  request(request: RawRequest): Promise<RawReply> {
    assert(this.#closing === undefined, 'request after close')
    if (this.#failure !== undefined) return Promise.reject(this.#failure)
    return new Promise((resolve, reject) => {
      const pending: Pending = { request, resolve, reject, error: undefined, covered: [], statuses: [] }
      if (this.#pending.size < this.#inFlightMax) this.#send(pending)
      else this.#waiting.push(pending)
    })
  }

  /** Waits for all requests, then disconnects softly. Resolves when the socket is closed. Never rejects. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    // A settled request makes room for a waiting one before it is reported, so none in flight means none waiting.
    while (this.#failure === undefined && this.#pending.size > 0) {
      await new Promise<void>((resolve) => {
        this.#onSettled = resolve
      })
    }
    if (this.#failure === undefined) {
      const header = Buffer.alloc(requestHeaderSize(this.#extended))
      writeRequest(
        header,
        0,
        { flags: 0, command: COMMAND.DISC, cookie: 0, offset: 0, length: 0 },
        this.#extended,
      )
      this.#socket.end(header)
    }
    const timer = setTimeout(() => this.#socket.destroy(), CLOSE_MS_MAX)
    await this.gone
    clearTimeout(timer)
  }

  destroy(): void {
    this.#fail(this.#lost('it was dropped'))
    this.#socket.destroy()
  }

  /** Ends the connection over something that the server should not have sent. Returns the error for the caller to throw. */
  broken(error: ProtocolError): ProtocolError {
    error.message = `${this.#where}: ${error.message}`
    this.#fail(error)
    this.#socket.destroy()
    return error
  }

  #send(pending: Pending): void {
    const { request } = pending
    const cookie = this.#nextCookie++
    this.#pending.set(cookie, pending)
    const outgoing = {
      flags: request.flags ?? 0,
      command: request.command,
      cookie,
      offset: request.offset ?? 0,
      length: request.length ?? 0,
    }
    // Requests of one turn go out in one system call.
    if (!this.#corked) {
      this.#corked = true
      this.#socket.cork()
      process.nextTick(() => {
        this.#corked = false
        this.#socket.uncork()
      })
    }
    if (request.contexts !== undefined) {
      this.#socket.write(encodeFilteredStatusRequest(outgoing, request.contexts))
      return
    }
    const header = Buffer.allocUnsafe(requestHeaderSize(this.#extended))
    writeRequest(header, 0, outgoing, this.#extended)
    this.#socket.write(header)
    if (request.payload !== undefined) this.#socket.write(request.payload)
  }

  #sendWaiting(): void {
    while (this.#pending.size < this.#inFlightMax) {
      const next = this.#waiting[this.#waitingHead]
      if (next === undefined) break
      this.#waitingHead++
      this.#send(next)
    }
    // Forget what was sent; in steps, so that each one costs a constant amount of copying.
    if (this.#waitingHead > 1024 && this.#waitingHead * 2 > this.#waiting.length) {
      this.#waiting.splice(0, this.#waitingHead)
      this.#waitingHead = 0
    }
  }

  // ---------------------------------------------------------------------------------------- replies

  #receive(chunk: Buffer): void {
    if (this.#failure !== undefined) return
    try {
      this.#reader.receive(chunk)
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.broken(error)
    }
  }

  #sink(): ReplySink {
    return {
      onSimple: (cookie, errno) => {
        const pending = this.#find(cookie)
        const { command, target, offset = 0 } = pending.request
        if (command === COMMAND.READ && this.#negotiated.mode !== 'simple') {
          throw new ProtocolError('simple reply to a read in structured mode')
        }
        if (errno !== 0) pending.error = { errno, message: '' }
        if (errno !== 0 || command !== COMMAND.READ || target === undefined) return undefined
        return this.#cover(cookie, offset, target.length)
      },
      onData: (cookie, offset, length) => this.#cover(cookie, offset, length),
      onHole: (cookie, offset, length) => {
        this.#cover(cookie, offset, length).fill(0)
      },
      onError: (cookie, error) => {
        if (error.errno === 0) throw new ProtocolError('error chunk without an error')
        const pending = this.#find(cookie)
        pending.error ??= error
      },
      onStatus: (cookie, status) => {
        const { request, statuses } = this.#find(cookie)
        if (request.command !== COMMAND.BLOCK_STATUS)
          throw new ProtocolError('block status for another command')
        if (statuses.length >= this.#negotiated.contexts.length) {
          throw new ProtocolError('block status for too many contexts')
        }
        statuses.push(status)
      },
      onDone: (cookie) => this.#done(cookie),
    }
  }

  #find(cookie: number): Pending {
    const pending = this.#pending.get(cookie)
    if (pending === undefined) throw new ProtocolError(`reply with cookie ${cookie}, which no request has`)
    return pending
  }

  /** Marks a part of a read as arrived and returns where it goes. */
  #cover(cookie: number, start: number, length: number): Buffer {
    const { request, covered } = this.#find(cookie)
    const { target } = request
    const base = request.offset ?? 0
    const end = start + length
    if (request.command !== COMMAND.READ || target === undefined)
      throw new ProtocolError('data for another command')
    if (start < base || end > base + target.length) throw new ProtocolError('data outside of what was read')
    let index = covered.length
    while (index > 0 && (covered[index - 1]?.start ?? 0) > start) index--
    const before = covered[index - 1]
    const after = covered[index]
    if ((before !== undefined && before.end > start) || (after !== undefined && after.start < end)) {
      throw new ProtocolError('data chunks that overlap')
    }
    if (before?.end === start) before.end = end
    else covered.splice(index, 0, { start, end })
    return target.subarray(start - base, end - base)
  }

  #done(cookie: number): void {
    const pending = this.#find(cookie)
    const { request, error, covered } = pending
    if (error === undefined && request.command === COMMAND.READ && request.target !== undefined) {
      const arrived = covered.reduce((sum, range) => sum + range.end - range.start, 0)
      if (arrived !== request.target.length) throw new ProtocolError('read succeeded without all of its data')
    }
    this.#pending.delete(cookie)
    pending.resolve({ errno: error?.errno ?? 0, message: error?.message ?? '', statuses: pending.statuses })
    this.#sendWaiting()
    this.#onSettled()
  }

  // ---------------------------------------------------------------------------------------- endings

  #lost(reason: string, cause?: Error): StoreError {
    return new StoreError('MEMBER_IO', `${this.#where}: the connection is lost: ${reason}`, { cause })
  }

  #fail(error: Error): void {
    if (this.#failure !== undefined) return
    this.#failure = error
    const all = [...this.#pending.values(), ...this.#waiting.slice(this.#waitingHead)]
    this.#pending.clear()
    this.#waiting.length = 0
    this.#waitingHead = 0
    for (const pending of all) pending.reject(error)
    this.#onSettled()
  }
}
