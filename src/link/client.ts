/**
 * The connecting side of a link: keeps one session with a peer standing for as long as it is wanted.
 *
 *   connecting --> connected --> waiting        waiting: until the next attempt
 *    |      ^                     |   |
 *    |      +---------------------+   |         from everywhere: closed
 *    +---------> waiting <------------+
 *
 * Attempts come with growing, jittered delays. What only an operator can settle (a key, a version, a pin that does not match) is
 * tried again rarely, and at once after `retryNow`. Each session is a new one: see session.ts for what that means for its users.
 */
import { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import { type Clock, systemClock } from '../base/clock.ts'
import { LIMITS } from '../base/limits.ts'
import { Backoff } from './backoff.ts'
import { LinkError } from './errors.ts'
import { KIND } from './frame.ts'
import { type Greeted, greetServer } from './greet.ts'
import { ClientHandshake, type Party, type ProvenPeer } from './handshake.ts'
import { greetOptionsOf, type LinkLog, type LinkOptions, logOf, partyOf } from './options.ts'
import { checkPin } from './peers.ts'
import { describePeer, Session } from './session.ts'
import { type SideWires, sayToken } from './side-wires.ts'
import { dial, type Wire } from './transport.ts'

export interface LinkClientOptions extends LinkOptions {
  readonly host: string
  readonly port: number
  /** What this side calls the peer; its identity is pinned under this name. */
  readonly peerName: string
  /** The peer keeps one session for each identity and purpose: one client for each, too. */
  readonly purpose: string
  /** TCP connections of a session; default 2: one for small and urgent messages, one for bulk. */
  readonly connections?: number
  /** Takes each session that stands. Ask for channels (`onChannel`) before returning: then none can be missed. */
  onSession(session: Session): void
  /** A session is over, or none came about; there will be another attempt. */
  readonly onLost?: (reason: LinkError, retryMs: number) => void
  /** The same, and it will go on like that until somebody changes something. */
  readonly onRefused?: (reason: LinkError, retryMs: number) => void
  /** Where streams to the peer come from; default: TCP or TLS to host and port. */
  readonly dial?: () => Promise<Wire>
  readonly random?: () => number
  /** The least and the longest delay between attempts. */
  readonly retryMs?: { readonly min: number; readonly max: number }
}

export type LinkClientState = 'connecting' | 'connected' | 'waiting' | 'closed'

const NEXT: Record<LinkClientState, readonly LinkClientState[]> = {
  connecting: ['connected', 'waiting', 'closed'],
  connected: ['waiting', 'closed'],
  waiting: ['connecting', 'closed'],
  closed: [],
}

export class LinkClient {
  readonly #options: LinkClientOptions
  readonly #party: Party
  readonly #log: LinkLog
  readonly #clock: Clock
  readonly #backoff: Backoff
  #state: LinkClientState = 'connecting'
  #session: Session | undefined
  #lastReason: LinkError | undefined
  #cancelRetry: () => void = () => undefined
  #attempt: Promise<void> = Promise.resolve()
  readonly #abort = new AbortController()
  #streams = new Set<Wire['stream']>() // of the attempt under way

  /** Begins to connect; does not wait for it. */
  static connect(options: LinkClientOptions): LinkClient {
    const client = new LinkClient(options)
    client.#attempt = client.#try()
    return client
  }

  private constructor(options: LinkClientOptions) {
    const count = options.connections ?? 2
    assert(count >= 1 && count <= LIMITS.linkConnectionsPerSessionMax, 'number of connections')
    this.#options = options
    this.#party = partyOf(options)
    this.#log = logOf(options)
    this.#clock = options.clock ?? systemClock
    this.#backoff = new Backoff(options.retryMs?.min, options.retryMs?.max, options.random)
  }

  get state(): LinkClientState {
    return this.#state
  }

  get session(): Session | undefined {
    return this.#session
  }

  /** Why there is no session, while there is none. */
  get lastReason(): LinkError | undefined {
    return this.#state === 'connected' ? undefined : this.#lastReason
  }

  /** Does not wait for the next attempt any longer: somebody has changed something. */
  retryNow(): void {
    this.#backoff.reset()
    if (this.#state !== 'waiting') return
    this.#cancelRetry()
    this.#enter('connecting')
    this.#attempt = this.#try()
  }

  /** Ends the session and the attempts. Resolves when no stream is left. */
  async close(reason = 'the daemon stops'): Promise<void> {
    if (this.#state !== 'closed') this.#enter('closed')
    this.#cancelRetry()
    this.#abort.abort()
    for (const stream of this.#streams) stream.destroy()
    this.#session?.close(reason)
    await this.#attempt
    await this.#session?.gone()
  }

  #enter(next: LinkClientState): void {
    assert(NEXT[this.#state].includes(next), `link client: ${this.#state} -> ${next}`)
    this.#state = next
  }

  async #try(): Promise<void> {
    const greeted: Greeted[] = []
    try {
      const first = await this.#greet(0, undefined, undefined)
      greeted.push(first)
      const { session, connections, peer } = first.agreement
      const others = Array.from({ length: connections - 1 }, (_, index) =>
        this.#greet(index + 1, session, peer),
      )
      const results = await Promise.allSettled(others)
      for (const result of results) if (result.status === 'fulfilled') greeted.push(result.value)
      for (const result of results) if (result.status === 'rejected') throw result.reason
      if (this.#state !== 'connecting') throw new LinkError('CLOSED', 'closed while connecting')
      if (greeted.some(({ connection }) => connection.state !== 'open')) {
        throw new LinkError('CUT', 'a connection was lost before all of them stood')
      }
      this.#begin(greeted)
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      for (const { connection } of greeted) connection.close(error)
      this.#later(error)
    } finally {
      this.#streams.clear()
    }
  }

  async #greet(
    connection: number,
    session: string | undefined,
    expected: ProvenPeer | undefined,
  ): Promise<Greeted> {
    const { host, port, security, peerName, purpose, peers, connections = 2 } = this.#options
    const timeoutMs = this.#options.handshakeMs ?? LIMITS.handshakeMsMax
    const wire = await (this.#options.dial?.() ?? dial(host, port, security, timeoutMs, this.#abort.signal))
    if (this.#state !== 'connecting') {
      wire.stream.on('error', () => undefined)
      wire.stream.destroy()
      throw new LinkError('CLOSED', 'closed while connecting')
    }
    this.#streams.add(wire.stream)
    const handshake = new ClientHandshake(
      this.#party,
      { purpose, session, connection, connections },
      wire.binding,
    )
    return greetServer(
      wire.stream,
      handshake,
      async ({ peer }) => {
        if (expected !== undefined) {
          if (peer.fingerprint === expected.fingerprint && peer.instance === expected.instance) return
          throw new LinkError('NO_SESSION', 'another daemon answered than on the first connection')
        }
        const contact = await checkPin(peers, peerName, peer.fingerprint)
        if (contact === 'new')
          this.#log.info({ peer: peerName }, `link: first contact with ${describePeer(peer)}, pinned`)
      },
      greetOptionsOf(this.#options),
    )
  }

  /** Over TLS, and where streams come from elsewhere, there are none. */
  #sideWires(): SideWires | undefined {
    const { host, port, security, dial: other } = this.#options
    if (security.tls !== undefined || other !== undefined) return undefined
    const timeoutMs = this.#options.handshakeMs ?? LIMITS.handshakeMsMax
    return {
      side: 'dials',
      dial: async (token) => {
        const { stream } = await dial(host, port, security, timeoutMs, this.#abort.signal)
        assert(stream instanceof Socket, 'plain TCP')
        await sayToken(stream, token)
        return stream
      },
    }
  }

  #begin(greeted: readonly Greeted[]): void {
    const [first] = greeted
    assert(first !== undefined, 'a session has a connection')
    greeted = [...greeted].sort((a, b) => a.agreement.connection - b.agreement.connection)
    const connections = greeted.map(({ connection }) => connection)
    const session = new Session('client', connections, first.agreement, this.#sideWires())
    connections[0]?.send(KIND.ready)
    this.#session = session
    this.#enter('connected')
    const { peerName } = this.#options
    this.#log.info(
      { peer: peerName, session: session.id },
      `link: session with ${describePeer(session.peer)}`,
    )
    const since = this.#clock.now()
    session.ended.then((reason) => {
      if (this.#clock.now() - since >= LIMITS.linkStableMs) this.#backoff.reset()
      if (this.#state === 'connected') this.#later(reason)
    })
    this.#options.onSession(session)
    session.start()
  }

  #later(reason: LinkError): void {
    if (this.#state === 'closed') return
    this.#lastReason = reason
    this.#enter('waiting')
    const refused = reason.fate === 'refusal'
    const retryMs = refused ? LIMITS.linkRefusedRetryMs : this.#backoff.next()
    this.#cancelRetry = this.#clock.after(retryMs, () => {
      this.#enter('connecting')
      this.#attempt = this.#try()
    })
    const { peerName } = this.#options
    const fields = { peer: peerName, code: reason.code, retryMs: Math.round(retryMs), err: reason.cause }
    if (refused)
      this.#log.warn(
        fields,
        `link: refused, next attempt in ${Math.round(retryMs / 1000)} s: ${reason.message}`,
      )
    else this.#log.info(fields, `link: no session: ${reason.message}`)
    if (refused) this.#options.onRefused?.(reason, retryMs)
    else this.#options.onLost?.(reason, retryMs)
  }
}
