import { createHash } from 'node:crypto'
import {
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join, relative } from 'node:path'
import { buildLibrary, hasCompiler } from './build-library.ts'
import type { Random } from './random.ts'
import { copyPool } from './volumes.ts'

/**
 * A disk that loses its power, around a real daemon. disk-log.c, preloaded, notes what the daemon writes and syncs; from
 * that a `PowerCut` builds what the disk may hold when the power fails right behind any record of the note:
 *
 *   what was written before a sync began that ended well (or through O_DSYNC)    is there
 *   what was written later                                                       is there or not, page by page
 *
 * A page that was written several times is found as it was after any of those writes; the kernel writes back what a
 * page holds at that moment. Now and then a page is torn: its sectors come from two neighbouring states.
 */
const PAGE = 4096
const SECTOR = 512
const HEADER = 24
const KIND = { write: 1, writeThrough: 2, syncBegin: 3, syncEnd: 4, punch: 5, name: 6 } as const

/** Builds the library. @returns its path, or undefined where there is no C compiler */
export function buildDiskLog(directory: string): string | undefined {
  return hasCompiler() ? buildLibrary(directory, 'disk-log.c') : undefined
}

/** One note, and the environment of the daemons that write it. */
export class DiskLog {
  readonly path: string
  readonly env: Readonly<Record<string, string>>
  readonly #death: string

  /** @param root the pool's directory. @param bootId of the kernel that the daemons find themselves under */
  constructor(library: string, directory: string, name: string, root: string, bootId: string) {
    this.path = join(directory, `${name}.log`)
    this.#death = join(directory, `${name}.kill`)
    const boot = join(directory, `${name}.boot-id`)
    writeFileSync(boot, `${bootId}\n`)
    this.env = {
      LD_PRELOAD: library,
      DISK_LOG: this.path,
      DISK_LOG_ROOT: root,
      DISK_LOG_BOOT_ID: boot,
      DISK_LOG_KILL: this.#death,
    }
  }

  /** How much is noted: what is noted later lies behind this. */
  get position(): number {
    return statSync(this.path, { throwIfNoEntry: false })?.size ?? 0
  }

  /** The daemon dies between two writes. @param exited of the daemon */
  async kill(exited: Promise<unknown>): Promise<void> {
    writeFileSync(this.#death, '')
    await exited
    rmSync(this.#death)
  }
}

interface NoteRecord {
  readonly kind: number
  readonly file: number
  readonly offset: number
  readonly length: number
  readonly data: Buffer | undefined
  readonly end: number // position in the note
}

/** What a page held after one of the writes to it. */
interface Version {
  readonly record: number
  readonly content: Buffer
}

interface FileState {
  readonly path: string // relative to the pool
  /** By page: the states in which it may be found; the first is the one that is durable. */
  readonly pages: Map<number, Version[]>
}

/** What survives of the writes to one file that were not synced. */
export type Survival = 'none' | 'all' | 'some'

/** What may become of the files of a pool. Nothing forbids a disk to keep just what was written last. */
export const FATES: readonly ((path: string, random: Random) => Survival)[] = [
  () => 'none',
  () => 'some',
  (path) => (path.startsWith('member') ? 'none' : 'all'),
  (path) => (path.startsWith('member') ? 'all' : 'none'),
  (_, random) => random.pick(['none', 'some', 'all']),
]

export interface Outcome {
  readonly lost: string // what was lost, for messages
  readonly fingerprint: string // the same for two outcomes of one note exactly where the pools are the same
  readonly build: (target: string) => void
}

export class PowerCut {
  readonly #root: string
  readonly #base: string
  readonly #records: NoteRecord[] = []
  readonly #names = new Map<number, string>()

  /** @param base a copy of the pool from before the first record. @param root where the pool was */
  constructor(log: DiskLog, base: string, root: string) {
    this.#base = base
    this.#root = root
    const note = readFileSync(log.path)
    for (let at = 0; at + HEADER <= note.length; ) {
      const kind = note.readUInt32LE(at)
      const file = note.readUInt32LE(at + 4)
      const offset = Number(note.readBigUInt64LE(at + 8))
      const length = Number(note.readBigUInt64LE(at + 16))
      const carries = kind === KIND.write || kind === KIND.writeThrough || kind === KIND.name
      const data = carries ? note.subarray(at + HEADER, at + HEADER + length) : undefined
      at += HEADER + (carries ? length : 0)
      if (kind === KIND.name) this.#names.set(file, data?.toString() ?? '')
      // Processes that share a note number their files each for itself: names are what counts.
      else this.#records.push({ kind, file: this.#fileNumber(file), offset, length, data, end: at })
    }
  }

  /** A position in the note: anywhere, or, as often, where a sync is about to end and everything hangs on it. */
  position(random: Random): number {
    const any = this.#records[random.below(this.#records.length)]
    const next = this.#records.findIndex(({ kind, end }) => kind === KIND.syncEnd && end > (any?.end ?? 0))
    const chosen = next > 0 && random.below(2) === 0 ? this.#records[next - 1] : any
    return chosen?.end ?? 0
  }

  /** The writes to the members: where each lies in the note (behind it), and what its sectors say of themselves (sector-data.ts). */
  *memberWrites(): Generator<{ position: number; sectors: { token: bigint; sector: number }[] }> {
    for (const { kind, file, data, end } of this.#records) {
      if (kind !== KIND.write || data === undefined || this.#paths[file]?.startsWith('member') !== true)
        continue
      const sectors = []
      for (let at = 0; at + SECTOR <= data.length; at += SECTOR) {
        sectors.push({ token: data.readBigUInt64LE(at), sector: Number(data.readBigUInt64LE(at + 8)) })
      }
      yield { position: end, sectors }
    }
  }

  /** The positions right before and right behind everything that made something durable: between them nothing changes but what may be lost. */
  boundaries(): number[] {
    const positions = new Set<number>()
    this.#records.forEach(({ kind, end }, index) => {
      if (kind !== KIND.syncEnd && kind !== KIND.syncBegin && kind !== KIND.writeThrough) return
      positions.add(this.#records[index - 1]?.end ?? 0)
      positions.add(end)
    })
    const last = this.#records.at(-1)
    if (last !== undefined) positions.add(last.end)
    return [...positions].sort((a, b) => a - b)
  }

  /** Builds in `target` what may be found after a failure at `position`. @returns what was lost, for messages */
  build(target: string, position: number, random: Random, survival: (path: string) => Survival): string {
    const outcome = this.outcome(position, random, survival)
    outcome.build(target)
    return outcome.lost
  }

  /** What may be found after a failure at `position`, not built yet. */
  outcome(position: number, random: Random, survival: (path: string) => Survival): Outcome {
    const told: string[] = []
    const hash = createHash('sha256')
    const found: { path: string; pages: { page: number; content: Buffer }[] }[] = []
    for (const { path, pages } of this.#statesAt(position)) {
      const choice = survival(path)
      let kept = 0
      let open = 0
      const chosen: { page: number; content: Buffer }[] = []
      for (const [page, versions] of pages) {
        const content = pick(versions, choice, random)
        if (versions.length > 1) open++
        if (versions.length > 1 && content !== versions[0]?.content) kept++
        chosen.push({ page, content })
        hash.update(`${path} ${page}`).update(content)
      }
      found.push({ path, pages: chosen })
      told.push(`${path}: ${choice}, ${kept} of ${open} pages`)
    }
    const build = (target: string): void => {
      copyPool(this.#base, target)
      rmSync(join(target, 'metadata/lock.mdb'), { force: true }) // says who is alive; nobody is
      for (const { path, pages } of found) {
        const fd = openSync(join(target, path), 'r+')
        for (const { page, content } of pages) writeSync(fd, content, 0, PAGE, page * PAGE)
        closeSync(fd)
      }
    }
    return { lost: told.join('; '), fingerprint: hash.digest('hex'), build }
  }

  #statesAt(position: number): Iterable<FileState> {
    const files = new Map<string, FileState>()
    const begun = new Map<string, number>()
    for (const [index, record] of this.#records.entries()) {
      if (record.end > position) break
      const path = this.#paths[record.file] ?? ''
      let file = files.get(path)
      if (file === undefined) {
        file = { path, pages: new Map() }
        files.set(path, file)
      }
      const sync = `${path} ${record.offset}`
      switch (record.kind) {
        case KIND.write:
        case KIND.writeThrough:
        case KIND.punch:
          this.#write(file, record, index)
          break
        case KIND.syncBegin:
          begun.set(sync, index)
          break
        case KIND.syncEnd:
          for (const versions of file.pages.values()) keepFrom(versions, begun.get(sync) ?? 0)
          break
      }
    }
    return files.values()
  }

  #write(file: FileState, { kind, offset, length, data }: NoteRecord, index: number): void {
    for (let page = Math.floor(offset / PAGE); page * PAGE < offset + length; page++) {
      const versions = file.pages.get(page) ?? [{ record: -1, content: this.#basePage(file.path, page) }]
      const content = Buffer.from(versions[versions.length - 1]?.content ?? Buffer.alloc(PAGE))
      const from = Math.max(offset, page * PAGE)
      const to = Math.min(offset + length, (page + 1) * PAGE)
      if (data === undefined) content.fill(0, from - page * PAGE, to - page * PAGE)
      else data.copy(content, from - page * PAGE, from - offset, to - offset)
      versions.push({ record: index, content })
      if (kind === KIND.writeThrough) versions.splice(0, versions.length - 1)
      file.pages.set(page, versions)
    }
  }

  #basePage(path: string, page: number): Buffer {
    const content = Buffer.alloc(PAGE)
    const at = join(this.#base, path)
    if (!existsSync(at)) return content
    const bytes = this.#baseFile(at)
    if (page * PAGE < bytes.length) bytes.copy(content, 0, page * PAGE, (page + 1) * PAGE)
    return content
  }

  #baseFile(path: string): Buffer {
    let bytes = this.#baseFiles.get(path)
    if (bytes === undefined) {
      bytes = readFileSync(path)
      this.#baseFiles.set(path, bytes)
    }
    return bytes
  }
  readonly #baseFiles = new Map<string, Buffer>()

  #fileNumber(file: number): number {
    const path = relative(this.#root, this.#names.get(file) ?? '')
    const known = this.#paths.indexOf(path)
    return known >= 0 ? known : this.#paths.push(path) - 1
  }
  readonly #paths: string[] = []
}

/** A sync that began at `begin` ended: the last state from before it is durable, the earlier ones are history. */
function keepFrom(versions: Version[], begin: number): void {
  const durable = versions.findLastIndex(({ record }) => record < begin)
  if (durable > 0) versions.splice(0, durable)
}

function pick(versions: readonly Version[], survival: Survival, random: Random): Buffer {
  const last = versions.length - 1
  const chosen = survival === 'none' ? 0 : survival === 'all' ? last : random.below(versions.length)
  const content = versions[chosen]?.content ?? Buffer.alloc(PAGE)
  const next = versions[chosen + 1]?.content
  if (survival !== 'some' || next === undefined || random.below(8) > 0) return content
  const torn = Buffer.from(content)
  for (let at = 0; at < PAGE; at += SECTOR) if (random.below(2) === 0) next.copy(torn, at, at, at + SECTOR)
  return torn
}
