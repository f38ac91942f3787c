/**
 * The accepting side of a link: connections come, prove who they are, and gather into sessions.
 *
 *   connection 0     handshake -> a *gathering* with a number        -+
 *   connections 1..  handshake, with that number -> the gathering    -+-> `ready` from the peer -> session
 *
 * What always holds:
 *  - A peer reaches nothing before it has proved its identity and its pin is durable. Until then it costs one connection of
 *    LIMITS.linkHandshakesMax and a few kilobytes, for LIMITS.handshakeMsMax at most.
 *  - A further connection joins only a gathering of the same identity and of as many connections, in a place that is free.
 *  - A peer that comes back while its old session still seems alive (a half-open link, a restart) takes its place: of one identity and
 *    purpose there is one session. The old one has ended before the new one is handed out.
 */
import { randomBytes } from 'node:crypto'
import { Socket } from 'node:net'
import type { Duplex } from 'node:stream'
import { assert } from '../base/assert.ts'
import { systemClock } from '../base/clock.ts'
import { LIMITS } from '../base/limits.ts'
import type { Connection, ConnectionHandler } from './connection.ts'
import { LinkError } from './errors.ts'
import { type Frame, KIND, SESSION_PHASE } from './frame.ts'
import { type Admission, greetClient } from './greet.ts'
import { type Agreement, type Applicant, type Party, ServerHandshake } from './handshake.ts'
import { decodeReason } from './hello.ts'
import { greetOptionsOf, type LinkLog, type LinkOptions, logOf, partyOf } from './options.ts'
import { checkPin } from './peers.ts'
import { describePeer, Session } from './session.ts'
import { SideDoor, type SideWires } from './side-wires.ts'
import { listenForWires, type Wire, type WireServer } from './transport.ts'

export interface LinkServerOptions extends LinkOptions {
  readonly host: string
  readonly port: number // 0 takes a free one
  /** Takes each session that stands. Ask for channels (`onChannel`) before returning: then none can be missed. */
  onSession(session: Session): void
  /** @returns why a peer that has proved itself is not wanted; undefined where it is */
  readonly admit?: (applicant: Applicant) => string | undefined
}

interface Gathering {
  readonly fingerprint: string
  readonly count: number
  readonly places: (Connection | 'taken' | undefined)[]
  readonly cancelTimer: () => void
}

export class LinkServer {
  readonly #options: LinkServerOptions
  readonly #party: Party
  readonly #log: LinkLog
  readonly #sessions = new Set<Session>()
  readonly #gatherings = new Map<string, Gathering>()
  readonly #greeting = new Set<Duplex>()
  readonly #door: SideDoor
  #wires: WireServer | undefined
  #closed = false

  /** @throws UserError USAGE, BUSY, FAILED; LinkError PLAIN (not this machine, and plain TCP is not allowed), UNREACHABLE */
  static async listen(options: LinkServerOptions): Promise<LinkServer> {
    const server = new LinkServer(options)
    server.#wires = await listenForWires(options.host, options.port, options.security, {
      onWire: (wire) => server.take(wire),
      onRefused: (error, address) =>
        server.#log.warn({ address, code: error.code }, `link: ${error.message}`),
    })
    return server
  }

  constructor(options: LinkServerOptions) {
    this.#options = options
    this.#party = partyOf(options)
    this.#log = logOf(options)
    this.#door = new SideDoor(options.handshakeMs)
  }

  /** Where it listens. */
  get address(): { readonly host: string; readonly port: number } {
    assert(this.#wires !== undefined, 'it listens')
    return { host: this.#wires.host, port: this.#wires.port }
  }

  sessions(): Session[] {
    return [...this.#sessions]
  }

  /** Connections that are not in a session yet. */
  get handshakes(): number {
    return this.#greeting.size
  }

  /** A byte stream to a peer: from the listener, or from wherever else streams come. */
  take(wire: Wire): void {
    const { stream, address } = wire
    if (this.#closed || this.#greeting.size >= LIMITS.linkHandshakesMax) {
      if (!this.#closed)
        this.#log.warn({ address }, 'link: too many connections that prove nothing; one is cut off')
      stream.on('error', () => undefined)
      stream.destroy()
      return
    }
    this.#greeting.add(stream)
    stream.once('close', () => this.#greeting.delete(stream))
    if (!this.#plain || !(stream instanceof Socket)) {
      this.#greet(wire)
      return
    }
    stream.on('error', () => undefined)
    this.#door.take(stream).then(
      (received) => {
        if (received === undefined) this.#greeting.delete(stream)
        else this.#greet(wire, received)
      },
      (error: unknown) => this.#refused(address, error),
    )
  }

  get #plain(): boolean {
    return this.#options.security.tls === undefined
  }

  /** @param received what was read of it before */
  #greet(wire: Wire, received?: Buffer): void {
    const { stream, address } = wire
    const handshake = new ServerHandshake(this.#party, wire.binding)
    const options = { ...greetOptionsOf(this.#options), ...(received === undefined ? {} : { received }) }
    greetClient(stream, handshake, (applicant) => this.#judge(applicant), options).then(
      ({ connection, agreement }) => {
        this.#greeting.delete(stream)
        this.#gather(connection, agreement)
      },
      (error: unknown) => this.#refused(address, error),
    )
  }

  #refused(address: string, error: unknown): void {
    if (!(error instanceof LinkError)) throw error
    this.#log.warn(
      { address, code: error.code, err: error.cause },
      `link: no session with ${address}: ${error.message}`,
    )
  }

  /** Ends all sessions and takes no more. Resolves when no stream is left. */
  async close(reason = 'the daemon stops'): Promise<void> {
    this.#closed = true
    this.#wires?.close()
    for (const stream of this.#greeting) stream.destroy()
    const error = new LinkError('CLOSED', reason)
    for (const id of [...this.#gatherings.keys()]) this.#scatter(id, error)
    const sessions = [...this.#sessions]
    for (const session of sessions) session.close(reason)
    await Promise.all(sessions.map((session) => session.gone()))
  }

  /** @throws LinkError refuses the peer */
  async #judge(applicant: Applicant): Promise<Admission> {
    const { peer, session, connection, connections } = applicant
    const objection = this.#options.admit?.(applicant)
    if (objection !== undefined) throw new LinkError('NOT_WELCOME', objection)
    const contact = await checkPin(this.#options.peers, peer.name, peer.fingerprint)
    if (contact === 'new')
      this.#log.info({ peer: peer.name }, `link: first contact with ${describePeer(peer)}, pinned`)
    if (session !== undefined) return this.#join(peer.fingerprint, session, connection, connections)
    if (this.#closed || this.#sessions.size + this.#gatherings.size >= LIMITS.linkSessionsMax) {
      throw new LinkError('BUSY', 'too many sessions')
    }
    const id = randomBytes(16).toString('hex')
    const ms = this.#options.handshakeMs ?? LIMITS.handshakeMsMax
    const late = new LinkError('LATE', `the connections of the session did not come together within ${ms} ms`)
    this.#gatherings.set(id, {
      fingerprint: peer.fingerprint,
      count: connections,
      places: ['taken'],
      cancelTimer: (this.#options.clock ?? systemClock).after(ms, () => this.#scatter(id, late)),
    })
    return { session: id, connections }
  }

  #join(fingerprint: string, id: string, place: number, count: number): Admission {
    const gathering = this.#gatherings.get(id)
    if (
      gathering === undefined ||
      gathering.fingerprint !== fingerprint ||
      gathering.count !== count ||
      place >= gathering.count ||
      gathering.places[place] !== undefined
    ) {
      throw new LinkError('NO_SESSION', 'there is no session that this connection could join')
    }
    gathering.places[place] = 'taken'
    return { session: id, connections: gathering.count }
  }

  #gather(connection: Connection, agreement: Agreement): void {
    const id = agreement.session
    const gathering = this.#gatherings.get(id)
    if (gathering === undefined) {
      connection.close(new LinkError('NO_SESSION', 'the session is not there any more'))
      return
    }
    gathering.places[agreement.connection] = connection
    const handler: ConnectionHandler = {
      onFrame: (frame) => this.#takeReady(id, connection, agreement, frame),
      onRoom: () => undefined,
      onEnd: (reason) => this.#scatter(id, reason),
    }
    connection.enterSession(SESSION_PHASE, handler, agreement.window)
    // The others wait until the peer says on the first one that all of them stand.
    if (agreement.connection === 0) connection.resume()
  }

  #takeReady(id: string, connection: Connection, agreement: Agreement, frame: Frame): void {
    const gathering = this.#gatherings.get(id)
    if (frame.kind === KIND.refuse) {
      const { code, message } = decodeReason(frame.payload)
      throw new LinkError(code ?? 'NOT_WELCOME', `the peer refuses: ${message}`)
    }
    if (gathering === undefined || frame.kind !== KIND.ready) {
      throw new LinkError('BAD_FRAME', `a frame of kind ${frame.kind} came before the session`)
    }
    const connections: Connection[] = []
    for (let place = 0; place < gathering.count; place++) {
      const other = gathering.places[place]
      if (other === undefined || other === 'taken') {
        throw new LinkError('BAD_FRAME', 'the session was called ready and is not')
      }
      connections.push(other)
    }
    gathering.cancelTimer()
    this.#gatherings.delete(id)
    connection.pause()
    const sideWires: SideWires = { side: 'listens', expect: () => this.#door.expect() }
    this.#begin(new Session('server', connections, agreement, this.#plain ? sideWires : undefined))
  }

  #begin(session: Session): void {
    for (const old of this.#sessions) {
      if (old.peer.fingerprint === session.peer.fingerprint && old.purpose === session.purpose) {
        old.fail(new LinkError('REPLACED', `${session.peer.name} came back in another session`))
        this.#sessions.delete(old)
      }
    }
    this.#sessions.add(session)
    const peer = session.peer.name
    this.#log.info({ peer, session: session.id }, `link: session with ${describePeer(session.peer)}`)
    session.ended.then((reason) => {
      this.#sessions.delete(session)
      this.#log.info(
        { peer, session: session.id, code: reason.code },
        `link: session over: ${reason.message}`,
      )
    })
    this.#options.onSession(session)
    session.start()
  }

  /** A session that will not be. */
  #scatter(id: string, reason: LinkError): void {
    const gathering = this.#gatherings.get(id)
    if (gathering === undefined) return
    this.#gatherings.delete(id)
    gathering.cancelTimer()
    for (const connection of gathering.places) {
      if (connection !== undefined && connection !== 'taken') connection.close(reason)
    }
    this.#log.warn({ session: id, code: reason.code }, `link: no session: ${reason.message}`)
  }
}
