import { assert } from '../base/assert.ts'
import { LIMITS } from '../base/limits.ts'
import type { ScratchSlots } from '../volume/volume.ts'

/**
 * Content of units that was saved before it was overwritten, until it is sent: in memory up to a bound, beyond it in free slots of the
 * pool. The slots are recorded nowhere: whatever becomes of this process, they are free at the next opening.
 */
export interface Saved {
  /** Once; it is forgotten then. */
  take(): Promise<Buffer>
  forget(): void
}

export class Saves {
  readonly #slots: ScratchSlots
  readonly #memoryMax: number
  #memory = 0 // bytes

  constructor(slots: ScratchSlots, memoryMax: number = LIMITS.mirrorSavedMax) {
    this.#slots = slots
    this.#memoryMax = memoryMax
  }

  /** @throws StoreError NO_SPACE, MEMBER_IO where there is neither memory nor a slot for it */
  async keep(content: Buffer): Promise<Saved> {
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
    let kept = true
    const forget = (): void => {
      if (kept) this.#slots.free(slots)
      kept = false
    }
    return {
      take: async () => {
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
}
