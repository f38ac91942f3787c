import { assert } from '../base/assert.ts'
import type { Upcall } from '../datapath/datapath.ts'
import { type Entry, Overlaps } from './overlaps.ts'

/**
 * The way in for requests that change something: they begin in the order of arrival, except
 *
 *   held      while the volume is being made quiet: nothing begins
 *   waiting   where somebody else does every request, too: behind those before them that they overlap with
 */
export interface ArrivalHost {
  /** Keeps others than the policy from doing what overlaps with the request. @returns what it has to wait for first */
  claim(upcall: Upcall): Promise<void> | undefined
  /** The request begins; `leave` follows when it is answered. */
  begin(upcall: Upcall, entry: Entry | undefined): void
  /** Whether requests that overlap have to keep their order. Changes only while nothing begins. */
  keepsOrder(): boolean
  /** Some have begun that did not come with a batch. */
  begun(): void
}

interface Arrival {
  readonly upcall: Upcall
  readonly entry: Entry | undefined
}

export class Arrivals {
  readonly #host: ArrivalHost
  readonly #overlaps = new Overlaps()
  #held: Arrival[] | undefined

  constructor(host: ArrivalHost) {
    this.#host = host
  }

  /** Whether nothing begins at present. */
  get holding(): boolean {
    return this.#held !== undefined
  }

  /** Whether there is none that has begun and keeps its order, or waits. */
  get idle(): boolean {
    return this.#held === undefined && this.#overlaps.size === 0
  }

  arrive(upcall: Upcall): void {
    this.#enter({ upcall, entry: undefined })
  }

  leave(entry: Entry | undefined): void {
    if (entry !== undefined) this.#overlaps.leave(entry)
  }

  hold(): void {
    assert(this.#held === undefined, 'the volume is made quiet twice')
    this.#held = []
  }

  release(): void {
    const held = this.#held ?? []
    this.#held = undefined
    for (const arrival of held) this.#enter(arrival)
    this.#host.begun()
  }

  #enter(arrival: Arrival): void {
    if (this.#held !== undefined) {
      this.#held.push(arrival)
      return
    }
    const { upcall } = arrival
    let { entry } = arrival
    if (entry === undefined && this.#host.keepsOrder()) {
      const own: Entry = this.#overlaps.enter(upcall.offset, upcall.length, () => {
        this.#enter({ upcall, entry: own })
        this.#host.begun()
      })
      if (own.blockers > 0) return
      entry = own
    }
    const wait = entry === undefined ? undefined : this.#host.claim(upcall)
    if (wait === undefined) {
      this.#host.begin(upcall, entry)
      return
    }
    wait.then(() => {
      this.#enter({ upcall, entry })
      this.#host.begun()
    })
  }
}
