/** Two ends of a link in this process, over loopback, for the tests of what runs on it. */
import { LinkClient, type LinkClientOptions } from '../../src/link/client.ts'
import { newIdentity } from '../../src/link/identity.ts'
import { MemoryPeers } from '../../src/link/peers.ts'
import { PLAIN } from '../../src/link/security.ts'
import { LinkServer, type LinkServerOptions } from '../../src/link/server.ts'
import type { Session } from '../../src/link/session.ts'
import { until } from '../support/poll.ts'

export interface PairOptions {
  readonly server?: Partial<LinkServerOptions>
  readonly client?: Partial<LinkClientOptions>
}

/** Everything that one side needs and a test does not care about. */
export function sideOptions(name: string) {
  return { identity: newIdentity(), name, software: 'test', security: PLAIN, peers: new MemoryPeers() }
}

export async function listen(options: Partial<LinkServerOptions> = {}): Promise<LinkServer> {
  return LinkServer.listen({
    ...sideOptions('accepting'),
    host: '127.0.0.1',
    port: 0,
    onSession: () => undefined,
    ...options,
  })
}

export function connect(port: number, options: Partial<LinkClientOptions> = {}): LinkClient {
  return LinkClient.connect({
    ...sideOptions('connecting'),
    host: '127.0.0.1',
    port,
    peerName: 'accepting',
    purpose: 'test',
    onSession: () => undefined,
    ...options,
  })
}

export interface Pair extends AsyncDisposable {
  readonly server: LinkServer
  readonly client: LinkClient
  readonly serverSession: Session
  readonly clientSession: Session
}

/** A server, a client, and the session that they have. */
export async function openPair({ server = {}, client = {} }: PairOptions = {}): Promise<Pair> {
  const sessions: { server?: Session; client?: Session } = {}
  const linkServer = await listen({
    ...server,
    onSession(session) {
      sessions.server = session
      server.onSession?.(session)
    },
  })
  const linkClient = connect(linkServer.address.port, {
    ...client,
    onSession(session) {
      sessions.client = session
      client.onSession?.(session)
    },
  })
  await until(() => sessions.server !== undefined && sessions.client !== undefined, 'a session on both sides')
  if (sessions.server === undefined || sessions.client === undefined) throw new Error('no sessions')
  return {
    server: linkServer,
    client: linkClient,
    serverSession: sessions.server,
    clientSession: sessions.client,
    async [Symbol.asyncDispose]() {
      await linkClient.close()
      await linkServer.close()
    },
  }
}
