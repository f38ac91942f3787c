import { assert, unreachable } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import type { Datapath, ExportHandler, ExportId, StatusResult, Upcall } from '../datapath/datapath.ts'
import type { Change } from '../metadata/journal.ts'
import { ERRNO_OF, NBD_ERRNO } from '../nbd/errno.ts'
import { Arrivals } from './arrivals.ts'
import type { FreedRun } from './freed-runs.ts'
import type { Region } from './hot-set.ts'
import type { IntentsTarget, VolumeIntents } from './intents.ts'
import { VolumeLanes } from './lanes.ts'
import { Merger } from './merger.ts'
import type { Entry } from './overlaps.ts'
import { Releaser } from './releaser.ts'
import { type Part, type Request, Requests } from './requests.ts'
import { consecutive } from './runs.ts'
import { type ExtraContext, statusOf } from './status.ts'
import type { VolumeTables } from './tables.ts'
import { Watchers } from './watchers.ts'
import { type Work, Works } from './works.ts'

/**
 * The policy answers the upcalls of one volume. A request is cut into one *part* for each format unit it touches;
 * a unit with something going on has a *work*, which is in one of five states:
 *
 *   preparing   the intent of its region is not durable yet (intents.ts), or a watcher has to save what is there
 *               (watchers.ts); parts wait
 *   gathering   not formatted; the parts collected here become one full-stripe write (DESIGN invariant 2)
 *   writing     that write is under way; later parts wait
 *   sharing     formatted; any number of parts are being written in place; a release waits behind them
 *   releasing   direct bits are cleared, barrier, record, bits cleared; later parts wait
 *
 *   none -> gathering -> writing -> none        none -> sharing -> none        none -> releasing -> none
 *   none -> preparing -> none, and at once to where the waiting parts lead
 *
 * A unit without a work is written in place by the datapath alone where its direct bits are 1. Everything the
 * policy writes in place itself holds a `sharing` work. So a release excludes both: the first by clearing direct bits
 * and a barrier, the second by the work.
 *
 * Order of a first write: slots taken, data written, record (journal; survives the death of the process), then slot, init bit and
 * direct bits in the tables, then the reply. A failure before the record gives the slots back: nobody saw them.
 * Order of a release: releaser.ts.
 *
 * Where a mirror takes part in every request (`ChangeWatcher.forward`), requests that overlap are done one after the other, and each
 * is answered when both sides have it.
 *
 * Where such a mirror has lanes (lanes.ts), a direct bit stands for both sides, and the policy sees what no lane can take.
 *
 * `quiesce` finds a moment in which no request is under way: new ones are held, direct bits are cleared, in-place writes and
 * requests that were begun are waited for. Reads go on.
 *
 * Once the pool takes no changes any more (`refuse`), no direct bit is set again, and what would change something is answered with EIO.
 */
export interface PolicyHost {
  readonly datapath: Datapath
  /** Slots for the stripes [first, first + count), in order; may wait for freed slots. @throws StoreError NO_SPACE */
  allocate(first: number, count: number): Promise<number[]>
  /** Takes back slots that `allocate` gave and nothing was recorded for. */
  unallocate(slots: readonly number[]): void
  /** Slots whose owner is gone since `sequence`. */
  freeLater(runs: Iterable<FreedRun>, sequence: number): void
  record(changes: readonly Change[], apply: (sequence: number) => void): Promise<number>
  flush(): Promise<void>
  /** A request failed; what kind of failure, and a line. */
  onTrouble(code: string, message: string): void
}

export interface PolicyVolume {
  readonly name: string
  readonly provision: 'thin' | 'thick'
  readonly fill: number
}

/** The id of a request that no client made. */
const NOBODY = -1

const FLAG_FUA = 1 << 0
const FLAG_NO_HOLE = 1 << 1
const FLAG_FAST_ZERO = 1 << 4

/** Stripes of one release, and of one zero-writing step: bounds the work of a turn, a record in the journal, and memory. */
const STRIPES_PER_STEP = 1024

export class VolumePolicy implements ExportHandler, IntentsTarget {
  readonly #host: PolicyHost
  #volume: PolicyVolume
  extraContexts: readonly ExtraContext[] = []
  #tables: VolumeTables
  #end: number // bytes; what reaches past it is refused
  #exportId: ExportId = -1
  readonly #requests = new Requests((request) => this.#answer(request))
  readonly #works = new Works()
  readonly #merger: Merger
  readonly #releaser: Releaser
  #intents: VolumeIntents | undefined
  #refusing = false
  #clientsWrite = true
  #mergesPlanned = false
  #mergesDue = false
  readonly #watchers = new Watchers()
  readonly lanes: VolumeLanes
  /** Upcalls that say `half`, with the regions they keep hot. */
  readonly #halves = new Map<number, readonly Region[]>()
  readonly #arrivals = new Arrivals({
    claim: (upcall) => this.lanes.claim(upcall),
    begin: (upcall, entry) => this.#begin(upcall, entry),
    keepsOrder: () => this.#watchers.forwards,
    begun: () => this.#merger.start(),
  })
  /** Requests that this program makes itself (`submit`). */
  readonly #own = new Map<number, (errno: number) => void>()

  constructor(host: PolicyHost, volume: PolicyVolume, tables: VolumeTables) {
    this.#host = host
    this.#volume = volume
    this.#tables = tables
    this.#end = tables.size
    tables.guardDirect((unit) => this.#mayOpen(unit))
    this.lanes = new VolumeLanes({
      datapath: host.datapath,
      exportId: () => this.#exportId,
      clearDirect: () => this.#tables.clearDirectUnits(0, this.#tables.unitCount),
    })
    this.#merger = new Merger(
      host,
      {
        tables: () => this.#tables,
        exportId: () => this.#exportId,
        setDirect: (unit) => this.#setDirect(unit),
        finish: (unit, work, errno) => this.#finishParts(unit, work, errno),
        errnoOf: (error) => this.#errnoOf(error),
      },
      this.#works,
    )
    this.#releaser = new Releaser(
      host,
      {
        tables: () => this.#tables,
        provision: () => this.#volume.provision,
        unitsMax: () => this.#unitsPerStep,
        finish: (unit, work, errno) => this.#finishParts(unit, work, errno),
        finished: () => this.#merger.start(),
        errnoOf: (error) => this.#errnoOf(error),
      },
      this.#works,
    )
  }

  /** After `Datapath.openExport`, before the first session. */
  bind(exportId: ExportId): void {
    this.#exportId = exportId
  }

  /** The tables of another size; requests may reach as far as they do. */
  useTables(tables: VolumeTables): void {
    this.#tables = tables
    this.#end = tables.size
    if (this.#refusing) tables.clearDirectUnits(0, tables.unitCount)
  }

  /** Before the first session: every change is announced. */
  useIntents(intents: VolumeIntents): void {
    this.#intents = intents
  }

  /** The same while clients write. Resolves when every change that was not announced is over. */
  async requireIntents(intents: VolumeIntents): Promise<void> {
    this.useIntents(intents)
    this.#tables.clearDirectUnits(0, this.#tables.unitCount)
    await this.#works.settled()
    await this.lanes.settled()
  }

  /** From now on nothing is announced. */
  releaseIntents(): void {
    this.#intents = undefined
  }

  /**
   * From now on nothing is changed: the pool could not make durable what it has, and may lose it. Reads go on.
   *
   * The answer is EIO. EPERM, which is what an export that was read-only from the start answers, would be read as "you may not",
   * by qemu and by programs behind it: something to report and go on after. EIO is what a failing disk says, and what everybody
   * is prepared for: file systems abort their journal and remount read-only, qemu applies its `werror` policy (pauses the
   * guest, or reports), databases stop. The Linux driver makes an I/O error of any of the two.
   */
  refuse(): void {
    this.#refusing = true
    this.#tables.clearDirectUnits(0, this.#tables.unitCount)
  }

  /** Refuses from now on what reaches past `size`, while the tables are still those of the larger volume. */
  limit(size: number): void {
    assert(size <= this.#tables.size)
    this.#end = size
  }

  /** Whether clients may change anything; where not, `submit` still does. */
  set clientsWrite(allowed: boolean) {
    if (this.#clientsWrite === allowed) return
    this.#clientsWrite = allowed
    if (!allowed) this.#tables.clearDirectUnits(0, this.#tables.unitCount)
  }

  setProvision(provision: PolicyVolume['provision']): void {
    this.#volume = { ...this.#volume, provision }
  }

  get watchers(): Watchers {
    return this.#watchers
  }

  onUpcalls(upcalls: readonly Upcall[]): void {
    for (const upcall of upcalls) {
      switch (upcall.kind) {
        case 'sync':
          this.#flushThenComplete(upcall.id)
          break
        case 'status':
          if (this.#reachesPast(upcall)) this.#complete(upcall.id, errnoPastEnd(upcall))
          else this.#host.datapath.completeStatus(upcall.id, this.#statusOf(upcall))
          break
        case 'write':
        case 'trim':
        case 'zero':
          if (upcall.half === true) this.#takeHalf(upcall)
          this.#arrivals.arrive(upcall)
          break
        default:
          unreachable(upcall.kind)
      }
    }
    this.#merger.start()
  }

  /**
   * Changes the volume as a client would, also where clients may not. The payload stays unchanged until it resolves.
   * @returns 0, or a number of the NBD errno table
   */
  submit(
    kind: 'write' | 'trim' | 'zero',
    offset: number,
    length: number,
    flags: number,
    payload?: Buffer,
  ): Promise<number> {
    const request = payload === undefined ? { kind, offset, length } : { kind, offset, length, payload }
    const id = this.#host.datapath.adopt(this.#exportId, request)
    return new Promise((resolve) => {
      this.#own.set(id, resolve)
      this.#arrivals.arrive({ id, kind, flags, offset, length, contexts: [] })
      // Those that are made in the same turn merge.
      if (this.#mergesDue) return
      this.#mergesDue = true
      queueMicrotask(() => {
        this.#mergesDue = false
        this.#merger.start()
      })
    })
  }

  /** Runs `action` while no request is under way and no write goes in place. One at a time, and never while the size changes. */
  async quiesce<T>(action: () => T | Promise<T>): Promise<T> {
    this.#arrivals.hold()
    try {
      this.#tables.clearDirectUnits(0, this.#tables.unitCount)
      await this.lanes.settled()
      await this.#requests.quiet()
      assert(this.areClear(0, this.#tables.unitCount), 'a direct bit was set while the volume was made quiet')
      return await action()
    } finally {
      this.#arrivals.release()
    }
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
    for (const u of units) this.#works.begin(u, 'writing')
    let done = 0
    let failed: number | undefined
    for (const run of consecutive(units)) {
      // Also after a failure: each of these units has a work now, which has to end.
      if ((await this.#merger.format(run)) === 0) done += run.length
      else failed ??= run[0]
    }
    if (failed !== undefined)
      throw new StoreError('MEMBER_IO', `volume ${this.#volume.name}: formatting failed at unit ${failed}`)
    return done
  }

  /** Releases every unit from `unit` on, as a forced shrink does; after `limit`, so that none is begun behind its back. */
  async releaseFrom(unit: number): Promise<void> {
    // What was begun before: a unit that is just being formatted is not released until it is.
    await this.#works.idleFrom(unit)
    const nobody: Upcall = { id: NOBODY, kind: 'trim', flags: 0, offset: 0, length: 0, contexts: [] }
    const request = this.#requests.begin(nobody)
    await this.#releaseUnits(request, unit, this.#tables.unitCount)
    this.#requests.made(request)
    if (request.errno !== 0)
      throw new StoreError('MEMBER_IO', `volume ${this.#volume.name}: releasing the end failed`)
  }

  /** Runs `action` while nothing else changes the unit; in-place writes by the datapath go on. */
  async withUnit<T>(unit: number, action: () => Promise<T>): Promise<T> {
    await this.#works.idle(unit)
    const work = this.#works.begin(unit, 'writing')
    try {
      return await action()
    } finally {
      this.#finish(unit, work)
    }
  }

  /** Forgets timers; all upcalls were answered (Datapath.closeExport). */
  close(): void {
    assert(this.#arrivals.idle, 'closed with requests that wait')
    assert(this.#works.size === 0, `volume ${this.#volume.name}: closed with work under way`)
    this.#merger.close()
  }

  // ---- requests ----------------------------------------------------------------------------------------

  /**
   * Crash rule: what a lane has changed here, and perhaps not over there, is noted in the turn in which it comes back, and its region stays
   * hot. It was hot when the lane wrote, and the barrier that a region cools after resolves later than this.
   */
  #takeHalf(upcall: Upcall): void {
    const regions: Region[] = []
    for (
      let unit = this.#unitAt(upcall.offset);
      unit <= this.#unitAt(upcall.offset + upcall.length - 1);
      unit++
    ) {
      const region = this.#intents?.tryPin(unit)
      if (region !== undefined) regions.push(region)
    }
    this.#halves.set(upcall.id, regions)
    this.#watchers.failedHere(upcall)
  }

  #begin(upcall: Upcall, entry: Entry | undefined): void {
    const errno = this.#objectionTo(upcall)
    if (errno !== 0) this.#finishRequest(upcall, entry, errno)
    else if (upcall.kind === 'write') this.#write(upcall, entry)
    else this.#discard(upcall, entry)
  }

  #objectionTo(upcall: Upcall): number {
    if (this.#refusing) return NBD_ERRNO.EIO
    if (!this.#clientsWrite && upcall.lane !== true && !this.#own.has(upcall.id)) return NBD_ERRNO.EPERM
    // The volume shrank after the datapath had checked the range.
    return this.#reachesPast(upcall) ? errnoPastEnd(upcall) : 0
  }

  #write(upcall: Upcall, entry: Entry | undefined): void {
    const request = this.#requests.begin(upcall, entry)
    const sequential = this.#merger.observe(upcall.offset, upcall.length)
    const first = this.#unitAt(upcall.offset)
    const last = this.#unitAt(upcall.offset + upcall.length - 1)
    for (let unit = first; unit <= last; unit++) {
      this.#dispatch(this.#requests.part(request, unit, 'write'), sequential)
    }
    this.#requests.made(request)
  }

  /** Trim and write-zeroes: whole units by clearing init bits, the rest by writing zeros. */
  #discard(upcall: Upcall, entry: Entry | undefined): void {
    const { offset, length } = upcall
    const end = offset + length
    const unitBytes = this.#tables.unitBytes
    const firstWhole = Math.ceil(offset / unitBytes)
    // The last unit is whole for a request that reaches the end of the volume.
    const endWhole = end === this.#tables.size ? this.#tables.unitCount : Math.floor(end / unitBytes)
    // Released stripes read as the fill pattern, and this range has to read as zeros.
    const writes = this.#volume.fill !== 0 || (upcall.kind === 'zero' && (upcall.flags & FLAG_NO_HOLE) !== 0)
    const fast = !writes && firstWhole < endWhole
    if ((upcall.flags & FLAG_FAST_ZERO) !== 0 && !fast && this.#needsWriting(offset, end, writes)) {
      this.#finishRequest(upcall, entry, NBD_ERRNO.ENOTSUP)
      return
    }
    const request = this.#requests.begin(upcall, entry)
    if (firstWhole >= endWhole) {
      for (let unit = this.#unitAt(offset); unit <= this.#unitAt(end - 1); unit++)
        this.#dispatchZero(request, unit, writes)
      this.#requests.made(request)
      return
    }
    if (offset < firstWhole * unitBytes) this.#dispatchZero(request, firstWhole - 1, writes)
    if (end > endWhole * unitBytes && endWhole < this.#tables.unitCount)
      this.#dispatchZero(request, endWhole, writes)
    const whole = writes
      ? this.#zeroUnits(request, firstWhole, endWhole)
      : this.#releaseUnits(request, firstWhole, endWhole)
    whole.then(() => this.#requests.made(request))
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
    this.#dispatch(this.#requests.part(request, unit, 'zero'), false)
  }

  async #zeroUnits(request: Request, from: number, to: number): Promise<void> {
    for (let at = from; at < to && request.errno === 0; at += this.#unitsPerStep) {
      const end = Math.min(at + this.#unitsPerStep, to)
      for (let unit = at; unit < end; unit++)
        this.#dispatch(this.#requests.part(request, unit, 'zero'), false)
      this.#merger.start()
      await this.#requests.drained(request)
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
        this.#dispatch(this.#requests.part(request, at, 'release'), false)
        at = next(at + 1)
      }
      await this.#requests.drained(request)
    }
  }

  // ---- parts and works -----------------------------------------------------------------------------------

  #dispatch(part: Part, sequential: boolean): void {
    const { upcall } = part.request
    if (this.#refusing) {
      this.#requests.done(part, NBD_ERRNO.EIO)
      return
    }
    // The volume shrank while the request was under way.
    if (this.#reachesPast(upcall)) {
      this.#requests.done(part, errnoPastEnd(upcall))
      return
    }
    const work = this.#works.get(part.unit)
    if (work === undefined && part.kind === 'release' && !this.#tables.init.get(part.unit)) {
      this.#requests.done(part, 0)
      return
    }
    if (this.#intents !== undefined && part.region === undefined) {
      part.region = this.#intents.tryPin(part.unit)
      if (part.region === undefined) {
        // A work that began before intents were needed: what it does is waited for by whoever needs them.
        if (work !== undefined) work.queue.push(part)
        else this.#prepare(part, sequential, this.#intents.announce(part.unit, sequential))
        return
      }
    }
    if (this.#watchers.size > 0) {
      const wait = this.#watchers.prepare(part.unit)
      if (wait !== undefined) {
        if (work === undefined) {
          this.#prepare(part, sequential, wait)
        } else {
          work.queue.push(part)
          wait.catch(() => {}) // asked again, and told again, when the work ends
        }
        return
      }
    }
    if (part.known === undefined && part.request.entry !== undefined) this.#forward(part)
    if (work === undefined) {
      const formatted = this.#tables.init.get(part.unit)
      // The last unit may have grown since the request came, and what is behind is not the request's: zeros are written then.
      if (
        part.kind === 'release' &&
        (upcall.id === NOBODY || this.#coveredBy(part) >= this.#tables.bytesOf(part.unit))
      ) {
        this.#works.begin(part.unit, 'releasing', part)
        this.#releaser.release(part.unit)
        return
      }
      if (formatted) {
        const sharing = this.#works.begin(part.unit, 'sharing')
        // The sharing work does not depend on it.
        this.#setDirect(part.unit)
        this.#writeInPlace(sharing, part)
        return
      }
      const gathering = this.#works.begin(part.unit, 'gathering', part)
      gathering.covered = this.#coveredBy(part)
      this.#merger.gather(part.unit, gathering, sequential)
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

  /**
   * Crash rule: the other side of a mirror gets nothing before the intent is durable here, and the region stays hot until it has it;
   * otherwise nobody would know what one side lacks.
   */
  #forward(part: Part): void {
    const { request, unit } = part
    const { upcall } = request
    const offset = Math.max(upcall.offset, unit * this.#tables.unitBytes)
    const all = this.#watchers.forward(upcall, offset, this.#coveredBy(part))
    if (all.length === 0) return
    for (const { answered } of all) request.forwarded.push(answered)
    part.known = Promise.all(all.map(({ known }) => known))
  }

  /** The part, and those for the same unit that come meanwhile, wait. */
  #prepare(part: Part, sequential: boolean, ready: Promise<unknown>): void {
    const { unit } = part
    const work = this.#works.begin(unit, 'preparing')
    work.queue.push(part)
    ready.then(
      () => {
        this.#finish(unit, work, sequential)
        // Those of its neighbours are about to end in the same turn, and their merges with them.
        if (this.#mergesPlanned) return
        this.#mergesPlanned = true
        setImmediate(() => {
          this.#mergesPlanned = false
          this.#merger.start()
        })
      },
      (error) => {
        const errno = this.#errnoOf(error)
        for (const waiting of work.queue.splice(0)) this.#requests.done(waiting, errno)
        this.#finish(unit, work)
      },
    )
  }

  // ---- direct bits ---------------------------------------------------------------------------------------

  /** Where nothing forbids it. */
  #setDirect(unit: number): void {
    if (this.#mayOpen(unit)) this.#tables.setDirect(unit)
  }

  #mayOpen(unit: number): boolean {
    if (this.#refusing || this.#arrivals.holding) return false
    if (!this.#clientsWrite && !this.lanes.serving) return false
    return this.#intents?.isHot(unit) !== false && this.#watchers.mayOpen(unit)
  }

  openUnits(first: number, count: number): void {
    const { init, unitCount } = this.#tables
    const end = Math.min(first + count, unitCount)
    if (first >= end) return
    for (let unit = init.nextSet(first, end); unit < end; unit = init.nextSet(unit + 1, end)) {
      // A work keeps them clear for its own reasons, or sets them itself.
      if (!this.#works.has(unit)) this.#setDirect(unit)
    }
  }

  clearUnits(first: number, count: number): void {
    this.#tables.clearDirectUnits(first, count)
  }

  areClear(first: number, count: number): boolean {
    return this.#tables.areClear(first, count)
  }

  areBusy(first: number, count: number): boolean {
    const { unitBytes, unitCount } = this.#tables
    const end = Math.min(first + count, unitCount)
    if (first >= end) return false
    const offset = first * unitBytes
    const length = (end - first) * unitBytes
    return this.lanes.busy(offset, length) || this.#watchers.needsIntent(offset, length)
  }

  async settled(): Promise<void> {
    await Promise.all([this.lanes.settled(), this.#watchers.settle()])
  }

  // ---- works ---------------------------------------------------------------------------------------------

  #writeInPlace(work: Work, part: Part): void {
    assert(work.state === 'sharing')
    work.active++
    const { upcall } = part.request
    const { first, count } = this.#tables.unitStripes(part.unit)
    const { stripeSize } = this.#tables
    const from = Math.max(first, Math.floor(upcall.offset / stripeSize))
    const to = Math.min(first + count - 1, Math.floor((upcall.offset + upcall.length - 1) / stripeSize))
    const { datapath } = this.#host
    const write =
      from === to
        ? datapath.writePart(upcall.id, from, this.#tables.slotOf(from))
        : Promise.allSettled(
            Array.from({ length: to - from + 1 }, (_, index) =>
              datapath.writePart(upcall.id, from + index, this.#tables.slotOf(from + index)),
            ),
          ).then((results) => {
            for (const result of results) if (result.status === 'rejected') throw result.reason
          })
    const done = (errno: number): void => {
      this.#requests.done(part, errno)
      work.active--
      if (work.active === 0) this.#finish(part.unit, work)
    }
    write.then(
      () => done(0),
      (error) => done(this.#errnoOf(error)),
    )
  }

  #finishParts(unit: number, work: Work, errno: number): void {
    for (const part of work.parts) this.#requests.done(part, errno)
    this.#finish(unit, work)
  }

  /** The unit is idle again; what waited for that goes on, in order. */
  #finish(unit: number, work: Work, sequential = false): void {
    this.#works.end(unit, work)
    if (work.queue.length === 0) return
    for (const part of work.queue) this.#dispatch(part, sequential)
    if (work.state !== 'preparing') this.#merger.start()
  }

  // ---- answers -------------------------------------------------------------------------------------------

  #answer(request: Request): void {
    const { upcall, forwarded, entry } = request
    if (upcall.id === NOBODY) return
    if (request.errno !== 0 && forwarded.length > 0) this.#watchers.failedHere(upcall)
    const hard = request.errno === 0 && (upcall.flags & FLAG_FUA) !== 0
    const waits = hard ? [...forwarded, this.#host.flush()] : forwarded
    if (waits.length === 0) {
      this.#finishRequest(upcall, entry, request.errno)
      return
    }
    Promise.all(waits).then(
      () => this.#finishRequest(upcall, entry, request.errno),
      (error) => this.#finishRequest(upcall, entry, this.#errnoOf(error)),
    )
  }

  #finishRequest(upcall: Upcall, entry: Entry | undefined, errno: number): void {
    this.#complete(upcall.id, errno)
    this.lanes.leave(upcall)
    const regions = this.#halves.get(upcall.id)
    if (regions !== undefined) {
      this.#halves.delete(upcall.id)
      for (const region of regions) region.owner.unpin(region)
    }
    this.#arrivals.leave(entry)
  }

  #complete(id: number, errno: number): void {
    this.#host.datapath.complete(id, errno)
    const own = this.#own.get(id)
    if (own === undefined) return
    this.#own.delete(id)
    own(errno)
  }

  #flushThenComplete(id: number): void {
    const waits = this.#watchers.size > 0 ? this.#watchers.flush() : []
    Promise.all([this.#host.flush(), ...waits]).then(
      () => this.#complete(id, 0),
      (error) => this.#complete(id, this.#errnoOf(error)),
    )
  }

  #errnoOf(error: unknown): number {
    if (!(error instanceof StoreError)) throw error // our own bug: stop
    this.#host.onTrouble(error.code, messageOf(error))
    return ERRNO_OF[error.code]
  }

  // ---- arithmetic ----------------------------------------------------------------------------------------

  #statusOf(upcall: Upcall): StatusResult[] {
    return statusOf(this.#tables, this.#volume, upcall, this.extraContexts)
  }

  get #unitsPerStep(): number {
    return Math.max(1, Math.floor(STRIPES_PER_STEP / this.#tables.formatUnit))
  }

  #reachesPast(upcall: Upcall): boolean {
    return upcall.offset + upcall.length > this.#end
  }

  #unitAt(offset: number): number {
    return Math.floor(offset / this.#tables.unitBytes)
  }

  #coveredBy(part: Part): number {
    const from = Math.max(part.request.upcall.offset, part.unit * this.#tables.unitBytes)
    const to = Math.min(
      part.request.upcall.offset + part.request.upcall.length,
      (part.unit + 1) * this.#tables.unitBytes,
    )
    return to - from
  }
}

/** NBD specification, "Error values": a write past the end is told apart. */
function errnoPastEnd(upcall: Upcall): number {
  return upcall.kind === 'write' ? NBD_ERRNO.ENOSPC : NBD_ERRNO.EINVAL
}
