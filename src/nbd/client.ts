import type { Socket } from 'node:net'
import { ProtocolError, StoreError, type StoreErrorCode } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { connectAndNegotiate } from './client-connection.ts'
import { describeExport, listExports, type NegotiatedExport, openExport } from './client-handshake.ts'
import { NbdSession, type RawReply, type RawRequest } from './client-session.ts'
import { COMMAND, COMMAND_FLAG, type ReplyMode, TRANSMISSION_FLAG } from './constants.ts'
import { NBD_ERRNO } from './errno.ts'
import type { ListedExport } from './handshake.ts'
import type { Extent } from './transmission.ts'
import { formatNbdUri, parseNbdUri } from './uri.ts'

/**
 * An NBD client over TCP and unix sockets. Requests are pipelined: any number may be started, `inFlightMax` of them are
 * on the wire, the others wait in order. Replies may come in any order. Reads and writes of any length are cut into
 * requests that the server takes.
 *
 * A failed request rejects with a StoreError and leaves the connection usable. A server that breaks the protocol, or a
 * lost connection, ends it: all requests reject, and every later one. A caller leaves the buffers of a request alone
 * until it has settled.
 */
export interface NbdClientOptions {
  /** The best framing to ask for; the server may have less. Default `extended`. */
  readonly mode?: ReplyMode
  /** Metadata contexts to select. Default `base:allocation`. */
  readonly contexts?: readonly string[]
  /** Requests on the wire at once. Default 64. */
  readonly inFlightMax?: number
  /** Milliseconds for connecting and the handshake. */
  readonly handshakeMsMax?: number
}

export interface ByteRange {
  readonly offset: number // bytes
  readonly length: number // bytes
}

const IN_FLIGHT_DEFAULT = 64
/** Effect lengths of compact requests have 32 bits; pieces stay aligned to anything sensible. */
const COMPACT_EFFECT_MAX = 2 ** 31
/** How long a server may take to close after a disconnect before the client does it. */
const CLOSE_MS_MAX = 1000

export class NbdClient {
  readonly uri: string
  readonly export: NegotiatedExport
  readonly #session: NbdSession
  readonly #extended: boolean

  /**
   * @param uri an NBD URI with an export name (none: the default export)
   * @throws UserError USAGE, UNREACHABLE, NOT_FOUND, REFUSED; ProtocolError
   */
  static async connect(uri: string, options: NbdClientOptions = {}): Promise<NbdClient> {
    const parsed = parseNbdUri(uri)
    const handshake = openExport(parsed.exportName, {
      mode: options.mode ?? 'extended',
      contexts: options.contexts ?? ['base:allocation'],
    })
    const { socket, result, leftover } = await connectAndNegotiate(parsed, handshake, options.handshakeMsMax)
    const where = formatNbdUri(parsed)
    const session = new NbdSession(where, socket, result, leftover, options.inFlightMax ?? IN_FLIGHT_DEFAULT)
    return new NbdClient(where, session, result)
  }

  private constructor(uri: string, session: NbdSession, negotiated: NegotiatedExport) {
    this.uri = uri
    this.export = negotiated
    this.#session = session
    this.#extended = negotiated.mode === 'extended'
  }

  get size(): number {
    return this.export.size
  }

  get readOnly(): boolean {
    return this.#has(TRANSMISSION_FLAG.READ_ONLY)
  }

  /** The largest payload of one request, bytes. */
  get payloadMax(): number {
    const { minimum, maximum } = this.export.blockSizes
    const bounded = Math.min(maximum, LIMITS.requestPayloadMax)
    return bounded - (bounded % minimum)
  }

  /** Resolves when the connection has ended, for whatever reason. */
  get gone(): Promise<void> {
    return this.#session.gone
  }

  /** Why the connection can no longer be used; absent while it can. */
  get failure(): Error | undefined {
    return this.#session.failure
  }

  /** Since the connection began, handshake and headers included. */
  get bytesWritten(): number {
    return this.#session.bytesWritten
  }

  /** Fills `target` from `offset` of the export on. */
  async read(target: Buffer, offset: number): Promise<void> {
    this.#checkRange(offset, target.length)
    await this.#pieces({ offset, length: target.length }, this.payloadMax, (piece) => {
      const start = piece.offset - offset
      return { command: COMMAND.READ, ...piece, target: target.subarray(start, start + piece.length) }
    })
  }

  /** @param options.durable answer only when the bytes survive a power cut (FUA, or a flush where there is none) */
  async write(source: Buffer, offset: number, options: { durable?: boolean } = {}): Promise<void> {
    this.#checkRange(offset, source.length)
    const fua = this.#fua(options.durable)
    await this.#pieces({ offset, length: source.length }, this.payloadMax, (piece) => {
      const start = piece.offset - offset
      const payload = source.subarray(start, start + piece.length)
      const flags = fua.flags | (this.#extended ? COMMAND_FLAG.PAYLOAD_LEN : 0)
      return { command: COMMAND.WRITE, flags, ...piece, payload }
    })
    if (fua.flush) await this.flush()
  }

  /** Every write that was answered before becomes durable. A server without flush has nothing to make durable. */
  async flush(): Promise<void> {
    if (this.#has(TRANSMISSION_FLAG.SEND_FLUSH)) await this.#request({ command: COMMAND.FLUSH })
  }

  /** A hint that the range is no longer needed; its content is undefined afterwards. */
  async trim(range: ByteRange, options: { durable?: boolean } = {}): Promise<void> {
    this.#checkRange(range.offset, range.length)
    if (!this.#has(TRANSMISSION_FLAG.SEND_TRIM)) return
    const fua = this.#fua(options.durable)
    await this.#pieces(range, this.#effectMax(), (piece) => ({
      command: COMMAND.TRIM,
      flags: fua.flags,
      ...piece,
    }))
    if (fua.flush) await this.flush()
  }

  /**
   * The range reads as zeros afterwards.
   * @param options.release whether the server may give the space back (default); else it stays provisioned
   * @param options.fast fail with NOT_SUPPORTED rather than be as slow as writing
   */
  async zero(
    range: ByteRange,
    options: { durable?: boolean; release?: boolean; fast?: boolean } = {},
  ): Promise<void> {
    this.#checkRange(range.offset, range.length)
    const fast = options.fast ?? false
    if (fast && !this.#has(TRANSMISSION_FLAG.SEND_FAST_ZERO)) {
      throw new StoreError('NOT_SUPPORTED', `${this.uri}: the server has no fast zeroing`)
    }
    if (!this.#has(TRANSMISSION_FLAG.SEND_WRITE_ZEROES)) {
      throw new StoreError('NOT_SUPPORTED', `${this.uri}: the server cannot write zeroes`)
    }
    const fua = this.#fua(options.durable)
    const noHole = (options.release ?? true) ? 0 : COMMAND_FLAG.NO_HOLE
    const flags = fua.flags | noHole | (fast ? COMMAND_FLAG.FAST_ZERO : 0)
    await this.#pieces(range, this.#effectMax(), (piece) => ({
      command: COMMAND.WRITE_ZEROES,
      flags,
      ...piece,
    }))
    if (fua.flush) await this.flush()
  }

  /** A hint that the range will be read soon. */
  async cache(range: ByteRange): Promise<void> {
    this.#checkRange(range.offset, range.length)
    if (!this.#has(TRANSMISSION_FLAG.SEND_CACHE)) return
    await this.#pieces(range, this.#effectMax(), (piece) => ({ command: COMMAND.CACHE, ...piece }))
  }

  /**
   * What the server says about a range in one reply: it may cover less, and its last extent may reach further.
   * @param options.one a single extent for each context
   * @param options.contexts names of negotiated contexts to ask about; default all
   * @returns extents by context name, from the range's offset on
   */
  async blockStatus(
    range: ByteRange,
    options: { one?: boolean; contexts?: readonly string[] } = {},
  ): Promise<Map<string, readonly Extent[]>> {
    this.#checkRange(range.offset, range.length)
    const { contexts } = this.export
    if (contexts.length === 0)
      throw new StoreError('NOT_SUPPORTED', `${this.uri}: no metadata context was negotiated`)
    const wanted = contexts.filter((context) => options.contexts?.includes(context.name) ?? true)
    if (wanted.length < (options.contexts?.length ?? 0)) {
      throw new StoreError(
        'NOT_SUPPORTED',
        `${this.uri}: not all of ${options.contexts?.join(', ')} were negotiated`,
      )
    }
    const length = this.#extended ? range.length : Math.min(range.length, COMPACT_EFFECT_MAX)
    const filter = wanted.length < contexts.length && this.#has(TRANSMISSION_FLAG.BLOCK_STATUS_PAYLOAD)
    const reply = await this.#request({
      command: COMMAND.BLOCK_STATUS,
      flags: options.one ? COMMAND_FLAG.REQ_ONE : 0,
      offset: range.offset,
      length,
      ...(filter ? { contexts: wanted.map((context) => context.id) } : {}),
    })
    const result = new Map<string, readonly Extent[]>()
    for (const { id, name } of wanted) {
      const status = reply.statuses.find((candidate) => candidate.context === id)
      if (status === undefined)
        throw this.#session.broken(new ProtocolError(`no block status for context ${name}`))
      result.set(name, status.extents)
    }
    return result
  }

  /** All extents of a range in order, without gaps, neighbours with equal flags merged. */
  async *extents(
    offset: number,
    length: number,
    context = 'base:allocation',
  ): AsyncGenerator<ByteRange & Extent> {
    const end = offset + length
    let current: { offset: number; length: number; flags: number } | undefined
    for (let at = offset; at < end; ) {
      const status = await this.blockStatus({ offset: at, length: end - at }, { contexts: [context] })
      for (const extent of status.get(context) ?? []) {
        const clipped = Math.min(extent.length, end - at)
        if (clipped <= 0) break
        if (current !== undefined && current.flags === extent.flags) {
          current.length += clipped
        } else {
          if (current !== undefined) yield current
          current = { offset: at, length: clipped, flags: extent.flags }
        }
        at += clipped
      }
    }
    if (current !== undefined) yield current
  }

  /**
   * Sends one request exactly as given and reports what came back, also when it is an error. For tests and tools.
   * @throws StoreError or ProtocolError only when the connection is gone
   */
  raw(request: RawRequest): Promise<RawReply> {
    return this.#session.request(request)
  }

  /** Waits for requests in flight, then disconnects softly. Resolves when the socket is closed. Never rejects. */
  close(): Promise<void> {
    return this.#session.close()
  }

  /** Drops the connection without a word, as a client does that crashes. Requests in flight reject. */
  destroy(): void {
    this.#session.destroy()
  }

  // --------------------------------------------------------------------------------------- requests

  #has(flag: number): boolean {
    return (this.export.transmissionFlags & flag) !== 0
  }

  #fua(durable = false): { flags: number; flush: boolean } {
    const fua = this.#has(TRANSMISSION_FLAG.SEND_FUA)
    return { flags: durable && fua ? COMMAND_FLAG.FUA : 0, flush: durable && !fua }
  }

  #effectMax(): number {
    return this.#extended ? Number.MAX_SAFE_INTEGER : COMPACT_EFFECT_MAX
  }

  #checkRange(offset: number, length: number): void {
    if (offset < 0 || length < 0 || offset + length > this.size) {
      throw new StoreError(
        'INVALID',
        `${this.uri}: ${length} bytes at ${offset} are outside its ${this.size} bytes`,
      )
    }
  }

  /** Cuts a range into requests of at most `max` bytes, runs them at once, and waits for all, also after a failure. */
  async #pieces(range: ByteRange, max: number, make: (piece: ByteRange) => RawRequest): Promise<void> {
    const requests: Promise<unknown>[] = []
    for (let done = 0; done < range.length; done += max) {
      const piece = { offset: range.offset + done, length: Math.min(max, range.length - done) }
      requests.push(this.#request(make(piece)))
    }
    const failed = (await Promise.allSettled(requests)).find((result) => result.status === 'rejected')
    if (failed !== undefined) throw failed.reason
  }

  async #request(request: RawRequest): Promise<RawReply> {
    const reply = await this.raw(request)
    if (reply.errno === 0) return reply
    const name = COMMAND_NAME[request.command] ?? `command ${request.command}`
    const words = reply.message === '' ? '' : `: ${reply.message}`
    const where = `${name} of ${request.length ?? 0} bytes at ${request.offset ?? 0}`
    throw new StoreError(
      codeOf(reply.errno),
      `${this.uri}: ${where} failed with error ${reply.errno}${words}`,
    )
  }
}

const COMMAND_NAME: Readonly<Record<number, string>> = {
  [COMMAND.READ]: 'read',
  [COMMAND.WRITE]: 'write',
  [COMMAND.FLUSH]: 'flush',
  [COMMAND.TRIM]: 'trim',
  [COMMAND.CACHE]: 'cache',
  [COMMAND.WRITE_ZEROES]: 'zeroing',
  [COMMAND.BLOCK_STATUS]: 'block status',
}

const CODE_OF: Readonly<Record<number, StoreErrorCode>> = {
  [NBD_ERRNO.EPERM]: 'READ_ONLY',
  [NBD_ERRNO.EIO]: 'MEMBER_IO',
  [NBD_ERRNO.ENOMEM]: 'NO_MEMORY',
  [NBD_ERRNO.EINVAL]: 'INVALID',
  [NBD_ERRNO.ENOSPC]: 'NO_SPACE',
  [NBD_ERRNO.EOVERFLOW]: 'INVALID',
  [NBD_ERRNO.ENOTSUP]: 'NOT_SUPPORTED',
  [NBD_ERRNO.ESHUTDOWN]: 'SHUTTING_DOWN',
}

/** "The client SHOULD treat an unexpected error value as if it had been NBD_EINVAL". */
function codeOf(errno: number): StoreErrorCode {
  return CODE_OF[errno] ?? 'INVALID'
}

/** The exports of a server; the export name in the URI is ignored. Throws as `NbdClient.connect` does. */
export async function listNbdExports(uri: string, options: NbdClientOptions = {}): Promise<ListedExport[]> {
  const { socket, result } = await connectAndNegotiate(
    parseNbdUri(uri),
    listExports(),
    options.handshakeMsMax,
  )
  hangUp(socket)
  return result
}

/** One export, without opening it: sizes, flags, description and the contexts it offers. */
export async function describeNbdExport(
  uri: string,
  options: NbdClientOptions = {},
): Promise<NegotiatedExport> {
  const parsed = parseNbdUri(uri)
  const handshake = describeExport(parsed.exportName, { mode: options.mode ?? 'extended', contexts: [] })
  const { socket, result } = await connectAndNegotiate(parsed, handshake, options.handshakeMsMax)
  hangUp(socket)
  return result
}

/** The ABORT is already written; what the server still says about it is dropped. */
function hangUp(socket: Socket): void {
  socket.on('error', () => undefined)
  socket.resume()
  socket.end()
  socket.setTimeout(CLOSE_MS_MAX, () => socket.destroy())
}
