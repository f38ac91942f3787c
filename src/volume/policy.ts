import { assert, unreachable } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { Datapath, ExportHandler, ExportId, Upcall } from '../datapath/datapath.ts'
import { CHANGE, type Change } from '../metadata/journal.ts'
import { ERRNO_OF, NBD_ERRNO } from '../nbd/errno.ts'
import { FillDetector } from './fill-detector.ts'
import type { FreedRun } from './reclaimer.ts'
import { statusOf } from './status.ts'
import type { VolumeTables } from './tables.ts'

/**
 * The policy answers the upcalls of one volume. A request is cut into one *part* for each format unit it touches;
 * a unit with something going on has a *work*, which is in one of four states:
 *
 *   gathering   not formatted; the parts collected here become one full-stripe write (DESIGN invariant 2)
 *   writing     that write is under way; later parts wait
 *   sharing     formatted; any number of parts are being written in place; a release waits behind them
 *   releasing   direct bits are cleared, barrier, record, bits cleared; later parts wait
 *
 *   none -> gathering -> writing -> none        none -> sharing -> none        none -> releasing -> none
 *
 * A unit without a work is written in place by the datapath alone where its direct bits are 1. Everything the
 * policy writes in place itself holds a `sharing` work. So a release excludes both: the first by clearing direct bits
 * and a barrier, the second by the work.
 *
 * Order of a first write: slots taken, data written, record (journal; survives the death of the process), then slot, init bit and
 * direct bits in the tables, then the reply. A failure before the record gives the slots back: nobody saw them.
 * Order of a release: direct bits cleared, barrier, record with init bit and slot cleared, reply; the slots
 * are handed to `freeLater`, which waits until the record is durable.
 */
export interface PolicyHost {
  readonly datapath: Datapath
  /** Slots for the stripes [first, first + count), in order; may wait for freed slots. @throws StoreError NO_SPACE */
  allocate(first: number, count: number): Promise<number[]>
  /** Takes back slots that `allocate` gave and nothing was recorded for. */
  unallocate(slots: readonly number[]): void
  /** Slots whose owner is gone since `sequence`. */
  freeLater(runs: readonly FreedRun[], sequence: number): void
  record(changes: readonly Change[], apply: (sequence: number) => void): Promise<number>
  flush(): Promise<void>
  onTrouble(message: string): void
}

export interface PolicyVolume {
  readonly name: string
  readonly provision: 'thin' | 'thick'
  readonly fill: number
}

type PartKind = 'write' | 'zero' | 'release'

interface Request {
  readonly upcall: Upcall
  readonly order: number // of arrival
  outstanding: number // parts, and one while parts are being made
  errno: number
}

interface Part {
  readonly request: Request
  readonly unit: number
  readonly kind: PartKind
}

interface Work {
  state: 'gathering' | 'writing' | 'sharing' | 'releasing'
  readonly parts: Part[] // gathering, writing, releasing: answered when it ends
  readonly queue: Part[] // dispatched again when it ends
  readonly waiters: (() => void)[] // told when it ends
  active: number // sharing: parts being written
  covered: number // gathering: bytes that the parts bring
  heldUntil: number // gathering: waits for its neighbours until then; 0 = not held
}

/** The id of a request that no client made. */
const NOBODY = -1

const FLAG_FUA = 1 << 0
const FLAG_NO_HOLE = 1 << 1
const FLAG_FAST_ZERO = 1 << 4

/** Stripes of one release, and of one zero-writing step: bounds the work of a turn, a record in the journal, and memory. */
const STRIPES_PER_STEP = 1024

export class VolumePolicy implements ExportHandler {
  readonly #host: PolicyHost
  readonly #volume: PolicyVolume
  readonly #fills = new FillDetector()
  #tables: VolumeTables
  #end: number // bytes; what reaches past it is refused
  #exportId: ExportId = -1
  #works = new Map<number, Work>()
  #gathering = new Set<number>()
  #releases: number[] = []
  #order = 0
  #holdTimer: NodeJS.Timeout | undefined

  constructor(host: PolicyHost, volume: PolicyVolume, tables: VolumeTables) {
    this.#host = host
    this.#volume = volume
    this.#tables = tables
    this.#end = tables.size
  }

  /** After `Datapath.openExport`, before the first session. */
  bind(exportId: ExportId): void {
    this.#exportId = exportId
  }

  /** The tables of another size; requests may reach as far as they do. */
  useTables(tables: VolumeTables): void {
    this.#tables = tables
    this.#end = tables.size
  }

  /** Refuses from now on what reaches past `size`, while the tables are still those of the larger volume. */
  limit(size: number): void {
    assert(size <= this.#tables.size)
    this.#end = size
  }

  onUpcalls(upcalls: readonly Upcall[]): void {
    for (const upcall of upcalls) {
      if (this.#reachesPast(upcall)) {
        // The volume shrank after the datapath had checked the range.
        this.#host.datapath.complete(upcall.id, errnoPastEnd(upcall))
        continue
      }
      switch (upcall.kind) {
        case 'write':
          this.#write(upcall)
          break
        case 'sync':
          this.#flushThenComplete(upcall.id)
          break
        case 'trim':
        case 'zero':
          this.#discard(upcall)
          break
        case 'status':
          this.#host.datapath.completeStatus(upcall.id, statusOf(this.#tables, this.#volume, upcall))
          break
        default:
          unreachable(upcall.kind)
      }
    }
    this.#startMerges()
  }

  /**
   * Formats units of [unit, unit + count) that are unformatted and idle, as the background formatter does.
   * @returns how many were formatted. @throws StoreError when the store failed
   */
  async formatIdle(unit: number, count: number): Promise<number> {
    const units: number[] = []
    for (let u = unit; u < unit + count; u++) {
      if (!this.#works.has(u) && !this.#tables.init.get(u)) units.push(u)
    }
    for (const u of units) this.#works.set(u, newWork('writing'))
    let done = 0
    let failed: number | undefined
    for (const run of consecutive(units)) {
      // Also after a failure: each of these units has a work now, which has to end.
      if ((await this.#format(run)) === 0) done += run.length
      else failed ??= run[0]
    }
    if (failed !== undefined)
      throw new StoreError('MEMBER_IO', `volume ${this.#volume.name}: formatting failed at unit ${failed}`)
    return done
  }

  /** Releases every unit from `unit` on, as a forced shrink does; after `limit`, so that none is begun behind its back. */
  async releaseFrom(unit: number): Promise<void> {
    // What was begun before: a unit that is just being formatted is not released until it is.
    for (let busy = this.#busyFrom(unit); busy !== undefined; busy = this.#busyFrom(unit))
      await this.#ended(busy)
    const nobody: Upcall = { id: NOBODY, kind: 'trim', flags: 0, offset: 0, length: 0, contexts: [] }
    const request = this.#request(nobody)
    await this.#releaseUnits(request, unit, this.#tables.unitCount)
    if (request.errno !== 0)
      throw new StoreError('MEMBER_IO', `volume ${this.#volume.name}: releasing the end failed`)
  }

  /** Runs `action` while nothing else changes the unit; in-place writes by the datapath go on. */
  async withUnit<T>(unit: number, action: () => Promise<T>): Promise<T> {
    for (let busy = this.#works.get(unit); busy !== undefined; busy = this.#works.get(unit))
      await this.#ended(busy)
    const work = newWork('writing')
    this.#works.set(unit, work)
    try {
      return await action()
    } finally {
      this.#finish(unit, work)
    }
  }

  #busyFrom(unit: number): Work | undefined {
    for (const [at, work] of this.#works) if (at >= unit) return work
    return undefined
  }

  #ended(work: Work): Promise<void> {
    return new Promise((resolve) => work.waiters.push(resolve))
  }

  /** Forgets timers; all upcalls were answered (Datapath.closeExport). */
  close(): void {
    assert(this.#works.size === 0, `volume ${this.#volume.name}: closed with work under way`)
    clearTimeout(this.#holdTimer)
  }

  // ---- requests ----------------------------------------------------------------------------------------

  #write(upcall: Upcall): void {
    const request = this.#request(upcall)
    const sequential = this.#fills.observe(upcall.offset, upcall.length)
    const first = this.#unitAt(upcall.offset)
    const last = this.#unitAt(upcall.offset + upcall.length - 1)
    for (let unit = first; unit <= last; unit++) {
      this.#dispatch(this.#part(request, unit, 'write'), sequential)
    }
    this.#partsMade(request)
  }

  /** Trim and write-zeroes: whole units by clearing init bits, the rest by writing zeros. */
  #discard(upcall: Upcall): void {
    const request = this.#request(upcall)
    const { offset, length } = upcall
    const end = offset + length
    const unitBytes = this.#unitBytes
    const firstWhole = Math.ceil(offset / unitBytes)
    // The last unit is whole for a request that reaches the end of the volume.
    const endWhole = end === this.#tables.size ? this.#tables.unitCount : Math.floor(end / unitBytes)
    // Released stripes read as the fill pattern, and this range has to read as zeros.
    const writes = this.#volume.fill !== 0 || (upcall.kind === 'zero' && (upcall.flags & FLAG_NO_HOLE) !== 0)
    const fast = !writes && firstWhole < endWhole
    if ((upcall.flags & FLAG_FAST_ZERO) !== 0 && !fast && this.#needsWriting(offset, end, writes)) {
      this.#host.datapath.complete(upcall.id, NBD_ERRNO.ENOTSUP)
      return
    }
    if (firstWhole >= endWhole) {
      for (let unit = this.#unitAt(offset); unit <= this.#unitAt(end - 1); unit++)
        this.#dispatchZero(request, unit, writes)
      this.#partsMade(request)
      return
    }
    if (offset < firstWhole * unitBytes) this.#dispatchZero(request, firstWhole - 1, writes)
    if (end > endWhole * unitBytes && endWhole < this.#tables.unitCount)
      this.#dispatchZero(request, endWhole, writes)
    const whole = writes
      ? this.#zeroUnits(request, firstWhole, endWhole)
      : this.#releaseUnits(request, firstWhole, endWhole)
    whole.then(() => this.#partsMade(request))
  }

  #needsWriting(offset: number, end: number, writes: boolean): boolean {
    if (writes) return true
    for (let unit = this.#unitAt(offset); unit <= this.#unitAt(end - 1); unit++) {
      if (this.#tables.init.get(unit) || this.#works.has(unit)) return true
    }
    return false
  }

  #dispatchZero(request: Request, unit: number, writes: boolean): void {
    // Unformatted and idle with fill 0 reads as zeros already.
    if (!writes && !this.#works.has(unit) && !this.#tables.init.get(unit)) return
    this.#dispatch(this.#part(request, unit, 'zero'), false)
  }

  async #zeroUnits(request: Request, from: number, to: number): Promise<void> {
    for (let at = from; at < to && request.errno === 0; at += this.#unitsPerStep) {
      const end = Math.min(at + this.#unitsPerStep, to)
      for (let unit = at; unit < end; unit++) this.#dispatch(this.#part(request, unit, 'zero'), false)
      this.#startMerges()
      await this.#partsDrained(request)
    }
  }

  async #releaseUnits(request: Request, from: number, to: number): Promise<void> {
    // The first formatted unit at or after `start`; `to` where there is none. After a resize the tables are others.
    const next = (start: number): number => {
      const { init, unitCount } = this.#tables
      const end = Math.min(to, unitCount)
      const unit = start < end ? init.nextSet(start, end) : end
      return unit === end ? to : unit
    }
    for (let at = next(from); at < to && request.errno === 0; at = next(at)) {
      // A unit that is being formatted right now is skipped: that write is not answered yet, so it may come after.
      for (let n = 0; n < this.#unitsPerStep && at < to; n++) {
        this.#dispatch(this.#part(request, at, 'release'), false)
        at = next(at + 1)
      }
      await this.#partsDrained(request)
    }
  }

  // ---- parts and works -----------------------------------------------------------------------------------

  #dispatch(part: Part, sequential: boolean): void {
    const { upcall } = part.request
    // The volume shrank while the request was under way.
    if (this.#reachesPast(upcall)) {
      this.#partDone(part, errnoPastEnd(upcall))
      return
    }
    const work = this.#works.get(part.unit)
    if (work === undefined) {
      const formatted = this.#tables.init.get(part.unit)
      if (part.kind === 'release' && !formatted) {
        this.#partDone(part, 0)
        return
      }
      // The last unit may have grown since the request came, and what is behind is not the request's: zeros are written then.
      if (
        part.kind === 'release' &&
        (upcall.id === NOBODY || this.#coveredBy(part) >= this.#bytesOf(part.unit))
      ) {
        this.#works.set(part.unit, newWork('releasing', part))
        if (this.#releases.push(part.unit) === 1) queueMicrotask(() => this.#startReleases())
        return
      }
      if (formatted) {
        const sharing = newWork('sharing')
        this.#works.set(part.unit, sharing)
        // Nothing in this release forbids it; the sharing work does not depend on it.
        this.#tables.setDirect(part.unit)
        this.#writeInPlace(sharing, part)
        return
      }
      const gathering = newWork('gathering', part)
      gathering.covered = this.#coveredBy(part)
      if (sequential && this.#fills.worthHolding())
        gathering.heldUntil = performance.now() + LIMITS.mergeHoldMs
      this.#works.set(part.unit, gathering)
      this.#gathering.add(part.unit)
      return
    }
    if (work.state === 'gathering' && part.kind !== 'release') {
      work.parts.push(part)
      work.covered += this.#coveredBy(part)
    } else if (work.state === 'sharing' && part.kind !== 'release' && work.queue.length === 0) {
      this.#writeInPlace(work, part)
    } else {
      work.queue.push(part)
    }
  }

  #writeInPlace(work: Work, part: Part): void {
    assert(work.state === 'sharing')
    work.active++
    const { upcall } = part.request
    const { first, count } = this.#tables.unitStripes(part.unit)
    const { stripeSize } = this.#tables
    const from = Math.max(first, Math.floor(upcall.offset / stripeSize))
    const to = Math.min(first + count - 1, Math.floor((upcall.offset + upcall.length - 1) / stripeSize))
    const writes: Promise<void>[] = []
    for (let stripe = from; stripe <= to; stripe++) {
      writes.push(this.#host.datapath.writePart(upcall.id, stripe, this.#tables.slotOf(stripe)))
    }
    Promise.allSettled(writes).then((results) => {
      const failed = results.find((result) => result.status === 'rejected')
      this.#partDone(part, failed === undefined ? 0 : this.#errnoOf(failed.reason))
      work.active--
      if (work.active === 0) this.#finish(part.unit, work)
    })
  }

  /** Starts every gathered merge that is not held; neighbours go out in one write. */
  #startMerges(): void {
    if (this.#gathering.size === 0) return
    const ready: number[] = []
    let holdMs = 0
    const now = performance.now()
    for (const unit of this.#gathering) {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'gathering')
      const full = work.covered >= this.#bytesOf(unit)
      if (!full && work.heldUntil > now && work.queue.length === 0) {
        holdMs = Math.max(holdMs, work.heldUntil - now)
        continue
      }
      if (work.heldUntil > 0) this.#fills.held(full)
      ready.push(unit)
    }
    for (const unit of ready) {
      this.#gathering.delete(unit)
      const work = this.#works.get(unit)
      assert(work !== undefined)
      work.state = 'writing'
    }
    if (holdMs > 0 && this.#holdTimer === undefined) {
      this.#holdTimer = setTimeout(() => {
        this.#holdTimer = undefined
        this.#startMerges()
      }, Math.ceil(holdMs))
    }
    const unitsMax = Math.max(1, Math.floor(LIMITS.formatUnitBytesMax / this.#unitBytes))
    for (const run of consecutive(
      ready.sort((a, b) => a - b),
      unitsMax,
    )) {
      this.#format(run)
    }
  }

  /** Writes consecutive units whole and publishes them. Never rejects. @returns errno */
  async #format(units: readonly number[]): Promise<number> {
    const firstUnit = units[0] ?? 0
    const works = units.map((unit) => {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'writing')
      return work
    })
    const first = firstUnit * this.#tables.formatUnit
    const end = this.#tables.unitStripes(units[units.length - 1] ?? 0)
    const count = end.first + end.count - first
    let errno = 0
    let slots: number[] | undefined
    try {
      slots = await this.#host.allocate(first, count)
      assert(slots.length === count && !slots.includes(0))
      const requests = new Set(works.flatMap((work) => work.parts.map((part) => part.request)))
      const overlays = [...requests].sort((a, b) => a.order - b.order).map((request) => request.upcall.id)
      await this.#host.datapath.formatUnit({ export: this.#exportId, stripe: first, slots, overlays })
      const taken = slots
      await this.#host.record(
        formatChanges(this.#tables.medium, first, taken, firstUnit, units.length),
        () => {
          for (const run of slotRunsOf(first, taken)) this.#tables.setSlots(run.first, run.count, run.slot)
          for (const unit of units) {
            this.#tables.setFormatted(unit)
            this.#tables.setDirect(unit)
          }
          slots = undefined // they belong to the volume now
        },
      )
    } catch (error) {
      if (slots !== undefined) this.#host.unallocate(slots)
      // Almost full: what is left may still do for some of them.
      if (
        slots === undefined &&
        units.length > 1 &&
        error instanceof StoreError &&
        error.code === 'NO_SPACE'
      ) {
        const half = units.length >> 1
        const errnos = [await this.#format(units.slice(0, half)), await this.#format(units.slice(half))]
        return Math.max(...errnos)
      }
      errno = this.#errnoOf(error)
    }
    units.forEach((unit, index) => {
      const work = works[index]
      if (work === undefined) return
      for (const part of work.parts) this.#partDone(part, errno)
      this.#finish(unit, work)
    })
    return errno
  }

  async #startReleases(): Promise<void> {
    // However many trims came at once, a record has to fit into a frame of the journal.
    const units = this.#releases.splice(0, this.#unitsPerStep).sort((a, b) => a - b)
    if (this.#releases.length > 0) queueMicrotask(() => this.#startReleases())
    const { medium } = this.#tables
    let errno = 0
    for (const unit of units) this.#tables.clearDirect(unit)
    try {
      await this.#host.datapath.barrier()
      const changes: Change[] = []
      const freed: FreedRun[] = []
      for (const run of consecutive(units)) {
        const firstUnit = run[0] ?? 0
        changes.push({ op: CHANGE.released, medium, first: firstUnit, count: run.length, slot: 0 })
        if (this.#volume.provision === 'thick') continue // the reserved slots stay
        const first = firstUnit * this.#tables.formatUnit
        const end = this.#tables.unitStripes(run[run.length - 1] ?? 0)
        const count = end.first + end.count - first
        changes.push({ op: CHANGE.slots, medium, first, count, slot: 0 })
        const slots: number[] = []
        for (let stripe = first; stripe < first + count; stripe++) slots.push(this.#tables.slotOf(stripe))
        for (const slotRun of slotRunsOf(first, slots)) {
          freed.push({ slot: slotRun.slot, count: slotRun.count, owner: 'thin' })
        }
      }
      await this.#host.record(changes, (sequence) => {
        for (const change of changes) this.#tables.apply(change)
        this.#host.freeLater(freed, sequence)
      })
    } catch (error) {
      errno = this.#errnoOf(error)
    }
    for (const unit of units) {
      const work = this.#works.get(unit)
      assert(work !== undefined && work.state === 'releasing')
      for (const part of work.parts) this.#partDone(part, errno)
      this.#finish(unit, work)
    }
    this.#startMerges()
  }

  /** The unit is idle again; what waited for that goes on, in order. */
  #finish(unit: number, work: Work): void {
    assert(this.#works.get(unit) === work && work.active === 0)
    this.#works.delete(unit)
    for (const wake of work.waiters) wake()
    if (work.queue.length === 0) return
    for (const part of work.queue) this.#dispatch(part, false)
    this.#startMerges()
  }

  // ---- answers -------------------------------------------------------------------------------------------

  #request(upcall: Upcall): Request {
    return { upcall, order: this.#order++, outstanding: 1, errno: 0 }
  }

  #part(request: Request, unit: number, kind: PartKind): Part {
    request.outstanding++
    return { request, unit, kind }
  }

  #drained = new Map<Request, () => void>()

  /** All parts made so far are done. */
  #partsDrained(request: Request): Promise<void> {
    if (request.outstanding === 1) return Promise.resolve()
    return new Promise((resolve) => this.#drained.set(request, resolve))
  }

  #partDone(part: Part, errno: number): void {
    const { request } = part
    if (errno !== 0 && request.errno === 0) request.errno = errno
    request.outstanding--
    assert(request.outstanding >= 0)
    if (request.outstanding === 1) {
      const drained = this.#drained.get(request)
      this.#drained.delete(request)
      drained?.()
    } else if (request.outstanding === 0) {
      this.#answer(request)
    }
  }

  #partsMade(request: Request): void {
    request.outstanding--
    if (request.outstanding === 0) this.#answer(request)
  }

  #answer(request: Request): void {
    const { upcall } = request
    if (upcall.id === NOBODY) return
    if (request.errno === 0 && (upcall.flags & FLAG_FUA) !== 0) this.#flushThenComplete(upcall.id)
    else this.#host.datapath.complete(upcall.id, request.errno)
  }

  #flushThenComplete(id: number): void {
    this.#host.flush().then(
      () => this.#host.datapath.complete(id, 0),
      (error) => this.#host.datapath.complete(id, this.#errnoOf(error)),
    )
  }

  #errnoOf(error: unknown): number {
    if (!(error instanceof StoreError)) throw error // our own bug: stop
    this.#host.onTrouble(messageOf(error))
    return ERRNO_OF[error.code]
  }

  // ---- arithmetic ----------------------------------------------------------------------------------------

  get #unitBytes(): number {
    return this.#tables.formatUnit * this.#tables.stripeSize
  }

  get #unitsPerStep(): number {
    return Math.max(1, Math.floor(STRIPES_PER_STEP / this.#tables.formatUnit))
  }

  #reachesPast(upcall: Upcall): boolean {
    return upcall.offset + upcall.length > this.#end
  }

  #unitAt(offset: number): number {
    return Math.floor(offset / this.#unitBytes)
  }

  /** Bytes of a unit that lie inside the volume. */
  #bytesOf(unit: number): number {
    return Math.min(this.#unitBytes, this.#tables.size - unit * this.#unitBytes)
  }

  #coveredBy(part: Part): number {
    const from = Math.max(part.request.upcall.offset, part.unit * this.#unitBytes)
    const to = Math.min(
      part.request.upcall.offset + part.request.upcall.length,
      (part.unit + 1) * this.#unitBytes,
    )
    return to - from
  }
}

/** NBD specification, "Error values": a write past the end is told apart. */
function errnoPastEnd(upcall: Upcall): number {
  return upcall.kind === 'write' ? NBD_ERRNO.ENOSPC : NBD_ERRNO.EINVAL
}

function newWork(state: Work['state'], part?: Part): Work {
  return {
    state,
    parts: part === undefined ? [] : [part],
    queue: [],
    waiters: [],
    active: 0,
    covered: 0,
    heldUntil: 0,
  }
}

/** Cuts an ascending list into runs of consecutive numbers, none longer than `max`. */
function* consecutive(sorted: readonly number[], max = Number.POSITIVE_INFINITY): Generator<number[]> {
  let run: number[] = []
  for (const value of sorted) {
    if (run.length > 0 && (value !== (run[run.length - 1] ?? 0) + 1 || run.length >= max)) {
      yield run
      run = []
    }
    run.push(value)
  }
  if (run.length > 0) yield run
}

function* slotRunsOf(
  first: number,
  slots: readonly number[],
): Generator<{ first: number; count: number; slot: number }> {
  for (let at = 0; at < slots.length; ) {
    const slot = slots[at] ?? 0
    let count = 1
    while (at + count < slots.length && slots[at + count] === slot + count) count++
    yield { first: first + at, count, slot }
    at += count
  }
}

function formatChanges(
  medium: number,
  first: number,
  slots: readonly number[],
  unit: number,
  units: number,
): Change[] {
  const changes: Change[] = []
  for (const run of slotRunsOf(first, slots)) changes.push({ op: CHANGE.slots, medium, ...run })
  changes.push({ op: CHANGE.formatted, medium, first: unit, count: units, slot: 0 })
  return changes
}
