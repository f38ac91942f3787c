/**
 * Unix socket addresses hold 107 bytes of path. A pool may lie deeper than that: its sockets are then
 * reached through a descriptor of its directory, `/proc/self/fd/N/control.sock`, which is always short.
 */
import { closeSync, openSync } from 'node:fs'
import { basename, dirname } from 'node:path'

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
