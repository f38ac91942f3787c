import { SECTOR } from '../support/sector-data.ts'
import { History } from './history.ts'

/**
 * What a secondary may hold: the history of its primary's volume, kept whole.
 *
 * Every change begins when it is sent and ends when it is answered. A *cut* is a moment: what was answered before it is in, what was sent
 * after it is not, and what was under way may be either, but for all sectors the same moment. Of two changes of a sector that follow
 * each other only the second may be found where it is in. So each sector allows some intervals of moments, and an image of a
 * volume is a point in time where one moment is allowed by all.
 */
interface Change {
  readonly token: bigint
  readonly begin: number
  end: number // of the answer, or the death of whoever would have answered; Infinity until then
  durable: number // when it was promised to survive a power cut
}

interface Interval {
  readonly from: number // after
  readonly to: number // before
}

const NEVER = Number.POSITIVE_INFINITY

export class Timeline {
  readonly #sectors: Change[][]
  readonly #initial: bigint
  readonly #flushes: { sent: number; answered: number }[] = []
  #open = new Set<Change>()
  #clock = 0

  constructor(size: number, fill: number) {
    this.#initial = BigInt(`0x${Buffer.alloc(8, fill).toString('hex')}`)
    const first: Change = { token: this.#initial, begin: 0, end: 0, durable: 0 }
    this.#sectors = Array.from({ length: size / SECTOR }, () => [first])
  }

  /** Moments count up with everything that happens. */
  now(): number {
    return ++this.#clock
  }

  begin(offset: number, length: number, token: bigint): (durable: boolean) => void {
    const change: Change = { token, begin: this.now(), end: NEVER, durable: NEVER }
    this.#open.add(change)
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
      this.#sectors[sector]?.push(change)
    }
    return (durable) => {
      if (!this.#open.delete(change)) return
      change.end = this.now()
      if (durable) change.durable = change.end
    }
  }

  flush(): () => void {
    const flush = { sent: this.now(), answered: NEVER }
    this.#flushes.push(flush)
    return () => {
      flush.answered = this.now()
    }
  }

  /** The primary was restarted, and holds this now: what was under way has happened by now, or never. */
  found(content: Buffer): void {
    const at = this.now()
    for (const change of this.#open) change.end = at
    this.#open = new Set()
    const found = this.now()
    const changes = new Map<bigint, Change>()
    for (let sector = 0; sector < content.length / SECTOR; sector++) {
      const token = content.readBigUInt64LE(sector * SECTOR)
      const change = changes.get(token) ?? { token, begin: found, end: found, durable: found }
      changes.set(token, change)
      this.#sectors[sector]?.push(change)
    }
  }

  /**
   * @param from the cut is not before that
   * @returns when it is, at the earliest; or what is wrong
   */
  cutOf(content: Buffer, from: number): number | string {
    let allowed: Interval[] = [{ from, to: NEVER }]
    for (let sector = 0; sector < content.length / SECTOR; sector++) {
      const token = tokenAt(content, sector, this.#initial)
      const own = this.#momentsOf(sector, token)
      if (own.length === 0)
        return `sector ${sector} holds ${token}, which nobody wrote; ${this.#story(sector)}`
      const next = intersect(allowed, own)
      if (next.length === 0) {
        return (
          `no moment of the primary: sector ${sector} holds ${token}, of ${tell(own)}, ` +
          `and the sectors before it allow ${tell(allowed)}; ${this.#story(sector)}`
        )
      }
      allowed = next
    }
    return allowed[0]?.from ?? from
  }

  /**
   * The image of a secondary that did every request together with its primary from `from` on, when both were durably equal, until `to`;
   * from then to `reach` it may have done some.
   * @param survived what happened to it since: its kernel runs on, or not
   */
  followed(content: Buffer, from: number, to: number, reach: number, survived: boolean): string | undefined {
    for (let sector = 0; sector < content.length / SECTOR; sector++) {
      const token = tokenAt(content, sector, this.#initial)
      const changes = this.#sectors[sector] ?? []
      const kept = (change: Change): boolean =>
        change.end < from || (survived ? change.end : Math.min(change.durable, this.#flushedAt(change))) < to
      const may = changes.filter(
        (each) => each.begin < reach && !changes.some((by) => by.begin > each.end && kept(by)),
      )
      if (may.some((each) => each.token === token)) continue
      return `sector ${sector} holds ${token} in step with the primary until ${to}; ${this.#story(sector)}`
    }
    return undefined
  }

  #flushedAt({ end }: Change): number {
    let at = NEVER
    for (const { sent, answered } of this.#flushes) if (sent > end) at = Math.min(at, answered)
    return at
  }

  #momentsOf(sector: number, token: bigint): Interval[] {
    const changes = this.#sectors[sector] ?? []
    const moments: Interval[] = []
    for (const { token: own, begin, end } of changes) {
      if (own !== token) continue
      let to = NEVER
      for (const by of changes) if (by.begin > end) to = Math.min(to, by.end)
      moments.push({ from: begin, to })
    }
    return union(moments)
  }

  #story(sector: number): string {
    const told = (this.#sectors[sector] ?? []).map(({ token, begin, end }) => `${token}@${begin}..${end}`)
    return `of ${told.join(', ')}`
  }
}

/** The history of a primary's volume, and its timeline. */
export class MirroredHistory extends History {
  readonly timeline: Timeline

  constructor(size: number, fill: number) {
    super(size, fill)
    this.timeline = new Timeline(size, fill)
  }

  override write(
    offset: number,
    length: number,
    token: bigint,
  ): { data: Buffer; answered: (durable: boolean) => void } {
    const { data, answered } = super.write(offset, length, token)
    return { data, answered: both(answered, this.timeline.begin(offset, length, token)) }
  }

  override zero(offset: number, length: number): (durable: boolean) => void {
    return both(super.zero(offset, length), this.timeline.begin(offset, length, 0n))
  }

  override flush(): () => void {
    const answered = super.flush()
    const told = this.timeline.flush()
    return () => {
      answered()
      told()
    }
  }

  override replaced(content: Buffer): void {
    super.replaced(content)
    this.timeline.found(content)
  }

  override restarted(...given: Parameters<History['restarted']>): string | undefined {
    const problem = super.restarted(...given)
    if (problem === undefined) this.timeline.found(given[0])
    return problem
  }
}

function both<T>(one: (given: T) => void, two: (given: T) => void): (given: T) => void {
  return (given) => {
    one(given)
    two(given)
  }
}

/** A number that nobody wrote where the words of the sector do not tell the same. */
function tokenAt(content: Buffer, sector: number, initial: bigint): bigint {
  const at = sector * SECTOR
  const token = content.readBigUInt64LE(at)
  const place = content.readBigUInt64LE(at + 8)
  const same = content.compare(content, at, at + SECTOR - 16, at + 16, at + SECTOR) === 0
  return same && place === (token === 0n || token === initial ? token : BigInt(sector))
    ? token
    : -(token + 1n)
}

function union(intervals: Interval[]): Interval[] {
  const merged: Interval[] = []
  for (const next of intervals.sort((a, b) => a.from - b.from)) {
    const last = merged[merged.length - 1]
    if (last === undefined || next.from >= last.to) merged.push(next)
    else if (next.to > last.to) merged[merged.length - 1] = { from: last.from, to: next.to }
  }
  return merged
}

function intersect(some: readonly Interval[], others: readonly Interval[]): Interval[] {
  const common: Interval[] = []
  for (const a of some) {
    for (const b of others) {
      const from = Math.max(a.from, b.from)
      const to = Math.min(a.to, b.to)
      if (from < to) common.push({ from, to })
    }
  }
  return common.sort((a, b) => a.from - b.from)
}

function tell(intervals: readonly Interval[]): string {
  return intervals.map(({ from, to }) => `${from}..${to}`).join(' ')
}
