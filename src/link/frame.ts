/**
 * Frames: how bytes travel between two daemons. This file knows bytes only, no sockets and no clocks.
 *
 *   offset length                                    all numbers little endian
 *        0      4  magic "FsLk"
 *        4      1  framing version, 1
 *        5      1  kind (KIND)
 *        6      2  flags (FLAG)
 *        8      4  channel; 0: the session itself
 *       12      4  sequence: counts the frames of this direction of this connection, from 0, modulo 2^32
 *       16      4  acknowledged: bytes of whole frames that the sender has received on this connection, modulo 2^32
 *       20      2  type: the meaning of a message, the channel's business
 *       22      2  zero
 *       24      4  id: of a request and its reply; elsewhere a number that goes with the kind
 *       28      4  length of the payload
 *       32      4  CRC-32C of the payload
 *       36      4  CRC-32C of bytes 0 to 35
 *       40         payload
 *
 * What always holds:
 *  - Nothing of a header is believed before its checksum holds, and no payload is handed out before its own does.
 *  - A payload's length is checked against the bound of its kind, in this phase, before anything is allocated for it.
 *  - A reader that has thrown stays broken: what follows damage is never read as frames.
 *  - A payload is copied at most once: not at all where it lies within one chunk of the stream and is most of it, or where the
 *    stream puts it in its place (`room`).
 *  - Memory of large payloads is used again, if whoever was given one says that it is done with it (`release`).
 */
import { assert } from '../base/assert.ts'
import { LIMITS } from '../base/limits.ts'
import { crc32c } from './crc32c.ts'
import { LinkError } from './errors.ts'
import { Payloads } from './payloads.ts'

export const FRAME_HEADER_SIZE = 40
export const FRAMING_VERSION = 1
const MAGIC = 0x6b4c7346 // "FsLk"

export const KIND = {
  // The handshake, in this order (handshake.ts).
  hello: 1,
  welcome: 2,
  proof: 3,
  accept: 4,
  ready: 5,
  refuse: 6,
  // A connection.
  acknowledge: 16,
  ping: 17,
  pong: 18,
  bye: 19,
  // Channels of a session.
  open: 32,
  opened: 33,
  rejected: 34,
  message: 35,
  credit: 36,
  settle: 37,
  close: 38,
} as const
export type Kind = (typeof KIND)[keyof typeof KIND]

/** Flags of messages. All other kinds have none. */
export const FLAG = {
  request: 1, // a reply with the same id is wanted
  reply: 2,
  failed: 4, // a reply that is an error
} as const
const FLAGS_MAX = 7

export interface Frame {
  readonly kind: Kind
  readonly flags: number
  readonly channel: number
  readonly acknowledged: number
  readonly type: number
  readonly id: number
  readonly payload: Buffer
  /** Nobody looks at the payload any more: its memory may have the next one. Where it is there, calling it is not a must. */
  readonly release?: () => void
}

/** The longest payload of each kind, in bytes; a kind that is not listed has no place in this phase. */
export type Phase = ReadonlyMap<number, number>

const refusal: readonly [number, number][] = [
  [KIND.refuse, LIMITS.linkHandshakePayloadMax],
  [KIND.bye, LIMITS.linkHandshakePayloadMax],
]
/** Until the peer has proved who it is. */
export const HANDSHAKE_PHASE: Phase = new Map([
  ...refusal,
  [KIND.hello, LIMITS.linkHandshakePayloadMax],
  [KIND.welcome, LIMITS.linkHandshakePayloadMax],
  [KIND.proof, LIMITS.linkHandshakePayloadMax],
  [KIND.accept, LIMITS.linkHandshakePayloadMax],
])
export const SESSION_PHASE: Phase = new Map([
  ...refusal,
  [KIND.ready, 0],
  [KIND.acknowledge, 0],
  [KIND.ping, 8],
  [KIND.pong, 8],
  [KIND.open, LIMITS.linkControlPayloadMax],
  [KIND.opened, LIMITS.linkControlPayloadMax],
  [KIND.rejected, LIMITS.linkControlPayloadMax],
  [KIND.message, LIMITS.linkPayloadMax],
  [KIND.credit, 0],
  [KIND.settle, 0],
  [KIND.close, LIMITS.linkControlPayloadMax],
])

/** Writes a header at `at`. The checksum of the payload is the caller's: it knows the payload's parts. */
export function writeHeader(
  target: Buffer,
  at: number,
  frame: Omit<Frame, 'payload'>,
  sequence: number,
  payloadLength: number,
  payloadChecksum: number,
): void {
  target.writeUInt32LE(MAGIC, at)
  target.writeUInt32LE(FRAMING_VERSION | (frame.kind << 8) | (frame.flags << 16), at + 4)
  target.writeUInt32LE(frame.channel, at + 8)
  target.writeUInt32LE(sequence, at + 12)
  target.writeUInt32LE(frame.acknowledged, at + 16)
  target.writeUInt32LE(frame.type, at + 20)
  target.writeUInt32LE(frame.id, at + 24)
  target.writeUInt32LE(payloadLength, at + 28)
  target.writeUInt32LE(payloadChecksum, at + 32)
  target.writeUInt32LE(crc32c(target.subarray(at, at + FRAME_HEADER_SIZE - 4)), at + FRAME_HEADER_SIZE - 4)
}

/** One frame as bytes of its own; what sends many frames writes headers where they go instead. */
export function encodeFrame(frame: Frame, sequence: number): Buffer {
  const { payload } = frame
  const bytes = Buffer.allocUnsafe(FRAME_HEADER_SIZE + payload.length)
  writeHeader(bytes, 0, frame, sequence, payload.length, crc32c(payload))
  payload.copy(bytes, FRAME_HEADER_SIZE)
  return bytes
}

const EMPTY = Buffer.alloc(0)
const INBOX_BYTES = 64 * 1024

interface Header extends Omit<Frame, 'payload' | 'release'> {
  readonly length: number
  readonly checksum: number
}

/**
 * Chunks of a stream in, frames out. `push` a chunk, then call `next` until there is none left in it. Or let the stream fill `room`, and
 * say with `took` how much came, instead of `push`.
 */
export class FrameReader {
  #phase: Phase
  #sequence = 0
  #chunks: Buffer[] = []
  #at = 0 // in the first chunk
  #error: LinkError | undefined

  readonly #scratch = Buffer.alloc(FRAME_HEADER_SIZE) // a header that came in pieces
  #scratchLength = 0
  #header: Header | undefined // of the frame whose payload is arriving
  #payload: Buffer = EMPTY
  #filled = 0
  #checksum = 0
  readonly #payloads = new Payloads()
  #inbox: Buffer = EMPTY // where the stream puts what is no rest of a payload
  #room: Buffer = EMPTY // where the stream puts what comes next

  constructor(phase: Phase = HANDSHAKE_PHASE) {
    this.#phase = phase
  }

  /** Counts from the next frame on. */
  enter(phase: Phase): void {
    this.#phase = phase
  }

  push(chunk: Buffer): void {
    if (chunk.length > 0 && this.#error === undefined) this.#chunks.push(chunk)
  }

  /** Where the stream may put what comes next, until it says `took`. Never empty. */
  room(): Buffer {
    if (this.#header !== undefined && this.#chunks.length === 0 && this.#filled < this.#header.length) {
      this.#room = this.#payload.subarray(this.#filled)
      return this.#room
    }
    // What waits there is read later.
    if (this.#inbox.length === 0 || this.#chunks.length > 0) this.#inbox = Buffer.allocUnsafeSlow(INBOX_BYTES)
    this.#room = this.#inbox
    return this.#room
  }

  /** `length` bytes have come, to the beginning of `room`: the last one that was given, or any other memory that stays as it is. */
  took(room: Uint8Array, length: number): void {
    if (this.#error !== undefined) return
    const arrived = Buffer.from(room.buffer, room.byteOffset, length)
    if (room !== this.#room || room === this.#inbox) {
      this.push(arrived)
      return
    }
    this.#checksum = crc32c(arrived, this.#checksum)
    this.#filled += length
  }

  /** Memory that was kept for payloads to come is given up. */
  trim(): void {
    this.#payloads.trim()
  }

  /**
   * @returns the next whole frame; undefined where more of the stream is needed
   * @throws LinkError of the fate "damage", now and at every further call
   */
  next(): Frame | undefined {
    if (this.#error !== undefined) throw this.#error
    try {
      return this.#next()
    } catch (error) {
      if (error instanceof LinkError) {
        this.#error = error
        this.#chunks = []
        this.#payload = EMPTY
      }
      throw error
    }
  }

  /** The stream has ended, and `next` has nothing more. @throws LinkError TRUNCATED where that was inside a frame */
  end(): void {
    if (this.#error !== undefined) throw this.#error
    if (this.#scratchLength > 0 || this.#header !== undefined || this.#chunks.length > 0) {
      this.#error = new LinkError('TRUNCATED', 'the connection ended inside a frame')
      throw this.#error
    }
  }

  #next(): Frame | undefined {
    if (this.#header !== undefined && this.#filled === this.#header.length) return this.#whole(this.#header)
    for (let chunk = this.#chunks[0]; chunk !== undefined; chunk = this.#chunks[0]) {
      const frame =
        this.#header === undefined ? this.#takeHeader(chunk) : this.#takePayload(chunk, this.#header)
      if (this.#at === chunk.length) {
        this.#chunks.shift()
        this.#at = 0
      }
      if (frame !== undefined) return frame
    }
    return undefined
  }

  #takeHeader(chunk: Buffer): Frame | undefined {
    let header: Header
    if (this.#scratchLength === 0 && chunk.length - this.#at >= FRAME_HEADER_SIZE) {
      header = this.#decode(chunk, this.#at)
      this.#at += FRAME_HEADER_SIZE
    } else {
      const end = Math.min(chunk.length, this.#at + FRAME_HEADER_SIZE - this.#scratchLength)
      chunk.copy(this.#scratch, this.#scratchLength, this.#at, end)
      this.#scratchLength += end - this.#at
      this.#at = end
      // Another protocol is told at its first bytes: its speaker may wait for our answer and send no more.
      if (this.#scratchLength >= 4) this.#checkMagic(this.#scratch, 0)
      if (this.#scratchLength < FRAME_HEADER_SIZE) return undefined
      header = this.#decode(this.#scratch, 0)
      this.#scratchLength = 0
    }
    this.#sequence = (this.#sequence + 1) >>> 0
    if (header.length === 0) return this.#finish(header, EMPTY, 0)
    const rest = chunk.length - this.#at
    if (rest >= header.length) {
      const view = chunk.subarray(this.#at, this.#at + header.length)
      this.#at += header.length
      // A small view would keep a large chunk in memory for as long as somebody keeps the payload. The inbox is used again.
      const keeps = header.length * 2 >= chunk.buffer.byteLength && chunk.buffer !== this.#inbox.buffer
      const payload = keeps ? view : Buffer.from(view)
      return this.#finish(header, payload, crc32c(payload))
    }
    this.#header = header
    this.#payload = this.#payloads.take(header.length)
    this.#filled = 0
    this.#checksum = 0
    return undefined
  }

  #takePayload(chunk: Buffer, header: Header): Frame | undefined {
    const end = Math.min(chunk.length, this.#at + header.length - this.#filled)
    // Summed piece by piece, while a piece is still in the processor's cache.
    this.#checksum = crc32c(chunk.subarray(this.#at, end), this.#checksum)
    this.#filled += chunk.copy(this.#payload, this.#filled, this.#at, end)
    this.#at = end
    return this.#filled < header.length ? undefined : this.#whole(header)
  }

  /** All of a payload has come, in pieces. */
  #whole(header: Header): Frame {
    const payload = this.#payload
    this.#header = undefined
    this.#payload = EMPTY
    const frame = this.#finish(header, payload, this.#checksum)
    const release = this.#payloads.releaseOf(payload)
    return release === undefined ? frame : { ...frame, release }
  }

  #finish(header: Header, payload: Buffer, checksum: number): Frame {
    if (header.checksum !== checksum) {
      throw new LinkError('BAD_PAYLOAD', `the payload of a frame (${header.length} bytes) fails its checksum`)
    }
    const { kind, flags, channel, acknowledged, type, id } = header
    return { kind, flags, channel, acknowledged, type, id, payload }
  }

  #checkMagic(bytes: Buffer, at: number): void {
    const magic = bytes.readUInt32LE(at)
    if (magic === MAGIC) return
    // The first bytes may be a TLS record: type 20 to 23, then version 3.x.
    const first = magic & 0xff
    if (this.#sequence === 0 && first >= 20 && first <= 23 && ((magic >>> 8) & 0xff) === 3) {
      const advice = 'configure TLS on both sides or on none'
      throw new LinkError('TLS', `the peer speaks TLS and this side does not: ${advice}`)
    }
    throw new LinkError('BAD_MAGIC', 'what came is not a frame of the link')
  }

  /** Layout, then every rule of the format, in one place. */
  #decode(bytes: Buffer, at: number): Header {
    this.#checkMagic(bytes, at)
    const framing = bytes.readUInt8(at + 4)
    if (framing !== FRAMING_VERSION) {
      throw new LinkError(
        'BAD_FRAMING',
        `the peer speaks framing version ${framing}, this side version ${FRAMING_VERSION}: upgrade the older side`,
      )
    }
    const expected = bytes.readUInt32LE(at + FRAME_HEADER_SIZE - 4)
    if (crc32c(bytes.subarray(at, at + FRAME_HEADER_SIZE - 4)) !== expected) {
      throw new LinkError('BAD_HEADER', 'the header of a frame fails its checksum')
    }
    const kind = bytes.readUInt8(at + 5)
    const flags = bytes.readUInt16LE(at + 6)
    const sequence = bytes.readUInt32LE(at + 12)
    const length = bytes.readUInt32LE(at + 28)
    if (sequence !== this.#sequence) {
      throw new LinkError('BAD_SEQUENCE', `frame ${sequence} came where ${this.#sequence} was due`)
    }
    const lengthMax = this.#phase.get(kind)
    if (lengthMax === undefined) throw new LinkError('BAD_FRAME', `a frame of kind ${kind} has no place here`)
    if (length > lengthMax) {
      throw new LinkError(
        'TOO_LONG',
        `${length} bytes in a frame of kind ${kind}; ${lengthMax} are allowed here`,
      )
    }
    if (flags > FLAGS_MAX || (flags !== 0 && kind !== KIND.message) || bytes.readUInt16LE(at + 22) !== 0) {
      throw new LinkError('BAD_FRAME', `flags ${flags} in a frame of kind ${kind}`)
    }
    return {
      kind: kind as Kind, // the phase lists kinds only
      flags,
      channel: bytes.readUInt32LE(at + 8),
      acknowledged: bytes.readUInt32LE(at + 16),
      type: bytes.readUInt16LE(at + 20),
      id: bytes.readUInt32LE(at + 24),
      length,
      checksum: bytes.readUInt32LE(at + 32),
    }
  }
}

/** The bytes that a payload of one or more parts has. */
export function lengthOf(parts: readonly Uint8Array[]): number {
  let length = 0
  for (const part of parts) length += part.length
  assert(length <= LIMITS.linkPayloadMax, 'a payload fits into a frame')
  return length
}
