/**
 * Further plain TCP connections between the two ends of a session, for something that is no frames. Who listens gives out a token over
 * the session; who dials says it first:
 *
 *   from the dialling side   | "FSside-1" | token, 32 bytes |
 *   from the listening side  one byte, 1: from here on the connection is its taker's
 *
 * A token is good once, and for a short time. Whoever can read it could read and change the session itself, which is plain TCP, too:
 * over TLS there are no side wires.
 */
import { randomBytes } from 'node:crypto'
import type { Socket } from 'node:net'
import { LIMITS } from '../base/limits.ts'
import { DirectSocket } from './direct-socket.ts'
import { LinkError } from './errors.ts'

export type SideWires =
  | { readonly side: 'dials'; dial(token: string): Promise<Socket> }
  | { readonly side: 'listens'; expect(): ExpectedWire }

export interface ExpectedWire {
  readonly token: string // hexadecimal
  /** Paused, with nothing unread. @throws LinkError LATE; CLOSED where it was cancelled before it came */
  readonly socket: Promise<Socket>
  /** Nobody wants it any more: it is destroyed where it has come, and not let in from now on. */
  cancel(): void
}

const MAGIC = Buffer.from('FSside-1', 'latin1')
const TOKEN_BYTES = 32
const HELLO_BYTES = MAGIC.length + TOKEN_BYTES
const WELCOME = Buffer.from([1])

interface Expectation {
  readonly resolve: (socket: Socket) => void
}

/** The listening side's. */
export class SideDoor {
  readonly #expected = new Map<string, Expectation>()
  readonly #ms: number

  constructor(ms: number = LIMITS.handshakeMsMax) {
    this.#ms = ms
  }

  /** @throws LinkError OVERFLOW */
  expect(): ExpectedWire {
    if (this.#expected.size >= LIMITS.linkHandshakesMax) {
      throw new LinkError('OVERFLOW', 'too many further connections are waited for')
    }
    const token = randomBytes(TOKEN_BYTES).toString('hex')
    let giveUp = (_reason: LinkError): void => {}
    const socket = new Promise<Socket>((resolve, reject) => {
      giveUp = (reason) => {
        clearTimeout(timer)
        this.#expected.delete(token)
        reject(reason)
      }
      const timer = setTimeout(
        () => giveUp(new LinkError('LATE', 'a further connection of the session did not come in time')),
        this.#ms,
      )
      this.#expected.set(token, {
        resolve: (taken) => {
          clearTimeout(timer)
          resolve(taken)
        },
      })
    })
    const cancel = (): void => {
      if (this.#expected.has(token))
        giveUp(new LinkError('CLOSED', 'nobody waits for this further connection any more'))
      socket.then(
        (taken) => taken.destroy(),
        () => {}, // it did not come
      )
    }
    socket.catch(() => {}) // perhaps nobody waits any more
    return { token, socket, cancel }
  }

  /**
   * Looks at the first bytes of a connection that nobody has read from.
   * @returns undefined where it was one of these, and is taken; else what was read of it
   * @throws LinkError HUNG_UP, LATE, NO_SESSION; it is destroyed then
   */
  async take(socket: Socket): Promise<Buffer | undefined> {
    const first = await readSome(socket, MAGIC.length, this.#ms)
    if (!first.subarray(0, MAGIC.length).equals(MAGIC)) return first
    const rest = HELLO_BYTES - first.length
    const hello = rest <= 0 ? first : Buffer.concat([first, await readSome(socket, rest, this.#ms)])
    const token = hello.subarray(MAGIC.length).toString('hex')
    const expectation = this.#expected.get(token)
    if (expectation === undefined) {
      socket.destroy()
      throw new LinkError('NO_SESSION', 'nobody waits for this further connection of a session')
    }
    this.#expected.delete(token)
    socket.write(WELCOME, () => expectation.resolve(socket))
    return undefined
  }
}

/** Resolves when the other side has taken the connection, which is paused then. @throws LinkError HUNG_UP, LATE, NO_SESSION */
export async function sayToken(socket: Socket, token: string): Promise<void> {
  socket.on('error', () => undefined)
  socket.write(Buffer.concat([MAGIC, Buffer.from(token, 'hex')]))
  const welcome = await readSome(socket, WELCOME.length, LIMITS.handshakeMsMax)
  if (welcome.equals(WELCOME)) return
  socket.destroy()
  throw new LinkError('NO_SESSION', 'the peer does not take a further connection')
}

/** At least `count` bytes; it is paused then. @throws LinkError HUNG_UP, LATE; it is destroyed then */
function readSome(socket: Socket, count: number, ms: number): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const parts: Buffer[] = []
    let length = 0
    const settle = (): void => {
      clearTimeout(timer)
      socket.pause()
      socket.off('data', onData)
      socket.off('end', onEnd)
      socket.off('close', onEnd)
    }
    const fail = (error: LinkError): void => {
      settle()
      socket.destroy()
      reject(error)
    }
    const onEnd = (): void =>
      fail(new LinkError('HUNG_UP', 'the connection ended before it said what it is for'))
    const onData = (chunk: Buffer): void => {
      parts.push(chunk)
      length += chunk.length
      if (length < count) return
      settle()
      resolve(Buffer.concat(parts))
    }
    const timer = setTimeout(
      () =>
        fail(
          new LinkError(
            'LATE',
            `the handshake was not done after ${ms} ms: the connection did not say what it is for`,
          ),
        ),
      ms,
    )
    if (socket instanceof DirectSocket) {
      socket.readInto({
        room: () => Buffer.allocUnsafe(count),
        arrived: (room, bytes) => onData(Buffer.from(room.slice(0, bytes))),
      })
    } else {
      socket.on('data', onData)
    }
    socket.once('end', onEnd)
    socket.once('close', onEnd)
    socket.resume()
  })
}
