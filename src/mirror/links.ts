import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatLinkAddress, parseLinkAddress } from '../link/address.ts'
import { LinkClient } from '../link/client.ts'
import { LinkError } from '../link/errors.ts'
import { type Identity, openIdentity } from '../link/identity.ts'
import type { LinkLog, LinkOptions } from '../link/options.ts'
import { FilePeers, type KnownPeers } from '../link/peers.ts'
import { openSecurity, type SecurityOptions } from '../link/security.ts'
import { LinkServer } from '../link/server.ts'
import type { Session } from '../link/session.ts'
import type { Wire } from '../link/transport.ts'

/**
 * The links of one daemon to others: who it is (POOL/identity), whom it knows (POOL/peers.json), where it listens, and one client
 * for each address that a mirror dials. Sessions that stand are handed out, whoever dialled.
 */
export interface LinksOptions {
  readonly directory: string // of the pool
  readonly name: string // of this daemon, for its peers
  readonly listen: string | undefined // HOST:PORT
  readonly security: SecurityOptions
  readonly software: string
  readonly log: LinkLog
  /** TCP connections of a session that this side dials. */
  readonly connections?: number
  /** What this side can beside mirrors themselves. */
  readonly capabilities?: readonly string[]
  /** @param address that this side dialled; undefined: the peer did */
  onSession(session: Session, address: string | undefined): void
  /** An address that is dialled gives no session, for a reason that only an operator can settle. */
  onRefused(address: string, reason: LinkError): void
  /** In the place of files and sockets: a simulation's. */
  readonly world?: LinkWorld
}

export interface LinkWorld {
  readonly identity: Identity
  readonly peers: KnownPeers
  /** Every stream that comes goes to `take`. */
  listen(take: (wire: Wire) => void): void
  /** @throws LinkError */
  dial(address: string): Promise<Wire>
  random(): number
}

interface Dialled {
  readonly client: LinkClient
  users: number
  readonly waiting: Set<(outcome: Session | LinkError) => void>
}

/** One for each address: where two of them lead to the same peer, the sessions do not replace each other. */
function purposeOf(address: string): string {
  return `mirror ${createHash('sha256').update(address).digest('hex').slice(0, 16)}`
}

export class Links {
  readonly #options: LinksOptions
  readonly #link: LinkOptions
  readonly #peers: KnownPeers
  readonly #dialled = new Map<string, Dialled>()
  #server: LinkServer | undefined

  /** @throws UserError what is wrong with keys, certificates, or the address */
  static async open(options: LinksOptions): Promise<Links> {
    const { directory, name, software, log, world } = options
    const peers = world?.peers ?? (await FilePeers.open(join(directory, 'peers.json')))
    const link: LinkOptions = {
      identity: world?.identity ?? (await openIdentity(join(directory, 'identity'))),
      name,
      software,
      security: await openSecurity(options.security),
      peers,
      capabilities: [
        { name: 'mirror-1', required: true },
        ...(options.capabilities ?? []).map((name) => ({ name, required: false })),
      ],
      log,
    }
    return new Links(options, link, peers)
  }

  private constructor(options: LinksOptions, link: LinkOptions, peers: KnownPeers) {
    this.#options = options
    this.#peers = peers
    this.#link = link
  }

  get fingerprint(): string {
    return this.#link.identity.fingerprint
  }

  /** Whom this side has met: names, each with the fingerprint that is pinned. */
  peers(): readonly (readonly [string, string])[] {
    return this.#peers.entries()
  }

  /** The next one that comes under that name is taken as it is. @returns whether it was known */
  async forget(name: string): Promise<boolean> {
    const known = await this.#peers.forget(name)
    if (known) for (const { client } of this.#dialled.values()) client.retryNow()
    return known
  }

  /** HOST:PORT as bound. */
  get listening(): string | undefined {
    if (this.#options.world !== undefined) return this.#options.listen
    return this.#server === undefined ? undefined : formatLinkAddress(this.#server.address)
  }

  /** Takes peers from now on. @throws UserError */
  async listen(): Promise<void> {
    const { listen, world } = this.#options
    if (listen === undefined) return
    const { host, port } = parseLinkAddress(listen, 'link', 0)
    const onSession = (session: Session): void => this.#options.onSession(session, undefined)
    const options = { ...this.#link, host, port, onSession }
    if (world !== undefined) {
      const server = new LinkServer(options)
      this.#server = server
      world.listen((wire) => server.take(wire))
      return
    }
    try {
      this.#server = await LinkServer.listen(options)
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      throw new UserError('FAILED', `cannot listen for peers on ${listen}: ${error.message}`, {
        cause: error,
      })
    }
  }

  /** Keeps a session with that address for as long as somebody wants one; each `dial` is undone by one `release`. */
  dial(address: string): void {
    const known = this.#dialled.get(address)
    if (known !== undefined) {
      known.users++
      return
    }
    const { host, port } = parseLinkAddress(address, 'the peer')
    const waiting: Dialled['waiting'] = new Set()
    const tell = (outcome: Session | LinkError): void => {
      for (const each of [...waiting]) each(outcome)
    }
    const { world } = this.#options
    const client = LinkClient.connect({
      ...this.#link,
      ...(world === undefined ? {} : { dial: () => world.dial(address), random: () => world.random() }),
      host,
      port,
      peerName: address,
      purpose: purposeOf(address),
      connections: this.#options.connections ?? 2,
      retryMs: { min: LIMITS.linkRetryMsMin, max: 5_000 },
      onSession: (session) => {
        this.#options.onSession(session, address)
        // In a turn of its own: asking for channels comes after the session has started.
        setImmediate(() => tell(session))
      },
      onLost: (reason) => tell(reason),
      onRefused: (reason) => {
        tell(reason)
        this.#options.onRefused(address, reason)
      },
    })
    this.#dialled.set(address, { client, users: 1, waiting })
  }

  async release(address: string): Promise<void> {
    const dialled = this.#dialled.get(address)
    if (dialled === undefined) return
    dialled.users--
    if (dialled.users > 0) return
    this.#dialled.delete(address)
    await dialled.client.close('nobody needs it any more')
  }

  /** Does not wait for the next attempt. */
  retry(address: string): void {
    this.#dialled.get(address)?.client.retryNow()
  }

  /** The session with an address that is dialled, now or as soon as one attempt has ended. @throws UserError FAILED why there is none */
  session(address: string): Promise<Session> {
    const dialled = this.#dialled.get(address)
    if (dialled === undefined) throw new UserError('FAILED', `${address} is not connected to`)
    const { client } = dialled
    const standing = client.session
    if (client.state === 'connected' && standing !== undefined && standing.endReason === undefined) {
      return Promise.resolve(standing)
    }
    client.retryNow()
    return new Promise((resolve, reject) => {
      const settle = (outcome: Session | LinkError): void => {
        dialled.waiting.delete(settle)
        if (outcome instanceof LinkError) {
          const text = `cannot reach the peer ${address}: ${outcome.message}`
          reject(new UserError('FAILED', text, { cause: outcome }))
        } else {
          resolve(outcome)
        }
      }
      dialled.waiting.add(settle)
    })
  }

  async close(): Promise<void> {
    const clients = [...this.#dialled.values()].map(({ client }) => client)
    this.#dialled.clear()
    await Promise.all([this.#server?.close(), ...clients.map((client) => client.close())])
  }
}
