/**
 * An action that callers share, one run at a time: whoever calls while it runs gets the next run, together with all others that
 * do, because the one under way may have begun before what the caller wants it to cover. A sync is the example.
 */
export class Rounds {
  readonly #action: () => Promise<void>
  #running: Promise<void> | undefined
  #next: Promise<void> | undefined

  constructor(action: () => Promise<void>) {
    this.#action = action
  }

  /** Resolves or rejects as a run does that begins after the call. */
  run(): Promise<void> {
    if (this.#running === undefined) {
      const running = this.#action()
      this.#running = running
      const ended = (): void => {
        this.#running = undefined
      }
      running.then(ended, ended)
      return running
    }
    const next = (): Promise<void> => {
      this.#next = undefined
      return this.run()
    }
    this.#next ??= this.#running.then(next, next)
    return this.#next
  }

  /** Resolves when nothing runs and nothing is about to. */
  async idle(): Promise<void> {
    while (this.#running !== undefined || this.#next !== undefined) {
      await Promise.allSettled([this.#running, this.#next])
    }
  }
}
