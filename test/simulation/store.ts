import { StoreError } from '../../src/base/errors.ts'
import {
  METADATA_VERSION,
  type MirrorRecord,
  type PageKind,
  type PoolRecord,
  type VolumeRecord,
} from '../../src/metadata/records.ts'
import type { Commit, TransactionalStore } from '../../src/metadata/store.ts'
import type { Process } from './process.ts'

/**
 * In the place of LMDB: transactions that are atomic, take their time, and are durable when they say so. A process that dies
 * meanwhile leaves the old state or the new one. What LMDB itself makes of a power cut is tested with the real one
 * (test/volume/power-cut.test.ts).
 *
 * A commit fails in one of two ways. For want of space: nothing is stored, and the next one may succeed. Or the disk fails
 * under it: then no later one succeeds either, as in LMDB, and nobody knows whether this one will be found after a restart.
 */
interface State {
  readonly pool: PoolRecord
  readonly checkpoint: number
  readonly nextId: number
  readonly volumes: ReadonlyMap<number, VolumeRecord>
  readonly mirrors: ReadonlyMap<number, MirrorRecord>
  readonly pages: ReadonlyMap<string, Buffer>
}

/** What is on the disk. */
export class StoreDisk {
  #state: State
  #perhaps: State | undefined

  constructor(pool: PoolRecord) {
    const none = { volumes: new Map(), mirrors: new Map(), pages: new Map() }
    this.#state = { pool, checkpoint: 0, nextId: 1, ...none }
  }

  get state(): State {
    return this.#state
  }

  apply(commit: Commit): void {
    this.#state = after(this.#state, commit)
  }

  /** The disk failed under a commit. */
  applyPerhaps(commit: Commit): void {
    this.#perhaps = after(this.#state, commit)
  }

  /** The process is gone: one of the two states is found from now on. */
  restart(choice: number): void {
    if (this.#perhaps !== undefined && choice === 0) this.#state = this.#perhaps
    this.#perhaps = undefined
  }
}

export class SimStore implements TransactionalStore {
  readonly #process: Process
  readonly #disk: StoreDisk
  readonly #mayPanic: boolean
  #panicked = false

  constructor(process: Process, disk: StoreDisk, mayPanic: boolean) {
    this.#process = process
    this.#disk = disk
    this.#mayPanic = mayPanic
  }

  pool(): PoolRecord {
    const { pool } = this.#disk.state
    if (pool.version > METADATA_VERSION) throw new StoreError('DAMAGED', 'metadata: newer version')
    return pool
  }

  checkpoint(): number {
    return this.#disk.state.checkpoint
  }

  nextId(): number {
    return this.#disk.state.nextId
  }

  volumes(): Iterable<VolumeRecord> {
    return byId(this.#disk.state.volumes)
  }

  mirrors(): Iterable<MirrorRecord> {
    return byId(this.#disk.state.mirrors)
  }

  *pages(medium: number, kind: PageKind): Generator<{ index: number; bytes: Buffer }> {
    const found: { index: number; bytes: Buffer }[] = []
    for (const [key, bytes] of this.#disk.state.pages) {
      const [at, of, index] = key.split(' ')
      if (Number(at) === medium && of === kind) found.push({ index: Number(index), bytes })
    }
    yield* found.sort((a, b) => a.index - b.index)
  }

  mediaWithPages(): Set<number> {
    return new Set([...this.#disk.state.pages.keys()].map((key) => Number(key.split(' ')[0])))
  }

  commit(commit: Commit): Promise<void> {
    const process = this.#process
    return new Promise((resolve, reject) => {
      process.event('commit', commit.sequence ?? 0, () => {
        if (process.dies('commit')) return
        if (this.#panicked || process.fails('commit')) {
          if (!this.#panicked && this.#mayPanic && process.random.below(3) === 0) {
            this.#panicked = true
            process.commitUncertain = true
            this.#disk.applyPerhaps(commit)
          }
          const error = this.#panicked
            ? new StoreError('MEMBER_IO', 'metadata: commit failed: I/O error')
            : new StoreError('NO_SPACE', 'metadata: commit failed: no space')
          process.later('commit', 0, () => reject(error))
          return
        }
        this.#disk.apply(commit)
        process.scheduler.trace(() => `  committed ${JSON.stringify(shorten(commit))}`)
        process.later('committed', commit.sequence ?? 0, resolve)
      })
    })
  }

  async dropMedium(): Promise<void> {
    throw new Error('only a repair drops media')
  }

  async close(): Promise<void> {}
}

function byId<T>(records: ReadonlyMap<number, T>): T[] {
  return [...records].sort(([a], [b]) => a - b).map(([, record]) => record)
}

function after(state: State, commit: Commit): State {
  const volumes = new Map(state.volumes)
  const mirrors = new Map(state.mirrors)
  const pages = new Map(state.pages)
  const dropPages = (medium: number): void => {
    for (const key of pages.keys()) if (key.startsWith(`${medium} `)) pages.delete(key)
  }
  for (const volume of commit.putVolumes ?? []) volumes.set(volume.id, structuredClone(volume))
  for (const volume of commit.dropVolumes ?? []) {
    volumes.delete(volume.id)
    dropPages(volume.medium)
  }
  for (const mirror of commit.putMirrors ?? []) mirrors.set(mirror.id, structuredClone(mirror))
  for (const mirror of commit.dropMirrors ?? []) {
    mirrors.delete(mirror.id)
    dropPages(mirror.id)
  }
  for (const { medium, kind, index, bytes } of commit.pages ?? []) {
    const key = `${medium} ${kind} ${index}`
    if (bytes === undefined) pages.delete(key)
    else pages.set(key, Buffer.from(bytes))
  }
  return {
    pool: commit.pool ?? state.pool,
    checkpoint: commit.sequence ?? state.checkpoint,
    nextId: commit.nextId ?? state.nextId,
    volumes,
    mirrors,
    pages,
  }
}

function shorten(commit: Commit): object {
  return {
    sequence: commit.sequence,
    put: commit.putVolumes?.map(({ name, size }) => `${name} ${size}`),
    drop: commit.dropVolumes?.map(({ name }) => name),
    mirrors: commit.putMirrors?.map(({ id, name }) => `${id} ${name}`),
    dropMirrors: commit.dropMirrors?.map(({ id }) => id),
    pages: commit.pages?.map(({ medium, kind, index }) => `${medium} ${kind} ${index}`),
  }
}
