import { SECTOR, sectorData } from './sector-model.ts'

/**
 * What a volume may hold after the power failed at some position of the disk's note (disk-log.ts). Every sector has one
 * writer, which waits for each answer before it sends the next request: so the operations on a sector are a sequence.
 *
 *   operations      o0  o1  o2  o3          after the failure the sector holds o1 (the newest that a flush covers which
 *   flush answered      ^ covers o1         was answered before), or o2 or o3, which may have reached the disk by themselves
 */
interface Operation {
  readonly token: bigint // 0 = zeros
  readonly sent: number // position of the note when it was sent: it cannot have reached the disk before
  answered: number // order in which it was answered, among all events; Infinity while it was not
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
    const first: Operation = { token: 0n, sent: -1, answered: -1, durable: -1 }
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

  /** @returns what is wrong with the content after a power failure at `position`, undefined where nothing is */
  check(content: Buffer, position: number): string | undefined {
    const flushes = this.#flushes.filter(({ answered }) => answered <= position)
    const flushed = flushes.reduce((newest, { sent }) => Math.max(newest, sent), 0)
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      const operations = this.#sectors[sector] ?? []
      const base = operations.findLastIndex(
        ({ answered, durable }) => answered < flushed || durable <= position,
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
      return `sector ${sector} holds ${found.toString('hex', 0, 16)}; may be ${permitted}; of ${all.join(', ')}`
    }
    return undefined
  }

  /** From now on the volume holds exactly this, durably: a new life, with a note of its own. */
  settle(content: Buffer): void {
    this.#flushes = []
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      this.#sectors[sector] = [
        { token: content.readBigUInt64LE(sector * SECTOR), sent: -1, answered: -1, durable: -1 },
      ]
    }
  }

  /** The process died and was started again under the same kernel: what was not answered has happened by now, or never will. */
  restarted(content: Buffer): string | undefined {
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
      if (last !== undefined && !Number.isFinite(last.answered)) last.answered = this.#events
      this.#sectors[sector] = happened
    }
    return undefined
  }

  #operation(offset: number, length: number, token: bigint, sent: number) {
    const operation: Operation = {
      token,
      sent,
      answered: Number.POSITIVE_INFINITY,
      durable: Number.POSITIVE_INFINITY,
    }
    for (let sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
      this.#sectors[sector]?.push(operation)
    }
    return {
      /** @param durable position of the note, for a request with FUA */
      answered: (durable?: number): void => {
        operation.answered = ++this.#events
        if (durable !== undefined) operation.durable = durable
      },
    }
  }
}
