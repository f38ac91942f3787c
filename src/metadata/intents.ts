import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { CHANGE, type Change } from './journal.ts'
import { type MetadataPage, type PageKind, REGION_PAGE_BITS } from './records.ts'

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

const KINDS: readonly RegionPageKind[] = ['hot', 'suspect']

/** Regions of about LIMITS.intentRegionBytes, or of `wanted` bytes; never less than a format unit. @returns format units */
export function regionUnitsOf(unitBytes: number, wanted: number = LIMITS.intentRegionBytes): number {
  return 2 ** Math.max(0, Math.floor(Math.log2(wanted / unitBytes)))
}

export class IntentMap {
  readonly medium: number
  readonly regionUnits: number
  #regionCount: number
  readonly #bits: Record<RegionPageKind, Bitmap>
  readonly #counts: Record<RegionPageKind, number> = { hot: 0, suspect: 0 }
  readonly #dirty: Record<RegionPageKind, Set<number>> = { hot: new Set(), suspect: new Set() } // pages

  constructor(medium: number, regionUnits: number, unitCount: number) {
    assert(Number.isInteger(Math.log2(regionUnits)), 'a region is a power of two of format units')
    this.medium = medium
    this.regionUnits = regionUnits
    this.#regionCount = Math.ceil(unitCount / regionUnits)
    this.#bits = { hot: new Bitmap(this.#regionCount), suspect: new Bitmap(this.#regionCount) }
  }

  get regionCount(): number {
    return this.#regionCount
  }
  get hotCount(): number {
    return this.#counts.hot
  }
  get suspectCount(): number {
    return this.#counts.suspect
  }
  get dirtyPages(): number {
    return this.#dirty.hot.size + this.#dirty.suspect.size
  }

  regionOf(unit: number): number {
    return Math.floor(unit / this.regionUnits)
  }

  isHot(region: number): boolean {
    return this.#bits.hot.get(region)
  }

  isSuspect(region: number): boolean {
    return this.#bits.suspect.get(region)
  }

  /** Regions in order. */
  hot(): Generator<number> {
    return this.#each('hot')
  }

  /** The first region at or after `region` that is (or is not) suspect; regionCount where there is none. */
  nextSuspect(region: number): number {
    return region < this.#regionCount
      ? this.#bits.suspect.nextSet(region, this.#regionCount)
      : this.#regionCount
  }
  nextTrusted(region: number): number {
    return region < this.#regionCount
      ? this.#bits.suspect.nextClear(region, this.#regionCount)
      : this.#regionCount
  }

  /** Makes, or replays, one journal record. Idempotent. Regions past the end were there before a forced shrink. */
  apply({ op, first, count }: Change): void {
    assert(op === CHANGE.hot || op === CHANGE.cool, 'a record of intents')
    const end = Math.min(first + count, this.#regionCount)
    for (let region = first; region < end; region++) this.#put('hot', region, op === CHANGE.hot)
  }

  /** The daemon stopped without cooling them: all that is hot becomes suspect. @returns how many were */
  suspectHot(): number {
    const regions = [...this.hot()]
    for (const region of regions) {
      this.#put('suspect', region, true)
      this.#put('hot', region, false)
    }
    return regions.length
  }

  /** Nothing is suspect any more. @returns takes that back */
  acknowledge(): () => void {
    return this.#clear('suspect', 0)
  }

  /** Nothing is hot any more: everything is durable, or about to be with the checkpoint that stores this. @returns takes that back */
  coolAll(): () => void {
    return this.#clear('hot', 0)
  }

  /** The volume has another size. What lay past a new end is forgotten. @returns takes that back */
  resize(unitCount: number): () => void {
    const before = this.#regionCount
    const after = Math.ceil(unitCount / this.regionUnits)
    const undo = KINDS.map((kind) => this.#clear(kind, after))
    this.#regionCount = after
    for (const kind of KINDS) {
      // A shorter volume keeps the longer bitmap: it may have to come back.
      const { words, length } = this.#bits[kind]
      if (length >= after) continue
      const longer = new Uint32Array(Bitmap.wordCount(after))
      longer.set(words)
      this.#bits[kind] = new Bitmap(after, longer)
    }
    return () => {
      this.#regionCount = before
      for (const back of undo) back()
    }
  }

  /** Takes over a stored page, before anything else happens. @throws StoreError DAMAGED when it lies outside the volume */
  loadPage(kind: RegionPageKind, index: number, bytes: Buffer): void {
    const first = index * REGION_PAGE_BITS
    if (index < 0 || first >= this.#regionCount || bytes.length > REGION_PAGE_BITS / 8) {
      throw new StoreError(
        'DAMAGED',
        `metadata: ${kind} page ${index} of medium ${this.medium} lies past the end of its volume`,
      )
    }
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      if (((bytes[bit >> 3] ?? 0) >> (bit & 7)) % 2 === 0) continue
      if (first + bit >= this.#regionCount) {
        throw new StoreError(
          'DAMAGED',
          `metadata: ${kind} region ${first + bit} of medium ${this.medium} lies past the end`,
        )
      }
      this.#put(kind, first + bit, true)
    }
    this.#dirty[kind].delete(index)
  }

  takeDirtyPages(): MetadataPage[] {
    const pages: MetadataPage[] = []
    for (const kind of KINDS) {
      const { words } = this.#bits[kind]
      for (const index of this.#dirty[kind]) {
        const part = words.slice(index * (REGION_PAGE_BITS / 32), (index + 1) * (REGION_PAGE_BITS / 32))
        const used = part.some((word) => word !== 0)
        const bytes = used ? Buffer.from(part.buffer) : undefined
        pages.push({ medium: this.medium, kind, index, bytes })
      }
      this.#dirty[kind].clear()
    }
    return pages
  }

  returnDirtyPage({ kind, index }: MetadataPage): void {
    if (kind === 'hot' || kind === 'suspect') this.#dirty[kind].add(index)
  }

  /** Removals for every page that may be stored, when nobody needs intents any more. */
  removals(): MetadataPage[] {
    const count = Math.ceil(this.#bits.hot.length / REGION_PAGE_BITS)
    return KINDS.flatMap((kind) =>
      Array.from({ length: count }, (_, index) => ({ medium: this.medium, kind, index, bytes: undefined })),
    )
  }

  *#each(kind: RegionPageKind, from = 0): Generator<number> {
    const bits = this.#bits[kind]
    for (let region = from; region < bits.length; region++) {
      region = bits.nextSet(region)
      if (region < bits.length) yield region
    }
  }

  #clear(kind: RegionPageKind, from: number): () => void {
    const regions = [...this.#each(kind, from)]
    for (const region of regions) this.#put(kind, region, false)
    return () => {
      for (const region of regions) this.#put(kind, region, true)
    }
  }

  #put(kind: RegionPageKind, region: number, value: boolean): void {
    const bits = this.#bits[kind]
    if (bits.get(region) === value) return
    if (value) bits.set(region)
    else bits.clear(region)
    this.#counts[kind] += value ? 1 : -1
    this.#dirty[kind].add(Math.floor(region / REGION_PAGE_BITS))
  }
}
