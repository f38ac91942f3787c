import { LIMITS } from '../base/limits.ts'
import { LinkError } from '../link/errors.ts'
import { Fields } from '../link/hello.ts'
import type { GenerationRecord } from '../metadata/records.ts'
import type { CommitInfo, PrimaryHello, RemoteHello, RemoteOperation } from './remote.ts'
import { SIGNATURE_BYTES } from './signatures.ts'

/**
 * What the two sides of a mirror say to each other, on channels of a link's session.
 *
 *   mirror       opened by the primary, {relation}: requests of the primary (JSON), operations, and their ends
 *   mirror-data  opened by the primary, {relation}: what goes into the stage, signatures, bitmaps; bulk, in any order
 *   mirror-ask   opened by either: one question about a relation, one answer (asks.ts)
 *
 * Codecs only; every decoder @throws LinkError BAD_FRAME.
 */
/** What both sides need for lanes, beside a session over plain TCP. */
export const LANES_CAPABILITY = 'mirror-lanes-1'

export const CHANNELS = { control: 'mirror', data: 'mirror-data', ask: 'mirror-ask' } as const

export const MESSAGE = {
  hello: 1,
  commit: 2,
  flush: 3,
  state: 4,
  handOver: 5,
  operations: 6, // to the secondary
  ends: 7, // of operations, to the primary
  fence: 8,
  lanes: 9, // the secondary gets ready for connections that carry writes (datapath.ts, Lanes)
  put: 16,
  hole: 17,
  signatures: 18,
  bitmap: 19,
} as const

const KINDS = ['write', 'trim', 'zero'] as const
const OPERATION_BYTES = 24
const END_BYTES = 8
const PUT_BYTES = 24
/** The signatures of that many fit into one message. */
const RANGES_MAX = Math.floor(LIMITS.linkPayloadMax / SIGNATURE_BYTES)

export function json(value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value), 'utf8')
}

export function readGeneration(value: unknown, what: string): GenerationRecord {
  const fields = new Fields(value, what)
  return {
    current: fields.text('current', 1, 64),
    history: fields.list('history', LIMITS.generationsKept, (id) => {
      if (typeof id !== 'string' || id.length > 64) throw new LinkError('BAD_FRAME', `${what}: a generation`)
      return id
    }),
  }
}

function flag(fields: Fields, name: string): boolean {
  const value = fields.value(name)
  if (typeof value !== 'boolean')
    throw new LinkError('BAD_FRAME', `${fields.what}: ${name} is not true or false`)
  return value
}

const SIZE_MAX = Number.MAX_SAFE_INTEGER

export function readPrimaryHello(payload: Buffer): PrimaryHello {
  const fields = new Fields(payload, 'hello of a primary')
  const mode = fields.text('mode', 4, 5)
  if (mode !== 'sync' && mode !== 'async') throw new LinkError('BAD_FRAME', 'hello of a primary: mode')
  const onLoss = fields.text('onLoss', 5, 8)
  if (onLoss !== 'continue' && onLoss !== 'block')
    throw new LinkError('BAD_FRAME', 'hello of a primary: onLoss')
  return {
    generation: readGeneration(fields.value('generation'), 'hello of a primary'),
    base: fields.text('base', 1, 64),
    cycle: fields.integer('cycle', 0, SIZE_MAX),
    size: fields.integer('size', 1, SIZE_MAX),
    initialized: flag(fields, 'initialized'),
    changed: fields.integer('changed', 0, SIZE_MAX),
    mode,
    intervalMs: fields.integer('intervalMs', LIMITS.mirrorIntervalMsMin, LIMITS.mirrorIntervalMsMax),
    onLoss,
    unitBytes: fields.integer('unitBytes', LIMITS.chunkSizeMin, LIMITS.formatUnitBytesMax),
  }
}

export function readRemoteHello(payload: Buffer): RemoteHello {
  const fields = new Fields(payload, 'hello of a secondary')
  const role = fields.text('role', 1, 16)
  if (role !== 'primary' && role !== 'secondary')
    throw new LinkError('BAD_FRAME', 'hello of a secondary: role')
  const generation = fields.value('generation')
  return {
    role,
    generation: generation === null ? null : readGeneration(generation, 'hello of a secondary'),
    base: fields.text('base', 0, 64),
    consistent: flag(fields, 'consistent'),
    cycle: fields.integer('cycle', 0, SIZE_MAX),
    size: fields.integer('size', 1, SIZE_MAX),
    stage: fields.text('stage', 0, 64),
    changed: fields.integer('changed', 0, SIZE_MAX),
    blank: flag(fields, 'blank'),
  }
}

export function readCommit(payload: Buffer): CommitInfo {
  const fields = new Fields(payload, 'commit')
  return {
    cycle: fields.integer('cycle', 0, SIZE_MAX),
    consistent: flag(fields, 'consistent'),
    generation: readGeneration(fields.value('generation'), 'commit'),
    size: fields.integer('size', 1, SIZE_MAX),
    follow: flag(fields, 'follow'),
  }
}

/**
 * Lanes: `count` connections. Where the primary dials, the reply has tokens for them; where it listens, the request has, and the reply
 * says that all have been dialled.
 */
export interface LanesMessage {
  readonly count: number
  readonly tokens: readonly string[]
}

export function readLanes(payload: Buffer): LanesMessage {
  const fields = new Fields(payload, 'lanes')
  return {
    count: fields.integer('count', 0, LIMITS.mirrorLanesMax),
    tokens: fields.list('tokens', LIMITS.mirrorLanesMax, (token) => {
      if (typeof token !== 'string' || !/^[0-9a-f]{64}$/.test(token))
        throw new LinkError('BAD_FRAME', 'lanes: a token')
      return token
    }),
  }
}

// ---- what goes into the stage: | offset u64 | of the unit's u64 | data |
// `of`: where the unit (or run of units) begins that a piece belongs to, and `length` of all of it

export interface PutHeader {
  readonly offset: number // of this piece
  readonly unit: number // where the whole begins
  readonly length: number // of the whole
}

export function putHeader({ offset, unit, length }: PutHeader): Buffer {
  const header = Buffer.allocUnsafe(PUT_BYTES)
  writeU64(header, offset, 0)
  writeU64(header, unit, 8)
  writeU64(header, length, 16)
  return header
}

export function readPut(payload: Buffer): PutHeader & { readonly data: Buffer } {
  if (payload.length <= PUT_BYTES) throw new LinkError('BAD_FRAME', 'put: no data')
  return {
    offset: readU64(payload, 0),
    unit: readU64(payload, 8),
    length: readU64(payload, 16),
    data: payload.subarray(PUT_BYTES),
  }
}

export function encodeRanges(ranges: readonly { offset: number; length: number }[]): Buffer {
  const bytes = Buffer.allocUnsafe(ranges.length * 16)
  ranges.forEach(({ offset, length }, index) => {
    writeU64(bytes, offset, index * 16)
    writeU64(bytes, length, index * 16 + 8)
  })
  return bytes
}

export function readRanges(payload: Buffer): { offset: number; length: number }[] {
  if (payload.length === 0 || payload.length % 16 !== 0)
    throw new LinkError('BAD_FRAME', 'ranges of a wrong length')
  if (payload.length > RANGES_MAX * 16)
    throw new LinkError('BAD_FRAME', `${payload.length / 16} ranges, ${RANGES_MAX} are the most`)
  return Array.from({ length: payload.length / 16 }, (_, index) => ({
    offset: readU64(payload, index * 16),
    length: readU64(payload, index * 16 + 8),
  }))
}

// ---- operations: count times | id u32 | kind u8 | 0 u8 | flags u16 | offset u64 | length u64 |, then payloads in order

export interface OperationHead {
  readonly id: number
  readonly kind: RemoteOperation['kind']
  readonly flags: number
  readonly offset: number
  readonly length: number
}

export function encodeOperations(heads: readonly OperationHead[]): Buffer {
  const bytes = Buffer.allocUnsafe(4 + heads.length * OPERATION_BYTES)
  bytes.writeUInt32LE(heads.length, 0)
  let at = 4
  for (const { id, kind, flags, offset, length } of heads) {
    bytes.writeUInt32LE(id, at)
    bytes.writeUInt16LE(KINDS.indexOf(kind), at + 4)
    bytes.writeUInt16LE(flags, at + 6)
    writeU64(bytes, offset, at + 8)
    writeU64(bytes, length, at + 16)
    at += OPERATION_BYTES
  }
  return bytes
}

export function readOperations(
  payload: Buffer,
): (OperationHead & { readonly payload: Buffer | undefined })[] {
  const count = payload.length >= 4 ? payload.readUInt32LE(0) : 0
  let data = 4 + count * OPERATION_BYTES
  if (count === 0 || data > payload.length) throw new LinkError('BAD_FRAME', 'operations: count')
  const operations: (OperationHead & { payload: Buffer | undefined })[] = []
  for (let at = 4; operations.length < count; at += OPERATION_BYTES) {
    const kind = KINDS[payload.readUInt16LE(at + 4)]
    const length = readU64(payload, at + 16)
    if (kind === undefined || length === 0) throw new LinkError('BAD_FRAME', 'operations: one makes no sense')
    const taken = kind === 'write' ? length : 0
    if (data + taken > payload.length) throw new LinkError('BAD_FRAME', 'operations: payload is cut short')
    operations.push({
      id: payload.readUInt32LE(at),
      kind,
      flags: payload.readUInt16LE(at + 6),
      offset: readU64(payload, at + 8),
      length,
      payload: kind === 'write' ? payload.subarray(data, data + taken) : undefined,
    })
    data += taken
  }
  if (data !== payload.length) throw new LinkError('BAD_FRAME', 'operations: payload is too long')
  return operations
}

export function encodeEnds(ends: readonly { id: number; errno: number }[]): Buffer {
  const bytes = Buffer.allocUnsafe(ends.length * END_BYTES)
  ends.forEach(({ id, errno }, index) => {
    bytes.writeUInt32LE(id, index * END_BYTES)
    bytes.writeUInt32LE(errno, index * END_BYTES + 4)
  })
  return bytes
}

export function readEnds(payload: Buffer): { id: number; errno: number }[] {
  if (payload.length % END_BYTES !== 0) throw new LinkError('BAD_FRAME', 'ends of a wrong length')
  return Array.from({ length: payload.length / END_BYTES }, (_, index) => ({
    id: payload.readUInt32LE(index * END_BYTES),
    errno: payload.readUInt32LE(index * END_BYTES + 4),
  }))
}

// ---- pages of a bitmap: | first u64 | next u64 | bits |; `next`: ask again from there, 2^53 - 1: that was all

export const NO_MORE = Number.MAX_SAFE_INTEGER

export function encodePage(first: number, next: number, bits: Buffer): Buffer[] {
  const head = Buffer.allocUnsafe(16)
  writeU64(head, first, 0)
  writeU64(head, next, 8)
  return [head, bits]
}

export function readPage(payload: Buffer): { first: number; next: number; bytes: Buffer } {
  if (payload.length < 16) throw new LinkError('BAD_FRAME', 'a page of a bitmap is cut short')
  return { first: readU64(payload, 0), next: readU64(payload, 8), bytes: payload.subarray(16) }
}

function writeU64(target: Buffer, value: number, at: number): void {
  target.writeUInt32LE(value % 2 ** 32, at)
  target.writeUInt32LE(Math.floor(value / 2 ** 32), at + 4)
}

function readU64(source: Buffer, at: number): number {
  const value = source.readUInt32LE(at) + source.readUInt32LE(at + 4) * 2 ** 32
  if (!Number.isSafeInteger(value)) throw new LinkError('BAD_FRAME', 'a number is too large')
  return value
}
