/** What a mirror has done since the daemon started. */
export class Counters {
  sentBytes = 0
  units = 0
  holes = 0
  signatures = 0
  cycles = 0
  saves = 0
  forwarded = 0
}

const WINDOW_MS = 3_000

/** Bytes a second over the last seconds. */
export class Speed {
  #points: { at: number; total: number }[] = []
  #total = 0

  add(bytes: number): void {
    const at = performance.now()
    if (this.#points.length === 0) this.#points.push({ at, total: 0 })
    this.#total += bytes
    const last = this.#points[this.#points.length - 1]
    if (last === undefined || at - last.at >= 100) this.#points.push({ at, total: this.#total })
    while (this.#points.length > 2 && at - (this.#points[1]?.at ?? at) > WINDOW_MS) this.#points.shift()
  }

  now(): number {
    const first = this.#points[0]
    if (first === undefined) return 0
    const ms = performance.now() - first.at
    return ms < 1 ? 0 : ((this.#total - first.total) * 1000) / ms
  }
}
