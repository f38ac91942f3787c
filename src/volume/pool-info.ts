import { statfsSync } from 'node:fs'
import { resolve } from 'node:path'
import type { PoolRecord } from '../metadata/records.ts'
import { capacityOf, type Geometry } from '../stripe/geometry.ts'

/** What a pool tells of itself. */
export interface PoolMemberInfo {
  readonly index: number
  readonly path: string
  readonly kind: 'file' | 'device'
  readonly size: number // bytes; logical for a sparse file
  readonly state: 'online' | 'failed'
}

export interface PoolInfo {
  readonly directory: string
  readonly uuid: string
  readonly version: number
  readonly members: readonly PoolMemberInfo[]
  readonly chunkSize: number
  readonly dataMembers: number
  readonly parityMembers: number
  readonly stripeSize: number
  readonly slots: number
  readonly slotsUsed: number
  readonly slotsReserved: number
  readonly capacity: number // bytes
  readonly used: number // bytes
  readonly reserved: number // bytes that thick volumes hold, used or not
  readonly fileSystemAvailable: number | null // bytes, where members are files
  readonly state: 'online' | 'read-only'
  readonly failure: string | null // why it is read-only, and what to do
}

export function poolInfo(
  directory: string,
  record: PoolRecord,
  geometry: Geometry,
  members: readonly PoolMemberInfo[],
  now: { used: number; reserved: number; failure: string | undefined } | undefined,
): PoolInfo {
  const { stripeSize } = geometry
  const used = now?.used ?? 0
  const reserved = now?.reserved ?? 0
  const file = members.find((member) => member.kind === 'file')
  return {
    directory,
    uuid: record.uuid,
    version: record.version,
    members,
    chunkSize: geometry.chunkSize,
    dataMembers: geometry.dataMembers,
    parityMembers: geometry.parityMembers,
    stripeSize,
    slots: geometry.slots - 1,
    slotsUsed: used,
    slotsReserved: reserved,
    capacity: capacityOf(geometry),
    used: used * stripeSize,
    reserved: reserved * stripeSize,
    state: now?.failure === undefined ? 'online' : 'read-only',
    failure: now?.failure ?? null,
    fileSystemAvailable: file === undefined ? null : availableAt(resolve(directory, file.path)),
  }
}

function availableAt(path: string): number | null {
  try {
    const stats = statfsSync(path)
    return stats.bavail * stats.bsize
  } catch {
    return null // the member was removed; its own state says so
  }
}
