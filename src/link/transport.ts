/**
 * Byte streams between daemons: TCP or TLS, made and accepted. The *binding* that goes with a TLS stream is keying material which only its two
 * ends can know (RFC 9266, exporter of TLS 1.3); the handshake signs it, so the peer that proves its identity is the one at
 * the other end of this TLS connection and not somebody who passes its words on.
 */
import { createServer, isIP, type Server, type Socket } from 'node:net'
import type { Duplex } from 'node:stream'
import {
  checkServerIdentity,
  createServer as createTlsServer,
  type PeerCertificate,
  type TLSSocket,
  connect as tlsConnect,
} from 'node:tls'
import { assert } from '../base/assert.ts'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { DirectSocket } from './direct-socket.ts'
import { LinkError } from './errors.ts'
import { resolveHost, type Security, type TlsFiles } from './security.ts'

export interface Wire {
  readonly stream: Duplex
  readonly binding: Buffer // empty for plain TCP
  readonly address: string // of the other end, for logs
}

const NO_BINDING = Buffer.alloc(0)
const PROTOCOL = 'fullstripe-link'

/** Connects to the first address of the host that answers. @throws LinkError UNREACHABLE, LATE, PLAIN, TLS */
export async function dial(
  host: string,
  port: number,
  security: Security,
  timeoutMs: number,
  signal?: AbortSignal,
): Promise<Wire> {
  const addresses = await resolveHost(host, security)
  let failure: unknown
  for (const address of addresses) {
    try {
      return await dialAddress(host, address, port, security.tls, timeoutMs, signal)
    } catch (error) {
      failure = error
    }
  }
  throw failure
}

function dialAddress(
  host: string,
  address: string,
  port: number,
  tls: TlsFiles | undefined,
  timeoutMs: number,
  signal: AbortSignal | undefined,
): Promise<Wire> {
  return new Promise((resolve, reject) => {
    const options = { host: address, port, noDelay: true }
    const socket: Socket =
      tls === undefined
        ? new DirectSocket().connect(options)
        : tlsConnect({ ...options, ...clientTls(tls, host) })
    const settle = (): void => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      socket.off('error', onError)
    }
    const fail = (error: LinkError): void => {
      settle()
      socket.on('error', () => undefined)
      socket.destroy()
      reject(error)
    }
    const onError = (error: Error): void => fail(dialError(`${host}:${port}`, error))
    const onAbort = (): void => fail(new LinkError('CLOSED', 'closed while connecting'))
    const timer = setTimeout(
      () => fail(new LinkError('UNREACHABLE', `${host}:${port} did not answer within ${timeoutMs} ms`)),
      timeoutMs,
    )
    signal?.addEventListener('abort', onAbort)
    socket.on('error', onError)
    socket.once(tls === undefined ? 'connect' : 'secureConnect', () => {
      settle()
      // Until somebody reads, nothing may be lost.
      socket.pause()
      resolve(wireOf(socket, tls !== undefined))
    })
  })
}

function clientTls({ cert, key, ca, peerName }: TlsFiles, host: string) {
  const name = peerName ?? host
  return {
    cert,
    key,
    ca,
    minVersion: 'TLSv1.3' as const,
    ALPNProtocols: [PROTOCOL],
    ...(isIP(name) === 0 ? { servername: name } : {}), // an address is no server name, but can stand in a certificate
    checkServerIdentity: (_host: string, certificate: PeerCertificate) =>
      checkServerIdentity(name, certificate),
  }
}

function wireOf(socket: Socket, secure: boolean): Wire {
  const address = `${socket.remoteAddress}:${socket.remotePort}`
  if (!secure) return { stream: socket, binding: NO_BINDING, address }
  const binding = (socket as TLSSocket).exportKeyingMaterial(32, 'EXPORTER-Channel-Binding', Buffer.alloc(0))
  assert(binding.length === 32, 'keying material')
  return { stream: socket, binding, address }
}

function dialError(where: string, error: Error): LinkError {
  const code = systemCode(error)
  if (
    code !== undefined &&
    /^(ERR_SSL|ERR_TLS|CERT_|UNABLE_|DEPTH_|SELF_SIGNED|HOSTNAME_|INVALID_CA)/.test(code)
  ) {
    return new LinkError('TLS', `no TLS with ${where}: ${messageOf(error)}`, { cause: error })
  }
  return new LinkError('UNREACHABLE', `cannot connect to ${where}: ${messageOf(error)}`, { cause: error })
}

export interface WireListener {
  onWire(wire: Wire): void
  /** A peer did not get as far as a wire, for instance because its certificate is not accepted. */
  onRefused(error: LinkError, address: string): void
}

export interface WireServer {
  readonly host: string
  readonly port: number
  /** Accepts no more. Wires that were made live on. */
  close(): void
}

/** @throws UserError USAGE, BUSY, FAILED; LinkError PLAIN, UNREACHABLE */
export async function listenForWires(
  host: string,
  port: number,
  security: Security,
  listener: WireListener,
): Promise<WireServer> {
  const [address] = await resolveHost(host, security)
  const { tls } = security
  const server: Server =
    tls === undefined
      ? createServer({ noDelay: true, pauseOnConnect: true }, (socket) =>
          listener.onWire(wireOf(DirectSocket.over(socket), false)),
        )
      : createTlsServer({
          cert: tls.cert,
          key: tls.key,
          ca: tls.ca,
          minVersion: 'TLSv1.3',
          ALPNProtocols: [PROTOCOL],
          requestCert: true,
          rejectUnauthorized: true,
          handshakeTimeout: LIMITS.handshakeMsMax,
          noDelay: true,
        })
  if (tls !== undefined) {
    server.on('secureConnection', (socket: TLSSocket) => {
      socket.pause()
      listener.onWire(wireOf(socket, true))
    })
    server.on('tlsClientError', (error: Error, socket: TLSSocket) => {
      const text = `no TLS with a peer: ${messageOf(error)}`
      listener.onRefused(new LinkError('TLS', text, { cause: error }), String(socket.remoteAddress))
    })
  }
  server.maxConnections =
    LIMITS.linkHandshakesMax + LIMITS.linkSessionsMax * LIMITS.linkConnectionsPerSessionMax
  await new Promise<void>((resolve, reject) => {
    const onError = (error: Error): void => reject(listenError(host, port, error))
    server.once('error', onError)
    server.listen({ host: address, port, backlog: LIMITS.linkHandshakesMax }, () => {
      server.off('error', onError)
      resolve()
    })
  })
  server.on('error', (error: Error) => {
    listener.onRefused(
      new LinkError('BUSY', `cannot accept: ${messageOf(error)}`, { cause: error }),
      'unknown',
    )
  })
  const bound = server.address()
  assert(typeof bound === 'object' && bound !== null, 'a TCP server has a port')
  return { host, port: bound.port, close: () => void server.close() }
}

function listenError(host: string, port: number, error: Error): UserError {
  const where = `cannot listen for peers on ${host}:${port}`
  const options = { cause: error }
  switch (systemCode(error)) {
    case 'EADDRINUSE':
      return new UserError(
        'BUSY',
        `${where}: the address is in use; stop its owner or choose another`,
        options,
      )
    case 'EACCES':
      return new UserError('FAILED', `${where}: permission denied`, options)
    case 'EADDRNOTAVAIL':
      return new UserError('FAILED', `${where}: this machine has no such address`, options)
    default:
      return new UserError('FAILED', `${where}: ${messageOf(error)}`, options)
  }
}
