import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { crc32 } from 'node:zlib'
import { type Database, open, type RootDatabase } from 'lmdb'
import { messageOf, StoreError, systemCode } from '../base/errors.ts'
import { METADATA_VERSION, type MetadataPage, type PageKind, type PoolRecord, type VolumeRecord } from './records.ts'

/**
 * The transactional store of a pool, one LMDB environment in POOL/metadata:
 *
 *   catalog   'pool', ['volume', id], 'checkpoint', 'ids'      JSON
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
  readonly pool?: PoolRecord
  readonly nextId?: number
}

const KIND_NUMBER: Record<PageKind, number> = { map: 0, init: 1 }
type Key = string | (string | number)[]

export class MetadataStore {
  readonly #root: RootDatabase<Buffer, Key>
  readonly #catalog: Database<Buffer, Key>
  readonly #pages: Database<Buffer, Key>

  private constructor(directory: string) {
    this.#root = open<Buffer, Key>({
      path: directory,
      encoding: 'binary',
      maxDbs: 8,
      overlappingSync: false, // a commit that resolves is on the disk
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
      throw new StoreError('DAMAGED', `${directory}: data.mdb is missing; restore the pool's metadata directory from a backup`)
    }
    await probe(directory)
    try {
      return new MetadataStore(directory)
    } catch (error) {
      throw new StoreError('DAMAGED', `${directory}: cannot open the metadata: ${messageOf(error)}`, { cause: error })
    }
  }

  pool(): PoolRecord {
    const record = this.#get<PoolRecord>('pool')
    if (record === undefined) throw new StoreError('DAMAGED', 'metadata: the pool record is missing; restore from a backup')
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

  *volumes(): Generator<VolumeRecord> {
    for (const { key, value } of this.#catalog.getRange({ start: ['volume', 0], end: ['volume', Number.MAX_SAFE_INTEGER] })) {
      yield decodeJson<VolumeRecord>(value, JSON.stringify(key))
    }
  }

  /** All stored pages of a medium, each kind in order of index. */
  *pages(medium: number, kind: PageKind): Generator<{ index: number; bytes: Buffer }> {
    const number = KIND_NUMBER[kind]
    for (const { key, value } of this.#pages.getRange({ start: [medium, number, 0], end: [medium, number + 1, 0] })) {
      const index = Array.isArray(key) ? Number(key[2]) : -1
      yield { index, bytes: checked(value, `${kind} page ${index} of medium ${medium}`) }
    }
  }

  /** Media that have pages. */
  mediaWithPages(): Set<number> {
    const media = new Set<number>()
    for (const key of this.#pages.getKeys()) if (Array.isArray(key)) media.add(Number(key[0]))
    return media
  }

  /**
   * One atomic transaction; durable when it resolves.
   * @throws StoreError NO_SPACE or MEMBER_IO; nothing of it was stored then
   */
  async commit(commit: Commit): Promise<void> {
    try {
      await this.#root.batch(() => {
        if (commit.pool !== undefined) this.#put('pool', commit.pool)
        if (commit.nextId !== undefined) this.#put('ids', { next: commit.nextId })
        if (commit.sequence !== undefined) this.#put('checkpoint', { sequence: commit.sequence })
        for (const volume of commit.putVolumes ?? []) this.#put(['volume', volume.id], volume)
        for (const volume of commit.dropVolumes ?? []) {
          this.#catalog.remove(['volume', volume.id])
          this.#dropPages(volume.medium)
        }
        for (const page of commit.pages ?? []) {
          const key: Key = [page.medium, KIND_NUMBER[page.kind], page.index]
          if (page.bytes === undefined) this.#pages.remove(key)
          else this.#pages.put(key, sealed(page.bytes))
        }
      })
    } catch (error) {
      throw commitError(error)
    }
  }

  /** Removes the pages of media that no volume names (left by nobody; `check --repair` uses it). */
  async dropMedium(medium: number): Promise<void> {
    try {
      await this.#root.batch(() => this.#dropPages(medium))
    } catch (error) {
      throw commitError(error)
    }
  }

  async close(): Promise<void> {
    await this.#root.close()
  }

  #dropPages(medium: number): void {
    for (const key of this.#pages.getKeys({ start: [medium, 0, 0], end: [medium + 1, 0, 0] })) this.#pages.remove(key)
  }

  #put(key: Key, value: unknown): void {
    this.#catalog.put(key, sealed(Buffer.from(JSON.stringify(value))))
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

function commitError(error: unknown): StoreError {
  const text = messageOf(error)
  const full = systemCode(error) === 'ENOSPC' || /no space|MAP_FULL|ENOSPC/i.test(text)
  return new StoreError(full ? 'NO_SPACE' : 'MEMBER_IO', `metadata: commit failed: ${text}`, { cause: error })
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
