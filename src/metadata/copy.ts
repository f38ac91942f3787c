import { assert } from '../base/assert.ts'
import type { Bitmap } from '../base/bitmap.ts'
import { CHANGE, type Change } from './journal.ts'
import { PagedBitmap } from './paged-bitmap.ts'
import type { MetadataPage } from './records.ts'

/**
 * What the disk says of a mirror's primary: which copy units may differ from what the secondary has. A bit that is 1 for nothing only costs a
 * copy; one that is missing loses a change there. So a bit is set before its change is answered, and cleared only after the
 * secondary has the unit durably. A power cut may take records of the journal with it that nobody hardened; then the regions of their
 * changes were hot, and the opening sets the units of these (src/volume/recovery.ts).
 */
export class CopyMap {
  readonly medium: number // the mirror's id
  readonly #bits: PagedBitmap

  constructor(medium: number, unitCount: number) {
    this.medium = medium
    this.#bits = new PagedBitmap(medium, 'copy', unitCount)
  }

  get unitCount(): number {
    return this.#bits.length
  }
  /** Units to be copied. */
  get count(): number {
    return this.#bits.count
  }
  get dirtyPages(): number {
    return this.#bits.dirtyPages
  }

  get(unit: number): boolean {
    return this.#bits.get(unit)
  }

  /** The first unit at or after `unit` that is (or is not) to be copied; unitCount where there is none. */
  nextSet(unit: number): number {
    return this.#bits.nextSet(unit)
  }
  nextClear(unit: number): number {
    return this.#bits.nextClear(unit)
  }

  /** Makes, or replays, one journal record. Idempotent. Units past the end were there before a forced shrink. */
  apply({ op, first, count }: Change): void {
    assert(op === CHANGE.copySet || op === CHANGE.copyClear, 'a record of copy units')
    this.#bits.put(first, first + count, op === CHANGE.copySet)
  }

  /** Not to be changed. */
  get bits(): Bitmap {
    return this.#bits.bits
  }

  /** Every unit becomes what it is in `bits`, 0 where that is shorter. @returns takes that back */
  setAll(bits: Bitmap): () => void {
    return this.#bits.replace(bits)
  }

  /** What is 1 in `bits` becomes 1. @returns takes that back */
  merge(bits: Bitmap): () => void {
    return this.#bits.merge(bits)
  }

  /** Units [first, end) are to be copied; what lies past the end of the volume is left out. */
  mark(first: number, end: number): void {
    this.#bits.put(first, end, true)
  }

  /** The volume has another size. What lay past a new end is forgotten; what a longer one adds is not marked here. @returns takes that back */
  resize(unitCount: number): () => void {
    return this.#bits.resize(unitCount)
  }

  /** Takes over a stored page, before anything else happens. @throws StoreError DAMAGED when it lies outside the volume */
  loadPage(index: number, bytes: Buffer): void {
    this.#bits.loadPage(index, bytes)
  }

  takeDirtyPages(): MetadataPage[] {
    return this.#bits.takeDirtyPages()
  }

  returnDirtyPage(page: MetadataPage): void {
    this.#bits.returnDirtyPage(page)
  }
}

/** Copy units of a volume of `size` bytes. */
export function copyUnitsOf(size: number, unitBytes: number): number {
  return Math.ceil(size / unitBytes)
}
