import { StoreError } from '../base/errors.ts'
import { METADATA_VERSION, type PoolRecord } from '../metadata/records.ts'
import type { SlotAllocator } from '../stripe/allocator.ts'
import { type LoadedVolume, loadVolumes } from './load.ts'
import type { PoolParts } from './pool-parts.ts'

/**
 * What happens to a pool between its opening and its first client. Order: tables loaded, journal replayed, regions that were hot
 * when the daemon stopped made suspect; members synced; all of that in one transaction; then the journal begins anew.
 */
export interface RecoveredVolume extends LoadedVolume {
  readonly suspects: number // regions that were hot when the daemon stopped
}

export interface RecoveredPool {
  readonly record: PoolRecord
  readonly volumes: readonly RecoveredVolume[]
  readonly changes: number // replayed
  readonly dropped: number // frames that no flush had covered before the machine stopped
}

/** @throws StoreError */
export async function recoverPool(parts: PoolParts, allocator: SlotAllocator): Promise<RecoveredPool> {
  const { store, journal } = parts
  const { volumes: loaded, recovery } = loadVolumes(parts, allocator)
  const volumes = loaded.map(suspectHot)
  const record = { ...parts.record, version: METADATA_VERSION }
  const stopped = volumes.filter(({ suspects }) => suspects > 0)
  const { lastSequence } = recovery
  if (lastSequence !== store.checkpoint() || stopped.length > 0 || record.version !== parts.record.version) {
    await syncMembers(parts)
    await store.commit({
      pool: record,
      putVolumes: stopped.map((volume) => volume.record),
      pages: volumes.flatMap(({ tables, intents }) => [
        ...tables.takeDirtyPages(),
        ...(intents?.takeDirtyPages() ?? []),
      ]),
      sequence: lastSequence,
    })
  }
  await journal.start(lastSequence)
  return { record, volumes, changes: recovery.changes.length, dropped: recovery.dropped }
}

function suspectHot(volume: LoadedVolume): RecoveredVolume {
  const suspects = volume.intents?.suspectHot() ?? 0
  const { intents } = volume.record
  if (suspects === 0 || intents === undefined) return { ...volume, suspects }
  const since = intents.since ?? new Date().toISOString()
  return {
    ...volume,
    record: { ...volume.record, intents: { ...intents, stops: intents.stops + 1, since } },
    suspects,
  }
}

/**
 * What the journal brought back may speak of data that only the page cache holds: it becomes durable before any commit (ledger,
 * rule 1). Where that fails, the next opening must not take the page cache for good.
 */
async function syncMembers({ members, journal }: PoolParts): Promise<void> {
  try {
    for (const member of members) await member.sync()
  } catch (error) {
    try {
      journal.distrust()
    } catch (untold) {
      if (!(untold instanceof StoreError)) throw untold // the error to report is the first one
    }
    throw error
  }
}
