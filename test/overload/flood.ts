import { readdirSync, readFileSync } from 'node:fs'
import type { Socket } from 'node:net'
import { connectAndNegotiate } from '../../src/nbd/client-connection.ts'
import { openExport } from '../../src/nbd/client-handshake.ts'
import { parseNbdUri } from '../../src/nbd/uri.ts'
import { encodeRequest, type WireRequest } from '../support/wire-client.ts'

/** Clients with bad manners, and what a daemon's process takes up. */
export interface FloodOptions {
  /** Whether replies are read. */
  readonly reads?: boolean
}

/** A connection in simple mode that says whatever it is told to, and counts the bytes that come back. */
export class Flood {
  readonly socket: Socket
  received = 0 // bytes
  #onData: () => void = () => {}

  static async connect(uri: string, options: FloodOptions = {}): Promise<Flood> {
    const parsed = parseNbdUri(uri)
    const handshake = openExport(parsed.exportName, { mode: 'simple', contexts: [] })
    const { socket, leftover } = await connectAndNegotiate(parsed, handshake)
    const flood = new Flood(socket, options.reads ?? true)
    flood.received += leftover.length
    return flood
  }

  private constructor(socket: Socket, reads: boolean) {
    this.socket = socket
    socket.on('error', () => {}) // `close` follows
    socket.on('close', () => this.#onData())
    if (!reads) {
      socket.pause()
      return
    }
    socket.on('data', (bytes: Buffer) => {
      this.received += bytes.length
      this.#onData()
    })
    socket.resume()
  }

  get closed(): boolean {
    return this.socket.destroyed
  }

  /** Resolves when the kernel has taken all of it, or the connection is over. */
  send(bytes: Buffer): Promise<void> {
    return new Promise((resolve) => {
      this.socket.write(bytes, () => resolve())
    })
  }

  /** Resolves when so many bytes have come back, or the connection is over. */
  async until(bytes: number): Promise<void> {
    while (this.received < bytes && !this.closed) {
      await new Promise<void>((resolve) => {
        this.#onData = resolve
      })
    }
  }

  /** Called with every piece that comes back. */
  set onData(listener: () => void) {
    this.#onData = listener
  }

  destroy(): void {
    this.socket.destroy()
  }
}

export function requests(list: readonly WireRequest[]): Buffer {
  return Buffer.concat(list.map((request) => encodeRequest(request, 'simple')))
}

/** Bytes of the header of a simple reply. */
export const REPLY = 16

export interface Usage {
  readonly resident: number // bytes
  readonly descriptors: number
  readonly threads: number
}

export function usageOf(pid: number): Usage {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const field = (name: string): number => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(status)?.[1])
  return {
    resident: field('VmRSS') * 1024,
    descriptors: readdirSync(`/proc/${pid}/fd`).length,
    threads: field('Threads'),
  }
}
