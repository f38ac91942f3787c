import { once } from 'node:events'
import { createServer, type Socket, connect as tcpConnect } from 'node:net'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import type { LinkClient } from '../../src/link/client.ts'
import { LinkError } from '../../src/link/errors.ts'
import { newIdentity } from '../../src/link/identity.ts'
import type { LinkLog } from '../../src/link/options.ts'
import { MemoryPeers } from '../../src/link/peers.ts'
import { openSecurity, PLAIN, type Security } from '../../src/link/security.ts'
import type { LinkServerOptions } from '../../src/link/server.ts'
import type { Session } from '../../src/link/session.ts'
import { until } from '../support/poll.ts'
import { Authority } from './certificates.ts'
import { connect, listen, openPair, sideOptions } from './pair.ts'

class Log implements LinkLog {
  readonly lines: string[] = []
  readonly debug = (): void => undefined
  readonly info = (_fields: object, message: string): void => void this.lines.push(message)
  readonly warn = this.info

  has(text: string): boolean {
    return this.lines.some((line) => line.includes(text))
  }
}

type ClientOptions = NonNullable<Parameters<typeof connect>[1]>

/** What a client comes to: its first refusal, loss or session. */
async function outcome(
  port: number,
  options: ClientOptions,
): Promise<{ client: LinkClient; log: Log; result: Session | LinkError; refused: boolean }> {
  const log = new Log()
  let client: LinkClient | undefined
  const outcome = await new Promise<{ result: Session | LinkError; refused: boolean }>((resolve) => {
    client = connect(port, {
      log,
      onSession: (result) => resolve({ result, refused: false }),
      onLost: (result) => resolve({ result, refused: false }),
      onRefused: (result) => resolve({ result, refused: true }),
      ...options,
    })
  })
  if (client === undefined) throw new Error('no client')
  return { client, log, ...outcome }
}

/** A server that should refuse a client; both logs should say so. */
async function expectRefusal(
  server: Partial<LinkServerOptions>,
  client: ClientOptions,
  code: string,
  words: string,
): Promise<void> {
  const serverLog = new Log()
  const sessions: Session[] = []
  const linkServer = await listen({
    log: serverLog,
    onSession: (session) => void sessions.push(session),
    ...server,
  })
  const { client: linkClient, log, result, refused } = await outcome(linkServer.address.port, client)
  expect(result).toMatchObject({ code })
  expect(refused).toBe(true)
  expect(log.lines.filter((line) => line.includes(words))).not.toEqual([])
  await until(() => serverLog.has(words), `the log of the accepting side: ${words}: ${serverLog.lines}`)
  expect(sessions).toEqual([])
  expect(linkClient.state).toBe('waiting')
  await linkClient.close()
  await linkServer.close()
}

describe('a client', () => {
  it('comes back after a loss, again and again', async () => {
    const pair = await openPair({ client: { random: () => 0 } })
    const seen = new Set<string>([pair.clientSession.id])
    for (let round = 0; round < 3; round++) {
      pair.client.session?.fail(new LinkError('CUT', 'a test cut it'))
      await until(
        () => pair.client.state === 'connected' && !seen.has(pair.client.session?.id ?? ''),
        'a new session',
      )
      seen.add(pair.client.session?.id ?? '')
      await until(() => pair.server.sessions().length === 1, 'one session')
    }
    await pair[Symbol.asyncDispose]()
  })

  it('waits for a server that is not there, and finds it when it comes', async () => {
    const probe = createServer().listen(0, '127.0.0.1')
    await once(probe, 'listening')
    const address = probe.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    probe.close()
    await once(probe, 'close')
    const delays: number[] = []
    let session: Session | undefined
    const client = connect(port, {
      random: () => 0,
      onLost: (reason, retryMs) => {
        expect(reason.code).toBe('UNREACHABLE')
        delays.push(retryMs)
      },
      onSession: (found) => {
        session = found
      },
    })
    await until(() => delays.length === 3, 'three attempts')
    expect(delays).toEqual([50, 100, 200])
    const server = await listen({ port })
    client.retryNow()
    await until(() => session !== undefined, 'a session')
    await client.close()
    await server.close()
  })

  it('can be closed at any moment', async () => {
    const server = await listen()
    const silent = createServer(() => undefined).listen(0, '127.0.0.1')
    await once(silent, 'listening')
    const address = silent.address()
    const silentPort = typeof address === 'object' && address !== null ? address.port : 0
    for (const port of [server.address.port, silentPort]) {
      for (let round = 0; round < 20; round++) {
        const client = connect(port)
        for (let turn = 0; turn < round; turn++) await new Promise((resolve) => setImmediate(resolve))
        await client.close()
        expect(client.state).toBe('closed')
      }
    }
    await until(() => server.sessions().length === 0 && server.handshakes === 0, 'nothing left')
    await server.close()
    silent.close()
  })

  it('that comes back while its old session seems alive takes its place', async () => {
    const identity = newIdentity()
    const ends: string[] = []
    const server = await listen({
      onSession: (session) => void session.ended.then(({ code }) => ends.push(code)),
    })
    const { port } = server.address
    const first = await outcome(port, { identity })
    const other = await outcome(port, { identity, purpose: 'another purpose' })
    const second = await outcome(port, { identity })
    await until(() => ends.length === 1, 'the end of the first')
    expect(ends).toEqual(['REPLACED'])
    expect(server.sessions()).toHaveLength(2)
    // Two that fight for one place do not do so quickly.
    await until(() => first.client.state === 'waiting', 'the first waits')
    expect(first.client.lastReason?.code).toBe('REPLACED')
    for (const { client } of [first, other, second]) await client.close()
    await server.close()
  })
})

describe('refusals, which both sides log', () => {
  it('an identity that is not the pinned one, on either side', async () => {
    const other = new MemoryPeers([
      ['connecting', 'sha256:another'],
      ['accepting', 'sha256:another'],
    ])
    await expectRefusal({ peers: other }, {}, 'IDENTITY', 'sha256:another')
    await expectRefusal({}, { peers: other }, 'IDENTITY', 'sha256:another')
  })

  it('a wrong key, a missing key', async () => {
    const key = Buffer.from('the key of the link')
    const security: Security = { ...PLAIN, key }
    const wrong: Security = { ...PLAIN, key: Buffer.from('not the key of the link') }
    await expectRefusal({ security }, { security: wrong }, 'AUTHENTICATION', 'authentication failed')
    await expectRefusal({ security }, {}, 'AUTHENTICATION', 'authentication failed')
    await expectRefusal({}, { security }, 'AUTHENTICATION', 'authentication failed')
  })

  it('a capability that one side requires', async () => {
    const capabilities = [{ name: 'new-thing', required: true }]
    await expectRefusal({ capabilities }, {}, 'CAPABILITY', 'requires new-thing')
    await expectRefusal({}, { capabilities }, 'CAPABILITY', 'requires new-thing')
  })

  it('a peer that the server does not want', async () => {
    await expectRefusal(
      { admit: ({ peer }) => `${peer.name} is not on the list` },
      {},
      'NOT_WELCOME',
      'connecting is not on the list',
    )
  })

  it('are asked again at once after retryNow, when the reason is gone', async () => {
    const peers = new MemoryPeers([['accepting', 'sha256:another']])
    const server = await listen()
    let session: Session | undefined
    const { client } = await outcome(server.address.port, {
      peers,
      onSession: (found) => {
        session = found
      },
    })
    expect(client.state).toBe('waiting')
    peers.forget('accepting')
    client.retryNow()
    await until(() => session !== undefined, 'a session')
    expect(peers.pinned('accepting')).toBe(session?.peer.fingerprint)
    await client.close()
    await server.close()
  })

  it('a pool that cannot keep a pin takes no peer, and goes on', async () => {
    const log = new Log()
    let full = true
    const memory = new MemoryPeers()
    const peers = {
      pinned: (name: string) => memory.pinned(name),
      pin: (name: string, fingerprint: string) =>
        full ? Promise.reject(new Error('ENOSPC at /secret/path')) : memory.pin(name, fingerprint),
    }
    const server = await listen({ peers, log })
    const first = await outcome(server.address.port, {})
    expect(first.result).toMatchObject({ code: 'BUSY' })
    expect((first.result as LinkError).message).not.toContain('/secret')
    full = false
    first.client.retryNow()
    await until(() => first.client.state === 'connected', 'a session')
    await first.client.close()
    await server.close()
  })
})

describe('a server', () => {
  it('pins each peer at first contact', async () => {
    const peers = new MemoryPeers()
    const identity = newIdentity()
    const server = await listen({ peers })
    const { client } = await outcome(server.address.port, { identity })
    expect(peers.entries()).toEqual([['connecting', identity.fingerprint]])
    await client.close()
    await server.close()
  })

  it('does not listen on plain TCP for other machines unless that is allowed', async () => {
    await expect(listen({ host: '0.0.0.0' })).rejects.toMatchObject({ code: 'PLAIN' })
    const server = await listen({ host: '0.0.0.0', security: { ...PLAIN, allowPlain: true } })
    await server.close()
    const { client, result, refused } = await outcome(1, { host: '192.0.2.1' })
    expect(result).toMatchObject({ code: 'PLAIN' })
    expect(refused).toBe(true)
    await client.close()
  })

  it('says what is wrong with its address', async () => {
    const server = await listen()
    await expect(listen({ port: server.address.port })).rejects.toMatchObject({
      name: 'UserError',
      code: 'BUSY',
    })
    await server.close()
  })

  it('is not moved by strangers: other protocols, silence, hang-ups, in any number', async () => {
    const log = new Log()
    const server = await listen({ log, handshakeMs: 300 })
    const { port } = server.address
    const words = [
      'GET / HTTP/1.1\r\n\r\n',
      '',
      'FsLk',
      '\u0016\u0003\u0001\u0000\u0005hello',
      'x'.repeat(100_000),
    ]
    const sockets: Socket[] = []
    for (let index = 0; index < LIMITS.linkHandshakesMax + 40; index++) {
      const socket = tcpConnect({ host: '127.0.0.1', port })
      socket.on('error', () => undefined).resume()
      socket.write(words[index % words.length] ?? '')
      if (index % 7 === 0) socket.end()
      sockets.push(socket)
    }
    await until(
      () => server.handshakes === 0 && sockets.every((socket) => socket.closed || socket.readableEnded),
      'all of them gone',
    )
    expect(log.has('what came is not a frame')).toBe(true)
    expect(log.has('the peer speaks TLS and this side does not')).toBe(true)
    expect(log.has('not done after 300 ms')).toBe(true)
    const { client, result } = await outcome(port, {})
    expect(result).not.toHaveProperty('code')
    await client.close()
    for (const socket of sockets) socket.destroy()
    await server.close()
  })

  it('takes further connections only into the session of the same peer', async () => {
    const server = await listen({ handshakeMs: 500 })
    const sides = sideOptions('connecting')
    const thief = newIdentity()
    const { ClientHandshake } = await import('../../src/link/handshake.ts')
    const { greetServer } = await import('../../src/link/greet.ts')
    const { partyOf } = await import('../../src/link/options.ts')
    const greet = async (
      identity: typeof sides.identity,
      session: string | undefined,
      connection: number,
      connections = 3,
    ) => {
      const socket = tcpConnect({ host: '127.0.0.1', port: server.address.port })
      await once(socket, 'connect')
      const party = partyOf({ ...sides, identity, name: identity === thief ? 'thief' : 'peer' })
      const handshake = new ClientHandshake(
        party,
        { purpose: 'p', session, connection, connections },
        Buffer.alloc(0),
      )
      return greetServer(socket, handshake, async () => undefined, {})
    }
    const { agreement, connection } = await greet(sides.identity, undefined, 0)
    await expect(greet(thief, agreement.session, 1)).rejects.toMatchObject({ code: 'NO_SESSION' })
    // It contradicts the first one.
    for (const other of [2, 4])
      await expect(greet(sides.identity, agreement.session, 1, other)).rejects.toMatchObject({
        code: 'NO_SESSION',
      })
    const second = await greet(sides.identity, agreement.session, 1)
    await expect(greet(sides.identity, agreement.session, 1)).rejects.toMatchObject({ code: 'NO_SESSION' })
    await expect(greet(sides.identity, 'f00', 2)).rejects.toMatchObject({ code: 'NO_SESSION' })
    // The third never comes: the others are not kept.
    second.connection.resume()
    connection.resume()
    await Promise.all([connection.gone, second.connection.gone])
    expect(server.sessions()).toEqual([])
    await server.close()
  })
})

describe('TLS', () => {
  let authority: Authority
  let stranger: Authority
  let host: Security
  beforeAll(async () => {
    authority = await Authority.make()
    stranger = await Authority.make()
    host = await openSecurity({ tls: await authority.issue('IP:127.0.0.1') })
  })
  afterAll(async () => {
    await authority.remove()
    await stranger.remove()
  })

  async function roundTrip(security: Security, clientSecurity = security): Promise<void> {
    const server = await listen({
      security,
      onSession: (session) =>
        session.onChannel((offer) => {
          const channel = offer.accept()
          channel.onMessage((message) => void channel.reply(message, 0, message.payload))
        }),
    })
    const { client, result } = await outcome(server.address.port, { security: clientSecurity })
    expect(result).not.toHaveProperty('code')
    const channel = await client.session?.open('echo')
    const payload = Buffer.alloc(300_000, 'x')
    expect((await channel?.request(1, payload))?.payload.equals(payload)).toBe(true)
    await client.close()
    await server.close()
  }

  it('carries a session, with certificates on both sides', async () => {
    await roundTrip(host)
  })

  it('goes together with a key', async () => {
    const key = Buffer.from('the key of the link')
    await roundTrip({ ...host, key })
    await expectRefusal(
      { security: { ...host, key } },
      { security: host },
      'AUTHENTICATION',
      'authentication failed',
    )
  })

  it('takes a certificate for the name that is asked for, and no other', async () => {
    const named = await openSecurity({ tls: await authority.issue('storage.example') })
    if (named.tls === undefined) throw new Error('no TLS')
    await roundTrip(named, { ...named, tls: { ...named.tls, peerName: 'storage.example' } })
    const server = await listen({ security: named })
    const { client, result, refused } = await outcome(server.address.port, { security: named })
    expect(result).toMatchObject({ code: 'TLS' })
    expect(refused).toBe(true)
    await client.close()
    await server.close()
  })

  it('refuses a server and a client with certificates of another authority', async () => {
    const foreign = await openSecurity({ tls: await stranger.issue('IP:127.0.0.1') })
    const server = await listen({ security: foreign })
    const first = await outcome(server.address.port, { security: host })
    expect(first.result).toMatchObject({ code: 'TLS' })
    await first.client.close()
    await server.close()
    // A client that believes the server, but has a certificate that the server does not believe.
    if (foreign.tls === undefined || host.tls === undefined) throw new Error('no TLS')
    const mixed: Security = { ...foreign, tls: { ...foreign.tls, ca: host.tls.ca } }
    const log = new Log()
    const sessions: Session[] = []
    const strict = await listen({ security: host, log, onSession: (session) => void sessions.push(session) })
    const second = await outcome(strict.address.port, { security: mixed })
    expect(second.result).toHaveProperty('code')
    expect(sessions).toEqual([])
    await second.client.close()
    await strict.close()
  })

  it('is not mixed with plain TCP, and both sides are told in words that help', async () => {
    const log = new Log()
    const secure = await listen({ security: host, log })
    const plainClient = await outcome(secure.address.port, {})
    expect((plainClient.result as LinkError).message).toContain('does it want TLS?')
    await until(() => log.has('no TLS with a peer'), 'the log of the server')
    await plainClient.client.close()
    await secure.close()
    const plainLog = new Log()
    const plain = await listen({ log: plainLog })
    const secureClient = await outcome(plain.address.port, { security: host })
    expect(secureClient.result).toHaveProperty('code')
    await until(() => plainLog.has('the peer speaks TLS'), 'the log of the server')
    await secureClient.client.close()
    await plain.close()
  })
})
