import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { CHUNK, COMMAND, COMMAND_FLAG, HEADER, MAGIC, REPLY_FLAG, type ReplyMode } from './constants.ts'
import { NBD_ERRNO } from './errno.ts'

/**
 * The server's half of the transmission phase: requests in, replies out, no sockets. A request passes three
 * functions: `decodeRequest` knows the layout, `validateRequest` knows every rule of the protocol, and the
 * datapath executes what is left. The client's half is in replies.ts.
 *
 *   compact request            extended request            Both share the first 24 bytes; the cookie
 *    0  u32 magic               0  u32 magic               is kept as two numbers and echoed untouched,
 *    4  u16 command flags       4  u16 command flags       so the hot path never makes a bigint.
 *    6  u16 command             6  u16 command
 *    8  u64 cookie              8  u64 cookie
 *   16  u64 offset             16  u64 offset
 *   24  u32 length             24  u64 length
 *
 * Encoders write into the caller's buffer at a position and return the position after what they wrote. They
 * allocate nothing. The caller makes room first: the sizes are exported beside them.
 */

export interface Request {
  readonly flags: number
  readonly command: number
  readonly cookieHigh: number // the 8 bytes of the cookie, as two unsigned words
  readonly cookieLow: number
  readonly offsetHigh: number // the offset as received: extended replies repeat it, however wrong
  readonly offsetLow: number
  /** Bytes. Exact up to 2^53; above, rounded, and then past the end of every volume, which validation refuses. */
  readonly offset: number
  /** Bytes: of the payload if there is one, else of the range that the command is about. Rounded above 2^53. */
  readonly length: number
  /** Bytes that follow the header on the wire, whether or not the request turns out to be valid. */
  readonly payloadLength: number
}

/** The size of a request header in bytes. */
export function requestHeaderSize(extended: boolean): number {
  return extended ? HEADER.extendedRequest : HEADER.request
}

/**
 * Reads one request header (specification, "Request message").
 * @param header at least `requestHeaderSize(extended)` bytes from `at` on
 * @throws ProtocolError when the magic is wrong: the stream is out of step and cannot be followed any further
 */
export function decodeRequest(header: Buffer, extended: boolean, at = 0): Request {
  assert(header.length - at >= requestHeaderSize(extended), 'request header')
  const magic = header.readUInt32BE(at)
  if (magic !== (extended ? MAGIC.extendedRequest : MAGIC.request)) {
    throw new ProtocolError(`request magic is 0x${magic.toString(16)}`)
  }
  const flags = header.readUInt16BE(at + 4)
  const command = header.readUInt16BE(at + 6)
  const offsetHigh = header.readUInt32BE(at + 16)
  const offsetLow = header.readUInt32BE(at + 20)
  let length = header.readUInt32BE(at + 24)
  if (extended) length = length * 2 ** 32 + header.readUInt32BE(at + 28)
  const carriesPayload = extended ? (flags & COMMAND_FLAG.PAYLOAD_LEN) !== 0 : command === COMMAND.WRITE
  return {
    flags,
    command,
    cookieHigh: header.readUInt32BE(at + 8),
    cookieLow: header.readUInt32BE(at + 12),
    offsetHigh,
    offsetLow,
    offset: offsetHigh * 2 ** 32 + offsetLow,
    length,
    payloadLength: carriesPayload ? length : 0,
  }
}

/** What a session may do. Constant over its life, except for `size` (resize). */
export interface SessionRules {
  readonly size: number // bytes; at most 2^53 - 1
  readonly readOnly: boolean
  readonly mode: ReplyMode
  readonly contexts: readonly number[] // wire ids of the negotiated metadata contexts
  readonly payloadMax: number // bytes, as advertised
}

/** Returned by `validateRequest` where no answer helps: end the connection. */
export const HANG_UP = -1

/**
 * Every rule of the specification about one request. The order is: can the stream go on, is the command known,
 * are its flags allowed, may this client write, is the range inside the volume, is it too large at once.
 * A refused request still has `payloadLength` bytes to skip before it is answered.
 *
 * @returns 0, an error value for the reply, or HANG_UP
 */
export function validateRequest(request: Request, session: SessionRules): number {
  const { command, flags } = request
  const extended = session.mode === 'extended'

  // "Extended requests": too long a payload SHOULD end the connection. Compact requests have no such rule; there
  // it is skipped up to a point where skipping would only serve somebody who wants to waste our time.
  if (request.payloadLength > (extended ? session.payloadMax : 2 * session.payloadMax)) return HANG_UP
  // Nobody waits for an answer to a disconnect, so nothing about it can be wrong.
  if (command === COMMAND.DISC) return 0

  const allowed = allowedFlags(command, session)
  if (allowed === undefined) return NBD_ERRNO.EINVAL
  if ((flags & ~allowed) !== 0) return NBD_ERRNO.EINVAL
  const writes = command === COMMAND.WRITE || command === COMMAND.WRITE_ZEROES || command === COMMAND.TRIM
  if (writes && session.readOnly) return NBD_ERRNO.EPERM

  if (command === COMMAND.FLUSH) {
    return request.offset === 0 && request.length === 0 ? 0 : NBD_ERRNO.EINVAL // "reserved, MUST be zero"
  }
  if (command === COMMAND.WRITE && extended && (flags & COMMAND_FLAG.PAYLOAD_LEN) === 0)
    return NBD_ERRNO.EINVAL
  if (command === COMMAND.BLOCK_STATUS) {
    if (session.contexts.length === 0) return NBD_ERRNO.EINVAL
    if ((flags & COMMAND_FLAG.PAYLOAD_LEN) !== 0) return validateStatusPayloadLength(request, session)
  }
  // The specification leaves a length of 0 open; it says only not to disconnect.
  if (request.length === 0) return NBD_ERRNO.EINVAL
  const outside = request.offset > session.size || request.length > session.size - request.offset
  if (outside) {
    return command === COMMAND.WRITE || command === COMMAND.WRITE_ZEROES ? NBD_ERRNO.ENOSPC : NBD_ERRNO.EINVAL
  }
  if (request.length > session.payloadMax) {
    if (command === COMMAND.WRITE) return NBD_ERRNO.EINVAL
    // EOVERFLOW belongs to structured replies, where DF exists ("Error values").
    if (command === COMMAND.READ) return session.mode === 'simple' ? NBD_ERRNO.EINVAL : NBD_ERRNO.EOVERFLOW
  }
  return 0
}

/** The flags a command may carry in this session; undefined for a command that does not exist. */
function allowedFlags(command: number, session: SessionRules): number | undefined {
  // "valid for all commands, ... the server MUST accept all commands with this bit set"
  const fua = COMMAND_FLAG.FUA
  const payload = session.mode === 'extended' ? COMMAND_FLAG.PAYLOAD_LEN : 0
  switch (command) {
    case COMMAND.READ:
      return session.mode === 'simple' ? fua : fua | COMMAND_FLAG.DF
    case COMMAND.WRITE:
      return fua | payload
    case COMMAND.FLUSH:
    case COMMAND.TRIM:
    case COMMAND.CACHE:
      return fua
    case COMMAND.WRITE_ZEROES:
      return fua | COMMAND_FLAG.NO_HOLE | COMMAND_FLAG.FAST_ZERO
    case COMMAND.BLOCK_STATUS:
      return fua | COMMAND_FLAG.REQ_ONE | payload
    default:
      return undefined
  }
}

// ---------------------------------------------------------------------------- block status with a payload

/** The payload of BLOCK_STATUS (extended headers): which range, and only these contexts. */
export interface StatusFilter {
  readonly length: number // bytes, the effect length
  readonly contexts: readonly number[] // wire ids
}

const STATUS_FILTER_FIXED = 8

/** A filter names 1 to all of the negotiated contexts, so its size is bounded before a byte of it is read. */
function validateStatusPayloadLength(request: Request, session: SessionRules): number {
  const idBytes = request.payloadLength - STATUS_FILTER_FIXED
  if (idBytes < 4 || idBytes % 4 !== 0 || idBytes / 4 > session.contexts.length) return NBD_ERRNO.EINVAL
  return request.offset > session.size ? NBD_ERRNO.EINVAL : 0
}

/** @param payload the whole payload of a BLOCK_STATUS request that `validateRequest` accepted */
export function decodeStatusFilter(payload: Buffer): StatusFilter {
  assert(payload.length > STATUS_FILTER_FIXED && payload.length % 4 === 0, 'status filter')
  const contexts: number[] = []
  for (let at = STATUS_FILTER_FIXED; at < payload.length; at += 4) contexts.push(payload.readUInt32BE(at))
  return { length: payload.readUInt32BE(0) * 2 ** 32 + payload.readUInt32BE(4), contexts }
}

/** The rules that need the payload: known ids, each once, a range inside the volume. Returns 0 or an error value. */
export function validateStatusFilter(filter: StatusFilter, request: Request, session: SessionRules): number {
  if (new Set(filter.contexts).size !== filter.contexts.length) return NBD_ERRNO.EINVAL
  if (filter.contexts.some((id) => !session.contexts.includes(id))) return NBD_ERRNO.EINVAL
  if (filter.length === 0 || filter.length > session.size - request.offset) return NBD_ERRNO.EINVAL
  return 0
}

// ---------------------------------------------------------------------------------------------- replies

/** The part of a request that its replies repeat. */
export type ReplyTo = Pick<Request, 'cookieHigh' | 'cookieLow' | 'offsetHigh' | 'offsetLow'>

/** Size in bytes of a chunk's header; `extended` is the mode, the alternative is structured. */
export function chunkHeaderSize(extended: boolean): number {
  return extended ? HEADER.extendedReply : HEADER.structuredReply
}

/** Size of everything before the data in an OFFSET_DATA chunk. */
export function dataChunkPrefixSize(extended: boolean): number {
  return chunkHeaderSize(extended) + 8
}

/** Size of an OFFSET_HOLE chunk. */
export function holeChunkSize(extended: boolean): number {
  return chunkHeaderSize(extended) + 12
}

/** Size of an ERROR chunk with a message of that many bytes. */
export function errorChunkSize(extended: boolean, messageLength = 0): number {
  return chunkHeaderSize(extended) + 6 + messageLength
}

/** Size of an ERROR_OFFSET chunk with a message of that many bytes. */
export function errorOffsetChunkSize(extended: boolean, messageLength = 0): number {
  return chunkHeaderSize(extended) + 14 + messageLength
}

/** Size of a block-status chunk with that many extents. */
export function statusChunkSize(extended: boolean, extentCount: number): number {
  return chunkHeaderSize(extended) + (extended ? 8 + 16 * extentCount : 4 + 8 * extentCount)
}

/** 16 bytes; in answer to a read with errno 0 the data follows. */
export function writeSimpleReply(target: Buffer, at: number, to: ReplyTo, errno: number): number {
  target.writeUInt32BE(MAGIC.simpleReply, at)
  target.writeUInt32BE(errno, at + 4)
  target.writeUInt32BE(to.cookieHigh, at + 8)
  target.writeUInt32BE(to.cookieLow, at + 12)
  return at + HEADER.simpleReply
}

/** The header of a chunk in either framing: 20 bytes structured, 32 extended. */
export function writeChunkHeader(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  done: boolean,
  type: number,
  payloadLength: number,
): number {
  target.writeUInt32BE(extended ? MAGIC.extendedReply : MAGIC.structuredReply, at)
  target.writeUInt16BE(done ? REPLY_FLAG.DONE : 0, at + 4)
  target.writeUInt16BE(type, at + 6)
  target.writeUInt32BE(to.cookieHigh, at + 8)
  target.writeUInt32BE(to.cookieLow, at + 12)
  if (!extended) {
    target.writeUInt32BE(payloadLength, at + 16)
    return at + HEADER.structuredReply
  }
  target.writeUInt32BE(to.offsetHigh, at + 16) // "MUST match the request", whatever the payload says
  target.writeUInt32BE(to.offsetLow, at + 20)
  return writeUInt64(target, at + 24, payloadLength)
}

/** The last word to a request that succeeded with nothing (more) to say. */
export function writeNoneChunk(target: Buffer, at: number, to: ReplyTo, extended: boolean): number {
  return writeChunkHeader(target, at, to, extended, true, CHUNK.NONE, 0)
}

/** What precedes `dataLength` bytes of data that lie at `offset` of the export. */
export function writeDataChunkPrefix(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  done: boolean,
  offset: number,
  dataLength: number,
): number {
  assert(dataLength > 0, 'data chunk length')
  const payloadAt = writeChunkHeader(target, at, to, extended, done, CHUNK.OFFSET_DATA, 8 + dataLength)
  return writeUInt64(target, payloadAt, offset)
}

/** `length` bytes at `offset` of the export read as zeros. */
export function writeHoleChunk(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  done: boolean,
  offset: number,
  length: number,
): number {
  assert(length > 0, 'hole length')
  const payloadAt = writeChunkHeader(target, at, to, extended, done, CHUNK.OFFSET_HOLE, 12)
  target.writeUInt32BE(length, writeUInt64(target, payloadAt, offset))
  return payloadAt + 12
}

/** A failure of the whole request; the final chunk. `message` is UTF-8 for people. */
export function writeErrorChunk(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  errno: number,
  message?: Buffer,
): number {
  assert(errno > 0, 'error chunk without an error')
  const length = message?.length ?? 0
  assert(length <= LIMITS.nbdStringMax, 'error message length')
  const payloadAt = writeChunkHeader(target, at, to, extended, true, CHUNK.ERROR, 6 + length)
  target.writeUInt32BE(errno, payloadAt)
  target.writeUInt16BE(length, payloadAt + 4)
  message?.copy(target, payloadAt + 6)
  return payloadAt + 6 + length
}

/** A failure at `offset` of the export; what was sent before and does not overlap is still good. */
export function writeErrorOffsetChunk(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  done: boolean,
  errno: number,
  offset: number,
  message?: Buffer,
): number {
  assert(errno > 0, 'error chunk without an error')
  const length = message?.length ?? 0
  assert(length <= LIMITS.nbdStringMax, 'error message length')
  const payloadAt = writeChunkHeader(target, at, to, extended, done, CHUNK.ERROR_OFFSET, 14 + length)
  target.writeUInt32BE(errno, payloadAt)
  target.writeUInt16BE(length, payloadAt + 4)
  message?.copy(target, payloadAt + 6)
  return writeUInt64(target, payloadAt + 6 + length, offset)
}

/**
 * Answers a request that has no data, in the framing of the session: success or failure.
 * At most `chunkHeaderSize(true) + 6` bytes.
 */
export function writePlainReply(
  target: Buffer,
  at: number,
  to: ReplyTo,
  mode: ReplyMode,
  errno: number,
): number {
  if (mode === 'simple') return writeSimpleReply(target, at, to, errno)
  if (errno === 0) return writeNoneChunk(target, at, to, mode === 'extended')
  return writeErrorChunk(target, at, to, mode === 'extended', errno)
}

/** One run of bytes with the same status, in order from the request's offset on. */
export interface Extent {
  readonly length: number // bytes, > 0
  readonly flags: number // as the metadata context defines them
}

/** The longest extent that fits a 32-bit descriptor and still ends on a page. */
const COMPACT_EXTENT_MAX = 2 ** 32 - 4096

/**
 * Cuts a list of extents to what one reply may say (specification, BLOCK_STATUS): all but the last lie below the
 * requested length; with REQ_ONE there is one, within it; compact descriptors have 32-bit lengths; the count is bounded.
 * @param length the effect length of the request, bytes
 */
export function clipExtents(
  extents: readonly Extent[],
  length: number,
  requestOne: boolean,
  extended: boolean,
): Extent[] {
  assert(extents.length > 0 && length > 0, 'block status without extents')
  const clipped: Extent[] = []
  let covered = 0
  for (const extent of extents) {
    assert(extent.length > 0, 'empty extent')
    let extentLength = requestOne ? Math.min(extent.length, length) : extent.length
    const tooLong = !extended && extentLength > COMPACT_EXTENT_MAX
    if (tooLong) extentLength = COMPACT_EXTENT_MAX
    clipped.push({ length: extentLength, flags: extent.flags })
    covered += extentLength
    if (tooLong || requestOne || covered >= length || clipped.length === LIMITS.blockStatusExtentsMax) break
  }
  return clipped
}

/** One context's extents, already clipped: a BLOCK_STATUS chunk, or BLOCK_STATUS_EXT with extended headers. */
export function writeStatusChunk(
  target: Buffer,
  at: number,
  to: ReplyTo,
  extended: boolean,
  done: boolean,
  context: number,
  extents: readonly Extent[],
): number {
  assert(extents.length > 0, 'block status without extents')
  const payloadLength = statusChunkSize(extended, extents.length) - chunkHeaderSize(extended)
  const type = extended ? CHUNK.BLOCK_STATUS_EXT : CHUNK.BLOCK_STATUS
  let position = writeChunkHeader(target, at, to, extended, done, type, payloadLength)
  position = target.writeUInt32BE(context, position)
  if (extended) position = target.writeUInt32BE(extents.length, position)
  for (const extent of extents) {
    if (extended) {
      position = writeUInt64(target, position, extent.length)
      position = writeUInt64(target, position, extent.flags)
    } else {
      position = target.writeUInt32BE(extent.length, position)
      position = target.writeUInt32BE(extent.flags, position)
    }
  }
  return position
}

/** Writes a whole number below 2^53 as 64 bits. Returns the position after it. */
export function writeUInt64(target: Buffer, at: number, value: number): number {
  target.writeUInt32BE(Math.floor(value / 2 ** 32), at)
  return target.writeUInt32BE(value % 2 ** 32, at + 4)
}

/** Reads 64 bits; exact up to 2^53, above that rounded. */
export function readUInt64(source: Buffer, at: number): number {
  return source.readUInt32BE(at) * 2 ** 32 + source.readUInt32BE(at + 4)
}
