import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { ScratchSlots } from '../volume/volume.ts'

/**
 * Content of units that was saved before it was overwritten, until it is sent: in memory up to a bound, beyond it in free slots of the
 * pool. The slots are recorded nowhere: whatever becomes of this process, they are free at the next opening.
 *
 * Clients come first: some slots are left to them, and when they lack slots all but those that are being written or read are given back.
 * What was in them is lost then, and with it the cycle that it was saved for.
 */
export interface Saved {
  /** Once; it is forgotten then. @throws StoreError MEMBER_IO; NO_SPACE where it was lost */
  take(): Promise<Buffer>
  forget(): void
}

export class Saves {
  readonly #slots: ScratchSlots
  readonly #memoryMax: number
  #memory = 0 // bytes
  /** For each that is in slots and is not being read: gives them back. */
  readonly #inPool = new Set<() => void>()
  #lost = 0 // and not forgotten yet
  #endWanted: (() => void) | undefined

  constructor(slots: ScratchSlots, memoryMax: number = LIMITS.mirrorSavedMax) {
    this.#slots = slots
    this.#memoryMax = memoryMax
  }

  /** @throws StoreError NO_SPACE, MEMBER_IO where there is neither memory nor a slot for it */
  async keep(content: Buffer): Promise<Saved> {
    if (this.#lost > 0) throw lost()
    if (this.#memory + content.length <= this.#memoryMax) return this.#inMemory(content)
    const { stripeSize } = this.#slots
    const slots = await this.#slots.allocate(Math.ceil(content.length / stripeSize))
    try {
      for (const [index, slot] of slots.entries()) {
        await this.#slots.write(slot, content.subarray(index * stripeSize, (index + 1) * stripeSize))
      }
    } catch (error) {
      this.#slots.free(slots)
      throw error
    }
    return this.#inSlots(slots, content.length)
  }

  #inMemory(content: Buffer): Saved {
    this.#memory += content.length
    let kept = true
    const forget = (): void => {
      if (kept) this.#memory -= content.length
      kept = false
      assert(this.#memory >= 0, 'memory of saved units')
    }
    return {
      take: async () => {
        forget()
        return content
      },
      forget,
    }
  }

  #inSlots(slots: readonly number[], length: number): Saved {
    let state: 'kept' | 'lost' | 'over' = 'kept'
    const lose = (): void => {
      state = 'lost'
      this.#lost++
      this.#slots.free(slots)
    }
    const forget = (): void => {
      if (state === 'kept') this.#slots.free(slots)
      if (state === 'lost') this.#lost--
      state = 'over'
      this.#keepHere(lose)
    }
    this.#inPool.add(lose)
    this.#endWanted ??= this.#slots.whenWanted(() => this.#giveBack())
    return {
      take: async () => {
        if (state === 'lost') {
          forget()
          throw lost()
        }
        this.#keepHere(lose) // whoever got the slots would write what is read here
        const content = Buffer.allocUnsafe(length)
        const { stripeSize } = this.#slots
        try {
          for (const [index, slot] of slots.entries()) {
            await this.#slots.read(slot, content.subarray(index * stripeSize, (index + 1) * stripeSize))
          }
        } finally {
          forget()
        }
        return content
      },
      forget,
    }
  }

  #giveBack(): void {
    const givers = [...this.#inPool]
    this.#inPool.clear()
    for (const lose of givers) lose()
    this.#unwatch()
  }

  /** It is not given back any more. */
  #keepHere(lose: () => void): void {
    this.#inPool.delete(lose)
    this.#unwatch()
  }

  #unwatch(): void {
    if (this.#inPool.size > 0) return
    this.#endWanted?.()
    this.#endWanted = undefined
  }
}

function lost(): StoreError {
  return new StoreError('NO_SPACE', 'what was saved for the mirror made room for clients: the pool is full')
}
