import { StoreError } from '../base/errors.ts'
import type { Journal } from '../metadata/journal.ts'
import type { VolumeRecord } from '../metadata/records.ts'
import type { MetadataStore } from '../metadata/store.ts'
import type { SlotAllocator } from '../stripe/allocator.ts'
import type { Geometry } from '../stripe/geometry.ts'
import { VolumeTables } from './tables.ts'

/**
 * Brings the tables of all volumes into memory: pages from LMDB, then the journal's changes over them, then the
 * slots that they name are marked in the allocator. A slot that two owners name is damage, and nothing is opened.
 * The direct bits are set last: nothing in this release keeps a formatted stripe from being written in place.
 */
export interface LoadedTables {
  readonly records: readonly VolumeRecord[]
  readonly tables: readonly VolumeTables[] // same order
  readonly lastSequence: number // of the journal
  readonly recovered: number // changes replayed
  readonly dropped: number // frames that no flush had covered before the machine stopped
}

export interface LoadSource {
  readonly store: MetadataStore
  readonly journal: Journal
  readonly geometry: Geometry
}

export function loadTables(source: LoadSource, allocator: SlotAllocator): LoadedTables {
  const { store, journal, geometry } = source
  const records = [...store.volumes()]
  const tables = records.map((record) => loadVolume(store, record, geometry))
  const byMedium = new Map(tables.map((table) => [table.medium, table]))
  const recovery = journal.recover(store.checkpoint())
  // Changes of a medium that is gone were made before its volume was deleted.
  for (const change of recovery.changes) byMedium.get(change.medium)?.apply(change)
  records.forEach((record, index) => {
    const table = tables[index]
    if (table === undefined) return
    claimSlots(record, table, allocator)
    table.setAllDirect()
  })
  return {
    records,
    tables,
    lastSequence: recovery.lastSequence,
    recovered: recovery.changes.length,
    dropped: recovery.dropped,
  }
}

function loadVolume(store: MetadataStore, record: VolumeRecord, geometry: Geometry): VolumeTables {
  const { size, formatUnit, medium } = record
  const tables = new VolumeTables(medium, { size, stripeSize: geometry.stripeSize, formatUnit })
  for (const page of store.pages(medium, 'map')) tables.loadPage('map', page.index, page.bytes)
  for (const page of store.pages(medium, 'init')) tables.loadPage('init', page.index, page.bytes)
  tables.finishLoading()
  return tables
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
