import { assert, unreachable } from '../base/assert.ts'
import { Bitmap, BitmapUnion } from '../base/bitmap.ts'

/**
 * What the secondary of one mirror lacks, in copy units. In memory; the disk has their union (CopyMap), or more.
 *
 *   current    changed since the last close of a cycle
 *   sending    of the closed cycle, and not read yet: whoever is about to change such a unit has it read first
 *   captured   of the closed cycle, read, and not in the secondary's stage yet
 *   staged     in the secondary's stage, as of the close; the next commit makes it the secondary's content
 *
 *   change: -> current (and no longer staged, where no cycle is under way)
 *   close: current -> sending      read: sending -> captured      acknowledged: captured -> staged      commit: staged -> (none)
 *   break: sending, captured -> current; what is staged stays so where it did not change and the secondary kept it
 *
 * The first three of a cycle are disjoint. `current` may have any of their units, too: those changed after the close.
 */
type Kind = 'current' | 'sending' | 'captured' | 'staged'

export class CopyBits {
  #unitCount: number
  #current: Bitmap
  #sending: Bitmap
  #captured: Bitmap
  #staged: Bitmap
  readonly #counts = { current: 0, sending: 0, captured: 0, staged: 0 }

  constructor(unitCount: number) {
    this.#unitCount = unitCount
    this.#current = new Bitmap(unitCount)
    this.#sending = new Bitmap(unitCount)
    this.#captured = new Bitmap(unitCount)
    this.#staged = new Bitmap(unitCount)
  }

  get unitCount(): number {
    return this.#unitCount
  }
  get currentCount(): number {
    return this.#counts.current
  }
  get sendingCount(): number {
    return this.#counts.sending
  }
  get capturedCount(): number {
    return this.#counts.captured
  }
  get stagedCount(): number {
    return this.#counts.staged
  }
  /** Units of the cycle that are not staged yet. */
  get openCount(): number {
    return this.#counts.sending + this.#counts.captured
  }
  /** About what the secondary lacks; a unit that changed again after the close counts twice. */
  get total(): number {
    const { current, sending, captured, staged } = this.#counts
    return current + sending + captured + staged
  }

  isCurrent(unit: number): boolean {
    return this.#current.get(unit)
  }
  isSending(unit: number): boolean {
    return this.#sending.get(unit)
  }
  isStaged(unit: number): boolean {
    return this.#staged.get(unit)
  }
  /** Whether the secondary lacks it. */
  lacks(unit: number): boolean {
    return (
      this.#current.get(unit) || this.#sending.get(unit) || this.#captured.get(unit) || this.#staged.get(unit)
    )
  }

  /** The unit changes. @returns whether it was not lacking before: the disk has to know */
  change(unit: number): boolean {
    const known = this.lacks(unit)
    this.#put('current', this.#current, unit, true)
    return !known
  }

  /** Units [first, end) change. */
  changeRange(first: number, end: number): void {
    this.#current.setRange(first, end)
    this.#counts.current = this.#current.count()
  }

  /** Everything that `bits` has. @returns the units that were not lacking before */
  changeAll(bits: Bitmap): void {
    for (let unit = bits.nextSet(0, this.#unitCount); unit < this.#unitCount; ) {
      this.change(unit)
      unit++
      unit = unit < this.#unitCount ? bits.nextSet(unit, this.#unitCount) : unit
    }
  }

  /** Begins a cycle. What is staged still and has changed since is staged no more. */
  close(): void {
    assert(this.openCount === 0, 'a cycle is closed while another is under way')
    const { current } = this.#counts
    ;[this.#sending, this.#current] = [this.#current, this.#sending]
    this.#counts.sending = current
    this.#counts.current = 0
    if (this.#counts.staged > 0) {
      for (const unit of this.#each('sending')) this.#put('staged', this.#staged, unit, false)
    }
  }

  /** The next unit to be read, from `unit` on; unitCount where there is none. */
  nextSending(unit: number): number {
    if (unit >= this.#unitCount || this.#counts.sending === 0) return this.#unitCount
    return this.#sending.nextSet(unit, this.#unitCount)
  }

  capture(unit: number): void {
    assert(this.#sending.get(unit), 'a unit is read that is not due')
    this.#put('sending', this.#sending, unit, false)
    this.#put('captured', this.#captured, unit, true)
  }

  /** It changes before it was read, in a cycle that need not be a point in time: the next one has it. */
  postpone(unit: number): void {
    this.#put('sending', this.#sending, unit, false)
    this.#put('captured', this.#captured, unit, false)
    this.#put('current', this.#current, unit, true)
  }

  /** The secondary has it in its stage. */
  acknowledge(unit: number): void {
    if (!this.#captured.get(unit)) return // postponed meanwhile
    this.#put('captured', this.#captured, unit, false)
    this.#put('staged', this.#staged, unit, true)
  }

  /** The secondary has committed. @returns units that it does not lack any more, in order */
  committed(): number[] {
    const done: number[] = []
    for (const unit of this.#each('staged')) {
      this.#put('staged', this.#staged, unit, false)
      if (!this.lacks(unit)) done.push(unit)
    }
    return done
  }

  /** The cycle ends without a commit. @param keepStaged whether the secondary keeps its stage */
  break(keepStaged: boolean): void {
    for (const unit of this.#each('sending')) this.postpone(unit)
    for (const unit of this.#each('captured')) this.postpone(unit)
    for (const unit of this.#each('staged')) {
      if (keepStaged && !this.#current.get(unit)) continue
      this.#put('staged', this.#staged, unit, false)
      this.#put('current', this.#current, unit, true)
    }
    assert(this.openCount === 0)
  }

  /** Nothing is lacking: both sides are equal, and the volume is quiet. @returns units that were, in order */
  clearCurrent(): number[] {
    const done: number[] = []
    for (const unit of this.#each('current')) {
      this.#put('current', this.#current, unit, false)
      if (!this.lacks(unit)) done.push(unit)
    }
    return done
  }

  /** Another size, between cycles. */
  resize(unitCount: number): void {
    assert(this.openCount === 0, 'the size changes during a cycle')
    this.#counts.current = 0
    this.#counts.staged = 0
    const before = [this.#current, this.#staged] as const
    this.#unitCount = unitCount
    this.#current = new Bitmap(unitCount)
    this.#sending = new Bitmap(unitCount)
    this.#captured = new Bitmap(unitCount)
    this.#staged = new Bitmap(unitCount)
    for (const bits of before) {
      for (let unit = bits.nextSet(0); unit < Math.min(bits.length, unitCount); ) {
        this.#put('current', this.#current, unit, true)
        unit++
        unit = unit < bits.length ? bits.nextSet(unit) : bits.length
      }
    }
  }

  /** Their union. */
  union(): Bitmap {
    const all = new Bitmap(this.#unitCount)
    const some = this.#all()
    for (let first = some.nextSet(0); first < this.#unitCount; ) {
      const end = some.nextClear(first)
      all.setRange(first, end)
      first = some.nextSet(end)
    }
    return all
  }

  /** The first unit from `unit` on that is (or is not) lacking; unitCount where there is none. */
  nextLacking(unit: number): number {
    return this.#all().nextSet(unit)
  }
  nextPresent(unit: number): number {
    return this.#all().nextClear(unit)
  }
  /** How many of [from, to) are lacking. */
  lackingIn(from: number, to: number): number {
    return this.#all().count(from, to)
  }

  #all(): BitmapUnion {
    const { current, sending, captured, staged } = this.#counts
    const parts: Bitmap[] = []
    if (current > 0) parts.push(this.#current)
    if (sending > 0) parts.push(this.#sending)
    if (captured > 0) parts.push(this.#captured)
    if (staged > 0) parts.push(this.#staged)
    return new BitmapUnion(this.#unitCount, parts)
  }

  /** The units of a kind, in order; whoever goes through them may take away the one it has. Of a large volume mostly few: no looking for more. */
  *#each(kind: Kind): Generator<number> {
    const bits = this.#bitsOf(kind)
    let left = this.#counts[kind]
    for (let unit = -1; left > 0; left--) {
      unit = bits.nextSet(unit + 1)
      yield unit
    }
  }

  #bitsOf(kind: Kind): Bitmap {
    switch (kind) {
      case 'current':
        return this.#current
      case 'sending':
        return this.#sending
      case 'captured':
        return this.#captured
      case 'staged':
        return this.#staged
      default:
        return unreachable(kind)
    }
  }

  #put(kind: Kind, bits: Bitmap, unit: number, value: boolean): void {
    if (bits.get(unit) === value) return
    if (value) bits.set(unit)
    else bits.clear(unit)
    this.#counts[kind] += value ? 1 : -1
  }
}
