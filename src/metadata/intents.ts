import { assert } from '../base/assert.ts'
import { LIMITS } from '../base/limits.ts'
import { CHANGE, type Change } from './journal.ts'
import { PagedBitmap } from './paged-bitmap.ts'
import type { MetadataPage, PageKind } from './records.ts'

/**
 * What the disk says of a volume's intents. The volume is cut into regions, each a power of two of format units:
 *
 *   hot       a change of the region was announced and may not be durable yet
 *   suspect   it was hot when the daemon stopped without closing the pool: what it holds may lack changes that were answered,
 *             or have some that were never answered. It stays so until somebody acknowledges it
 *
 * Both are bitmaps, kept like the tables of a volume: changes go to the journal, pages to LMDB with the checkpoint. A hot mark
 * that is stale is only conservative. So `hot` has to be durable before the change that it announces goes anywhere, while `cool`
 * may reach the disk whenever it likes.
 *
 * What runs where and when stands in src/volume/hot-set.ts; this class only knows what is recorded.
 */
type RegionPageKind = Extract<PageKind, 'hot' | 'suspect'>

/** Regions of about LIMITS.intentRegionBytes, or of `wanted` bytes; never less than a format unit. @returns format units */
export function regionUnitsOf(unitBytes: number, wanted: number = LIMITS.intentRegionBytes): number {
  return 2 ** Math.max(0, Math.floor(Math.log2(wanted / unitBytes)))
}

export class IntentMap {
  readonly medium: number
  readonly regionUnits: number
  readonly #hot: PagedBitmap
  readonly #suspect: PagedBitmap

  constructor(medium: number, regionUnits: number, unitCount: number) {
    assert(Number.isInteger(Math.log2(regionUnits)), 'a region is a power of two of format units')
    this.medium = medium
    this.regionUnits = regionUnits
    const regionCount = Math.ceil(unitCount / regionUnits)
    this.#hot = new PagedBitmap(medium, 'hot', regionCount)
    this.#suspect = new PagedBitmap(medium, 'suspect', regionCount)
  }

  get regionCount(): number {
    return this.#hot.length
  }
  get hotCount(): number {
    return this.#hot.count
  }
  get suspectCount(): number {
    return this.#suspect.count
  }
  get dirtyPages(): number {
    return this.#hot.dirtyPages + this.#suspect.dirtyPages
  }

  regionOf(unit: number): number {
    return Math.floor(unit / this.regionUnits)
  }

  isHot(region: number): boolean {
    return this.#hot.get(region)
  }

  isSuspect(region: number): boolean {
    return this.#suspect.get(region)
  }

  /** Regions in order. */
  hot(): Generator<number> {
    return this.#hot.each()
  }

  /** The first region at or after `region` that is (or is not) suspect; regionCount where there is none. */
  nextSuspect(region: number): number {
    return this.#suspect.nextSet(region)
  }
  nextTrusted(region: number): number {
    return this.#suspect.nextClear(region)
  }

  /** Makes, or replays, one journal record. Idempotent. Regions past the end were there before a forced shrink. */
  apply({ op, first, count }: Change): void {
    assert(op === CHANGE.hot || op === CHANGE.cool, 'a record of intents')
    this.#hot.put(first, first + count, op === CHANGE.hot)
  }

  /** The daemon stopped without cooling them: all that is hot becomes suspect. @returns how many were */
  suspectHot(): number {
    const { count } = this.#hot
    for (const region of this.hot()) this.#suspect.put(region, region + 1, true)
    this.#hot.clear()
    return count
  }

  /** Nothing is suspect any more. @returns takes that back */
  acknowledge(): () => void {
    return this.#suspect.clear()
  }

  /** Nothing is hot any more: everything is durable, or about to be with the checkpoint that stores this. @returns takes that back */
  coolAll(): () => void {
    return this.#hot.clear()
  }

  /** The volume has another size. What lay past a new end is forgotten. @returns takes that back */
  resize(unitCount: number): () => void {
    const regionCount = Math.ceil(unitCount / this.regionUnits)
    const undo = [this.#hot.resize(regionCount), this.#suspect.resize(regionCount)]
    return () => {
      for (const back of undo) back()
    }
  }

  /** Takes over a stored page, before anything else happens. @throws StoreError DAMAGED when it lies outside the volume */
  loadPage(kind: RegionPageKind, index: number, bytes: Buffer): void {
    const bitmap = kind === 'hot' ? this.#hot : this.#suspect
    bitmap.loadPage(index, bytes)
  }

  takeDirtyPages(): MetadataPage[] {
    return [...this.#hot.takeDirtyPages(), ...this.#suspect.takeDirtyPages()]
  }

  returnDirtyPage(page: MetadataPage): void {
    this.#hot.returnDirtyPage(page)
    this.#suspect.returnDirtyPage(page)
  }

  /** Removals for every page that may be stored, when nobody needs intents any more. */
  removals(): MetadataPage[] {
    return [...this.#hot.removals(), ...this.#suspect.removals()]
  }
}
