import type { Datapath } from '../datapath/datapath.ts'
import type { SlotOwner } from '../stripe/allocator.ts'

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

/** A run of slots, and whose they were: a thin volume's become free, a thick one's reservation ends. */
export interface FreedRun {
  readonly slot: number
  readonly count: number
  readonly owner: SlotOwner
}

interface Freed extends FreedRun {
  readonly sequence: number
}

/** Freed slots are made durable at the latest after this, even where no client flushes. */
const FLUSH_AFTER_MS = 1_000

export class Reclaimer {
  readonly #host: ReclaimerHost
  #waiting: Freed[] = [] // in order of sequence
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
  freeLater(runs: readonly FreedRun[], sequence: number): void {
    // They queue behind those that wait already, so the last one waits for the most: `reclaim` flushes for it.
    this.#lastSequence = Math.max(this.#lastSequence, sequence)
    for (const run of runs) {
      this.#waiting.push({ ...run, sequence: this.#lastSequence })
      this.#pendingSlots += run.count
    }
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
    const last = this.#waiting[this.#waiting.length - 1]
    if (last !== undefined && last.sequence > this.#durable) await this.#host.flush()
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
    const first = this.#waiting[0]
    return first !== undefined && first.sequence <= this.#durable
  }

  async #run(): Promise<void> {
    while (this.#anyReady) {
      const notReady = this.#waiting.findIndex((freed) => freed.sequence > this.#durable)
      const batch = this.#waiting.splice(0, notReady < 0 ? this.#waiting.length : notReady)
      await this.#host.datapath.barrier()
      for (const run of joined(batch)) {
        if (this.#punchWorks) {
          try {
            this.#punchWorks = await this.#host.datapath.punch(run.slot, run.count)
          } catch (error) {
            // The slots are good all the same; only the file system does not get its space back.
            this.#punchWorks = false
            this.#host.onTrouble(`space is not given back to the file system: ${String(error)}`)
          }
        }
        this.#host.free(run.slot, run.count, run.owner)
        this.#pendingSlots -= run.count
      }
    }
    // In the turn in which nothing was ready: what becomes ready in the next one starts another run.
    this.#running = undefined
  }
}

/** Neighbouring runs as one, so that a large trim is given back in few calls. */
function joined(batch: readonly Freed[]): FreedRun[] {
  const runs: { slot: number; count: number; owner: SlotOwner }[] = []
  for (const { slot, count, owner } of [...batch].sort((a, b) => a.slot - b.slot)) {
    const last = runs[runs.length - 1]
    if (last !== undefined && last.owner === owner && last.slot + last.count === slot) last.count += count
    else runs.push({ slot, count, owner })
  }
  return runs
}
