/**
 * A connection as a stream of bytes, and no more: what is sent is what the caller made, what arrives is read by count.
 * Every wait ends: with the bytes, with the end of the stream, or when the check's time is over.
 */
import { connect, type Socket } from 'node:net'
import type { NbdAddress } from '../../src/nbd/uri.ts'

/** The server ended the connection where bytes were due. */
export class Ended extends Error {
  override readonly name = 'Ended'
}

/** The check's time is over. */
export class Late extends Error {
  override readonly name = 'Late'
}

interface Waiting {
  readonly length: number // Infinity: all, to the end
  readonly what: string
  readonly resolve: (bytes: Buffer) => void
  readonly reject: (error: Error) => void
}

export class Wire {
  readonly #socket: Socket
  #pieces: Buffer[] = []
  #have = 0
  #waiting: Waiting | undefined
  #over: Ended | Late | undefined

  static async connect(address: NbdAddress): Promise<Wire> {
    const target =
      address.transport === 'unix' ? { path: address.path } : { host: address.host, port: address.port }
    const socket = connect(target)
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve)
      socket.once('error', reject)
    })
    return new Wire(socket)
  }

  private constructor(socket: Socket) {
    this.#socket = socket
    socket.setNoDelay(true)
    socket.on('data', (piece: Buffer) => {
      this.#pieces.push(piece)
      this.#have += piece.length
      this.#serve()
    })
    socket.on('error', () => {}) // a reset is an end as well
    socket.on('end', () => this.#end(new Ended('the server ended the connection')))
    socket.on('close', () => this.#end(new Ended('the server ended the connection')))
  }

  /** Bytes that have arrived and were not read. */
  get unread(): number {
    return this.#have
  }

  send(bytes: Buffer): void {
    if (!this.#socket.destroyed) this.#socket.write(bytes)
  }

  /** Resolves when the kernel has taken what was sent so far, or the connection is over. */
  async drained(): Promise<void> {
    if (this.#socket.destroyed || this.#socket.writableLength === 0) return
    await new Promise<void>((resolve) => {
      this.#socket.once('drain', resolve)
      this.#socket.once('close', () => resolve())
    })
  }

  /** The next `length` bytes. `what` they are, for the message when they do not come. */
  read(length: number, what: string): Promise<Buffer> {
    return new Promise((resolve, reject) => {
      this.#waiting = { length, what, resolve, reject }
      this.#serve()
    })
  }

  /** Everything up to the end of the connection. */
  readToEnd(what: string): Promise<Buffer> {
    return this.read(Number.POSITIVE_INFINITY, what)
  }

  expire(): void {
    this.#over = new Late('the time is over') // also where the stream ended: nobody waits any more
    this.#serve()
    this.#socket.destroy()
  }

  /** Cuts the connection without a word. */
  destroy(): void {
    this.#socket.destroy()
  }

  #end(reason: Ended): void {
    this.#over ??= reason
    this.#serve()
  }

  #serve(): void {
    const waiting = this.#waiting
    if (waiting === undefined) return
    if (this.#over instanceof Late) {
      this.#waiting = undefined
      waiting.reject(new Late(`waiting for ${waiting.what}`))
    } else if (this.#have >= waiting.length || (waiting.length === Infinity && this.#over !== undefined)) {
      this.#waiting = undefined
      waiting.resolve(this.#take(Math.min(waiting.length, this.#have)))
    } else if (this.#over !== undefined) {
      this.#waiting = undefined
      waiting.reject(new Ended(`the server ended the connection instead of sending ${waiting.what}`))
    }
  }

  #take(length: number): Buffer {
    const all = this.#pieces.length === 1 && this.#pieces[0] ? this.#pieces[0] : Buffer.concat(this.#pieces)
    const rest = all.subarray(length)
    this.#pieces = rest.length === 0 ? [] : [rest]
    this.#have = rest.length
    return all.subarray(0, length)
  }
}
