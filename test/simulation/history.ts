import { SECTOR, sectorData } from '../support/sector-data.ts'

/**
 * What the sectors of a volume may hold, while it is served, after its daemon died, and after the power failed.
 *
 * Every operation begins when it is sent and ends when it is answered, and takes effect once in each of its sectors, at any
 * moment between; an operation that failed or was never answered may have. A later operation supersedes an earlier
 * one where it began after that one's end, and
 *
 *   for a read           it ended, or was seen by a read, before that read began
 *   after a death        it was answered
 *   after a power cut    it was answered before a flush was sent that was answered in turn; or it was answered itself, and
 *                        had FUA
 *
 * What no other operation supersedes may be found. Every write has a token that no other operation has, of whatever volume, in
 * every sector; so what is found tells whose it is.
 */
interface Operation {
  readonly token: bigint // 0 = zeros
  readonly begin: number // logical time
  end: number // of the answer; Infinity while there is none, or it failed
  durable: boolean // by itself: FUA
}

/** An operation in one of its sectors. */
interface Effect {
  readonly operation: Operation
  seen: number // the end of the first read that returned it
}

/** What has happened to the pool since the content was looked at last. */
export type Event = 'died' | 'lost power' | 'closed'

const NEVER = Number.POSITIVE_INFINITY
const PRUNE_AT = 12

export class History {
  readonly #sectors: Effect[][]
  readonly #initial: bigint
  readonly #fill: number
  readonly #readsUnderWay = new Set<number>() // when they began
  #clock = 0
  #flushed = 0 // when the last one was sent of those that were answered

  /** @param size bytes that the volume may ever have */
  constructor(size: number, fill: number) {
    this.#fill = fill
    this.#initial = BigInt(`0x${Buffer.alloc(8, fill).toString('hex')}`)
    this.#sectors = Array.from({ length: size / SECTOR }, () => [this.#settled(this.#initial)])
  }

  /** A write that is being sent. @returns to be called when it was answered with success */
  write(
    offset: number,
    length: number,
    token: bigint,
  ): { data: Buffer; answered: (durable: boolean) => void } {
    return { data: sectorData(token, offset, length), answered: this.#operation(offset, length, token) }
  }

  zero(offset: number, length: number): (durable: boolean) => void {
    return this.#operation(offset, length, 0n)
  }

  /**
   * The range is being cut off, and reads as the fill pattern should it ever come back.
   * @returns to be called when it is gone, durably: then only what is under way can still take effect there, once it is back
   */
  cutOff(offset: number, length: number): () => void {
    const answered = this.#operation(offset, length, this.#initial)
    return () => {
      answered(true)
      for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
        this.#sectors[sector] = this.#prune([...(this.#sectors[sector] ?? []), this.#settled(this.#initial)])
      }
    }
  }

  flush(): () => void {
    const sent = ++this.#clock
    return () => {
      this.#flushed = Math.max(this.#flushed, sent)
    }
  }

  /** A read that is being sent. @returns what is wrong with its answer, undefined where nothing is */
  read(offset: number, length: number): (content: Buffer) => string | undefined {
    const begin = ++this.#clock
    this.#readsUnderWay.add(begin)
    return (content) => {
      this.#readsUnderWay.delete(begin)
      const end = ++this.#clock
      for (let at = 0; at < length; at += SECTOR) {
        const sector = (offset + at) / SECTOR
        const problem = this.#checkRead(sector, this.#tokenAt(content, at, sector), begin, end)
        if (problem !== undefined) return problem
      }
      return undefined
    }
  }

  /**
   * Compares all content after `event`, with nothing under way; what was not answered by then has happened or never will.
   * @param uncertain a sync had failed: then also a death may cost what was not durable
   * @param onLost called for each sector that lacks what was answered (and never flushed)
   */
  restarted(
    content: Buffer,
    event: Event,
    uncertain: boolean,
    onLost: (sector: number) => void = () => {},
  ): string | undefined {
    this.#readsUnderWay.clear()
    const now = ++this.#clock
    for (let sector = 0; sector < content.length / SECTOR; sector++) {
      const effects = this.#sectors[sector] ?? []
      const token = this.#tokenAt(content, sector * SECTOR, sector)
      const may = effects.filter((each) => !effects.some((by) => this.#outlasts(by, each, event, uncertain)))
      if (may.every(({ operation }) => operation.token !== token)) {
        return `sector ${sector} holds ${this.#name(token)} after the pool ${event}; may be ${this.#names(may)}; of ${this.#story(effects)}`
      }
      const authors = may.filter(({ operation }) => operation.token === token)
      if (
        effects.some(({ operation }) =>
          authors.every((by) => operation.begin > by.operation.end && operation.end < now),
        )
      )
        onLost(sector)
      if (event === 'lost power') {
        this.#sectors[sector] = [this.#settled(token)]
        continue
      }
      for (const { operation } of effects) operation.end = Math.min(operation.end, now)
    }
    // Only now, because operations have many sectors. From here on every sector holds what was found; that is durable
    // only where the pool was closed.
    const then = ++this.#clock
    if (event !== 'lost power') {
      for (let sector = 0; sector < content.length / SECTOR; sector++) {
        const found: Operation = {
          token: content.readBigUInt64LE(sector * SECTOR),
          begin: then,
          end: then,
          durable: event === 'closed',
        }
        const effects = [...this.#prune(this.#sectors[sector] ?? []), { operation: found, seen: then }]
        this.#sectors[sector] = event === 'closed' ? effects.slice(-1) : effects
      }
    }
    // What lies past the end of the volume.
    for (let sector = content.length / SECTOR; sector < this.#sectors.length; sector++)
      this.#sectors[sector] = [this.#settled(this.#initial)]
    return undefined
  }

  /** All content was replaced by this, durably, with nothing under way. */
  replaced(content: Buffer): void {
    this.#readsUnderWay.clear()
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      const inside = sector < content.length / SECTOR
      const token = inside ? this.#tokenAt(content, sector * SECTOR, sector) : this.#initial
      this.#sectors[sector] = [this.#settled(token)]
    }
  }

  #operation(offset: number, length: number, token: bigint): (durable: boolean) => void {
    const operation: Operation = { token, begin: ++this.#clock, end: NEVER, durable: false }
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
      let effects = this.#sectors[sector] ?? []
      if (effects.length >= PRUNE_AT) {
        effects = this.#prune(effects)
        this.#sectors[sector] = effects
      }
      effects.push({ operation, seen: NEVER })
    }
    return (durable) => {
      operation.end = ++this.#clock
      operation.durable = durable
    }
  }

  #settled(token: bigint): Effect {
    this.#clock++
    return { operation: { token, begin: this.#clock, end: this.#clock, durable: true }, seen: this.#clock }
  }

  #checkRead(sector: number, token: bigint, begin: number, end: number): string | undefined {
    const effects = this.#sectors[sector] ?? []
    const may = effects.filter(
      (each) => each.operation.begin < end && !effects.some((by) => supersedes(by, each, begin)),
    )
    const authors = may.filter(({ operation }) => operation.token === token)
    if (authors.length === 0)
      return `sector ${sector} reads ${this.#name(token)} at ${begin}..${end}; may be ${this.#names(may)}; of ${this.#story(effects)}`
    // Zeros have many authors; only one that is alone is known to have taken effect.
    const [author] = authors
    if (author !== undefined && authors.length === 1) author.seen = Math.min(author.seen, end)
    return undefined
  }

  #durable({ durable, end }: Operation): boolean {
    return durable || end < this.#flushed
  }

  #outlasts(by: Effect, each: Effect, event: Event, uncertain: boolean): boolean {
    if (event === 'lost power' || uncertain)
      return by.operation.begin > each.operation.end && this.#durable(by.operation)
    return supersedes(by, each, this.#clock)
  }

  /** Without those that can never be found again. */
  #prune(effects: Effect[]): Effect[] {
    let oldest = this.#clock
    for (const begin of this.#readsUnderWay) oldest = Math.min(oldest, begin)
    return effects.filter(
      (each) =>
        !effects.some(
          (by) =>
            by.operation.begin > each.operation.end &&
            this.#durable(by.operation) &&
            by.operation.end < oldest,
        ),
    )
  }

  /** The token of a sector whose words all tell the same; else a number that nobody wrote. */
  #tokenAt(content: Buffer, at: number, sector: number): bigint {
    const token = content.readBigUInt64LE(at)
    const place = content.readBigUInt64LE(at + 8)
    const same = content.compare(content, at, at + SECTOR - 16, at + 16, at + SECTOR) === 0
    const plain = token === 0n || token === this.#initial
    return same && place === (plain ? token : BigInt(sector)) ? token : -(token + 1n)
  }

  #name(token: bigint): string {
    if (token < 0n) return `a mixture that begins with ${-token - 1n}`
    return token === this.#initial && this.#fill !== 0 ? 'fill' : String(token)
  }

  #names(effects: readonly Effect[]): string {
    return effects.map(({ operation }) => this.#name(operation.token)).join(' ')
  }

  #story(effects: readonly Effect[]): string {
    const told = effects.map(({ operation, seen }) => {
      const { token, begin, end } = operation
      const kept = this.#durable(operation) ? ' durable' : ''
      return `${this.#name(token)}@${begin}..${end}${seen < NEVER ? ` seen ${seen}` : ''}${kept}`
    })
    return `${told.join(', ')}; flushed ${this.#flushed}`
  }
}

/** Whether `by` took effect wholly between the end of `each` and `begin`. */
function supersedes(by: Effect, each: Effect, begin: number): boolean {
  return by.operation.begin > each.operation.end && Math.min(by.operation.end, by.seen) < begin
}
