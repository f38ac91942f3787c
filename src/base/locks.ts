/**
 * Locks inside this process, for policies that await in the middle of a change.
 *
 * What always holds:
 *  - FIFO: a lock is never granted past somebody who has waited longer for the same key. A stream of shared holders
 *    therefore cannot starve an exclusive one, and `try...` fails while anybody waits.
 *  - A grant is made by `release`, in the same turn: between the release and the waiter's continuation the key is
 *    already taken again, so nobody slips in.
 *  - An uncontended key costs one Map entry while it is held and nothing afterwards.
 *
 * Waiters are not bounded here; each belongs to a request or a command, and those are.
 */
import { assert } from './assert.ts'

/** Value in `#holders` for an exclusive holder; shared holders are counted from 1 up. */
const EXCLUSIVE = -1
const GRANTED: Promise<void> = Promise.resolve()

interface Waiter {
  readonly exclusive: boolean
  readonly grant: () => void
  next: Waiter | undefined
}
interface Queue {
  first: Waiter
  last: Waiter
}

/** Shared/exclusive locks by number, for instance of a stripe or a format unit. Not reentrant. */
export class UnitLocks {
  readonly #holders = new Map<number, number>()
  readonly #queues = new Map<number, Queue>() // only keys with waiters

  /** How many keys are held. Every waiter waits for a held key, so 0 means idle. */
  get heldCount(): number {
    return this.#holders.size
  }

  tryShared(key: number): boolean {
    const held = this.#holders.get(key)
    if (held === EXCLUSIVE || (held !== undefined && this.#queues.has(key))) return false
    this.#holders.set(key, (held ?? 0) + 1)
    return true
  }

  tryExclusive(key: number): boolean {
    if (this.#holders.has(key)) return false
    this.#holders.set(key, EXCLUSIVE)
    return true
  }

  /** Resolves when the key is held; each call is undone by one `release`. */
  shared(key: number): Promise<void> {
    return this.tryShared(key) ? GRANTED : this.#wait(key, false)
  }

  exclusive(key: number): Promise<void> {
    return this.tryExclusive(key) ? GRANTED : this.#wait(key, true)
  }

  /** Gives up one hold, of either kind, and grants the key to those who can now have it. */
  release(key: number): void {
    const held = this.#holders.get(key)
    assert(held !== undefined, 'release of a lock that is not held')
    if (held > 1) {
      this.#holders.set(key, held - 1)
      return
    }
    const queue = this.#queues.get(key)
    if (queue === undefined) {
      this.#holders.delete(key)
      return
    }
    this.#grantFrom(key, queue)
  }

  #wait(key: number, exclusive: boolean): Promise<void> {
    return new Promise((grant) => {
      const waiter: Waiter = { exclusive, grant, next: undefined }
      const queue = this.#queues.get(key)
      if (queue === undefined) {
        this.#queues.set(key, { first: waiter, last: waiter })
      } else {
        queue.last.next = waiter
        queue.last = waiter
      }
    })
  }

  /** The key has no holder: one exclusive waiter, or every shared one up to the next exclusive one, gets it. */
  #grantFrom(key: number, queue: Queue): void {
    let waiter: Waiter | undefined = queue.first
    if (waiter.exclusive) {
      this.#holders.set(key, EXCLUSIVE)
      waiter.grant()
      waiter = waiter.next
    } else {
      let count = 0
      for (; waiter !== undefined && !waiter.exclusive; waiter = waiter.next) {
        count++
        waiter.grant()
      }
      this.#holders.set(key, count)
    }
    if (waiter === undefined) this.#queues.delete(key)
    else queue.first = waiter
  }
}

/** One at a time, in the order of the calls. */
export class Mutex {
  readonly #locks = new UnitLocks()

  get locked(): boolean {
    return this.#locks.heldCount > 0
  }

  /** Runs `action` alone; its result or its error is the caller's, and the next one runs either way. Not reentrant. */
  async run<T>(action: () => T | Promise<T>): Promise<T> {
    await this.#locks.exclusive(0)
    try {
      return await action()
    } finally {
      this.#locks.release(0)
    }
  }
}
