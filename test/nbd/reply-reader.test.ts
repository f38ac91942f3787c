import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { CHUNK, type ReplyMode } from '../../src/nbd/constants.ts'
import { ReplyReader } from '../../src/nbd/reply-reader.ts'
import {
  type Extent,
  statusChunkSize,
  writeChunkHeader,
  writeDataChunkPrefix,
  writeErrorChunk,
  writeErrorOffsetChunk,
  writeHoleChunk,
  writeNoneChunk,
  writeSimpleReply,
  writeStatusChunk,
} from '../../src/nbd/transmission.ts'
import { fc, test } from './property.ts'

const to = (cookie: number) => ({ cookieHigh: 0, cookieLow: cookie, offsetHigh: 0, offsetLow: 0 })

/** The bytes that an encoder wrote. */
function bytes(write: (target: Buffer) => number, room = 200): Buffer {
  const target = Buffer.alloc(room)
  return target.subarray(0, write(target))
}

/** Reads a stream and writes down what the sink was told. Cookies below 100 are reads of 8 bytes. */
function run(
  mode: ReplyMode,
  chunks: readonly Buffer[],
): { events: string[]; idle: boolean; error?: string } {
  const events: string[] = []
  const targets = new Map<number, Buffer>()
  const target = (cookie: number, length: number) => {
    if (length > 1024) throw new ProtocolError('nobody asked for so much') // as a client with its own buffers does
    const buffer = Buffer.alloc(length)
    targets.set(cookie, buffer)
    return buffer
  }
  const data = (cookie: number) => {
    const buffer = targets.get(cookie)
    targets.delete(cookie)
    return buffer === undefined ? '' : ` ${buffer.toString('latin1')}`
  }
  const reader = new ReplyReader(mode, {
    onSimple: (cookie, errno) => {
      events.push(`simple ${cookie} ${errno}`)
      return errno === 0 && cookie < 100 ? target(cookie, 8) : undefined
    },
    onData: (cookie, offset, length) => {
      events.push(`data ${cookie} ${offset}+${length}`)
      return target(cookie, length)
    },
    onHole: (cookie, offset, length) => events.push(`hole ${cookie} ${offset}+${length}`),
    onError: (cookie, error) => events.push(`error ${cookie} ${JSON.stringify(error)}`),
    onStatus: (cookie, status) => events.push(`status ${cookie} ${JSON.stringify(status)}`),
    onDone: (cookie) => events.push(`done ${cookie}${data(cookie)}`),
  })
  try {
    for (const chunk of chunks) reader.receive(chunk)
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error
    return { events, idle: reader.idle, error: error.message }
  }
  return { events, idle: reader.idle }
}

function chunkStream(extended: boolean): Buffer {
  const extents: Extent[] = [
    { length: 4096, flags: 3 },
    { length: 8192, flags: 0 },
  ]
  return Buffer.concat([
    bytes((t) => writeHoleChunk(t, 0, to(1), extended, false, 2 ** 40, 512)),
    bytes((t) => writeDataChunkPrefix(t, 0, to(2), extended, true, 2 ** 33, 5)),
    Buffer.from('hello'),
    bytes((t) => writeNoneChunk(t, 0, to(1), extended)),
    bytes((t) => writeStatusChunk(t, 0, to(300), extended, false, 1, extents)),
    bytes((t) => writeStatusChunk(t, 0, to(300), extended, true, 2, extents)),
    bytes((t) => writeErrorOffsetChunk(t, 0, to(3), extended, false, 5, 77, Buffer.from('bad'))),
    bytes((t) => writeErrorChunk(t, 0, to(3), extended, 28)),
  ])
}

const CHUNK_EVENTS = [
  `hole 1 ${2 ** 40}+512`,
  `data 2 ${2 ** 33}+5`,
  'done 2 hello',
  'done 1',
  'status 300 {"context":1,"extents":[{"length":4096,"flags":3},{"length":8192,"flags":0}]}',
  'status 300 {"context":2,"extents":[{"length":4096,"flags":3},{"length":8192,"flags":0}]}',
  'done 300',
  'error 3 {"errno":5,"message":"bad","offset":77}',
  'error 3 {"errno":28,"message":""}',
  'done 3',
]

const SIMPLE_STREAM = Buffer.concat([
  bytes((t) => writeSimpleReply(t, 0, to(1), 0)),
  Buffer.from('12345678'),
  bytes((t) => writeSimpleReply(t, 0, to(2), 5)),
  bytes((t) => writeSimpleReply(t, 0, to(200), 0)),
])
const SIMPLE_EVENTS = ['simple 1 0', 'done 1 12345678', 'simple 2 5', 'done 2', 'simple 200 0', 'done 200']

const STREAMS: [ReplyMode, Buffer, string[]][] = [
  ['simple', SIMPLE_STREAM, SIMPLE_EVENTS],
  ['structured', chunkStream(false), CHUNK_EVENTS],
  [
    'structured',
    Buffer.concat([chunkStream(false), bytes((t) => writeSimpleReply(t, 0, to(200), 0)), chunkStream(false)]),
    [...CHUNK_EVENTS, 'simple 200 0', 'done 200', ...CHUNK_EVENTS],
  ],
  ['extended', chunkStream(true), CHUNK_EVENTS],
]

describe('ReplyReader', () => {
  for (const [mode, stream, events] of STREAMS) {
    it(`${mode}: reads the same wherever the stream is cut`, () => {
      expect(run(mode, [stream])).toEqual({ events, idle: true })
      for (let cut = 0; cut <= stream.length; cut++) {
        expect(run(mode, [stream.subarray(0, cut), stream.subarray(cut)])).toEqual({ events, idle: true })
      }
      expect(
        run(
          mode,
          Array.from(stream, (byte) => Buffer.from([byte])),
        ),
      ).toEqual({ events, idle: true })
    })
  }

  it('knows when a stream ends in the middle of a reply', () => {
    const stream = bytes((t) => writeSimpleReply(t, 0, to(1), 0))
    expect(run('simple', [stream]).idle).toBe(false)
    expect(run('simple', [stream.subarray(0, 15)]).idle).toBe(false)
    expect(run('simple', [stream, Buffer.alloc(8)]).idle).toBe(true)
  })

  const header = (extended: boolean, type: number, length: number, done = true) =>
    bytes((t) => writeChunkHeader(t, 0, to(1), extended, done, type, length))
  for (const [what, mode, stream] of [
    ['garbage', 'structured', Buffer.alloc(40, 0x5a)],
    ['a chunk in simple mode', 'simple', header(false, CHUNK.NONE, 0)],
    ['a simple reply in extended mode', 'extended', bytes((t) => writeSimpleReply(t, 0, to(1), 0))],
    ['data without a byte of data', 'structured', header(false, CHUNK.OFFSET_DATA, 8)],
    ['NONE with a payload', 'structured', header(false, CHUNK.NONE, 4)],
    ['NONE that is not the last', 'structured', header(false, CHUNK.NONE, 0, false)],
    ['a long hole chunk', 'structured', header(false, CHUNK.OFFSET_HOLE, 13)],
    ['an unknown type', 'structured', header(false, 3, 4)],
    ['an absurd error', 'structured', header(false, CHUNK.ERROR, 2 ** 31)],
    ['an absurd block status', 'extended', header(true, CHUNK.BLOCK_STATUS_EXT, 2 ** 40)],
    ['a compact block status in extended mode', 'extended', header(true, CHUNK.BLOCK_STATUS, 12)],
    ['an extended block status in structured mode', 'structured', header(false, CHUNK.BLOCK_STATUS_EXT, 24)],
  ] as const) {
    it(`ends over ${what}`, () => {
      expect(run(mode, [stream]).error).toBeDefined()
    })
  }

  it('takes an unknown error chunk for an error', () => {
    const stream = Buffer.concat([
      header(false, 0x8fff, 9),
      Buffer.from('0000001600010078aabb', 'hex').subarray(0, 9),
    ])
    expect(run('structured', [stream]).events).toEqual(['error 1 {"errno":22,"message":"\\u0000"}', 'done 1'])
  })

  test.prop(
    {
      garbage: fc.uint8Array({ maxLength: 200 }),
      at: fc.nat(600),
      index: fc.nat(STREAMS.length - 1),
      cut: fc.nat(600),
    },
    { numRuns: 500 },
  )('survives damaged streams', ({ garbage, at, index, cut }) => {
    const [mode, stream] = STREAMS[index] ?? STREAMS[0]!
    const damaged = Buffer.concat([
      stream.subarray(0, at),
      Buffer.from(garbage),
      stream.subarray(at + garbage.length),
    ])
    // A damaged length makes it ask for a buffer; never for one that the bounds do not allow.
    expect(run(mode, [damaged.subarray(0, cut), damaged.subarray(cut)])).toEqual(run(mode, [damaged]))
  })

  it('needs no memory for what was only announced', () => {
    expect(statusChunkSize(true, 2 ** 20)).toBe(32 + 8 + 16 * 2 ** 20)
    expect(run('extended', [header(true, CHUNK.BLOCK_STATUS_EXT, 8 + 16 * 2 ** 20 + 1)]).error).toBeDefined()
  })
})
