/**
 * How a link is protected, and what that means before a byte is sent:
 *
 *   plain    TCP as it is. With this machine only, unless `allowPlain` says that the network between the daemons is trusted
 *   key      a secret that both sides have (handshake.ts); in addition to either of the others
 *   TLS      1.3, certificates on both sides, each checked against the authorities in the configuration and nothing else
 */
import { X509Certificate } from 'node:crypto'
import { lookup } from 'node:dns/promises'
import { readFile, stat } from 'node:fs/promises'
import { BlockList, isIP, isIPv6 } from 'node:net'
import { messageOf, UserError } from '../base/errors.ts'
import { LinkError } from './errors.ts'

export interface SecurityOptions {
  /** Plain TCP also with other machines. */
  readonly allowPlain?: boolean
  /** A file that holds the shared key: at least 16 bytes, better 32 random ones in any spelling. A newline at its end does not count. */
  readonly keyFile?: string
  readonly tls?: TlsOptions
}

export interface TlsOptions {
  /** Paths of PEM files. */
  readonly certificate: string
  readonly key: string
  readonly authority: string
  /** The name in the peer's certificate, where that is not the host that is connected to. */
  readonly peerName?: string
}

export interface TlsFiles {
  readonly cert: Buffer
  readonly key: Buffer
  readonly ca: Buffer
  readonly peerName: string | undefined
}

export interface Security {
  readonly allowPlain: boolean
  readonly key: Buffer | undefined
  readonly tls: TlsFiles | undefined
}

export const PLAIN: Security = { allowPlain: false, key: undefined, tls: undefined }

const KEY_BYTES_MIN = 16
const KEY_BYTES_MAX = 1024

/** Reads the files. @throws UserError FAILED naming the file and what to do */
export async function openSecurity(options: SecurityOptions): Promise<Security> {
  const { allowPlain = false, keyFile, tls } = options
  return {
    allowPlain,
    key: keyFile === undefined ? undefined : await readKey(keyFile),
    tls: tls === undefined ? undefined : await readTls(tls),
  }
}

async function readKey(path: string): Promise<Buffer> {
  const bytes = await readSecret(path, 'key of the link')
  let end = bytes.length
  while (end > 0 && (bytes[end - 1] === 0x0a || bytes[end - 1] === 0x0d)) end--
  if (end < KEY_BYTES_MIN || end > KEY_BYTES_MAX) {
    throw new UserError(
      'FAILED',
      `the key of the link in ${path} has ${end} bytes: ${KEY_BYTES_MIN} to ${KEY_BYTES_MAX} are possible, ` +
        '32 random ones are good (openssl rand -base64 32)',
    )
  }
  return bytes.subarray(0, end)
}

async function readTls(options: TlsOptions): Promise<TlsFiles> {
  const cert = await readPublic(options.certificate, 'certificate of the link')
  const ca = await readPublic(options.authority, 'authority of the link')
  checkCertificate(cert, options.certificate)
  checkCertificate(ca, options.authority)
  const key = await readSecret(options.key, 'TLS key of the link')
  return { cert, key, ca, peerName: options.peerName }
}

function checkCertificate(pem: Buffer, path: string): void {
  try {
    new X509Certificate(pem)
  } catch (error) {
    throw new UserError('FAILED', `${path} holds no certificate in PEM: ${messageOf(error)}`, {
      cause: error,
    })
  }
}

async function readPublic(path: string, what: string): Promise<Buffer> {
  try {
    return await readFile(path)
  } catch (error) {
    throw new UserError('FAILED', `cannot read the ${what} ${path}: ${messageOf(error)}`, { cause: error })
  }
}

async function readSecret(path: string, what: string): Promise<Buffer> {
  const bytes = await readPublic(path, what)
  const { mode } = await stat(path)
  if ((mode & 0o077) !== 0) {
    throw new UserError('FAILED', `the ${what} ${path} is open to other users: chmod 600 it`)
  }
  return bytes
}

const loopback = new BlockList()
loopback.addSubnet('127.0.0.0', 8, 'ipv4')
loopback.addAddress('::1', 'ipv6')
loopback.addSubnet('::ffff:127.0.0.0', 104, 'ipv6')

/** Whether an IP address is this machine's own. */
export function isLoopback(address: string): boolean {
  return isIP(address) !== 0 && loopback.check(address, isIPv6(address) ? 'ipv6' : 'ipv4')
}

/**
 * The addresses of a host that may be used. What is checked is the addresses, and these are the ones to use: asking for them again could
 * give others.
 * @throws LinkError UNREACHABLE for an unknown host, PLAIN where only plain TCP leads there and it is not allowed
 */
export async function resolveHost(host: string, security: Security): Promise<string[]> {
  let addresses: string[]
  try {
    addresses = (await lookup(host, { all: true })).map(({ address }) => address)
  } catch (error) {
    throw new LinkError('UNREACHABLE', `the host ${host} is unknown: ${messageOf(error)}`, { cause: error })
  }
  if (security.tls !== undefined || security.allowPlain) return addresses
  const own = addresses.filter(isLoopback)
  if (own.length === 0) {
    throw new LinkError(
      'PLAIN',
      `${host} is not this machine, and plain TCP would show everything to the network between: ` +
        'configure TLS, or allow plain TCP where that network is trusted',
    )
  }
  return own
}
