import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { DEFAULT_PORT } from './constants.ts'

/**
 * NBD URIs (doc/uri.md of the NBD project), for addresses to connect to and to listen on.
 *
 *   nbd://[user@]host[:port]/export            nbds:// the same over TLS
 *   nbd+unix:///export?socket=PATH             nbds+unix:// the same over TLS
 *
 * Parsed by hand along RFC 3986, because the URL class would tidy up `.` and `..` in the path, and an export name is
 * free text, not a path: everything after the first slash, percent-decoded.
 */

export type NbdAddress =
  | {
      readonly transport: 'tcp'
      readonly host: string // name or address, IPv6 without brackets; `localhost` where the URI names none
      readonly port: number
    }
  | {
      readonly transport: 'unix'
      readonly path: string // begins with NUL in the abstract namespace
    }

export interface NbdUri {
  readonly address: NbdAddress
  readonly tls: boolean // `nbds`: the connection must be encrypted
  readonly exportName: string // empty: the default export
  readonly user?: string // for TLS with pre-shared keys
  /** The `tls-` parameters without that prefix, and experimental ones (`x-`) with theirs. */
  readonly parameters: ReadonlyMap<string, string>
}

const TLS_PARAMETERS: ReadonlySet<string> = new Set([
  'tls-type',
  'tls-hostname',
  'tls-verify-peer',
  'tls-certificates',
  'tls-psk-file',
])

const SCHEMES: ReadonlyMap<string, { readonly transport: NbdAddress['transport']; readonly tls: boolean }> =
  new Map([
    ['nbd', { transport: 'tcp', tls: false }],
    ['nbds', { transport: 'tcp', tls: true }],
    ['nbd+unix', { transport: 'unix', tls: false }],
    ['nbds+unix', { transport: 'unix', tls: true }],
  ])

/**
 * @param text the URI
 * @returns its parts, percent-decoded
 * @throws UserError USAGE with the reason when it is no NBD URI, or holds a parameter nobody knows
 */
export function parseNbdUri(text: string): NbdUri {
  const refuse = (reason: string): never => {
    throw new UserError('USAGE', `"${text}" is not an NBD URI: ${reason}`)
  }
  const decode = (part: string): string => {
    try {
      return decodeURIComponent(part)
    } catch (error) {
      if (!(error instanceof URIError)) throw error
      return refuse(`"${part}" has a bad percent escape`)
    }
  }
  const parts = /^([A-Za-z][A-Za-z0-9+.-]*):(?:\/\/([^/?#]*))?([^?#]*)(?:\?([^#]*))?(#.*)?$/s.exec(text)
  if (parts === null) return refuse('write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH')
  const [, schemeName = '', authority = '', path = '', query, fragment] = parts
  const scheme = SCHEMES.get(schemeName.toLowerCase())
  if (scheme === undefined)
    return refuse(`the scheme "${schemeName}" is not nbd, nbds, nbd+unix or nbds+unix`)
  if (fragment !== undefined) refuse('it has a fragment; write # as %23')
  if (path !== '' && !path.startsWith('/')) refuse('two slashes are missing after the scheme')

  const exportName = decode(path.slice(1))
  if (exportName.includes('\0')) refuse('the export name contains NUL')
  if (Buffer.byteLength(exportName) > LIMITS.nbdStringMax) refuse('the export name is too long')

  const parameters = new Map<string, string>()
  let socket: string | undefined
  for (const item of query === undefined || query === '' ? [] : query.split('&')) {
    const equals = item.indexOf('=')
    const name = decode(equals < 0 ? item : item.slice(0, equals))
    const value = equals < 0 ? '' : decode(item.slice(equals + 1))
    if (parameters.has(name) || (name === 'socket' && socket !== undefined))
      refuse(`"${name}" is given twice`)
    if (name === 'socket') socket = value
    else if (TLS_PARAMETERS.has(name) || name.startsWith('x-')) parameters.set(name, value)
    else refuse(`the parameter "${name}" is unknown`)
  }

  if (scheme.transport === 'unix') {
    if (authority !== '')
      refuse(`a unix socket has no host; write ${schemeName}:///${exportName}?socket=PATH`)
    if (socket === undefined || socket === '') return refuse('the parameter socket=PATH is missing')
    if (socket.slice(1).includes('\0')) refuse('the socket path contains NUL')
    return { address: { transport: 'unix', path: socket }, tls: scheme.tls, exportName, parameters }
  }

  if (socket !== undefined) refuse(`socket= belongs to ${scheme.tls ? 'nbds+unix' : 'nbd+unix'}`)
  const at = authority.lastIndexOf('@')
  const server = authority.slice(at + 1)
  const address = parseServer(server, decode)
  if (address === undefined) return refuse(`"${server}" is not HOST, HOST:PORT or [IPV6]:PORT`)
  const user = at < 0 ? undefined : decode(authority.slice(0, at))
  return { address, tls: scheme.tls, exportName, parameters, ...(user === undefined ? {} : { user }) }
}

function parseServer(server: string, decode: (part: string) => string): NbdAddress | undefined {
  const parts = /^(?:\[([^\]]*)\]|([^:[\]]*))(?::([0-9]*))?$/.exec(server)
  if (parts === null) return undefined
  const [, ipv6, name = '', portText = ''] = parts
  if (ipv6 !== undefined && !/^[0-9A-Fa-f:.]+(?:%25[^%]+)?$/.test(ipv6)) return undefined
  const port = portText === '' ? DEFAULT_PORT : Number(portText)
  if (port > 65535) return undefined
  return { transport: 'tcp', host: decode(ipv6 ?? name) || 'localhost', port }
}

/** The inverse of `parseNbdUri`; names the port even where it is the default. */
export function formatNbdUri(uri: Pick<NbdUri, 'address'> & Partial<NbdUri>): string {
  const scheme = `${uri.tls ? 'nbds' : 'nbd'}${uri.address.transport === 'unix' ? '+unix' : ''}`
  const query = [...(uri.parameters ?? [])]
  let authority = ''
  if (uri.address.transport === 'unix') {
    query.unshift(['socket', uri.address.path])
  } else {
    const { host, port } = uri.address
    const bracketed = host.includes(':') ? `[${host.replace('%', '%25')}]` : encodeURIComponent(host)
    authority = `${uri.user === undefined ? '' : `${encodeURIComponent(uri.user)}@`}${bracketed}:${port}`
  }
  const queryText = query.map(([name, value]) => `${encodePath(name)}=${encodePath(value)}`).join('&')
  const path = uri.exportName === undefined || uri.exportName === '' ? '' : `/${encodePath(uri.exportName)}`
  const root = uri.address.transport === 'unix' && path === '' ? '/' : ''
  return `${scheme}://${authority}${path}${root}${queryText === '' ? '' : `?${queryText}`}`
}

/** Percent-encodes what a path or a query may not hold; slashes stay readable. */
function encodePath(text: string): string {
  return encodeURIComponent(text).replaceAll('%2F', '/')
}
