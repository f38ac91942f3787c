import { isIPv6 } from 'node:net'
import { UserError } from '../base/errors.ts'

export interface LinkAddress {
  readonly host: string // without brackets
  readonly port: number
}

/**
 * Parses `HOST:PORT` or `[IPV6]:PORT`.
 * @param what names the option in the error
 * @param portMin 0 for an address to listen on, where 0 takes a free port
 * @throws UserError USAGE
 */
export function parseLinkAddress(text: string, what: string, portMin: 0 | 1 = 1): LinkAddress {
  const match = /^(?:\[([^\]\s]+)\]|([^:[\]\s/@]+)):(\d{1,5})$/.exec(text)
  const [, ipv6, name, digits] = match ?? []
  const host = ipv6 ?? name
  const port = Number(digits)
  const valid = host !== undefined && (ipv6 === undefined || isIPv6(ipv6)) && port >= portMin && port <= 65535
  if (valid) return { host, port }
  throw new UserError(
    'USAGE',
    `${what} "${text}" is not HOST:PORT or [IPV6]:PORT with a port from ${portMin} to 65535`,
  )
}

/** The inverse of `parseLinkAddress`. */
export function formatLinkAddress({ host, port }: LinkAddress): string {
  return `${host.includes(':') ? `[${host}]` : host}:${port}`
}
