/**
 * What a disk may answer, sector by sector, when requests overlap in time.
 *
 * Every write has a token of its own; each of its sectors holds token and sector number in turn, 8 bytes each, so that a
 * sector tells who wrote it and where. An operation begins when it is sent and ends when it is answered; between the two it
 * may take effect at any moment, once. A read may return the value of an operation that began before the read ended, unless
 * another one took effect wholly between that operation's end and the read's begin. What a read returned has taken effect
 * in that sector: no later read may go back behind it. Sectors are independent: a request need not take effect in one go.
 *
 * The operations of one sector that still matter are kept; those that no read can return any more are dropped.
 */
export const SECTOR = 512
const WORDS = SECTOR / 8

let tokens = 0n

/** Different from all others in this process, of whatever volume. */
export function newToken(): bigint {
  tokens += 1n
  return tokens
}

/** Whole sectors as the writer of `token` fills them; token 0: zeros. */
export function sectorData(token: bigint, offset: number, length: number): Buffer {
  const data = Buffer.alloc(length)
  if (token === 0n) return data
  for (let at = 0; at < length; at += 16) {
    data.writeBigUInt64LE(token, at)
    data.writeBigUInt64LE(BigInt(Math.floor((offset + at) / SECTOR)), at + 8)
  }
  return data
}

interface Operation {
  readonly token: bigint // 0 = zeros
  readonly begin: number // logical time
  end: number // of the answer; Infinity while there is none
}

/** An operation in one of its sectors. */
interface Effect {
  readonly operation: Operation
  seen: number // the end of the first read that returned it; Infinity while there is none
}

export class SectorModel {
  readonly size: number // bytes
  readonly #sectors: Effect[][]
  readonly #initial: bigint
  readonly #readsUnderWay = new Set<{ begin: number }>()
  #clock = 0
  /** Sectors that were compared. */
  compared = 0

  /** @param fill byte that unwritten sectors hold */
  constructor(size: number, fill = 0) {
    this.size = size
    this.#initial = BigInt(`0x${Buffer.alloc(8, fill).toString('hex')}`)
    const operation: Operation = { token: this.#initial, begin: 0, end: 0 }
    this.#sectors = Array.from({ length: size / SECTOR }, () => [{ operation, seen: 0 }])
  }

  /** A write of whole sectors that is about to be sent: its bytes, and what to call when it was answered with success. */
  write(offset: number, length: number): { data: Buffer; answered: () => void } {
    const token = newToken()
    return { data: sectorData(token, offset, length), answered: this.#operation(offset, length, token) }
  }

  /** A trim or zeroing that is about to be sent. */
  zero(offset: number, length: number): { answered: () => void } {
    return { answered: this.#operation(offset, length, 0n) }
  }

  /** A read that is about to be sent; `check` is called with what came back. @returns what is wrong, undefined where nothing is */
  read(offset: number, length: number): { check: (content: Buffer) => string | undefined } {
    const read = { begin: ++this.#clock }
    this.#readsUnderWay.add(read)
    return {
      check: (content) => {
        const end = ++this.#clock
        this.#readsUnderWay.delete(read)
        for (let at = 0; at < length; at += SECTOR) {
          const problem = this.#checkSector(
            (offset + at) / SECTOR,
            content.subarray(at, at + SECTOR),
            read.begin,
            end,
          )
          if (problem !== undefined) return problem
        }
        return undefined
      },
    }
  }

  /**
   * Checks the whole content with nothing under way any more; from now on it is exactly that. For a restart: what was not
   * answered before has taken effect by now, or never will.
   * @returns what is wrong, undefined where nothing is
   */
  settle(content: Buffer): string | undefined {
    const problem = this.read(0, this.size).check(content)
    this.#readsUnderWay.clear()
    const now = ++this.#clock
    for (let sector = 0; sector < this.#sectors.length; sector++) {
      const operation: Operation = { token: content.readBigUInt64LE(sector * SECTOR), begin: now, end: now }
      this.#sectors[sector] = [{ operation, seen: now }]
    }
    return problem
  }

  #operation(offset: number, length: number, token: bigint): () => void {
    const operation: Operation = { token, begin: ++this.#clock, end: Number.POSITIVE_INFINITY }
    const first = offset / SECTOR
    const last = (offset + length) / SECTOR
    for (let sector = first; sector < last; sector++) {
      this.#sectors[sector]?.push({ operation, seen: Number.POSITIVE_INFINITY })
    }
    return () => {
      operation.end = ++this.#clock
      for (let sector = first; sector < last; sector++) this.#prune(sector)
    }
  }

  #checkSector(sector: number, content: Buffer, begin: number, end: number): string | undefined {
    this.compared++
    const effects = this.#sectors[sector] ?? []
    const permitted = effects.filter(
      (each) => each.operation.begin < end && !superseded(each, effects, begin),
    )
    // A read next to a write may see some words of either: sectors are not copied in one go.
    const seen = new Set<bigint>()
    for (let word = 0; word < WORDS; word += 2) {
      const token = content.readBigUInt64LE(word * 8)
      const place = content.readBigUInt64LE(word * 8 + 8)
      const expectedPlace = token === 0n || token === this.#initial ? token : BigInt(sector)
      if (place !== expectedPlace)
        return `sector ${sector} holds what belongs to sector ${place} (token ${token})`
      seen.add(token)
    }
    for (const token of seen) {
      if (permitted.some(({ operation }) => operation.token === token)) continue
      const known = effects.map(
        ({ operation, seen: at }) => `${operation.token}@${operation.begin}..${operation.end} seen ${at}`,
      )
      const may = permitted.map(({ operation }) => operation.token)
      return `sector ${sector} reads ${token} at ${begin}..${end}; may be ${may}; of ${known.join(', ')}`
    }
    if (seen.size === 1) {
      // Zeros have many authors; only one that is alone is known to have taken effect.
      const authors = permitted.filter(({ operation }) => seen.has(operation.token))
      const [author] = authors
      if (author !== undefined && authors.length === 1) author.seen = Math.min(author.seen, end)
    }
    return undefined
  }

  #prune(sector: number): void {
    const effects = this.#sectors[sector]
    if (effects === undefined || effects.length < 8) return
    let oldest = this.#clock
    for (const { begin } of this.#readsUnderWay) oldest = Math.min(oldest, begin)
    this.#sectors[sector] = effects.filter((each) => !superseded(each, effects, oldest))
  }
}

/** Whether another operation took effect wholly between the end of this one and `begin`. */
function superseded(each: Effect, effects: readonly Effect[], begin: number): boolean {
  return effects.some(
    ({ operation, seen }) => operation.begin > each.operation.end && Math.min(operation.end, seen) < begin,
  )
}
