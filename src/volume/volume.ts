import { assert } from '../base/assert.ts'
import { UserError } from '../base/errors.ts'
import { Mutex } from '../base/locks.ts'
import { formatSize } from '../base/sizes.ts'
import type { Datapath, ExportCounters, ExportId } from '../datapath/datapath.ts'
import { IntentMap } from '../metadata/intents.ts'
import type { SlotRun, VolumeRecord } from '../metadata/records.ts'
import type { Commit } from '../metadata/store.ts'
import { Formatter, type FormatterInfo } from './formatter.ts'
import { newIntents, OPERATOR, VolumeIntents } from './intents.ts'
import type { VolumeLanes } from './lanes.ts'
import { VolumePolicy } from './policy.ts'
import { checkVolumeSize, grow, type ResizedVolume, shrink, slotsOf } from './resize.ts'
import { Stage } from './stage.ts'
import { CONTEXTS, type ExtraContext, type MapExtent, mapExtents } from './status.ts'
import type { VolumeTables } from './tables.ts'
import type { VolumeHost } from './volume-host.ts'
import type { ChangeWatcher } from './watchers.ts'

/** Slots that a caller has for itself, until it gives them back or the process ends. */
export interface ScratchSlots {
  readonly stripeSize: number
  /** @throws StoreError NO_SPACE also where a few are free: those are for clients */
  allocate(count: number): Promise<number[]>
  /** Calls `giveBack` when somebody lacks slots, who gets what is given back before it returns. @returns ends that */
  whenWanted(giveBack: () => void): () => void
  free(slots: readonly number[]): void
  write(slot: number, source: Buffer): Promise<void>
  read(slot: number, target: Buffer): Promise<void>
}

export type { FormatterInfo } from './formatter.ts'
export type { MapExtent } from './status.ts'

/** Bytes and counts of what src/metadata/intents.ts keeps. */
export interface IntentsInfo {
  readonly regionSize: number // bytes
  readonly hot: number // regions that may hold changes that are not durable
  readonly hotMax: number // regions, of all volumes of the pool together
  readonly announced: number // regions made hot since the volume was opened
  readonly suspect: number // bytes
  readonly stops: number // unclean ones, since the last acknowledgement
  readonly since: string | null // when the first of them was noticed
}

export interface VolumeInfo {
  readonly name: string
  readonly uuid: string
  readonly size: number
  readonly provision: 'thin' | 'thick'
  readonly formatUnit: number // stripes
  readonly stripeSize: number
  readonly fill: number
  readonly readOnly: boolean
  readonly failure: string | null // why nothing is written any more, and what to do
  readonly intents: IntentsInfo | null // null where nobody needs them
  readonly created: string
  readonly stripes: number
  readonly stripesFormatted: number
  readonly used: number // bytes of slots that hold content
  readonly sessions: number
  readonly formatter: FormatterInfo
  readonly counters: ExportCounters
}

/**
 * What a client sees: a size, tables, a policy for the datapath's upcalls, a background formatter. Everything that is
 * shared with other volumes (slots, journal, catalog) comes through VolumeHost, which the pool implements.
 */
export class Volume {
  readonly #host: VolumeHost
  readonly #policy: VolumePolicy
  readonly #formatter: Formatter
  readonly #changes = new Mutex() // one administrative change at a time
  readonly #recording = new Mutex() // one change of the stored record at a time: the formatter makes some, too
  #closed = false
  readonly exportId: ExportId
  readonly #extraContexts = new Set<ExtraContext>()
  #record: VolumeRecord
  #tables: VolumeTables
  #intentMap: IntentMap | undefined
  #intents: VolumeIntents | undefined
  #failure: string | undefined

  constructor(
    host: VolumeHost,
    record: VolumeRecord,
    tables: VolumeTables,
    intentMap: IntentMap | undefined,
  ) {
    this.#host = host
    this.#record = record
    this.#tables = tables
    this.#intentMap = intentMap
    this.#policy = new VolumePolicy(
      {
        datapath: host.datapath,
        allocate: (first, count) => this.#allocate(first, count),
        unallocate: (slots) => {
          if (this.#record.provision === 'thin') host.unallocate(slots)
        },
        freeLater: (runs, sequence) => host.freeLater(runs, sequence),
        record: (changes, apply) => host.record(changes, apply),
        flush: () => host.flush(),
        onTrouble: (code, message) => host.onTrouble(code, message),
      },
      record,
      tables,
    )
    this.exportId = host.datapath.openExport(
      {
        name: record.name,
        stripeSize: host.stripeSize,
        formatUnit: record.formatUnit,
        fill: record.fill,
        tables: tables.exportTables,
      },
      this.#policy,
    )
    this.#policy.bind(this.exportId)
    this.#policy.clientsWrite = record.secondaryOf === undefined
    if (intentMap !== undefined) {
      tables.clearDirectUnits(0, tables.unitCount) // a volume that is served again had some
      this.#intents = new VolumeIntents(host.hotSet, intentMap, this.#policy)
      this.#policy.useIntents(this.#intents)
    }
    this.#formatter = new Formatter(
      {
        unitBytes: record.formatUnit * host.stripeSize,
        unitCount: () => this.#tables.unitCount,
        formattedUnits: () => this.#tables.formattedUnits,
        nextUnformatted: (from) =>
          from >= this.#tables.unitCount ? from : this.#tables.init.nextClear(from),
        format: (unit, count) =>
          this.#policy.formatIdle(unit, Math.min(count, this.#tables.unitCount - unit)),
        save: (state, rate) => this.#save({ formatter: { state, rate } }),
        onEnd: (state, message) =>
          host.event(state === 'done' ? 'info' : 'error', `formatter.${state}`, this.name, message),
      },
      record.formatter.state,
      record.formatter.rate,
    )
  }

  get name(): string {
    return this.#record.name
  }
  get size(): number {
    return this.#tables.size
  }
  get readOnly(): boolean {
    return this.#record.readOnly || this.#failure !== undefined || this.isSecondary
  }
  /** Written by the primary of a mirror; clients only read. */
  get isSecondary(): boolean {
    return this.#record.secondaryOf !== undefined
  }
  get unitBytes(): number {
    return this.#tables.unitBytes
  }
  /** NBD meta contexts. */
  get contexts(): readonly { readonly id: number; readonly name: string }[] {
    return [...CONTEXTS, ...this.#extraContexts]
  }
  get intentMap(): IntentMap | undefined {
    return this.#intentMap
  }
  get record(): VolumeRecord {
    return this.#record
  }
  get tables(): VolumeTables {
    return this.#tables
  }
  get datapath(): Datapath {
    return this.#host.datapath
  }

  /** Goes on with what ran when the pool was closed. */
  resume(): void {
    if (this.#record.formatter.state === 'running') this.#formatter.resume()
  }

  /** Nothing is changed any more; for what reason, a sentence. */
  refuse(failure: string): void {
    this.#failure = failure
    this.#policy.refuse()
  }

  info(): VolumeInfo {
    const { formattedUnits, unitCount, formatUnit, stripeCount } = this.#tables
    const lastUnitIn = unitCount > 0 && this.#tables.init.get(unitCount - 1)
    const short = lastUnitIn ? unitCount * formatUnit - stripeCount : 0
    const stripesFormatted = formattedUnits * formatUnit - short
    return {
      name: this.name,
      uuid: this.#record.uuid,
      size: this.size,
      provision: this.#record.provision,
      formatUnit,
      stripeSize: this.#host.stripeSize,
      fill: this.#record.fill,
      readOnly: this.readOnly,
      failure: this.#failure ?? null,
      intents: this.#intentsInfo(),
      created: this.#record.created,
      stripes: stripeCount,
      stripesFormatted,
      used: stripesFormatted * this.#host.stripeSize,
      sessions: this.#host.datapath.sessionCount(this.exportId),
      formatter: this.#formatter.info(),
      counters: this.#host.datapath.exportCounters(this.exportId),
    }
  }

  /** Extents of the init bitmap: in order, no gaps, neighbours differ. */
  map(offset = 0, length = this.size - offset): Iterable<MapExtent> {
    if (
      !Number.isSafeInteger(offset) ||
      !Number.isSafeInteger(length) ||
      offset < 0 ||
      length < 0 ||
      offset + length > this.size
    ) {
      throw new UserError(
        'USAGE',
        `volume ${this.name}: the range ${offset}+${length} is not inside its ${this.size} bytes`,
      )
    }
    return mapExtents(this.#tables, offset, length, this.#intentMap)
  }

  /** The formatted share (0..1) of `cells` equal parts, for a picture. */
  density(cells: number): Float64Array {
    const { init, unitCount } = this.#tables
    const shares = new Float64Array(Math.min(cells, unitCount))
    for (let cell = 0; cell < shares.length; cell++) {
      const from = Math.floor((cell * unitCount) / shares.length)
      const to = Math.max(from + 1, Math.floor(((cell + 1) * unitCount) / shares.length))
      shares[cell] = init.count(from, to) / (to - from)
    }
    return shares
  }

  flush(): Promise<void> {
    return this.#host.flush()
  }

  // ---- mirrors --------------------------------------------------------------------------------------------

  /** From now on no change is made without it. In a moment in which the volume is quiet (`quiesce`). */
  watch(watcher: ChangeWatcher): void {
    this.#policy.watchers.add(watcher)
  }

  unwatch(watcher: ChangeWatcher): void {
    this.#policy.watchers.delete(watcher)
  }

  /** Resolves when what the watchers have noted until now is recorded. @throws StoreError */
  settleWatchers(): Promise<void> {
    return this.#policy.watchers.settle()
  }

  /** Runs `action` while no request is under way and nothing is written in place: a point in time. Requests wait, reads do not. */
  quiesce<T>(action: () => T | Promise<T>): Promise<T> {
    return this.#change(() => this.#policy.quiesce(action))
  }

  /** Ways for writes to both sides of a mirror. */
  get lanes(): VolumeLanes {
    return this.#policy.lanes
  }

  /** Changes content as a client's request would, also where clients may not. @returns errno (NBD) */
  submit(
    kind: 'write' | 'trim' | 'zero',
    offset: number,
    length: number,
    flags: number,
    payload?: Buffer,
  ): Promise<number> {
    return this.#policy.submit(kind, offset, length, flags, payload)
  }

  /** Reads what a client would. @throws StoreError MEMBER_IO */
  read(offset: number, target: Buffer): Promise<void> {
    return this.#host.datapath.readRange(this.exportId, offset, target)
  }

  /** Bytes of a write under way; see `Datapath.readPayload`. */
  readPayload(upcall: number, offset: number, target: Buffer): void {
    this.#host.datapath.readPayload(upcall, offset, target)
  }

  /** Free slots for what nobody records. */
  scratch(): ScratchSlots {
    const { datapath } = this.#host
    return {
      stripeSize: this.#host.stripeSize,
      allocate: (count) => this.#host.allocateSpare(count),
      whenWanted: (giveBack) => this.#host.whenWanted(giveBack),
      free: (slots) => this.#host.unallocate(slots),
      write: (slot, source) => datapath.writeSlot(slot, 0, source),
      read: (slot, target) => datapath.readSlot(slot, 0, target),
    }
  }

  /** Where the next formatted byte lies, at or after `offset`; the size where there is none. */
  nextFormatted(offset: number): number {
    const { init, unitBytes, unitCount, size } = this.#tables
    const unit = Math.floor(offset / unitBytes)
    if (unit >= unitCount) return size
    if (init.get(unit)) return offset
    return Math.min(size, init.nextSet(unit) * unitBytes)
  }

  /** Whether nothing in [offset, offset + length) is formatted. */
  isHole(offset: number, length: number): boolean {
    const { init, unitBytes } = this.#tables
    const end = Math.min(init.length, Math.ceil((offset + length) / unitBytes))
    const unit = Math.floor(offset / unitBytes)
    return unit >= end || init.nextSet(unit, end) === end
  }

  /** For content that replaces that of this volume at once; for a secondary. */
  openStage(): Stage {
    assert(this.isSecondary && this.#record.provision === 'thin', 'a stage of a secondary')
    return new Stage({
      datapath: this.#host.datapath,
      exportId: this.exportId,
      tables: () => this.#tables,
      allocate: (_first, count) => this.#host.allocate(_first, count),
      unallocate: (slots) => this.#host.unallocate(slots),
      freeLater: (runs, sequence) => this.#host.freeLater(runs, sequence),
    })
  }

  /** A thick volume gives up what it has reserved and not used: content that arrives from elsewhere takes other slots. */
  async becomeThin(): Promise<void> {
    if (this.#record.provision === 'thin') return
    await this.pauseFormatter()
    const changed = await this.quiesce(async () => {
      const { runs, provision } = this.#record
      if (provision === 'thin') return false // by another one that waited here, too
      let undo = (): void => {}
      await this.storeWith(
        { provision: 'thin', runs: [], formatter: { state: 'idle', rate: null } },
        () => {
          undo = this.#dropReserved()
          return {}
        },
        () => undo(),
      )
      this.#host.unreserveUnused(runs, this.#tables)
      this.#policy.setProvision('thin')
      return true
    })
    if (!changed) return
    const text =
      'it reserves nothing any more: what comes from the other side of its mirror takes slots as it comes'
    this.#host.event('warn', 'volume.thin', this.name, text)
  }

  /** Unformatted stripes of a thick volume forget their slots. @returns takes that back */
  #dropReserved(): () => void {
    const tables = this.#tables
    const dropped: SlotRun[] = []
    for (const run of tables.slotRuns()) {
      for (let stripe = run.stripe; stripe < run.stripe + run.count; stripe++) {
        if (tables.init.get(tables.unitOf(stripe))) continue
        dropped.push({ stripe, count: 1, slot: tables.slotOf(stripe) })
      }
    }
    for (const { stripe } of dropped) tables.setSlots(stripe, 1, 0)
    return () => {
      for (const { stripe, slot } of dropped) tables.setSlots(stripe, 1, slot)
    }
  }

  addContext(context: ExtraContext): void {
    this.#extraContexts.add(context)
    this.#policy.extraContexts = [...this.#extraContexts]
  }

  removeContext(context: ExtraContext): void {
    this.#extraContexts.delete(context)
    this.#policy.extraContexts = [...this.#extraContexts]
  }

  // ---- intents --------------------------------------------------------------------------------------------

  /**
   * From when this resolves, every change is announced on disk before it goes anywhere, until `releaseIntents` with the same
   * name, over restarts. What is hot at an unclean stop is what may differ then from what others have.
   * @param regionSize bytes; counts only where nobody needs intents yet
   */
  needIntents(name: string, regionSize?: number): Promise<void> {
    return this.#change(async () => {
      const { intents } = this.#record
      if (intents?.needs.includes(name)) return
      if (intents !== undefined) {
        await this.#save({ intents: { ...intents, needs: [...intents.needs, name] } })
        return
      }
      const made = newIntents(name, this.#tables.unitBytes, regionSize, `volume ${this.name}`)
      const map = new IntentMap(this.#tables.medium, made.regionUnits, this.#tables.unitCount)
      await this.#store(
        { intents: made },
        (putVolumes) => {
          this.#intentMap = map
          return { putVolumes }
        },
        () => {
          this.#intentMap = undefined
        },
      )
      this.#intents = new VolumeIntents(this.#host.hotSet, map, this.#policy)
      await this.#policy.requireIntents(this.#intents)
      await this.flush() // of what was written before it was announced
    })
  }

  /** With the last need all is forgotten, suspect regions too. */
  releaseIntents(name: string): Promise<void> {
    return this.#change(async () => {
      const { intents } = this.#record
      if (intents === undefined || !intents.needs.includes(name)) return
      const needs = intents.needs.filter((other) => other !== name)
      if (needs.length > 0) {
        await this.#save({ intents: { ...intents, needs } })
        return
      }
      const map = this.#intentMap
      await this.#store(
        { intents: undefined },
        (putVolumes) => {
          this.#intentMap = undefined // no later checkpoint stores a page of it
          return { putVolumes, pages: map?.removals() ?? [] }
        },
        () => {
          this.#intentMap = map
        },
      )
      this.#policy.releaseIntents()
      this.#intents?.drop()
      this.#intents = undefined
    })
  }

  /** The operator's need. */
  keepIntents(keep: boolean, regionSize?: number): Promise<void> {
    return keep ? this.needIntents(OPERATOR, regionSize) : this.releaseIntents(OPERATOR)
  }

  /**
   * Whoever wanted to know which regions are suspect has dealt with them: from now on none is.
   * @param stops how many unclean stops were known then
   * @throws UserError REFUSED where there were more since, or nobody needs intents
   */
  acknowledge(stops?: number): Promise<void> {
    return this.#change(async () => {
      const { intents } = this.#record
      const map = this.#intentMap
      if (intents === undefined || map === undefined) {
        throw new UserError(
          'REFUSED',
          `volume ${this.name} keeps no intents, so none of its regions are suspect: see fullstripe volume set --help`,
        )
      }
      if (stops !== undefined && intents.stops > stops) {
        throw new UserError(
          'REFUSED',
          `volume ${this.name}: the daemon was stopped out of order ${intents.stops} times by now, not ${stops}: look at the map again`,
        )
      }
      let undo = (): void => {}
      await this.#store(
        { intents: { ...intents, stops: 0, since: null } },
        (putVolumes) => {
          undo = map.acknowledge()
          return { putVolumes }
        },
        () => undo(),
      )
    })
  }

  #intentsInfo(): IntentsInfo | null {
    const map = this.#intentMap
    const { intents } = this.#record
    if (map === undefined || intents === undefined) return null
    const regionSize = map.regionUnits * this.#tables.unitBytes
    const last = map.regionCount - 1
    const cut = map.isSuspect(last) ? (last + 1) * regionSize - this.size : 0
    return {
      regionSize,
      hot: map.hotCount,
      hotMax: this.#host.hotSet.regionsMax,
      announced: this.#intents?.announced ?? 0,
      suspect: map.suspectCount * regionSize - cut,
      stops: intents.stops,
      since: intents.since,
    }
  }

  // ---- formatter, size, name, end -------------------------------------------------------------------------

  async startFormatter(options: { rate?: number | null } = {}): Promise<void> {
    if (this.#record.provision === 'thin') {
      throw new UserError(
        'REFUSED',
        `volume ${this.name} is thin: it is formatted as it is written; only thick volumes have a background formatter`,
      )
    }
    const { rate } = options
    if (rate !== undefined && rate !== null && !(Number.isSafeInteger(rate) && rate > 0)) {
      throw new UserError(
        'USAGE',
        `volume ${this.name}: the rate has to be a positive number of bytes a second`,
      )
    }
    await this.#change(() => this.#formatter.start(rate))
  }

  async pauseFormatter(): Promise<void> {
    await this.#change(() => this.#formatter.pause())
  }

  /** Grows online. A shrink throws content away, so it wants `force`. */
  async resize(size: number, options: { force?: boolean; byPrimary?: boolean } = {}): Promise<void> {
    const { watchers } = this.#policy
    if (this.isSecondary && options.byPrimary !== true) {
      throw new UserError(
        'REFUSED',
        `volume ${this.name} is the secondary of a mirror: resize it over there, and this side follows`,
      )
    }
    // Before the lock: they may have to make the volume quiet before they stop.
    await watchers.sizeChanges()
    try {
      await this.#resize(size, options)
    } finally {
      watchers.sizeChanged()
    }
  }

  #resize(size: number, options: { force?: boolean }): Promise<void> {
    return this.#change(async () => {
      checkVolumeSize(size, this.#host.stripeSize, `volume ${this.name}`)
      if (size === this.size) return
      if (size < this.size && options.force !== true) {
        throw new UserError(
          'REFUSED',
          `volume ${this.name}: shrinking from ${formatSize(this.size)} to ${formatSize(size)} throws away what lies past the new end; use --force if that is wanted`,
        )
      }
      const resume = this.#formatter.info().state === 'running'
      await this.#formatter.stop()
      try {
        const resized: ResizedVolume = {
          host: this.#host,
          policy: this.#policy,
          exportId: this.exportId,
          record: () => this.#record,
          tables: () => this.#tables,
          intentMap: () => this.#intentMap,
          intents: () => this.#intents,
          adopt: (tables) => this.#adopt(tables),
          store: (change, prepare, undo) => this.#store(change, prepare, undo),
        }
        if (size > this.size) await grow(resized, size)
        else await shrink(resized, size)
      } finally {
        if (resume) this.#formatter.resume()
      }
    })
  }

  /** Under the same lock as a resize; the pool checks that the name is free. */
  rename(name: string): Promise<void> {
    return this.#change(() => this.#save({ name }))
  }

  /** Ends sessions after answering what is in flight, stops the formatter. The tables are quiet afterwards. */
  close(): Promise<void> {
    return this.#change(async () => {
      this.#closed = true
      await this.#formatter.stop()
      await this.#policy.lanes.shut()
      await this.#host.datapath.closeExport(this.exportId)
      this.#policy.close()
      this.#intents?.drop() // what the disk says of them is for whoever closes the volume
    })
  }

  #adopt(tables: VolumeTables): void {
    this.#tables = tables
    this.#policy.useTables(tables)
  }

  async #allocate(first: number, count: number): Promise<number[]> {
    if (this.#record.provision === 'thin') return this.#host.allocate(first, count)
    return slotsOf(this.#record.runs, first, count)
  }

  #change<T>(action: () => Promise<T>): Promise<T> {
    return this.#changes.run(() => {
      // It waited for the end of the volume, without knowing.
      if (this.#closed) throw new UserError('BUSY', `volume ${this.name} is being closed`)
      return action()
    })
  }

  #save(change: Partial<VolumeRecord>): Promise<void> {
    return this.#recording.run(async () => {
      const record = { ...this.#record, ...change }
      await this.#host.save(record)
      this.#record = record
    })
  }

  /**
   * Changes the record in one transaction with what `prepare` returns, given the changed record, in the turn in which the dirty pages
   * are copied. Beside administrative changes: it waits for no request.
   * @throws UserError BUSY when the volume is closed; StoreError
   */
  storeWith(
    change: Partial<VolumeRecord>,
    prepare: (record: VolumeRecord) => Commit,
    undo: () => void = () => {},
  ): Promise<void> {
    return this.#recording.run(async () => {
      if (this.#closed) throw new UserError('BUSY', `volume ${this.name} is being closed`)
      const record = { ...this.#record, ...change }
      await this.#host.checkpointWith(() => ({ ...prepare(record), putVolumes: [record] }), undo)
      this.#record = record
      this.#policy.clientsWrite = record.secondaryOf === undefined
    })
  }

  /** `checkpointWith` for a change of the record. */
  #store(
    change: Partial<VolumeRecord>,
    prepare: (putVolumes: VolumeRecord[]) => Commit,
    undo: () => void,
  ): Promise<void> {
    return this.#recording.run(async () => {
      const record = { ...this.#record, ...change }
      await this.#host.checkpointWith(() => prepare([record]), undo)
      this.#record = record
      this.#policy.clientsWrite = record.secondaryOf === undefined
    })
  }
}
