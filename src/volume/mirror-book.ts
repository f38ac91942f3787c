import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import { UserError } from '../base/errors.ts'
import { Mutex, UnitLocks } from '../base/locks.ts'
import { CopyMap, copyUnitsOf } from '../metadata/copy.ts'
import { CHANGE, type Change } from '../metadata/journal.ts'
import type { MirrorRecord, VolumeRecord } from '../metadata/records.ts'
import type { Commit } from '../metadata/store.ts'

/**
 * The mirrors of a pool as its disk knows them: a record and a copy bitmap each. What a mirror does is not decided here
 * (src/mirror/).
 *
 * Rules:
 *  1. A map changes in the turn in which the frame or the transaction is made that says so: a checkpoint never holds one without the
 *     other.
 *  2. Changes of bits keep the order in which they were asked for, those of `save` included: it waits for the ones before it,
 *     and the ones after it wait for it. Otherwise a bit that was cleared earlier could clear one that `save` sets later.
 *  3. A volume is the secondary of one mirror and has no other, or is the primary of all.
 *  4. Nothing is stored of a mirror after the transaction that drops it: whoever drops it waits for its saves, and refuses more.
 */
export interface StoredMirror {
  /** The stored one; another object after each `save`. */
  readonly record: MirrorRecord
  /** Changed by the book alone. */
  readonly map: CopyMap
}

export interface UnitChange {
  readonly first: number // copy unit
  readonly count: number
  readonly set: boolean
}

/** What `save` does in the same transaction. */
export interface SaveAlso {
  /** As they are at the call, they replace the whole copy bitmap. */
  readonly bits?: Bitmap
  /** Changes the volume's record. */
  readonly volume?: Partial<VolumeRecord>
  /** Changes tables, in the turn in which their pages are copied. @returns takes that back */
  readonly prepare?: () => () => void
}

/** What the book needs of a volume. */
export interface MirroredVolume {
  readonly name: string
  storeWith(
    change: Partial<VolumeRecord>,
    prepare: (record: VolumeRecord) => Commit,
    undo?: () => void,
  ): Promise<void>
}

export interface MirrorBookHost {
  /** One change at a time of what there is in the pool, and of its ids. */
  change<T>(action: () => Promise<T>): Promise<T>
  /** A number that nothing in the pool has had. The first free one then belongs into the transaction. */
  takeId(): { readonly id: number; readonly nextId: number }
  volume(id: number): MirroredVolume | undefined
  record(changes: readonly Change[], apply: () => void): Promise<unknown>
  commit(commit: Commit): Promise<void>
  checkpointWith(prepare: () => Commit, undo: () => void): Promise<void>
}

/** A journal frame holds more; so a large change makes room for others now and then. */
const CHANGES_PER_RECORD = 1024

interface Batch {
  readonly changes: UnitChange[]
  readonly resolve: () => void
  readonly reject: (error: unknown) => void
  readonly done: Promise<void>
}

class Entry implements StoredMirror {
  record: MirrorRecord
  readonly map: CopyMap
  readonly saving = new Mutex()
  gone = false
  batch: Batch | undefined // collects what is asked for in this turn

  constructor(record: MirrorRecord, map: CopyMap) {
    this.record = record
    this.map = map
  }
}

export class MirrorBook {
  readonly #host: MirrorBookHost
  readonly #entries = new Map<number, Entry>()
  /** By mirror; shared by batches of changes, exclusive for a `save` that replaces the bits (rule 2: these locks are FIFO). */
  readonly #order = new UnitLocks()

  constructor(host: MirrorBookHost, loaded: readonly StoredMirror[]) {
    this.#host = host
    for (const { record, map } of loaded) this.#entries.set(record.id, new Entry(record, map))
  }

  all(): readonly StoredMirror[] {
    return [...this.#entries.values()]
  }

  of(volumeId: number): readonly StoredMirror[] {
    return this.all().filter(({ record }) => record.volume === volumeId)
  }

  /**
   * @param make the record, given its id
   * @param also changes the volume's record in the same transaction, given the id too
   * @throws UserError EXISTS, NOT_FOUND, REFUSED; StoreError
   */
  add(
    make: (id: number) => MirrorRecord,
    also: (id: number) => Partial<VolumeRecord> = () => ({}),
  ): Promise<StoredMirror> {
    return this.#host.change(async () => {
      const { id, nextId } = this.#host.takeId()
      const record = make(id)
      assert(record.id === id && record.unitBytes > 0, 'a record of this mirror')
      const volume = this.#volume(record)
      if (this.of(record.volume).some((other) => other.record.name === record.name)) {
        throw new UserError(
          'EXISTS',
          `volume ${volume.name} has a mirror ${record.name} already: choose another name`,
        )
      }
      let entry: Entry | undefined
      await volume.storeWith(
        also(id),
        ({ size }) => {
          this.#checkRoles(record, volume.name)
          // Here, not later: a resize of the volume that comes next has to find the map.
          entry = new Entry(record, new CopyMap(id, copyUnitsOf(size, record.unitBytes)))
          this.#entries.set(id, entry)
          return { putMirrors: [record], nextId }
        },
        () => this.#entries.delete(id),
      )
      assert(entry !== undefined)
      return entry
    })
  }

  /** Changes the record, and what `also` says in the same transaction. @throws UserError NOT_FOUND, REFUSED; StoreError */
  save(id: number, change: Partial<MirrorRecord>, { bits, volume, prepare }: SaveAlso = {}): Promise<void> {
    const entry = this.#entries.get(id)
    if (entry === undefined || entry.gone) return Promise.reject(unknown(id))
    const copy = bits && new Bitmap(bits.length, bits.words.slice(0, Bitmap.wordCount(bits.length)))
    // Asked for in this turn, so that it stands in the order of the calls.
    if (copy !== undefined) this.#flush(entry)
    const turn = copy && this.#order.exclusive(id)
    return entry.saving.run(async () => {
      await turn
      try {
        await this.#save(entry, this.#changed(entry, change), copy, volume, prepare)
      } finally {
        if (turn !== undefined) this.#order.release(id)
      }
    })
  }

  async #save(
    entry: Entry,
    record: MirrorRecord,
    bits: Bitmap | undefined,
    also: Partial<VolumeRecord> | undefined,
    change: (() => () => void) | undefined,
  ): Promise<void> {
    const commit: Commit = { putMirrors: [record] }
    const undo: (() => void)[] = []
    const prepare = (): Commit => {
      if (record.role !== entry.record.role) this.#checkRoles(record, this.#volume(record).name)
      if (change !== undefined) undo.push(change()) // first: where it throws, nothing has to be taken back
      if (bits !== undefined) undo.push(entry.map.setAll(bits))
      return commit
    }
    const back = (): void => {
      for (const step of undo.reverse()) step()
    }
    if (also !== undefined) await this.#volume(record).storeWith(also, prepare, back)
    else if (bits !== undefined || change !== undefined) await this.#host.checkpointWith(prepare, back)
    else await this.#host.commit(commit)
    entry.record = record
  }

  /** @param also changes the volume's record in the same transaction. @throws UserError NOT_FOUND; StoreError */
  remove(id: number, also: Partial<VolumeRecord> = {}): Promise<void> {
    return this.#host.change(async () => {
      const entry = this.#entry(id)
      const volume = this.#volume(entry.record)
      const leaving = await this.#leave([entry])
      let stored = false
      try {
        await volume.storeWith(also, leaving.drop, leaving.back)
        stored = true
      } finally {
        if (!stored) leaving.stay()
      }
    })
  }

  /**
   * Records changes of single units, in the order of the calls; resolves when they survive the death of the process. Calls of one
   * turn share a journal frame.
   * @throws UserError NOT_FOUND; StoreError
   */
  record(id: number, changes: readonly UnitChange[]): Promise<void> {
    const entry = this.#entries.get(id)
    if (entry === undefined) return Promise.reject(unknown(id))
    if (entry.batch === undefined) {
      entry.batch = newBatch()
      queueMicrotask(() => this.#flush(entry))
    }
    const { batch } = entry
    for (const change of changes) append(batch.changes, change)
    return batch.done
  }

  // ---- for the pool ------------------------------------------------------------------------------------------

  /** The copy maps of a volume, in the transaction that changes its size. @returns takes that back */
  resize(volumeId: number, size: number): () => void {
    const undo = this.of(volumeId).map(({ record, map }) => {
      const before = map.unitCount
      const back = map.resize(copyUnitsOf(size, record.unitBytes))
      // A secondary that sees neither a shrink nor the growth after it still has what was cut off.
      if (record.role !== 'primary') return back
      const last = Math.min(before, map.unitCount) - 1
      const marked = map.get(last)
      map.mark(last, map.unitCount)
      return () => {
        if (!marked) map.apply({ op: CHANGE.copyClear, medium: record.id, first: last, count: 1, slot: 0 })
        back()
      }
    })
    return () => {
      for (const back of undo) back()
    }
  }

  /**
   * Before the transaction that drops a volume with its mirrors, which calls `drop`; where it fails, `back` at once, and `stay`
   * when the volume is served again.
   */
  leave(volumeId: number): Promise<Leaving> {
    return this.#leave([...this.#entries.values()].filter(({ record }) => record.volume === volumeId))
  }

  async #leave(entries: readonly Entry[]): Promise<Leaving> {
    for (const entry of entries) entry.gone = true
    for (const entry of entries) await entry.saving.run(() => {}) // rule 4: those that were asked for before
    return {
      drop: () => {
        for (const { record } of entries) this.#entries.delete(record.id) // no later checkpoint stores a page of it
        return { dropMirrors: entries.map(({ record }) => record) }
      },
      back: () => {
        for (const entry of entries) this.#entries.set(entry.record.id, entry)
      },
      stay: () => {
        for (const entry of entries) entry.gone = false
      },
    }
  }

  /** In the turn in which it is stored: nothing comes between. */
  #checkRoles({ id, role, volume }: MirrorRecord, name: string): void {
    const others = this.of(volume).filter(({ record }) => record.id !== id)
    if (role === 'primary' && others.every(({ record }) => record.role === 'primary')) return
    if (role === 'secondary' && others.length === 0) return
    const names = others.map(({ record }) => record.name).join(', ')
    throw new UserError(
      'REFUSED',
      role === 'primary'
        ? `volume ${name} is the secondary of mirror ${names}: mirror it from its primary`
        : `volume ${name} has other mirrors (${names}): it cannot be a secondary`,
    )
  }

  #changed(entry: Entry, change: Partial<MirrorRecord>): MirrorRecord {
    const record = { ...entry.record, ...change }
    const { id, volume, relation, unitBytes } = entry.record
    assert(record.id === id && record.volume === volume, 'a mirror stays what it is')
    assert(record.relation === relation && record.unitBytes === unitBytes, 'a mirror stays what it is')
    return record
  }

  /** Gives to the ledger what was collected, after a save that was asked for before. */
  #flush(entry: Entry): void {
    const { batch } = entry
    if (batch === undefined) return
    entry.batch = undefined
    this.#record(entry.map, batch.changes).then(batch.resolve, batch.reject)
  }

  async #record(map: CopyMap, asked: readonly UnitChange[]): Promise<void> {
    const { medium } = map
    const changes = merged(asked).map(({ first, count, set }) => {
      assert(Number.isSafeInteger(first) && first >= 0 && count > 0, 'copy units')
      return { op: set ? CHANGE.copySet : CHANGE.copyClear, medium, first, count, slot: 0 }
    })
    await this.#order.shared(medium)
    const recorded: Promise<unknown>[] = []
    for (let at = 0; at < changes.length; at += CHANGES_PER_RECORD) {
      const part = changes.slice(at, at + CHANGES_PER_RECORD)
      const apply = (): void => {
        for (const change of part) map.apply(change)
      }
      recorded.push(this.#host.record(part, apply))
    }
    const results = await Promise.allSettled(recorded)
    this.#order.release(medium)
    const failed = results.find((result) => result.status === 'rejected')
    if (failed !== undefined) throw failed.reason
  }

  #entry(id: number): Entry {
    const entry = this.#entries.get(id)
    if (entry === undefined || entry.gone) throw unknown(id)
    return entry
  }

  #volume({ volume: id, name }: MirrorRecord): MirroredVolume {
    const volume = this.#host.volume(id)
    if (volume === undefined) throw new UserError('NOT_FOUND', `mirror ${name}: its volume is gone`)
    return volume
  }
}

/** Mirrors that are being dropped. */
export interface Leaving {
  readonly drop: () => Commit
  readonly back: () => void
  readonly stay: () => void
}

function newBatch(): Batch {
  let resolve = (): void => {}
  let reject: (error: unknown) => void = () => {}
  const done = new Promise<void>((yes, no) => {
    resolve = yes
    reject = no
  })
  return { changes: [], resolve, reject, done }
}

/** Writers mostly go on where they were. */
function append(changes: UnitChange[], change: UnitChange): void {
  if (change.count === 0) return
  const last = changes.at(-1)
  if (last === undefined || last.set !== change.set || last.first + last.count !== change.first) {
    changes.push(change)
    return
  }
  changes[changes.length - 1] = { ...last, count: last.count + change.count }
}

/** The same changes with fewer records: between two of the other kind the order does not matter. */
function merged(changes: readonly UnitChange[]): UnitChange[] {
  const out: UnitChange[] = []
  for (let from = 0; from < changes.length; ) {
    const set = changes[from]?.set
    let to = from
    while (to < changes.length && changes[to]?.set === set) to++
    const group = changes.slice(from, to).sort((a, b) => a.first - b.first)
    let last: { first: number; count: number; set: boolean } | undefined
    for (const change of group) {
      const end = change.first + change.count
      if (last !== undefined && change.first <= last.first + last.count) {
        last.count = Math.max(last.count, end - last.first)
        continue
      }
      last = { ...change }
      out.push(last)
    }
    from = to
  }
  return out
}

function unknown(id: number): UserError {
  return new UserError('NOT_FOUND', `there is no mirror ${id} any more`)
}
