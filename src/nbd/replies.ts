import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { CHUNK, COMMAND, COMMAND_FLAG, HEADER, MAGIC, REPLY_FLAG, type ReplyMode } from './constants.ts'
import { type Extent, readUInt64, requestHeaderSize, writeUInt64 } from './transmission.ts'

/**
 * The client's half of the transmission phase, the mirror image of transmission.ts: requests out, replies in, no
 * sockets. What a server sends is checked here for its layout; whether it fits the request that it answers (range,
 * overlap, order) is for the client to know.
 *
 *   simple reply          structured chunk       extended chunk
 *    0  u32 magic          0  u32 magic           0  u32 magic
 *    4  u32 error          4  u16 flags           4  u16 flags
 *    8  u64 cookie         6  u16 type            6  u16 type
 *   (data of a read)       8  u64 cookie          8  u64 cookie
 *                         16  u32 length         16  u64 offset of the request
 *                         20  payload            24  u64 length
 *                                                32  payload
 */

export interface OutgoingRequest {
  readonly flags: number
  readonly command: number
  readonly cookie: number // a whole number below 2^53
  readonly offset: number // bytes
  readonly length: number // bytes; of the payload where one follows, else of the range
}

/** Writes a request header; returns the position after it. */
export function writeRequest(
  target: Buffer,
  at: number,
  request: OutgoingRequest,
  extended: boolean,
): number {
  target.writeUInt32BE(extended ? MAGIC.extendedRequest : MAGIC.request, at)
  target.writeUInt16BE(request.flags, at + 4)
  target.writeUInt16BE(request.command, at + 6)
  writeUInt64(target, at + 8, request.cookie)
  writeUInt64(target, at + 16, request.offset)
  if (extended) return writeUInt64(target, at + 24, request.length)
  assert(request.length < 2 ** 32, 'compact request length')
  return target.writeUInt32BE(request.length, at + 24)
}

/** A block-status request with a filter: the header and its payload in one buffer. Extended headers only. */
export function encodeFilteredStatusRequest(request: OutgoingRequest, contexts: readonly number[]): Buffer {
  const payloadLength = 8 + 4 * contexts.length
  const flags = request.flags | COMMAND_FLAG.PAYLOAD_LEN
  const bytes = Buffer.alloc(requestHeaderSize(true) + payloadLength)
  let at = writeRequest(
    bytes,
    0,
    { ...request, command: COMMAND.BLOCK_STATUS, flags, length: payloadLength },
    true,
  )
  at = writeUInt64(bytes, at, request.length)
  for (const id of contexts) at = bytes.writeUInt32BE(id, at)
  return bytes
}

export interface SimpleReply {
  readonly kind: 'simple'
  readonly cookie: number
  readonly errno: number
}

export interface ReplyChunk {
  readonly kind: 'chunk'
  readonly cookie: number
  readonly type: number
  readonly done: boolean
  readonly payloadLength: number // bytes that follow the header
}

/**
 * How long the header at `at` is; undefined when fewer than the 4 bytes of its magic are there.
 * @throws ProtocolError for a magic that this mode does not have
 */
export function replyHeaderSize(source: Buffer, at: number, mode: ReplyMode): number | undefined {
  if (source.length - at < 4) return undefined
  const magic = source.readUInt32BE(at)
  if (mode === 'extended') {
    if (magic === MAGIC.extendedReply) return HEADER.extendedReply
  } else if (magic === MAGIC.simpleReply) {
    return HEADER.simpleReply
  } else if (magic === MAGIC.structuredReply && mode === 'structured') {
    return HEADER.structuredReply
  }
  throw new ProtocolError(`reply magic is 0x${magic.toString(16)} in ${mode} mode`)
}

/** Reads a whole header; the caller has asked `replyHeaderSize`, which has checked the magic. */
export function decodeReply(source: Buffer, at: number): SimpleReply | ReplyChunk {
  const magic = source.readUInt32BE(at)
  const cookie = readUInt64(source, at + 8)
  if (magic === MAGIC.simpleReply) return { kind: 'simple', cookie, errno: source.readUInt32BE(at + 4) }
  const extended = magic === MAGIC.extendedReply
  return {
    kind: 'chunk',
    cookie,
    type: source.readUInt16BE(at + 6),
    done: (source.readUInt16BE(at + 4) & REPLY_FLAG.DONE) !== 0,
    payloadLength: extended ? readUInt64(source, at + 24) : source.readUInt32BE(at + 16),
  }
}

export interface DecodedError {
  readonly errno: number
  readonly message: string // empty where the server sent none
  readonly offset?: number // ERROR_OFFSET: where in the export
}

/** The payload of an error chunk. @throws ProtocolError when its message does not fit its length */
export function decodeErrorPayload(type: number, payload: Buffer): DecodedError {
  const fixed = type === CHUNK.ERROR_OFFSET ? 14 : 6
  if (payload.length < fixed) throw new ProtocolError(`error chunk of ${payload.length} bytes`)
  const errno = payload.readUInt32BE(0)
  const messageLength = payload.readUInt16BE(4)
  if (messageLength > payload.length - fixed) throw new ProtocolError('error message longer than its chunk')
  if (messageLength > LIMITS.nbdStringMax) throw new ProtocolError(`error message of ${messageLength} bytes`)
  const message = payload.toString('utf8', 6, 6 + messageLength)
  if (type !== CHUNK.ERROR_OFFSET) return { errno, message }
  return { errno, message, offset: readUInt64(payload, 6 + messageLength) }
}

/** The payload of an OFFSET_HOLE chunk. @throws ProtocolError */
export function decodeHolePayload(payload: Buffer): { offset: number; length: number } {
  if (payload.length !== 12) throw new ProtocolError(`hole chunk of ${payload.length} bytes`)
  const length = payload.readUInt32BE(8)
  if (length === 0) throw new ProtocolError('hole of no bytes')
  return { offset: readUInt64(payload, 0), length }
}

export interface ContextExtents {
  readonly context: number // wire id
  readonly extents: Extent[]
}

/** The payload of a BLOCK_STATUS or BLOCK_STATUS_EXT chunk. @throws ProtocolError */
export function decodeStatusPayload(type: number, payload: Buffer): ContextExtents {
  const extended = type === CHUNK.BLOCK_STATUS_EXT
  const fixed = extended ? 8 : 4
  const each = extended ? 16 : 8
  if (payload.length < fixed + each || (payload.length - fixed) % each !== 0) {
    throw new ProtocolError(`block status of ${payload.length} bytes`)
  }
  const count = (payload.length - fixed) / each
  if (extended && payload.readUInt32BE(4) !== count)
    throw new ProtocolError('block status miscounts its extents')
  const extents: Extent[] = []
  for (let at = fixed; at < payload.length; at += each) {
    const length = extended ? readUInt64(payload, at) : payload.readUInt32BE(at)
    if (length === 0) throw new ProtocolError('block status with an empty extent')
    extents.push({ length, flags: extended ? readUInt64(payload, at + 8) : payload.readUInt32BE(at + 4) })
  }
  return { context: payload.readUInt32BE(0), extents }
}
