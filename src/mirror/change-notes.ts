import { StoreError, UserError } from '../base/errors.ts'
import type { MirrorBook, StoredMirror, UnitChange } from '../volume/mirror-book.ts'
import { CopyBits } from './copy-bits.ts'
import type { MirrorLag } from './types.ts'

/**
 * What the secondary lacks, in memory (`bits`) and on the disk, and since when.
 *
 * Crash rule: the disk has every unit that is lacking, or a hot region around it (intents.ts): a bit is recorded with the change, before the
 * region can cool, and cleared after the secondary has committed durably.
 */
export class ChangeNotes {
  readonly bits: CopyBits
  readonly #book: MirrorBook
  readonly #stored: StoredMirror
  #closedAt = 0 // the last cycle began then, performance.now()
  #imageAt: number | undefined // of the secondary's content
  #behindSince: number | undefined // when the first change came that the secondary lacks

  constructor(book: MirrorBook, stored: StoredMirror) {
    this.#book = book
    this.#stored = stored
    this.bits = new CopyBits(stored.map.unitCount)
    this.bits.changeAll(stored.map.bits)
    this.noteBehind()
  }

  get closedAt(): number {
    return this.#closedAt
  }

  /** Bytes that the secondary lacks; a unit that changed again after the close of a cycle counts twice. */
  get behind(): number {
    return this.bits.total * this.#stored.record.unitBytes
  }

  /** Bytes of the cycle that are not staged yet. */
  get open(): number {
    return this.bits.openCount * this.#stored.record.unitBytes
  }

  change(unit: number): void {
    if (!this.bits.change(unit)) return
    this.noteBehind()
    this.#record([unit], true).catch((error: unknown) => {
      if (!(error instanceof StoreError || error instanceof UserError)) throw error
      // The pool has failed, and says so; or the mirror is being removed.
    })
  }

  changeRange(offset: number, length: number): void {
    const { unitBytes } = this.#stored.record
    const last = Math.min(this.bits.unitCount - 1, Math.floor((offset + length - 1) / unitBytes))
    for (let unit = Math.floor(offset / unitBytes); unit <= last; unit++) this.change(unit)
  }

  noteBehind(): void {
    if (this.bits.total > 0) this.#behindSince ??= performance.now()
  }

  /** A cycle begins; the volume is quiet. */
  close(): void {
    this.bits.close()
    this.#closedAt = performance.now()
  }

  /** Nothing was to be sent: the secondary is as of now. */
  nothingToSend(): void {
    this.#closedAt = performance.now()
    this.#imageAt = this.#closedAt
  }

  /** The secondary has committed. Resolves when the disk knows. */
  committed(consistent: boolean): Promise<void> {
    const done = this.bits.committed()
    if (consistent) {
      this.#imageAt = this.#closedAt
      this.#behindSince = this.bits.total === 0 ? undefined : this.#closedAt
    }
    return this.#record(done, false)
  }

  lag(size: number, following: boolean): MirrorLag {
    const bytes = Math.min(this.behind, size)
    const { initialized } = this.#stored.record
    if (following || (this.bits.total === 0 && initialized)) return { bytes, seconds: 0 }
    if (!initialized) return { bytes, seconds: null }
    const since = Math.max(this.#imageAt ?? 0, this.#behindSince ?? 0)
    return { bytes, seconds: since === 0 ? null : (performance.now() - since) / 1000 }
  }

  #record(units: readonly number[], set: boolean): Promise<void> {
    if (units.length === 0) return Promise.resolve()
    return this.#book.record(this.#stored.record.id, runsOf(units, set))
  }
}

function runsOf(units: readonly number[], set: boolean): UnitChange[] {
  const runs: { first: number; count: number; set: boolean }[] = []
  for (const unit of units) {
    const last = runs[runs.length - 1]
    if (last !== undefined && last.first + last.count === unit) last.count++
    else runs.push({ first: unit, count: 1, set })
  }
  return runs
}
