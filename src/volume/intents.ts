import { assert } from '../base/assert.ts'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize } from '../base/sizes.ts'
import { type IntentMap, regionUnitsOf } from '../metadata/intents.ts'
import type { IntentsRecord } from '../metadata/records.ts'
import { type HotSet, Region, type RegionOwner } from './hot-set.ts'

/**
 * The intents of one volume, for its policy: every change of content is announced before it goes to a member, and later to a
 * mirror. A change is a first write, a write in place, a zeroing or a trim; what the background formatter does is none, because a
 * stripe reads the same before and after it. A first write is one although it needs no intent for itself (before its record is
 * durable the stripe counts as unformatted): others may have got the data by then.
 *
 * Announced means: the region's mark is durable (hot-set.ts). Regions that somebody writes to one after the other are
 * announced ahead, so that a sequential fill waits for a sync now and then, not in every region.
 */
export interface IntentsTarget {
  /** Sets the direct bits of formatted units of [first, first + count) that nothing else keeps clear. */
  openUnits(first: number, count: number): void
  clearUnits(first: number, count: number): void
  areClear(first: number, count: number): boolean
  /** Whether a mirror needs the intents still: of a write that began before a barrier and is on its way to the other side, for example. */
  areBusy(first: number, count: number): boolean
  /** Resolves when what they are needed for at the call is over. @throws StoreError it will not be, for now */
  settled(): Promise<void>
}

/** Who needs intents when the operator has asked for them. */
export const OPERATOR = 'operator'

/** The record of a volume that somebody needs intents of. @param regionSize bytes. @throws UserError USAGE */
export function newIntents(
  need: string,
  unitBytes: number,
  regionSize: number | undefined,
  what: string,
): IntentsRecord {
  const { intentRegionBytesMin: min, intentRegionBytesMax: max, intentRegionBytes: usual } = LIMITS
  const size = regionSize ?? usual
  if (!Number.isSafeInteger(size) || size < min || size > max) {
    const range = `${approximateSize(min)} to ${approximateSize(max)}`
    throw new UserError('USAGE', `${what}: the size of a region has to be ${range}, not ${size}`)
  }
  return { regionUnits: regionUnitsOf(unitBytes, size), needs: [need], stops: 0, since: null }
}

/** Regions that are announced together with one of a sequential fill. */
const REGIONS_AHEAD = 8

interface Entry {
  readonly region: Region
  readonly marked: Promise<void>
}

export class VolumeIntents implements RegionOwner {
  readonly map: IntentMap
  readonly #set: HotSet
  readonly #target: IntentsTarget
  readonly #regions = new Map<number, Entry>()
  /** Regions that were announced since the volume was opened. */
  announced = 0

  constructor(set: HotSet, map: IntentMap, target: IntentsTarget) {
    this.#set = set
    this.map = map
    this.#target = target
    for (const index of map.hot()) {
      const region = new Region(this, index)
      this.#regions.set(index, { region, marked: Promise.resolve() })
      set.adopt(region)
    }
  }

  /** Whether writes to the unit may go in place with no decision (DESIGN invariant 1). */
  isHot(unit: number): boolean {
    return this.#regions.get(this.map.regionOf(unit))?.region.state === 'hot'
  }

  /** The region of the unit, which stays hot until `unpin`; undefined where it has to be announced first. */
  tryPin(unit: number): Region | undefined {
    const region = this.#regions.get(this.map.regionOf(unit))?.region
    if (region === undefined || region.state === 'marking') return undefined
    this.#set.pin(region)
    return region
  }

  /** The region of the unit, hot until `unpin`. @throws StoreError as `announce` */
  async pin(unit: number): Promise<Region> {
    for (;;) {
      const region = this.tryPin(unit)
      if (region !== undefined) return region
      await this.announce(unit, false)
    }
  }

  unpin(region: Region): void {
    this.#set.unpin(region)
  }

  /**
   * Resolves when the region of the unit was made hot; it may have cooled again by the time somebody looks.
   * @param ahead whether the regions behind it are about to be written to, too
   * @throws StoreError when the mark could not be made durable: nothing in the region may be changed
   */
  announce(unit: number, ahead: boolean): Promise<void> {
    const index = this.map.regionOf(unit)
    const entry = this.#regions.get(index) ?? this.#mark(index)
    for (let next = index + 1; ahead && next <= index + REGIONS_AHEAD; next++) {
      if (next >= this.map.regionCount || this.#regions.has(next) || !this.#set.roomy) break
      this.#mark(next).marked.catch(() => {}) // nobody waits for it yet; who does announces it again
    }
    return entry.marked
  }

  /** Forgets the regions from `from` on. What the disk says of them is the caller's to change. */
  drop(from = 0): void {
    for (const [index, { region }] of [...this.#regions]) if (index >= from) this.#set.drop(region)
  }

  // ---- for the hot set ---------------------------------------------------------------------------------------

  open(region: number): void {
    this.#target.openUnits(region * this.map.regionUnits, this.map.regionUnits)
  }

  clear(region: number): void {
    this.#target.clearUnits(region * this.map.regionUnits, this.map.regionUnits)
  }

  isClear(region: number): boolean {
    return this.#target.areClear(region * this.map.regionUnits, this.map.regionUnits)
  }

  isBusy(region: number): boolean {
    return this.#target.areBusy(region * this.map.regionUnits, this.map.regionUnits)
  }

  settled(): Promise<void> {
    return this.#target.settled()
  }

  forget(region: Region): void {
    const entry = this.#regions.get(region.index)
    assert(entry?.region === region, 'a region that nobody has')
    this.#regions.delete(region.index)
  }

  #mark(index: number): Entry {
    const region = new Region(this, index)
    const entry = { region, marked: this.#set.mark(region) }
    this.#regions.set(index, entry)
    this.announced++
    return entry
  }
}
