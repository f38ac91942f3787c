/**
 * Makes the path of a unix socket free to listen on, without ever taking it from somebody who lives: what lies there is
 * removed only if it is a socket that refuses connections, which is what a killed daemon leaves behind.
 *
 * Two daemons that start at once cannot both win: the second to bind gets EADDRINUSE from the system.
 */
import { lstatSync, unlinkSync } from 'node:fs'
import { connect } from 'node:net'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { socketAddress } from './socket-path.ts'

export interface ClaimedSocketPath {
  /** What to listen on: the path, or a short name for one that is longer than a socket address may be. */
  readonly path: string
  /** After the server is closed: removes the socket where that has not happened. */
  release(): void
  /** When nothing came to listen on it. */
  abandon(): void
}

/** How long a socket's owner may take to accept before it counts as living. */
const PROBE_MS_MAX = 1000

/** @throws UserError BUSY when somebody listens there, EXISTS when no socket is in the way, FAILED */
export async function claimSocketPath(path: string): Promise<ClaimedSocketPath> {
  if (path.startsWith('\0')) {
    // The abstract namespace has no files: the system frees a name with its last descriptor.
    return { path, release: () => undefined, abandon: () => undefined }
  }
  const found = lstatSync(path, { throwIfNoEntry: false })
  if (found !== undefined) {
    if (!found.isSocket()) {
      throw new UserError(
        'EXISTS',
        `${path} is in the way and is no socket: move it elsewhere or choose another`,
      )
    }
    if (await isLiving(path)) {
      throw new UserError('BUSY', `cannot listen on ${path}: another server listens there`)
    }
    removeSocket(path)
  }
  let address: ReturnType<typeof socketAddress>
  try {
    address = socketAddress(path)
  } catch (error) {
    throw new UserError('FAILED', `cannot listen on ${path}: ${messageOf(error)}`, { cause: error })
  }
  return {
    path: address.path,
    release: () => {
      // Node removes the socket as its server closes, except where it cannot because the address was shortened.
      if (address.path !== path) removeSocket(path)
      address.release()
    },
    abandon: () => address.release(),
  }
}

function removeSocket(path: string): void {
  try {
    unlinkSync(path)
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return
    throw new UserError('FAILED', `cannot remove the old socket ${path}: ${messageOf(error)}`, {
      cause: error,
    })
  }
}

/** Only a refused connection proves that nobody is there; in doubt the socket stays. */
function isLiving(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const address = socketAddress(path)
    const socket = connect({ path: address.path })
    const done = (living: boolean): void => {
      clearTimeout(timer)
      socket.destroy()
      address.release()
      resolve(living)
    }
    const timer = setTimeout(() => done(true), PROBE_MS_MAX)
    socket.once('connect', () => done(true))
    socket.once('error', (error) => {
      const code = systemCode(error)
      done(code !== 'ECONNREFUSED' && code !== 'ENOENT')
    })
  })
}
