/** Addresses of a daemon that a client on this machine can use. */
import { UserError } from '../base/errors.ts'
import { formatNbdUri, type NbdAddress, parseNbdUri } from '../nbd/uri.ts'

/**
 * The unix socket where there is one: it is faster, and only this machine reaches it.
 * @param listen NBD URIs of a daemon's status
 */
export function localAddress(listen: readonly string[]): NbdAddress {
  const addresses = listen
    .map((text) => parseNbdUri(text))
    .filter((uri) => !uri.tls)
    .map((uri) => uri.address)
  const unix = addresses.find((address) => address.transport === 'unix')
  if (unix !== undefined) return unix
  const tcp = addresses.find((address) => address.transport === 'tcp')
  if (tcp?.transport === 'tcp') return { ...tcp, host: reachable(tcp.host) }
  throw new UserError(
    'FAILED',
    'the daemon listens on no plain address: give serve a --listen nbd+unix:///?socket=PATH',
  )
}

export function exportUri(listen: readonly string[], name: string): string {
  return formatNbdUri({ address: localAddress(listen), exportName: name })
}

/** A daemon that listens on all addresses of the machine is reached at this one. */
function reachable(host: string): string {
  return host === '0.0.0.0' ? '127.0.0.1' : host === '::' ? '::1' : host
}
