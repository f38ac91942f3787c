import { StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { MirrorBook, StoredMirror, UnitChange } from '../volume/mirror-book.ts'
import { CopyBits } from './copy-bits.ts'
import { hasOneOf, unitsOf } from './copy-units.ts'
import type { MirrorLag } from './types.ts'

/**
 * What the secondary lacks, in memory (`bits`) and on the disk, and since when.
 *
 * Crash rule: the disk has every unit that is lacking, or a hot region around it (intents.ts): a bit is recorded with the change, and cleared
 * after the secondary has committed durably. Nobody waits for that record; the region keeps its intent until it is made (`needsIntent`). One
 * that could not be made, because there was no room for it, is made again with all others.
 */
export class ChangeNotes {
  readonly bits: CopyBits
  readonly #book: MirrorBook
  readonly #stored: StoredMirror
  #closedAt = 0 // the last cycle began then, performance.now()
  #imageAt: number | undefined // of the secondary's content
  #behindSince: number | undefined // when the first change came that the secondary lacks
  readonly #recording = new Map<number, number>() // unit -> records under way that set it
  #lastRecord: Promise<void> = Promise.resolve() // of these; they are made in their order
  #failures = 0
  #mended = 0 // failures before the last time that everything was recorded
  #mending: Promise<void> | undefined
  #retry: NodeJS.Timeout | undefined
  #stopped = false

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
    this.#recording.set(unit, (this.#recording.get(unit) ?? 0) + 1)
    this.#lastRecord = this.#record([unit], true).then(
      () => this.#recorded(unit),
      (error: unknown) => {
        this.#failures++
        this.#recorded(unit)
        this.#notRecorded(error)
      },
    )
  }

  changeRange(offset: number, length: number): void {
    const [first, last] = unitsOf(offset, length, this.#stored.record.unitBytes)
    for (let unit = first; unit <= Math.min(last, this.bits.unitCount - 1); unit++) this.change(unit)
  }

  /** Whether the disk may not know yet what the secondary lacks of the range. */
  needsIntent(offset: number, length: number): boolean {
    if (this.#failures > this.#mended) return true
    if (this.#recording.size === 0) return false
    const [first, last] = unitsOf(offset, length, this.#stored.record.unitBytes)
    return hasOneOf(this.#recording, first, last)
  }

  /** Resolves when the disk knows everything that was noted before. @throws StoreError */
  async settle(): Promise<void> {
    await this.#lastRecord
    if (this.#failures === this.#mended) return
    try {
      await this.#mend()
    } catch (error) {
      if (!(error instanceof UserError)) throw error // the mirror is being removed: it needs nothing
    }
  }

  /** Nothing is tried again from here on. */
  stop(): void {
    this.#stopped = true
    clearTimeout(this.#retry)
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

  #recorded(unit: number): void {
    const left = (this.#recording.get(unit) ?? 0) - 1
    if (left > 0) this.#recording.set(unit, left)
    else this.#recording.delete(unit)
  }

  #notRecorded(error: unknown): void {
    if (!(error instanceof StoreError || error instanceof UserError)) throw error
    // There is no room, or the pool has failed, and says so; or the mirror is being removed.
    if (this.#stopped || this.#retry !== undefined) return
    this.#retry = setTimeout(() => {
      this.#retry = undefined
      this.#mend().catch((again: unknown) => this.#notRecorded(again))
    }, LIMITS.mirrorRetryMsMin).unref()
  }

  /** Records all that is lacking: some of it could not be. */
  #mend(): Promise<void> {
    this.#mending ??= this.#recordAll().finally(() => {
      this.#mending = undefined
    })
    return this.#mending
  }

  async #recordAll(): Promise<void> {
    const failures = this.#failures
    await this.#book.record(this.#stored.record.id, this.#lacking())
    this.#mended = failures
  }

  #lacking(): UnitChange[] {
    const runs: UnitChange[] = []
    const { bits } = this
    for (let first = bits.nextLacking(0); first < bits.unitCount; ) {
      const end = bits.nextPresent(first)
      runs.push({ first, count: end - first, set: true })
      first = bits.nextLacking(end)
    }
    return runs
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
