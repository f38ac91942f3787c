import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { HEADER, INFO, MAGIC } from './constants.ts'
import { readUInt64, writeUInt64 } from './transmission.ts'

/**
 * Layouts of the handshake phase (fixed newstyle), for both ends: encoders return the bytes of one message, decoders
 * take the data of one message and throw a ProtocolError that says what is wrong with it. A server answers such an
 * error with ERR_INVALID, a client gives up.
 *
 *   option   u64 "IHAVEOPT"  u32 option  u32 length  data
 *   reply    u64 magic       u32 option  u32 type    u32 length  data
 */

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** A string as the specification defines it ("Conventions"): UTF-8, no NUL, at most 4096 bytes. */
export function decodeString(bytes: Buffer, what: string): string {
  if (bytes.length > LIMITS.nbdStringMax)
    throw new ProtocolError(`${what} of ${bytes.length} bytes is too long`)
  if (bytes.includes(0)) throw new ProtocolError(`${what} contains NUL`)
  try {
    return utf8.decode(bytes)
  } catch (error) {
    if (!(error instanceof TypeError)) throw error
    throw new ProtocolError(`${what} is not UTF-8`, { cause: error })
  }
}

function uint16(value: number): Buffer {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(value)
  return bytes
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value)
  return bytes
}

/** A string with its length in 32 bits before it. */
function lengthAndString(text: string): Buffer {
  const bytes = Buffer.from(text)
  return Buffer.concat([uint32(bytes.length), bytes])
}

export function startsWithMagic(source: Buffer, at: number, magic: readonly [number, number]): boolean {
  return source.readUInt32BE(at) === magic[0] && source.readUInt32BE(at + 4) === magic[1]
}

function writeMagic(target: Buffer, at: number, magic: readonly [number, number]): number {
  target.writeUInt32BE(magic[0], at)
  return target.writeUInt32BE(magic[1], at + 4)
}

// --------------------------------------------------------------------------------------------- framing

/** The first 18 bytes of a connection. */
export function encodeGreeting(handshakeFlags: number): Buffer {
  const bytes = Buffer.alloc(HEADER.greeting)
  const at = writeMagic(bytes, writeMagic(bytes, 0, MAGIC.init), MAGIC.option)
  bytes.writeUInt16BE(handshakeFlags, at)
  return bytes
}

export function encodeClientFlags(flags: number): Buffer {
  return uint32(flags)
}

export function encodeOption(option: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(HEADER.option)
  writeMagic(header, 0, MAGIC.option)
  header.writeUInt32BE(option, 8)
  header.writeUInt32BE(data.length, 12)
  return Buffer.concat([header, data])
}

export function encodeOptionReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(HEADER.optionReply)
  writeMagic(header, 0, MAGIC.optionReply)
  header.writeUInt32BE(option, 8)
  header.writeUInt32BE(type, 12)
  header.writeUInt32BE(data.length, 16)
  return Buffer.concat([header, data])
}

export interface OptionReplyHeader {
  readonly option: number
  readonly type: number
  readonly length: number // bytes of data that follow
}

/** @throws ProtocolError when the magic is wrong */
export function decodeOptionReplyHeader(header: Buffer): OptionReplyHeader {
  if (!startsWithMagic(header, 0, MAGIC.optionReply)) throw new ProtocolError('option reply magic')
  return { option: header.readUInt32BE(8), type: header.readUInt32BE(12), length: header.readUInt32BE(16) }
}

/** The answer to EXPORT_NAME. */
export function encodeExportNameReply(size: number, transmissionFlags: number, noZeroes: boolean): Buffer {
  const bytes = Buffer.alloc(10 + (noZeroes ? 0 : HEADER.exportNamePadding))
  bytes.writeUInt16BE(transmissionFlags, writeUInt64(bytes, 0, size))
  return bytes
}

// ----------------------------------------------------------------------------------------- INFO and GO

export interface ExportRequest {
  readonly name: string
  readonly infos: readonly number[] // INFO types asked for
}

export function encodeExportRequest(request: ExportRequest): Buffer {
  return Buffer.concat([
    lengthAndString(request.name),
    uint16(request.infos.length),
    ...request.infos.map(uint16),
  ])
}

/** @throws ProtocolError unless the lengths in it add up exactly */
export function decodeExportRequest(data: Buffer): ExportRequest {
  if (data.length < 6) throw new ProtocolError(`request for an export of ${data.length} bytes`)
  const nameLength = data.readUInt32BE(0)
  if (nameLength > data.length - 6) throw new ProtocolError('export name longer than its option')
  const name = decodeString(data.subarray(4, 4 + nameLength), 'export name')
  const count = data.readUInt16BE(4 + nameLength)
  if (data.length !== 6 + nameLength + 2 * count)
    throw new ProtocolError('information requests do not fit the option')
  const infos: number[] = []
  for (let at = 6 + nameLength; at < data.length; at += 2) infos.push(data.readUInt16BE(at))
  return { name, infos }
}

export function encodeInfoExport(size: number, transmissionFlags: number): Buffer {
  const bytes = Buffer.alloc(12)
  bytes.writeUInt16BE(INFO.EXPORT)
  bytes.writeUInt16BE(transmissionFlags, writeUInt64(bytes, 2, size))
  return bytes
}

export function encodeInfoText(info: typeof INFO.NAME | typeof INFO.DESCRIPTION, text: string): Buffer {
  return Buffer.concat([uint16(info), Buffer.from(text)])
}

export interface BlockSizes {
  readonly minimum: number
  readonly preferred: number
  readonly maximum: number // bytes of payload in one request
}

export function encodeInfoBlockSize(sizes: BlockSizes): Buffer {
  return Buffer.concat([
    uint16(INFO.BLOCK_SIZE),
    uint32(sizes.minimum),
    uint32(sizes.preferred),
    uint32(sizes.maximum),
  ])
}

export type ExportInfo =
  | { readonly type: 'export'; readonly size: number; readonly transmissionFlags: number }
  | { readonly type: 'name' | 'description'; readonly text: string }
  | { readonly type: 'blockSize'; readonly sizes: BlockSizes }
  | { readonly type: 'unknown' }

/** The data of a REP_INFO. @throws ProtocolError when it contradicts the layout of its type */
export function decodeInfo(data: Buffer): ExportInfo {
  if (data.length < 2) throw new ProtocolError(`information of ${data.length} bytes`)
  switch (data.readUInt16BE(0)) {
    case INFO.EXPORT:
      if (data.length !== 12) throw new ProtocolError('length of INFO_EXPORT')
      return { type: 'export', size: decodeExportSize(data, 2), transmissionFlags: data.readUInt16BE(10) }
    case INFO.NAME:
      return { type: 'name', text: decodeString(data.subarray(2), 'export name') }
    case INFO.DESCRIPTION:
      return { type: 'description', text: decodeString(data.subarray(2), 'export description') }
    case INFO.BLOCK_SIZE: {
      if (data.length !== 14) throw new ProtocolError('length of INFO_BLOCK_SIZE')
      const sizes = {
        minimum: data.readUInt32BE(2),
        preferred: data.readUInt32BE(6),
        maximum: data.readUInt32BE(10),
      }
      if (!isPowerOfTwo(sizes.minimum) || !isPowerOfTwo(sizes.preferred)) {
        throw new ProtocolError('block sizes that are no powers of 2')
      }
      if (sizes.minimum > 65536 || sizes.preferred < sizes.minimum || sizes.maximum < sizes.minimum) {
        throw new ProtocolError('block sizes that contradict each other')
      }
      return { type: 'blockSize', sizes }
    }
    default:
      return { type: 'unknown' }
  }
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0
}

/** An export's size in bytes. @throws ProtocolError above 2^53, which this program cannot address */
export function decodeExportSize(source: Buffer, at: number): number {
  const size = readUInt64(source, at)
  if (!Number.isSafeInteger(size))
    throw new ProtocolError(`export size ${source.readBigUInt64BE(at)} is too large`)
  return size
}

// ------------------------------------------------------------------------------------------------ LIST

export interface ListedExport {
  readonly name: string
  readonly description: string // for people; empty where there is none
}

/** The data of a REP_SERVER. */
export function encodeListedExport(listed: ListedExport): Buffer {
  return Buffer.concat([lengthAndString(listed.name), Buffer.from(listed.description)])
}

/** @throws ProtocolError */
export function decodeListedExport(data: Buffer): ListedExport {
  if (data.length < 4) throw new ProtocolError(`listed export of ${data.length} bytes`)
  const nameLength = data.readUInt32BE(0)
  if (nameLength > data.length - 4) throw new ProtocolError('export name longer than its reply')
  return {
    name: decodeString(data.subarray(4, 4 + nameLength), 'export name'),
    description: decodeString(data.subarray(4 + nameLength), 'export description'),
  }
}

// --------------------------------------------------------------------------------------- META_CONTEXT

export interface MetaContextRequest {
  readonly name: string // of the export
  readonly queries: readonly string[]
}

/** The data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export function encodeMetaContextRequest(request: MetaContextRequest): Buffer {
  return Buffer.concat([
    lengthAndString(request.name),
    uint32(request.queries.length),
    ...request.queries.map(lengthAndString),
  ])
}

/** @throws ProtocolError for lengths that do not add up, bad strings and queries without a namespace */
export function decodeMetaContextRequest(data: Buffer): MetaContextRequest {
  let at = 0
  const word = (what: string): number => {
    if (data.length - at < 4) throw new ProtocolError(`${what} is cut short`)
    at += 4
    return data.readUInt32BE(at - 4)
  }
  const text = (what: string): string => {
    const length = word(what)
    if (length > data.length - at) throw new ProtocolError(`${what} is longer than its option`)
    at += length
    return decodeString(data.subarray(at - length, at), what)
  }
  const name = text('export name')
  const count = word('number of queries')
  // A query takes at least its length word, so a count that cannot fit is refused before anything is collected.
  if (count > (data.length - at) / 4) throw new ProtocolError('more queries than the option holds')
  const queries: string[] = []
  for (let index = 0; index < count; index++) queries.push(text('query'))
  if (at !== data.length) throw new ProtocolError('bytes after the last query')
  for (const query of queries) {
    if (query.indexOf(':') < 1) throw new ProtocolError(`query "${query.slice(0, 64)}" has no namespace`)
  }
  return { name, queries }
}

export interface MetaContext {
  readonly id: number // wire id; 0 in answers to LIST_META_CONTEXT
  readonly name: string // namespace:leaf
}

/** The data of a REP_META_CONTEXT. */
export function encodeMetaContext(context: MetaContext): Buffer {
  return Buffer.concat([uint32(context.id), Buffer.from(context.name)])
}

/** @throws ProtocolError */
export function decodeMetaContext(data: Buffer): MetaContext {
  if (data.length < 4) throw new ProtocolError(`metadata context of ${data.length} bytes`)
  return { id: data.readUInt32BE(0), name: decodeString(data.subarray(4), 'metadata context') }
}
