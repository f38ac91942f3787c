import { messageOf, type StoreError } from '../base/errors.ts'
import type { Upcall } from '../datapath/datapath.ts'
import type { Volume } from '../volume/volume.ts'
import type { Forwarding } from '../volume/watchers.ts'
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
  /** The other side has it, or it counts as changed. */
  readonly known: () => void
  readonly resolve: () => void
  readonly reject: (error: StoreError) => void
}

const FLAG_FAST_ZERO = 1 << 4

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

  forward(upcall: Upcall, offset: number, length: number): Forwarding | undefined {
    const remote = this.#remote
    // What is not in step counts as changed already.
    if (remote === undefined) {
      const answered = this.#block()
      answered.catch(() => {}) // it is waited for when this side has it
      return { answered, known: Promise.resolve() }
    }
    const { id, kind, flags } = upcall
    if (kind !== 'write' && kind !== 'trim' && kind !== 'zero') return undefined
    this.count++
    let known = (): void => {}
    const isKnown = new Promise<void>((resolve) => {
      known = resolve
    })
    const answered = new Promise<void>((resolve, reject) => {
      const under: Under = { offset, length, known, resolve, reject }
      this.#under.add(under)
      const before = offset - upcall.offset
      const payload = (from: number, target: Buffer): void =>
        this.#volume.readPayload(id, before + from, target)
      // Whether zeros are fast is decided here: the other side does what this one has begun.
      remote.apply({ kind, offset, length, flags: flags & ~FLAG_FAST_ZERO, payload }).then(
        () => {
          if (!this.#under.delete(under)) return
          known()
          resolve()
        },
        (error: unknown) => {
          if (!(error instanceof RemoteError)) throw error
          // The end of the session has seen to it (`stop`), or is about to.
          if (error.fate === 'lost' || !this.#under.has(under)) return
          this.#host.refused(messageOf(error))
        },
      )
    })
    answered.catch(() => {}) // it is waited for when this side has it
    return { answered, known: isKnown }
  }

  flush(): Promise<void> {
    const remote = this.#remote
    if (remote === undefined) return this.#block()
    return new Promise((resolve, reject) => {
      const under: Under = { offset: 0, length: 0, known: () => {}, resolve, reject }
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
    for (const { known, resolve, reject } of all) {
      known()
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
