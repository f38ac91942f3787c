import { existsSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { messageOf, StoreError, systemCode, UserError } from '../base/errors.ts'
import { acquireLock, type LockFile } from '../base/lock-file.ts'
import { Journal, openJournalFile } from '../metadata/journal.ts'
import type { PoolRecord } from '../metadata/records.ts'
import { MetadataStore, type TransactionalStore } from '../metadata/store.ts'
import type { Geometry } from '../stripe/geometry.ts'
import type { Member } from '../stripe/member.ts'
import { openMembers } from '../stripe/members.ts'

/**
 * A pool is one directory: metadata, two journal files, a lock, and members inside it or elsewhere.
 *
 *   POOL/lock  POOL/metadata/  POOL/journal-0  POOL/journal-1  POOL/member-0 ...
 */
export const poolPaths = (directory: string) => ({
  lock: join(directory, 'lock'),
  metadata: join(directory, 'metadata'),
  journals: [join(directory, 'journal-0'), join(directory, 'journal-1')] as const,
})

/** Everything of a pool that an opening needs before volumes exist; `check` uses it too. */
export interface PoolParts {
  readonly directory: string
  readonly lock: LockFile
  readonly record: PoolRecord
  readonly geometry: Geometry
  readonly members: readonly Member[]
  readonly memberNotes: readonly string[]
  readonly store: TransactionalStore
  readonly journal: Journal
}

/** Locks and opens, changing nothing. @throws UserError that names what is missing, foreign, busy or damaged */
export async function openPoolParts(directory: string, what: string): Promise<PoolParts> {
  const at = resolve(directory)
  const files = poolPaths(at)
  if (!existsSync(files.metadata)) {
    const problem = existsSync(at) ? 'is not a pool (no metadata in it)' : 'does not exist'
    throw new UserError('NOT_FOUND', `${at} ${problem}: create one with: fullstripe pool create ${directory}`)
  }
  const lock = acquireLock(files.lock, what)
  let store: MetadataStore | undefined
  let members: readonly Member[] = []
  try {
    store = await MetadataStore.open(files.metadata)
    const record = store.pool()
    const { chunkSize, dataMembers, parityMembers, dataOffset, slots } = record
    const geometry: Geometry = {
      chunkSize,
      dataMembers,
      parityMembers,
      dataOffset,
      slots,
      stripeSize: chunkSize * dataMembers,
    }
    const opened = await openMembers(at, record.members, {
      uuid: record.uuid,
      generation: record.generation,
      geometry,
    })
    members = opened.members
    const journal = new Journal([openJournalFile(files.journals[0]), openJournalFile(files.journals[1])], {
      pool: record.uuid,
      bootId: readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim(),
    })
    return { directory: at, lock, record, geometry, members, memberNotes: opened.notes, store, journal }
  } catch (error) {
    await Promise.all(members.map((member) => member.close()))
    await store?.close()
    lock.release()
    if (error instanceof UserError) throw error
    const hint = systemCode(error) === 'EROFS' ? '; the file system is read-only: remount it read-write' : ''
    throw new UserError('FAILED', `cannot open the pool ${at}: ${messageOf(error)}${hint}`, { cause: error })
  }
}

export async function closeParts(parts: PoolParts): Promise<void> {
  parts.journal.close()
  await parts.store.close()
  await Promise.all(parts.members.map((member) => member.close()))
  parts.lock.release()
}

/** For a datapath that works on descriptors. */
export function descriptorOf(member: Member): number {
  if (member.fd === undefined)
    throw new StoreError('NOT_SUPPORTED', `${member.name} has no file descriptor for the datapath`)
  return member.fd
}
