import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import { StoreError } from '../base/errors.ts'
import type { ExportTables } from '../datapath/datapath.ts'
import { CHANGE, type Change } from '../metadata/journal.ts'
import {
  INIT_PAGE_BITS,
  MAP_PAGE_ENTRIES,
  type MetadataPage,
  type PageKind,
  type SlotRun,
} from '../metadata/records.ts'

/**
 * A volume's tables: stripe -> slot, init bitmap, direct bitmap, and which of their pages LMDB lacks.
 *
 *   init  slot  direct
 *    0     0      0     formatting data; nothing is stored
 *    0     s      0     thick, trimmed: slot s stays reserved, its content is never read
 *    1     s      0     content in slot s; a write asks the policy
 *    1     s      1     content in slot s; a write goes in place
 *    any other combination is a bug
 *
 * I/O threads read these while this thread writes them. On the way up: slot, then init, then direct. On the way
 * down: direct, (barrier), init, then slot. So a reader that sees a bit also sees what the bit promises.
 */
export interface TableShape {
  readonly size: number // bytes
  readonly stripeSize: number // bytes
  readonly formatUnit: number // stripes
}

export class VolumeTables {
  readonly medium: number
  readonly size: number
  readonly stripeSize: number
  readonly formatUnit: number
  readonly stripeCount: number
  readonly unitCount: number
  readonly slots: Uint32Array
  readonly init: Bitmap
  readonly direct: Bitmap // changed here only
  readonly #dirtyMap: Bitmap
  readonly #dirtyInit: Bitmap
  /** Map pages that ever held a slot: a walk over the slots of a large volume looks at these only. */
  readonly #usedMap: Bitmap
  #dirtyCount = 0
  #formattedUnits = 0
  #mappedStripes = 0
  #anyDirect = false // a direct bit may be 1
  /** Whether direct bits of a unit may be 1 (DESIGN invariant 1). */
  #mayOpen: ((unit: number) => boolean) | undefined
  /** While the datapath moves over to larger or smaller tables, every change goes to these too. */
  #follower: VolumeTables | undefined

  constructor(medium: number, shape: TableShape) {
    this.medium = medium
    this.size = shape.size
    this.stripeSize = shape.stripeSize
    this.formatUnit = shape.formatUnit
    this.stripeCount = Math.ceil(shape.size / shape.stripeSize)
    this.unitCount = Math.ceil(this.stripeCount / shape.formatUnit)
    this.slots = new Uint32Array(this.stripeCount)
    this.init = new Bitmap(this.unitCount)
    this.direct = new Bitmap(this.stripeCount)
    this.#dirtyMap = new Bitmap(Math.ceil(this.stripeCount / MAP_PAGE_ENTRIES))
    this.#dirtyInit = new Bitmap(Math.ceil(this.unitCount / INIT_PAGE_BITS))
    this.#usedMap = new Bitmap(this.#dirtyMap.length)
  }

  get exportTables(): ExportTables {
    return { size: this.size, slots: this.slots, init: this.init.words, direct: this.direct.words }
  }

  get formattedUnits(): number {
    return this.#formattedUnits
  }

  /** Stripes that have a slot, formatted or (thick, trimmed) reserved. */
  get mappedStripes(): number {
    return this.#mappedStripes
  }

  get dirtyPages(): number {
    return this.#dirtyCount
  }

  get unitBytes(): number {
    return this.formatUnit * this.stripeSize
  }

  /** Bytes of a unit that lie inside the volume. */
  bytesOf(unit: number): number {
    return Math.min(this.unitBytes, this.size - unit * this.unitBytes)
  }

  slotOf(stripe: number): number {
    assert(stripe < this.stripeCount, 'stripe past the end of the volume')
    return this.slots[stripe] ?? 0
  }

  unitOf(stripe: number): number {
    return Math.floor(stripe / this.formatUnit)
  }

  /** The stripes of a unit; the last unit may be cut short by the end of the volume. */
  unitStripes(unit: number): { first: number; count: number } {
    const first = unit * this.formatUnit
    return { first, count: Math.min(this.formatUnit, this.stripeCount - first) }
  }

  setSlots(first: number, count: number, slot: number): void {
    for (let i = 0; i < count; i++) {
      const before = this.slotOf(first + i)
      const after = slot === 0 ? 0 : slot + i
      if (before === 0 && after !== 0) this.#mappedStripes++
      if (before !== 0 && after === 0) this.#mappedStripes--
      Atomics.store(this.slots, first + i, after)
    }
    for (let page = Math.floor(first / MAP_PAGE_ENTRIES); page * MAP_PAGE_ENTRIES < first + count; page++) {
      this.#touch(this.#dirtyMap, page)
      if (slot !== 0) this.#usedMap.set(page)
    }
    this.#follower?.clip(first, count, (from, n) => this.#follower?.setSlots(from, n, slot))
  }

  /**
   * Stripes [first, first + count) get the slots in `others` from `at` on, which gets theirs: done twice, all is as it was. Nobody changes
   * the size of the volume meanwhile.
   */
  exchangeSlots(first: number, count: number, others: Uint32Array, at: number): void {
    assert(first + count <= this.stripeCount, 'stripe past the end of the volume')
    assert(at + count <= others.length, 'slots to exchange')
    assert(this.#follower === undefined, 'slots are exchanged while the volume gets another size')
    let used = 0
    for (let i = 0; i < count; i++) {
      const after = others[at + i] ?? 0
      const before = Atomics.exchange(this.slots, first + i, after)
      others[at + i] = before
      used |= after
      this.#mappedStripes += (after === 0 ? 0 : 1) - (before === 0 ? 0 : 1)
    }
    for (let page = Math.floor(first / MAP_PAGE_ENTRIES); page * MAP_PAGE_ENTRIES < first + count; page++) {
      this.#touch(this.#dirtyMap, page)
      if (used !== 0) this.#usedMap.set(page)
    }
  }

  /** Units [unit, unit + count). */
  setFormatted(unit: number, count = 1): void {
    const end = unit + count
    const more = count - this.init.count(unit, end)
    if (more === 0) return
    const last = this.unitStripes(end - 1)
    for (let stripe = unit * this.formatUnit; stripe < last.first + last.count; stripe++)
      assert(this.slotOf(stripe) !== 0, 'init bit without a slot')
    this.init.setRange(unit, end)
    this.#formattedUnits += more
    this.#touchInit(unit, end)
    this.#follower?.clipUnits(unit, end, (n) => this.#follower?.setFormatted(unit, n))
  }

  /** Units [unit, unit + count). */
  setReleased(unit: number, count = 1): void {
    const end = unit + count
    const fewer = this.init.count(unit, end)
    if (fewer === 0) return
    assert(this.areClear(unit, count), 'direct bit without init')
    this.init.clearRange(unit, end)
    this.#formattedUnits -= fewer
    this.#touchInit(unit, end)
    this.#follower?.clipUnits(unit, end, (n) => this.#follower?.setReleased(unit, n))
  }

  /** From now on direct bits are set only where `mayOpen` says yes. */
  guardDirect(mayOpen: (unit: number) => boolean): void {
    this.#mayOpen = mayOpen
    this.#follower?.guardDirect(mayOpen)
  }

  /** From now on writes to the unit go in place (DESIGN invariant 1). */
  setDirect(unit: number): void {
    const { first, count } = this.unitStripes(unit)
    assert(this.init.get(unit), 'direct bit without init')
    assert(this.#mayOpen?.(unit) !== false, 'direct bit where a write needs a decision')
    this.#anyDirect = true
    this.direct.setRange(first, first + count)
    if (this.#follower !== undefined && unit < this.#follower.unitCount) this.#follower.setDirect(unit)
  }

  /** The same for every formatted unit, as at load: run by run, because there may be millions. */
  setAllDirect(): void {
    for (let unit = this.init.nextSet(0); unit < this.unitCount; ) {
      const end = this.init.nextClear(unit)
      this.#anyDirect = true
      this.direct.setRange(unit * this.formatUnit, Math.min(end * this.formatUnit, this.stripeCount))
      unit = this.init.nextSet(end)
    }
  }

  clearDirect(unit: number): void {
    const { first, count } = this.unitStripes(unit)
    this.direct.clearRange(first, first + count)
    if (this.#follower !== undefined && unit < this.#follower.unitCount) this.#follower.clearDirect(unit)
  }

  /** The same for all of [unit, unit + count); units past the end are ignored. */
  clearDirectUnits(unit: number, count: number): void {
    const end = Math.min((unit + count) * this.formatUnit, this.stripeCount)
    const first = Math.min(unit * this.formatUnit, end)
    if (this.#anyDirect) this.direct.clearRange(first, end)
    if (first === 0 && end === this.stripeCount) this.#anyDirect = false
    this.#follower?.clearDirectUnits(unit, count)
  }

  /** Whether no write to units [unit, unit + count) goes in place. */
  areClear(unit: number, count: number): boolean {
    const end = Math.min((unit + count) * this.formatUnit, this.stripeCount)
    const first = Math.min(unit * this.formatUnit, end)
    return this.direct.nextSet(first, end) === end
  }

  /** Runs `action` on the part of [first, first + count) stripes that this volume has. */
  clip(first: number, count: number, action: (first: number, count: number) => void): void {
    const end = Math.min(first + count, this.stripeCount)
    if (end > first) action(first, end - first)
  }

  /** Runs `action` on how many of the units [unit, end) this volume has. */
  clipUnits(unit: number, end: number, action: (count: number) => void): void {
    const count = Math.min(end, this.unitCount) - unit
    if (count > 0) action(count)
  }

  /** Replays one journal record (recovery). Idempotent. @throws StoreError DAMAGED when it does not fit the volume */
  apply(change: Change): void {
    const bound = change.op === CHANGE.slots ? this.stripeCount : this.unitCount
    const end = change.first + change.count
    // A record from before a forced shrink may reach past the end.
    const stop = Math.min(end, bound)
    switch (change.op) {
      case CHANGE.slots:
        if (stop > change.first) this.setSlots(change.first, stop - change.first, change.slot)
        return
      case CHANGE.formatted:
        for (let unit = change.first; unit < stop; unit++) {
          if (!this.#hasSlots(unit)) {
            const what = `unit ${unit} of medium ${this.medium} is formatted and has no slots`
            throw new StoreError('DAMAGED', `journal: ${what}; run: fullstripe check POOL`)
          }
          this.setFormatted(unit)
        }
        return
      case CHANGE.released:
        if (stop > change.first) this.setReleased(change.first, stop - change.first)
        return
      default:
        throw new StoreError(
          'DAMAGED',
          `journal: unknown record ${change.op} for medium ${this.medium}; use a newer fullstripe`,
        )
    }
  }

  #hasSlots(unit: number): boolean {
    const { first, count } = this.unitStripes(unit)
    for (let stripe = first; stripe < first + count; stripe++) if (this.slotOf(stripe) === 0) return false
    return true
  }

  /** Takes over a stored page. @throws StoreError DAMAGED when it lies outside the volume */
  loadPage(kind: PageKind, index: number, bytes: Buffer): void {
    const words = new Uint32Array(
      bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + (bytes.length & ~3)),
    )
    const target = kind === 'map' ? this.slots : this.init.words
    const at = kind === 'map' ? index * MAP_PAGE_ENTRIES : (index * INIT_PAGE_BITS) / 32
    if (index < 0 || at >= target.length) {
      throw new StoreError(
        'DAMAGED',
        `metadata: ${kind} page ${index} of medium ${this.medium} lies past the end of its volume`,
      )
    }
    if (kind === 'map') this.#usedMap.set(index)
    target.set(at + words.length > target.length ? words.subarray(0, target.length - at) : words, at)
  }

  /** After all pages are loaded: counts. */
  finishLoading(): void {
    this.#formattedUnits = this.init.count()
    let mapped = 0
    for (const run of this.slotRuns()) mapped += run.count
    this.#mappedStripes = mapped
  }

  /** All slots of the volume as runs: stripes and slots both consecutive. */
  *slotRuns(): Generator<SlotRun> {
    let run = { stripe: 0, count: 0, slot: 0 }
    for (
      let page = this.#usedMap.nextSet(0);
      page < this.#usedMap.length;
      page = this.#usedMap.nextSet(page + 1)
    ) {
      const end = Math.min((page + 1) * MAP_PAGE_ENTRIES, this.stripeCount)
      for (let stripe = page * MAP_PAGE_ENTRIES; stripe < end; stripe++) {
        const slot = this.slots[stripe] ?? 0
        if (slot === 0) continue
        if (run.count > 0 && run.stripe + run.count === stripe && run.slot + run.count === slot) {
          run.count++
        } else {
          if (run.count > 0) yield run
          run = { stripe, count: 1, slot }
        }
      }
    }
    if (run.count > 0) yield run
  }

  takeDirtyPages(): MetadataPage[] {
    const pages: MetadataPage[] = []
    const take = (kind: PageKind, dirty: Bitmap, words: Uint32Array, wordsPerPage: number): void => {
      for (let index = dirty.nextSet(0); index < dirty.length; index = dirty.nextSet(index + 1)) {
        const part = words.subarray(index * wordsPerPage, (index + 1) * wordsPerPage)
        const used = part.some((word) => word !== 0)
        pages.push({ medium: this.medium, kind, index, bytes: used ? copyBytes(part) : undefined })
        dirty.clear(index)
      }
    }
    take('map', this.#dirtyMap, this.slots, MAP_PAGE_ENTRIES)
    take('init', this.#dirtyInit, this.init.words, INIT_PAGE_BITS / 32)
    this.#dirtyCount = 0
    return pages
  }

  /** Removals for the stored pages that lie past the end of `next`. */
  pagesPast(next: VolumeTables): MetadataPage[] {
    const pages: MetadataPage[] = []
    for (let index = next.#dirtyMap.length; index < this.#usedMap.length; index++) {
      index = this.#usedMap.nextSet(index)
      if (index < this.#usedMap.length)
        pages.push({ medium: this.medium, kind: 'map', index, bytes: undefined })
    }
    for (let index = next.#dirtyInit.length; index < this.#dirtyInit.length; index++) {
      pages.push({ medium: this.medium, kind: 'init', index, bytes: undefined })
    }
    return pages
  }

  returnDirtyPage(page: MetadataPage): void {
    const dirty = page.kind === 'map' ? this.#dirtyMap : this.#dirtyInit
    if (page.index < dirty.length) this.#touch(dirty, page.index)
  }

  /** From now on `follower` gets every change that lies within it. */
  follow(follower: VolumeTables): void {
    assert(this.#follower === undefined && follower !== this, 'one resize at a time')
    this.#follower = follower
  }

  unfollow(): void {
    this.#follower = undefined
  }

  /** Tables of another size with the same content where both reach. */
  resized(size: number): VolumeTables {
    const next = new VolumeTables(this.medium, {
      size,
      stripeSize: this.stripeSize,
      formatUnit: this.formatUnit,
    })
    const stripes = Math.min(this.stripeCount, next.stripeCount)
    // Copy only what is there: the tables of a large empty volume stay unbacked.
    for (let unit = this.init.nextSet(0); unit < this.unitCount; unit = this.init.nextSet(unit + 1)) {
      if (unit < next.unitCount) next.init.set(unit)
    }
    for (
      let page = this.#usedMap.nextSet(0);
      page < next.#usedMap.length;
      page = this.#usedMap.nextSet(page + 1)
    ) {
      if (page >= this.#usedMap.length) break
      const at = page * MAP_PAGE_ENTRIES
      next.slots.set(this.slots.subarray(at, Math.min(at + MAP_PAGE_ENTRIES, stripes)), at)
      next.#usedMap.set(page)
    }
    for (let s = this.direct.nextSet(0); s < stripes; s = this.direct.nextSet(s + 1)) next.direct.set(s)
    for (let i = this.#dirtyMap.nextSet(0); i < this.#dirtyMap.length; i = this.#dirtyMap.nextSet(i + 1)) {
      if (i < next.#dirtyMap.length) next.#touch(next.#dirtyMap, i)
    }
    for (let i = this.#dirtyInit.nextSet(0); i < this.#dirtyInit.length; i = this.#dirtyInit.nextSet(i + 1)) {
      if (i < next.#dirtyInit.length) next.#touch(next.#dirtyInit, i)
    }
    next.#anyDirect = this.#anyDirect
    next.#mayOpen = this.#mayOpen
    if (next.stripeCount < this.stripeCount) {
      // The stored pages at the cut hold what lies past it, too; growing again would bring it back.
      next.#touch(next.#dirtyMap, next.#dirtyMap.length - 1)
      next.#touch(next.#dirtyInit, next.#dirtyInit.length - 1)
    }
    next.finishLoading()
    return next
  }

  #touchInit(unit: number, end: number): void {
    const last = Math.floor((end - 1) / INIT_PAGE_BITS)
    for (let page = Math.floor(unit / INIT_PAGE_BITS); page <= last; page++)
      this.#touch(this.#dirtyInit, page)
  }

  #touch(dirty: Bitmap, page: number): void {
    if (dirty.get(page)) return
    dirty.set(page)
    this.#dirtyCount++
  }
}

function copyBytes(words: Uint32Array): Buffer {
  return Buffer.from(words.buffer.slice(words.byteOffset, words.byteOffset + words.byteLength))
}
