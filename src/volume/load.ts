import { StoreError } from '../base/errors.ts'
import { CopyMap, copyUnitsOf } from '../metadata/copy.ts'
import { IntentMap } from '../metadata/intents.ts'
import { isCopy, type Journal, type Recovery } from '../metadata/journal.ts'
import type { MirrorRecord, VolumeRecord } from '../metadata/records.ts'
import type { TransactionalStore } from '../metadata/store.ts'
import type { SlotAllocator } from '../stripe/allocator.ts'
import type { Geometry } from '../stripe/geometry.ts'
import type { StoredMirror } from './mirror-book.ts'
import { VolumeTables } from './tables.ts'

/**
 * Brings the tables of all volumes and the copy maps of all mirrors into memory: pages from LMDB, then the journal's changes over them, then the
 * slots that they name are marked in the allocator. A slot that two owners name is damage, and nothing is opened.
 * The direct bits are set last: nothing keeps a formatted stripe from being written in place, unless intents are needed; then
 * all regions are cold.
 */
export interface LoadedVolume {
  readonly record: VolumeRecord
  readonly tables: VolumeTables
  readonly intents: IntentMap | undefined
}

export interface LoadSource {
  readonly store: TransactionalStore
  readonly journal: Journal
  readonly geometry: Geometry
}

export function loadVolumes(
  source: LoadSource,
  allocator: SlotAllocator,
): {
  readonly volumes: readonly LoadedVolume[]
  readonly mirrors: readonly StoredMirror[]
  readonly recovery: Recovery
} {
  const { store, journal, geometry } = source
  const volumes = [...store.volumes()].map((record) => loadVolume(store, record, geometry))
  const byId = new Map(volumes.map(({ record }) => [record.id, record]))
  const mirrors = [...store.mirrors()].map((record) => loadMirror(store, record, byId.get(record.volume)))
  const byMedium = new Map(volumes.map((volume) => [volume.tables.medium, volume]))
  const recovery = journal.recover(store.checkpoint())
  const maps = new Map(mirrors.map(({ map }) => [map.medium, map]))
  // Changes of a medium that is gone were made before its volume was deleted; the same holds for intents and their need, and
  // for mirrors. No number is given twice.
  for (const change of recovery.changes) byMedium.get(change.medium)?.tables.apply(change)
  for (const change of recovery.bits) {
    if (isCopy(change)) maps.get(change.medium)?.apply(change)
    else byMedium.get(change.medium)?.intents?.apply(change)
  }
  for (const { record, tables, intents } of volumes) {
    claimSlots(record, tables, allocator)
    if (intents === undefined) tables.setAllDirect()
  }
  return { volumes, mirrors, recovery }
}

/** What LMDB holds of a volume. @throws StoreError DAMAGED */
export function loadVolume(
  store: TransactionalStore,
  record: VolumeRecord,
  geometry: Geometry,
): LoadedVolume {
  const { size, formatUnit, medium } = record
  const tables = new VolumeTables(medium, { size, stripeSize: geometry.stripeSize, formatUnit })
  for (const page of store.pages(medium, 'map')) tables.loadPage('map', page.index, page.bytes)
  for (const page of store.pages(medium, 'init')) tables.loadPage('init', page.index, page.bytes)
  tables.finishLoading()
  if (record.intents === undefined) return { record, tables, intents: undefined }
  const intents = new IntentMap(medium, record.intents.regionUnits, tables.unitCount)
  for (const page of store.pages(medium, 'hot')) intents.loadPage('hot', page.index, page.bytes)
  for (const page of store.pages(medium, 'suspect')) intents.loadPage('suspect', page.index, page.bytes)
  return { record, tables, intents }
}

/** What LMDB holds of a mirror. @throws StoreError DAMAGED */
export function loadMirror(
  store: TransactionalStore,
  record: MirrorRecord,
  volume: VolumeRecord | undefined,
): StoredMirror {
  const { id, name, unitBytes } = record
  const damaged = (problem: string): StoreError =>
    new StoreError('DAMAGED', `mirror ${name} (${id}): ${problem}; run: fullstripe check POOL`)
  if (volume === undefined) throw damaged(`there is no volume ${record.volume}, which it belongs to`)
  if (!Number.isSafeInteger(unitBytes) || unitBytes <= 0)
    throw damaged(`a copy unit cannot have ${unitBytes} bytes`)
  const map = new CopyMap(id, copyUnitsOf(volume.size, unitBytes))
  for (const page of store.pages(id, 'copy')) map.loadPage(page.index, page.bytes)
  return { record, map }
}

/** @throws StoreError DAMAGED when a slot is outside the pool, named twice, or not of the kind it should be */
function claimSlots(record: VolumeRecord, tables: VolumeTables, allocator: SlotAllocator): void {
  const damaged = (slot: number, count: number, problem: string): StoreError =>
    new StoreError(
      'DAMAGED',
      `volume ${record.name}: slots ${slot}+${count} ${problem}; run: fullstripe check POOL`,
    )
  for (const { slot, count } of record.runs) {
    if (!allocator.reserve(slot, count))
      throw damaged(slot, count, 'cannot be reserved: outside the pool, or taken by another volume')
  }
  for (const { stripe, slot, count } of tables.slotRuns()) {
    if (record.provision === 'thin') {
      if (!allocator.markUsed(slot, count, 'thin'))
        throw damaged(slot, count, 'cannot be used: outside the pool, or named twice')
      continue
    }
    const wrong = misplaced(record, stripe, slot, count)
    if (wrong !== undefined) throw damaged(slot, count, `of stripe ${wrong} are not the reserved ones`)
  }
}

/** The first of `count` stripes whose slot is not the one that a thick volume reserved for it; undefined where all are. */
export function misplaced(
  record: VolumeRecord,
  stripe: number,
  slot: number,
  count: number,
): number | undefined {
  for (let done = 0; done < count; ) {
    const at = stripe + done
    const run = record.runs.find((r) => at >= r.stripe && at < r.stripe + r.count)
    if (run === undefined || run.slot + at - run.stripe !== slot + done) return at
    done += run.stripe + run.count - at
  }
  return undefined
}
