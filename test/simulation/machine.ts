import { pino } from 'pino'
import type { StoreLayout } from '../../src/datapath/datapath.ts'
import { PortableDatapath } from '../../src/datapath/portable.ts'
import { Journal } from '../../src/metadata/journal.ts'
import { METADATA_VERSION, type PoolRecord } from '../../src/metadata/records.ts'
import type { Geometry } from '../../src/stripe/geometry.ts'
import type { SuperblockReading } from '../../src/stripe/superblock.ts'
import { type CheckReport, checkParts } from '../../src/volume/check.ts'
import type { HotSetOptions } from '../../src/volume/hot-set.ts'
import { Pool } from '../../src/volume/pool.ts'
import type { PoolParts } from '../../src/volume/pool-parts.ts'
import { SECTOR } from '../support/sector-data.ts'
import { SimCalls, SimMember, simJournalFile } from './devices.ts'
import { FATES, type Fate, SimFile } from './disk.ts'
import { Process } from './process.ts'
import type { Scheduler } from './scheduler.ts'
import { SimStore, StoreDisk } from './store.ts'

/**
 * The machine that a pool lives on: disks, which outlast every process, and a kernel, which the next boot replaces. Pools
 * are opened on it by the product's own code; only what would touch a real device is ours.
 */
export interface MachineShape {
  readonly members: number
  readonly slots: number
  readonly journalBytes: number // of one of the two files
}

/** How one process uses the machine. */
export interface ProcessShape {
  /** Accesses up to this many bytes are made at once, larger ones by threads. */
  readonly inlineBytesMax: number
  readonly punches: boolean
  readonly hotSet: HotSetOptions
}

export const CHUNK = 4096
const DATA_OFFSET = 2 * CHUNK
/** What the disks hold before anybody has written. */
export const POISON = 0xdd
const POOL = '00000000-0000-4000-8000-000000000000'

const log = pino({ level: 'silent' })

export class Machine {
  readonly scheduler: Scheduler
  readonly geometry: Geometry
  readonly #record: PoolRecord
  readonly #members: readonly SimFile[]
  readonly #journals: readonly [SimFile, SimFile]
  readonly #unsynced: readonly Set<number>[]
  readonly #store: StoreDisk
  readonly #mayPanic: boolean
  #boot = 0
  #salt = 0

  constructor(scheduler: Scheduler, shape: MachineShape, mayPanic: boolean) {
    const { members, slots, journalBytes } = shape
    this.scheduler = scheduler
    this.#mayPanic = mayPanic
    const stripeSize = members * CHUNK
    this.geometry = {
      chunkSize: CHUNK,
      dataMembers: members,
      parityMembers: 0,
      stripeSize,
      dataOffset: DATA_OFFSET,
      slots,
    }
    const names = Array.from({ length: members }, (_, index) => `member-${index}`)
    this.#unsynced = names.map(() => new Set())
    this.#members = names.map((name) => new SimFile(name, DATA_OFFSET + slots * CHUNK, POISON))
    this.#journals = [new SimFile('journal-0', journalBytes), new SimFile('journal-1', journalBytes)]
    this.#record = {
      version: METADATA_VERSION,
      uuid: POOL,
      created: new Date(0).toISOString(),
      chunkSize: CHUNK,
      dataMembers: members,
      parityMembers: 0,
      dataOffset: DATA_OFFSET,
      slots,
      generation: 1,
      members: names,
    }
    this.#store = new StoreDisk(this.#record)
  }

  get stripeSize(): number {
    return this.geometry.stripeSize
  }

  open(process: Process, shape: ProcessShape): Promise<Pool> {
    return Pool.start(this.#parts(process), { datapath: 'portable', log, hotSet: shape.hotSet }, (layout) => {
      return new SimDatapath(process, this.#members, layout, shape)
    })
  }

  check(): Promise<CheckReport> {
    return checkParts(this.#parts(new Process(this.scheduler, {}, { actions: Number.POSITIVE_INFINITY })))
  }

  /**
   * Whether sector `sector` of a slot was written without being synced when a process ended since `forgetUnsynced`: such a
   * sector may hold what was never answered, or lack what was.
   */
  wasUnsynced(slot: number, sector: number): boolean {
    const chunk = Math.floor((sector * SECTOR) / CHUNK)
    const member = (slot + chunk) % this.#members.length
    const at = (DATA_OFFSET + slot * CHUNK) / SECTOR + (sector - (chunk * CHUNK) / SECTOR)
    return this.#unsynced[member]?.has(at) === true
  }

  forgetUnsynced(): void {
    for (const sectors of this.#unsynced) sectors.clear()
  }

  /** The process is gone, by whatever way; the machine runs on. */
  processDied({ syncFailed, failureUntold }: Process): void {
    const { random } = this.scheduler
    this.#members.forEach((file, index) => {
      for (const sector of file.unsyncedSectors()) this.#unsynced[index]?.add(sector)
    })
    // What a failed sync has left behind is forgotten now. (Were it forgotten at some later moment, nobody could promise
    // anything about anything. Nor can anybody where the process died before it could write the failure down: that one passes.)
    if (syncFailed) {
      for (const file of this.#files) {
        if (failureUntold) file.retry()
        else file.evict()
      }
    }
    this.#store.restart(random.below(2))
  }

  /** @returns what became of the files, for messages */
  powerFailed(): string {
    const { random } = this.scheduler
    const same = random.pick(FATES)
    const pattern = random.below(4)
    const members: Fate = pattern === 1 ? 'none' : pattern === 2 ? 'all' : same
    const journals: Fate = pattern === 1 ? 'all' : pattern === 2 ? 'none' : same
    const told = this.#files.map((file) => {
      const usual = file.name.startsWith('member') ? members : journals
      const fate = pattern === 3 ? random.pick(FATES) : usual
      const { unsynced } = file
      file.cut(fate, random)
      return `${file.name} keeps ${fate} of ${unsynced}`
    })
    this.#store.restart(random.below(2))
    this.#boot++
    return told.join(', ')
  }

  /** A number that depends on everything the disks hold. */
  digest(): void {
    for (const file of this.#files) {
      let sum = 0
      for (let at = 0; at < file.cache.length; at += 64) sum = (sum * 31 + file.cache.readUInt32LE(at)) | 0
      this.scheduler.mix(sum)
    }
  }

  get #files(): readonly SimFile[] {
    return [...this.#members, ...this.#journals]
  }

  #parts(process: Process): PoolParts {
    const { geometry } = this
    const members = this.#members.map((file, index) => {
      const superblock = { uuid: POOL, created: 0, memberIndex: index, geometry, generation: 1 }
      const reading: SuperblockReading = { state: 'valid', superblock, note: undefined }
      return new SimMember(process, index, file, reading)
    })
    const files = this.#journals.map((file) => simJournalFile(process, file))
    const [first, second] = files
    if (first === undefined || second === undefined) throw new Error('two journal files')
    return {
      directory: '/pool',
      lock: { path: '/pool/lock', release() {} },
      record: this.#record,
      geometry,
      members,
      memberNotes: [],
      store: new SimStore(process, this.#store, this.#mayPanic),
      journal: new Journal([first, second], {
        pool: POOL,
        bootId: `00000000-0000-4000-8000-${String(this.#boot).padStart(12, '0')}`,
        salt: () => (this.#salt += 0x10001),
      }),
    }
  }
}

/** The portable datapath, on simulated calls; it can punch holes, as the native one can. */
class SimDatapath extends PortableDatapath {
  readonly #process: Process
  readonly #members: readonly SimFile[]
  readonly #punches: boolean

  constructor(process: Process, members: readonly SimFile[], layout: StoreLayout, shape: ProcessShape) {
    super(layout, 'simulation', shape.inlineBytesMax, new SimCalls(process, members))
    this.#process = process
    this.#members = members
    this.#punches = shape.punches
  }

  override punch(slot: number, count: number): Promise<boolean> {
    if (!this.#punches) return super.punch(slot, count)
    return new Promise((resolve) => {
      this.#process.event('punch', slot, () => {
        if (this.#process.dies('access')) return
        for (const file of this.#members) file.write(Buffer.alloc(count * CHUNK), DATA_OFFSET + slot * CHUNK)
        resolve(true)
      })
    })
  }
}
