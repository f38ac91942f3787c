/** Time as a dependency, so that tests and simulations can have their own. Milliseconds from any moment on; never goes back. */
export interface Clock {
  now(): number
  /** Calls once, after `ms` or more. @returns takes the call back; harmless after it was made */
  after(ms: number, call: () => void): () => void
}

/** Monotonic, so setting the machine's clock changes nothing. Timers keep no process alive that has nothing else to do. */
export const systemClock: Clock = {
  now: () => performance.now(),
  after(ms, call) {
    const timer = setTimeout(call, ms)
    timer.unref()
    return () => clearTimeout(timer)
  },
}
