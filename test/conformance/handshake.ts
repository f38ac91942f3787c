/**
 * The handshake over a wire, with no opinion: options are sent as they are given, replies are cut by their lengths and
 * handed out. The numbers are the specification's and are written down here once more on purpose: sharing them with the
 * server would hide a number that is wrong there.
 */
import { must } from './check.ts'
import type { Wire } from './wire.ts'

export const OPT = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  PEEK_EXPORT: 4,
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
  EXTENDED_HEADERS: 11,
} as const

const ERROR_BIT = 0x80000000
export const REP = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: ERROR_BIT + 1,
  ERR_POLICY: ERROR_BIT + 2,
  ERR_INVALID: ERROR_BIT + 3,
  ERR_PLATFORM: ERROR_BIT + 4,
  ERR_TLS_REQD: ERROR_BIT + 5,
  ERR_UNKNOWN: ERROR_BIT + 6,
  ERR_SHUTDOWN: ERROR_BIT + 7,
  ERR_BLOCK_SIZE_REQD: ERROR_BIT + 8,
  ERR_TOO_BIG: ERROR_BIT + 9,
  ERR_EXT_HEADER_REQD: ERROR_BIT + 10,
} as const

export const INFO = { EXPORT: 0, NAME: 1, DESCRIPTION: 2, BLOCK_SIZE: 3 } as const

/** Transmission flags. */
export const CAN = {
  HAS_FLAGS: 1 << 0,
  READ_ONLY: 1 << 1,
  FLUSH: 1 << 2,
  FUA: 1 << 3,
  ROTATIONAL: 1 << 4,
  TRIM: 1 << 5,
  WRITE_ZEROES: 1 << 6,
  DF: 1 << 7,
  MULTI_CONN: 1 << 8,
  RESIZE: 1 << 9,
  CACHE: 1 << 10,
  FAST_ZERO: 1 << 11,
  BLOCK_STATUS_PAYLOAD: 1 << 12,
} as const

export const CLIENT = { FIXED_NEWSTYLE: 1, NO_ZEROES: 2 } as const
export const FIXED_NO_ZEROES = CLIENT.FIXED_NEWSTYLE | CLIENT.NO_ZEROES

const STRING_MAX = 4096
/** No reply of the handshake has a reason to be longer than a few strings. */
const REPLY_MAX = 1 << 20

export interface OptionReply {
  readonly type: number
  readonly data: Buffer
}

export const isError = (reply: OptionReply) => reply.type >= ERROR_BIT

const NAME_OF_REPLY = new Map<number, string>(Object.entries(REP).map(([name, type]) => [type, name]))
export const replyName = (type: number) => NAME_OF_REPLY.get(type) ?? `reply type ${type}`
export const namesOf = (replies: readonly OptionReply[]) =>
  replies.map(({ type }) => replyName(type)).join(', ') || 'nothing'

export function u16(...values: number[]): Buffer {
  const bytes = Buffer.alloc(2 * values.length)
  values.forEach((value, index) => {
    bytes.writeUInt16BE(value, 2 * index)
  })
  return bytes
}
export function u32(...values: number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length)
  values.forEach((value, index) => {
    bytes.writeUInt32BE(value, 4 * index)
  })
  return bytes
}
const text = (string: string) => Buffer.concat([u32(Buffer.byteLength(string)), Buffer.from(string)])

/** The data of INFO and GO. */
export const exportRequest = (name: string, infos: readonly number[] = []) =>
  Buffer.concat([text(name), u16(infos.length), u16(...infos)])

/** The data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export const contextRequest = (name: string, queries: readonly string[] = []) =>
  Buffer.concat([text(name), u32(queries.length), ...queries.map(text)])

const OPTION_MAGIC = Buffer.from('IHAVEOPT')
export const optionBytes = (option: number, data: Buffer = Buffer.alloc(0)) =>
  Buffer.concat([OPTION_MAGIC, u32(option, data.length), data])

/** Whether bytes are a string as the specification has them. */
export function isString(bytes: Buffer): boolean {
  if (bytes.length > STRING_MAX || bytes.includes(0)) return false
  try {
    new TextDecoder('utf-8', { fatal: true }).decode(bytes)
    return true
  } catch {
    return false
  }
}

export interface Greeting {
  readonly init: Buffer // 8 bytes
  readonly magic: Buffer // 8 bytes
  readonly flags: number
}

export class Handshake {
  readonly wire: Wire

  constructor(wire: Wire) {
    this.wire = wire
  }

  async greeting(): Promise<Greeting> {
    const bytes = await this.wire.read(18, 'its greeting')
    return { init: bytes.subarray(0, 8), magic: bytes.subarray(8, 16), flags: bytes.readUInt16BE(16) }
  }

  clientFlags(flags: number): void {
    this.wire.send(u32(flags))
  }

  send(option: number, data?: Buffer): void {
    this.wire.send(optionBytes(option, data))
  }

  /** One option and all replies to it, the final one last. */
  async option(option: number, data?: Buffer): Promise<OptionReply[]> {
    this.send(option, data)
    return await this.replies(option)
  }

  /** The only reply to an option; a breach where there are more. */
  async only(option: number, data?: Buffer): Promise<OptionReply> {
    const replies = await this.option(option, data)
    must(replies.length === 1, `option ${option} was answered with ${namesOf(replies)}`)
    return replies[0]!
  }

  async replies(option: number): Promise<OptionReply[]> {
    const replies: OptionReply[] = []
    for (;;) {
      const reply = await this.#reply(option)
      replies.push(reply)
      const more = reply.type === REP.SERVER || reply.type === REP.INFO || reply.type === REP.META_CONTEXT
      if (!more) return replies
      must(replies.length < 100_000, 'the replies to one option do not end')
    }
  }

  async #reply(option: number): Promise<OptionReply> {
    const header = await this.wire.read(20, `a reply to option ${option}`)
    must(header.readBigUInt64BE(0) === 0x3e889045565a9n, `a reply to option ${option} has another magic`)
    const repeated = header.readUInt32BE(8)
    must(repeated === option, `a reply to option ${option} says that it is one to ${repeated}`)
    const type = header.readUInt32BE(12)
    const length = header.readUInt32BE(16)
    must(length <= REPLY_MAX, `a reply to option ${option} has ${length} bytes`)
    const data = await this.wire.read(length, `the data of a reply to option ${option}`)
    return { type, data }
  }
}

/** What the successful replies to INFO and GO say; the layout is judged by the checks of info.ts. */
export interface ExportFacts {
  readonly size: bigint
  readonly flags: number
  readonly blockSize: BlockSize | undefined
}
export interface BlockSize {
  readonly minimum: number
  readonly preferred: number
  readonly maximum: number
}

export function infoItem(replies: readonly OptionReply[], type: number): Buffer | undefined {
  return replies.find((r) => r.type === REP.INFO && r.data.length >= 2 && r.data.readUInt16BE(0) === type)
    ?.data
}

export function readExportFacts(replies: readonly OptionReply[]): ExportFacts {
  const item = infoItem(replies, INFO.EXPORT)
  must(item !== undefined && item.length === 12, 'there is no INFO_EXPORT of 12 bytes before the ACK')
  const sizes = infoItem(replies, INFO.BLOCK_SIZE)
  const blockSize =
    sizes === undefined || sizes.length !== 14
      ? undefined
      : { minimum: sizes.readUInt32BE(2), preferred: sizes.readUInt32BE(6), maximum: sizes.readUInt32BE(10) }
  return { size: item.readBigUInt64BE(2), flags: item.readUInt16BE(10), blockSize }
}
