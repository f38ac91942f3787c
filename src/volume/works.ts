import { assert } from '../base/assert.ts'
import type { Part } from './requests.ts'

/** What goes on in one format unit; the states are drawn in policy.ts. At most one in a unit. */
export interface Work {
  state: 'preparing' | 'gathering' | 'writing' | 'sharing' | 'releasing'
  readonly parts: Part[] // gathering, writing, releasing: answered when it ends
  readonly queue: Part[] // dispatched again when it ends
  readonly waiters: (() => void)[] // told when it ends
  active: number // sharing: parts being written
  covered: number // gathering: bytes that the parts bring
  heldUntil: number // gathering: waits for its neighbours until then; 0 = not held
}

export class Works {
  readonly #works = new Map<number, Work>()

  get size(): number {
    return this.#works.size
  }

  get(unit: number): Work | undefined {
    return this.#works.get(unit)
  }

  has(unit: number): boolean {
    return this.#works.has(unit)
  }

  begin(unit: number, state: Work['state'], part?: Part): Work {
    assert(!this.#works.has(unit), 'two works in one unit')
    const parts = part === undefined ? [] : [part]
    const work: Work = { state, parts, queue: [], waiters: [], active: 0, covered: 0, heldUntil: 0 }
    this.#works.set(unit, work)
    return work
  }

  /** The unit is idle again. What waits in the work's queue is the caller's to go on with. */
  end(unit: number, work: Work): void {
    assert(this.#works.get(unit) === work && work.active === 0)
    this.#works.delete(unit)
    for (const wake of work.waiters) wake()
  }

  /** Resolves when nothing goes on in the unit. */
  async idle(unit: number): Promise<void> {
    for (let busy = this.#works.get(unit); busy !== undefined; busy = this.#works.get(unit)) await ended(busy)
  }

  /** Resolves when nothing goes on in any unit from `unit` on. */
  async idleFrom(unit: number): Promise<void> {
    for (let busy = this.#busyFrom(unit); busy !== undefined; busy = this.#busyFrom(unit)) await ended(busy)
  }

  /** Resolves when every work that there is now has ended. */
  async settled(): Promise<void> {
    await Promise.all([...this.#works.values()].map(ended))
  }

  #busyFrom(unit: number): Work | undefined {
    for (const [at, work] of this.#works) if (at >= unit) return work
    return undefined
  }
}

function ended(work: Work): Promise<void> {
  return new Promise((resolve) => work.waiters.push(resolve))
}
