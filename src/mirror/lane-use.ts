import type { Socket } from 'node:net'
import type { Volume } from '../volume/volume.ts'
import { type Remote, RemoteError } from './remote.ts'

/**
 * The lanes of a volume (volume/lanes.ts), while they are those of one mirror. Where they cannot be had (another mirror has them, one of
 * the sides has none, TLS), every request is forwarded by this program.
 */
interface Counts {
  readonly writes: number
  readonly bytes: number
}

/** A request and its reply, beside the data. */
const WIRE_BYTES = 28

export class LaneUse {
  readonly #volume: Volume
  #sockets: readonly Socket[] = [] // that are not in use yet
  #before: Counts | undefined // what the volume counted when they were opened
  #earlier: Counts = { writes: 0, bytes: 0 }

  constructor(volume: Volume) {
    this.#volume = volume
  }

  /** Whether a direct bit stands for both sides. */
  get open(): boolean {
    return this.#before !== undefined
  }

  /** Connections, for `begin`. @throws RemoteError lost */
  async prepare(remote: Remote): Promise<void> {
    this.forget()
    const { lanes } = this.#volume
    if (lanes.width === 0 || lanes.open) return
    await lanes.closed()
    try {
      this.#sockets = await remote.lanes(lanes.width)
    } catch (error) {
      // It is no reason to do without the mirror.
      if (!(error instanceof RemoteError) || error.fate === 'lost') throw error
    }
  }

  /** The sides are equal, and no request is under way. @param onEnd once, unless `end` comes first */
  begin(onEnd: () => void): void {
    const { lanes } = this.#volume
    const sockets = this.#sockets
    this.#sockets = []
    if (sockets.length !== lanes.width || sockets.length === 0 || !lanes.none) {
      for (const socket of sockets) socket.destroy()
      return
    }
    lanes.begin(sockets, () => {
      if (this.open) onEnd()
    })
    this.#before = this.#counts()
  }

  /** Destroys what was prepared and is not used. */
  forget(): void {
    for (const socket of this.#sockets) socket.destroy()
    this.#sockets = []
  }

  /** In the turn in which the sides part: what is on its way comes back to the volume's policy. */
  end(): void {
    if (this.#before === undefined) return
    this.#earlier = this.#sum()
    this.#before = undefined
    void this.#volume.lanes.close()
  }

  writes(): number {
    return this.#sum().writes
  }

  wireBytes(): number {
    const { writes, bytes } = this.#sum()
    return bytes + WIRE_BYTES * writes
  }

  #counts(): Counts {
    const { laneWrites, laneBytes } = this.#volume.info().counters
    return { writes: laneWrites, bytes: laneBytes }
  }

  #sum(): Counts {
    const { writes, bytes } = this.#earlier
    if (this.#before === undefined) return this.#earlier
    const now = this.#counts()
    return {
      writes: writes + now.writes - this.#before.writes,
      bytes: bytes + now.bytes - this.#before.bytes,
    }
  }
}
