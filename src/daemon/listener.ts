/**
 * Brings NBD clients to their exports: listens on TCP ports and unix sockets, runs the handshake of every connection, and
 * hands the socket over to the datapath when an export was chosen.
 *
 *   negotiating --> flushing --> served: the datapath has the socket
 *        |             |
 *        +--> leaving  +--> closed
 *                 |            ^
 *                 +------------+
 *
 * Hand-over. When the handshake ends, inside a 'data' event, the socket is paused and the last reply is written. The client
 * may speak as soon as it has that reply, so only when the reply is written out are the bytes collected that Node has read
 * meanwhile. They go with the socket, in one turn of the event loop: `serve` has to take the socket over before it returns.
 *
 * Bounds: connections (LIMITS.connectionsMax; one too many is closed at once), the time of a handshake, what a handshake
 * stores (see negotiation.ts), and replies that a client does not read (its socket is not read either until it does).
 * No client can end the daemon: whatever one does wrong ends its own connection.
 *
 * Close: no new connections; handshakes still going on get ERR_SHUTDOWN and a short time to say goodbye. Connections that
 * were handed over belong to the datapath and live on.
 */
import { createServer, type Server, type Socket } from 'node:net'
import type { Logger } from 'pino'
import { assert } from '../base/assert.ts'
import { messageOf, ProtocolError, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { SessionEnd, SessionSpec } from '../datapath/datapath.ts'
import { type ExportCatalog, Negotiation, type NegotiationOutcome } from '../nbd/negotiation.ts'
import { formatNbdUri, type NbdUri, parseNbdUri } from '../nbd/uri.ts'
import { type ClaimedSocketPath, claimSocketPath } from './socket-claim.ts'

/** The exports of a daemon, as the listener needs them. */
export interface ExportSource extends ExportCatalog {
  /**
   * Takes over a connection that chose the export of that name.
   * @throws anything when the export cannot be served any more; the connection is then closed
   */
  serve(exportName: string, session: SessionSpec): void
}

export interface ListenerOptions {
  readonly uris: readonly string[] // NBD URIs; port 0 takes a free one
  readonly exports: ExportSource
  readonly log: Logger
  readonly handshakeMsMax?: number
  readonly connectionsMax?: number
  /** How long `close` lets handshakes finish. */
  readonly closeMsMax?: number
}

const CLOSE_MS_MAX = 1000
/** How long a client may take to close a connection that we have ended. */
const LEAVE_MS_MAX = 1000

type Chosen = Extract<NegotiationOutcome, { kind: 'transmission' }>

interface Address {
  readonly uri: string
  readonly server: Server
  readonly claim: ClaimedSocketPath | undefined // unix sockets
}

export class Listener {
  readonly #exports: ExportSource
  readonly #log: Logger
  readonly #handshakeMsMax: number
  readonly #connectionsMax: number
  readonly #closeMsMax: number
  readonly #addresses: Address[] = []
  readonly #handshakes = new Set<Handshake>()
  #connectionCount = 0
  #nextConnection = 1
  #full = false // whether refusals were logged since a connection last ended, so that a flood is logged once
  #closing: Promise<void> | undefined

  /**
   * Listens on all of the URIs, or on none.
   * @throws UserError USAGE (no NBD URI, or one that cannot be listened on), BUSY (in use), FAILED (the system refuses)
   */
  static async open(options: ListenerOptions): Promise<Listener> {
    const listener = new Listener(options)
    try {
      for (const text of options.uris) await listener.#listen(parseListenUri(text))
    } catch (error) {
      await listener.close()
      throw error
    }
    return listener
  }

  private constructor(options: ListenerOptions) {
    this.#exports = options.exports
    this.#log = options.log
    this.#handshakeMsMax = options.handshakeMsMax ?? LIMITS.handshakeMsMax
    this.#connectionsMax = options.connectionsMax ?? LIMITS.connectionsMax
    this.#closeMsMax = options.closeMsMax ?? CLOSE_MS_MAX
  }

  /** Where it listens, as NBD URIs without an export, with ports as bound. */
  addresses(): readonly string[] {
    return this.#addresses.map((address) => address.uri)
  }

  /** Connections that are negotiating or being served. */
  get connectionCount(): number {
    return this.#connectionCount
  }

  /** Resolves when no handshake is left and no socket is listening. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    for (const { server, claim } of this.#addresses) {
      // Stops accepting at once. Its 'close' event waits for connections that are not ours any more, so we do not.
      server.close()
      claim?.release()
    }
    for (const handshake of this.#handshakes) handshake.shutDown()
    const gone = [...this.#handshakes].map((handshake) => handshake.gone)
    const timer = setTimeout(() => {
      for (const handshake of this.#handshakes) handshake.abandon('the daemon is shutting down')
    }, this.#closeMsMax)
    await Promise.all(gone)
    clearTimeout(timer)
  }

  async #listen(uri: NbdUri): Promise<void> {
    // Keep-alive is how a connection ends whose client lost its network or its power.
    const socketOptions = { noDelay: true, keepAlive: true, keepAliveInitialDelay: LIMITS.keepAliveMs }
    const server = createServer(socketOptions, (socket) => this.#accept(socket))
    if (uri.address.transport === 'tcp') {
      const { host, port } = uri.address
      await listening(server, { host, port }, formatNbdUri(uri))
      const bound = server.address()
      assert(typeof bound === 'object' && bound !== null, 'a TCP server has a port')
      const address = { transport: 'tcp', host, port: bound.port } as const
      this.#addresses.push({ uri: formatNbdUri({ address }), server, claim: undefined })
    } else {
      const claim = await claimSocketPath(uri.address.path)
      try {
        await listening(server, { path: claim.path }, formatNbdUri(uri))
      } catch (error) {
        claim.abandon()
        throw error
      }
      this.#addresses.push({ uri: formatNbdUri({ address: uri.address }), server, claim })
    }
    server.on('error', (error) =>
      this.#log.error({ err: error }, `accepting NBD clients: ${messageOf(error)}`),
    )
  }

  #accept(socket: Socket): void {
    if (this.#connectionCount >= this.#connectionsMax || this.#closing !== undefined) {
      if (!this.#full && this.#closing === undefined) {
        this.#log.warn(
          { connections: this.#connectionCount },
          'too many NBD connections: new ones are refused',
        )
        this.#full = true
      }
      socket.on('error', () => undefined)
      socket.destroy()
      return
    }
    this.#connectionCount++
    const log = this.#log.child({ connection: this.#nextConnection++, client: clientName(socket) })
    log.debug('NBD client connected')
    const handshake = new Handshake(socket, this.#exports, log, this.#handshakeMsMax, (served) => {
      this.#handshakes.delete(handshake)
      if (!served) this.#release()
    })
    handshake.onSessionEnd = () => this.#release()
    this.#handshakes.add(handshake)
    handshake.start()
  }

  #release(): void {
    assert(this.#connectionCount > 0, 'connection count')
    this.#connectionCount--
    this.#full = false
  }
}

type HandshakeState = 'negotiating' | 'flushing' | 'leaving' | 'served' | 'closed'

const NEXT: Record<HandshakeState, readonly HandshakeState[]> = {
  negotiating: ['flushing', 'leaving', 'closed'], // reading options, answering them
  flushing: ['served', 'leaving', 'closed'], // an export was chosen; its reply is being written, nothing is read
  leaving: ['closed'], // the last bytes are on their way, what the client still says is dropped
  served: [], // the datapath has the socket
  closed: [], // the socket is closed
}

/** One connection, from accept to hand-over. */
class Handshake {
  readonly #socket: Socket
  readonly #exports: ExportSource
  readonly #log: Logger
  readonly #negotiation: Negotiation
  readonly #onEnd: (served: boolean) => void
  #timer: NodeJS.Timeout
  #state: HandshakeState = 'negotiating'
  #resolveGone: () => void = () => undefined
  /** Resolves when it is served or closed. */
  readonly gone = new Promise<void>((resolve) => {
    this.#resolveGone = resolve
  })
  /** Called when the session that it became is over. */
  onSessionEnd: () => void = () => undefined

  // Named members, so that they can be removed again one by one: Node has listeners of its own on the socket.
  readonly #onData = (chunk: Buffer): void => this.#receive(chunk)
  readonly #onDrain = (): void => {
    this.#socket.resume()
  }
  readonly #onError = (error: Error): void => {
    this.#log.debug({ reason: messageOf(error) }, 'NBD connection failed during the handshake')
  }
  readonly #onClose = (): void => this.#closed()

  constructor(
    socket: Socket,
    exports: ExportSource,
    log: Logger,
    handshakeMsMax: number,
    onEnd: (served: boolean) => void,
  ) {
    this.#socket = socket
    this.#exports = exports
    this.#log = log
    this.#onEnd = onEnd
    this.#negotiation = new Negotiation(exports)
    this.#timer = setTimeout(
      () => this.abandon(`no export was chosen within ${handshakeMsMax} ms`),
      handshakeMsMax,
    )
  }

  start(): void {
    this.#socket.on('data', this.#onData).on('drain', this.#onDrain)
    this.#socket.on('error', this.#onError).on('close', this.#onClose) // an error is always followed by a close
    this.#sendOutput()
  }

  /** Options are answered with ERR_SHUTDOWN from now on. */
  shutDown(): void {
    this.#negotiation.shutDown()
  }

  /** Ends the connection without another word. */
  abandon(reason: string): void {
    if (this.#state === 'served' || this.#state === 'closed') return
    this.#log.debug({ reason }, 'NBD handshake abandoned')
    this.#socket.destroy()
  }

  #enter(next: HandshakeState): void {
    assert(NEXT[this.#state].includes(next), `handshake: ${this.#state} -> ${next}`)
    this.#state = next
  }

  #receive(chunk: Buffer): void {
    if (this.#state !== 'negotiating') return
    let outcome: NegotiationOutcome | undefined
    try {
      outcome = this.#negotiation.receive(chunk)
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.#leave(`protocol error: ${error.message}`)
      return
    }
    if (outcome === undefined) this.#sendOutput()
    else if (outcome.kind === 'transmission') this.#flush(outcome)
    else this.#leave(outcome.kind === 'aborted' ? 'the client said goodbye' : outcome.reason)
  }

  /** A client that does not read its replies is not read either. */
  #sendOutput(): void {
    const output = this.#negotiation.takeOutput()
    if (output.length > 0 && !this.#socket.write(output)) this.#socket.pause()
  }

  #flush(outcome: Chosen): void {
    this.#enter('flushing')
    this.#socket.off('data', this.#onData).off('drain', this.#onDrain)
    this.#socket.pause()
    this.#socket.write(this.#negotiation.takeOutput(), (error) => {
      // A failed write is followed by 'close', which ends this handshake.
      if (!error && this.#state === 'flushing' && !this.#socket.destroyed) this.#handOver(outcome)
    })
  }

  #handOver(outcome: Chosen): void {
    clearTimeout(this.#timer)
    const buffered: Buffer | null = this.#socket.read()
    const received = buffered === null ? outcome.leftover : Buffer.concat([outcome.leftover, buffered])
    const { exportName, mode, contexts, readOnly } = outcome
    let ended = false
    const onClose = (reason: SessionEnd): void => {
      assert(!ended, 'a session ends once')
      ended = true
      this.#log.info({ export: exportName, reason }, 'NBD client gone')
      this.onSessionEnd()
    }
    this.#enter('served')
    this.#socket.off('error', this.#onError).off('close', this.#onClose)
    this.#onEnd(true)
    this.#resolveGone()
    this.#log.info({ export: exportName, mode, readOnly }, 'NBD client connected to its export')
    try {
      this.#exports.serve(exportName, { socket: this.#socket, received, mode, contexts, readOnly, onClose })
    } catch (error) {
      // For instance a volume that was deleted since it was chosen. That is this client's loss only.
      this.#log.error({ err: error, export: exportName }, `cannot serve an NBD client: ${messageOf(error)}`)
      this.#socket.on('error', () => undefined)
      this.#socket.destroy()
      if (!ended) onClose('error')
    }
  }

  /**
   * Sends what is left to say and waits a moment for the client to close. Reading on and dropping it matters: closing a TCP
   * socket with unread input resets the connection, and the client might never see our last reply.
   */
  #leave(reason: string): void {
    this.#enter('leaving')
    this.#log.debug({ reason }, 'NBD handshake ended')
    this.#socket.off('drain', this.#onDrain)
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#socket.destroy(), LEAVE_MS_MAX)
    this.#socket.end(this.#negotiation.takeOutput())
    this.#socket.resume()
  }

  #closed(): void {
    this.#enter('closed')
    clearTimeout(this.#timer)
    this.#onEnd(false)
    this.#resolveGone()
  }
}

function clientName(socket: Socket): string {
  return socket.remoteAddress === undefined ? 'unix' : `${socket.remoteAddress}:${socket.remotePort}`
}

/** An NBD URI that can be listened on. @throws UserError USAGE */
export function parseListenUri(text: string): NbdUri {
  const uri = parseNbdUri(text)
  const refuse = (reason: string): never => {
    throw new UserError('USAGE', `cannot listen on ${text}: ${reason}`)
  }
  if (uri.tls) refuse('TLS is not supported yet; use nbd:// or nbd+unix://')
  if (uri.exportName !== '') refuse(`clients choose the export; leave "/${uri.exportName}" out`)
  if (uri.user !== undefined) refuse('a user name belongs to TLS')
  return uri
}

function listening(
  server: Server,
  where: { host: string; port: number } | { path: string },
  uri: string,
): Promise<void> {
  return new Promise((resolve, reject) => {
    const onError = (error: Error): void => reject(listenError(uri, error))
    server.once('error', onError)
    // 511 waiting connections, Node's default, is less than 500 clients at once plus what comes after them.
    server.listen({ ...where, backlog: LIMITS.connectionsMax }, () => {
      server.off('error', onError)
      resolve()
    })
  })
}

function listenError(uri: string, error: Error): UserError {
  const code = systemCode(error)
  switch (code) {
    case 'EADDRINUSE':
      return new UserError(
        'BUSY',
        `cannot listen on ${uri}: the address is in use; stop its owner or choose another`,
        {
          cause: error,
        },
      )
    case 'EACCES':
    case 'EPERM':
      return new UserError('FAILED', `cannot listen on ${uri}: permission denied`, { cause: error })
    case 'EADDRNOTAVAIL':
      return new UserError('FAILED', `cannot listen on ${uri}: this machine has no such address`, {
        cause: error,
      })
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return new UserError('FAILED', `cannot listen on ${uri}: the host name is unknown`, { cause: error })
    case 'ENOENT':
      return new UserError('FAILED', `cannot listen on ${uri}: the directory does not exist`, {
        cause: error,
      })
    default:
      return new UserError('FAILED', `cannot listen on ${uri}: ${messageOf(error)}`, { cause: error })
  }
}
