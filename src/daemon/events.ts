/**
 * The events of a pool, kept in a ring: the newest `capacity` of them, numbered from 1 without gaps.
 *
 * A follower holds nothing but the number of the event it wants next, so a slow one costs no memory: when the
 * ring has moved past it, it is told how many it missed and goes on with the oldest one that is left.
 */
import { assert } from '../base/assert.ts'
import type { PoolEvent } from '../volume/pool.ts'

export interface EventRecord extends PoolEvent {
  readonly sequence: number
}

export interface EventPage {
  readonly events: readonly EventRecord[]
  readonly missed: number // events between what was asked for and the first one here that are gone
  readonly next: number // ask for `since` = this to get what follows
}

export class EventLog {
  readonly #ring: EventRecord[] = []
  readonly #capacity: number
  readonly #waiting = new Set<() => void>()
  #next = 1 // number of the event that comes next
  #closed = false

  constructor(capacity: number) {
    assert(Number.isInteger(capacity) && capacity > 0, 'event ring capacity')
    this.#capacity = capacity
  }

  /** The number that the next event will get. */
  get next(): number {
    return this.#next
  }

  append(event: PoolEvent): EventRecord {
    const record: EventRecord = { sequence: this.#next, ...event }
    this.#ring[(this.#next - 1) % this.#capacity] = record
    this.#next++
    assert(this.#ring.length <= this.#capacity, 'event ring bound')
    this.#wake()
    return record
  }

  /**
   * Events numbered `since` and later, at most `limit` of them. A number that was never given (it comes from an
   * earlier daemon, which counted on its own) stands for "what comes next".
   */
  page(since: number, limit: number): EventPage {
    const oldest = Math.max(1, this.#next - this.#capacity)
    const first = Math.min(Math.max(since, oldest), this.#next)
    const end = Math.min(this.#next, first + limit)
    const events: EventRecord[] = []
    for (let sequence = first; sequence < end; sequence++) {
      const record = this.#ring[(sequence - 1) % this.#capacity]
      assert(record?.sequence === sequence, 'event ring position')
      events.push(record)
    }
    return { events, missed: Math.max(0, first - Math.max(1, since)), next: end }
  }

  /** Resolves when an event numbered `since` or later exists, the log is closed or the signal fires. */
  async wait(since: number, signal: AbortSignal): Promise<void> {
    while (this.#next <= since && !this.#closed && !signal.aborted) {
      await new Promise<void>((resolve) => {
        const wake = () => {
          this.#waiting.delete(wake)
          signal.removeEventListener('abort', wake)
          resolve()
        }
        this.#waiting.add(wake)
        signal.addEventListener('abort', wake)
      })
    }
  }

  /** Pages from `since` on, as they come, until the log is closed or the signal fires. */
  async *follow(since: number, signal: AbortSignal, limit = 100): AsyncGenerator<EventPage> {
    for (let next = since; ; ) {
      if (signal.aborted) return
      const page = this.page(next, limit)
      next = page.next
      if (page.events.length > 0) {
        yield page
        continue
      }
      if (this.#closed) return
      await this.wait(next, signal)
    }
  }

  /** Ends all followers once they have read what is there. */
  close(): void {
    this.#closed = true
    this.#wake()
  }

  #wake(): void {
    for (const wake of [...this.#waiting]) wake()
  }
}
