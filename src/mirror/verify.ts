import { messageOf } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { BitmapPage } from './remote.ts'
import { type Range, regionsAtOnce, sameSignature, signaturesOf } from './signatures.ts'
import type { VerifyDifference, VerifyResult } from './types.ts'

/**
 * Compares a live pair, without false alarms, while clients write.
 *
 * First without any hold: equal signatures of a region settle it, whenever each side computed its own. What is not settled (it may
 * have changed in between, or be on its way) is tried again, and what is left then is compared at a point in time, some regions at a time:
 * requests wait while this side's signatures are computed (`atPoint`). Only that counts as a difference.
 */
export interface VerifyHost {
  readonly unitBytes: number
  size(): number
  nextRealized(offset: number): number
  realizedThere(): AsyncIterable<BitmapPage>
  read(offset: number, target: Buffer): Promise<void>
  signaturesThere(ranges: readonly Range[]): Promise<Buffer>
  /** Signatures of both sides at one point in time. */
  atPoint(ranges: readonly Range[]): Promise<{ readonly ours: Buffer; readonly theirs: Buffer }>
  /** The units differ: what is there is to be replaced. */
  repair(differences: readonly VerifyDifference[]): void
  progress(done: number, total: number): void
  compared(regions: number): void
}

const PASSES = 3
/** Bytes whose signatures are computed while requests wait. */
const POINT_BYTES = 16 << 20

export class Verification {
  readonly #host: VerifyHost
  readonly #repair: boolean
  readonly #started = new Date().toISOString()
  #ended: string | null = null
  #failure: string | null = null
  #compared = 0
  #differing = 0
  readonly #differences: { offset: number; length: number }[] = []

  constructor(host: VerifyHost, repair: boolean) {
    this.#host = host
    this.#repair = repair
  }

  get running(): boolean {
    return this.#ended === null
  }

  result(): VerifyResult {
    return {
      started: this.#started,
      ended: this.#ended,
      compared: this.#compared,
      differences: this.#differences,
      differing: this.#differing,
      repaired: this.#ended !== null && this.#failure === null && this.#repair && this.#differing > 0,
      failure: this.#failure,
    }
  }

  /** Never rejects: what went wrong is in the result. */
  async run(): Promise<void> {
    try {
      await this.#run()
    } catch (error) {
      this.#failure = messageOf(error)
    }
    this.#ended = new Date().toISOString()
  }

  async #run(): Promise<void> {
    const regionBytes = Math.max(LIMITS.mirrorRegionBytes, this.#host.unitBytes)
    let open = await this.#regions(regionBytes)
    const total = open.length * regionBytes
    const show = (left: number): void => this.#host.progress(Math.max(0, total - left * regionBytes), total)
    show(open.length)
    const atOnce = regionsAtOnce(regionBytes)
    const atPoint = regionsAtOnce(regionBytes, POINT_BYTES)
    for (let pass = 0; pass < PASSES && open.length > 0; pass++) {
      const unsettled: number[] = []
      for (let at = 0; at < open.length; at += atOnce) {
        const batch = open.slice(at, at + atOnce)
        const ranges = batch.map((offset) => this.#range(offset, regionBytes))
        const [ours, theirs] = await Promise.all([
          signaturesOf(ranges, (offset, target) => this.#host.read(offset, target)),
          this.#host.signaturesThere(ranges),
        ])
        batch.forEach((offset, index) => {
          if (sameSignature(ours, theirs, index)) this.#settle(offset, regionBytes)
          else unsettled.push(offset)
        })
        show(open.length - at - batch.length + unsettled.length)
      }
      const before = open.length
      open = unsettled
      if (open.length > before / 2) break // it does not get better
    }
    for (let at = 0; at < open.length; at += atPoint) {
      const batch = open.slice(at, at + atPoint)
      const ranges = batch.flatMap((offset) => this.#units(this.#range(offset, regionBytes)))
      const { ours, theirs } = await this.#host.atPoint(ranges)
      const differing = ranges.filter((_, index) => !sameSignature(ours, theirs, index))
      for (const range of differing) this.#note(range)
      for (const offset of batch) this.#settle(offset, regionBytes)
      if (this.#repair && differing.length > 0) this.#host.repair(differing)
      show(open.length - at - batch.length)
    }
  }

  /** Where the regions begin in which something is formatted on either side. */
  async #regions(regionBytes: number): Promise<number[]> {
    const { unitBytes } = this.#host
    const regions = new Set<number>()
    const size = this.#host.size()
    for (let at = this.#host.nextRealized(0); at < size; ) {
      const region = Math.floor(at / regionBytes) * regionBytes
      regions.add(region)
      at = region + regionBytes < size ? this.#host.nextRealized(region + regionBytes) : size
    }
    for await (const { first, bytes } of this.#host.realizedThere()) {
      for (let bit = 0; bit < bytes.length * 8; bit++) {
        if (((bytes[bit >> 3] ?? 0) >> (bit & 7)) % 2 === 0) continue
        const region = Math.floor(((first + bit) * unitBytes) / regionBytes) * regionBytes
        if (region < size) regions.add(region)
      }
    }
    return [...regions].sort((a, b) => a - b)
  }

  #range(offset: number, length: number): Range {
    return { offset, length: Math.min(length, this.#host.size() - offset) }
  }

  #units({ offset, length }: Range): Range[] {
    const { unitBytes } = this.#host
    const units: Range[] = []
    for (let at = offset; at < offset + length; at += unitBytes) {
      units.push({ offset: at, length: Math.min(unitBytes, offset + length - at) })
    }
    return units
  }

  #settle(offset: number, regionBytes: number): void {
    this.#compared += this.#range(offset, regionBytes).length
    this.#host.compared(1)
  }

  #note({ offset, length }: Range): void {
    this.#differing += length
    const last = this.#differences[this.#differences.length - 1]
    if (last !== undefined && last.offset + last.length === offset) last.length += length
    else if (this.#differences.length < LIMITS.mirrorDifferencesKept)
      this.#differences.push({ offset, length })
  }
}
