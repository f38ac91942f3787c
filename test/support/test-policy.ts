import type { ExportHandler, Upcall } from '../../src/datapath/datapath.ts'
import type { Rig } from './datapath-rig.ts'
import { until } from './poll.ts'

/**
 * The smallest policy that keeps the contract's rules: the first write of a format unit formats it, later ones go in
 * place and set direct bits, trims and zeroes write zeros, flush and FUA sync. One unit is decided by one upcall at a time.
 *
 * `hold()` makes it collect upcalls instead, and the test decides; `letGo()` returns to deciding by itself.
 */
export class TestPolicy implements ExportHandler {
  /** Every upcall so far, in order of arrival. */
  readonly seen: Upcall[] = []
  /** How many upcalls each batch had. */
  readonly batches: number[] = []
  readonly held: Upcall[] = []
  nextSlot = 1000 // above the slots that tests choose by hand
  statusOf: (context: number, upcall: Upcall) => { length: number; flags: number }[]

  /** Asked before an undecided write to a formatted unit: true moves the unit to new slots (copy-on-write). */
  moves: () => boolean = () => false

  readonly #rig: Rig
  readonly #freeSlots: number[] = []
  readonly #locks = new Map<number, Promise<void>>()
  #holding = false
  #deciding = 0

  constructor(rig: Rig) {
    this.#rig = rig
    this.statusOf = (_context, upcall) => this.#allocation(upcall.offset, upcall.length)
  }

  onUpcalls(upcalls: readonly Upcall[]): void {
    this.batches.push(upcalls.length)
    this.seen.push(...upcalls)
    if (this.#holding) this.held.push(...upcalls)
    else for (const upcall of upcalls) this.#start(upcall)
  }

  hold(): void {
    this.#holding = true
  }

  /** Decides everything held, and what comes after it, itself. */
  letGo(): void {
    this.#holding = false
    for (const upcall of this.held.splice(0)) this.#start(upcall)
  }

  /** The next held upcall; waits for it. */
  async next(kind?: Upcall['kind']): Promise<Upcall> {
    await until(() => this.held.length > 0, `an upcall ${kind ?? ''}`)
    const upcall = this.held.shift()
    if (upcall === undefined || (kind !== undefined && upcall.kind !== kind)) {
      throw new Error(`expected an upcall ${kind}, got ${upcall?.kind}`)
    }
    return upcall
  }

  /** Resolves when nothing that it has begun to decide is undecided. */
  async idle(): Promise<void> {
    await until(() => this.#deciding === 0, 'the policy to be idle')
  }

  /** Decides one held upcall the usual way. */
  decide(upcall: Upcall): Promise<void> {
    return this.#decide(upcall)
  }

  /** A slot that nobody uses. */
  takeSlot(): number {
    return this.#freeSlots.pop() ?? this.nextSlot++
  }

  slotsOf(first: number, end: number): number[] {
    return Array.from({ length: end - first }, (_, index) => {
      return Atomics.load(this.#rig.tables.slots, first + index)
    })
  }

  /** Gives up a format unit, as a policy does that trims it: it reads as fill, and its slots are used again. */
  async discard(unit: number): Promise<void> {
    const { formatUnit, init, direct, datapath, size, stripeSize } = this.#rig
    const first = unit * formatUnit
    const end = Math.min(first + formatUnit, Math.ceil(size / stripeSize))
    await this.#locked(unit, async () => {
      if (!init.get(unit)) return
      direct.clearRange(first, end)
      init.clear(unit)
      await datapath.barrier()
      this.#freeSlots.push(...this.slotsOf(first, end))
      for (let stripe = first; stripe < end; stripe++) Atomics.store(this.#rig.tables.slots, stripe, 0)
    })
  }

  #start(upcall: Upcall): void {
    this.#deciding++
    const decided = this.#decide(upcall).finally(() => {
      this.#deciding--
    })
    decided.catch((error: unknown) => {
      // A failure of the policy must fail the test run, not vanish in a promise.
      queueMicrotask(() => {
        throw error
      })
    })
  }

  async #decide(upcall: Upcall): Promise<void> {
    const { datapath } = this.#rig
    switch (upcall.kind) {
      case 'status':
        datapath.completeStatus(
          upcall.id,
          upcall.contexts.map((context) => ({ context, extents: this.statusOf(context, upcall) })),
        )
        return
      case 'sync':
        await datapath.sync()
        datapath.complete(upcall.id, 0)
        return
      default:
        await this.#change(upcall)
        if ((upcall.flags & 1) !== 0) await datapath.sync()
        datapath.complete(upcall.id, 0)
    }
  }

  async #change(upcall: Upcall): Promise<void> {
    const { stripeSize, formatUnit, stripes } = this.#rig
    const unitSize = stripeSize * formatUnit
    const last = Math.floor((upcall.offset + upcall.length - 1) / unitSize)
    for (let unit = Math.floor(upcall.offset / unitSize); unit <= last; unit++) {
      const first = unit * formatUnit
      const end = Math.min(first + formatUnit, Math.max(stripes, Math.ceil(this.#rig.size / stripeSize)))
      await this.#locked(unit, () => this.#changeUnit(upcall, first, end))
    }
  }

  async #changeUnit(upcall: Upcall, first: number, end: number): Promise<void> {
    const rig = this.#rig
    const { datapath, stripeSize, formatUnit } = rig
    if (!rig.init.get(first / formatUnit)) {
      const slots = Array.from({ length: end - first }, () => this.takeSlot())
      await datapath.formatUnit({ export: rig.exportId, stripe: first, slots, overlays: [upcall.id] })
      for (const [index, slot] of slots.entries()) Atomics.store(rig.tables.slots, first + index, slot)
      rig.init.set(first / formatUnit)
      rig.direct.setRange(first, end)
      return
    }
    if (this.moves()) {
      const baseSlots = this.slotsOf(first, end)
      const slots = baseSlots.map(() => this.takeSlot())
      // No write in place may be under way while the unit is copied.
      rig.direct.clearRange(first, end)
      await datapath.barrier()
      await datapath.formatUnit({
        export: rig.exportId,
        stripe: first,
        slots,
        baseSlots,
        overlays: [upcall.id],
      })
      for (const [index, slot] of slots.entries()) Atomics.store(rig.tables.slots, first + index, slot)
      rig.direct.setRange(first, end)
      await datapath.barrier() // of the reads that still use the old slots
      this.#freeSlots.push(...baseSlots)
      return
    }
    for (let stripe = first; stripe < end; stripe++) {
      const touches =
        upcall.offset < (stripe + 1) * stripeSize && upcall.offset + upcall.length > stripe * stripeSize
      if (!touches) continue
      await datapath.writePart(upcall.id, stripe, Atomics.load(rig.tables.slots, stripe))
      rig.direct.set(stripe)
    }
  }

  async #locked(unit: number, action: () => Promise<void>): Promise<void> {
    const before = this.#locks.get(unit) ?? Promise.resolve()
    const mine = before.then(action)
    const settled = mine.catch(() => {})
    this.#locks.set(unit, settled)
    await mine
  }

  #allocation(offset: number, length: number): { length: number; flags: number }[] {
    const { stripeSize, formatUnit, init, size } = this.#rig
    const unitSize = stripeSize * formatUnit
    const extents: { length: number; flags: number }[] = []
    for (let at = offset; at < offset + length; ) {
      const unit = Math.floor(at / unitSize)
      const end = Math.min((unit + 1) * unitSize, size)
      const flags = init.get(unit) ? 0 : 3
      const last = extents.at(-1)
      if (last?.flags === flags) last.length += end - at
      else extents.push({ length: end - at, flags })
      at = end
    }
    return extents
  }
}
