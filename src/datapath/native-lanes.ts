import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import type { ExportId, Lanes, SessionId } from './datapath.ts'
import { type Binding, COMMAND_WORD, type NativeHandle } from './native-binding.ts'
import { descriptorOf } from './socket-descriptor.ts'

/** What the lanes of the native datapath need of the rest of it. */
export interface NativeLanesHost {
  /** What was asked for before crosses now. */
  flush(): void
  put(kind: number, id: number): void
  end(session: SessionId): void
}

/** Where one export stands. */
interface LaneState {
  forwards: boolean
  lanesOnly: boolean
  set: LaneSet | undefined // that have not all ended
}

export class NativeLanes implements Lanes {
  readonly width: number
  readonly #binding: Binding
  readonly #handle: NativeHandle
  readonly #host: NativeLanesHost
  readonly #states = new Map<ExportId, LaneState>()
  readonly #sets = new Map<number, LaneSet>() // by lane
  #next = 1

  constructor(binding: Binding, handle: NativeHandle, width: number, host: NativeLanesHost) {
    this.#binding = binding
    this.#handle = handle
    this.width = width
    this.#host = host
  }

  open(id: ExportId, sockets: readonly Socket[], onEnd: () => void): void {
    const state = this.#stateOf(id)
    assert(state.set === undefined, 'lanes of an export that has some')
    assert(sockets.length === this.width, 'a lane for each thread')
    const set = new LaneSet(sockets.length, onEnd, () => {
      state.set = undefined
    })
    state.set = set
    this.#host.flush() // what was asked for before belongs before
    sockets.forEach((socket, thread) => {
      const lane = this.#next++
      this.#sets.set(lane, set)
      set.ids.push(lane)
      if (!this.#openOne(id, lane, thread, socket)) {
        this.#sets.delete(lane)
        queueMicrotask(() => set.ended())
      }
      socket.on('error', () => {}) // as for sessions
      socket.destroy()
    })
  }

  async drop(id: ExportId): Promise<void> {
    const set = this.#states.get(id)?.set
    if (set === undefined) return
    for (const lane of set.ids) this.#host.put(COMMAND_WORD.dropLane, lane)
    await set.dropped
  }

  forward(id: ExportId, on: boolean): void {
    this.#stateOf(id).forwards = on
    this.#tell(id)
  }

  restrict(id: ExportId, on: boolean): void {
    this.#stateOf(id).lanesOnly = on
    this.#tell(id)
  }

  hold(id: ExportId, offset: number, length: number): boolean {
    return this.#binding.holdBlocks(this.#handle, id, offset, length)
  }

  release(id: ExportId, offset: number, length: number): void {
    this.#binding.releaseBlocks(this.#handle, id, offset, length)
  }

  busy(id: ExportId, offset: number, length: number): boolean {
    return this.#binding.blocksBusy(this.#handle, id, offset, length)
  }

  end(session: SessionId): void {
    this.#host.end(session)
  }

  /** The addon says so of one. */
  ended(lane: number): void {
    const set = this.#sets.get(lane)
    assert(set !== undefined, 'the end of no lane')
    this.#sets.delete(lane)
    set.ended()
  }

  /** The export is closed: all of its lanes have ended. */
  forget(id: ExportId): void {
    assert(this.#states.get(id)?.set === undefined, 'an export is closed before its lanes have ended')
    this.#states.delete(id)
  }

  #stateOf(id: ExportId): LaneState {
    const known = this.#states.get(id)
    if (known !== undefined) return known
    const state: LaneState = { forwards: false, lanesOnly: false, set: undefined }
    this.#states.set(id, state)
    return state
  }

  #tell(id: ExportId): void {
    const { forwards, lanesOnly } = this.#stateOf(id)
    this.#binding.setLanes(this.#handle, id, forwards, lanesOnly)
  }

  /** False where the socket is closed, or there is no descriptor left: that is the end of a lane like others. */
  #openOne(id: ExportId, lane: number, thread: number, socket: Socket): boolean {
    const fd = descriptorOf(socket)
    if (socket.destroyed || fd < 0) return false
    try {
      this.#binding.openLane(this.#handle, id, lane, thread, fd)
      return true
    } catch {
      return false
    }
  }
}

/** The lanes of one export. */
class LaneSet {
  readonly ids: number[] = []
  readonly dropped: Promise<void>
  #resolve: () => void = () => undefined
  #left: number
  #onEnd: (() => void) | undefined
  readonly #onDropped: () => void

  constructor(count: number, onEnd: () => void, onDropped: () => void) {
    this.#left = count
    this.#onEnd = onEnd
    this.#onDropped = onDropped
    this.dropped = new Promise((resolve) => {
      this.#resolve = resolve
    })
  }

  /** One of them. */
  ended(): void {
    const onEnd = this.#onEnd
    this.#onEnd = undefined
    this.#left--
    assert(this.#left >= 0, 'a lane ends twice')
    if (this.#left === 0) {
      this.#onDropped()
      this.#resolve()
    }
    onEnd?.()
  }
}
