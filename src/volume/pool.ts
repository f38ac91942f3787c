import { randomUUID } from 'node:crypto'
import type { Logger } from 'pino'
import { assert } from '../base/assert.ts'
import { messageOf, printable, StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Mutex } from '../base/locks.ts'
import { approximateSize } from '../base/sizes.ts'
import { hasControlCharacters } from '../base/text.ts'
import { Throttle } from '../base/throttle.ts'
import type { Datapath, StoreLayout } from '../datapath/datapath.ts'
import { openDatapath } from '../datapath/open.ts'
import type { CopyMap } from '../metadata/copy.ts'
import { IntentMap } from '../metadata/intents.ts'
import { Ledger, type PageSource } from '../metadata/ledger.ts'
import type { PoolRecord, VolumeRecord } from '../metadata/records.ts'
import { SlotAllocator } from '../stripe/allocator.ts'
import { chunkOffsetOf } from '../stripe/geometry.ts'
import { HotSet, type HotSetOptions } from './hot-set.ts'
import { newIntents, OPERATOR } from './intents.ts'
import { MirrorBook, type StoredMirror } from './mirror-book.ts'
import { type PoolInfo, poolInfo } from './pool-info.ts'
import { closeParts, descriptorOf, openPoolParts, type PoolParts } from './pool-parts.ts'
import { Reclaimer } from './reclaimer.ts'
import { recoverPool } from './recovery.ts'
import { checkVolumeSize } from './resize.ts'
import { slotRunsOf } from './runs.ts'
import { VolumeTables } from './tables.ts'
import { Volume } from './volume.ts'
import type { VolumeHost } from './volume-host.ts'

/**
 * A pool that is being served.
 *
 * Opening: lock, members, LMDB, journal recovery, checkpoint of what was recovered, journal started anew, slots counted
 * from the maps (there is no stored free list that could disagree with them), exports opened.
 * Closing: exports drained, flush, hot regions cooled, checkpoint, everything closed, unlock.
 *
 * When a sync fails (ledger.ts, rule 4) all volumes are read-only from then on, until the pool is opened again.
 */
export { createPool, type PoolCreateOptions } from './create-pool.ts'
export type { PoolInfo, PoolMemberInfo } from './pool-info.ts'
export { closeParts, openPoolParts, type PoolParts } from './pool-parts.ts'

export interface PoolEvent {
  readonly time: string // ISO 8601
  readonly level: 'info' | 'warn' | 'error'
  readonly kind: string
  readonly object: string
  readonly message: string
}

export interface PoolOptions {
  readonly datapath: 'auto' | 'native' | 'portable'
  readonly threads?: number
  readonly log: Logger
  readonly onEvent?: (event: PoolEvent) => void
  readonly hotSet?: HotSetOptions
}

export interface VolumeCreateOptions {
  readonly name: string
  readonly size: number // bytes
  readonly provision?: 'thin' | 'thick'
  readonly formatUnit?: number // stripes
  readonly fill?: number // byte
  readonly readOnly?: boolean
  /** Regions that may hold changes that were not flushed are known after an unclean stop. */
  readonly intents?: boolean
  readonly regionSize?: number // bytes; of those regions
}

type PageHolder = VolumeTables | IntentMap | CopyMap

const SPACE_EVENTS_PERCENT = [80, 90, 95]
/** Bytes that are worth a process to give them back to the file system. */
const PUNCH_BY_PROCESS_MIN = 1 << 20

export interface VolumeDeletion {
  /** The volume is about to be closed for good: resolves when nothing uses it any more. */
  leaves(volume: Volume): Promise<void>
  /** That could not be stored: it is served again, by another object. */
  stays(volume: Volume): Promise<void>
}

export class Pool {
  readonly directory: string
  readonly datapath: Datapath
  readonly mirrors: MirrorBook
  #deletion: VolumeDeletion | undefined
  readonly #parts: PoolParts
  readonly #options: PoolOptions
  readonly #allocator: SlotAllocator
  readonly #ledger: Ledger
  readonly #reclaimer: Reclaimer
  readonly #volumes = new Map<string, Volume>()
  /** Being deleted: found by nobody, but a checkpoint still has to hold their pages until the catalog forgets them. */
  readonly #leaving = new Set<Volume>()
  readonly #changes = new Mutex() // of the set of volumes and their names
  #closed = false
  #nextId: number
  #spaceLevel = 0
  #failedMembers = new Map<number, string>()
  readonly #record: PoolRecord
  readonly #hotSet: HotSet
  readonly #errorsSeen = new WeakMap<Volume, number>()
  readonly #troubles = new Throttle(LIMITS.troubleEventMs)
  #failure: string | undefined // why nothing is changed any more
  /** Of those who have slots that they can do without. */
  readonly #givers = new Set<() => void>()

  private constructor(
    parts: PoolParts,
    record: PoolRecord,
    datapath: Datapath,
    allocator: SlotAllocator,
    mirrors: readonly StoredMirror[],
    options: PoolOptions,
  ) {
    this.directory = parts.directory
    this.datapath = datapath
    this.#parts = parts
    this.#record = record
    this.#options = options
    this.#allocator = allocator
    this.#nextId = parts.store.nextId()
    this.#ledger = new Ledger({
      journal: parts.journal,
      store: parts.store,
      source: this.#pageSource(),
      syncMembers: () => datapath.sync(),
      onDurable: (sequence) => this.#reclaimer.onDurable(sequence),
      onTrouble: (kind, message) => {
        if (kind === 'sync') this.#fail(message)
        else this.#event('error', `metadata.${kind}`, this.directory, message)
      },
    })
    this.mirrors = new MirrorBook(
      {
        change: (action) => this.#change(action),
        takeId: () => ({ id: this.#nextId++, nextId: this.#nextId }),
        volume: (id) => this.volumes().find((volume) => volume.record.id === id),
        record: (changes, apply) => this.#ledger.record(changes, apply),
        commit: (commit) => this.#ledger.commit(commit),
        checkpointWith: (prepare, undo) => this.#ledger.checkpointWith(prepare, undo),
      },
      mirrors,
    )
    this.#hotSet = new HotSet(
      {
        record: (changes, apply) => this.#ledger.record(changes, apply),
        harden: () => this.#ledger.harden(),
        barrier: () => datapath.barrier(),
        flush: () => this.#ledger.flush(),
        syncsBegun: () => this.#ledger.syncsBegun,
        lastSync: () => this.#ledger.lastSync,
        onTrouble: (message) => this.#trouble(this.directory, 'intents', message),
      },
      options.hotSet,
    )
    this.#reclaimer = new Reclaimer(
      {
        datapath: {
          barrier: () => datapath.barrier(),
          punch: async (slot, count) =>
            this.#failure === undefined &&
            ((await datapath.punch(slot, count)) || this.#punchMembers(slot, count)),
        },
        free: (slot, count, owner) => {
          if (owner === 'thin') this.#allocator.free(slot, count)
          else this.#allocator.unreserve(slot, count)
        },
        flush: () => this.#ledger.flush(),
        onTrouble: (message) => this.#event('warn', 'pool.space', this.directory, message),
      },
      parts.journal.lastSequence,
    )
  }

  /** @throws UserError BUSY when another process has it, NOT_FOUND, REFUSED or FAILED with the reason */
  static async open(directory: string, options: PoolOptions): Promise<Pool> {
    return Pool.start(await openPoolParts(directory, 'serve'), options, (layout) =>
      openDatapath(layout, {
        mode: options.datapath,
        ...(options.threads === undefined ? {} : { threads: options.threads }),
      }),
    )
  }

  /**
   * Recovers and serves a pool whose parts are open; where that fails they are closed.
   * @throws UserError REFUSED or FAILED with the reason
   */
  static async start(
    parts: PoolParts,
    options: PoolOptions,
    datapathOver: (layout: StoreLayout) => Datapath,
  ): Promise<Pool> {
    let datapath: Datapath | undefined
    let pool: Pool | undefined
    try {
      for (const note of parts.memberNotes) options.log.warn({ pool: parts.directory }, note)
      const allocator = new SlotAllocator(parts.geometry.slots)
      const recovered = await recoverPool(parts, allocator)
      if (recovered.changes > 0 || recovered.dropped > 0) {
        options.log.info(
          { pool: parts.directory, changes: recovered.changes, dropped: recovered.dropped },
          'recovered map changes from the journal',
        )
      }
      const { chunkSize, dataMembers, parityMembers, dataOffset } = parts.geometry
      const memberFds = parts.members.map(descriptorOf)
      datapath = datapathOver({ memberFds, chunkSize, dataMembers, parityMembers, dataOffset })
      pool = new Pool(parts, recovered.record, datapath, allocator, recovered.mirrors, options)
      for (const { record, tables, intents, suspects } of recovered.volumes) {
        const volume = pool.#add(record, tables, intents)
        if (suspects > 0) pool.#tellSuspects(volume, suspects)
      }
      for (const volume of pool.volumes()) volume.resume()
      return pool
    } catch (error) {
      if (pool !== undefined) {
        await pool.close()
      } else {
        await datapath?.close()
        await closeParts(parts)
      }
      if (error instanceof UserError) throw error
      throw new UserError('FAILED', `cannot open the pool ${parts.directory}: ${messageOf(error)}`, {
        cause: error,
      })
    }
  }

  info(): PoolInfo {
    const members = this.#parts.members.map(({ index, path, kind, size }) => ({
      index,
      path,
      kind,
      size,
      state: this.#failedMembers.has(index) ? ('failed' as const) : ('online' as const),
    }))
    return poolInfo(this.directory, this.#record, this.#parts.geometry, members, {
      used: this.volumes().reduce((sum, volume) => sum + volume.info().stripesFormatted, 0),
      reserved: this.#allocator.reservedCount,
      failure: this.#failure,
    })
  }

  volumes(): readonly Volume[] {
    return [...this.#volumes.values()].sort((a, b) => (a.name < b.name ? -1 : 1))
  }

  /** @throws UserError NOT_FOUND */
  volume(name: string): Volume {
    const volume = this.#volumes.get(name)
    if (volume === undefined) {
      throw new UserError(
        'NOT_FOUND',
        `there is no volume ${printable(name)}: see the names with: fullstripe volume list`,
      )
    }
    return volume
  }

  /** @throws UserError USAGE, EXISTS or FAILED (a thick volume larger than what is free) */
  createVolume(options: VolumeCreateOptions): Promise<Volume> {
    return this.#change(async () => {
      const { name, size, provision = 'thin', formatUnit = 1, fill = 0, readOnly = false } = options
      const { stripeSize } = this.#parts.geometry
      this.#checkNewName(name)
      checkVolumeSize(size, stripeSize, `volume ${name}`)
      const unitMax = Math.floor(LIMITS.formatUnitBytesMax / stripeSize)
      if (!Number.isInteger(formatUnit) || formatUnit < 1 || formatUnit > unitMax) {
        throw new UserError(
          'USAGE',
          `volume ${name}: the format unit has to be 1 to ${unitMax} stripes, not ${formatUnit}`,
        )
      }
      if (!Number.isInteger(fill) || fill < 0 || fill > 255) {
        throw new UserError('USAGE', `volume ${name}: the fill byte has to be 0 to 255, not ${fill}`)
      }
      if (this.#volumes.size >= LIMITS.volumesPerPoolMax) {
        throw new UserError(
          'REFUSED',
          `the pool has ${this.#volumes.size} volumes, which is the most it can have: delete one first`,
        )
      }
      const unitCount = Math.ceil(Math.ceil(size / stripeSize) / formatUnit)
      const intents =
        options.intents === true
          ? newIntents(OPERATOR, formatUnit * stripeSize, options.regionSize, `volume ${name}`)
          : undefined
      const stripes = Math.ceil(size / stripeSize)
      const runs =
        provision === 'thick'
          ? [{ stripe: 0, count: stripes, slot: await this.#reserve(stripes, `volume ${name}`) }]
          : []
      const id = this.#nextId++
      const record: VolumeRecord = {
        id,
        name,
        uuid: randomUUID(),
        created: new Date().toISOString(),
        medium: id,
        size,
        provision,
        formatUnit,
        fill,
        readOnly,
        runs,
        formatter: { state: 'idle', rate: null },
        intents,
      }
      try {
        await this.#ledger.commit({ putVolumes: [record], nextId: this.#nextId })
      } catch (error) {
        for (const run of runs) this.#allocator.unreserve(run.slot, run.count)
        throw asUserError(error, `volume ${name} was not created`)
      }
      const tables = new VolumeTables(id, { size, stripeSize, formatUnit })
      const map = intents === undefined ? undefined : new IntentMap(id, intents.regionUnits, unitCount)
      const volume = this.#add(record, tables, map)
      this.#event('info', 'volume.created', name, `${provision} volume of ${approximateSize(size)}`)
      this.#watchSpace()
      return volume
    })
  }

  /** Who uses volumes beside their clients is told here. */
  onDelete(deletion: VolumeDeletion): void {
    this.#deletion = deletion
  }

  /** @throws UserError NOT_FOUND; BUSY while clients are connected, REFUSED where it has mirrors, both unless forced */
  deleteVolume(name: string, options: { force?: boolean } = {}): Promise<void> {
    return this.#change(async () => {
      const volume = this.volume(name)
      const sessions = this.datapath.sessionCount(volume.exportId)
      if (sessions > 0 && options.force !== true) {
        throw new UserError(
          'BUSY',
          `volume ${name} has ${sessions} connected client${sessions > 1 ? 's' : ''}: detach them or use --force`,
        )
      }
      const mirrors = this.mirrors.of(volume.record.id)
      if (mirrors.length > 0 && options.force !== true) {
        const names = mirrors.map(({ record }) => record.name).join(', ')
        throw new UserError(
          'REFUSED',
          `volume ${name} has mirrors (${names}): remove them first, or use --force, which forgets them on this side`,
        )
      }
      this.#volumes.delete(name) // no new client finds it
      this.#leaving.add(volume)
      await this.#deletion?.leaves(volume)
      await volume.close()
      const leaving = await this.mirrors.leave(volume.record.id)
      try {
        // As part of a checkpoint, so that none that copied its pages earlier can store them after it is gone.
        await this.#ledger.checkpointWith(
          () => {
            this.#leaving.delete(volume)
            return { dropVolumes: [volume.record], ...leaving.drop() }
          },
          () => {
            this.#leaving.add(volume)
            leaving.back()
          },
        )
      } catch (error) {
        // Still in the catalog: serve it again.
        this.#leaving.delete(volume)
        const again = this.#add(volume.record, volume.tables, volume.intentMap)
        leaving.stay()
        // No client finds it before its mirrors see what clients change.
        this.#volumes.delete(name)
        this.#leaving.add(again)
        await this.#deletion?.stays(again)
        this.#leaving.delete(again)
        this.#volumes.set(name, again)
        again.resume()
        throw asUserError(error, `volume ${name} was not deleted`)
      }
      // The transaction is durable and the export closed: nothing refers to these slots any more.
      const runs = volume.record.provision === 'thick' ? volume.record.runs : [...volume.tables.slotRuns()]
      const owner = volume.record.provision
      this.#reclaimer.freeLater(
        runs.map(({ slot, count }) => ({ slot, count, owner })),
        0,
      )
      await this.#reclaimer.reclaim().catch(() => {}) // the volume is gone all the same; the ledger has told what failed
      this.#event('info', 'volume.deleted', name, `${approximateSize(volume.size)} given back`)
    })
  }

  /** @throws UserError NOT_FOUND, EXISTS, USAGE */
  renameVolume(name: string, newName: string): Promise<void> {
    return this.#change(async () => {
      const volume = this.volume(name)
      if (newName === name) return
      this.#checkNewName(newName)
      try {
        await volume.rename(newName)
      } catch (error) {
        throw asUserError(error, `volume ${name} was not renamed`)
      }
      this.#volumes.delete(name)
      this.#volumes.set(newName, volume)
      this.#event('info', 'volume.renamed', newName, `was ${name}`)
    })
  }

  /**
   * Looks after members that were removed or cut short while serving, and after requests that the datapath answered with an
   * error by itself; the daemon calls it now and then.
   */
  async probeMembers(): Promise<void> {
    for (const member of this.#parts.members) {
      const problem = await member.probe()
      if (problem === undefined || this.#failedMembers.has(member.index)) continue
      this.#failedMembers.set(member.index, problem)
      this.#event('error', 'member.failed', member.name, problem)
    }
    for (const volume of this.#volumes.values()) {
      const { errors } = this.datapath.exportCounters(volume.exportId)
      const before = this.#errorsSeen.get(volume) ?? 0
      this.#errorsSeen.set(volume, errors)
      if (errors > before) {
        const count = errors - before === 1 ? 'one request was' : `${errors - before} requests were`
        this.#event('warn', 'volume.errors', volume.name, `${count} answered with an error, ${errors} in all`)
      }
    }
    this.#watchSpace()
  }

  /** Ends sessions after answering what is in flight, flushes, checkpoints, unlocks. */
  close(): Promise<void> {
    return this.#changes.run(async () => {
      if (this.#closed) return
      this.#closed = true
      for (const volume of this.#volumes.values()) await volume.close()
      let failure: unknown
      // Everything is closed all the same; the journal still has what LMDB lacks.
      const note = (error: unknown): void => {
        failure ??= error
      }
      await this.#reclaimer.reclaim().catch(note)
      await this.#hotSet.close()
      await this.#coolAll().catch(note)
      await this.#ledger.close().catch(note)
      await this.#reclaimer.close()
      await this.datapath.close()
      await closeParts(this.#parts)
      if (failure !== undefined)
        throw asUserError(failure, `the pool ${this.directory} was closed without a checkpoint`)
    })
  }

  #change<T>(action: () => Promise<T>): Promise<T> {
    return this.#changes.run(() => {
      // It waited for the end of the pool, without knowing.
      if (this.#closed) throw new UserError('BUSY', `the pool ${this.directory} is being closed`)
      if (this.#failure !== undefined) {
        throw new UserError('FAILED', `the pool ${this.directory} takes no changes: ${this.#failure}`)
      }
      return action()
    })
  }

  /** Every volume is read-only from now on; what was flushed is safe. */
  #fail(message: string): void {
    this.#failure = `${message}; mend the cause, then restart the daemon: what was flushed is safe, later changes may be lost`
    for (const volume of [...this.#volumes.values(), ...this.#leaving]) volume.refuse(this.#failure)
    this.#event(
      'error',
      'pool.failed',
      this.directory,
      `all volumes are read-only, writes and flushes fail: ${this.#failure}`,
    )
  }

  /** The daemon stops in order, everything is closed: the next opening suspects nothing. */
  async #coolAll(): Promise<void> {
    // Where that fails they stay hot: then it is their marks that tell of what could not be recorded.
    for (const volume of this.#volumes.values()) await volume.settleWatchers()
    const maps = [...this.#volumes.values()].flatMap(({ intentMap }) => intentMap ?? [])
    if (maps.every(({ hotCount }) => hotCount === 0)) return
    let undo: (() => void)[] = []
    await this.#ledger.checkpointWith(
      () => {
        undo = maps.map((map) => map.coolAll())
        return {}
      },
      () => {
        for (const back of undo) back()
      },
    )
  }

  #tellSuspects(volume: Volume, count: number): void {
    const { intents } = volume.info()
    const size = approximateSize(count * (intents?.regionSize ?? 0))
    this.#event(
      'warn',
      'volume.suspect',
      volume.name,
      `the daemon was not stopped in order: ${count} regions (${size}) may lack answered writes or hold unanswered ones; see: fullstripe volume map ${volume.name}`,
    )
  }

  /** For a datapath that cannot: through the members, a process a call, so only where they are files, and the hole is worth it. */
  async #punchMembers(slot: number, count: number): Promise<boolean> {
    const { members, geometry } = this.#parts
    if (members.some((member) => member.kind !== 'file')) return false
    // Slots wait for this: thousands of scattered ones would keep a full pool waiting for minutes.
    if (count * geometry.stripeSize < PUNCH_BY_PROCESS_MIN) return true
    const offset = chunkOffsetOf(geometry, slot)
    const done = await Promise.all(members.map((member) => member.punch(offset, count * geometry.chunkSize)))
    return done.every((punched) => punched)
  }

  #pageSource(): PageSource {
    return {
      // Not those of intents and mirrors: marks come and go all the time, and the journal has them. They go along with a checkpoint that
      // somebody else needs; one just for them would sync the members every second.
      dirtyPages: () => {
        let count = 0
        for (const pages of this.#allPages()) if (pages instanceof VolumeTables) count += pages.dirtyPages
        return count
      },
      takeDirtyPages: () => [...this.#allPages()].flatMap((pages) => pages.takeDirtyPages()),
      returnDirtyPages: (pages) => {
        const byMedium = new Map<number, PageHolder[]>()
        for (const holder of this.#allPages()) {
          byMedium.set(holder.medium, [...(byMedium.get(holder.medium) ?? []), holder])
        }
        // Each takes its own kinds only.
        for (const page of pages)
          for (const holder of byMedium.get(page.medium) ?? []) holder.returnDirtyPage(page)
      },
    }
  }

  *#allPages(): Generator<PageHolder> {
    for (const volumes of [this.#volumes.values(), this.#leaving]) {
      for (const { tables, intentMap } of volumes) {
        yield tables
        if (intentMap !== undefined) yield intentMap
      }
    }
    for (const { map } of this.mirrors.all()) yield map
  }

  #add(record: VolumeRecord, tables: VolumeTables, intents: IntentMap | undefined): Volume {
    const volume = new Volume(this.#hostOf(record), record, tables, intents)
    this.#volumes.set(record.name, volume)
    if (this.#failure !== undefined) volume.refuse(this.#failure)
    return volume
  }

  #hostOf(record: VolumeRecord): VolumeHost {
    return {
      datapath: this.datapath,
      stripeSize: this.#parts.geometry.stripeSize,
      allocate: (_first, count) => this.#allocate(count),
      allocateSpare: (count) => this.#allocateSpare(count),
      whenWanted: (giveBack) => {
        this.#givers.add(giveBack)
        return () => this.#givers.delete(giveBack)
      },
      unallocate: (slots) => {
        for (const { slot, count } of slotRunsOf(0, slots)) this.#allocator.free(slot, count)
      },
      freeLater: (runs, sequence) => this.#reclaimer.freeLater(runs, sequence),
      record: (changes, apply) => this.#ledger.record(changes, apply),
      flush: () => this.#ledger.flush(),
      hotSet: this.#hotSet,
      resizeMaps: (size) => this.mirrors.resize(record.id, size),
      save: (changed) => this.#ledger.commit({ putVolumes: [changed] }),
      reserveRun: (count) => this.#reserve(count, `volume ${record.name}`),
      unreserveRun: (slot, count) => this.#reclaimer.freeLater([{ slot, count, owner: 'thick' }], 0),
      unreserveUnused: (runs, tables) => {
        for (const { slot, count } of runs) this.#allocator.unreserve(slot, count)
        for (const { slot, count } of tables.slotRuns()) {
          assert(this.#allocator.markUsed(slot, count, 'thin'), 'slots of a volume are taken')
        }
      },
      checkpointWith: (prepare, undo) => this.#ledger.checkpointWith(prepare, undo),
      event: (level, kind, object, message) => this.#event(level, kind, object, message),
      onTrouble: (code, message) => this.#trouble(record.name, code, message),
    }
  }

  /** A request failed. A client that goes on trying must not fill the log: one line now and then for each kind of failure. */
  #trouble(object: string, kind: string, message: string): void {
    const suppressed = this.#troubles.pass(`${object} ${kind}`)
    if (suppressed === undefined) return
    const more = suppressed === 0 ? '' : ` (and ${suppressed} more like it since the last time)`
    this.#event('warn', 'volume.error', object, `${message}${more}`)
  }

  /** Slots for a thin volume; where too few are free, those that wait to be freed are waited for, or others do without theirs. */
  async #allocate(count: number): Promise<number[]> {
    this.#refuseSlots()
    let slots = this.#allocator.allocate(count)
    // Again and again: others take what becomes free meanwhile, and give back more.
    while (slots === undefined) {
      if (this.#allocator.freeCount + this.#reclaimer.pendingSlots >= count) {
        await this.#reclaimer.reclaim()
        this.#refuseSlots()
      } else if (!this.#takeBack()) {
        break
      }
      slots = this.#allocator.allocate(count)
    }
    if (slots === undefined) {
      this.#watchSpace(100)
      throw new StoreError(
        'NO_SPACE',
        `the pool ${this.directory} is full: trim or delete something, or add capacity`,
      )
    }
    this.#watchSpace()
    return slots
  }

  /** @returns whether that made slots free */
  #takeBack(): boolean {
    const before = this.#allocator.freeCount
    for (const giveBack of [...this.#givers]) giveBack()
    return this.#allocator.freeCount > before
  }

  /** As `#allocate`, for what can be done without. */
  async #allocateSpare(count: number): Promise<number[]> {
    this.#refuseSlots()
    const least = count + Math.ceil((this.#parts.geometry.slots - 1) / LIMITS.poolReserveShare)
    while (this.#allocator.freeCount < least) {
      if (this.#allocator.freeCount + this.#reclaimer.pendingSlots < least) {
        const text = `the rest of the pool ${this.directory} is kept for clients: trim or delete something, or add capacity`
        throw new StoreError('NO_SPACE', text)
      }
      await this.#reclaimer.reclaim()
      this.#refuseSlots()
    }
    const slots = this.#allocator.allocate(count)
    assert(slots !== undefined, 'slots that are free')
    this.#watchSpace()
    return slots
  }

  /**
   * After a failure nobody gets a slot. What was to be stored then may be found stored at the next opening; slots that it names
   * were given back here, and must not hold anything else by then.
   */
  #refuseSlots(): void {
    if (this.#failure === undefined) return
    throw new StoreError('MEMBER_IO', `the pool ${this.directory} takes no changes: ${this.#failure}`)
  }

  /** A contiguous run; where there is none, what waits to be freed at the call may make one. */
  async #reserve(count: number, what: string): Promise<number> {
    this.#refuseSlots()
    let slot = this.#allocator.reserveRun(count)
    if (slot === undefined && this.#reclaimer.pendingSlots > 0) {
      await this.#reclaimer.reclaim()
      this.#refuseSlots()
      slot = this.#allocator.reserveRun(count)
    }
    if (slot !== undefined) return slot
    const { stripeSize } = this.#parts.geometry
    const free = this.#allocator.freeCount * stripeSize
    throw new UserError(
      'FAILED',
      `${what}: no contiguous ${approximateSize(count * stripeSize)} is free in the pool (${approximateSize(free)} free in all): make it thin, or create the pool with a larger --capacity`,
    )
  }

  #watchSpace(atLeast = 0): void {
    const { slots } = this.#parts.geometry
    const percent = Math.max(atLeast, ((slots - 1 - this.#allocator.freeCount) * 100) / (slots - 1))
    const level = SPACE_EVENTS_PERCENT.filter((limit) => percent >= limit).length + (atLeast >= 100 ? 1 : 0)
    if (level > this.#spaceLevel) {
      const text =
        atLeast >= 100
          ? 'full: writes that need space fail'
          : `${Math.floor(percent)} % of the capacity is taken`
      this.#event(level > 2 ? 'error' : 'warn', 'pool.space', this.directory, text)
    }
    this.#spaceLevel = level
  }

  #checkNewName(name: string): void {
    const problem = volumeNameProblem(name)
    if (problem !== undefined) throw new UserError('USAGE', `volume name ${printable(name)} ${problem}`)
    if (this.#volumes.has(name))
      throw new UserError('EXISTS', `volume ${name} exists already: choose another name`)
  }

  #event(level: PoolEvent['level'], kind: string, object: string, message: string): void {
    this.#options.log[level]({ event: kind, object }, message)
    this.#options.onEvent?.({ time: new Date().toISOString(), level, kind, object, message })
  }
}

/** What is wrong with a volume name, as the end of a sentence; undefined when it is fine. */
export function volumeNameProblem(name: string): string | undefined {
  if (name.length === 0) return 'is empty: give it at least one character'
  if (Buffer.byteLength(name) > LIMITS.volumeNameBytesMax)
    return `is longer than ${LIMITS.volumeNameBytesMax} bytes`
  if (/[/@]/.test(name)) return 'contains / or @, which separate parts of a name'
  if (hasControlCharacters(name)) return 'contains control characters'
  if (name !== name.trim()) return 'begins or ends with white space'
  if (name === '.' || name === '..') return 'is not allowed'
  return undefined
}

function asUserError(error: unknown, what: string): UserError {
  if (error instanceof UserError) return error
  if (error instanceof StoreError)
    return new UserError('FAILED', `${what}: ${error.message}`, { cause: error })
  throw error
}
