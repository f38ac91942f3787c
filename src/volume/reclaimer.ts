import type { Datapath } from '../datapath/datapath.ts'
import type { SlotOwner } from '../stripe/allocator.ts'
import { type FreedRun, FreedRuns } from './freed-runs.ts'

/**
 * Slots whose owner is gone wait here before they are handed out again (DESIGN invariant 3):
 *
 *   freed at sequence s -> everything up to s durable -> barrier: no read still uses them -> space given back -> free
 *
 * Before s is durable a power cut could bring the old owner back; before the barrier a read that began in time could
 * see what the next owner writes. The space is given back before the slots are free, never after: a late punch
 * would hit the next owner's data.
 */
export interface ReclaimerHost {
  readonly datapath: Pick<Datapath, 'barrier' | 'punch'>
  free(slot: number, count: number, owner: SlotOwner): void
  /** Makes everything recorded so far durable. */
  flush(): Promise<void>
  onTrouble(message: string): void
}

/** Freed slots are made durable at the latest after this, even where no client flushes. */
const FLUSH_AFTER_MS = 1_000
/** So many runs are sorted at a time, and of these so many freed before others get a turn. */
const RUNS_SORTED_MAX = 1 << 20
const RUNS_PER_TURN_MAX = 4096

export class Reclaimer {
  readonly #host: ReclaimerHost
  readonly #waiting = new FreedRuns()
  #lastSequence = 0 // the highest that ever waited
  #durable: number
  #running: Promise<void> | undefined // while there is something to free, and not a moment longer
  #timer: NodeJS.Timeout | undefined
  #pendingSlots = 0
  #punchWorks = true

  constructor(host: ReclaimerHost, durable: number) {
    this.#host = host
    this.#durable = durable
  }

  /** Slots freed and not yet free. */
  get pendingSlots(): number {
    return this.#pendingSlots
  }

  /** @param sequence of the record that freed them; 0 where that is durable already */
  freeLater(runs: Iterable<FreedRun>, sequence: number): void {
    // They queue behind those that wait already, so the last one waits for the most: `reclaim` flushes for it.
    this.#lastSequence = Math.max(this.#lastSequence, sequence)
    this.#pendingSlots += this.#waiting.add(runs, this.#lastSequence)
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined
      if (this.#waiting.length > 0) this.reclaim().catch(() => {}) // reported by the ledger
    }, FLUSH_AFTER_MS).unref()
  }

  onDurable(sequence: number): void {
    this.#durable = Math.max(this.#durable, sequence)
    this.#start()
  }

  /** Resolves when every slot that was pending at the call is free. */
  async reclaim(): Promise<void> {
    if (this.#waiting.length > 0 && this.#lastSequence > this.#durable) await this.#host.flush()
    this.#start()
    await this.#running
  }

  async close(): Promise<void> {
    clearTimeout(this.#timer)
    await this.#running
  }

  #start(): void {
    if (this.#running !== undefined || !this.#anyReady) return
    this.#running = this.#run()
  }

  get #anyReady(): boolean {
    return this.#waiting.until(this.#durable) > 0
  }

  async #run(): Promise<void> {
    let turn = 0
    while (this.#anyReady) {
      let ready = this.#waiting.until(this.#durable) // what comes from here on waits for the next barrier
      await this.#host.datapath.barrier()
      while (ready > 0) {
        const count = Math.min(ready, RUNS_SORTED_MAX)
        ready -= count
        for (const run of this.#waiting.take(count)) {
          await this.#punch(run)
          this.#host.free(run.slot, run.count, run.owner)
          this.#pendingSlots -= run.count
          if (++turn % RUNS_PER_TURN_MAX === 0) await new Promise(setImmediate)
        }
      }
    }
    // In the turn in which nothing was ready: what becomes ready in the next one starts another run.
    this.#running = undefined
  }

  async #punch({ slot, count }: FreedRun): Promise<void> {
    if (!this.#punchWorks) return
    try {
      this.#punchWorks = await this.#host.datapath.punch(slot, count)
    } catch (error) {
      // The slots are good all the same; only the file system does not get its space back.
      this.#punchWorks = false
      this.#host.onTrouble(`space is not given back to the file system: ${String(error)}`)
    }
  }
}
