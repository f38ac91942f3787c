import { EventEmitter } from 'node:events'
import type { Socket } from 'node:net'
import { HEADER, MAGIC } from '../../src/nbd/constants.ts'
import type { Process } from './process.ts'

/**
 * A connection between a client and the datapath without a kernel: bytes arrive when the schedule says so, in pieces of any
 * size. `server` is what the datapath gets: the calls of net.Socket that it makes.
 */
export class SimSocket {
  readonly #process: Process
  readonly #id: number
  readonly #server = new EventEmitter()
  readonly #onData: (bytes: Buffer) => void
  readonly #onEnd: () => void
  #toServer: Buffer[] = []
  #toClient: { bytes: Buffer; sent: (() => void) | undefined }[] = []
  #paused = true
  #delivering = false
  #sending = false
  #ending: (() => void) | undefined
  #destroyed = false

  constructor(process: Process, id: number, onData: (bytes: Buffer) => void, onEnd: () => void) {
    this.#process = process
    this.#id = id
    this.#onData = onData
    this.#onEnd = onEnd
  }

  get server(): Socket {
    const self = this
    const calls = {
      allowHalfOpen: false,
      readableEnded: false,
      get destroyed() {
        return self.#destroyed
      },
      setNoDelay() {},
      setTimeout() {},
      on: (name: string, listener: (...given: unknown[]) => void) => self.#server.on(name, listener),
      pause() {
        self.#paused = true
      },
      resume() {
        self.#paused = false
        self.#deliverLater()
      },
      cork() {},
      uncork() {},
      write(bytes: Buffer, sent?: () => void) {
        self.#toClient.push({ bytes, sent })
        self.#sendLater()
        return true
      },
      end(finished?: () => void) {
        self.#ending = finished ?? (() => {})
        self.#sendLater()
      },
      destroy() {
        self.#destroy()
      },
    }
    // The datapath sees no more of a socket than this.
    return calls as unknown as Socket
  }

  /** The client sends. */
  send(bytes: Buffer): void {
    if (this.#destroyed) return
    this.#toServer.push(bytes)
    this.#deliverLater()
  }

  /** The client hangs up, whatever is on its way. */
  hangUp(): void {
    this.#destroy()
  }

  #deliverLater(): void {
    if (this.#delivering || this.#paused || this.#toServer.length === 0) return
    this.#delivering = true
    this.#process.event('request', this.#id, () => {
      this.#delivering = false
      if (this.#paused || this.#destroyed) return
      const [first = Buffer.alloc(0), ...rest] = this.#toServer
      const { random } = this.#process
      let piece = random.below(4) === 0 ? Buffer.concat(this.#toServer) : first
      this.#toServer = piece === first ? rest : []
      if (random.below(8) === 0 && piece.length > 1) {
        const cut = 1 + random.below(piece.length - 1)
        this.#toServer.unshift(piece.subarray(cut))
        piece = piece.subarray(0, cut)
      }
      this.#server.emit('data', Buffer.from(piece))
      this.#deliverLater()
    })
  }

  #sendLater(): void {
    if (this.#sending || this.#destroyed) return
    this.#sending = true
    this.#process.event('reply', this.#id, () => {
      this.#sending = false
      if (this.#destroyed) return
      const next = this.#toClient.shift()
      if (next !== undefined) {
        // Copied when it leaves, not when it was handed over: until then the bytes have to stay what they are.
        const bytes = Buffer.from(next.bytes)
        next.sent?.()
        this.#onData(bytes)
      } else if (this.#ending !== undefined) {
        const finished = this.#ending
        this.#ending = undefined
        finished()
        return
      }
      if (this.#toClient.length > 0 || this.#ending !== undefined) this.#sendLater()
    })
  }

  #destroy(): void {
    if (this.#destroyed) return
    this.#destroyed = true
    this.#toServer = []
    this.#process.event('close', this.#id, () => {
      for (const { sent } of this.#toClient.splice(0)) sent?.()
      this.#server.emit('close')
      this.#onEnd()
    })
  }
}

/** Called once: with errno and, for a read that succeeded, its data. Never called where the connection ends before. */
export type Answered = (errno: number, data: Buffer) => void

interface Outstanding {
  readonly readLength: number
  readonly answered: Answered
}

/** A client that speaks NBD with simple replies. */
export class SimClient {
  readonly #socket: SimSocket
  readonly #outstanding = new Map<number, Outstanding>()
  readonly #onLost: () => void
  #received = Buffer.alloc(0)
  #cookie = 0
  lost = false

  /** @param onLost the connection has ended; what is outstanding will not be answered */
  constructor(process: Process, id: number, onLost: () => void) {
    this.#onLost = onLost
    this.#socket = new SimSocket(
      process,
      id,
      (bytes) => this.#receive(bytes),
      () => this.#end(),
    )
  }

  get server(): Socket {
    return this.#socket.server
  }

  get outstanding(): number {
    return this.#outstanding.size
  }

  request(
    command: number,
    flags: number,
    offset: number,
    length: number,
    payload: Buffer | undefined,
    answered: Answered,
  ): void {
    const cookie = ++this.#cookie
    const header = Buffer.alloc(HEADER.request)
    header.writeUInt32BE(MAGIC.request, 0)
    header.writeUInt16BE(flags, 4)
    header.writeUInt16BE(command, 6)
    header.writeUInt32BE(cookie, 12)
    header.writeUInt32BE(offset, 20)
    header.writeUInt32BE(length, 24)
    this.#outstanding.set(cookie, { readLength: command === 0 ? length : 0, answered })
    this.#socket.send(payload === undefined ? header : Buffer.concat([header, payload]))
  }

  hangUp(): void {
    this.#socket.hangUp()
  }

  #receive(bytes: Buffer): void {
    this.#received = this.#received.length === 0 ? Buffer.from(bytes) : Buffer.concat([this.#received, bytes])
    let at = 0
    while (this.#received.length - at >= HEADER.simpleReply) {
      if (this.#received.readUInt32BE(at) !== MAGIC.simpleReply)
        throw new Error('the reply stream is out of step')
      const errno = this.#received.readUInt32BE(at + 4)
      const cookie = this.#received.readUInt32BE(at + 12)
      const request = this.#outstanding.get(cookie)
      if (request === undefined) throw new Error(`a reply to no request: cookie ${cookie}`)
      const end = at + HEADER.simpleReply + (errno === 0 ? request.readLength : 0)
      if (end > this.#received.length) break
      const data = this.#received.subarray(at + HEADER.simpleReply, end)
      at = end
      this.#outstanding.delete(cookie)
      request.answered(errno, data)
    }
    this.#received = this.#received.subarray(at)
  }

  #end(): void {
    if (this.lost) return
    this.lost = true
    this.#onLost()
  }
}
