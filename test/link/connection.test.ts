import { type Duplex, duplexPair } from 'node:stream'
import { afterEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { Connection, type ConnectionOptions } from '../../src/link/connection.ts'
import { LinkError } from '../../src/link/errors.ts'
import { encodeFrame, FRAME_HEADER_SIZE, type Frame, KIND, SESSION_PHASE } from '../../src/link/frame.ts'
import { Random } from '../support/random.ts'
import { FakeClock, settle } from './fake-clock.ts'

class End {
  readonly frames: Frame[] = []
  readonly ends: LinkError[] = []
  rooms = 0
  readonly connection: Connection
  onFrame: (frame: Frame) => void = () => undefined

  constructor(stream: Duplex, options: ConnectionOptions) {
    const handler = {
      onFrame: (frame: Frame) => {
        this.frames.push(frame)
        this.onFrame(frame)
      },
      onRoom: () => {
        this.rooms++
      },
      onEnd: (reason: LinkError) => void this.ends.push(reason),
    }
    this.connection = new Connection(stream, handler, options)
    this.connection.enterSession(SESSION_PHASE, handler, options.window ?? LIMITS.linkConnectionWindow)
  }

  message(payload: Buffer, fields = {}): void {
    this.connection.send(KIND.message, [payload], { channel: 1, ...fields })
  }
}

let open: Duplex[] = []
afterEach(() => {
  for (const stream of open) stream.destroy()
  open = []
})

/** Two ends of a stream; when one is destroyed the other sees the end, as with sockets. */
function streams(): [Duplex, Duplex] {
  const [left, right] = duplexPair({ highWaterMark: 1 << 20 })
  for (const [one, other] of [
    [left, right],
    [right, left],
  ] as const) {
    one.once('close', () => {
      if (!one.writableEnded && !other.destroyed) other.push(null)
    })
  }
  open.push(left, right)
  return [left, right]
}

function pair(options: ConnectionOptions = {}) {
  const clock = new FakeClock()
  const [left, right] = streams()
  const both = { clock, ...options }
  return { clock, left, right, a: new End(left, both), b: new End(right, both) }
}

/** A connection, and a bare stream at its other end. */
function alone(options: ConnectionOptions = {}) {
  const clock = new FakeClock()
  const [left, right] = streams()
  const sent: Buffer[] = []
  right.on('data', (bytes: Buffer) => sent.push(bytes))
  return { clock, stream: right, sent, a: new End(left, { clock, ...options }) }
}

describe('a connection', () => {
  it('delivers frames in order, small ones and large ones, from any parts', async () => {
    const { a, b } = pair()
    const random = new Random(5)
    const payloads = Array.from({ length: 60 }, (_, index) =>
      random.bytes(index % 7 === 0 ? 30_000 + index : index * 37),
    )
    payloads.forEach((payload, index) => {
      const cut = random.below(payload.length + 1)
      a.connection.send(KIND.message, [payload.subarray(0, cut), payload.subarray(cut)], {
        channel: 1,
        id: index,
        flags: 1,
      })
    })
    await settle()
    expect(b.frames.map(({ payload }) => payload.toString('hex'))).toEqual(
      payloads.map((payload) => payload.toString('hex')),
    )
    expect(b.frames.map(({ id }) => id)).toEqual(payloads.map((_, index) => index))
    const bytes = payloads.reduce((sum, payload) => sum + payload.length + FRAME_HEADER_SIZE, 0)
    expect(a.connection.counters).toMatchObject({ bytesOut: bytes, framesOut: 60 })
    expect(b.connection.counters).toMatchObject({ bytesIn: bytes, framesIn: 60 })
  })

  it('acknowledges with what it sends anyway, each quarter of the window, and with each ping', async () => {
    const { a, b, clock } = pair({ window: 8 * LIMITS.linkPayloadMax })
    a.message(Buffer.alloc(1000))
    await settle()
    expect(a.connection.outstanding).toBe(1000 + FRAME_HEADER_SIZE)
    b.message(Buffer.alloc(1))
    await settle()
    expect(a.connection.outstanding).toBe(0)
    for (let sent = 0; sent < 2 * LIMITS.linkPayloadMax; sent += 65_536) a.message(Buffer.alloc(65_536))
    await settle()
    expect(a.connection.outstanding).toBeLessThan(65_536)
    a.message(Buffer.alloc(10))
    clock.advance(LIMITS.linkSilenceMs / 4)
    await settle()
    expect(a.connection.outstanding).toBeLessThan(200) // pings and pongs
    expect(a.rooms).toBeGreaterThan(0)
  })

  it('has room up to its window, and less for bulk', async () => {
    const { a } = alone({ window: 4 * LIMITS.linkPayloadMax })
    const piece = LIMITS.linkPayloadMax / 4
    let bulk = 0
    for (; a.connection.hasRoom(piece, true); bulk++) {
      a.message(Buffer.alloc(piece))
      await settle()
    }
    let urgent = bulk
    for (; a.connection.hasRoom(piece, false); urgent++) a.message(Buffer.alloc(piece))
    expect(bulk).toBeLessThanOrEqual(12)
    expect(urgent).toBe(15) // the headers take the place of the last
  })

  it('keeps bulk waiting while the system does not take what was sent', async () => {
    const { a, stream } = alone()
    stream.pause()
    expect(a.connection.hasRoom(1, true)).toBe(true)
    for (let round = 0; round < 8; round++) a.message(Buffer.alloc(1 << 19))
    await settle()
    expect(a.connection.queued).toBeGreaterThan(LIMITS.linkBulkQueuedMax)
    expect(a.connection.hasRoom(1, true)).toBe(false)
    expect(a.connection.hasRoom(1, false)).toBe(true)
    const rooms = a.rooms
    stream.resume()
    await settle()
    expect(a.connection.hasRoom(1, true)).toBe(true)
    expect(a.rooms).toBeGreaterThan(rooms)
  })

  it('measures the way there and back', async () => {
    const { a, clock } = pair()
    expect(a.connection.roundTripMs).toBeUndefined()
    clock.advance(LIMITS.linkSilenceMs / 4)
    clock.advance(7)
    await settle()
    expect(a.connection.roundTripMs).toBe(7)
  })

  it('that hears nothing is lost; one that hears anything is not', async () => {
    const { a, stream, clock } = alone({ silenceMs: 4000 })
    let sequence = 0
    for (let tick = 0; tick < 20; tick++) {
      clock.advance(1000)
      if (tick % 3 === 2)
        stream.write(
          encodeFrame(
            {
              kind: KIND.acknowledge,
              flags: 0,
              channel: 0,
              acknowledged: 0,
              type: 0,
              id: 0,
              payload: Buffer.alloc(0),
            },
            sequence++,
          ),
        )
      await settle()
    }
    expect(a.ends).toEqual([])
    for (let tick = 0; tick < 5; tick++) clock.advance(1000)
    expect(a.ends.map(({ code }) => code)).toEqual(['SILENT'])
    expect(clock.timers).toBe(0)
  })

  it('of a process that was stopped for long is not lost for that', async () => {
    const { a, b, clock } = pair({ silenceMs: 4000 })
    clock.advance(1000)
    await settle()
    // Timers that are late run once, however late they are; what waited in the sockets is read before the next.
    for (const end of [a, b]) end.message(Buffer.alloc(1))
    clock.advance(1000)
    await settle()
    expect([...a.ends, ...b.ends]).toEqual([])
  })

  it('says goodbye with its reason, after what was sent before', async () => {
    const { a, b } = pair()
    a.message(Buffer.from('last'))
    a.connection.close(new LinkError('CLOSED', 'for a good reason'))
    a.message(Buffer.from('too late'))
    await settle()
    expect(b.frames.map(({ payload }) => payload.toString())).toEqual(['last'])
    expect(b.ends.map(({ code, message }) => [code, message])).toEqual([
      ['GOODBYE', 'the peer said goodbye: for a good reason'],
    ])
    expect(a.ends.map(({ code }) => code)).toEqual(['CLOSED'])
    await Promise.all([a.connection.gone, b.connection.gone])
  })

  it('does not wait for ever for a goodbye to be heard', async () => {
    const { a, stream, clock } = alone()
    stream.pause()
    a.connection.close(new LinkError('CLOSED', 'done'))
    expect(a.ends).toHaveLength(1)
    expect(a.connection.state).toBe('leaving')
    clock.advance(LIMITS.linkCloseMsMax)
    await a.connection.gone
    expect(clock.timers).toBe(0)
  })

  it('ends with what was wrong, and tells the other side', async () => {
    const { a, stream, sent } = alone()
    stream.write(Buffer.from('this is not a frame of the link, by no means at all'))
    await settle()
    expect(a.ends.map(({ code }) => code)).toEqual(['BAD_MAGIC'])
    expect(Buffer.concat(sent).toString('latin1')).toContain('"code":"BAD_MAGIC"')
  })

  it.each([
    ['ends without a goodbye', (stream: Duplex) => stream.end(), 'HUNG_UP'],
    [
      'ends inside a frame',
      (stream: Duplex) =>
        stream.end(
          encodeFrame(
            {
              kind: KIND.ping,
              flags: 0,
              channel: 0,
              acknowledged: 0,
              type: 0,
              id: 0,
              payload: Buffer.alloc(8),
            },
            0,
          ).subarray(0, 44),
        ),
      'TRUNCATED',
    ],
    [
      'acknowledges what was not sent',
      (stream: Duplex) =>
        stream.write(
          encodeFrame(
            {
              kind: KIND.acknowledge,
              flags: 0,
              channel: 0,
              acknowledged: 1,
              type: 0,
              id: 0,
              payload: Buffer.alloc(0),
            },
            0,
          ),
        ),
      'BAD_WINDOW',
    ],
    ['fails', (stream: Duplex) => stream.destroy(), 'HUNG_UP'],
  ])('whose peer %s has a name for that', async (_, act, code) => {
    const { a, stream } = alone()
    act(stream)
    await settle()
    expect(a.ends.map((end) => end.code)).toEqual([code])
  })

  it('is cut off by a peer that asks on and on and takes no answer, with bounded memory', async () => {
    const { a, stream } = alone({ window: 4 * LIMITS.linkPayloadMax })
    stream.pause()
    let sequence = 0
    const ping = (): Buffer =>
      encodeFrame(
        { kind: KIND.ping, flags: 0, channel: 0, acknowledged: 0, type: 0, id: 0, payload: Buffer.alloc(8) },
        sequence++,
      )
    const most = (8 * LIMITS.linkPayloadMax) / (FRAME_HEADER_SIZE + 8)
    while (a.ends.length === 0 && sequence < most + 2000) {
      stream.write(Buffer.concat(Array.from({ length: 1000 }, ping)))
      await new Promise((resolve) => setImmediate(resolve))
    }
    expect(a.ends.map(({ code }) => code)).toEqual(['BAD_WINDOW'])
  })

  it('delivers nothing while it is paused, and everything afterwards', async () => {
    const { a, b } = pair()
    b.onFrame = () => b.connection.pause()
    for (let index = 0; index < 5; index++) a.message(Buffer.from([index]))
    await settle()
    expect(b.frames).toHaveLength(1)
    for (let round = 0; round < 3; round++) b.connection.resume()
    await settle()
    expect(b.frames).toHaveLength(4)
    b.onFrame = () => undefined
    b.connection.resume()
    await settle()
    expect(b.frames.map(({ payload }) => payload[0])).toEqual([0, 1, 2, 3, 4])
  })
})
