import { connect, type Socket } from 'node:net'
import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { HandshakeRun } from './client-handshake.ts'
import { formatNbdUri, type NbdUri } from './uri.ts'

/**
 * Opens a socket to an NBD URI and runs one handshake over it, within one deadline for both. After it the socket is
 * paused; the bytes that came after the handshake are returned with its result.
 */

/** `sun_path` holds 108 bytes; the last is NUL. */
const UNIX_PATH_BYTES_MAX = 107

export interface Connected<Result> {
  readonly socket: Socket
  readonly result: Result
  readonly leftover: Buffer
}

/**
 * @param handshake made by a function of client-handshake.ts
 * @param msMax for connecting and the handshake together
 * @throws UserError UNREACHABLE (nobody there, or no answer in time), REFUSED (TLS), and what the handshake throws
 */
export function connectAndNegotiate<Result>(
  uri: NbdUri,
  handshake: ConstructorParameters<typeof HandshakeRun<Result>>[0],
  msMax: number = LIMITS.handshakeMsMax,
): Promise<Connected<Result>> {
  const where = formatNbdUri({ ...uri, parameters: new Map() })
  const socket = openSocket(uri, where)
  return new Promise((resolve, reject) => {
    let run: HandshakeRun<Result> | undefined
    const settle = (): void => {
      clearTimeout(timer)
      socket.off('connect', onConnect).off('data', onData).off('error', onError).off('close', onClose)
      // Never without a listener: what was written last may still fail, and an unheard error ends the process.
      socket.on('error', () => undefined)
    }
    const fail = (error: Error): void => {
      settle()
      socket.destroy()
      reject(error)
    }
    const unreachable = (reason: string, cause?: Error): void => {
      fail(new UserError('UNREACHABLE', `${where}: ${reason}`, { cause }))
    }
    const receive = (chunk: Buffer): void => {
      try {
        run ??= new HandshakeRun(handshake, (bytes) => socket.write(bytes))
        const finished = run.receive(chunk)
        if (finished === undefined) return
        socket.pause()
        settle()
        resolve({ socket, result: finished.value, leftover: finished.leftover })
      } catch (error) {
        fail(prefixed(error, where))
      }
    }
    const onConnect = (): void => receive(Buffer.alloc(0))
    const onData = (chunk: Buffer): void => receive(chunk)
    const onError = (error: Error): void => unreachable(messageOf(error), error)
    const onClose = (): void => unreachable('the server closed the connection during the handshake')
    const timer = setTimeout(() => unreachable(`no answer within ${msMax} ms`), msMax)
    socket.on('connect', onConnect).on('data', onData).on('error', onError).on('close', onClose)
  })
}

function openSocket(uri: NbdUri, where: string): Socket {
  if (uri.tls) throw new UserError('REFUSED', `${where}: TLS is not supported yet; use nbd:// or nbd+unix://`)
  const { address } = uri
  if (address.transport === 'tcp') {
    if (address.port === 0) throw new UserError('USAGE', `${where}: port 0 cannot be connected to`)
    return connect({ host: address.host, port: address.port, noDelay: true })
  }
  const bytes = Buffer.byteLength(address.path)
  if (bytes > UNIX_PATH_BYTES_MAX) {
    const limit = `the system allows ${UNIX_PATH_BYTES_MAX}`
    throw new UserError(
      'USAGE',
      `${where}: the socket path has ${bytes} bytes, ${limit}; use a relative path`,
    )
  }
  return connect({ path: address.path })
}

/** The same error with the server's address before its message; anything that is no error stays what it is. */
function prefixed(error: unknown, where: string): Error {
  if (!(error instanceof Error)) return new Error(String(error))
  error.message = `${where}: ${error.message}`
  return error
}
