import { Speed } from './counters.ts'
import type { MirrorProgress } from './types.ts'

/** What a mirror is busy with, for people. A comparison that was asked for runs beside everything else, and is shown first. */
export class Progress {
  #work:
    | { readonly what: MirrorProgress['what']; total: number; from: number; readonly speed: Speed }
    | undefined
  #verifying: { done: number; total: number; readonly speed: Speed } | undefined

  /** @param from bytes done, where that is not told by what is left */
  show(what: MirrorProgress['what'], from: number, total: number): void {
    const work = this.#work
    if (work !== undefined && work.what === what && what === 'comparing') {
      work.speed.add(from - work.from)
      work.from = from
      work.total = total
    } else {
      this.#work = { what, total, from, speed: new Speed() }
    }
  }

  moved(bytes: number): void {
    this.#work?.speed.add(bytes)
  }

  end(): void {
    this.#work = undefined
  }

  verified(done: number, total: number): void {
    this.#verifying ??= { done: 0, total, speed: new Speed() }
    this.#verifying.speed.add(Math.max(0, done - this.#verifying.done))
    this.#verifying.done = done
    this.#verifying.total = total
  }

  endVerifying(): void {
    this.#verifying = undefined
  }

  /** @param left bytes of the cycle under way that the secondary does not have yet */
  now(left: number): MirrorProgress | null {
    if (this.#verifying !== undefined) {
      const { done, total, speed } = this.#verifying
      return line('verifying', done, total, speed)
    }
    if (this.#work === undefined) return null
    const { what, total, speed, from } = this.#work
    return line(what, what === 'comparing' ? from : Math.max(0, total - left), total, speed)
  }
}

function line(what: MirrorProgress['what'], done: number, total: number, speed: Speed): MirrorProgress {
  const now = speed.now()
  const remainingMs = now > 0 ? (Math.max(0, total - done) * 1000) / now : null
  return { what, done: Math.min(done, total), total, speed: now, remainingMs }
}
