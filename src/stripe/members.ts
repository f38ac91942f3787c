/**
 * Opens the members of a pool, and only those: every superblock is compared with the pool's catalog, and a member that
 * is missing, foreign, damaged, cut short, swapped with another, a copy of another, left out of a change, or written
 * by a newer program is refused by name, with what to do. Nothing is guessed and nothing is repaired in passing.
 *
 * Either all members are open afterwards or none is. Creation is in create-members.ts.
 */
import { statSync } from 'node:fs'
import { relative, resolve } from 'node:path'
import { assert } from '../base/assert.ts'
import { messageOf, StoreError, systemCode, UserError } from '../base/errors.ts'
import { formatSize } from '../base/sizes.ts'
import type { Geometry } from './geometry.ts'
import { memberCountOf, memberSizeOf } from './geometry.ts'
import type { Member } from './member.ts'
import { FileMember, identityOf, memberName } from './member.ts'
import type { Superblock, SuperblockReading } from './superblock.ts'
import { encodeSuperblock, SUPERBLOCK_SIZE, SUPERBLOCK_VERSION } from './superblock.ts'

/** What the catalog says about the pool; every superblock must agree. */
export interface ExpectedPool {
  readonly uuid: string
  readonly generation: number
  readonly geometry: Geometry
}

export interface OpenedMembers {
  readonly members: readonly Member[] // by index
  /** Remarks for the log: a superblock that was read from its copy. `check --repair` writes it anew. */
  readonly notes: readonly string[]
}

/**
 * @param directory the pool directory, where relative paths lie
 * @param paths the members in order of their index, as the catalog has them
 * @throws UserError REFUSED whose one line names every member that is wrong; BUSY where only others' use prevents it
 */
export async function openMembers(
  directory: string,
  paths: readonly string[],
  expected: ExpectedPool,
): Promise<OpenedMembers> {
  const count = memberCountOf(expected.geometry)
  if (paths.length !== count) {
    throw new StoreError('DAMAGED', `the catalog lists ${paths.length} members of ${count}`)
  }
  const absolute = paths.map((path) => memberPath(directory, path))
  assertDistinct(absolute)
  const problems: string[] = []
  const opened: (FileMember | undefined)[] = []
  let busyCount = 0
  try {
    for (const [index, path] of absolute.entries()) {
      opened[index] = undefined
      try {
        opened[index] = FileMember.open(index, path)
      } catch (error) {
        if (!(error instanceof UserError)) throw error
        if (error.code === 'BUSY') busyCount++
        problems.push(error.message)
      }
    }
    const readings = await Promise.all(opened.map((member) => (member ? identify(member) : undefined)))
    const notes: string[] = []
    const members: Member[] = []
    for (const [index, reading] of readings.entries()) {
      const member = opened[index]
      if (member === undefined || reading === undefined) continue
      const problem = typeof reading === 'string' ? reading : judge(member, reading, expected, readings)
      if (problem !== undefined) problems.push(problem)
      else if (typeof reading !== 'string' && reading.state === 'valid' && reading.note !== undefined) {
        notes.push(`${member.name}: ${reading.note}`)
      }
      members.push(member)
    }
    if (problems.length > 0) {
      throw new UserError(busyCount === problems.length ? 'BUSY' : 'REFUSED', problems.join('; '))
    }
    assert(members.length === count, 'all members are open')
    return { members, notes }
  } catch (error) {
    await Promise.all(opened.map((member) => member?.close()))
    throw error
  }
}

/** Writes both superblocks of a member in their order; see superblock.ts. */
export async function writeSuperblocks(member: Member, superblock: Superblock): Promise<void> {
  assert(superblock.memberIndex === member.index, 'superblock of this member')
  const block = encodeSuperblock(superblock)
  await member.write(block, 0)
  await member.sync()
  await member.write(block, SUPERBLOCK_SIZE)
  await member.sync()
}

/** The path to open; the catalog has relative ones for members inside the pool directory, so that it can be moved. */
export function memberPath(directory: string, catalogPath: string): string {
  return resolve(directory, catalogPath)
}

/** The inverse. Links are kept as they were given: /dev/disk/by-id names outlast /dev/sdX. */
export function catalogPath(directory: string, path: string): string {
  const inside = relative(resolve(directory), resolve(path))
  return inside === '' || inside === '..' || inside.startsWith('../') ? resolve(path) : inside
}

/** @throws UserError USAGE where two paths lead to one file or device, however they are spelled or linked */
export function assertDistinct(paths: readonly string[]): void {
  const seen = new Map<string, number>()
  for (const [index, path] of paths.entries()) {
    const identity = pathIdentity(path)
    const other = seen.get(identity)
    if (other !== undefined) {
      const first = memberName(other, paths[other] ?? '')
      throw new UserError(
        'USAGE',
        `${memberName(index, path)} is the same as ${first}: name each member once`,
      )
    }
    seen.set(identity, index)
  }
}

function pathIdentity(path: string): string {
  try {
    return identityOf(statSync(path, { bigint: true }))
  } catch (error) {
    if (systemCode(error) === undefined) throw error
    return `path ${path}` // opening it says what is wrong
  }
}

/** The reading, or why there is none. */
async function identify(member: Member): Promise<SuperblockReading | string> {
  try {
    return await member.identify()
  } catch (error) {
    if (error instanceof StoreError) return `${messageOf(error)}: replace the disk or restore the file`
    throw error
  }
}

/** What is wrong with an open member, one clause; undefined where it is the one that was expected. */
function judge(
  member: Member,
  reading: SuperblockReading,
  expected: ExpectedPool,
  readings: readonly (SuperblockReading | string | undefined)[],
): string | undefined {
  const { name } = member
  switch (reading.state) {
    case 'blank':
      return `${name} is blank: it was wiped, or another one lies at this path; put the right one back`
    case 'foreign':
      return `${name} is foreign: it has no superblock of this program; put the right one back at this path`
    case 'newer': {
      const versions = `superblock version ${reading.version}, this one knows ${SUPERBLOCK_VERSION}`
      return `${name} was written by a newer release (${versions}): use that release`
    }
    case 'damaged':
      return `${name} has a damaged superblock (${reading.reason}), and so is its copy: restore the member`
    case 'valid':
      break
  }
  const { uuid, memberIndex, geometry, generation } = reading.superblock
  if (uuid !== expected.uuid) {
    return `${name} is foreign: it belongs to pool ${uuid}, not to ${expected.uuid}; put the right one back`
  }
  if (memberIndex !== member.index) {
    const rightful = readings[memberIndex]
    const twice =
      typeof rightful === 'object' &&
      rightful.state === 'valid' &&
      rightful.superblock.memberIndex === memberIndex
    if (twice)
      return `${name} is a duplicate of member ${memberIndex}: put member ${member.index} back at this path`
    return `${name} is in the wrong order: it is member ${memberIndex} of this pool; swap the paths back`
  }
  if (generation < expected.generation) {
    const behind = `generation ${generation}, the pool has ${expected.generation}`
    return `${name} is stale (${behind}): it missed changes, so use the current one`
  }
  if (generation > expected.generation) {
    const ahead = `generation ${generation}, the catalog has ${expected.generation}`
    return `${name} is newer than the pool's metadata (${ahead}): restore the current metadata`
  }
  const differing = geometryDifference(geometry, expected.geometry)
  if (differing !== undefined)
    return `${name} contradicts the catalog: ${differing}; restore the matching metadata`
  const size = memberSizeOf(geometry)
  if (member.size < size) {
    const lengths = `${formatSize(member.size)} instead of ${formatSize(size)}`
    return `${name} is truncated (${lengths}): what was cut off is lost, restore it from a copy`
  }
  return undefined
}

function geometryDifference(found: Geometry, expected: Geometry): string | undefined {
  const fields = ['chunkSize', 'dataMembers', 'parityMembers', 'dataOffset', 'slots'] as const
  const field = fields.find((key) => found[key] !== expected[key])
  return field === undefined ? undefined : `its ${field} is ${found[field]}, not ${expected[field]}`
}
