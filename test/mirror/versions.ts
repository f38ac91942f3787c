import { LIMITS } from '../../src/base/limits.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { Random } from '../support/random.ts'
import { newToken, sectorData } from '../support/sector-data.ts'

/**
 * Clients that write versions, and what an image of them may be.
 *
 * Each lane owns some blocks and sends one request at a time. So what a lane has done is a sequence, and an image of a point in time holds
 * a prefix of each; and where it holds a request, it holds every request that was answered before that one was sent.
 */
const LANES = 3
export const BLOCK = 4096

interface Operation {
  readonly block: number
  readonly token: bigint // 0: trimmed
  readonly sent: number // order among all events
  answered: number // Infinity: it was not
  failed: boolean
}

export class Versions {
  readonly size: number
  readonly errors: string[] = []
  readonly #base: (bigint | undefined)[]
  readonly #lanes: Operation[][] = Array.from({ length: LANES }, () => [])
  readonly #random: Random
  #events = 0
  #running: Promise<void>[] = []
  #stop = false

  constructor(size: number, seed = 1) {
    this.size = size
    this.#base = Array.from({ length: Math.ceil(size / BLOCK) }, () => 0n)
    this.#random = new Random(seed)
  }

  get answers(): number {
    return this.#lanes.flat().filter(({ answered }) => Number.isFinite(answered)).length
  }
  get blocks(): number {
    return this.#base.length
  }

  /** Every lane writes until `stop`; `pause` is awaited between two requests of a lane. */
  start(client: NbdClient, pause: () => Promise<unknown> = breathe): void {
    this.#stop = false
    this.#running = this.#lanes.map((_, lane) => this.#lane(client, lane, pause))
  }

  /** Resolves when no request is under way. */
  async stop(): Promise<void> {
    this.#stop = true
    await Promise.all(this.#running)
  }

  /** Writes so many blocks at random, one after the other. */
  async write(client: NbdClient, count: number): Promise<void> {
    for (let n = 0; n < count; n++) {
      const block = this.#random.below(this.blocks)
      await this.#write(client, block % LANES, block, false)
    }
  }

  /** Writes every block once. */
  async fill(client: NbdClient): Promise<void> {
    for (let block = 0; block < this.blocks; block++) await this.#write(client, block % LANES, block, false)
  }

  async #lane(client: NbdClient, lane: number, pause: () => Promise<unknown>): Promise<void> {
    while (!this.#stop) {
      const block = lane + LANES * this.#random.below(Math.floor((this.blocks - 1 - lane) / LANES) + 1)
      const last = this.#lanes[lane]?.findLast((operation) => operation.block === block)
      const trims = this.#random.below(8) === 0 && (last?.token ?? this.#base[block]) !== 0n
      if (!(await this.#write(client, lane, block, trims))) return
      await pause()
    }
  }

  async #write(client: NbdClient, lane: number, block: number, trims: boolean): Promise<boolean> {
    const token = trims ? 0n : newToken()
    const operation = {
      block,
      token,
      sent: ++this.#events,
      answered: Number.POSITIVE_INFINITY,
      failed: false,
    }
    this.#lanes[lane]?.push(operation)
    const offset = block * BLOCK
    const length = Math.min(BLOCK, this.size - offset)
    try {
      if (trims) await client.trim({ offset, length })
      else
        await client.write(sectorData(token, offset, length), offset, {
          durable: this.#random.below(16) === 0,
        })
      operation.answered = ++this.#events
      return true
    } catch (error) {
      operation.failed = true
      this.errors.push(String(error))
      return false
    }
  }

  /**
   * @param answeredBy events up to which all that was answered has to be there; 0: nothing
   * @returns why the image is no point in time, undefined where it is one
   */
  check(image: Buffer, answeredBy = 0): string | undefined {
    const included: number[] = []
    for (let lane = 0; lane < LANES; lane++) {
      const found = this.#prefix(image, lane)
      if (typeof found === 'string') return found
      included.push(found)
    }
    for (const [lane, count] of included.entries()) {
      const operations = this.#lanes[lane] ?? []
      const missing = operations[count]
      if (missing === undefined) continue
      if (missing.answered <= answeredBy) return `lane ${lane}: request ${count} was answered and is missing`
      for (const [other, otherCount] of included.entries()) {
        const newest = this.#lanes[other]?.[otherCount - 1]
        if (newest !== undefined && missing.answered < newest.sent) {
          return `lane ${lane} is at ${count}, and lane ${other} at ${otherCount}: that was sent later than the next of lane ${lane} was answered`
        }
      }
    }
    return undefined
  }

  /** Events so far; for `check`. */
  get now(): number {
    return this.#events
  }

  /** How many requests of the lane the image holds, or what is wrong. */
  #prefix(image: Buffer, lane: number): number | string {
    const expected = new Map<number, bigint>()
    const found = new Map<number, bigint>()
    for (let block = lane; block < this.blocks; block += LANES) {
      const at = block * BLOCK
      const content = image.subarray(at, Math.min(image.length, at + BLOCK))
      const token = content.readBigUInt64LE(0)
      if (!content.equals(sectorData(token, at, content.length))) return `block ${block} is a mixture`
      found.set(block, token)
      expected.set(block, this.#base[block] ?? 0n)
    }
    let wrong = [...found].filter(([block, token]) => expected.get(block) !== token).length
    const operations = this.#lanes[lane] ?? []
    let best = wrong === 0 ? 0 : -1
    for (const [index, { block, token }] of operations.entries()) {
      if (expected.get(block) !== found.get(block)) wrong--
      expected.set(block, token)
      if (expected.get(block) !== found.get(block)) wrong++
      if (wrong === 0) best = index + 1
    }
    return best < 0 ? `lane ${lane}: no prefix of its ${operations.length} requests` : best
  }

  /**
   * The daemon died, or the image was taken over: from now on this is the content. What was not answered may be there or not.
   * @returns what is wrong with it
   */
  settle(image: Buffer, answered = true): string | undefined {
    const problem = this.check(image, answered ? this.#events : 0)
    for (let block = 0; block < this.blocks; block++) this.#base[block] = image.readBigUInt64LE(block * BLOCK)
    for (const lane of this.#lanes) lane.length = 0
    this.errors.length = 0
    return problem
  }
}

export function breathe(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}

/** A moment of an image that others change: where two readings agree, it was like that in between. */
export async function snapshot(read: () => Promise<Buffer>): Promise<Buffer> {
  for (let before = await read(); ; ) {
    const after = await read()
    if (after.equals(before)) return after
    before = after
  }
}

/** 4 KiB stripes and units, so that little content makes many units. */
export const SMALL_POOL = { capacity: 64 << 20, chunkSize: LIMITS.chunkSizeMin } as const
