/**
 * Makes files and devices the members of a new pool. All of them, or none: when anything fails, files that were created
 * are removed, files that were empty are empty again, and what the superblocks overwrote is put back.
 *
 * Order: open and claim every member, look that none holds data, set the sizes of new files, write and sync the
 * superblocks, sync the directories of new files. The members stay claimed while the caller commits the catalog; then
 * it calls `keep`, or `undo` where it could not.
 *
 * New files are sparse but have their full logical size from the start. So creation takes no time and no space at any
 * capacity, and a member that is shorter than its superblock says has lost something.
 */
import { closeSync, fsyncSync, ftruncateSync, openSync, unlinkSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { assert } from '../base/assert.ts'
import { messageOf, StoreError, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatSize } from '../base/sizes.ts'
import { describeContent } from './content.ts'
import type { Geometry, GeometryShape } from './geometry.ts'
import {
  CHUNK_SIZE_DEFAULT,
  createGeometry,
  DATA_OFFSET_DEFAULT,
  memberSizeOf,
  shapeProblem,
  slotsForCapacity,
  slotsForMemberSize,
} from './geometry.ts'
import type { MemberKind } from './member.ts'
import { FileMember } from './member.ts'
import { assertDistinct, catalogPath, writeSuperblocks } from './members.ts'
import { SUPERBLOCK_AREA } from './superblock.ts'

/**
 * Capacity where nobody says how much and no device sets it. It costs address space only, and leaves room for thick
 * volumes of 16 TiB. It is the largest round figure that two files of ext4 hold (a little under 16 TiB each), and
 * fewer files mean larger chunks.
 */
export const CAPACITY_DEFAULT = 31 * 2 ** 40

/** Numbers of files tried where one file cannot be as large as the capacity needs. */
const DEFAULT_FILE_COUNTS = [1, 2, 4, 8, 16] as const
const GENERATION_FIRST = 1

export interface CreateMembersOptions {
  readonly directory: string // of the pool; exists
  readonly uuid: string // of the pool
  readonly created: number // milliseconds since 1970 UTC
  /** Files or devices in member order; files that do not exist are created. Default: sparse files in the pool directory. */
  readonly paths?: readonly string[]
  readonly parity?: number // parity members among them; only 0 in this release
  readonly chunkSize?: number // bytes; without paths, the stripe size
  readonly capacity?: number // usable bytes, rounded up to whole stripes
  /** Takes members that hold data. */
  readonly force?: boolean
}

export interface CreatedMember {
  readonly index: number
  readonly path: string // as the catalog keeps it: relative inside the pool directory, else absolute
  readonly kind: MemberKind
  readonly size: number // bytes
}

export interface CreatedMembers {
  readonly geometry: Geometry
  readonly generation: number
  readonly members: readonly CreatedMember[]
  /** Lets go of the members; the pool exists. Exactly one of `keep` and `undo` is called. */
  keep(): Promise<void>
  /** Puts everything back as it was: the pool could not be created after all. */
  undo(): Promise<void>
}

/** One member in the making, with what it takes to undo it. */
interface Draft {
  readonly member: FileMember
  readonly origin: 'created' | 'empty' | 'occupied' // occupied: its size is given
  readonly before: Buffer // what the superblocks overwrite
}

/** @throws UserError USAGE, EXISTS, REFUSED, BUSY or FAILED; nothing has changed then */
export async function createMembers(options: CreateMembersOptions): Promise<CreatedMembers> {
  if (options.paths !== undefined && options.paths.length > 0) return createNamed(options, options.paths)
  return createDefault(options)
}

/** On the members that the operator named: k + p of them, p being the parity asked for. */
async function createNamed(options: CreateMembersOptions, paths: readonly string[]): Promise<CreatedMembers> {
  const parityMembers = options.parity ?? 0
  const shape: GeometryShape = {
    chunkSize: options.chunkSize ?? CHUNK_SIZE_DEFAULT,
    dataMembers: paths.length - parityMembers,
    parityMembers,
  }
  refuseShape(shape)
  const absolute = paths.map((path) => resolve(path))
  assertDistinct(absolute)
  return transact(options, async (drafts) => {
    for (const [index, path] of absolute.entries())
      drafts.push(await openDraft(index, path, options.force ?? false))
    return setSizes(drafts, shape, options.capacity)
  })
}

/**
 * On sparse files in the pool directory: one where the file system allows a file of that size, else as few as
 * possible. The stripe keeps its size, so more files mean smaller chunks.
 */
async function createDefault(options: CreateMembersOptions): Promise<CreatedMembers> {
  const stripeSize = options.chunkSize ?? CHUNK_SIZE_DEFAULT
  const parityMembers = options.parity ?? 0
  refuseShape({ chunkSize: stripeSize, dataMembers: 1, parityMembers })
  let capacity = options.capacity ?? CAPACITY_DEFAULT
  for (;;) {
    const asked = options.capacity
    const slots =
      asked === undefined ? slotsAtMost(capacity, stripeSize) : slotsForCapacity(asked, stripeSize)
    for (const count of DEFAULT_FILE_COUNTS) {
      const shape = { chunkSize: stripeSize / count, dataMembers: count, parityMembers }
      if (shapeProblem(shape) !== undefined) break // chunks below 4 KiB
      try {
        return await transact(options, async (drafts) => {
          const geometry = createGeometry({ ...shape, slots })
          for (let index = 0; index < count; index++) {
            const member = FileMember.open(
              index,
              join(resolve(options.directory), `member-${index}`),
              'create',
            )
            const draft: Draft = { member, origin: 'created', before: Buffer.alloc(0) }
            drafts.push(draft)
            extend(draft, memberSizeOf(geometry)) // before the next one, so that a try in vain costs one file
          }
          return geometry
        })
      } catch (error) {
        if (!(error instanceof FileTooLargeError)) throw error
      }
    }
    if (asked !== undefined) {
      const message = `capacity ${formatSize(capacity)} does not fit: ${options.directory} is on a file system with small files`
      throw new UserError('REFUSED', `${message}; ask for a smaller --capacity`)
    }
    capacity = smaller(capacity, stripeSize)
  }
}

/**
 * The transaction: `prepare` fills in the drafts and sets sizes, then the superblocks are written. On any error the
 * drafts are undone, in reverse.
 */
async function transact(
  options: CreateMembersOptions,
  prepare: (drafts: Draft[]) => Promise<Geometry>,
): Promise<CreatedMembers> {
  const drafts: Draft[] = []
  try {
    const geometry = await prepare(drafts)
    assert(drafts.length === geometry.dataMembers + geometry.parityMembers, 'a draft a member')
    await writeAll(drafts, options, geometry)
    const members = drafts.map(({ member }) => ({
      index: member.index,
      path: catalogPath(options.directory, member.path),
      kind: member.kind,
      size: member.size,
    }))
    return {
      geometry,
      generation: GENERATION_FIRST,
      members,
      keep: async () => {
        await Promise.all(drafts.map(({ member }) => member.close()))
      },
      undo: () => undoAll(drafts),
    }
  } catch (error) {
    await undoAll(drafts)
    if (error instanceof StoreError) throw new UserError('FAILED', error.message, { cause: error })
    throw error
  }
}

async function openDraft(index: number, path: string, force: boolean): Promise<Draft> {
  try {
    return { member: FileMember.open(index, path, 'create'), origin: 'created', before: Buffer.alloc(0) }
  } catch (error) {
    if (!(error instanceof UserError) || error.code !== 'EXISTS') throw error
  }
  const member = FileMember.open(index, path)
  try {
    if (member.size === 0 && member.kind === 'file')
      return { member, origin: 'empty', before: Buffer.alloc(0) }
    const content = force ? undefined : await describeContent(member)
    if (content !== undefined) {
      const wipe = `wipefs -a ${path} && dd if=/dev/zero of=${path} bs=1M count=1 conv=notrunc`
      throw new UserError(
        'REFUSED',
        `${member.name} holds ${content}: to give that up, wipe it first (${wipe})`,
      )
    }
    const before = Buffer.alloc(Math.min(member.size, SUPERBLOCK_AREA))
    await member.read(before, 0)
    return { member, origin: 'occupied', before }
  } catch (error) {
    await member.close()
    throw error
  }
}

/** Gives new files their size, and finds the geometry that all members can hold. */
function setSizes(drafts: readonly Draft[], shape: GeometryShape, asked: number | undefined): Geometry {
  const stripeSize = shape.dataMembers * shape.chunkSize
  const occupied = drafts.filter(({ origin }) => origin === 'occupied')
  const fresh = drafts.filter(({ origin }) => origin !== 'occupied')
  if (asked !== undefined || occupied.length > 0) {
    const geometry = createGeometry({ ...shape, slots: slotsFor(occupied, shape, asked) })
    const size = memberSizeOf(geometry)
    for (const { member } of occupied) refuseShort(member, size)
    for (const draft of fresh) extend(draft, size)
    return geometry
  }
  for (let capacity = CAPACITY_DEFAULT; ; capacity = smaller(capacity, stripeSize)) {
    const geometry = createGeometry({ ...shape, slots: slotsAtMost(capacity, stripeSize) })
    try {
      for (const draft of fresh) extend(draft, memberSizeOf(geometry))
      return geometry
    } catch (error) {
      if (!(error instanceof FileTooLargeError)) throw error
    }
  }
}

function slotsFor(occupied: readonly Draft[], shape: GeometryShape, asked: number | undefined): number {
  if (asked !== undefined) return slotsForCapacity(asked, shape.dataMembers * shape.chunkSize)
  const smallest = Math.min(...occupied.map(({ member }) => member.size))
  const slots = slotsForMemberSize(smallest, shape.chunkSize)
  if (slots < 2) {
    const short = occupied.find(({ member }) => member.size === smallest)
    assert(short !== undefined, 'the smallest member is one of them')
    refuseShort(short.member, DATA_OFFSET_DEFAULT + 2 * shape.chunkSize)
  }
  return slots
}

function refuseShort(member: FileMember, size: number): void {
  if (member.size >= size) return
  const lengths = `it has ${formatSize(member.size)}, ${formatSize(size)} are needed`
  throw new UserError(
    'REFUSED',
    `${member.name} is too small: ${lengths}; use a larger one or a smaller --capacity`,
  )
}

function refuseShape(shape: GeometryShape): void {
  const problem = shapeProblem(shape)
  if (problem !== undefined) throw new UserError('USAGE', problem)
}

/** For a capacity that nobody asked for: as many slots as can be counted, without complaint. */
function slotsAtMost(capacity: number, stripeSize: number): number {
  return Math.min(Math.ceil(capacity / stripeSize) + 1, LIMITS.slotsPerPoolMax)
}

/** Half, in whole stripes: the next thing to try where files cannot be that large. */
function smaller(capacity: number, stripeSize: number): number {
  const half = Math.floor(capacity / 2 / stripeSize) * stripeSize
  if (half === 0) throw new UserError('REFUSED', 'the file system does not hold files of even one stripe')
  return half
}

/** The file system, or the process's limit (ulimit -f), has no files of that size. */
class FileTooLargeError extends UserError {}

function extend(draft: Draft, size: number): void {
  const { member } = draft
  try {
    ftruncateSync(member.fd, size)
  } catch (error) {
    if (systemCode(error) === 'EFBIG') {
      const message = `${member.name}: its file system does not hold files of ${formatSize(size)}`
      throw new FileTooLargeError(
        'REFUSED',
        `${message}; name more members or ask for a smaller --capacity`,
        {
          cause: error,
        },
      )
    }
    throw new UserError('FAILED', `${member.name} cannot get its size: ${messageOf(error)}`, { cause: error })
  }
  member.resized()
}

async function writeAll(
  drafts: readonly Draft[],
  options: CreateMembersOptions,
  geometry: Geometry,
): Promise<void> {
  const { uuid, created } = options
  const writes = drafts.map(({ member }) =>
    writeSuperblocks(member, {
      uuid,
      created,
      memberIndex: member.index,
      geometry,
      generation: GENERATION_FIRST,
    }),
  )
  // All of them have ended before anything is undone.
  for (const result of await Promise.allSettled(writes)) {
    if (result.status === 'rejected') throw result.reason
  }
  const directories = drafts
    .filter(({ origin }) => origin === 'created')
    .map(({ member }) => dirname(member.path))
  for (const directory of new Set(directories)) syncDirectory(directory)
}

/** The name of a new file is durable only when its directory is. */
function syncDirectory(directory: string): void {
  const fd = openSync(directory, 'r')
  try {
    fsyncSync(fd)
  } finally {
    closeSync(fd)
  }
}

async function undoAll(drafts: readonly Draft[]): Promise<void> {
  for (const { member, origin, before } of drafts.toReversed()) {
    try {
      if (origin === 'created') unlinkSync(member.path)
      else if (origin === 'empty') ftruncateSync(member.fd, 0)
      else await member.write(before, 0)
    } catch {
      // Whatever made the creation fail is what the operator has to know; a dead member stays as it is.
    }
    await member.close()
  }
}
