import { messageOf, type StoreError } from '../base/errors.ts'
import type { Upcall } from '../datapath/datapath.ts'
import type { Volume } from '../volume/volume.ts'
import { type Remote, RemoteError } from './remote.ts'

/**
 * Requests that go to both sides at once, while the sides are equal. When the session ends, those that were not answered over there count
 * as changed here, in that turn, and go on alone; or (`block`) they are answered when the sides are equal again.
 */
export interface ForwarderHost {
  /** The sides may differ there. */
  changed(offset: number, length: number): void
  /** The other side failed a request. */
  refused(reason: string): void
}

interface Under {
  readonly offset: number
  readonly length: number
  readonly resolve: () => void
  readonly reject: (error: StoreError) => void
}

export class Forwarder {
  readonly #volume: Volume
  readonly #host: ForwarderHost
  #remote: Remote | undefined
  readonly #under = new Set<Under>()
  #blocked: { readonly resolve: () => void; readonly reject: (error: StoreError) => void }[] = []
  count = 0

  constructor(volume: Volume, host: ForwarderHost) {
    this.#volume = volume
    this.#host = host
  }

  get following(): boolean {
    return this.#remote !== undefined
  }

  /** The sides are equal, and no request is under way. */
  follow(remote: Remote): void {
    this.#remote = remote
    this.unblock()
  }

  forward(upcall: Upcall): Promise<void> {
    const remote = this.#remote
    if (remote === undefined) return this.#block()
    const { id, kind, flags, offset, length } = upcall
    if (kind !== 'write' && kind !== 'trim' && kind !== 'zero') return Promise.resolve()
    this.count++
    return new Promise((resolve, reject) => {
      const under: Under = { offset, length, resolve, reject }
      this.#under.add(under)
      const payload = (from: number, target: Buffer): void => this.#volume.readPayload(id, from, target)
      remote.apply({ kind, offset, length, flags, payload }).then(
        () => {
          if (this.#under.delete(under)) resolve()
        },
        (error: unknown) => {
          if (!(error instanceof RemoteError)) throw error
          // The end of the session has seen to it (`stop`), or is about to.
          if (error.fate === 'lost' || !this.#under.has(under)) return
          this.#host.refused(messageOf(error))
        },
      )
    })
  }

  flush(): Promise<void> {
    const remote = this.#remote
    if (remote === undefined) return this.#block()
    return new Promise((resolve, reject) => {
      const under: Under = { offset: 0, length: 0, resolve, reject }
      this.#under.add(under)
      remote.flush().then(
        () => {
          if (this.#under.delete(under)) resolve()
        },
        (error: unknown) => {
          if (!(error instanceof RemoteError)) throw error
          if (error.fate === 'lost' || !this.#under.has(under)) return
          this.#host.refused(messageOf(error))
        },
      )
    })
  }

  /** Both sides go on alone from here. @param block whoever waits goes on waiting */
  stop(block: boolean): void {
    this.#remote?.abandon()
    this.#remote = undefined
    const all = [...this.#under]
    this.#under.clear()
    for (const { offset, length } of all) if (length > 0) this.#host.changed(offset, length)
    for (const { resolve, reject } of all) {
      if (block) this.#blocked.push({ resolve, reject })
      else resolve()
    }
  }

  /** Whoever waited for the other side to come back is answered; with an error where it will not come. */
  unblock(error?: StoreError): void {
    for (const { resolve, reject } of this.#blocked.splice(0)) {
      if (error === undefined) resolve()
      else reject(error)
    }
  }

  #block(): Promise<void> {
    return new Promise((resolve, reject) => this.#blocked.push({ resolve, reject }))
  }
}
