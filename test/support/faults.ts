import { StoreError } from '../../src/base/errors.ts'
import type { Datapath } from '../../src/datapath/datapath.ts'
import { type Change, Journal } from '../../src/metadata/journal.ts'
import { type Commit, MetadataStore } from '../../src/metadata/store.ts'

/** Holds calls of one method of a real datapath, or makes them fail, so that a test can choose the moment of a race. */
type Method = 'formatUnit' | 'writePart' | 'writeSlot' | 'barrier' | 'retable' | 'sync'

export class Gate {
  /** Calls that wait here. */
  readonly held: (() => void)[] = []
  readonly #undo: () => void
  #open = false

  /** @param holds which calls are held, by their arguments; default: every one until `open` */
  constructor(datapath: Datapath, method: Method, holds: (...args: never[]) => boolean = () => true) {
    const original = datapath[method] as (...args: never[]) => Promise<void>
    const replaced = async (...args: never[]): Promise<void> => {
      if (!this.#open && holds(...args)) await new Promise<void>((resolve) => this.held.push(resolve))
      return original.apply(datapath, args)
    }
    Object.defineProperty(datapath, method, { value: replaced, configurable: true, writable: true })
    this.#undo = () =>
      Object.defineProperty(datapath, method, { value: original, configurable: true, writable: true })
  }

  /** Lets go what is held, and everything from now on. */
  open(): void {
    this.#open = true
    for (const go of this.held.splice(0)) go()
    this.#undo()
  }
}

/** Calls for which `fails` returns an error reject with it, without reaching the datapath. @returns undoes it */
export function failing(
  datapath: Datapath,
  method: Method,
  fails: (...args: never[]) => Error | undefined,
): () => void {
  const original = datapath[method] as (...args: never[]) => Promise<void>
  const replaced = async (...args: never[]): Promise<void> => {
    const error = fails(...args)
    if (error !== undefined) throw error
    return original.apply(datapath, args)
  }
  Object.defineProperty(datapath, method, { value: replaced, configurable: true, writable: true })
  return () =>
    Object.defineProperty(datapath, method, { value: original, configurable: true, writable: true })
}

/** Metadata commits fail, as on a full disk: all of them, or those that `fails` names. @returns mends it */
export function failingCommits(fails: (commit: Commit) => boolean = () => true): () => void {
  const { commit } = MetadataStore.prototype
  MetadataStore.prototype.commit = function (this: MetadataStore, what: Commit): Promise<void> {
    if (!fails(what)) return commit.call(this, what)
    return Promise.reject(new StoreError('NO_SPACE', 'metadata: commit failed: disk full'))
  }
  return () => {
    MetadataStore.prototype.commit = commit
  }
}

/** Journal frames for which `fails` returns an error are not written. @returns mends it */
export function failingAppends(fails: (changes: readonly Change[]) => StoreError | undefined): () => void {
  const { append } = Journal.prototype
  Journal.prototype.append = function (this: Journal, changes: readonly Change[]): number {
    const error = fails(changes)
    if (error !== undefined) throw error
    return append.call(this, changes)
  }
  return () => {
    Journal.prototype.append = append
  }
}

/** Metadata commits that `holds` names wait until `open`. */
export class CommitGate {
  readonly held: (() => void)[] = []
  readonly #commit = MetadataStore.prototype.commit

  constructor(holds: (commit: Commit) => boolean) {
    const { held } = this
    const commit = this.#commit
    MetadataStore.prototype.commit = async function (this: MetadataStore, what: Commit): Promise<void> {
      if (holds(what)) await new Promise<void>((resolve) => held.push(resolve))
      return commit.call(this, what)
    }
  }

  open(): void {
    MetadataStore.prototype.commit = this.#commit
    for (const go of this.held.splice(0)) go()
  }
}

/** Syncs of the journal wait until `open`. */
export class SyncGate {
  readonly held: (() => void)[] = []
  /** How many there were. */
  passed = 0
  readonly #sync = Journal.prototype.sync

  constructor() {
    const sync = this.#sync
    const wait = (): Promise<void> => {
      this.passed++
      return new Promise((resolve) => this.held.push(resolve))
    }
    Journal.prototype.sync = async function (this: Journal): Promise<void> {
      await wait()
      return sync.call(this)
    }
  }

  open(): void {
    Journal.prototype.sync = this.#sync
    for (const go of this.held.splice(0)) go()
  }
}

/** Syncs of the journal fail. @returns mends it */
export function failingSyncs(): () => void {
  const { sync } = Journal.prototype
  Journal.prototype.sync = () =>
    Promise.reject(new StoreError('MEMBER_IO', 'journal: sync failed: no such luck'))
  return () => {
    Journal.prototype.sync = sync
  }
}
