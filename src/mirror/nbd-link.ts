import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Backoff } from '../link/backoff.ts'
import type { NbdRemote } from './nbd-remote.ts'

/**
 * The sessions of a mirror with its NBD export, one after the other, until it is closed.
 *
 *   connecting -> session -> (lost) waiting -> connecting      waiting -> (retry) connecting      any -> closed
 */
export interface NbdLinkHost {
  /** @throws UserError */
  open(): Promise<NbdRemote>
  attach(remote: NbdRemote): void
  /** There is no session, for that reason. */
  refused(reason: string): void
  /** The export may have lost what it had answered to. */
  missed(offset: number, length: number): void
}

export class NbdLink {
  readonly #host: NbdLinkHost
  readonly #backoff: Backoff
  #remote: NbdRemote | undefined
  #wake: (() => void) | undefined
  #closed = false
  #run: Promise<void> = Promise.resolve()

  constructor(host: NbdLinkHost, backoff = new Backoff()) {
    this.#host = host
    this.#backoff = backoff
  }

  /** @param first a session that stands already */
  start(first?: NbdRemote): void {
    this.#run = this.#sessions(first)
  }

  /** At once, where it waits for the next attempt. */
  retry(): void {
    this.#backoff.reset()
    this.#wake?.()
  }

  /** Resolves when the last session is over. One that is being opened is closed when it stands. */
  async close(reason: string): Promise<void> {
    this.#closed = true
    this.#wake?.()
    if (this.#remote === undefined) return
    this.#remote.close(reason)
    await this.#run
  }

  async #sessions(first: NbdRemote | undefined): Promise<void> {
    let remote = first ?? (await this.#open())
    while (!this.#closed) {
      if (remote !== undefined) await this.#session(remote)
      await this.#pause()
      remote = this.#closed ? undefined : await this.#open()
    }
    remote?.close('the mirror is closed')
  }

  async #session(remote: NbdRemote): Promise<void> {
    const since = performance.now()
    this.#remote = remote
    const over = remote.ended.then(() => {
      for (const { offset, length } of remote.doubtful()) this.#host.missed(offset, length)
    })
    this.#host.attach(remote)
    await over
    await remote.closed
    this.#remote = undefined
    if (performance.now() - since >= LIMITS.linkStableMs) this.#backoff.reset()
  }

  async #open(): Promise<NbdRemote | undefined> {
    try {
      return await this.#host.open()
    } catch (error) {
      if (!(error instanceof UserError)) throw error
      if (!this.#closed) this.#host.refused(messageOf(error))
      return undefined
    }
  }

  async #pause(): Promise<void> {
    if (this.#closed) return
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, this.#backoff.next())
      this.#wake = () => {
        clearTimeout(timer)
        resolve()
      }
    })
    this.#wake = undefined
  }
}
