import { messageOf, StoreError, UserError } from '../base/errors.ts'
import { type Change, isCopy, isIntent } from '../metadata/journal.ts'
import type { MetadataPage, MirrorRecord, PageKind, VolumeRecord } from '../metadata/records.ts'
import { SlotAllocator } from '../stripe/allocator.ts'
import { writeSuperblocks } from '../stripe/members.ts'
import { type LoadedVolume, loadMirror, loadVolume, misplaced } from './load.ts'
import { closeParts, openPoolParts, type PoolParts } from './pool-parts.ts'
import type { VolumeTables } from './tables.ts'

/**
 * Verifies an offline pool without guessing. What it looks at:
 *
 *   members     superblocks of every member agree with the catalog (opening them checks that), both copies intact
 *   pages       checksums; none outside its volume; none of a medium that neither a volume nor a mirror names
 *   journal     its changes fit the volumes
 *   slots       inside the pool, one owner each; a thick volume's are the reserved ones
 *   init bits   every stripe of a formatted unit has a slot; in a thin volume no other stripe has one
 *   intents     hot and suspect regions only where the volume keeps intents
 *   mirrors     their volumes exist, no name twice in one; copy units inside the volume; who writes a secondary is there
 *
 * Repair touches only what has one right answer: pages nobody names, slots nobody reads, a superblock's copy. Two owners of
 * a slot or a lost page are reported and left alone.
 */
export interface CheckFinding {
  readonly severity: 'note' | 'error'
  readonly object: string
  readonly message: string
  readonly repaired: boolean
}

export interface CheckReport {
  readonly status: 'clean' | 'repaired' | 'damaged'
  readonly findings: readonly CheckFinding[]
  readonly volumes: number
  readonly slotsUsed: number
}

export interface CheckOptions {
  readonly repair?: boolean
  readonly log?: (line: string) => void // progress, a line for each step
}

/** @throws UserError when the pool is in use or cannot be opened at all */
export async function checkPool(directory: string, options: CheckOptions = {}): Promise<CheckReport> {
  const parts = await openPoolParts(directory, 'check')
  try {
    return await checkParts(parts, options)
  } finally {
    await closeParts(parts)
  }
}

/** The same for a pool whose parts are open. They stay open, and are good for nothing else afterwards. */
export function checkParts(parts: PoolParts, options: CheckOptions = {}): Promise<CheckReport> {
  return new Check(parts, options).run()
}

class Check {
  readonly #parts: PoolParts
  readonly #repair: boolean
  readonly #log: (line: string) => void
  readonly #findings: CheckFinding[] = []
  readonly #allocator: SlotAllocator
  #slotsUsed = 0

  constructor(parts: PoolParts, options: CheckOptions) {
    this.#parts = parts
    this.#repair = options.repair === true
    this.#log = options.log ?? (() => {})
    this.#allocator = new SlotAllocator(parts.geometry.slots)
  }

  async run(): Promise<CheckReport> {
    await this.#members()
    const records = [...this.#parts.store.volumes()]
    const mirrors = [...this.#parts.store.mirrors()]
    await this.#orphans(records, mirrors)
    const changes = this.#journal()
    for (const record of records) {
      for (const { slot, count } of record.runs) {
        if (!this.#allocator.reserve(slot, count)) {
          this.#error(
            `volume ${record.name}`,
            `its reserved slots ${slot}+${count} are outside the pool or another volume's`,
          )
        }
      }
    }
    for (const record of records) {
      this.#log(`volume ${record.name}`)
      await this.#volume(record, changes.get(record.medium) ?? [])
    }
    await this.#mirrors(records, mirrors, changes)
    const errors = this.#findings.filter((finding) => finding.severity === 'error')
    const status = errors.some((finding) => !finding.repaired)
      ? 'damaged'
      : errors.length > 0
        ? 'repaired'
        : 'clean'
    return { status, findings: this.#findings, volumes: records.length, slotsUsed: this.#slotsUsed }
  }

  async #members(): Promise<void> {
    this.#log('members')
    for (const member of this.#parts.members) {
      const reading = await member.identify()
      if (reading.state !== 'valid' || reading.note === undefined) continue
      if (this.#repair) await writeSuperblocks(member, reading.superblock)
      this.#error(member.name, reading.note, this.#repair)
    }
  }

  async #orphans(records: readonly VolumeRecord[], mirrors: readonly MirrorRecord[]): Promise<void> {
    const { store } = this.#parts
    const media = store.mediaWithPages()
    const copies = new Set(mirrors.map(({ id }) => id))
    const tables = new Set(records.map(({ medium }) => medium))
    for (const medium of media) {
      if (copies.has(medium) || tables.has(medium)) continue
      if (this.#repair) await store.dropMedium(medium)
      this.#error(`medium ${medium}`, 'has pages, and no volume or mirror names it', this.#repair)
    }
    for (const medium of copies) {
      if (tables.has(medium)) this.#error(`medium ${medium}`, 'is a mirror and a volume')
      else await this.#strays(medium, ['map', 'init', 'hot', 'suspect'], `mirror ${medium}`, 'of a volume')
    }
    for (const { medium, name } of records)
      if (!copies.has(medium)) await this.#strays(medium, ['copy'], `volume ${name}`, 'of copy units')
  }

  /** Pages of kinds that a medium does not have. */
  async #strays(medium: number, kinds: readonly PageKind[], object: string, what: string): Promise<void> {
    const { store } = this.#parts
    const strays: MetadataPage[] = []
    try {
      for (const kind of kinds)
        for (const { index } of store.pages(medium, kind))
          strays.push({ medium, kind, index, bytes: undefined })
    } catch (error) {
      this.#error(object, explain(error))
      return
    }
    if (strays.length === 0) return
    if (this.#repair) await store.commit({ pages: strays })
    this.#error(object, `${strays.length} pages ${what}, which it does not have`, this.#repair)
  }

  #journal(): Map<number, Change[]> {
    this.#log('journal')
    const byMedium = new Map<number, Change[]>()
    try {
      const recovery = this.#parts.journal.recover(this.#parts.store.checkpoint())
      for (const change of [...recovery.changes, ...recovery.bits]) {
        const list = byMedium.get(change.medium) ?? []
        list.push(change)
        byMedium.set(change.medium, list)
      }
      if (recovery.changes.length > 0) {
        this.#note(
          'journal',
          `${recovery.changes.length} changes since the last checkpoint; the next opening takes them over`,
        )
      }
      if (recovery.dropped > 0) {
        this.#note(
          'journal',
          `${recovery.dropped} frames were never flushed before the machine stopped; the next opening drops them`,
        )
      }
    } catch (error) {
      this.#error('journal', explain(error))
    }
    return byMedium
  }

  async #volume(record: VolumeRecord, changes: readonly Change[]): Promise<void> {
    const object = `volume ${record.name}`
    let loaded: LoadedVolume
    try {
      loaded = loadVolume(this.#parts.store, record, this.#parts.geometry)
    } catch (error) {
      this.#error(object, explain(error))
      return
    }
    const { tables } = loaded
    await this.#intents(loaded, changes.filter(isIntent), object)
    if (!this.#unitsHaveSlots(tables, object)) return
    try {
      for (const change of changes) if (!isIntent(change) && !isCopy(change)) tables.apply(change)
    } catch (error) {
      this.#error(object, explain(error))
      return
    }
    for (const run of tables.slotRuns()) {
      this.#slotsUsed += run.count
      if (record.provision === 'thick') {
        const wrong = misplaced(record, run.stripe, run.slot, run.count)
        if (wrong !== undefined)
          this.#error(
            object,
            `stripe ${wrong} is in slot ${tables.slotOf(wrong)}, which is not the reserved one`,
          )
        continue
      }
      if (this.#allocator.markUsed(run.slot, run.count, 'thin')) continue
      for (let i = 0; i < run.count; i++) {
        if (!this.#allocator.markUsed(run.slot + i, 1, 'thin')) {
          this.#error(
            object,
            `stripe ${run.stripe + i}: slot ${run.slot + i} is outside the pool or has another owner too`,
          )
          break // one line a run tells enough
        }
      }
    }
    if (record.provision === 'thin') await this.#unreadSlots(tables, object)
  }

  async #intents(
    { record, intents }: LoadedVolume,
    changes: readonly Change[],
    object: string,
  ): Promise<void> {
    if (intents === undefined) {
      const { store } = this.#parts
      const stale = (['hot', 'suspect'] as const).flatMap((kind) =>
        [...store.pages(record.medium, kind)].map(({ index }) => ({ kind, index })),
      )
      if (stale.length === 0) return
      if (this.#repair) {
        const { medium } = record
        await store.commit({ pages: stale.map((page) => ({ ...page, medium, bytes: undefined })) })
      }
      this.#error(object, `${stale.length} pages of regions, and it keeps no intents`, this.#repair)
      return
    }
    for (const change of changes) intents.apply(change)
    const { hotCount, suspectCount } = intents
    if (hotCount > 0)
      this.#note(
        object,
        `${hotCount} regions were hot when the daemon stopped; the next opening makes them suspect`,
      )
    if (suspectCount > 0)
      this.#note(
        object,
        `${suspectCount} regions are suspect since an unclean stop; fullstripe volume map shows them`,
      )
  }

  async #mirrors(
    records: readonly VolumeRecord[],
    mirrors: readonly MirrorRecord[],
    changes: ReadonlyMap<number, readonly Change[]>,
  ): Promise<void> {
    const { store } = this.#parts
    const volumes = new Map(records.map((record) => [record.id, record]))
    const names = new Set<string>()
    for (const mirror of mirrors) {
      const volume = volumes.get(mirror.volume)
      const object = `mirror ${mirror.name}`
      if (volume === undefined) {
        if (this.#repair) await store.commit({ dropMirrors: [mirror] })
        this.#error(object, `there is no volume ${mirror.volume}, which it belongs to`, this.#repair)
        continue
      }
      const name = `${mirror.name} of volume ${volume.name}`
      if (names.has(name)) this.#error(`mirror ${name}`, 'there is another one of this name')
      names.add(name)
      try {
        const { map } = loadMirror(store, mirror, volume)
        for (const change of changes.get(mirror.id) ?? []) if (isCopy(change)) map.apply(change)
      } catch (error) {
        this.#error(`mirror ${name}`, explain(error))
      }
    }
    for (const { name, id, secondaryOf } of records) {
      if (secondaryOf === undefined) continue
      if (mirrors.some((mirror) => mirror.id === secondaryOf && mirror.volume === id)) continue
      this.#error(
        `volume ${name}`,
        `it says that mirror ${secondaryOf} writes it, and there is no such mirror: clients can only read it`,
      )
    }
  }

  #unitsHaveSlots(tables: VolumeTables, object: string): boolean {
    for (let unit = tables.init.nextSet(0); unit < tables.unitCount; unit = tables.init.nextSet(unit + 1)) {
      const { first, count } = tables.unitStripes(unit)
      for (let stripe = first; stripe < first + count; stripe++) {
        if (tables.slotOf(stripe) !== 0) continue
        this.#error(object, `stripe ${stripe} is formatted and has no slot: its content is lost`)
        return false
      }
    }
    return true
  }

  async #unreadSlots(tables: VolumeTables, object: string): Promise<void> {
    let unread = 0
    for (const run of [...tables.slotRuns()]) {
      for (let stripe = run.stripe; stripe < run.stripe + run.count; stripe++) {
        if (tables.init.get(tables.unitOf(stripe))) continue
        unread++
        if (this.#repair) tables.setSlots(stripe, 1, 0)
      }
    }
    if (unread === 0) return
    if (this.#repair) {
      // The pages hold what the journal says too, so its data becomes durable first (ledger, rule 1).
      for (const member of this.#parts.members) await member.sync()
      const pages: MetadataPage[] = tables.takeDirtyPages()
      await this.#parts.store.commit({ pages })
    }
    this.#error(object, `${unread} slots are taken by stripes that are not formatted`, this.#repair)
  }

  #error(object: string, message: string, repaired = false): void {
    this.#findings.push({ severity: 'error', object, message, repaired })
  }

  #note(object: string, message: string): void {
    this.#findings.push({ severity: 'note', object, message, repaired: false })
  }
}

/** Damage is a finding; anything else is not for `check` to explain away. */
function explain(error: unknown): string {
  if (error instanceof StoreError || error instanceof UserError) return messageOf(error)
  throw error
}
