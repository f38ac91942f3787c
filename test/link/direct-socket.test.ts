import { once } from 'node:events'
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net'
import { afterEach, expect, it } from 'vitest'
import { DirectSocket } from '../../src/link/direct-socket.ts'
import { until } from '../support/poll.ts'

let server: Server
const sockets: Socket[] = []
afterEach(() => {
  for (const socket of sockets.splice(0)) socket.destroy()
  server.close()
})

/** Both ends of a connection: the one that dialled, and the one that was accepted. */
async function ends(): Promise<[Socket, Socket]> {
  server = createServer({ pauseOnConnect: true })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const dialled = new DirectSocket().connect({
    host: '127.0.0.1',
    port: (server.address() as AddressInfo).port,
  })
  const accepting = once(server, 'connection')
  await once(dialled, 'connect')
  dialled.pause()
  const [socket] = await accepting
  const accepted = DirectSocket.over(socket)
  sockets.push(dialled, accepted)
  return [dialled, accepted]
}

/** Everything that comes, in pieces of a room. */
function collect(socket: Socket, room: Buffer): { text: () => string } {
  expect(socket).toBeInstanceOf(DirectSocket)
  if (!(socket instanceof DirectSocket)) throw new Error('no direct socket')
  let text = ''
  socket.readInto({
    room: () => room,
    arrived: (from, length) => {
      text += Buffer.from(from.buffer, from.byteOffset, length).toString()
    },
  })
  return { text: () => text }
}

const connections = (): Promise<number> =>
  new Promise((resolve, reject) =>
    server.getConnections((error, count) => (error === null ? resolve(count) : reject(error))),
  )

it('takes what comes to the place it is given, on both ends, and nothing while it is paused', async () => {
  const [dialled, accepted] = await ends()
  dialled.write('early') // before anybody says where it goes
  accepted.write('too')
  await new Promise((resolve) => setTimeout(resolve, 20))
  const there = collect(accepted, Buffer.alloc(3))
  const here = collect(dialled, Buffer.alloc(7))
  expect([there.text(), here.text()]).toEqual(['', ''])
  accepted.resume()
  dialled.resume()
  await until(() => there.text() === 'early' && here.text() === 'too', 'what came early')
  accepted.pause()
  dialled.write(' and late')
  await new Promise((resolve) => setTimeout(resolve, 20))
  expect(there.text()).toBe('early')
  accepted.resume()
  await until(() => there.text() === 'early and late', 'what came while it was paused')
  const ended = once(accepted, 'end')
  dialled.end()
  await ended
})

it('is counted by its server until it is closed', async () => {
  const [dialled, accepted] = await ends()
  expect(await connections()).toBe(1)
  const closed = once(accepted, 'close')
  accepted.destroy()
  await closed
  await until(async () => (await connections()) === 0, 'the server forgets it')
  dialled.destroy()
})
