import { StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatSize } from '../base/sizes.ts'
import type { ExportId } from '../datapath/datapath.ts'
import type { IntentMap } from '../metadata/intents.ts'
import type { SlotRun, VolumeRecord } from '../metadata/records.ts'
import type { Commit } from '../metadata/store.ts'
import type { FreedRun } from './freed-runs.ts'
import type { VolumeIntents } from './intents.ts'
import type { VolumePolicy } from './policy.ts'
import type { VolumeTables } from './tables.ts'
import type { VolumeHost } from './volume-host.ts'

/**
 * Another size for a volume that is being served. Growing needs nothing of its clients; what reaches past a new, smaller end is refused
 * from the beginning on. The size is what the transaction says: one that fails leaves everything as it was.
 */
export interface ResizedVolume {
  readonly host: VolumeHost
  readonly policy: VolumePolicy
  readonly exportId: ExportId
  record(): VolumeRecord
  tables(): VolumeTables
  intentMap(): IntentMap | undefined
  intents(): VolumeIntents | undefined
  adopt(tables: VolumeTables): void
  /** Stores the changed record with what `prepare` returns, in one transaction. */
  store(
    change: Partial<VolumeRecord>,
    prepare: (putVolumes: VolumeRecord[]) => Commit,
    undo: () => void,
  ): Promise<void>
}

export async function grow(v: ResizedVolume, size: number): Promise<void> {
  const old = v.tables()
  const stripeCount = Math.ceil(size / v.host.stripeSize)
  const cut = old.unitCount - 1
  // Where the old end cut a formatted unit short, the stripes that the new end adds to it are formatted now, before
  // anybody can reach them: an init bit speaks for all stripes of its unit.
  const missing = Math.max(0, Math.min((cut + 1) * old.formatUnit, stripeCount) - old.stripeCount)
  const runs = [...v.record().runs]
  let added: SlotRun | undefined
  if (v.record().provision === 'thick' && stripeCount > old.stripeCount) {
    const count = stripeCount - old.stripeCount
    added = { stripe: old.stripeCount, count, slot: await v.host.reserveRun(count) }
    runs.push(added)
  }
  let slots: number[] = []
  try {
    await v.policy.withUnit(cut, async () => {
      if (missing > 0 && old.init.get(cut)) {
        slots =
          v.record().provision === 'thick'
            ? slotsOf(runs, old.stripeCount, missing)
            : await v.host.allocate(old.stripeCount, missing)
        const blank = Buffer.alloc(v.host.stripeSize, v.record().fill)
        for (const slot of slots) await v.host.datapath.writeSlot(slot, 0, blank)
      }
      let undoIntents = (): void => {}
      let undoMaps = undoIntents
      await v.store(
        { size, runs },
        (putVolumes) => {
          const next = old.resized(size)
          undoIntents = v.intentMap()?.resize(next.unitCount) ?? undoIntents
          undoMaps = v.host.resizeMaps(size)
          next.follow(old) // the datapath looks at the old ones until `retable`
          slots.forEach((slot, index) => {
            next.setSlots(old.stripeCount + index, 1, slot)
          })
          v.adopt(next)
          return { putVolumes }
        },
        () => {
          undoIntents()
          undoMaps()
          v.tables().unfollow()
          v.adopt(old)
        },
      )
    })
  } catch (error) {
    if (added !== undefined) v.host.unreserveRun(added.slot, added.count)
    else v.host.unallocate(slots)
    throw error
  }
  await v.host.datapath.retable(v.exportId, v.tables().exportTables)
  v.tables().unfollow()
}

/**
 * What reaches past the new end is refused first. Then it is waited for everything that was begun before, and only then are
 * stripes released and tables exchanged: a write past the end that is still being formatted would take a slot that no
 * table names. A shrink that cannot be stored leaves the volume as large as it was.
 */
export async function shrink(v: ResizedVolume, size: number): Promise<void> {
  const old = v.tables()
  const next = old.resized(size)
  const freed: FreedRun[] = []
  const unreserved: SlotRun[] = []
  old.follow(next)
  v.policy.limit(size)
  try {
    await v.host.datapath.retable(v.exportId, next.exportTables)
    await v.policy.releaseFrom(next.unitCount)
    await v.policy.withUnit(next.unitCount - 1, async () => {
      await blankTail(v, next)
      const runs: SlotRun[] = []
      for (const run of v.record().runs) {
        const keep = Math.max(0, Math.min(run.count, next.stripeCount - run.stripe))
        if (keep > 0) runs.push({ ...run, count: keep })
        if (keep < run.count)
          unreserved.push({ stripe: run.stripe + keep, count: run.count - keep, slot: run.slot + keep })
      }
      let undoIntents = (): void => {}
      let undoMaps = undoIntents
      await v.store(
        { size, runs },
        (putVolumes) => {
          undoIntents = v.intentMap()?.resize(next.unitCount) ?? undoIntents
          undoMaps = v.host.resizeMaps(size)
          const cutEnd = Math.min(old.stripeCount, next.unitCount * old.formatUnit)
          for (let stripe = next.stripeCount; stripe < cutEnd; stripe++) {
            if (old.slotOf(stripe) !== 0 && v.record().provision === 'thin') {
              freed.push({ slot: old.slotOf(stripe), count: 1, owner: 'thin' })
            }
          }
          old.unfollow()
          next.follow(old) // where this cannot be stored, the old tables have to be as good as ever
          v.adopt(next)
          return { putVolumes, pages: old.pagesPast(next) }
        },
        () => {
          undoIntents()
          undoMaps()
          next.unfollow()
          old.follow(next)
          v.adopt(old)
        },
      )
      next.unfollow()
      v.intents()?.drop(v.intentMap()?.regionCount)
    })
  } catch (error) {
    v.policy.useTables(old)
    await v.host.datapath.retable(v.exportId, old.exportTables)
    old.unfollow()
    throw error
  }
  v.host.freeLater(freed, 0) // the transaction is durable already
  for (const run of unreserved) v.host.unreserveRun(run.slot, run.count)
}

/** A later growth must find formatting data in the last stripe, not what was cut off. */
async function blankTail(v: ResizedVolume, tables: VolumeTables): Promise<void> {
  const last = tables.stripeCount - 1
  const tail = tables.size - last * v.host.stripeSize
  if (tables.slotOf(last) === 0 || tail === v.host.stripeSize) return
  const blank = Buffer.alloc(v.host.stripeSize - tail, v.record().fill)
  // A change like any other, should the shrink fail: announced first.
  const region = await v.intents()?.pin(tables.unitOf(last))
  try {
    await v.host.datapath.writeSlot(tables.slotOf(last), tail, blank)
  } finally {
    if (region !== undefined) v.intents()?.unpin(region)
  }
}

/** The slots that a thick volume reserved for stripes [first, first + count). */
export function slotsOf(runs: readonly SlotRun[], first: number, count: number): number[] {
  const slots: number[] = []
  for (let stripe = first; stripe < first + count; stripe++) {
    const run = runs.find((r) => stripe >= r.stripe && stripe < r.stripe + r.count)
    if (run === undefined) throw new StoreError('DAMAGED', `no slot is reserved for stripe ${stripe}`)
    slots.push(run.slot + stripe - run.stripe)
  }
  return slots
}

/** @throws UserError USAGE that names what is wrong with the size */
export function checkVolumeSize(size: number, stripeSize: number, what: string): void {
  const max = LIMITS.stripesPerVolumeMax * stripeSize
  if (!Number.isSafeInteger(size) || size <= 0)
    throw new UserError('USAGE', `${what}: the size has to be larger than zero, not ${size}`)
  if (size % LIMITS.sectorSize !== 0) {
    throw new UserError('USAGE', `${what}: the size ${size} is not a multiple of ${LIMITS.sectorSize} bytes`)
  }
  if (size > max)
    throw new UserError(
      'USAGE',
      `${what}: the size ${formatSize(size)} is beyond the limit of ${formatSize(max)}`,
    )
}
