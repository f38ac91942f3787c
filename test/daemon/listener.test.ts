import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { describe, expect, it, onTestFinished } from 'vitest'
import { UserError } from '../../src/base/errors.ts'
import { type ExportSource, Listener, type ListenerOptions } from '../../src/daemon/listener.ts'
import type { SessionSpec } from '../../src/datapath/datapath.ts'
import { describeNbdExport, listNbdExports } from '../../src/nbd/client.ts'
import { HEADER, MAGIC, OPTION, OPTION_REPLY } from '../../src/nbd/constants.ts'
import {
  decodeOptionReplyHeader,
  encodeClientFlags,
  encodeExportRequest,
  encodeMetaContextRequest,
  encodeOption,
} from '../../src/nbd/handshake.ts'
import { until } from '../support/poll.ts'

function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), 'fullstripe-listener-'))
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }))
  return directory
}

const log = pino({ level: process.env['TEST_LOG'] ?? 'silent' })

/** Exports whose connections are only taken note of; the test plays the datapath. */
class Taken implements ExportSource {
  readonly sessions: { exportName: string; session: SessionSpec }[] = []
  /** How many listeners the last socket had when it was handed over. */
  listeners: Record<string, number> = {}
  /** Bytes that Node had read from the last socket and that were not handed over with it. */
  forgotten = 0
  listCalls = 0
  names = ['disk']
  description = 'a disk'
  refuseToServe = false

  list() {
    this.listCalls++
    return this.names.map((name) => ({ name, description: this.description }))
  }

  find(name: string) {
    if (!this.names.includes(name)) return undefined
    const contexts = [{ id: 1, name: 'base:allocation' }]
    return {
      name,
      description: this.description,
      size: 2 ** 30,
      readOnly: name === 'frozen',
      canMultiConn: true,
      contexts,
    }
  }

  serve(exportName: string, session: SessionSpec): void {
    if (this.refuseToServe) throw new UserError('NOT_FOUND', 'it has just been deleted')
    const { socket } = session
    const events = ['data', 'drain', 'end', 'error', 'close', 'readable', 'timeout']
    this.listeners = Object.fromEntries(events.map((event) => [event, socket.listenerCount(event)]))
    this.forgotten = socket.readableLength
    this.sessions.push({ exportName, session })
    socket.on('error', () => undefined)
    onTestFinished(() => {
      socket.destroy()
    })
  }
}

async function open(options: Partial<ListenerOptions> & Pick<ListenerOptions, 'uris'>): Promise<Listener> {
  const listener = await Listener.open({ exports: new Taken(), log, closeMsMax: 100, ...options })
  onTestFinished(() => listener.close())
  return listener
}

async function failure(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise
  } catch (error) {
    return error
  }
  throw new Error('it succeeded')
}

const unixUri = (path: string) => `nbd+unix:///?socket=${path}`

/** A connection that a test drives by hand. Collects what the server says. */
class Peer {
  readonly socket: Socket
  received: Buffer = Buffer.alloc(0)
  ended = false
  closed = false

  constructor(path: string | number) {
    this.socket = typeof path === 'string' ? connect({ path }) : connect({ port: path, host: '127.0.0.1' })
    this.socket.on('data', (chunk) => {
      this.received = Buffer.concat([this.received, chunk])
    })
    this.socket.on('error', () => undefined)
    this.socket.on('end', () => {
      this.ended = true
    })
    this.socket.on('close', () => {
      this.closed = true
    })
    onTestFinished(() => {
      this.socket.destroy()
    })
  }

  send(...parts: Buffer[]): this {
    this.socket.write(Buffer.concat(parts))
    return this
  }

  async bytes(count: number): Promise<Buffer> {
    await until(() => this.received.length >= count || this.closed, `${count} bytes from the server`)
    expect(this.received.length).toBeGreaterThanOrEqual(count)
    const taken = this.received.subarray(0, count)
    this.received = this.received.subarray(count)
    return taken
  }

  /** The type of the next option reply, whose data is dropped. */
  async reply(): Promise<number> {
    const header = decodeOptionReplyHeader(await this.bytes(HEADER.optionReply))
    await this.bytes(header.length)
    return header.type
  }

  async greeted(): Promise<this> {
    expect((await this.bytes(HEADER.greeting)).readUInt32BE(0)).toBe(MAGIC.init[0])
    return this.send(encodeClientFlags(3))
  }
}

const GO = encodeOption(OPTION.GO, encodeExportRequest({ name: 'disk', infos: [] }))
/** Replies to that GO: one INFO_EXPORT and the ACK. */
const GO_REPLY_LENGTH = 2 * HEADER.optionReply + 12

describe('where it listens', () => {
  it('takes TCP and unix sockets at once and says where', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const uris = ['nbd://127.0.0.1:0', unixUri(path), 'nbd://127.0.0.1:0']
    const listener = await open({ uris })
    const addresses = listener.addresses()
    expect(addresses).toEqual([
      expect.stringMatching(/^nbd:\/\/127\.0\.0\.1:[1-9]\d+$/),
      unixUri(path),
      expect.stringMatching(/^nbd:\/\/127\.0\.0\.1:[1-9]\d+$/),
    ])
    expect(addresses[0]).not.toBe(addresses[2])
    for (const address of addresses) {
      expect(await listNbdExports(address)).toEqual([{ name: 'disk', description: 'a disk' }])
    }
    await listener.close()
    for (const address of addresses) {
      expect(await failure(listNbdExports(address))).toMatchObject({ code: 'UNREACHABLE' })
    }
    expect(existsSync(path)).toBe(false)
  })

  it('takes IPv6', async ({ skip }) => {
    const probe = createServer()
    const available = await new Promise((resolve) => {
      probe.once('error', () => resolve(false)).listen(0, '::1', () => probe.close(() => resolve(true)))
    })
    if (available !== true) skip('this machine has no IPv6 loopback')
    const listener = await open({ uris: ['nbd://[::1]:0'] })
    expect(await listNbdExports(listener.addresses()[0] ?? '')).toHaveLength(1)
  })

  it('takes the abstract namespace', async () => {
    const uri = `nbd+unix:///?socket=%00fullstripe-test-${process.pid}`
    const listener = await open({ uris: [uri] })
    expect(await listNbdExports(uri)).toHaveLength(1)
    expect(await failure(Listener.open({ uris: [uri], exports: new Taken(), log }))).toMatchObject({
      code: 'BUSY',
    })
    await listener.close()
    await (await open({ uris: [uri] })).close()
  })

  it('takes paths that are longer than a socket address', async () => {
    const directory = join(temporaryDirectory(), 'd'.repeat(100))
    mkdirSync(directory)
    const path = join(directory, 'nbd.sock')
    const listener = await open({ uris: [unixUri(path)] })
    expect(listener.addresses()).toEqual([unixUri(path)])
    expect(statSync(path).isSocket()).toBe(true)
    expect(await failure(Listener.open({ uris: [unixUri(path)], exports: new Taken(), log }))).toMatchObject({
      code: 'BUSY',
    })
    await listener.close()
    expect(existsSync(path)).toBe(false)
  })

  it('refuses a port that is in use', async () => {
    const listener = await open({ uris: ['nbd://127.0.0.1:0'] })
    const [uri = ''] = listener.addresses()
    const error = await failure(Listener.open({ uris: [uri], exports: new Taken(), log }))
    expect(error).toBeInstanceOf(UserError)
    expect(error).toMatchObject({ code: 'BUSY', message: expect.stringContaining(uri) })
  })

  it('refuses a socket that somebody listens on, and leaves it alone', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const other = createServer((socket) => socket.on('error', () => undefined).end('mine'))
    await new Promise<void>((resolve) => other.listen(path, resolve))
    onTestFinished(() => {
      other.close()
    })
    const error = await failure(Listener.open({ uris: [unixUri(path)], exports: new Taken(), log }))
    expect(error).toMatchObject({ code: 'BUSY', message: expect.stringContaining(path) })
    expect((await new Peer(path).bytes(4)).toString()).toBe('mine')
  })

  it('refuses a socket whose owner is too busy to answer', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const script = `require('node:net').createServer().listen({ path: ${JSON.stringify(path)}, backlog: 1 })`
    const child = spawn(process.execPath, ['-e', script], { stdio: 'ignore' })
    onTestFinished(() => {
      child.kill('SIGKILL')
    })
    const connecting = (): Promise<string | undefined> => {
      const socket = connect({ path })
      onTestFinished(() => {
        socket.destroy()
      })
      return new Promise((resolve) => {
        socket
          .once('connect', () => resolve(undefined))
          .once('error', ({ code }: NodeJS.ErrnoException) => resolve(code))
      })
    }
    // Its name is there a little before it listens.
    await until(async () => (await connecting()) === undefined, 'the other server listens')
    child.kill('SIGSTOP')
    // The queue of a stopped process fills up; after that, connecting fails although somebody is there.
    let refused: string | undefined
    for (let count = 0; count < 20 && refused === undefined; count++) refused = await connecting()
    expect(refused).toBe('EAGAIN')
    expect(await failure(Listener.open({ uris: [unixUri(path)], exports: new Taken(), log }))).toMatchObject({
      code: 'BUSY',
    })
    expect(existsSync(path)).toBe(true)
  })

  it('takes over the socket of a server that was killed', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const script = `require('node:net').createServer().listen(${JSON.stringify(path)})`
    const child = spawn(process.execPath, ['-e', script], { stdio: 'ignore' })
    const exited = new Promise((resolve) => child.once('exit', resolve))
    await until(() => existsSync(path), 'the other server listens')
    child.kill('SIGKILL')
    await exited
    expect(existsSync(path)).toBe(true)
    await open({ uris: [unixUri(path)] })
    expect(await listNbdExports(unixUri(path))).toHaveLength(1)
  })

  it('does not touch what is no socket', async () => {
    const path = join(temporaryDirectory(), 'precious')
    writeFileSync(path, 'data')
    const error = await failure(Listener.open({ uris: [unixUri(path)], exports: new Taken(), log }))
    expect(error).toMatchObject({ code: 'EXISTS', message: expect.stringContaining(path) })
    expect(statSync(path).size).toBe(4)
  })

  for (const [what, uri, code] of [
    ['a directory that is not there', unixUri('/no/such/directory/nbd.sock'), 'FAILED'],
    ['an address of another machine', 'nbd://192.0.2.1:10809', 'FAILED'],
    ['TLS', 'nbds://127.0.0.1:0', 'USAGE'],
    ['an export name', 'nbd://127.0.0.1:0/disk', 'USAGE'],
    ['a user', 'nbd://me@127.0.0.1:0', 'USAGE'],
    ['no URI', '127.0.0.1:10809', 'USAGE'],
  ] as const) {
    it(`refuses ${what}`, async () => {
      const error = await failure(Listener.open({ uris: [uri], exports: new Taken(), log }))
      expect(error).toBeInstanceOf(UserError)
      expect(error).toMatchObject({ code })
      expect((error as UserError).message).not.toContain('\n')
    })
  }

  it('listens on all or on none', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const uris = [unixUri(path), 'nbd://192.0.2.1:10809']
    await failure(Listener.open({ uris, exports: new Taken(), log }))
    expect(existsSync(path)).toBe(false)
  })
})

describe('the hand-over', () => {
  const serving = async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    const listener = await open({ uris: [unixUri(path)], exports })
    return { path, exports, listener }
  }
  /** What a datapath would get to see: the bytes handed over and those that come after. */
  const stream = (session: SessionSpec) => {
    const all: Buffer[] = [session.received]
    session.socket.on('data', (chunk) => all.push(chunk))
    session.socket.resume()
    return () => Buffer.concat(all)
  }

  it('passes on what was negotiated', async () => {
    const { path, exports, listener } = await serving()
    exports.names = ['disk', 'frozen']
    const peer = await new Peer(path).greeted()
    peer.send(encodeOption(OPTION.EXTENDED_HEADERS))
    expect(await peer.reply()).toBe(OPTION_REPLY.ACK)
    peer.send(
      encodeOption(
        OPTION.SET_META_CONTEXT,
        encodeMetaContextRequest({ name: 'frozen', queries: ['base:allocation'] }),
      ),
    )
    expect([await peer.reply(), await peer.reply()]).toEqual([OPTION_REPLY.META_CONTEXT, OPTION_REPLY.ACK])
    peer.send(encodeOption(OPTION.GO, encodeExportRequest({ name: 'frozen', infos: [] })))
    await peer.bytes(GO_REPLY_LENGTH)
    await until(() => exports.sessions.length === 1, 'the hand-over')
    const taken = exports.sessions[0]
    expect(taken).toMatchObject({ exportName: 'frozen' })
    expect(taken?.session).toMatchObject({ mode: 'extended', contexts: [1], readOnly: true })
    expect(taken?.session.received).toHaveLength(0)
    expect(listener.connectionCount).toBe(1)
    taken?.session.onClose('disconnect')
    expect(listener.connectionCount).toBe(0)
  })

  it('gives the socket paused, without listeners of its own, after the last reply', async () => {
    const { path, exports } = await serving()
    const peer = (await new Peer(path).greeted()).send(GO)
    await until(() => exports.sessions.length === 1, 'the hand-over')
    const { socket } = exports.sessions[0]?.session ?? expect.fail('no session')
    expect(socket.isPaused()).toBe(true)
    expect(socket.writableLength).toBe(0)
    // The one for 'end' is Node's own.
    expect(exports.listeners).toEqual({
      data: 0,
      drain: 0,
      end: 1,
      error: 0,
      close: 0,
      readable: 0,
      timeout: 0,
    })
    expect(await peer.bytes(GO_REPLY_LENGTH)).toHaveLength(GO_REPLY_LENGTH)
  })

  it('loses no byte, however early the client speaks', async () => {
    const { path, exports } = await serving()
    const early = Buffer.from(Array.from({ length: 300_000 }, (_, i) => i % 251))
    const arrives = async (what: string) => {
      await until(() => exports.sessions.length === 1, `the hand-over ${what}`)
      const { session } = exports.sessions.pop() ?? expect.fail('no session')
      const all = stream(session)
      await until(() => all().length >= early.length, `all bytes ${what}`)
      expect(all().equals(early), what).toBe(true)
      return session.received.length
    }
    // All at once: greeting, option and requests, so that a lot has been read when negotiation ends ...
    const hasty = new Peer(path).send(encodeClientFlags(3), GO, early)
    expect(await arrives('of a hasty client')).toBeGreaterThan(0)
    await hasty.bytes(HEADER.greeting + GO_REPLY_LENGTH)
    // ... or cut anywhere, the rest as soon as the last reply is there.
    for (const cut of [0, 1, 27, 28, 100, 66_000]) {
      const peer = (await new Peer(path).greeted()).send(GO, early.subarray(0, cut))
      await peer.bytes(GO_REPLY_LENGTH)
      peer.send(early.subarray(cut))
      await arrives(`cut at ${cut}`)
    }
  })

  it('takes along what was read while the last reply waited for its client', async () => {
    const { path, exports } = await serving()
    exports.names = ['disk', ...Array.from({ length: 500 }, (_, i) => `volume-${i}`)]
    exports.description = 'x'.repeat(1000)
    const early = Buffer.alloc(50_000, 'early ')
    const peer = new Peer(path)
    peer.socket.pause()
    // The list fills the socket's buffers, so the reply to GO has to wait, and the requests come in meanwhile.
    peer.send(encodeClientFlags(3), encodeOption(OPTION.LIST), GO)
    await until(() => exports.listCalls === 1, 'the list is made')
    peer.send(early)
    await until(() => peer.socket.writableLength === 0, 'everything is sent')
    for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect(exports.sessions).toHaveLength(0)
    peer.socket.resume()
    await until(() => exports.sessions.length === 1, 'the hand-over')
    expect(exports.forgotten).toBe(0)
    const { session } = exports.sessions[0] ?? expect.fail('no session')
    expect(session.received.length).toBeGreaterThan(0)
    const all = stream(session)
    await until(() => all().length >= early.length, 'all bytes')
    expect(all().equals(early)).toBe(true)
  })

  it('closes the connection when the export cannot be served any more', async () => {
    const { path, exports, listener } = await serving()
    exports.refuseToServe = true
    const peer = (await new Peer(path).greeted()).send(GO)
    await until(() => peer.closed, 'the connection closes')
    expect(listener.connectionCount).toBe(0)
    exports.refuseToServe = false
    await (await new Peer(path).greeted()).send(GO).bytes(GO_REPLY_LENGTH)
  })

  it('survives a client that is gone by then', async () => {
    const { path, exports, listener } = await serving()
    for (let round = 0; round < 50; round++) {
      const peer = new Peer(path)
      peer.socket.write(Buffer.concat([encodeClientFlags(3), GO]), () => peer.socket.destroy())
      await until(() => peer.closed, 'the client is gone')
    }
    await until(() => listener.connectionCount === exports.sessions.length, 'all handshakes are over')
    expect(await describeNbdExport(`nbd+unix:///disk?socket=${path}`)).toMatchObject({ size: 2 ** 30 })
  })
})

describe('clients that misbehave', () => {
  it('have a limited time, silent or slow', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const listener = await open({ uris: [unixUri(path)], handshakeMsMax: 200 })
    const silent = new Peer(path)
    const slow = new Peer(path)
    const drip = setInterval(() => slow.send(Buffer.from([0])), 10)
    onTestFinished(() => clearInterval(drip))
    await until(() => silent.closed && slow.closed, 'both are disconnected', 5000)
    await until(() => listener.connectionCount === 0, 'both are forgotten')
  })

  it('are limited in number', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    const listener = await open({ uris: [unixUri(path)], exports, connectionsMax: 3 })
    const negotiating = await new Peer(path).greeted()
    const served = (await new Peer(path).greeted()).send(GO)
    await served.bytes(GO_REPLY_LENGTH)
    await new Peer(path).greeted()
    const refused = new Peer(path)
    await until(() => refused.closed, 'one too many is closed')
    expect(refused.received).toHaveLength(0)
    expect(listener.connectionCount).toBe(3)
    // Each kind of ending makes room for another: of a handshake ...
    negotiating.socket.destroy()
    await until(() => listener.connectionCount === 2, 'there is room')
    await new Peer(path).greeted()
    expect(listener.connectionCount).toBe(3)
    // ... and of a session.
    exports.sessions[0]?.session.onClose('hangup')
    expect(listener.connectionCount).toBe(2)
    await new Peer(path).greeted()
  })

  it('may hang up at any byte', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    const listener = await open({ uris: [unixUri(path), 'nbd://127.0.0.1:0'], exports })
    const port = Number(/:(\d+)$/.exec(listener.addresses()[1] ?? '')?.[1])
    const session = Buffer.concat([
      encodeClientFlags(3),
      encodeOption(OPTION.STRUCTURED_REPLY),
      encodeOption(77, Buffer.alloc(20)),
      encodeOption(OPTION.LIST),
      encodeOption(OPTION.ABORT),
    ])
    for (let cut = 0; cut <= session.length; cut++) {
      const half = new Peer(path)
      half.socket.end(session.subarray(0, cut))
      const gone = new Peer(path)
      gone.socket.write(session.subarray(0, cut), () => gone.socket.destroy())
      const reset = new Peer(port)
      reset.socket.write(session.subarray(0, cut), () => reset.socket.resetAndDestroy())
      await until(() => half.closed && gone.closed && reset.closed, `connections cut at ${cut} are closed`)
    }
    await until(() => listener.connectionCount === 0, 'nothing is left')
    expect(exports.sessions).toHaveLength(0)
    expect(await listNbdExports(unixUri(path))).toHaveLength(1)
  })

  it('are disconnected over garbage, also when it never ends', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const listener = await open({ uris: [unixUri(path)] })
    const garbage = Buffer.alloc(65536, 0xa5)
    const peer = new Peer(path)
    const pump = (): void => {
      while (!peer.closed && peer.socket.write(garbage));
    }
    peer.socket.on('drain', pump)
    pump()
    await until(() => peer.closed || peer.ended, 'the flood is cut off')
    await until(() => listener.connectionCount === 0, 'it is forgotten')
    const absurd = await new Peer(path).greeted()
    const header = encodeOption(OPTION.LIST)
    header.writeUInt32BE(0xffffffff, 12)
    absurd.send(header)
    await until(() => absurd.ended, 'absurd lengths are cut off')
  })

  it('get no more replies than they read', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    exports.names = Array.from({ length: 1000 }, (_, i) => `volume-${i}`)
    exports.description = 'x'.repeat(1000)
    await open({ uris: [unixUri(path)], exports })
    const peer = await new Peer(path).greeted()
    peer.send(encodeOption(OPTION.LIST))
    await until(() => exports.listCalls === 1, 'the first list is made')
    peer.socket.pause()
    // A megabyte waits for a client that does not read; it can ask as often as it likes.
    for (let count = 0; count < 20; count++) {
      peer.send(encodeOption(OPTION.LIST))
      await new Promise((resolve) => setImmediate(resolve))
    }
    expect(await listNbdExports(unixUri(path))).toHaveLength(1000) // meanwhile others are served
    expect(exports.listCalls).toBe(2) // that was the other client's
    // What it had sent in one go by then may be too much at once, but as long as it reads it gets its answer.
    peer.socket.resume()
    for (let count = 0; count < 1000; count++) expect(await peer.reply()).toBe(OPTION_REPLY.SERVER)
    expect(await peer.reply()).toBe(OPTION_REPLY.ACK)
  })
})

describe('closing', () => {
  it('lets handshakes end politely', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const listener = await open({ uris: [unixUri(path)], closeMsMax: 5000 })
    const peer = await new Peer(path).greeted()
    peer.send(encodeOption(OPTION.STRUCTURED_REPLY))
    expect(await peer.reply()).toBe(OPTION_REPLY.ACK)
    const closed = listener.close()
    peer.send(GO)
    expect(await peer.reply()).toBe(OPTION_REPLY.ERR_SHUTDOWN)
    peer.send(encodeOption(OPTION.ABORT))
    expect(await peer.reply()).toBe(OPTION_REPLY.ACK)
    await closed
    expect(listener.connectionCount).toBe(0)
    expect(existsSync(path)).toBe(false)
  })

  it('does not wait for clients that have nothing to say', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const listener = await open({ uris: [unixUri(path)], closeMsMax: 50 })
    const peer = await new Peer(path).greeted()
    await listener.close()
    await until(() => peer.closed, 'it is disconnected')
  })

  it('leaves connections alone that were handed over', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    const listener = await open({ uris: [unixUri(path)], exports })
    const peer = (await new Peer(path).greeted()).send(GO)
    await peer.bytes(GO_REPLY_LENGTH)
    await listener.close()
    await listener.close()
    const { session } = exports.sessions[0] ?? expect.fail('no session')
    session.socket.write('still here')
    expect((await peer.bytes(10)).toString()).toBe('still here')
    expect(listener.connectionCount).toBe(1)
  })
})

describe('many connections', () => {
  const descriptors = () => readdirSync('/proc/self/fd').length

  it('come and go without a trace', async () => {
    const path = join(temporaryDirectory(), 'nbd.sock')
    const exports = new Taken()
    const listener = await open({ uris: [unixUri(path)], exports })
    const round = async (clients: number) => {
      const peers = Array.from({ length: clients }, () => new Peer(path))
      await Promise.all(peers.map(async (peer) => (await peer.greeted()).send(GO).bytes(GO_REPLY_LENGTH)))
      expect(listener.connectionCount).toBe(clients)
      for (const { session } of exports.sessions.splice(0)) {
        session.socket.destroy()
        session.onClose('closed')
      }
      await until(() => peers.every((peer) => peer.closed), 'all are closed')
    }
    await round(10)
    const before = descriptors()
    await round(500) // at once
    for (let count = 0; count < 10; count++) await round(50)
    expect(listener.connectionCount).toBe(0)
    await until(() => descriptors() <= before, 'all descriptors are closed')
  })
})
