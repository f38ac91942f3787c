import { createServer, type Server, type Socket, connect as tcpConnect } from 'node:net'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { SideDoor, sayToken } from '../../src/link/side-wires.ts'
import { until } from '../support/poll.ts'

const MAGIC = 'FSside-1'

describe('side wires', () => {
  let door: SideDoor
  let server: Server
  let sockets: Socket[]
  let outcomes: (boolean | string)[]
  let untouched: { socket: Socket; read: string }[]

  beforeEach(async () => {
    door = new SideDoor(400)
    sockets = []
    outcomes = []
    untouched = []
    server = createServer({ pauseOnConnect: true }, (socket) => {
      sockets.push(socket)
      socket.on('error', () => {})
      door.take(socket).then(
        (received) => {
          outcomes.push(received === undefined)
          if (received === undefined) return
          const other = { socket, read: received.toString('latin1') }
          untouched.push(other)
          socket.on('data', (chunk: Buffer) => {
            other.read += chunk.toString('latin1')
          })
          socket.resume()
        },
        (error: { code: string }) => outcomes.push(error.code),
      )
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  })
  afterEach(async () => {
    for (const socket of sockets) socket.destroy()
    await new Promise((resolve) => server.close(resolve))
  })

  function dial(): Socket {
    const address = server.address()
    if (typeof address !== 'object' || address === null) throw new Error('no port')
    const socket = tcpConnect({ host: '127.0.0.1', port: address.port, noDelay: true })
    socket.on('error', () => {})
    sockets.push(socket)
    return socket
  }

  it('brings both ends together, with nothing unread on either', async () => {
    const expected = door.expect()
    const near = dial()
    await sayToken(near, expected.token)
    const far = await expected.socket
    expect(near.readableLength + far.readableLength).toBe(0)
    const got = new Promise((resolve) => far.once('data', (chunk: Buffer) => resolve(chunk.toString())))
    far.resume()
    near.write('what follows is theirs')
    expect(await got).toBe('what follows is theirs')
  })

  it('takes the token byte by byte', async () => {
    const expected = door.expect()
    const near = dial()
    const hello = Buffer.concat([Buffer.from(MAGIC), Buffer.from(expected.token, 'hex')])
    for (const byte of hello) {
      await new Promise<void>((resolve) => near.write(Buffer.from([byte]), () => resolve()))
    }
    await expect(expected.socket).resolves.toBeDefined()
  })

  it('is good once, and for a token that was given out', async () => {
    const expected = door.expect()
    await sayToken(dial(), expected.token)
    await expect(sayToken(dial(), expected.token)).rejects.toMatchObject({ code: 'HUNG_UP' })
    await expect(sayToken(dial(), 'ab'.repeat(32))).rejects.toMatchObject({ code: 'HUNG_UP' })
    expect(outcomes).toEqual([true, 'NO_SESSION', 'NO_SESSION'])
  })

  it('a token that nobody comes with in time is good no longer', async () => {
    const expected = door.expect()
    await expect(expected.socket).rejects.toMatchObject({ code: 'LATE' })
    await expect(sayToken(dial(), expected.token)).rejects.toMatchObject({ code: 'HUNG_UP' })
  })

  it('that are given up are let in no longer, and others take their places', async () => {
    const given = Array.from({ length: LIMITS.linkHandshakesMax }, () => door.expect())
    expect(() => door.expect()).toThrow(/too many/)
    for (const { cancel } of given) cancel()
    await expect(given[0]?.socket).rejects.toMatchObject({ code: 'CLOSED' })
    const expected = door.expect()
    await expect(sayToken(dial(), given[0]?.token ?? '')).rejects.toMatchObject({ code: 'HUNG_UP' })
    await sayToken(dial(), expected.token)
    const far = await expected.socket
    expected.cancel()
    await until(() => far.destroyed, 'it is gone')
  })

  it('leaves others as they are, with every byte unread, however they come', async () => {
    const whole = dial()
    whole.write('something else, longer than a magic')
    const pieces = dial()
    for (const piece of ['FS', 'side', '-2 and', ' more']) {
      await new Promise<void>((resolve) => pieces.write(piece, () => resolve()))
    }
    await until(() => untouched.length === 2, 'both are handed on')
    await until(
      () =>
        untouched
          .map(({ read }) => read)
          .sort()
          .join() === 'FSside-2 and more,something else, longer than a magic',
      'all of it is read',
    )
  })

  it('cuts off who says nothing, or too little, or goes away', async () => {
    const silent = dial()
    const little = dial()
    little.write('FS')
    const gone = dial()
    gone.write('FSsi', () => gone.end())
    await until(() => outcomes.length === 3, 'all are judged')
    expect(outcomes.sort()).toEqual(['HUNG_UP', 'LATE', 'LATE'])
    await until(() => silent.destroyed || silent.readableEnded || silent.closed, 'cut off')
  })
})
