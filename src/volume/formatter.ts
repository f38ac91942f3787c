import { assert } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import type { FormatterState } from '../metadata/records.ts'

/**
 * The background formatter of a thick volume: formats what nobody has written yet. Nothing waits for it and it needs
 * no memory of where it was: the init bitmap says what is left, so it resumes after a restart, a crash, a pause.
 *
 *   idle     never started            paused   stopped by the operator
 *   running  one pass over the units  done     the pass reached the end       failed   the store failed
 */
export type FormatterStatus = FormatterState | 'failed'

const NEXT: Record<FormatterStatus, readonly FormatterStatus[]> = {
  idle: ['running'],
  running: ['paused', 'done', 'failed'],
  paused: ['running'],
  done: ['running'],
  failed: ['running'],
}

export interface FormatterInfo {
  readonly state: FormatterStatus
  readonly rate: number | null // bytes a second at most; null = no limit
  readonly done: number // format units
  readonly total: number // format units
  readonly speed: number // bytes a second, now
  readonly message?: string // why it failed
}

export interface FormatterTarget {
  readonly unitBytes: number
  unitCount(): number
  formattedUnits(): number
  /** First unformatted unit at or after `from`; unitCount() where there is none. */
  nextUnformatted(from: number): number
  /** Formats what is unformatted and idle of [unit, unit + count). */
  format(unit: number, count: number): Promise<number>
  /** State or rate changed and has to survive a restart. */
  save(state: FormatterState, rate: number | null): Promise<void>
  onEnd(state: 'done' | 'failed', message: string): void
}

/** Bytes of one step: large enough to be sequential, small enough for a pause or a client's write to get in between. */
const STEP_BYTES = 1 << 20

export class Formatter {
  readonly #target: FormatterTarget
  #state: FormatterStatus
  #rate: number | null
  #message: string | undefined
  #speed = 0
  #loop: Promise<void> | undefined
  #wake: (() => void) | undefined

  constructor(target: FormatterTarget, state: FormatterState, rate: number | null) {
    this.#target = target
    this.#state = state === 'running' ? 'idle' : state
    this.#rate = rate
  }

  info(): FormatterInfo {
    return {
      state: this.#state,
      rate: this.#rate,
      done: this.#target.formattedUnits(),
      total: this.#target.unitCount(),
      speed: this.#state === 'running' ? this.#speed : 0,
      ...(this.#message === undefined ? {} : { message: this.#message }),
    }
  }

  /** Starts, goes on, or (when it runs) takes the new rate. */
  async start(rate: number | null = this.#rate): Promise<void> {
    this.#rate = rate
    await this.#target.save('running', rate)
    if (this.#state === 'running') {
      this.#wake?.()
      return
    }
    this.resume()
  }

  /** Goes on as it is stored: after `stop`, or after an opening. */
  resume(): void {
    this.#message = undefined
    this.#enter('running')
    this.#loop = this.#run()
  }

  async pause(): Promise<void> {
    if (this.#state !== 'running') return
    this.#enter('paused')
    this.#wake?.()
    await this.#loop
    await this.#target.save('paused', this.#rate)
  }

  /** Ends the loop; what is stored still says that it runs, so `start` or the next opening goes on. */
  async stop(): Promise<void> {
    if (this.#state === 'running') this.#enter('paused')
    this.#wake?.()
    await this.#loop
  }

  #enter(next: FormatterStatus): void {
    assert(NEXT[this.#state].includes(next), `formatter: ${this.#state} -> ${next}`)
    this.#state = next
  }

  async #run(): Promise<void> {
    const unitsPerStep = Math.max(1, Math.floor(STEP_BYTES / this.#target.unitBytes))
    let due = performance.now() // when the budget allows the next step
    let at = 0
    let windowStart = performance.now()
    let windowBytes = 0
    while (this.#state === 'running') {
      at = this.#target.nextUnformatted(at)
      if (at >= this.#target.unitCount()) {
        this.#enter('done')
        this.#target.onEnd('done', `every stripe is formatted${await this.#unsaved('done')}`)
        return
      }
      let units: number
      try {
        units = await this.#target.format(at, unitsPerStep)
      } catch (error) {
        if (!(error instanceof StoreError)) throw error
        if (this.#state !== 'running') return // paused meanwhile; the next start meets the error again
        this.#message = messageOf(error)
        this.#enter('failed')
        this.#target.onEnd('failed', this.#message)
        return
      }
      at += unitsPerStep // units that a client is just writing are formatted by that write
      const bytes = units * this.#target.unitBytes
      const now = performance.now()
      windowBytes += bytes
      if (now - windowStart >= 1_000) {
        this.#speed = (windowBytes * 1_000) / (now - windowStart)
        windowStart = now
        windowBytes = 0
      }
      due = this.#rate === null ? now : Math.max(due, now - 100) + (bytes * 1_000) / this.#rate
      await this.#pauseUntil(due)
    }
  }

  /** Stores the state; where that fails, the end of a sentence that says so. The next opening then looks for itself. */
  async #unsaved(state: FormatterState): Promise<string> {
    try {
      await this.#target.save(state, this.#rate)
      return ''
    } catch (error) {
      if (!(error instanceof StoreError)) throw error
      return `, but that was not stored: ${messageOf(error)}`
    }
  }

  /** Always lets other work run; waits until `due`, or until somebody changes state or rate. */
  #pauseUntil(due: number): Promise<void> {
    const ms = due - performance.now()
    return new Promise((resolve) => {
      if (ms < 1) {
        setImmediate(resolve)
        return
      }
      const timer = setTimeout(resolve, ms)
      this.#wake = () => {
        clearTimeout(timer)
        this.#wake = undefined
        resolve()
      }
    })
  }
}
