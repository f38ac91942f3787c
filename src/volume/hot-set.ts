import { assert } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { IntentMap } from '../metadata/intents.ts'
import { CHANGE, type Change } from '../metadata/journal.ts'

/**
 * The regions of a pool that may be changed at present (DESIGN section 4), bounded, of all volumes that need intents.
 *
 *   (cold) -> marking -> hot <-> idle -> cooling -> (cold)        any -> gone, when the volume or its need ends
 *                         ^________________|
 *
 *   cold      not in the set. Direct bits are 0, so that a change is an upcall, which waits until the region is hot
 *   marking   the mark is in the journal, or about to be, and is not durable yet
 *   hot       the mark is durable: changes go to the members; direct bits of formatted stripes are 1
 *   idle      as hot, but the direct bits were cleared, to see whether anybody comes: whoever does makes it hot again at
 *             once, without any I/O. The direct bits are the reference bits of a clock; the datapath pays nothing for it
 *   cooling   nobody came. It is waited for accesses that began before the bits were cleared (barrier), then for a flush. Who
 *             comes meanwhile makes it hot again
 *   gone      forgotten; whoever still holds it only lets it go
 *
 * Order of heating: record, journal synced, changes. All marks that wait together share a frame and a sync.
 * Order of cooling: direct bits cleared, barrier, members and maps synced, record (of which nobody waits until it is durable: a
 * stale mark is only conservative), cold. While a part of a request holds a region (`pins`), it does not cool.
 *
 * The number of marks on the disk has the same bound as the set: a place is free when the `cool` is in the journal, and what
 * is recorded into that place later reaches the disk no earlier.
 *
 * A region where a write is on its way to the other side of a mirror, or where that side may still lose one, or of which a mirror has noted
 * something that is not recorded yet (`isBusy`), does not cool either: after a crash nobody would know that the sides may differ there. That is
 * looked at in the turn in which the `cool` is recorded, so records made before come before it in the journal. Nobody waits for a peer, who may
 * take long, as long as another region can cool.
 */
export type RegionState = 'marking' | 'hot' | 'idle' | 'cooling' | 'gone'

const NEXT: Record<RegionState, readonly RegionState[]> = {
  marking: ['hot', 'gone'],
  hot: ['idle', 'gone'],
  idle: ['hot', 'cooling', 'gone'],
  cooling: ['hot', 'idle', 'gone'],
  gone: [],
}

export interface HotSetHost {
  record(changes: readonly Change[], apply: () => void): Promise<unknown>
  /** What was recorded is durable. */
  harden(): Promise<void>
  barrier(): Promise<void>
  flush(): Promise<void>
  /** Syncs as they begin, and the latest that made everything before it durable (ledger.ts). */
  syncsBegun(): number
  lastSync(): number
  onTrouble(message: string): void
}

/** What a volume does with the direct bits of a region. */
export interface RegionOwner {
  readonly map: IntentMap
  /** Sets those that may be set. */
  open(region: number): void
  clear(region: number): void
  isClear(region: number): boolean
  /** Whether the mark is needed for more than requests: for something that a barrier does not wait for. */
  isBusy(region: number): boolean
  /** Resolves when what it is needed for at the call is over. @throws StoreError it will not be, for now */
  settled(): Promise<void>
  /** A part that held it is done. */
  unpin(region: Region): void
  /** It is in the set no more. */
  forget(region: Region): void
}

export interface HotSetOptions {
  readonly regionsMax?: number
  readonly coolMs?: number
}

export class Region {
  readonly owner: RegionOwner
  readonly index: number
  state: RegionState = 'marking'
  /** Parts of requests that are about to change it, or do. */
  pins = 0
  /** Syncs that had begun when the last in-place write was over: a later one covers it. Infinity while that is not known. */
  quietAt = Number.POSITIVE_INFINITY

  constructor(owner: RegionOwner, index: number) {
    this.owner = owner
    this.index = index
  }

  enter(next: RegionState): void {
    assert(NEXT[this.state].includes(next), `region ${this.index}: ${this.state} -> ${next}`)
    this.state = next
  }
}

/** A place in the set that is waited for. */
interface Waiter {
  readonly go: () => void
  readonly fail: (error: StoreError) => void
}

export class HotSet {
  readonly regionsMax: number
  readonly #host: HotSetHost
  readonly #coolMs: number
  readonly #coolAbove: number // places: more than these, and some cool before the set is full
  readonly #batch: number // regions that cool together then
  readonly #regions = new Set<Region>() // in the order of the clock: its hand is at the first
  #taken = 0 // places: regions of the set, and those whose `cool` is not recorded yet
  readonly #waiting: Waiter[] = []
  readonly #marking = new Set<Promise<void>>()
  readonly #wanted = new Set<'room' | 'sweep'>()
  readonly #settling = new Map<RegionOwner, Promise<void>>() // one an owner
  #working: Promise<void> | undefined
  #timer: NodeJS.Timeout | undefined
  #closed = false

  constructor(host: HotSetHost, options: HotSetOptions = {}) {
    const { regionsMax = LIMITS.hotRegionsMax, coolMs = LIMITS.hotRegionCoolMs } = options
    assert(regionsMax >= 1 && regionsMax <= LIMITS.hotRegionsLimit, 'bound of the hot set')
    this.#host = host
    this.regionsMax = regionsMax
    this.#coolMs = coolMs
    this.#coolAbove = regionsMax - Math.ceil(regionsMax / 8)
    this.#batch = Math.ceil(regionsMax / 16)
  }

  /** Whether a region may be added that nobody waits for: no other has to cool for it. */
  get roomy(): boolean {
    return this.#taken < this.#coolAbove
  }

  /** Adds a region. It is hot when this resolves, unless it was dropped. @throws StoreError; it is gone then */
  mark(region: Region): Promise<void> {
    const marked = this.#mark(region)
    const settled: Promise<void> = marked
      .catch(() => {}) // the caller's to see
      .then(() => {
        this.#marking.delete(settled)
      })
    this.#marking.add(settled)
    return marked
  }

  /** Somebody is about to change it: from here to `unpin` it stays hot. Not for one that is being marked. */
  pin(region: Region): void {
    assert(region.state !== 'marking', 'a region is held before its mark is durable')
    if (region.state !== 'hot') {
      region.enter('hot')
      region.owner.open(region.index)
    }
    region.pins++
  }

  unpin(region: Region): void {
    region.pins--
    assert(region.pins >= 0, 'a region is let go more often than it was held')
    if (region.pins === 0 && this.#waiting.length > 0) this.#want('room')
  }

  /** A region whose mark was durable before this set existed. */
  adopt(region: Region): void {
    region.enter('hot')
    region.enter('idle')
    this.#taken++
    this.#regions.add(region)
    this.#plan()
  }

  /** Forgets a region, whatever its state. The caller sees to what the disk says of it. */
  drop(region: Region): void {
    if (this.#forget(region)) this.#leave()
  }

  /** Resolves when nothing of the set is under way; the volumes are closed by now. */
  async close(): Promise<void> {
    this.#closed = true
    clearTimeout(this.#timer)
    while (this.#marking.size > 0) await Promise.all(this.#marking)
    await this.#working
  }

  async #mark(region: Region): Promise<void> {
    const { owner, index } = region
    const change = { op: CHANGE.hot, medium: owner.map.medium, first: index, count: 1, slot: 0 }
    try {
      await this.#takePlace(region)
      if (isGone(region)) return
      await this.#host.record([change], () => owner.map.apply(change))
      await this.#host.harden()
    } catch (error) {
      this.drop(region)
      throw error
    }
    if (isGone(region)) return // dropped meanwhile
    region.enter('hot')
    owner.open(index)
    if (this.#waiting.length > 0) this.#want('room') // perhaps it was the only one that can cool
    this.#plan()
  }

  async #takePlace(region: Region): Promise<void> {
    while (this.#taken >= this.regionsMax) {
      this.#want('room')
      await new Promise<void>((go, fail) => this.#waiting.push({ go, fail }))
    }
    if (isGone(region)) {
      this.#waiting.shift()?.go() // the place is the next one's
      return
    }
    this.#taken++
    this.#regions.add(region)
    if (this.#taken > this.#coolAbove) this.#want('room')
  }

  #want(what: 'room' | 'sweep'): void {
    this.#wanted.add(what)
    this.#working ??= this.#work()
  }

  /** One thing at a time; what is wanted meanwhile comes after it. */
  async #work(): Promise<void> {
    for (;;) {
      const [what] = this.#wanted
      if (what === undefined) break
      this.#wanted.delete(what)
      try {
        await (what === 'room' ? this.#makeRoom() : this.#sweep())
      } catch (error) {
        if (!(error instanceof StoreError)) throw error // our own bug: stop
        this.#host.onTrouble(`regions do not cool: ${messageOf(error)}`)
        // Whoever waits for a place would wait for good.
        for (const { fail } of this.#waiting.splice(0)) fail(error)
      }
    }
    this.#working = undefined
  }

  #plan(): void {
    if (this.#timer !== undefined || this.#closed) return
    this.#timer = setTimeout(() => this.#want('sweep'), this.#coolMs).unref()
  }

  /** Now and then the direct bits of all regions are cleared; those that nobody has come to by the next time cool. */
  async #sweep(): Promise<void> {
    this.#timer = undefined
    const victims: Region[] = []
    const rested: Region[] = []
    for (const region of this.#regions) {
      if (region.pins > 0) continue
      if (region.state === 'idle') victims.push(region)
      if (region.state === 'hot') rested.push(region)
    }
    try {
      await this.#coolRegions(victims)
      for (const region of rested) this.#rest(region)
      if (rested.length === 0) return
      await this.#host.barrier()
      const quietAt = this.#host.syncsBegun()
      for (const region of rested) {
        if (region.state === 'idle' && !isBusy(region)) region.quietAt = quietAt
      }
    } finally {
      if (this.#regions.size > 0) this.#plan()
    }
  }

  /**
   * The clock: from its hand on, regions that are idle cool, and those that are hot become idle, for the time when the hand comes
   * by again. Where too few were idle, the first of the others have to do, whose chance is the time that a flush takes. Where there are
   * none but those that were busy, it waits until one of their volumes has settled.
   */
  async #makeRoom(): Promise<void> {
    const busy = new Set<Region>() // since the last that cooled
    do {
      const victims: Region[] = []
      const rested: Region[] = []
      for (let steps = this.#regions.size; steps > 0; steps--) {
        const [region] = this.#regions
        if (region === undefined || victims.length >= this.#batch || rested.length >= 4 * this.#batch) break
        this.#regions.delete(region)
        this.#regions.add(region)
        if (region.pins > 0 || busy.has(region)) continue
        if (region.state === 'idle') victims.push(region)
        if (region.state === 'hot' && this.#rest(region)) rested.push(region)
      }
      victims.push(...rested.slice(0, this.#batch - victims.length))
      if (victims.length > 0) {
        await this.#coolRegions(victims)
        if (victims.some(isGone)) busy.clear()
        for (const region of victims) if (region.state === 'idle' && isBusy(region)) busy.add(region)
      } else if (busy.size > 0) {
        if (this.#waiting.length > 0) await this.#settlingOf([...busy])
        busy.clear()
      } else {
        return // all are held: `unpin` comes back to it
      }
    } while (this.#waiting.length > 0)
  }

  /** Resolves when one of their owners has settled. */
  #settlingOf(regions: readonly Region[]): Promise<void> {
    for (const { owner } of regions) {
      if (this.#settling.has(owner)) continue
      this.#settling.set(
        owner,
        owner.settled().finally(() => this.#settling.delete(owner)),
      )
    }
    return Promise.race(regions.map(({ owner }) => this.#settling.get(owner)))
  }

  /** @returns whether it could be done */
  #rest(region: Region): boolean {
    if (region.state !== 'hot' || region.pins > 0) return false
    region.owner.clear(region.index)
    region.enter('idle')
    region.quietAt = Number.POSITIVE_INFINITY
    return true
  }

  /** Cools those of them that nobody comes to meanwhile. @throws StoreError */
  async #coolRegions(victims: readonly Region[]): Promise<void> {
    const host = this.#host
    const cooling = victims.filter(({ state }) => state === 'idle')
    for (const region of cooling) region.enter('cooling')
    try {
      if (cooling.some(({ quietAt }) => quietAt >= host.lastSync())) {
        await host.barrier()
        for (const region of cooling) if (region.state === 'cooling' && isBusy(region)) region.enter('idle')
        if (cooling.some(({ state }) => state === 'cooling')) await host.flush()
      }
    } catch (error) {
      for (const region of cooling) if (region.state === 'cooling') region.enter('idle')
      throw error
    }
    for (const region of cooling) if (region.state === 'cooling' && isBusy(region)) region.enter('idle')
    const cold = cooling.filter(({ state }) => state === 'cooling')
    if (cold.length === 0) return
    for (const region of cold) {
      assert(region.pins === 0, 'a region cools while it is held')
      assert(region.owner.isClear(region.index), 'a region cools while writes go in place')
      // Whoever comes from now on marks it again, and that record follows the one made here. The place is taken until then.
      this.#forget(region)
    }
    const changes = coolChanges(cold)
    try {
      await host.record(
        changes.map(({ change }) => change),
        () => {
          for (const { owner, change } of changes) owner.map.apply(change)
        },
      )
    } finally {
      // Where that failed the disk says that they are hot, which does no harm: they cool with the pool.
      for (const _ of cold) this.#leave()
    }
  }

  /** @returns whether it had a place, which is the caller's to give back */
  #forget(region: Region): boolean {
    if (region.state === 'gone') return false
    region.enter('gone')
    region.owner.forget(region)
    return this.#regions.delete(region)
  }

  /** A place is free. */
  #leave(): void {
    this.#taken--
    assert(this.#taken >= this.#regions.size, 'places of the hot set')
    this.#waiting.shift()?.go()
  }
}
function isGone({ state }: Region): boolean {
  return state === 'gone'
}

function isBusy({ owner, index }: Region): boolean {
  return owner.isBusy(index)
}

/** Neighbours of one volume as one record. */
function coolChanges(regions: readonly Region[]): { owner: RegionOwner; change: Change }[] {
  const sorted = [...regions].sort((a, b) => a.owner.map.medium - b.owner.map.medium || a.index - b.index)
  const changes: { owner: RegionOwner; change: Change }[] = []
  for (const { owner, index } of sorted) {
    const last = changes[changes.length - 1]
    if (last?.owner === owner && last.change.first + last.change.count === index) {
      last.change = { ...last.change, count: last.change.count + 1 }
    } else {
      const change = { op: CHANGE.cool, medium: owner.map.medium, first: index, count: 1, slot: 0 }
      changes.push({ owner, change })
    }
  }
  return changes
}
