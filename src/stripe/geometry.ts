/**
 * Where stripes lie. A slot is one row over all members:
 *
 *              member 0   member 1   member 2   member 3        k = 3 data chunks, p = 1 parity chunk
 *   slot 0        -          -          -          -            never handed out: 0 means "no slot" in every table
 *   slot 1      parity     data 0     data 1     data 2
 *   slot 2      data 2     parity     data 0     data 1
 *   slot 3      data 1     data 2     parity     data 0
 *   slot 4      data 0     data 1     data 2     parity
 *
 * Data chunk c of slot s is on member (s + c) mod (k + p), parity chunk q on member (s + k + q) mod (k + p). The
 * rotation spreads parity writes, and with p = 0 the first chunks of stripes, over all members. On its member every
 * chunk of the slot is at `dataOffset + s * chunkSize`; the bytes below `dataOffset` hold the superblocks.
 *
 * What always holds: the stripe size is k chunks, a chunk is a power of two, slots are counted in 32 bits, and every
 * offset on a member stays below 2^53.
 */
import { assert } from '../base/assert.ts'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatSize } from '../base/sizes.ts'

export interface Geometry {
  readonly chunkSize: number // bytes
  readonly dataMembers: number // k
  readonly parityMembers: number // p
  readonly stripeSize: number // bytes; k * chunkSize
  readonly dataOffset: number // bytes on every member before slot 0
  readonly slots: number // slot numbers are below this; slot 0 is never handed out
}

export type GeometryShape = Pick<Geometry, 'chunkSize' | 'dataMembers' | 'parityMembers'>

export const CHUNK_SIZE_DEFAULT = 64 * 1024
/** A multiple of every chunk size, so that chunks are aligned on the member. */
export const DATA_OFFSET_DEFAULT = 1024 * 1024

assert(DATA_OFFSET_DEFAULT % LIMITS.chunkSizeMax === 0)
assert(LIMITS.slotsPerPoolMax * LIMITS.chunkSizeMax + DATA_OFFSET_DEFAULT < Number.MAX_SAFE_INTEGER)

/** What is wrong with these parameters, a sentence without the full stop; undefined where they are good. */
export function shapeProblem(shape: GeometryShape): string | undefined {
  const { chunkSize, dataMembers, parityMembers } = shape
  if (!isWholeNumber(chunkSize) || !isPowerOfTwo(chunkSize)) {
    return `chunk size ${chunkSize} is not a power of two: use for example 64K`
  }
  if (chunkSize < LIMITS.chunkSizeMin || chunkSize > LIMITS.chunkSizeMax) {
    const range = `${formatSize(LIMITS.chunkSizeMin)} to ${formatSize(LIMITS.chunkSizeMax)}`
    return `chunk size ${formatSize(chunkSize)} is outside ${range}`
  }
  if (parityMembers !== 0 && parityMembers !== 1 && parityMembers !== 2) {
    return `parity ${parityMembers} is not possible: use 0, 1 or 2`
  }
  if (!isWholeNumber(dataMembers) || dataMembers < 1) {
    return `${dataMembers} data members are not possible: a pool has at least one`
  }
  if (dataMembers + parityMembers > LIMITS.membersMax) {
    return `${dataMembers + parityMembers} members are too many: a pool has at most ${LIMITS.membersMax}`
  }
  if (dataMembers * chunkSize > LIMITS.stripeSizeMax) {
    const asked = `${dataMembers} members with chunks of ${formatSize(chunkSize)}`
    return `${asked} make stripes above ${formatSize(LIMITS.stripeSizeMax)}: use a smaller chunk size`
  }
  // Last, so that nonsense is named as such. Everything below this line already carries p.
  if (parityMembers > 0) return `parity ${parityMembers} is not in this release: use parity 0`
  return undefined
}

/** As `shapeProblem`, for everything a superblock or a catalog says. */
export function geometryProblem(geometry: Omit<Geometry, 'stripeSize'>): string | undefined {
  const problem = shapeProblem(geometry)
  if (problem !== undefined) return problem
  const { chunkSize, dataOffset, slots } = geometry
  if (!isWholeNumber(dataOffset) || dataOffset < DATA_OFFSET_DEFAULT || dataOffset % chunkSize !== 0) {
    return `data offset ${dataOffset} is not a multiple of the chunk size from ${DATA_OFFSET_DEFAULT} up`
  }
  if (!isWholeNumber(slots) || slots < 2) return `${slots} slots are too few: slot 0 is never handed out`
  if (slots > LIMITS.slotsPerPoolMax) return `${slots} slots are more than ${LIMITS.slotsPerPoolMax}`
  if (dataOffset + slots * chunkSize > Number.MAX_SAFE_INTEGER)
    return `data offset ${dataOffset} is too large`
  return undefined
}

/** @throws UserError USAGE that names the wrong parameter */
export function createGeometry(options: GeometryShape & { slots: number; dataOffset?: number }): Geometry {
  const { chunkSize, dataMembers, parityMembers, slots, dataOffset = DATA_OFFSET_DEFAULT } = options
  const problem = geometryProblem({ chunkSize, dataMembers, parityMembers, dataOffset, slots })
  if (problem !== undefined) throw new UserError('USAGE', problem)
  return { chunkSize, dataMembers, parityMembers, stripeSize: dataMembers * chunkSize, dataOffset, slots }
}

/**
 * How many slots (slot 0 included) hold at least `capacity` bytes.
 * @throws UserError USAGE where that is nothing, or more than can be counted
 */
export function slotsForCapacity(capacity: number, stripeSize: number): number {
  if (!isWholeNumber(capacity) || capacity <= 0)
    throw new UserError('USAGE', `capacity ${capacity} is not a positive size`)
  const slots = Math.ceil(capacity / stripeSize) + 1
  if (slots > LIMITS.slotsPerPoolMax) {
    const most = Math.floor(((LIMITS.slotsPerPoolMax - 1) * stripeSize) / 2 ** 30) * 2 ** 30
    const asked = `capacity ${formatSize(capacity)} is too large for stripes of ${formatSize(stripeSize)}`
    throw new UserError('USAGE', `${asked}: at most ${formatSize(most)}, or use a larger chunk size`)
  }
  return slots
}

/** How many slots fit on members of this many bytes; below 2 where not even one stripe fits beside slot 0. */
export function slotsForMemberSize(
  size: number,
  chunkSize: number,
  dataOffset = DATA_OFFSET_DEFAULT,
): number {
  const slots = Math.floor((size - dataOffset) / chunkSize)
  return Math.min(Math.max(slots, 0), LIMITS.slotsPerPoolMax)
}

/** k + p. */
export function memberCountOf(geometry: GeometryShape): number {
  return geometry.dataMembers + geometry.parityMembers
}

/** Usable bytes. */
export function capacityOf(geometry: Geometry): number {
  return (geometry.slots - 1) * geometry.stripeSize
}

/** Bytes that each member must have. */
export function memberSizeOf(geometry: Geometry): number {
  return geometry.dataOffset + geometry.slots * geometry.chunkSize
}

/** The member that holds data chunk `chunk` (0..k-1) of `slot`. */
export function dataMemberOf(geometry: Geometry, slot: number, chunk: number): number {
  assert(chunk >= 0 && chunk < geometry.dataMembers, 'data chunk index')
  return (slot + chunk) % memberCountOf(geometry)
}

/** The member that holds parity chunk `parity` (0..p-1) of `slot`. */
export function parityMemberOf(geometry: Geometry, slot: number, parity: number): number {
  assert(parity >= 0 && parity < geometry.parityMembers, 'parity chunk index')
  return (slot + geometry.dataMembers + parity) % memberCountOf(geometry)
}

/** What `member` holds of `slot`: data chunk 0..k-1, or k + q for parity chunk q. The inverse of the two above. */
export function chunkOn(geometry: Geometry, slot: number, member: number): number {
  const count = memberCountOf(geometry)
  assert(member >= 0 && member < count, 'member index')
  return (member - (slot % count) + count) % count
}

/** Where the chunk of `slot` starts, the same on every member. */
export function chunkOffsetOf(geometry: Geometry, slot: number): number {
  assert(slot > 0 && slot < geometry.slots, 'slot number')
  return geometry.dataOffset + slot * geometry.chunkSize
}

function isWholeNumber(value: number): boolean {
  return Number.isSafeInteger(value)
}

/** Not by bits: a size may be above 2^32. */
function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value)) && 2 ** Math.log2(value) === value
}
