/**
 * A TCP socket that puts what arrives where it belongs: the reader of the stream names the place of the next bytes before they
 * are read. Other streams give chunks of 64 KiB, each new memory, that have to be put together.
 */
import { Socket, type SocketConstructorOpts } from 'node:net'
import { assert } from '../base/assert.ts'

export interface Inbox {
  /** Where the next bytes go. Never empty; it stays the socket's until something has `arrived`. */
  room(): Buffer
  /** `length` bytes came to the beginning of `room`: the last one, or one of the socket's own that it does not use again. */
  arrived(room: Uint8Array, length: number): void
}

/** For what arrives before somebody says where it goes: the socket asks for a place when it is made. */
const FIRST_BYTES = 4096

export class DirectSocket extends Socket {
  readonly #place: { inbox?: Inbox }

  /** @param handle of an accepted socket, which is the new one's from here on; without, it is to be connected */
  constructor(handle?: object) {
    const place: { inbox?: Inbox } = {}
    const onread = {
      buffer: (): Uint8Array => place.inbox?.room() ?? Buffer.allocUnsafeSlow(FIRST_BYTES),
      callback: (length: number, room: Uint8Array): boolean => {
        assert(place.inbox !== undefined, 'nothing is read before somebody says where it goes')
        place.inbox.arrived(room, length)
        return true
      },
    }
    const options: SocketConstructorOpts & { onread: object; handle?: object } =
      handle === undefined ? { onread } : { onread, handle }
    super(options)
    this.#place = place
    this.setNoDelay(true)
  }

  /**
   * Takes the place of a socket that was accepted and not read from. Node.js offers that to its own modules only; where it has changed, the
   * socket is returned as it is.
   */
  static over(socket: Socket): Socket {
    const handle: unknown = Reflect.get(socket, '_handle')
    if (typeof handle !== 'object' || handle === null || !('useUserBuffer' in handle)) return socket
    Reflect.set(socket, '_handle', null)
    const direct = new DirectSocket(handle)
    direct.pause()
    direct.once('close', () => socket.destroy()) // its server counts it until then
    return direct
  }

  /** Says where everything goes, from here on. The socket is paused. */
  readInto(inbox: Inbox): void {
    this.#place.inbox = inbox
  }
}
