import { newToken, SECTOR, sectorData } from '../support/sector-data.ts'
import { type Access, judge, smallestWindow } from './register.ts'

/**
 * What clients of one volume did and saw: when each request was sent and answered, by one counter, and what reads returned,
 * sector by sector. `check` holds it against what is permitted (register.ts): every sector by itself, because a request
 * need not take effect in one go. Trims and zeroes are writes of zeros.
 *
 * A read next to a write may return some words (8 bytes) of either: sectors are not copied in one go. It counts as one read
 * for each.
 */
interface Operation {
  readonly kind: 'read' | 'write'
  readonly name: string
  readonly first: number // sector
  readonly count: number // sectors
  readonly value: number // of a write
  readonly begin: number
  end: number // Infinity while there is no answer
  lost: boolean
  /** What a read returned: a value a sector, and further ones of sectors that were mixed. */
  values: Float64Array | undefined
  mixed: { sector: number; value: number }[]
}

export interface Answer {
  /** It was answered with success. */
  answered(): void
}

/** A value that no token has: what an unwritten volume with a fill pattern reads as. */
const FILL = -1

export interface HistoryCounts {
  readonly operations: number
  readonly compared: number // sectors that reads returned
}

export class History {
  readonly size: number // bytes
  readonly #name: string
  readonly #fill: Buffer
  #initial: Float64Array
  #operations: Operation[] = []
  #clock = 0
  #strange: string | undefined
  #counted = 0
  #compared = 0

  /** @param fill byte that unwritten sectors hold. @param name of the volume, for messages */
  constructor(size: number, name: string, fill = 0) {
    this.size = size
    this.#name = name
    this.#fill = Buffer.alloc(SECTOR, fill)
    this.#initial = new Float64Array(size / SECTOR).fill(fill === 0 ? 0 : FILL)
  }

  get counts(): HistoryCounts {
    return { operations: this.#counted, compared: this.#compared }
  }

  /** A write of whole sectors that is about to be sent, and its bytes. */
  write(offset: number, length: number, who = ''): Answer & { readonly data: Buffer } {
    const token = newToken()
    const operation = this.#begin('write', `write ${token}${who}`, offset, length, Number(token))
    return { data: sectorData(token, offset, length), answered: () => this.#answered(operation) }
  }

  /** A trim or zeroing that is about to be sent. */
  zero(offset: number, length: number, who = ''): Answer {
    const operation = this.#begin('write', `zero${who}`, offset, length, 0)
    return { answered: () => this.#answered(operation) }
  }

  /** A read that is about to be sent. */
  read(offset: number, length: number, who = ''): { answered(content: Buffer): void } {
    const operation = this.#begin('read', `read${who}`, offset, length, 0)
    return {
      answered: (content) => {
        this.#answered(operation)
        operation.values = new Float64Array(operation.count)
        for (let index = 0; index < operation.count; index++) {
          this.#decode(operation, index, content.subarray(index * SECTOR, (index + 1) * SECTOR))
        }
        this.#compared += operation.count
      },
    }
  }

  /** The server died, or is done with all whose clients left: what is unanswered has happened by now, or never will. */
  cutOff(): void {
    const now = ++this.#clock
    for (const operation of this.#operations) {
      if (operation.end !== Number.POSITIVE_INFINITY) continue
      operation.end = now
      operation.lost = true
    }
  }

  /** @returns what is wrong with the smallest part of the history that is wrong, undefined where nothing is */
  check(): string | undefined {
    if (this.#strange !== undefined) return this.#strange
    const sectors = new Map<number, Access[]>()
    for (const operation of this.#operations) this.#accesses(operation, sectors)
    for (const [sector, accesses] of sectors) {
      const verdict = judge(this.#initial[sector] ?? 0, accesses)
      if (verdict === 'possible') continue
      if (verdict === 'undecided') return `${this.#name}: sector ${sector}: too much overlaps to be judged`
      return this.#describe(sector, accesses)
    }
    return undefined
  }

  /**
   * Checks, at a moment at which nothing is under way, with what the whole volume reads as at that moment; goes on from
   * there and forgets what was before.
   */
  settle(content: Buffer): string | undefined {
    const read = this.read(0, this.size, ' of everything')
    read.answered(content)
    const problem = this.check()
    const { values } = this.#operations.at(-1) ?? {}
    if (values !== undefined) this.#initial = values
    this.#operations = []
    return problem
  }

  #begin(kind: Operation['kind'], name: string, offset: number, length: number, value: number): Operation {
    const operation: Operation = {
      kind,
      name,
      first: offset / SECTOR,
      count: length / SECTOR,
      value,
      begin: ++this.#clock,
      end: Number.POSITIVE_INFINITY,
      lost: false,
      values: undefined,
      mixed: [],
    }
    this.#operations.push(operation)
    return operation
  }

  #answered(operation: Operation): void {
    operation.end = ++this.#clock
    this.#counted++
  }

  #decode(operation: Operation, index: number, content: Buffer): void {
    const { values } = operation
    if (values === undefined) return
    const sector = operation.first + index
    const found = new Set<number>()
    const bytes = isUniform(content) ? 16 : SECTOR
    // Words are whole even where sectors are mixed.
    for (let at = 0; at < bytes; at += 8) {
      const word = content.readUInt32LE(at) + content.readUInt32LE(at + 4) * 2 ** 32
      const isPlace = at % 16 === 8
      if (this.#fill[0] !== 0 && this.#fill.compare(content, at, at + 8, 0, 8) === 0) found.add(FILL)
      else if (!isPlace) found.add(word)
      else if (word === 0 && sector !== 0) found.add(0)
      else if (word !== sector) {
        this.#strange ??= `${this.#name}: sector ${sector} holds what was written to sector ${word}: ${content.toString('hex', at - 8, at + 8)}`
      }
    }
    const [first, ...others] = found
    values[index] = first ?? 0
    for (const value of others) operation.mixed.push({ sector, value })
  }

  #accesses(operation: Operation, sectors: Map<number, Access[]>): void {
    const { kind, begin, lost, values, name: label } = operation
    if (kind === 'read' && values === undefined) return
    const end = Number.isFinite(operation.end) ? operation.end : this.#clock + 1
    const isLost = lost || end !== operation.end
    for (let index = 0; index < operation.count; index++) {
      const value = values?.[index] ?? operation.value
      add(operation.first + index, { kind, value, begin, end, lost: isLost, label })
    }
    // Its parts may have been read in any order: they must not share their moments with it.
    operation.mixed.forEach(({ sector, value }, index) => {
      const shift = (index + 1) / (operation.mixed.length + 2)
      add(sector, { kind, value, begin: begin + shift, end: end - shift, lost: false, label })
    })

    function add(sector: number, access: Access): void {
      const accesses = sectors.get(sector)
      if (accesses === undefined) sectors.set(sector, [access])
      else accesses.push(access)
    }
  }

  #describe(sector: number, accesses: readonly Access[]): string {
    const initial = this.#initial[sector] ?? 0
    const window = smallestWindow(initial, accesses)
    const lines = window.map(({ kind, value, begin, end, lost, label }) => {
      const what = kind === 'read' ? `${label} returned ${nameOf(value)}` : label
      return `  ${begin} to ${Number.isInteger(end) ? end : Math.ceil(end)}: ${what}${lost ? ', unanswered' : ''}`
    })
    return [
      `${this.#name}: sector ${sector} (byte ${sector * SECTOR}), which held ${nameOf(initial)}, cannot have gone through this:`,
      ...lines,
    ].join('\n')
  }
}

function nameOf(value: number): string {
  return value === FILL ? 'the fill pattern' : value === 0 ? 'zeros' : String(value)
}

/** Whether a sector repeats its first 16 bytes. */
function isUniform(content: Buffer): boolean {
  return content.compare(content, 16, SECTOR, 0, SECTOR - 16) === 0
}
