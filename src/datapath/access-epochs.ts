import { assert } from '../base/assert.ts'

/**
 * Counts member accesses that are under way, so that a barrier can wait for those that began before it and for
 * no later one. Accesses belong to the epoch in which they began; a barrier closes the current epoch, and
 * resolves when that epoch and all earlier ones are empty. Steady traffic can therefore not starve a barrier.
 *
 *   oldest ... [2 under way] [0] [7 under way] current
 *              ^ first                          ^ last
 */
export interface Epoch {
  underWay: number
  readonly waiting: (() => void)[] // barriers that wait for this epoch and those before it
}

export class AccessEpochs {
  readonly #epochs: Epoch[] = [{ underWay: 0, waiting: [] }]

  begin(): Epoch {
    const epoch = this.#current()
    epoch.underWay++
    return epoch
  }

  end(epoch: Epoch): void {
    assert(epoch.underWay > 0, 'an access ended twice')
    epoch.underWay--
    if (epoch.underWay === 0 && epoch === this.#epochs[0]) this.#advance()
  }

  /** Resolves when every access that began before this call has ended. */
  barrier(): Promise<void> {
    const current = this.#current()
    if (current.underWay === 0 && this.#epochs.length === 1) return Promise.resolve()
    return new Promise((resolve) => {
      current.waiting.push(resolve)
      this.#epochs.push({ underWay: 0, waiting: [] })
      this.#advance()
    })
  }

  #current(): Epoch {
    const epoch = this.#epochs.at(-1)
    assert(epoch !== undefined)
    return epoch
  }

  #advance(): void {
    for (
      let first = this.#epochs[0];
      this.#epochs.length > 1 && first?.underWay === 0;
      first = this.#epochs[0]
    ) {
      this.#epochs.shift()
      for (const resolve of first.waiting) resolve()
    }
  }
}
