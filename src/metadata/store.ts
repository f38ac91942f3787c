import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { crc32 } from 'node:zlib'
import { type Database, open, type RootDatabase } from 'lmdb'
import { messageOf, StoreError, systemCode } from '../base/errors.ts'
import {
  METADATA_VERSION,
  type MetadataPage,
  type MirrorRecord,
  type PageKind,
  type PoolRecord,
  type VolumeRecord,
} from './records.ts'

/**
 * The transactional store of a pool, one LMDB environment in POOL/metadata:
 *
 *   catalog   'pool', ['volume', id], ['mirror', id], 'checkpoint', 'ids'      JSON
 *   pages     [medium, kind, index]                            little-endian table pages
 *
 * Every value ends in its CRC32. A transaction is durable when its promise resolves (LMDB's own synchronous
 * mode: data, then the meta page), and runs on LMDB's writer thread, not on the event loop.
 */
export interface Commit {
  readonly pages?: readonly MetadataPage[]
  /** Last journal sequence that these pages contain. */
  readonly sequence?: number
  readonly putVolumes?: readonly VolumeRecord[]
  /** Forgets volumes and every page of their media. */
  readonly dropVolumes?: readonly VolumeRecord[]
  readonly putMirrors?: readonly MirrorRecord[]
  /** Forgets mirrors and every page of theirs. */
  readonly dropMirrors?: readonly MirrorRecord[]
  readonly pool?: PoolRecord
  readonly nextId?: number
}

/** What a pool asks of its store. LMDB does it; the simulation has another one, which fails when it is told to. */
export interface TransactionalStore {
  pool(): PoolRecord
  /** Last journal sequence that the stored pages contain. */
  checkpoint(): number
  nextId(): number
  volumes(): Iterable<VolumeRecord>
  mirrors(): Iterable<MirrorRecord>
  /** All stored pages of a medium, each kind in order of index. */
  pages(medium: number, kind: PageKind): Iterable<{ index: number; bytes: Buffer }>
  /** Media that have pages. */
  mediaWithPages(): Set<number>
  /**
   * One atomic transaction; durable when it resolves.
   * @throws StoreError NO_SPACE or MEMBER_IO; nothing of it was stored then
   */
  commit(commit: Commit): Promise<void>
  /** Removes the pages of media that no volume and no mirror names (left by nobody; `check --repair` uses it). */
  dropMedium(medium: number): Promise<void>
  close(): Promise<void>
}

const KIND_NUMBER: Record<PageKind, number> = { map: 0, init: 1, hot: 2, suspect: 3, copy: 4 }
type Key = string | (string | number)[]

export class MetadataStore implements TransactionalStore {
  readonly #root: RootDatabase<Buffer, Key>
  readonly #catalog: Database<Buffer, Key>
  readonly #pages: Database<Buffer, Key>

  private constructor(directory: string) {
    this.#root = open<Buffer, Key>({
      path: directory,
      encoding: 'binary',
      maxDbs: 8,
      overlappingSync: false, // a commit that resolves is on the disk
      // Transactions are exactly our batches. (With event-turn batching lmdb keeps a promise of its own a batch, which
      // nobody can catch when a commit fails.)
      eventTurnBatching: false,
      mapSize: 1 << 26, // address space to begin with; LMDB grows it
    })
    this.#catalog = this.#root.openDB<Buffer, Key>({ name: 'catalog', encoding: 'binary' })
    this.#pages = this.#root.openDB<Buffer, Key>({ name: 'pages', encoding: 'binary' })
  }

  static async create(directory: string, pool: PoolRecord): Promise<MetadataStore> {
    const store = new MetadataStore(directory)
    await store.commit({ pool, sequence: 0, nextId: 1 })
    return store
  }

  /**
   * @throws StoreError DAMAGED when LMDB cannot read its file. LMDB maps its file into memory and trusts it, so a
   * damaged one can end the process that reads it: another process reads all of it first.
   */
  static async open(directory: string): Promise<MetadataStore> {
    if (!existsSync(join(directory, 'data.mdb'))) {
      throw new StoreError(
        'DAMAGED',
        `${directory}: data.mdb is missing; restore the pool's metadata directory from a backup`,
      )
    }
    await probe(directory)
    try {
      return new MetadataStore(directory)
    } catch (error) {
      throw new StoreError('DAMAGED', `${directory}: cannot open the metadata: ${messageOf(error)}`, {
        cause: error,
      })
    }
  }

  pool(): PoolRecord {
    const record = this.#get<PoolRecord>('pool')
    if (record === undefined)
      throw new StoreError('DAMAGED', 'metadata: the pool record is missing; restore from a backup')
    if (record.version > METADATA_VERSION) {
      throw new StoreError(
        'DAMAGED',
        `metadata: version ${record.version} is newer than this program's ${METADATA_VERSION}; use a newer fullstripe`,
      )
    }
    return record
  }

  checkpoint(): number {
    return this.#get<{ sequence: number }>('checkpoint')?.sequence ?? 0
  }

  nextId(): number {
    return this.#get<{ next: number }>('ids')?.next ?? 1
  }

  volumes(): Generator<VolumeRecord> {
    return this.#records<VolumeRecord>('volume')
  }

  mirrors(): Generator<MirrorRecord> {
    return this.#records<MirrorRecord>('mirror')
  }

  *pages(medium: number, kind: PageKind): Generator<{ index: number; bytes: Buffer }> {
    const number = KIND_NUMBER[kind]
    for (const { key, value } of this.#pages.getRange({
      start: [medium, number, 0],
      end: [medium, number + 1, 0],
    })) {
      const index = Array.isArray(key) ? Number(key[2]) : -1
      yield { index, bytes: checked(value, `${kind} page ${index} of medium ${medium}`) }
    }
  }

  mediaWithPages(): Set<number> {
    const media = new Set<number>()
    for (const key of this.#pages.getKeys()) if (Array.isArray(key)) media.add(Number(key[0]))
    return media
  }

  async commit(commit: Commit): Promise<void> {
    await this.#transaction((settled) => {
      const put = (key: Key, value: unknown): void => {
        settled.push(this.#catalog.put(key, sealed(Buffer.from(JSON.stringify(value)))))
      }
      if (commit.pool !== undefined) put('pool', commit.pool)
      if (commit.nextId !== undefined) put('ids', { next: commit.nextId })
      if (commit.sequence !== undefined) put('checkpoint', { sequence: commit.sequence })
      for (const volume of commit.putVolumes ?? []) put(['volume', volume.id], volume)
      for (const volume of commit.dropVolumes ?? []) {
        settled.push(this.#catalog.remove(['volume', volume.id]))
        this.#dropPages(volume.medium, settled)
      }
      for (const mirror of commit.putMirrors ?? []) put(['mirror', mirror.id], mirror)
      for (const mirror of commit.dropMirrors ?? []) {
        settled.push(this.#catalog.remove(['mirror', mirror.id]))
        this.#dropPages(mirror.id, settled)
      }
      for (const page of commit.pages ?? []) {
        const key: Key = [page.medium, KIND_NUMBER[page.kind], page.index]
        settled.push(
          page.bytes === undefined ? this.#pages.remove(key) : this.#pages.put(key, sealed(page.bytes)),
        )
      }
    })
  }

  async dropMedium(medium: number): Promise<void> {
    await this.#transaction((settled) => this.#dropPages(medium, settled))
  }

  async close(): Promise<void> {
    await this.#root.close()
  }

  *#records<T>(kind: 'volume' | 'mirror'): Generator<T> {
    for (const { key, value } of this.#catalog.getRange({
      start: [kind, 0],
      end: [kind, Number.MAX_SAFE_INTEGER],
    })) {
      yield decodeJson<T>(value, JSON.stringify(key))
    }
  }

  #dropPages(medium: number, settled: Promise<unknown>[]): void {
    for (const key of this.#pages.getKeys({ start: [medium, 0, 0], end: [medium + 1, 0, 0] })) {
      settled.push(this.#pages.remove(key))
    }
  }

  /** @param operations queues puts and removals, and hands over their promises: none may be left to reject unheard */
  async #transaction(operations: (settled: Promise<unknown>[]) => void): Promise<void> {
    const settled: Promise<unknown>[] = []
    const done = this.#root.batch(() => operations(settled))
    const results = await Promise.allSettled([done, ...settled])
    const failed = results.find((result) => result.status === 'rejected')
    if (failed !== undefined) throw await commitError(failed.reason)
  }

  #get<T>(key: Key): T | undefined {
    const value = this.#catalog.get(key)
    return value === undefined ? undefined : decodeJson<T>(value, String(key))
  }
}

function sealed(bytes: Buffer): Buffer {
  const out = Buffer.allocUnsafe(bytes.length + 4)
  bytes.copy(out)
  out.writeUInt32LE(crc32(bytes), bytes.length)
  return out
}

function checked(value: Buffer, what: string): Buffer {
  const bytes = value.subarray(0, Math.max(0, value.length - 4))
  if (value.length < 4 || value.readUInt32LE(value.length - 4) !== crc32(bytes)) {
    throw new StoreError('DAMAGED', `metadata: ${what} fails its checksum; run: fullstripe check POOL`)
  }
  return bytes
}

function decodeJson<T>(value: Buffer, what: string): T {
  return JSON.parse(checked(value, `record ${what}`).toString()) as T
}

/** lmdb tells why in a promise of its own, which it rejects a moment after the commit's. */
const REASON_MS_MAX = 100

async function commitError(error: unknown): Promise<StoreError> {
  let reason: unknown = error
  if (error instanceof Error && 'commitError' in error && error.commitError instanceof Promise) {
    const told = error.commitError.then(
      () => error,
      (why: unknown) => why,
    )
    reason = await Promise.race([
      told,
      new Promise((resolve) => setTimeout(() => resolve(error), REASON_MS_MAX)),
    ])
  }
  const text = messageOf(reason)
  const full = systemCode(reason) === 'ENOSPC' || /no space|MAP_FULL|ENOSPC/i.test(text)
  return new StoreError(full ? 'NO_SPACE' : 'MEMBER_IO', `metadata: commit failed: ${text}`, {
    cause: reason,
  })
}

const PROBE = `
const [lmdb, path] = process.argv.slice(-2)
const { open } = await import(lmdb)
const root = open({ path, encoding: 'binary', maxDbs: 8, readOnly: true, overlappingSync: false })
for (const name of ['catalog', 'pages']) {
  const database = root.openDB({ name, encoding: 'binary' })
  if (database === undefined) throw new Error('database ' + name + ' is missing')
  let sum = 0
  for (const { value } of database.getRange({})) sum += value.length
}
process.exit(0)
`

/** Reads the whole environment in a process of its own. */
function probe(directory: string): Promise<void> {
  const lmdb = pathToFileURL(createRequire(import.meta.url).resolve('lmdb')).href
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, ['--input-type=module', '-e', PROBE, '--', lmdb, directory], {
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let text = ''
    child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
      if (text.length < 4096) text += chunk
    })
    child.on('error', reject)
    child.on('close', (code, signal) => {
      if (code === 0) return resolve()
      const reason = signal ?? /^\w*Error: (.*)$/m.exec(text)?.[1] ?? `exit ${code}`
      reject(
        new StoreError(
          'DAMAGED',
          `${directory}: the metadata is damaged and was not opened (${reason}); members are untouched: restore the metadata directory from a backup`,
        ),
      )
    })
  })
}
