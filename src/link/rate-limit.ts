/**
 * A rate limit that can be changed while it runs: a bucket that fills at `rate` bytes a second and holds `burst` seconds of it. Whoever takes
 * more than is there leaves it in debt, and the next waits until the debt is paid: large pieces pass whole, and the rate
 * holds over time. Turns are in the order of the calls.
 */
import { assert } from '../base/assert.ts'
import { type Clock, systemClock } from '../base/clock.ts'

const BURST_SECONDS = 0.1

/** A turn. */
export interface Taking {
  readonly granted: Promise<void>
  /** Costs nothing where it was not granted yet; `granted` resolves then, too. */
  giveUp(): void
}

const GRANTED: Taking = { granted: Promise.resolve(), giveUp: () => {} }

export class RateLimit {
  readonly #clock: Clock
  #rate: number | undefined // bytes a second; undefined: no limit
  #level = 0 // bytes that may be taken at once; below 0: debt
  #since: number
  #waiting: { bytes: number; go: () => void }[] = []
  #cancelTimer: (() => void) | undefined

  /** @param rate bytes a second; undefined for no limit */
  constructor(rate?: number, clock: Clock = systemClock) {
    this.#clock = clock
    this.#since = clock.now()
    this.set(rate)
  }

  get rate(): number | undefined {
    return this.#rate
  }

  /** From now on, also for those who wait. */
  set(rate: number | undefined): void {
    assert(rate === undefined || (rate > 0 && Number.isFinite(rate)), 'a rate is more than 0')
    this.#fill()
    this.#rate = rate
    // Debt of the time before would last too long, or be nothing, at another rate: one burst at most.
    if (rate !== undefined)
      this.#level = Math.max(-rate * BURST_SECONDS, Math.min(rate * BURST_SECONDS, this.#level))
    this.#serve()
  }

  /** @returns `granted` resolves when that many bytes may be sent; who does not want to send them any more gives up its turn */
  take(bytes: number): Taking {
    if (this.#rate === undefined) return GRANTED
    this.#fill()
    if (this.#waiting.length === 0 && this.#level > 0) {
      this.#level -= bytes
      return GRANTED
    }
    let go = (): void => {}
    const granted = new Promise<void>((resolve) => {
      go = resolve
    })
    const turn = { bytes, go }
    this.#waiting.push(turn)
    this.#plan()
    return {
      granted,
      giveUp: () => {
        const index = this.#waiting.indexOf(turn)
        if (index < 0) return
        this.#waiting.splice(index, 1)
        go()
      },
    }
  }

  #fill(): void {
    const now = this.#clock.now()
    const seconds = Math.max(0, now - this.#since) / 1000
    this.#since = now
    if (this.#rate !== undefined) {
      this.#level = Math.min(this.#rate * BURST_SECONDS, this.#level + seconds * this.#rate)
    }
  }

  #serve(): void {
    this.#fill()
    while (this.#waiting.length > 0 && (this.#rate === undefined || this.#level > 0)) {
      const next = this.#waiting.shift()
      if (next === undefined) break
      this.#level -= next.bytes
      next.go()
    }
    this.#plan()
  }

  #plan(): void {
    this.#cancelTimer?.()
    this.#cancelTimer = undefined
    if (this.#waiting.length === 0 || this.#rate === undefined) return
    // A byte more than the debt, and whole milliseconds: a timer that comes too early would only be set again.
    const ms = Math.ceil(((1 - Math.min(0, this.#level)) / this.#rate) * 1000)
    this.#cancelTimer = this.#clock.after(Math.max(1, ms), () => this.#serve())
  }
}
