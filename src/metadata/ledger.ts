import { assert } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Rounds } from '../base/rounds.ts'
import type { Change, Journal } from './journal.ts'
import type { MetadataPage } from './records.ts'
import type { Commit, TransactionalStore } from './store.ts'

/**
 * The ledger orders what becomes durable when: members, journal, LMDB.
 *
 *   record      journal frame in the page cache            before the first write it describes is answered
 *   flush       members synced, mark in the journal, journal synced     before FLUSH or FUA is answered
 *   harden      journal synced                             before the change is begun that an intent announces
 *   checkpoint  members synced, dirty pages in one LMDB transaction     when the journal or the dirty set grows
 *
 * Rules:
 *  1. `record` comes after the data it speaks of was written to the members. So a sync of the members that begins
 *     after a frame was appended covers that frame's data, and only such a sync allows a mark or a checkpoint over it.
 *  2. Pages are copied in the same turn in which the sequence is read: a checkpoint holds exactly the frames up to it.
 *  3. One flush runs at a time. Callers that arrive while it runs share the next: the running one may have begun
 *     before their writes were answered.
 *  4. After a failed sync nothing is known about what the kernel dropped: the ledger fails for good, every later
 *     flush, record and commit is refused, and nothing is promised that may not be there. A sync is not tried again, because
 *     the second one would succeed without having written anything; and the syncs of flushes and checkpoints never overlap,
 *     because the kernel tells an error to one of them only. The journal is told, so that a restart counts as a
 *     power cut (journal.ts). An I/O error of LMDB, of a mark, or of a frame that cannot be taken back, fails the ledger too,
 *     because nobody knows what is stored; but the page cache of members and journal is as good as ever, and a restart finds every
 *     answered write there. Where LMDB just has no room, the commit is tried again.
 */

/** The tables whose changes the ledger makes durable. */
export interface PageSource {
  dirtyPages(): number
  /** Copies of all dirty pages, which are clean from then on. */
  takeDirtyPages(): MetadataPage[]
  /** A commit failed: these are dirty again. */
  returnDirtyPages(pages: readonly MetadataPage[]): void
}

export interface LedgerOptions {
  readonly journal: Journal
  readonly store: TransactionalStore
  readonly source: PageSource
  readonly syncMembers: () => Promise<void>
  /** A checkpoint failed and will be tried again; or the ledger failed for good. */
  readonly onTrouble: (kind: 'checkpoint' | 'sync', message: string) => void
  /** Called when everything up to `sequence` is durable. */
  readonly onDurable: (sequence: number) => void
}

/** Dirty pages that ask for a checkpoint, and the most there may be. */
const DIRTY_PAGES_SOFT = 1024
const DIRTY_PAGES_HARD = 8192
const RETRY_MS = 1_000

interface Waiting {
  readonly changes: readonly Change[]
  readonly apply: (sequence: number) => void
  readonly resolve: (sequence: number) => void
  readonly reject: (error: unknown) => void
}

export class Ledger {
  readonly #options: LedgerOptions
  #durable: number // sequence
  #queued: Waiting[] = []
  readonly #flushes = new Rounds(() => this.#flushOnce())
  readonly #memberSyncs = new Rounds(() => this.#syncMembers())
  #syncsBegun = 0
  #lastSync = 0
  #checkpointing: Promise<void> | undefined
  #failure: StoreError | undefined
  #checkpointFailed = false
  #retryAt = 0 // of performance.now()
  #timer: NodeJS.Timeout
  #closed = false

  constructor(options: LedgerOptions) {
    this.#options = options
    this.#durable = options.journal.lastSequence
    this.#timer = setInterval(() => this.#tick(), Math.min(LIMITS.checkpointMsMax, RETRY_MS))
    this.#timer.unref()
  }

  get durableSequence(): number {
    return this.#durable
  }

  /** Why nothing is taken any more; undefined while all is well. */
  get failure(): StoreError | undefined {
    return this.#failure
  }

  /** Syncs of the members, counted as they begin. */
  get syncsBegun(): number {
    return this.#syncsBegun
  }

  /** The latest of them that made everything before it durable, changes of maps included. */
  get lastSync(): number {
    return this.#lastSync
  }

  /**
   * Records changes; resolves with their sequence when they survive the death of this process. Changes recorded in
   * one turn share a frame. Waits for a checkpoint where the journal or the dirty set is full.
   * @param apply makes the same changes in the tables, at once after the frame was written (rule 2: a checkpoint
   * must never see a sequence without its changes)
   * @throws StoreError NO_SPACE when metadata cannot be written at present, MEMBER_IO after a failure for good
   */
  record(changes: readonly Change[], apply: (sequence: number) => void): Promise<number> {
    return new Promise((resolve, reject) => {
      if (this.#queued.push({ changes, apply, resolve, reject }) === 1) queueMicrotask(() => this.#drain())
    })
  }

  /** Everything that was written and recorded before the call is durable when it resolves. */
  flush(): Promise<void> {
    return this.#flushes.run()
  }

  /** The records made before the call are durable when it resolves, whatever becomes of the data: for bits, which have none. */
  async harden(): Promise<void> {
    this.#throwIfFailed()
    try {
      await this.#options.journal.sync()
    } catch (error) {
      throw this.#failSync(error)
    }
    this.#throwIfFailed()
  }

  /** A transaction of the catalog alone. @throws StoreError */
  async commit(commit: Commit): Promise<void> {
    this.#throwIfFailed()
    try {
      await this.#options.store.commit(commit)
    } catch (error) {
      throw isIoError(error) ? this.#fail(error) : error
    }
  }

  /** Moves everything into LMDB. */
  async checkpoint(): Promise<void> {
    this.#checkpointing ??= this.#run(this.#checkpointOnce(undefined, undefined))
    await this.#checkpointing
  }

  /**
   * A checkpoint that stores catalog records in the same transaction.
   * @param prepare changes tables and returns the records; called in the turn in which the dirty pages are copied
   * @param undo takes that back where the transaction failed; called before any other checkpoint can begin
   */
  async checkpointWith(prepare: () => Commit, undo: () => void = () => {}): Promise<void> {
    while (this.#checkpointing !== undefined) await this.#checkpointing.catch(() => {})
    this.#checkpointing = this.#run(this.#checkpointOnce(prepare, undo))
    await this.#checkpointing
  }

  /**
   * Flush, checkpoint, stop. The journal is empty afterwards, so the next opening has nothing to replay. Nothing of the ledger
   * touches a file after it has settled.
   * @throws StoreError where the checkpoint failed, or the ledger before it; what LMDB lacks is still in the journal
   */
  async close(): Promise<void> {
    this.#closed = true
    clearInterval(this.#timer)
    await this.#flushes.idle()
    while (this.#checkpointing !== undefined) await Promise.allSettled([this.#checkpointing])
    // Flushed first: what was written in place is no change of a map, so the checkpoint may find nothing to do.
    if (this.#failure === undefined) await this.flush()
    this.#throwIfFailed()
    await this.checkpoint()
    this.#failure ??= new StoreError('SHUTTING_DOWN', 'the pool is closed')
  }

  async #run(checkpoint: Promise<void>): Promise<void> {
    try {
      await checkpoint
    } finally {
      this.#checkpointing = undefined
      // In a turn of its own: an assertion that fails there is nobody's rejected promise, but stops the process.
      queueMicrotask(() => this.#drain())
    }
  }

  async #flushOnce(): Promise<void> {
    this.#throwIfFailed()
    const { journal } = this.#options
    const covered = journal.lastChangeSequence // rule 1: read before the sync begins
    const sync = ++this.#syncsBegun
    await this.#memberSyncs.run()
    if (covered > this.#durable) {
      try {
        journal.mark(covered)
      } catch (error) {
        throw this.#fail(error)
      }
      await this.harden()
    }
    this.#throwIfFailed()
    this.#lastSync = Math.max(this.#lastSync, sync)
    this.#becameDurable(covered)
  }

  async #checkpointOnce(prepare: (() => Commit) | undefined, undo: (() => void) | undefined): Promise<void> {
    this.#throwIfFailed()
    const { journal, store, source } = this.#options
    const sequence = journal.lastSequence // rule 2: no await between these lines
    const extra = prepare?.() ?? {}
    const pages = source.takeDirtyPages()
    if (prepare === undefined && pages.length === 0 && sequence === store.checkpoint()) return
    const sync = ++this.#syncsBegun
    try {
      await this.#memberSyncs.run()
      await store.commit({ ...extra, pages: [...pages, ...(extra.pages ?? [])], sequence })
    } catch (error) {
      source.returnDirtyPages(pages)
      undo?.()
      if (isIoError(error)) throw this.#fail(error)
      this.#retryAt = performance.now() + RETRY_MS
      if (!this.#checkpointFailed) this.#options.onTrouble('checkpoint', messageOf(error))
      this.#checkpointFailed = true
      throw error
    }
    this.#checkpointFailed = false
    this.#lastSync = Math.max(this.#lastSync, sync)
    journal.checkpointed(sequence)
    this.#becameDurable(sequence)
  }

  #drain(): void {
    while (this.#queued.length > 0) {
      if (this.#failure !== undefined) {
        this.#rejectQueued(this.#failure)
        return
      }
      // As many as fit one frame; a frame is bounded by what a request can change.
      const batch: Waiting[] = []
      const changes: Change[] = []
      for (const waiting of this.#queued) {
        if (batch.length > 0 && changes.length + waiting.changes.length > 4096) break
        batch.push(waiting)
        changes.push(...waiting.changes)
      }
      const { journal, source } = this.#options
      if (!journal.hasRoom(changes.length) || source.dirtyPages() > DIRTY_PAGES_HARD) {
        if (this.#checkpointFailed && performance.now() < this.#retryAt) {
          this.#rejectQueued(
            new StoreError('NO_SPACE', 'metadata: the journal is full and LMDB takes no commit'),
          )
          return
        }
        // Rejections are handled there: the queue is looked at again either way.
        this.checkpoint().catch(() => {})
        return
      }
      this.#queued.splice(0, batch.length)
      let sequence: number
      try {
        sequence = journal.append(changes)
      } catch (error) {
        // In this turn, before anybody acts as if the frame were not there (journal.ts, rule 6).
        if (journal.failure !== undefined) this.#fail(error)
        for (const waiting of batch) waiting.reject(error)
        continue
      }
      for (const waiting of batch) waiting.apply(sequence)
      for (const waiting of batch) waiting.resolve(sequence)
      if (journal.wantsCheckpoint || source.dirtyPages() > DIRTY_PAGES_SOFT) this.#wantCheckpoint()
    }
  }

  #wantCheckpoint(): void {
    if (this.#checkpointing !== undefined || performance.now() < this.#retryAt || this.#closed) return
    this.checkpoint().catch(() => {}) // reported through onTrouble
  }

  #tick(): void {
    if (this.#failure !== undefined || this.#options.source.dirtyPages() === 0) return
    this.#wantCheckpoint()
  }

  #rejectQueued(error: StoreError): void {
    for (const waiting of this.#queued.splice(0)) waiting.reject(error)
  }

  #becameDurable(sequence: number): void {
    if (sequence <= this.#durable) return
    this.#durable = sequence
    assert(this.#durable <= this.#options.journal.lastSequence) // never promise what was not recorded
    this.#options.onDurable(sequence)
  }

  async #syncMembers(): Promise<void> {
    this.#throwIfFailed()
    try {
      await this.#options.syncMembers()
    } catch (error) {
      throw this.#failSync(error)
    }
  }

  /** After a failed sync of members or journal; also where the ledger has failed already, of something else. */
  #failSync(error: unknown): StoreError {
    let untold = ''
    try {
      this.#options.journal.distrust()
    } catch (why) {
      if (!(why instanceof StoreError)) throw why
      untold = ` (and the journal could not be told: ${messageOf(why)})`
    }
    return this.#fail(error, untold)
  }

  #fail(error: unknown, untold = ''): StoreError {
    if (this.#failure !== undefined) return this.#failure
    const failure = new StoreError('MEMBER_IO', `the pool takes no changes any more: ${messageOf(error)}`, {
      cause: error,
    })
    this.#failure = failure
    this.#options.onTrouble('sync', messageOf(error) + untold)
    return failure
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure
  }
}

function isIoError(error: unknown): boolean {
  return error instanceof StoreError && error.code === 'MEMBER_IO'
}
