import { randomUUID } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statfsSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import type { Logger } from 'pino'
import { messageOf, StoreError, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { acquireLock, type LockFile } from '../base/lock-file.ts'
import { Mutex } from '../base/locks.ts'
import { approximateSize } from '../base/sizes.ts'
import type { Datapath } from '../datapath/datapath.ts'
import { openDatapath } from '../datapath/open.ts'
import { createJournalFile, Journal, openJournalFile } from '../metadata/journal.ts'
import { Ledger } from '../metadata/ledger.ts'
import { METADATA_VERSION, type PoolRecord, type VolumeRecord } from '../metadata/records.ts'
import { MetadataStore } from '../metadata/store.ts'
import { SlotAllocator } from '../stripe/allocator.ts'
import { createMembers } from '../stripe/create-members.ts'
import { capacityOf, chunkOffsetOf, type Geometry } from '../stripe/geometry.ts'
import type { Member } from '../stripe/member.ts'
import { openMembers } from '../stripe/members.ts'
import { loadTables } from './load.ts'
import { Reclaimer } from './reclaimer.ts'
import { VolumeTables } from './tables.ts'
import { checkVolumeSize, Volume, type VolumeHost } from './volume.ts'

/**
 * A pool is one directory: metadata, two journal files, a lock, and members inside it or elsewhere.
 *
 *   POOL/lock  POOL/metadata/  POOL/journal-0  POOL/journal-1  POOL/member-0 ...
 *
 * Opening: lock, members, LMDB, journal recovery, checkpoint of what was recovered, journal started anew, slots counted
 * from the maps (there is no stored free list that could disagree with them), exports opened.
 * Closing: exports drained, flush, checkpoint, everything closed, unlock.
 */
export interface PoolCreateOptions {
  readonly members?: readonly string[]
  readonly parity?: 0 | 1 | 2
  readonly chunkSize?: number // bytes
  readonly capacity?: number // bytes
}

export interface PoolMemberInfo {
  readonly index: number
  readonly path: string
  readonly kind: 'file' | 'device'
  readonly size: number // bytes; logical for a sparse file
  readonly state: 'online' | 'failed'
}

export interface PoolInfo {
  readonly directory: string
  readonly uuid: string
  readonly version: number
  readonly members: readonly PoolMemberInfo[]
  readonly chunkSize: number
  readonly dataMembers: number
  readonly parityMembers: number
  readonly stripeSize: number
  readonly slots: number
  readonly slotsUsed: number
  readonly slotsReserved: number
  readonly capacity: number // bytes
  readonly used: number // bytes
  readonly reserved: number // bytes that thick volumes hold, used or not
  readonly fileSystemAvailable: number | null // bytes, where members are files
}

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
}

export interface VolumeCreateOptions {
  readonly name: string
  readonly size: number // bytes
  readonly provision?: 'thin' | 'thick'
  readonly formatUnit?: number // stripes
  readonly fill?: number // byte
  readonly readOnly?: boolean
}

const SPACE_EVENTS_PERCENT = [80, 90, 95]
/** Bytes that are worth a process to give them back to the file system. */
const PUNCH_BY_PROCESS_MIN = 1 << 20

const paths = (directory: string) => ({
  lock: join(directory, 'lock'),
  metadata: join(directory, 'metadata'),
  journals: [join(directory, 'journal-0'), join(directory, 'journal-1')] as const,
})

/** @throws UserError EXISTS, USAGE, REFUSED or FAILED; what it had made is removed again */
export async function createPool(directory: string, options: PoolCreateOptions = {}): Promise<PoolInfo> {
  const at = resolve(directory)
  const files = paths(at)
  const existed = existsSync(at)
  let lock: LockFile
  try {
    // Not recursive without need: then a read-only file system would be told of as a missing directory.
    if (!existed) mkdirSync(at, { recursive: !existsSync(dirname(at)), mode: 0o700 })
    assertEmpty(at) // before the lock file is made in somebody's directory
    lock = acquireLock(files.lock, 'pool create')
  } catch (error) {
    if (error instanceof UserError) throw error
    throw new UserError('FAILED', `cannot make the pool directory ${at}: ${messageOf(error)}`, {
      cause: error,
    })
  }
  // From here on everything in the directory but the lock file is ours to remove.
  let undoMembers: (() => Promise<void>) | undefined
  let mine = false
  try {
    assertEmpty(at) // under the lock: another creation may have finished in between
    mine = true
    const uuid = randomUUID()
    const created = new Date()
    const made = await createMembers({
      directory: at,
      uuid,
      created: created.getTime(),
      ...(options.members === undefined ? {} : { paths: options.members }),
      ...(options.parity === undefined ? {} : { parity: options.parity }),
      ...(options.chunkSize === undefined ? {} : { chunkSize: options.chunkSize }),
      ...(options.capacity === undefined ? {} : { capacity: options.capacity }),
    })
    undoMembers = made.undo
    for (const path of files.journals) createJournalFile(path)
    const record: PoolRecord = {
      version: METADATA_VERSION,
      uuid,
      created: created.toISOString(),
      chunkSize: made.geometry.chunkSize,
      dataMembers: made.geometry.dataMembers,
      parityMembers: made.geometry.parityMembers,
      dataOffset: made.geometry.dataOffset,
      slots: made.geometry.slots,
      generation: made.generation,
      members: made.members.map((member) => member.path),
    }
    mkdirSync(files.metadata, { mode: 0o700 })
    const store = await MetadataStore.create(files.metadata, record)
    await store.close()
    await made.keep()
    return poolInfo(
      at,
      record,
      made.geometry,
      made.members.map((m) => ({ ...m, state: 'online' as const })),
      undefined,
    )
  } catch (error) {
    await undoMembers?.()
    if (mine) {
      for (const path of [...files.journals, files.metadata]) rmSync(path, { recursive: true, force: true })
      // The lock file stays in a directory that was there before: whoever unlinks a lock lets a third process in.
      if (!existed) rmSync(at, { recursive: true, force: true })
    }
    if (error instanceof UserError) throw error
    throw new UserError('FAILED', `cannot create the pool ${at}: ${messageOf(error)}`, { cause: error })
  } finally {
    lock.release()
  }
}

function assertEmpty(directory: string): void {
  if (readdirSync(directory).some((name) => name !== 'lock' && name !== 'lost+found')) {
    throw new UserError('EXISTS', `${directory} is not empty: give a new or an empty directory for the pool`)
  }
}

/** Everything of a pool that an opening needs before volumes exist; `check` uses it too. */
export interface PoolParts {
  readonly directory: string
  readonly lock: LockFile
  readonly record: PoolRecord
  readonly geometry: Geometry
  readonly members: readonly Member[]
  readonly memberNotes: readonly string[]
  readonly store: MetadataStore
  readonly journal: Journal
}

/** Locks and opens, changing nothing. @throws UserError that names what is missing, foreign, busy or damaged */
export async function openPoolParts(directory: string, what: string): Promise<PoolParts> {
  const at = resolve(directory)
  const files = paths(at)
  if (!existsSync(files.metadata)) {
    const problem = existsSync(at) ? 'is not a pool (no metadata in it)' : 'does not exist'
    throw new UserError('NOT_FOUND', `${at} ${problem}: create one with: fullstripe pool create ${directory}`)
  }
  const lock = acquireLock(files.lock, what)
  let store: MetadataStore | undefined
  let members: readonly Member[] = []
  try {
    store = await MetadataStore.open(files.metadata)
    const record = store.pool()
    const { chunkSize, dataMembers, parityMembers, dataOffset, slots } = record
    const geometry: Geometry = {
      chunkSize,
      dataMembers,
      parityMembers,
      dataOffset,
      slots,
      stripeSize: chunkSize * dataMembers,
    }
    const opened = await openMembers(at, record.members, {
      uuid: record.uuid,
      generation: record.generation,
      geometry,
    })
    members = opened.members
    const journal = new Journal([openJournalFile(files.journals[0]), openJournalFile(files.journals[1])], {
      pool: record.uuid,
      bootId: readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim(),
    })
    return { directory: at, lock, record, geometry, members, memberNotes: opened.notes, store, journal }
  } catch (error) {
    await Promise.all(members.map((member) => member.close()))
    await store?.close()
    lock.release()
    if (error instanceof UserError) throw error
    const hint = systemCode(error) === 'EROFS' ? '; the file system is read-only: remount it read-write' : ''
    throw new UserError('FAILED', `cannot open the pool ${at}: ${messageOf(error)}${hint}`, { cause: error })
  }
}

export class Pool {
  readonly directory: string
  readonly datapath: Datapath
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

  private constructor(parts: PoolParts, datapath: Datapath, allocator: SlotAllocator, options: PoolOptions) {
    this.directory = parts.directory
    this.datapath = datapath
    this.#parts = parts
    this.#options = options
    this.#allocator = allocator
    this.#nextId = parts.store.nextId()
    this.#ledger = new Ledger({
      journal: parts.journal,
      store: parts.store,
      source: {
        dirtyPages: () => {
          let count = 0
          for (const tables of this.#allTables()) count += tables.dirtyPages
          return count
        },
        takeDirtyPages: () => [...this.#allTables()].flatMap((tables) => tables.takeDirtyPages()),
        returnDirtyPages: (pages) => {
          const byMedium = new Map([...this.#allTables()].map((tables) => [tables.medium, tables]))
          for (const page of pages) byMedium.get(page.medium)?.returnDirtyPage(page)
        },
      },
      syncMembers: () => datapath.sync(),
      onDurable: (sequence) => this.#reclaimer.onDurable(sequence),
      onTrouble: (kind, message) => {
        const text =
          kind === 'sync'
            ? `${message}; flushes are refused from now on: restart the daemon once the cause is mended`
            : message
        this.#event('error', `metadata.${kind}`, this.directory, text)
      },
    })
    this.#reclaimer = new Reclaimer(
      {
        datapath: {
          barrier: () => datapath.barrier(),
          punch: async (slot, count) =>
            (await datapath.punch(slot, count)) || this.#punchMembers(slot, count),
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
    const parts = await openPoolParts(directory, 'serve')
    let datapath: Datapath | undefined
    let pool: Pool | undefined
    try {
      for (const note of parts.memberNotes) options.log.warn({ pool: parts.directory }, note)
      const allocator = new SlotAllocator(parts.geometry.slots)
      const loaded = loadTables(parts, allocator)
      if (loaded.recovered > 0 || loaded.dropped > 0) {
        options.log.info(
          { pool: parts.directory, changes: loaded.recovered, dropped: loaded.dropped },
          'recovered map changes from the journal',
        )
      }
      if (loaded.lastSequence !== parts.store.checkpoint()) {
        // What the journal brought back may speak of data that only the page cache holds: it becomes durable first, as
        // before any other commit (ledger, rule 1).
        for (const member of parts.members) await member.sync()
        await parts.store.commit({
          pages: loaded.tables.flatMap((tables) => tables.takeDirtyPages()),
          sequence: loaded.lastSequence,
        })
      }
      await parts.journal.start(loaded.lastSequence)
      const { chunkSize, dataMembers, parityMembers, dataOffset } = parts.geometry
      datapath = openDatapath(
        { memberFds: parts.members.map(descriptorOf), chunkSize, dataMembers, parityMembers, dataOffset },
        { mode: options.datapath, ...(options.threads === undefined ? {} : { threads: options.threads }) },
      )
      pool = new Pool(parts, datapath, allocator, options)
      for (const [index, record] of loaded.records.entries()) {
        const tables = loaded.tables[index]
        if (tables !== undefined) pool.#add(record, tables)
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
    return poolInfo(this.directory, this.#parts.record, this.#parts.geometry, members, {
      used: this.volumes().reduce((sum, volume) => sum + volume.info().stripesFormatted, 0),
      reserved: this.#allocator.reservedCount,
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
      const stripes = Math.ceil(size / stripeSize)
      const runs =
        provision === 'thick'
          ? [{ stripe: 0, count: stripes, slot: this.#reserve(stripes, `volume ${name}`) }]
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
      }
      try {
        await this.#parts.store.commit({ putVolumes: [record], nextId: this.#nextId })
      } catch (error) {
        for (const run of runs) this.#allocator.unreserve(run.slot, run.count)
        throw asUserError(error, `volume ${name} was not created`)
      }
      const volume = this.#add(record, new VolumeTables(id, { size, stripeSize, formatUnit }))
      this.#event('info', 'volume.created', name, `${provision} volume of ${approximateSize(size)}`)
      this.#watchSpace()
      return volume
    })
  }

  /** @throws UserError NOT_FOUND; BUSY while clients are connected, unless forced */
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
      this.#volumes.delete(name) // no new client finds it
      this.#leaving.add(volume)
      await volume.close()
      try {
        // As part of a checkpoint, so that none that copied its pages earlier can store them after it is gone.
        await this.#ledger.checkpointWith(
          () => {
            this.#leaving.delete(volume)
            return { dropVolumes: [volume.record] }
          },
          () => this.#leaving.add(volume),
        )
      } catch (error) {
        // Still in the catalog: serve it again.
        this.#leaving.delete(volume)
        this.#add(volume.record, volume.tables).resume()
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

  /** Looks after members that were removed or cut short while serving; the daemon calls it now and then. */
  async probeMembers(): Promise<void> {
    for (const member of this.#parts.members) {
      const problem = await member.probe()
      if (problem === undefined || this.#failedMembers.has(member.index)) continue
      this.#failedMembers.set(member.index, problem)
      this.#event('error', 'member.failed', member.name, problem)
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
      return action()
    })
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

  *#allTables(): Generator<VolumeTables> {
    for (const volume of this.#volumes.values()) yield volume.tables
    for (const volume of this.#leaving) yield volume.tables
  }

  #add(record: VolumeRecord, tables: VolumeTables): Volume {
    const volume = new Volume(this.#hostOf(record), record, tables)
    this.#volumes.set(record.name, volume)
    return volume
  }

  #hostOf(record: VolumeRecord): VolumeHost {
    return {
      datapath: this.datapath,
      stripeSize: this.#parts.geometry.stripeSize,
      allocate: (_first, count) => this.#allocate(count),
      unallocate: (slots) => {
        for (const slot of slots) this.#allocator.free(slot, 1)
      },
      freeLater: (runs, sequence) => this.#reclaimer.freeLater(runs, sequence),
      record: (changes, apply) => this.#ledger.record(changes, apply),
      flush: () => this.#ledger.flush(),
      save: (changed) => this.#parts.store.commit({ putVolumes: [changed] }),
      reserveRun: (count) => this.#reserve(count, `volume ${record.name}`),
      unreserveRun: (slot, count) => this.#reclaimer.freeLater([{ slot, count, owner: 'thick' }], 0),
      checkpointWith: (prepare, undo) => this.#ledger.checkpointWith(prepare, undo),
      event: (level, kind, object, message) => this.#event(level, kind, object, message),
      onTrouble: (message) => this.#options.log.warn({ pool: this.directory }, message),
    }
  }

  /** Slots for a thin volume; where too few are free, those that wait to be freed are waited for. */
  async #allocate(count: number): Promise<number[]> {
    let slots = this.#allocator.allocate(count)
    // Again and again: others take what becomes free meanwhile, and give back more.
    while (slots === undefined && this.#allocator.freeCount + this.#reclaimer.pendingSlots >= count) {
      await this.#reclaimer.reclaim()
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

  #reserve(count: number, what: string): number {
    const slot = this.#allocator.reserveRun(count)
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
  if (/[\p{Cc}\p{Zl}\p{Zp}\p{Cs}]/u.test(name)) return 'contains control characters'
  if (name !== name.trim()) return 'begins or ends with white space'
  if (name === '.' || name === '..') return 'is not allowed'
  return undefined
}

function printable(name: string): string {
  return JSON.stringify(name.length > 80 ? `${name.slice(0, 80)}...` : name)
}

function descriptorOf(member: Member): number {
  if (member.fd === undefined)
    throw new StoreError('NOT_SUPPORTED', `${member.name} has no file descriptor for the datapath`)
  return member.fd
}

export async function closeParts(parts: PoolParts): Promise<void> {
  parts.journal.close()
  await parts.store.close()
  await Promise.all(parts.members.map((member) => member.close()))
  parts.lock.release()
}

function asUserError(error: unknown, what: string): UserError {
  if (error instanceof UserError) return error
  if (error instanceof StoreError)
    return new UserError('FAILED', `${what}: ${error.message}`, { cause: error })
  throw error
}

function poolInfo(
  directory: string,
  record: PoolRecord,
  geometry: Geometry,
  members: readonly PoolMemberInfo[],
  slots: { used: number; reserved: number } | undefined,
): PoolInfo {
  const { stripeSize } = geometry
  const used = slots?.used ?? 0
  const reserved = slots?.reserved ?? 0
  const file = members.find((member) => member.kind === 'file')
  return {
    directory,
    uuid: record.uuid,
    version: record.version,
    members,
    chunkSize: geometry.chunkSize,
    dataMembers: geometry.dataMembers,
    parityMembers: geometry.parityMembers,
    stripeSize,
    slots: geometry.slots - 1,
    slotsUsed: used,
    slotsReserved: reserved,
    capacity: capacityOf(geometry),
    used: used * stripeSize,
    reserved: reserved * stripeSize,
    fileSystemAvailable: file === undefined ? null : availableAt(resolve(directory, file.path)),
  }
}

function availableAt(path: string): number | null {
  try {
    const stats = statfsSync(path)
    return stats.bavail * stats.bsize
  } catch {
    return null // the member was removed; its own state says so
  }
}
