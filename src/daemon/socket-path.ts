/**
 * Unix socket addresses hold 107 bytes of path. A pool may lie deeper than that: its control socket is then
 * reached through a descriptor of its directory, `/proc/self/fd/N/control.sock`, which is always short.
 */
import { closeSync, lstatSync, openSync, unlinkSync } from 'node:fs'
import { connect } from 'node:net'
import { basename, dirname } from 'node:path'
import { systemCode, UserError } from '../base/errors.ts'

export const SOCKET_PATH_BYTES_MAX = 107

export interface SocketAddress {
  readonly path: string // to listen on or connect to
  release(): void // after the listen or connect call
}

export function socketAddress(path: string): SocketAddress {
  if (Buffer.byteLength(path) <= SOCKET_PATH_BYTES_MAX) return { path, release: () => undefined }
  const directory = openSync(dirname(path), 'r')
  return { path: `/proc/self/fd/${directory}/${basename(path)}`, release: () => closeSync(directory) }
}

/**
 * Removes what a killed daemon left behind. Only call it while holding what makes a living owner impossible (the
 * pool's lock), or after `isAnswering` said no.
 * @throws UserError EXISTS when something else than a socket is in the way
 */
export function removeStaleSocket(path: string): boolean {
  try {
    if (!lstatSync(path).isSocket()) {
      throw new UserError('EXISTS', `${path} is in the way and is no socket: move it elsewhere`)
    }
    unlinkSync(path)
    return true
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return false
    throw error
  }
}

/** Whether somebody accepts connections on a unix socket. */
export function isAnswering(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const address = socketAddress(path)
    const socket = connect({ path: address.path })
    const done = (answer: boolean) => {
      socket.destroy()
      address.release()
      resolve(answer)
    }
    socket.once('connect', () => done(true))
    socket.once('error', () => done(false))
  })
}
