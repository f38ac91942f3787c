import type { Upcall } from '../datapath/datapath.ts'

/**
 * Whoever has to know of every change of a volume before it is made: a mirror. The volume's content changes only by requests
 * (writes, trims, zeroes of clients, or of a primary on its secondary), each cut into parts of one format unit. What the background formatter
 * does is no change: a stripe reads the same before and after it.
 *
 * Concurrency rules:
 *  1. `prepare` is called for each part before anything of it goes to a member, and again after each wait; between its return
 *     of undefined and the change nothing is awaited that `Volume.quiesce` would not wait for, too.
 *  2. Writes go in place with no decision only where every watcher's `mayOpen` says so. A watcher that changes its mind clears the direct
 *     bits and waits for a barrier first: `Volume.quiesce` does both.
 */
export interface ChangeWatcher {
  /**
   * The format unit is about to change. @returns undefined: it is noted, go on; else wait for that, and ask again
   * @throws StoreError (the promise) the change is refused with it
   */
  prepare(unit: number): Promise<void> | undefined
  /** Whether writes to the unit may go in place with no decision. */
  mayOpen(unit: number): boolean
  /** Whether requests go to `forward`. Changes only while the volume is quiet. */
  readonly forwards: boolean
  /**
   * [offset, offset + length) of a request, in one format unit, is about to be done here, and its intent is durable. No other request that
   * overlaps is begun before this one is answered. Called while the payload can be read.
   */
  forward(upcall: Upcall, offset: number, length: number): Forwarding | undefined
  /** The request of that `forward` failed on this side: the sides may differ there. */
  failedHere(upcall: Upcall): void
  /** What was forwarded and answered before becomes durable there, too. */
  flush(): Promise<void> | undefined
  /**
   * Whether the range's intent is needed although no request is under way: what was noted of it is not recorded yet, or the other side may
   * lose it.
   */
  needsIntent(offset: number, length: number): boolean
  /** Resolves when that is over for what was noted before. @throws StoreError what was noted cannot be recorded */
  settle(): Promise<void>
  /** The volume's size is about to change: resolves when nothing of the watcher's is under way. Then comes `sizeChanged`, in any case. */
  sizeChanges(): Promise<void>
  sizeChanged(): void
}

/** What is done elsewhere at the same time. */
export interface Forwarding {
  /** The request is answered when this has resolved, too. */
  readonly answered: Promise<void>
  /** Resolves when both sides will have it whatever happens, or it counts as changed: the intent need not be kept for it any longer. */
  readonly known: Promise<void>
}

export class Watchers {
  readonly #watchers = new Set<ChangeWatcher>()

  get size(): number {
    return this.#watchers.size
  }

  add(watcher: ChangeWatcher): void {
    this.#watchers.add(watcher)
  }

  delete(watcher: ChangeWatcher): void {
    this.#watchers.delete(watcher)
  }

  mayOpen(unit: number): boolean {
    for (const watcher of this.#watchers) if (!watcher.mayOpen(unit)) return false
    return true
  }

  prepare(unit: number): Promise<unknown> | undefined {
    let waits: Promise<void>[] | undefined
    for (const watcher of this.#watchers) {
      const wait = watcher.prepare(unit)
      if (wait === undefined) continue
      waits ??= []
      waits.push(wait)
    }
    return waits === undefined ? undefined : Promise.all(waits)
  }

  get forwards(): boolean {
    for (const watcher of this.#watchers) if (watcher.forwards) return true
    return false
  }

  forward(upcall: Upcall, offset: number, length: number): Forwarding[] {
    const all: Forwarding[] = []
    for (const watcher of this.#watchers) {
      const forwarding = watcher.forwards ? watcher.forward(upcall, offset, length) : undefined
      if (forwarding !== undefined) all.push(forwarding)
    }
    return all
  }

  needsIntent(offset: number, length: number): boolean {
    for (const watcher of this.#watchers) if (watcher.needsIntent(offset, length)) return true
    return false
  }

  async settle(): Promise<void> {
    await Promise.all([...this.#watchers].map((watcher) => watcher.settle()))
  }

  failedHere(upcall: Upcall): void {
    for (const watcher of this.#watchers) watcher.failedHere(upcall)
  }

  async sizeChanges(): Promise<void> {
    await Promise.all([...this.#watchers].map((watcher) => watcher.sizeChanges()))
  }

  sizeChanged(): void {
    for (const watcher of this.#watchers) watcher.sizeChanged()
  }

  flush(): Promise<void>[] {
    const waits: Promise<void>[] = []
    for (const watcher of this.#watchers) {
      const wait = watcher.flush()
      if (wait !== undefined) waits.push(wait)
    }
    return waits
  }
}
