/**
 * Decides whether a member access may run inline (a system call on this thread) or must go through the thread
 * pool of node:fs.
 *
 * Why: a `pread` that the page cache answers takes 2 microseconds, its way through the thread pool 30. But a
 * `pread` of cold data takes as long as the disk does, and inline it would stop every connection meanwhile.
 * Nothing tells beforehand which one it will be, so each inline call is timed, reads and writes by themselves:
 *
 *   - a call is slow when it takes more than `slowMsMin` plus its bytes at `slowBytesPerMs`
 *   - each slow call adds `slowWeight` to a score, each other one takes 1 away (down to 0). One slow call alone
 *     proves nothing: the scheduler may have run somebody else
 *   - at `scoreMax` the gate closes: everything takes the thread pool for `pauseMsMin`, then inline is tried again
 *   - a gate that closes again soon after it was tried stays closed twice as long, up to `pauseMsMax`
 *
 * So cold data costs the event loop two slow calls a pause, at most about one part in fifty of its time.
 * Accesses above `inlineBytesMax` never run inline: copying them alone takes too long.
 */
const slowMsMin = 1
const slowBytesPerMs = 256 * 1024
const slowWeight = 8
const scoreMax = 16
const pauseMsMin = 100
const pauseMsMax = 1600
const inlineBytesMaxDefault = 256 * 1024

export class InlineGate {
  #score = 0
  #closedUntilMs = 0 // 0 = open
  #pauseMs = pauseMsMin
  #openedMs = 0

  readonly now: () => number // milliseconds
  readonly #inlineBytesMax: number

  /**
   * @param inlineBytesMax largest access that may run inline; 0: none, everything takes the thread pool
   * @param now a monotonic clock in milliseconds; the tests bring their own
   */
  constructor(inlineBytesMax = inlineBytesMaxDefault, now: () => number = () => performance.now()) {
    this.#inlineBytesMax = inlineBytesMax
    this.now = now
  }

  allows(bytes: number): boolean {
    if (bytes > this.#inlineBytesMax) return false
    if (this.#closedUntilMs === 0) return true
    const now = this.now()
    if (now < this.#closedUntilMs) return false
    this.#closedUntilMs = 0
    this.#openedMs = now
    this.#score = 0
    return true
  }

  /** Reports one inline call that started at `startMs` of the clock. */
  note(bytes: number, startMs: number): void {
    const now = this.now()
    if (now - startMs <= slowMsMin + bytes / slowBytesPerMs) {
      if (this.#score > 0) this.#score--
      return
    }
    this.#score += slowWeight
    if (this.#score < scoreMax) return
    const soon = now - this.#openedMs < this.#pauseMs
    this.#pauseMs = soon ? Math.min(this.#pauseMs * 2, pauseMsMax) : pauseMsMin
    this.#closedUntilMs = now + this.#pauseMs
  }
}
