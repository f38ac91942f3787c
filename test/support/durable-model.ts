import { SECTOR, sectorData } from './sector-data.ts'

/**
 * What a volume may hold after the power failed at some position of the disk's note (disk-log.ts). Every sector has one
 * writer, which waits for each answer before it sends the next request: so the operations on a sector are a sequence.
 *
 *   operations      o0  o1  o2  o3          after the failure the sector holds o1 (the newest that a flush covers which
 *   flush answered      ^ covers o1         was answered before), or o2 or o3, which may have reached the disk by themselves
 *
 * Where nothing is suspect (a volume that keeps intents) less may be found: everything that was answered is there.
 */
interface Operation {
  readonly token: bigint // 0 = zeros
  readonly sent: number // position of the note when it was sent: it cannot have reached the disk before
  answered: number // order in which it was answered, among all events; Infinity while it was not
  answeredAt: number // position of the note when that was known; Infinity while it was not
  durable: number // position from which on it is durable by itself (FUA); Infinity for others
}

interface Flush {
  readonly sent: number // order among all events
  readonly answered: number // position of the note when it was answered
}

export class DurableModel {
  readonly size: number // bytes
  readonly #sectors: Operation[][]
  #flushes: Flush[] = []
  #events = 0
  #tokens: () => bigint

  /** @param tokens gives a new one with every call */
  constructor(size: number, tokens: () => bigint) {
    this.size = size
    this.#tokens = tokens
    const first: Operation = { token: 0n, sent: -1, answered: -1, answeredAt: -1, durable: -1 }
    this.#sectors = Array.from({ length: size / SECTOR }, () => [first])
  }

  write(offset: number, length: number, sent: number) {
    const token = this.#tokens()
    return { data: sectorData(token, offset, length), ...this.#operation(offset, length, token, sent) }
  }

  zero(offset: number, length: number, sent: number) {
    return this.#operation(offset, length, 0n, sent)
  }

  /** A flush of any connection is about to be sent. @returns to be called when it was answered */
  flush(): (position: number) => void {
    const sent = ++this.#events
    return (position) => this.#flushes.push({ sent, answered: position })
  }

  /** How many flushes and durable requests were answered by then: with each, more is expected of the content. */
  flushedBy(position: number): number {
    const durable = this.#sectors.flat().filter((operation) => operation.durable <= position).length
    return durable + this.#flushes.filter(({ answered }) => answered <= position).length
  }

  /**
   * @param suspect whether a byte lies in a region that was hot; default: all do
   * @returns what is wrong with the content after a power failure at `position`, undefined where nothing is
   */
  check(
    content: Buffer,
    position: number,
    suspect: (offset: number) => boolean = () => true,
  ): string | undefined {
    const flushes = this.#flushes.filter(({ answered }) => answered <= position)
    const flushed = flushes.reduce((newest, { sent }) => Math.max(newest, sent), 0)
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      const operations = this.#sectors[sector] ?? []
      const trusted = !suspect(sector * SECTOR)
      const base = operations.findLastIndex(
        ({ answered, answeredAt, durable }) =>
          answered < flushed || durable <= position || (trusted && answeredAt <= position),
      )
      const permitted = operations
        .filter(({ sent }, index) => index >= base && sent <= position)
        .map(({ token }) => token)
      const at = sector * SECTOR
      const found = content.subarray(at, at + SECTOR)
      if (permitted.some((token) => found.equals(sectorData(token, at, SECTOR)))) continue
      const all = operations.map(
        ({ token, sent, answered }) =>
          `${token} sent ${sent}${Number.isFinite(answered) ? '' : ' unanswered'}`,
      )
      const where = `sector ${sector}${trusted ? ', not suspect,' : ''}`
      return `${where} holds ${found.toString('hex', 0, 16)}; may be ${permitted}; of ${all.join(', ')}`
    }
    return undefined
  }

  /** Of all writes that it still knows of. */
  tokens(): Set<bigint> {
    return new Set(this.#sectors.flatMap((operations) => operations.map(({ token }) => token)))
  }

  /** From now on the volume holds exactly this, durably: a new life, with a note of its own. */
  settle(content: Buffer): void {
    this.#flushes = []
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      this.#sectors[sector] = [
        {
          token: content.readBigUInt64LE(sector * SECTOR),
          sent: -1,
          answered: -1,
          answeredAt: -1,
          durable: -1,
        },
      ]
    }
  }

  /**
   * The process died and was started again under the same kernel: what was not answered has happened by now, or never will.
   * @param position of the note, now
   */
  restarted(content: Buffer, position: number): string | undefined {
    this.#events++
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      const operations = this.#sectors[sector] ?? []
      const lastAnswered = operations.findLastIndex(({ answered }) => Number.isFinite(answered))
      const at = sector * SECTOR
      const found = content.subarray(at, at + SECTOR)
      const index = operations.findLastIndex(
        ({ token }, i) => i >= lastAnswered && found.equals(sectorData(token, at, SECTOR)),
      )
      if (index < 0) {
        const may = operations.slice(lastAnswered).map(({ token }) => token)
        return `sector ${sector} holds ${found.toString('hex', 0, 16)} after the restart; may be ${may}`
      }
      const happened = operations.slice(0, index + 1)
      const last = happened[index]
      // In this sector only: a request that was not answered may have got as far as some of its sectors.
      if (last !== undefined && !Number.isFinite(last.answered)) {
        happened[index] = { ...last, answered: this.#events, answeredAt: position }
      }
      this.#sectors[sector] = happened
    }
    return undefined
  }

  #operation(offset: number, length: number, token: bigint, sent: number) {
    const operation: Operation = {
      token,
      sent,
      answered: Number.POSITIVE_INFINITY,
      answeredAt: Number.POSITIVE_INFINITY,
      durable: Number.POSITIVE_INFINITY,
    }
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
      this.#sectors[sector]?.push(operation)
    }
    return {
      /** @param position of the note, now. @param durable for a request with FUA */
      answered: (position: number, durable = false): void => {
        operation.answered = ++this.#events
        operation.answeredAt = position
        if (durable) operation.durable = position
      },
    }
  }
}
