import { LIMITS } from '../base/limits.ts'

/**
 * The numbers of the NBD protocol, as the specification names them (doc/proto.md of the NBD project, section
 * "Values", with the text of the EXTENDED_HEADERS extension). Error values are in errno.ts. Every number is
 * big-endian on the wire; 64-bit magics are given as two halves, so nobody needs a bigint to compare them.
 */

export const MAGIC = {
  /** "NBDMAGIC": the first thing a server says. */
  init: [0x4e42444d, 0x41474943],
  /** "IHAVEOPT": the server's second word, and the start of every option. */
  option: [0x49484156, 0x454f5054],
  /** Starts every reply to an option. */
  optionReply: [0x0003e889, 0x045565a9],
  /** The second word of a server that speaks oldstyle only. */
  oldstyle: [0x00004202, 0x81861253],
  request: 0x25609513,
  extendedRequest: 0x21e41c71,
  simpleReply: 0x67446698,
  structuredReply: 0x668e33ef,
  extendedReply: 0x6e8a278c,
} as const

/** Header sizes in bytes. */
export const HEADER = {
  /** Both magics and the handshake flags. */
  greeting: 18,
  clientFlags: 4,
  option: 16,
  optionReply: 20,
  request: 28,
  extendedRequest: 32,
  simpleReply: 16,
  structuredReply: 20,
  extendedReply: 32,
  /** Zeroes after the answer to EXPORT_NAME, unless NO_ZEROES was agreed on. */
  exportNamePadding: 124,
} as const

/** 16 bits, sent by the server in its greeting. */
export const HANDSHAKE_FLAG = {
  FIXED_NEWSTYLE: 1 << 0,
  NO_ZEROES: 1 << 1,
} as const

/** 32 bits, the client's answer to the greeting. */
export const CLIENT_FLAG = {
  FIXED_NEWSTYLE: 1 << 0,
  NO_ZEROES: 1 << 1,
} as const

/** 16 bits, what the export can do. */
export const TRANSMISSION_FLAG = {
  HAS_FLAGS: 1 << 0,
  READ_ONLY: 1 << 1,
  SEND_FLUSH: 1 << 2,
  SEND_FUA: 1 << 3,
  ROTATIONAL: 1 << 4,
  SEND_TRIM: 1 << 5,
  SEND_WRITE_ZEROES: 1 << 6,
  SEND_DF: 1 << 7,
  CAN_MULTI_CONN: 1 << 8,
  SEND_RESIZE: 1 << 9,
  SEND_CACHE: 1 << 10,
  SEND_FAST_ZERO: 1 << 11,
  BLOCK_STATUS_PAYLOAD: 1 << 12,
} as const

export const OPTION = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  PEEK_EXPORT: 4, // withdrawn
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
  EXTENDED_HEADERS: 11,
} as const

const OPTION_ERROR_BIT = 2 ** 31

export const OPTION_REPLY = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: OPTION_ERROR_BIT + 1,
  ERR_POLICY: OPTION_ERROR_BIT + 2,
  ERR_INVALID: OPTION_ERROR_BIT + 3,
  ERR_PLATFORM: OPTION_ERROR_BIT + 4,
  ERR_TLS_REQD: OPTION_ERROR_BIT + 5,
  ERR_UNKNOWN: OPTION_ERROR_BIT + 6,
  ERR_SHUTDOWN: OPTION_ERROR_BIT + 7,
  ERR_BLOCK_SIZE_REQD: OPTION_ERROR_BIT + 8,
  ERR_TOO_BIG: OPTION_ERROR_BIT + 9,
  ERR_EXT_HEADER_REQD: OPTION_ERROR_BIT + 10,
} as const

/** Whether an option was refused (bit 31 of the reply type). */
export function isOptionError(replyType: number): boolean {
  return replyType >= OPTION_ERROR_BIT
}

export const INFO = {
  EXPORT: 0,
  NAME: 1,
  DESCRIPTION: 2,
  BLOCK_SIZE: 3,
} as const

export const COMMAND = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
  RESIZE: 8, // experimental, not offered
} as const

export const COMMAND_FLAG = {
  FUA: 1 << 0,
  NO_HOLE: 1 << 1,
  DF: 1 << 2,
  REQ_ONE: 1 << 3,
  FAST_ZERO: 1 << 4,
  PAYLOAD_LEN: 1 << 5, // extended headers only
} as const

export const REPLY_FLAG = {
  DONE: 1 << 0,
} as const

/** Types of structured and extended reply chunks. */
export const CHUNK = {
  NONE: 0,
  OFFSET_DATA: 1,
  OFFSET_HOLE: 2,
  BLOCK_STATUS: 5,
  BLOCK_STATUS_EXT: 6,
  ERROR: 2 ** 15 + 1,
  ERROR_OFFSET: 2 ** 15 + 2,
} as const

/** Whether a chunk reports an error (bit 15 of its type), known or not. */
export function isErrorChunk(type: number): boolean {
  return (type & 0x8000) !== 0
}

/** Status flags of the metadata context `base:allocation`. */
export const BASE_ALLOCATION = {
  HOLE: 1 << 0,
  ZERO: 1 << 1,
} as const

/** What INFO and GO say about sizes, in bytes (specification, "Size constraints"). */
export const BLOCK_SIZE = {
  minimum: 1,
  preferred: 4096,
  maximum: LIMITS.requestPayloadMax,
} as const

/** The port that IANA assigned to NBD. */
export const DEFAULT_PORT = 10809

/** How replies are framed: the outcome of STRUCTURED_REPLY and EXTENDED_HEADERS. */
export type ReplyMode = 'simple' | 'structured' | 'extended'
