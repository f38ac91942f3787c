import { StoreError } from '../base/errors.ts'
import { METADATA_VERSION, type PoolRecord } from '../metadata/records.ts'
import type { SlotAllocator } from '../stripe/allocator.ts'
import { type LoadedVolume, loadVolumes } from './load.ts'
import type { StoredMirror } from './mirror-book.ts'
import type { PoolParts } from './pool-parts.ts'

/**
 * What happens to a pool between its opening and its first client. Order: tables loaded, journal replayed, regions that were hot
 * when the daemon stopped made suspect, and what is suspect marked to be copied in every mirror; members synced; all of that in one transaction; then the journal begins anew.
 */
export interface RecoveredVolume extends LoadedVolume {
  readonly suspects: number // regions that were hot when the daemon stopped
}

export interface RecoveredPool {
  readonly record: PoolRecord
  readonly volumes: readonly RecoveredVolume[]
  readonly mirrors: readonly StoredMirror[]
  readonly changes: number // replayed
  readonly dropped: number // frames that no flush had covered before the machine stopped
}

/** @throws StoreError */
export async function recoverPool(parts: PoolParts, allocator: SlotAllocator): Promise<RecoveredPool> {
  const { store, journal } = parts
  const { volumes: loaded, mirrors, recovery } = loadVolumes(parts, allocator)
  const volumes = loaded.map(suspectHot)
  const byId = new Map(volumes.map((volume) => [volume.record.id, volume]))
  let marked = false
  for (const mirror of mirrors) marked = markSuspects(mirror, byId.get(mirror.record.volume)) || marked
  const record = { ...parts.record, version: METADATA_VERSION }
  const stopped = volumes.filter(({ suspects }) => suspects > 0)
  const { lastSequence } = recovery
  const replayed = lastSequence !== store.checkpoint()
  if (replayed || marked || stopped.length > 0 || record.version !== parts.record.version) {
    await syncMembers(parts)
    await store.commit({
      pool: record,
      putVolumes: stopped.map((volume) => volume.record),
      pages: [
        ...volumes.flatMap(({ tables, intents }) => [
          ...tables.takeDirtyPages(),
          ...(intents?.takeDirtyPages() ?? []),
        ]),
        ...mirrors.flatMap(({ map }) => map.takeDirtyPages()),
      ],
      sequence: lastSequence,
    })
  }
  await journal.start(lastSequence)
  return { record, volumes, mirrors, changes: recovery.changes.length, dropped: recovery.dropped }
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
 * What is suspect may have reached the secondary and not this side, or the other way round, and the records that would say so may be
 * lost: it is copied again. Also what an earlier opening found, until it is acknowledged: the mirror may be younger than that.
 * @returns whether anything was marked
 */
function markSuspects({ record, map }: StoredMirror, volume: LoadedVolume | undefined): boolean {
  if (record.role !== 'primary' || volume?.intents === undefined) return false
  const { intents, tables } = volume
  const before = map.count
  const regionBytes = intents.regionUnits * tables.unitBytes
  for (let region = intents.nextSuspect(0); region < intents.regionCount; ) {
    const end = intents.nextTrusted(region)
    map.mark(
      Math.floor((region * regionBytes) / record.unitBytes),
      Math.ceil((end * regionBytes) / record.unitBytes),
    )
    region = intents.nextSuspect(end)
  }
  return map.count > before
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
