/**
 * The superblock says which member of which pool a file or device is. It is 4 KiB, little endian, and lies twice at
 * the start of every member: the primary in bytes 0..4095, the copy in bytes 4096..8191.
 *
 *   offset  bytes  field
 *        0      8  magic, ASCII "FULLSTRP"
 *        8      4  format version; this program writes and reads 1
 *       12      4  CRC-32 (of zlib) of all 4096 bytes, taken with these four as zero
 *       16     16  pool uuid, in the order its text is written
 *       32      4  member index, 0..k+p-1
 *       36      4  data members k
 *       40      4  parity members p
 *       44      4  chunk size, bytes
 *       48      8  data offset, bytes
 *       56      8  slots, slot 0 included
 *       64      8  generation: raised whenever the set of members changes, so an absent one is known as stale
 *       72      8  created, milliseconds since 1970 UTC
 *       80   4016  zero when written, ignored when read
 *
 * Magic, version and checksum keep their place and meaning in every version: a newer superblock is told from a damaged
 * one by its checksum, and refused either way.
 *
 * Order: primary, member sync, copy, member sync. So at any crash one of the two is whole, and where both are whole and
 * differ, the higher generation is the later one. A new pool's metadata is committed after its superblocks.
 */
import { crc32 } from 'node:zlib'
import { assert } from '../base/assert.ts'
import type { Geometry } from './geometry.ts'
import { geometryProblem, memberCountOf } from './geometry.ts'

export const SUPERBLOCK_SIZE = 4096
/** Both copies: what is read at once, and what must be empty before a member is created. */
export const SUPERBLOCK_AREA = 2 * SUPERBLOCK_SIZE
export const SUPERBLOCK_VERSION = 1
const MAGIC = Buffer.from('FULLSTRP', 'latin1')
const OFFSET = {
  version: 8,
  checksum: 12,
  uuid: 16,
  member: 32,
  dataMembers: 36,
  parityMembers: 40,
  chunkSize: 44,
  dataOffset: 48,
  slots: 56,
  generation: 64,
  created: 72,
} as const

export interface Superblock {
  readonly uuid: string // lower-case, with dashes
  readonly memberIndex: number
  readonly geometry: Geometry
  readonly generation: number // from 1
  readonly created: number // milliseconds since 1970 UTC
}

/** What one 4 KiB block turned out to be. */
export type DecodedSuperblock =
  | { readonly state: 'valid'; readonly superblock: Superblock }
  | { readonly state: 'foreign' } // no magic: not ours
  | { readonly state: 'newer'; readonly version: number } // ours, whole, from a later program
  | { readonly state: 'damaged'; readonly reason: string } // our magic, but not what we wrote

/** What the first 8 KiB of a member turned out to be. */
export type SuperblockReading =
  | { readonly state: 'valid'; readonly superblock: Superblock; readonly note: string | undefined }
  | { readonly state: 'blank' } // all zero
  | { readonly state: 'foreign' }
  | { readonly state: 'newer'; readonly version: number }
  | { readonly state: 'damaged'; readonly reason: string }

export function encodeSuperblock(superblock: Superblock): Buffer {
  const { geometry } = superblock
  assert(geometryProblem(geometry) === undefined, 'superblock geometry')
  assert(
    superblock.memberIndex >= 0 && superblock.memberIndex < memberCountOf(geometry),
    'superblock member index',
  )
  assert(Number.isSafeInteger(superblock.generation) && superblock.generation >= 1, 'superblock generation')
  const block = Buffer.alloc(SUPERBLOCK_SIZE)
  MAGIC.copy(block, 0)
  block.writeUInt32LE(SUPERBLOCK_VERSION, OFFSET.version)
  encodeUuid(superblock.uuid).copy(block, OFFSET.uuid)
  block.writeUInt32LE(superblock.memberIndex, OFFSET.member)
  block.writeUInt32LE(geometry.dataMembers, OFFSET.dataMembers)
  block.writeUInt32LE(geometry.parityMembers, OFFSET.parityMembers)
  block.writeUInt32LE(geometry.chunkSize, OFFSET.chunkSize)
  block.writeBigUInt64LE(BigInt(geometry.dataOffset), OFFSET.dataOffset)
  block.writeBigUInt64LE(BigInt(geometry.slots), OFFSET.slots)
  block.writeBigUInt64LE(BigInt(superblock.generation), OFFSET.generation)
  block.writeBigUInt64LE(BigInt(superblock.created), OFFSET.created)
  block.writeUInt32LE(checksumOf(block), OFFSET.checksum)
  return block
}

export function decodeSuperblock(block: Buffer): DecodedSuperblock {
  assert(block.length === SUPERBLOCK_SIZE, 'superblock size')
  if (!block.subarray(0, MAGIC.length).equals(MAGIC)) return { state: 'foreign' }
  if (block.readUInt32LE(OFFSET.checksum) !== checksumOf(block)) return damaged('its checksum does not match')
  const version = block.readUInt32LE(OFFSET.version)
  if (version > SUPERBLOCK_VERSION) return { state: 'newer', version }
  if (version !== SUPERBLOCK_VERSION) return damaged(`its version is ${version}`)

  const memberIndex = block.readUInt32LE(OFFSET.member)
  const chunkSize = block.readUInt32LE(OFFSET.chunkSize)
  const dataMembers = block.readUInt32LE(OFFSET.dataMembers)
  const geometry: Geometry = {
    chunkSize,
    dataMembers,
    parityMembers: block.readUInt32LE(OFFSET.parityMembers),
    stripeSize: dataMembers * chunkSize,
    // Above 2^53 these lose digits; the checks below refuse such values anyway.
    dataOffset: Number(block.readBigUInt64LE(OFFSET.dataOffset)),
    slots: Number(block.readBigUInt64LE(OFFSET.slots)),
  }
  const problem = geometryProblem(geometry)
  if (problem !== undefined) return damaged(problem)
  if (memberIndex >= memberCountOf(geometry))
    return damaged(`it is member ${memberIndex} of ${memberCountOf(geometry)}`)
  const generation = Number(block.readBigUInt64LE(OFFSET.generation))
  if (generation < 1 || !Number.isSafeInteger(generation)) return damaged(`its generation is ${generation}`)
  const created = Number(block.readBigUInt64LE(OFFSET.created))
  if (!Number.isSafeInteger(created)) return damaged(`its time of creation is ${created}`)
  const uuid = decodeUuid(block.subarray(OFFSET.uuid, OFFSET.uuid + 16))
  return { state: 'valid', superblock: { uuid, memberIndex, geometry, generation, created } }
}

/** Judges both copies together. @param area the first 8 KiB of a member */
export function readSuperblocks(area: Buffer): SuperblockReading {
  assert(area.length === SUPERBLOCK_AREA, 'superblock area')
  const primary = decodeSuperblock(area.subarray(0, SUPERBLOCK_SIZE))
  const copy = decodeSuperblock(area.subarray(SUPERBLOCK_SIZE))
  // A newer program may have been stopped between the two: what it began is not ours to undo.
  if (primary.state === 'newer') return primary
  if (copy.state === 'newer') return copy
  if (primary.state === 'valid' && copy.state === 'valid') return choose(primary.superblock, copy.superblock)
  if (primary.state === 'valid') {
    return { ...primary, note: `the copy of the superblock is ${describe(copy)}; the primary is used` }
  }
  if (copy.state === 'valid') {
    return { ...copy, note: `the primary superblock is ${describe(primary)}; its copy is used` }
  }
  if (primary.state === 'damaged') return primary
  if (copy.state === 'damaged') return copy
  return isZero(area) ? { state: 'blank' } : { state: 'foreign' }
}

/** True where every byte is 0. */
export function isZero(bytes: Buffer): boolean {
  // Comparing the buffer with itself, shifted by one byte, is a memcmp.
  return bytes.length === 0 || (bytes[0] === 0 && bytes.subarray(1).equals(bytes.subarray(0, -1)))
}

function choose(primary: Superblock, copy: Superblock): SuperblockReading {
  if (primary.uuid !== copy.uuid || primary.memberIndex !== copy.memberIndex) {
    return damaged('its two copies belong to different members')
  }
  if (primary.generation === copy.generation) {
    if (!encodeSuperblock(primary).equals(encodeSuperblock(copy)))
      return damaged('its two copies contradict each other')
    return { state: 'valid', superblock: primary, note: undefined }
  }
  const superblock = primary.generation > copy.generation ? primary : copy
  const note = `the two superblocks have generations ${primary.generation} and ${copy.generation}; the later one is used`
  return { state: 'valid', superblock, note }
}

function damaged(reason: string): { state: 'damaged'; reason: string } {
  return { state: 'damaged', reason }
}

function describe(decoded: DecodedSuperblock): string {
  return decoded.state === 'damaged' ? `damaged (${decoded.reason})` : 'missing'
}

function checksumOf(block: Buffer): number {
  const before = crc32(block.subarray(0, OFFSET.checksum))
  return crc32(block.subarray(OFFSET.checksum + 4), crc32(Buffer.alloc(4), before))
}

function encodeUuid(uuid: string): Buffer {
  const bytes = Buffer.from(uuid.replaceAll('-', ''), 'hex')
  assert(bytes.length === 16 && decodeUuid(bytes) === uuid, 'superblock uuid')
  return bytes
}

function decodeUuid(bytes: Buffer): string {
  return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5')
}
