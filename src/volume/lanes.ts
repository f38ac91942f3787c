import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import type { Datapath, ExportId, Upcall } from '../datapath/datapath.ts'

/**
 * The lanes of one volume (datapath.ts, Lanes): the datapath's own way to write on both sides of a mirror.
 *
 *   primary     none -> open -> closing -> none      writes go on lanes, or are upcalls
 *   secondary   none -> serving -> closing -> none   nobody but lanes writes in place
 *
 * Concurrency rules:
 *  1. They are opened while the volume is quiet. From then on a direct bit means "in place here, and on a lane".
 *  2. Closing clears the direct bits in the turn in which it begins. What is set later is set by the rules of the time after: so writes go
 *     in place alone only where somebody has noted that the other side lacks them.
 *  3. Requests of the policy that go to both sides keep lanes out of their range (`claim`), from before they begin until they are answered.
 */
export interface LanesHost {
  readonly datapath: Pick<Datapath, 'lanes' | 'barrier' | 'serve'>
  exportId(): ExportId
  clearDirect(): void
}

const NOTHING = Buffer.alloc(0)

export class VolumeLanes {
  readonly #host: LanesHost
  #state: 'none' | 'open' | 'serving' | 'closing' = 'none'
  #closing: Promise<void> = Promise.resolve()
  #shut = false // the export is about to be closed
  #sessions: { readonly id: number; readonly closed: Promise<void> }[] = []
  readonly #claimed = new Set<number>() // upcalls

  constructor(host: LanesHost) {
    this.#host = host
  }

  /** Sockets that `open` and `serve` take; 0 where the datapath has no lanes. */
  get width(): number {
    return this.#host.datapath.lanes?.width ?? 0
  }

  /** Whether direct bits of a mirrored volume may be set: its writes go on lanes. */
  get open(): boolean {
    return this.#state === 'open'
  }

  /** Whether direct bits of a secondary may be set. */
  get serving(): boolean {
    return this.#state === 'serving'
  }

  /** Whether they may be opened or served. */
  get none(): boolean {
    return this.#state === 'none' && !this.#shut
  }

  /** Whether there are some that are about to end. */
  get closing(): boolean {
    return this.#state === 'closing'
  }

  /** Resolves when there are none, and none are about to end. */
  closed(): Promise<void> {
    return this.#closing
  }

  /** The volume is quiet. @param onEnd as in Lanes.open: `close` follows, in that turn */
  begin(sockets: readonly Socket[], onEnd: () => void): void {
    const { lanes } = this.#host.datapath
    assert(lanes !== undefined && this.#state === 'none', 'lanes are opened where there are none')
    lanes.open(this.#host.exportId(), sockets, onEnd)
    lanes.forward(this.#host.exportId(), true)
    this.#state = 'open'
  }

  /** Resolves when `serve` may be called, on a volume that takes no writes of clients. */
  async settle(): Promise<void> {
    await this.#closing
    this.#host.clearDirect()
    await this.#host.datapath.barrier()
  }

  /** Sessions of a peer that is allowed to write from now on. */
  serve(sockets: readonly Socket[]): void {
    const { datapath } = this.#host
    assert(datapath.lanes !== undefined && this.none, 'lanes are served where there are none')
    datapath.lanes.restrict(this.#host.exportId(), true)
    this.#state = 'serving'
    this.#sessions = sockets.map((socket) => {
      let onClose = (): void => undefined
      const closed = new Promise<void>((resolve) => {
        onClose = resolve
      })
      const id = datapath.serve(this.#host.exportId(), {
        socket,
        received: NOTHING,
        mode: 'simple',
        contexts: [],
        readOnly: false,
        lane: true,
        onClose,
      })
      return { id, closed }
    })
  }

  /** Resolves when no lane writes any more: on a primary what was on its way has come back by then. */
  close(): Promise<void> {
    if (this.#state === 'open' || this.#state === 'serving') {
      const close = this.#state === 'open' ? this.#closeOpen() : this.#closeServing()
      this.#state = 'closing'
      this.#closing = close.then(() => {
        this.#state = 'none'
      })
    }
    return this.#closing
  }

  /** The same, for good: before the export is closed. */
  async shut(): Promise<void> {
    this.#shut = true
    await this.close()
  }

  async #closeOpen(): Promise<void> {
    const { datapath } = this.#host
    this.#host.clearDirect()
    await datapath.lanes?.drop(this.#host.exportId())
    await datapath.barrier()
    datapath.lanes?.forward(this.#host.exportId(), false)
  }

  async #closeServing(): Promise<void> {
    const { datapath } = this.#host
    this.#host.clearDirect()
    for (const { id } of this.#sessions) datapath.lanes?.end(id)
    await Promise.all(this.#sessions.map(({ closed }) => closed))
    this.#sessions = []
    await datapath.barrier()
    datapath.lanes?.restrict(this.#host.exportId(), false)
  }

  /** Whether a write of the range that began before a barrier is on a lane, or has come back and is not answered. */
  busy(offset: number, length: number): boolean {
    if (this.#state !== 'open' && this.#state !== 'closing') return false // what has come back is held by the policy
    return this.#host.datapath.lanes?.busy(this.#host.exportId(), offset, length) === true
  }

  /** Resolves when no write is in place, or on a lane, that began before; what comes back has come back. */
  settled(): Promise<void> {
    return this.#host.datapath.barrier(this.#host.exportId())
  }

  /** Keeps lanes out of the upcall's range until `leave`. @returns what is to be waited for, if anything */
  claim({ id, offset, length }: Upcall): Promise<void> | undefined {
    if (this.#state !== 'open' || this.#claimed.has(id)) return undefined
    this.#claimed.add(id)
    const taken = this.#host.datapath.lanes?.hold(this.#host.exportId(), offset, length)
    return taken === true ? this.settled() : undefined
  }

  leave({ id, offset, length }: Upcall): void {
    if (this.#claimed.size > 0 && this.#claimed.delete(id))
      this.#host.datapath.lanes?.release(this.#host.exportId(), offset, length)
  }
}
