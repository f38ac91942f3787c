import type { Socket } from 'node:net'
import type { ReplyMode } from '../../src/datapath/datapath.ts'

/**
 * A small NBD client for tests, of the transmission phase only. It knows the protocol from the specification and shares
 * no code with src/nbd, so a codec that is wrong on both sides does not go unseen. It is strict: a reply that the
 * specification does not allow (magic, cookie, overlap, missing bytes, data after DONE) fails the connection.
 */
export const CMD = { READ: 0, WRITE: 1, DISC: 2, FLUSH: 3, TRIM: 4, CACHE: 5, ZERO: 6, STATUS: 7 } as const
export const FLAG = { FUA: 1, NO_HOLE: 2, DF: 4, REQ_ONE: 8, FAST_ZERO: 16, PAYLOAD_LEN: 32 } as const

const MAGIC_REQUEST = 0x25609513
const MAGIC_REQUEST_EXTENDED = 0x21e41c71
const MAGIC_SIMPLE = 0x67446698
const MAGIC_STRUCTURED = 0x668e33ef
const MAGIC_EXTENDED = 0x6e8a278c

export interface WireRequest {
  readonly command: number
  readonly flags?: number
  readonly offset?: number
  readonly length?: number // of the range; a payload brings its own
  readonly payload?: Buffer
  readonly cookie?: bigint
}

export interface WireChunk {
  readonly type: 'data' | 'hole' | 'none' | 'error' | 'status'
  readonly offset: number
  readonly length: number
  readonly done: boolean
}
export interface WireStatus {
  readonly context: number
  readonly extents: readonly { length: number; flags: number }[]
}
export interface WireReply {
  readonly cookie: bigint
  errno: number
  data: Buffer // of a read: the whole range, zeros where holes were announced
  readonly chunks: WireChunk[]
  readonly status: WireStatus[]
}

interface Pending {
  readonly request: WireRequest
  readonly reply: WireReply
  readonly resolve: (reply: WireReply) => void
  readonly reject: (error: Error) => void
  covered: number // bytes of a read that chunks spoke of
}

/** A request whose numbers may need all 64 bits. */
export type EncodableRequest = Omit<WireRequest, 'offset' | 'length'> & {
  readonly offset?: number | bigint
  readonly length?: number | bigint
}

/** The bytes of a request, header and payload. */
export function encodeRequest(
  request: EncodableRequest,
  mode: ReplyMode,
  cookie = request.cookie ?? 0n,
): Buffer {
  const payload = request.payload ?? Buffer.alloc(0)
  const length = request.payload === undefined ? (request.length ?? 0) : payload.length
  const extended = mode === 'extended'
  const header = Buffer.alloc(extended ? 32 : 28)
  let flags = request.flags ?? 0
  if (extended && request.payload !== undefined) flags |= FLAG.PAYLOAD_LEN
  header.writeUInt32BE(extended ? MAGIC_REQUEST_EXTENDED : MAGIC_REQUEST, 0)
  header.writeUInt16BE(flags, 4)
  header.writeUInt16BE(request.command, 6)
  header.writeBigUInt64BE(cookie, 8)
  header.writeBigUInt64BE(BigInt(request.offset ?? 0), 16)
  if (extended) header.writeBigUInt64BE(BigInt(length), 24)
  else header.writeUInt32BE(Number(length), 24)
  return Buffer.concat([header, payload])
}

/** The payload that asks a block status of only these contexts (extended headers). */
export function statusFilter(length: number, contexts: readonly number[]): Buffer {
  const payload = Buffer.alloc(8 + 4 * contexts.length)
  payload.writeBigUInt64BE(BigInt(length), 0)
  contexts.forEach((id, index) => {
    payload.writeUInt32BE(id, 8 + 4 * index)
  })
  return payload
}

export class WireClient {
  readonly socket: Socket
  readonly mode: ReplyMode
  /** Resolves when the connection is over, whoever ended it. */
  readonly closed: Promise<void>
  /** Set when the server broke the protocol. */
  failure: Error | null = null
  isClosed = false
  received = 0 // bytes

  readonly #pending = new Map<bigint, Pending>()
  #nextCookie = 0xfedcba9800000001n // needs all 64 bits
  #pieces: Buffer[] = []
  #have = 0
  #need = 4

  constructor(socket: Socket, mode: ReplyMode) {
    this.socket = socket
    this.mode = mode
    this.closed = new Promise((resolve) => {
      socket.on('close', () => {
        this.isClosed = true
        const error = this.failure ?? new Error('the connection ended before the reply')
        for (const pending of this.#pending.values()) pending.reject(error)
        this.#pending.clear()
        resolve()
      })
    })
    socket.on('error', () => {}) // resets are expected; `close` follows
    socket.on('data', (piece: Buffer) => {
      this.received += piece.length
      this.#pieces.push(piece)
      this.#have += piece.length
      try {
        this.#parse()
      } catch (error) {
        this.failure = error instanceof Error ? error : new Error(String(error))
        socket.destroy()
      }
    })
  }

  /** Requests sent and not yet answered. */
  get outstanding(): number {
    return this.#pending.size
  }

  /** Sends a request; resolves with its whole reply. */
  request(request: WireRequest): Promise<WireReply> {
    const { bytes, reply } = this.prepare(request)
    this.socket.write(bytes)
    return reply
  }

  /** The bytes of a request that somebody else sends, and the reply that is then expected. */
  prepare(request: WireRequest): { bytes: Buffer; reply: Promise<WireReply> } {
    const cookie = request.cookie ?? this.#nextCookie++
    const reply = new Promise<WireReply>((resolve, reject) => {
      const empty: WireReply = { cookie, errno: 0, data: Buffer.alloc(0), chunks: [], status: [] }
      this.#pending.set(cookie, { request, reply: empty, resolve, reject, covered: 0 })
    })
    reply.catch(() => {}) // whoever awaits it sees the failure; a test that hangs up on purpose does not
    return { bytes: encodeRequest(request, this.mode, cookie), reply }
  }

  async read(offset: number, length: number, flags = 0): Promise<Buffer> {
    return okay(await this.request({ command: CMD.READ, offset, length, flags })).data
  }
  async write(offset: number, payload: Buffer, flags = 0): Promise<void> {
    okay(await this.request({ command: CMD.WRITE, offset, payload, flags }))
  }
  async flush(): Promise<void> {
    okay(await this.request({ command: CMD.FLUSH }))
  }

  /** Ends the session the polite way. */
  async disconnect(): Promise<void> {
    this.socket.write(encodeRequest({ command: CMD.DISC }, this.mode))
    await this.closed
  }

  destroy(): void {
    this.socket.destroy()
  }

  #parse(): void {
    while (this.#have >= this.#need) {
      const all = this.#pieces.length === 1 ? this.#pieces[0]! : Buffer.concat(this.#pieces)
      const used = this.#parseOne(all)
      const rest = all.subarray(used)
      this.#pieces = rest.length === 0 ? [] : [rest]
      this.#have = rest.length
      if (used > 0) this.#need = 4
    }
  }

  /** Takes one reply or chunk off `all`, or says in #need how much it takes; returns the bytes used. */
  #parseOne(all: Buffer): number {
    const magic = all.readUInt32BE(0)
    const headerSize = this.#headerSize(magic)
    if (all.length < headerSize) return this.#wait(headerSize)
    const cookie = all.readBigUInt64BE(8)
    const pending = this.#pending.get(cookie)
    if (pending === undefined) throw new Error(`reply to unknown cookie ${cookie.toString(16)}`)
    const { request, reply } = pending
    if (magic === MAGIC_SIMPLE) {
      const errno = all.readUInt32BE(4)
      const dataLength = request.command === CMD.READ && errno === 0 ? (request.length ?? 0) : 0
      if (request.command === CMD.READ && this.mode === 'structured')
        throw new Error('simple reply to a read')
      if (all.length < headerSize + dataLength) return this.#wait(headerSize + dataLength)
      reply.errno = errno
      reply.data = Buffer.from(all.subarray(headerSize, headerSize + dataLength))
      pending.covered = dataLength
      this.#finish(pending)
      return headerSize + dataLength
    }
    const extended = magic === MAGIC_EXTENDED
    const length = extended ? Number(all.readBigUInt64BE(24)) : all.readUInt32BE(16)
    if (all.length < headerSize + length) return this.#wait(headerSize + length)
    if (extended && all.readBigUInt64BE(16) !== BigInt(request.offset ?? 0)) {
      throw new Error('extended reply repeats another offset')
    }
    const flags = all.readUInt16BE(4)
    if ((flags & ~1) !== 0) throw new Error(`reply flags ${flags}`)
    this.#chunk(
      pending,
      all.readUInt16BE(6),
      (flags & 1) === 1,
      all.subarray(headerSize, headerSize + length),
    )
    if ((flags & 1) === 1) this.#finish(pending)
    return headerSize + length
  }

  #wait(bytes: number): number {
    this.#need = bytes
    return 0
  }

  #headerSize(magic: number): number {
    if (magic === MAGIC_SIMPLE && this.mode !== 'extended') return 16
    if (magic === MAGIC_STRUCTURED && this.mode === 'structured') return 20
    if (magic === MAGIC_EXTENDED && this.mode === 'extended') return 32
    throw new Error(`reply magic ${magic.toString(16)} in ${this.mode} mode`)
  }

  #chunk(pending: Pending, type: number, done: boolean, payload: Buffer): void {
    const { request, reply } = pending
    switch (type) {
      case 0: {
        if (payload.length !== 0 || !done) throw new Error('NONE chunk with a payload, or not the last')
        reply.chunks.push({ type: 'none', offset: 0, length: 0, done })
        return
      }
      case 1:
        this.#content(pending, 'data', readOffset(payload), payload.length - 8, done, payload.subarray(8))
        return
      case 2:
        if (payload.length !== 12) throw new Error('hole chunk length')
        this.#content(pending, 'hole', readOffset(payload), payload.readUInt32BE(8), done, null)
        return
      case 5:
      case 6: {
        if (request.command !== CMD.STATUS) throw new Error('block status in answer to another command')
        if ((type === 6) !== (this.mode === 'extended'))
          throw new Error(`block status type ${type} in ${this.mode} mode`)
        reply.status.push(decodeStatus(payload, type === 6))
        reply.chunks.push({ type: 'status', offset: 0, length: payload.length, done })
        return
      }
      case 0x8001:
      case 0x8002: {
        const messageLength = payload.readUInt16BE(4)
        if (payload.length !== (type === 0x8001 ? 6 : 14) + messageLength)
          throw new Error('error chunk length')
        reply.errno = payload.readUInt32BE(0)
        if (reply.errno === 0) throw new Error('error chunk without an error')
        reply.chunks.push({ type: 'error', offset: 0, length: payload.length, done })
        return
      }
      default:
        throw new Error(`chunk type ${type}`)
    }
  }

  #content(
    pending: Pending,
    type: 'data' | 'hole',
    offset: number,
    length: number,
    done: boolean,
    data: Buffer | null,
  ): void {
    const { request, reply } = pending
    const start = request.offset ?? 0
    const size = request.length ?? 0
    if (request.command !== CMD.READ) throw new Error('data in answer to another command')
    if (length <= 0 || offset < start || offset + length > start + size)
      throw new Error('chunk outside the request')
    for (const other of reply.chunks) {
      if (offset < other.offset + other.length && other.offset < offset + length)
        throw new Error('chunks overlap')
    }
    if (reply.data.length === 0) reply.data = Buffer.alloc(size)
    data?.copy(reply.data, offset - start)
    pending.covered += length
    reply.chunks.push({ type, offset, length, done })
  }

  #finish(pending: Pending): void {
    const { request, reply } = pending
    if (request.command === CMD.READ && reply.errno === 0 && pending.covered !== (request.length ?? 0)) {
      throw new Error(`a read of ${request.length} bytes was answered with ${pending.covered}`)
    }
    this.#pending.delete(reply.cookie)
    pending.resolve(reply)
  }
}

function readOffset(payload: Buffer): number {
  return Number(payload.readBigUInt64BE(0))
}

function decodeStatus(payload: Buffer, extended: boolean): WireStatus {
  const extents: { length: number; flags: number }[] = []
  const fixed = extended ? 8 : 4
  const each = extended ? 16 : 8
  if (payload.length <= fixed || (payload.length - fixed) % each !== 0) throw new Error('block status length')
  for (let at = fixed; at < payload.length; at += each) {
    extents.push(
      extended
        ? { length: Number(payload.readBigUInt64BE(at)), flags: Number(payload.readBigUInt64BE(at + 8)) }
        : { length: payload.readUInt32BE(at), flags: payload.readUInt32BE(at + 4) },
    )
  }
  if (extended && payload.readUInt32BE(4) !== extents.length) throw new Error('block status count')
  return { context: payload.readUInt32BE(0), extents }
}

function okay(reply: WireReply): WireReply {
  if (reply.errno !== 0) throw new Error(`the server answered error ${reply.errno}`)
  return reply
}
