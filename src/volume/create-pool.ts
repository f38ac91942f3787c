import { randomUUID } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, rmSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { messageOf, UserError } from '../base/errors.ts'
import { acquireLock, type LockFile } from '../base/lock-file.ts'
import { createJournalFile } from '../metadata/journal.ts'
import { METADATA_VERSION, type PoolRecord } from '../metadata/records.ts'
import { MetadataStore } from '../metadata/store.ts'
import { createMembers } from '../stripe/create-members.ts'
import { type PoolInfo, poolInfo } from './pool-info.ts'
import { poolPaths } from './pool-parts.ts'

export interface PoolCreateOptions {
  readonly members?: readonly string[]
  readonly parity?: 0 | 1 | 2
  readonly chunkSize?: number // bytes
  readonly capacity?: number // bytes
}

/** @throws UserError EXISTS, USAGE, REFUSED or FAILED; what it had made is removed again */
export async function createPool(directory: string, options: PoolCreateOptions = {}): Promise<PoolInfo> {
  const at = resolve(directory)
  const files = poolPaths(at)
  const existed = existsSync(at)
  let lock: LockFile
  try {
    // Not recursive without need: then a read-only file system would be told of as a missing directory.
    if (!existed) mkdirSync(at, { recursive: !existsSync(dirname(at)), mode: 0o700 })
    assertEmpty(at) // before the lock file is made in somebody's directory
    lock = acquireLock(files.lock, 'pool create')
  } catch (error) {
    if (error instanceof UserError) throw error
    throw new UserError('FAILED', `cannot make the pool directory ${at}: ${messageOf(error)}`, {
      cause: error,
    })
  }
  // From here on everything in the directory but the lock file is ours to remove.
  let undoMembers: (() => Promise<void>) | undefined
  let mine = false
  try {
    assertEmpty(at) // under the lock: another creation may have finished in between
    mine = true
    const uuid = randomUUID()
    const created = new Date()
    const made = await createMembers({
      directory: at,
      uuid,
      created: created.getTime(),
      ...(options.members === undefined ? {} : { paths: options.members }),
      ...(options.parity === undefined ? {} : { parity: options.parity }),
      ...(options.chunkSize === undefined ? {} : { chunkSize: options.chunkSize }),
      ...(options.capacity === undefined ? {} : { capacity: options.capacity }),
    })
    undoMembers = made.undo
    for (const path of files.journals) createJournalFile(path)
    const record: PoolRecord = {
      version: METADATA_VERSION,
      uuid,
      created: created.toISOString(),
      chunkSize: made.geometry.chunkSize,
      dataMembers: made.geometry.dataMembers,
      parityMembers: made.geometry.parityMembers,
      dataOffset: made.geometry.dataOffset,
      slots: made.geometry.slots,
      generation: made.generation,
      members: made.members.map((member) => member.path),
    }
    mkdirSync(files.metadata, { mode: 0o700 })
    const store = await MetadataStore.create(files.metadata, record)
    await store.close()
    await made.keep()
    return poolInfo(
      at,
      record,
      made.geometry,
      made.members.map((m) => ({ ...m, state: 'online' as const })),
      undefined,
    )
  } catch (error) {
    await undoMembers?.()
    if (mine) {
      for (const path of [...files.journals, files.metadata]) rmSync(path, { recursive: true, force: true })
      // The lock file stays in a directory that was there before: whoever unlinks a lock lets a third process in.
      if (!existed) rmSync(at, { recursive: true, force: true })
    }
    if (error instanceof UserError) throw error
    throw new UserError('FAILED', `cannot create the pool ${at}: ${messageOf(error)}`, { cause: error })
  } finally {
    lock.release()
  }
}

function assertEmpty(directory: string): void {
  if (readdirSync(directory).some((name) => name !== 'lock' && name !== 'lost+found')) {
    throw new UserError('EXISTS', `${directory} is not empty: give a new or an empty directory for the pool`)
  }
}
