/**
 * One connection between two daemons: frames in, frames out, over any byte stream (TCP, TLS, a simulated one).
 *
 *   open --> leaving --> gone         leaving: the last words are on their way, nothing is taken any more
 *     |                   ^
 *     +-------------------+
 *
 * What always holds:
 *  - It ends once, with a LinkError that says why: told to the handler at once, while the stream may still say goodbye. Nothing that a
 *    peer sends ends more than its own connection.
 *  - Frames leave in the order of the calls. Those of one turn leave in one write: small ones are copied next to each other, large
 *    payloads are handed over where they lie, so they have to stay unchanged until they are acknowledged.
 *  - One write at a time. While the system takes no more, frames gather. Messages are bounded by the window; a peer that makes
 *    us answer on and on and takes none of the answers is cut off when as much again has gathered.
 *  - Every frame carries the acknowledgement of what has come, so that talk in both directions needs no others. Where only one
 *    side talks, the other acknowledges each quarter of the window, and at every tick.
 *  - Life. At each of four ticks in `silenceMs` a ping is sent. A tick since which nothing has arrived counts as
 *    silent; four in a row end the connection. Ticks are counted, not compared with a clock: a process that was stopped for
 *    a minute counts one, and has read what waited for it before the next.
 */
import type { Duplex } from 'node:stream'
import { assert } from '../base/assert.ts'
import { type Clock, systemClock } from '../base/clock.ts'
import { messageOf, systemCode } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { crc32c } from './crc32c.ts'
import { DirectSocket } from './direct-socket.ts'
import { LinkError } from './errors.ts'
import {
  FRAME_HEADER_SIZE,
  type Frame,
  FrameReader,
  KIND,
  type Kind,
  type Phase,
  writeHeader,
} from './frame.ts'
import { decodeReason, encodeReason } from './hello.ts'
import { ReceiveWindow, SendWindow } from './window.ts'

export interface ConnectionOptions {
  readonly clock?: Clock
  /** Bytes that the peer may have on their way to us. */
  readonly window?: number
  readonly silenceMs?: number
  /** What was read of the stream before. */
  readonly received?: Buffer
}

export interface ConnectionHandler {
  /** A frame that is not the connection's own business. @throws LinkError ends the connection */
  onFrame(frame: Frame): void
  /** There may be room for frames where there was none. */
  onRoom(): void
  /** Called once. Nothing is sent or delivered any more. */
  onEnd(reason: LinkError): void
}

export interface ConnectionCounters {
  bytesIn: number // of the stream; TLS and TCP add theirs
  bytesOut: number
  framesIn: number
  framesOut: number
}

export type ConnectionState = 'open' | 'leaving' | 'gone'

const NEXT: Record<ConnectionState, readonly ConnectionState[]> = {
  open: ['leaving', 'gone'],
  leaving: ['gone'],
  gone: [],
}

const NO_PARTS: readonly Uint8Array[] = []
const TICKS_TO_SILENCE = 4
const SLAB_BYTES = 64 * 1024
/** Payloads up to this are copied into the slab: cheaper than one more piece in a write. */
const COPY_BYTES_MAX = 8 * 1024

export class Connection {
  readonly counters: ConnectionCounters = { bytesIn: 0, bytesOut: 0, framesIn: 0, framesOut: 0 }
  readonly #stream: Duplex
  readonly #clock: Clock
  readonly #tickMs: number
  readonly #silenceMs: number
  readonly #reader = new FrameReader()
  #handler: ConnectionHandler
  #state: ConnectionState = 'open'
  #paused = false
  #delivering = false
  #streamEnded = false

  readonly #sendWindow = new SendWindow(LIMITS.linkConnectionWindow)
  #receiveWindow: ReceiveWindow
  #sequence = 0

  // What gathers for the next write: pieces, then the run of the slab from #runStart to #slabAt.
  #pieces: Uint8Array[] = []
  #gathered = 0
  #slab = Buffer.allocUnsafeSlow(SLAB_BYTES)
  #runStart = 0
  #slabAt = 0
  #writing = 0 // bytes that the system has not taken yet
  #flushPlanned = false

  #cancelTick: () => void = () => undefined
  #cancelLeave: () => void = () => undefined
  #resolveGone: () => void = () => undefined
  /** Resolves when the stream is destroyed. */
  readonly gone = new Promise<void>((resolve) => {
    this.#resolveGone = resolve
  })
  #silentTicks = 0
  #heard = false
  #roundTripMs: number | undefined

  constructor(stream: Duplex, handler: ConnectionHandler, options: ConnectionOptions = {}) {
    this.#stream = stream
    this.#handler = handler
    this.#clock = options.clock ?? systemClock
    this.#silenceMs = options.silenceMs ?? LIMITS.linkSilenceMs
    this.#tickMs = this.#silenceMs / TICKS_TO_SILENCE
    this.#receiveWindow = new ReceiveWindow(options.window ?? LIMITS.linkConnectionWindow)
    if (stream instanceof DirectSocket) {
      stream.readInto({
        room: () => this.#reader.room(),
        arrived: (room, length) => this.#arrived(length, () => this.#reader.took(room, length)),
      })
    } else {
      stream.on('data', (chunk: Buffer) => this.#arrived(chunk.length, () => this.#reader.push(chunk)))
    }
    const { received } = options
    // Not before whoever makes the connection has it, and before anything that comes later.
    if (received !== undefined)
      process.nextTick(() => this.#arrived(received.length, () => this.#reader.push(received)))
    stream.on('end', () => this.#onStreamEnd())
    stream.on('error', (error: Error) => this.destroy(streamError(error)))
    stream.on('close', () => this.destroy(new LinkError('HUNG_UP', 'the connection was closed')))
    stream.resume()
  }

  /** The handshake is over: frames of the other phase, another handler, the window that the peer takes, and ticks. */
  enterSession(phase: Phase, handler: ConnectionHandler, window: number): void {
    assert(this.#state === 'open', 'an open connection enters a session')
    this.#reader.enter(phase)
    this.#handler = handler
    this.#sendWindow.resize(window)
    this.#cancelTick()
    this.#planTick()
  }

  get state(): ConnectionState {
    return this.#state
  }

  /** The time that the last ping took, there and back. */
  get roundTripMs(): number | undefined {
    return this.#roundTripMs
  }

  /** Bytes sent that the peer has not acknowledged. */
  get outstanding(): number {
    return this.#sendWindow.outstanding
  }

  /** Bytes that the system has not taken yet. */
  get queued(): number {
    return this.#writing + this.#gathered
  }

  /** Whether a frame with that payload may be sent now. Bulk leaves a quarter of the window to others, and keeps the queue short. */
  hasRoom(payloadLength: number, bulk: boolean): boolean {
    if (this.#state !== 'open') return false
    const length = FRAME_HEADER_SIZE + payloadLength
    if (!bulk) return this.#sendWindow.hasRoom(length)
    return (
      this.queued < LIMITS.linkBulkQueuedMax && this.#sendWindow.hasRoom(length, this.#sendWindow.size / 4)
    )
  }

  /**
   * Sends a frame with the next turn's write. Messages need room first (`hasRoom`); control frames are few and small, and always go.
   * The parts of the payload stay unchanged until the peer has acknowledged them.
   */
  send(
    kind: Kind,
    parts: readonly Uint8Array[] = NO_PARTS,
    fields: { flags?: number; channel?: number; type?: number; id?: number } = {},
  ): void {
    if (this.#state !== 'open') return
    this.transmit(kind, fields.flags ?? 0, fields.channel ?? 0, fields.type ?? 0, fields.id ?? 0, parts)
  }

  /** The same without the comfort, for messages. */
  transmit(
    kind: Kind,
    flags: number,
    channel: number,
    type: number,
    id: number,
    parts: readonly Uint8Array[],
  ): void {
    let length = 0
    let checksum = 0
    for (const part of parts) {
      length += part.length
      checksum = crc32c(part, checksum)
    }
    const copied = length <= COPY_BYTES_MAX ? length : 0
    if (this.#slabAt + FRAME_HEADER_SIZE + copied > SLAB_BYTES) {
      this.#closeRun()
      this.#slab = Buffer.allocUnsafeSlow(SLAB_BYTES)
      this.#runStart = 0
      this.#slabAt = 0
    }
    const acknowledged = this.#receiveWindow.tell()
    const header = { kind, flags, channel, acknowledged, type, id }
    writeHeader(this.#slab, this.#slabAt, header, this.#sequence, length, checksum)
    this.#slabAt += FRAME_HEADER_SIZE
    if (copied > 0) {
      for (const part of parts) {
        this.#slab.set(part, this.#slabAt)
        this.#slabAt += part.length
      }
    } else if (length > 0) {
      this.#closeRun()
      for (const part of parts) if (part.length > 0) this.#pieces.push(part)
    }
    const size = FRAME_HEADER_SIZE + length
    this.#sequence = (this.#sequence + 1) >>> 0
    if (this.#sendWindow.outstanding + size > 2 * this.#sendWindow.size) {
      this.destroy(new LinkError('BAD_WINDOW', 'the peer takes none of what it is sent'))
      return
    }
    this.#sendWindow.add(size)
    this.#gathered += size
    this.counters.framesOut++
    this.counters.bytesOut += size
    if (!this.#flushPlanned && this.#writing === 0) {
      this.#flushPlanned = true
      process.nextTick(() => this.#flush())
    }
  }

  /** Nothing is delivered until `resume`; what has come already waits here. */
  pause(): void {
    this.#paused = true
    this.#stream.pause()
  }

  resume(): void {
    if (this.#state !== 'open') return
    this.#paused = false
    this.#deliver()
    if (!this.#paused) this.#stream.resume()
  }

  /** Says goodbye, waits a moment until it is heard, and ends. Frames sent before are delivered first. */
  close(reason: LinkError): void {
    if (this.#state !== 'open') return
    this.send(KIND.bye, [encodeReason(reason)])
    this.leave(reason)
  }

  /** Ends after everything sent so far is written, without a further word. */
  leave(reason: LinkError): void {
    if (this.#state !== 'open') return
    this.#flush(true)
    this.#enter('leaving')
    this.#cancelTick()
    this.#cancelLeave = this.#clock.after(LIMITS.linkCloseMsMax, () => this.#disappear())
    // What the peer still says is read and dropped: unread input would turn the end into a reset, and the goodbye could be lost.
    this.#stream.resume()
    this.#stream.end()
    this.#handler.onEnd(reason)
  }

  /** Ends it at once. */
  destroy(reason: LinkError): void {
    const wasOpen = this.#state === 'open'
    this.#disappear()
    if (wasOpen) this.#handler.onEnd(reason)
  }

  #enter(next: ConnectionState): void {
    assert(NEXT[this.#state].includes(next), `connection: ${this.#state} -> ${next}`)
    this.#state = next
  }

  #disappear(): void {
    if (this.#state === 'gone') return
    this.#enter('gone')
    this.#cancelTick()
    this.#cancelLeave()
    this.#pieces = []
    this.#gathered = 0
    this.#stream.destroy()
    this.#resolveGone()
  }

  // ---- receiving

  #arrived(length: number, read: () => void): void {
    this.counters.bytesIn += length
    this.#heard = true
    if (this.#state !== 'open') return
    read()
    this.#deliver()
  }

  #deliver(): void {
    if (this.#delivering) return // a handler that resumes: the loop below goes on
    this.#delivering = true
    try {
      while (this.#state === 'open' && !this.#paused) {
        const frame = this.#reader.next()
        if (frame === undefined) break
        this.#take(frame)
      }
      if (this.#streamEnded && !this.#paused && this.#state === 'open') this.#hungUp()
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      // The peer's log should say as much as ours.
      this.close(error)
    } finally {
      this.#delivering = false
    }
    if (this.#state === 'open' && this.#receiveWindow.isDue) this.send(KIND.acknowledge)
  }

  #take(frame: Frame): void {
    const length = FRAME_HEADER_SIZE + frame.payload.length
    this.counters.framesIn++
    this.#receiveWindow.receive(length)
    this.#receiveWindow.finish(length)
    const freed = this.#sendWindow.acknowledge(frame.acknowledged)
    switch (frame.kind) {
      case KIND.acknowledge:
        break
      case KIND.ping:
        this.send(KIND.pong, [frame.payload])
        break
      case KIND.pong:
        if (frame.payload.length === 8) this.#roundTripMs = this.#clock.now() - frame.payload.readDoubleLE()
        break
      case KIND.bye: {
        const { code, message } = decodeReason(frame.payload)
        this.destroy(
          code === 'REPLACED'
            ? new LinkError(code, `another session took the place of this one: ${message}`)
            : new LinkError('GOODBYE', `the peer said goodbye: ${message}`),
        )
        return
      }
      default:
        this.#handler.onFrame(frame)
    }
    if (freed && this.#state === 'open') this.#handler.onRoom()
  }

  #onStreamEnd(): void {
    this.#streamEnded = true
    if (this.#state === 'leaving') this.#disappear()
    else this.#deliver()
  }

  #hungUp(): void {
    this.#reader.end()
    this.destroy(new LinkError('HUNG_UP', 'the peer closed the connection without a goodbye'))
  }

  // ---- sending

  #closeRun(): void {
    if (this.#slabAt > this.#runStart) this.#pieces.push(this.#slab.subarray(this.#runStart, this.#slabAt))
    this.#runStart = this.#slabAt
  }

  #flush(last = false): void {
    this.#flushPlanned = false
    if (this.#gathered === 0 || this.#state !== 'open' || (this.#writing > 0 && !last)) return
    this.#closeRun()
    const pieces = this.#pieces
    this.#pieces = []
    const length = this.#gathered
    this.#gathered = 0
    this.#writing += length
    const written = (): void => this.#written(length)
    if (pieces.length === 1) {
      this.#stream.write(pieces[0], written)
      return
    }
    this.#stream.cork()
    pieces.forEach((piece, index) => {
      if (index === pieces.length - 1) this.#stream.write(piece, written)
      else this.#stream.write(piece)
    })
    this.#stream.uncork()
  }

  #written(length: number): void {
    this.#writing -= length
    if (this.#state !== 'open') return
    this.#flush()
    if (this.queued < LIMITS.linkBulkQueuedMax) this.#handler.onRoom()
  }

  // ---- life

  #planTick(): void {
    this.#cancelTick = this.#clock.after(this.#tickMs, () => this.#tick())
  }

  #tick(): void {
    this.#silentTicks = this.#heard ? 0 : this.#silentTicks + 1
    this.#heard = false
    if (this.#silentTicks >= TICKS_TO_SILENCE) {
      this.destroy(new LinkError('SILENT', `nothing came from the peer for ${this.#silenceMs} ms`))
      return
    }
    // Also where there is traffic: it acknowledges what is left, and measures the way there and back.
    const time = Buffer.alloc(8)
    time.writeDoubleLE(this.#clock.now())
    this.send(KIND.ping, [time])
    this.#reader.trim()
    this.#planTick()
  }
}

function streamError(error: Error): LinkError {
  const code = systemCode(error)
  // The peer's TLS may refuse us after ours was content.
  const kind = code?.startsWith('ERR_SSL') ? 'TLS' : 'CUT'
  return new LinkError(kind, `the connection failed: ${messageOf(error)}`, { cause: error })
}
