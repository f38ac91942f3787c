import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { crc32c } from '../../src/link/crc32c.ts'
import { LinkError, type LinkErrorCode } from '../../src/link/errors.ts'
import {
  encodeFrame,
  FLAG,
  FRAME_HEADER_SIZE,
  type Frame,
  FrameReader,
  HANDSHAKE_PHASE,
  KIND,
  type Phase,
  SESSION_PHASE,
} from '../../src/link/frame.ts'
import { Random } from '../support/random.ts'

function frame(fields: Partial<Frame> = {}): Frame {
  const payload = fields.payload ?? Buffer.alloc(0)
  return { kind: KIND.message, flags: 0, channel: 1, acknowledged: 0, type: 0, id: 0, ...fields, payload }
}

function encodeAll(frames: readonly Frame[]): Buffer {
  return Buffer.concat(frames.map((one, index) => encodeFrame(one, index)))
}

/** Frames of a stream in these chunks, and the error that ended it. */
function read(
  chunks: readonly Buffer[],
  phase: Phase = SESSION_PHASE,
): { frames: Frame[]; error?: LinkError } {
  const reader = new FrameReader(phase)
  const frames: Frame[] = []
  try {
    for (const chunk of chunks) {
      reader.push(chunk)
      for (let one = reader.next(); one !== undefined; one = reader.next()) frames.push(one)
    }
    reader.end()
  } catch (error) {
    if (!(error instanceof LinkError)) throw error
    expect(() => reader.next()).toThrow(error)
    return { frames, error }
  }
  return { frames }
}

/** The same where the stream fills the room that it is shown, up to `sizes` bytes at a time, again and again. */
function fill(stream: Buffer, sizes: readonly number[], reader = new FrameReader(SESSION_PHASE)): Frame[] {
  const frames: Frame[] = []
  for (let at = 0, turn = 0; at < stream.length; turn++) {
    const room = reader.room()
    const length = Math.min(room.length, stream.length - at, sizes[turn % sizes.length] ?? room.length)
    stream.copy(room, 0, at, at + length)
    at += length
    reader.took(room, length)
    for (let one = reader.next(); one !== undefined; one = reader.next()) frames.push(one)
  }
  reader.end()
  return frames
}

function codeOf(bytes: Buffer, phase?: Phase): LinkErrorCode | undefined {
  return read([bytes], phase).error?.code
}

/** A header whose checksum holds, whatever it says. */
function rewrite(bytes: Buffer, change: (bytes: Buffer) => void): Buffer {
  const copy = Buffer.from(bytes)
  change(copy)
  copy.writeUInt32LE(crc32c(copy.subarray(0, FRAME_HEADER_SIZE - 4)), FRAME_HEADER_SIZE - 4)
  return copy
}

const random = new Random(3)
const samples: readonly Frame[] = [
  frame({ kind: KIND.acknowledge, channel: 0, acknowledged: 0xffffffff }),
  frame({ type: 0xffff, id: 0xffffffff, flags: FLAG.request, payload: Buffer.from('x') }),
  frame({ kind: KIND.ping, channel: 0, payload: random.bytes(8) }),
  frame({ channel: 0xffffffff, flags: FLAG.reply | FLAG.failed, id: 9, payload: random.bytes(131) }),
  frame({ kind: KIND.open, channel: 3, payload: Buffer.from('{}') }),
]

const arbitraryFrame: fc.Arbitrary<Frame> = fc.record({
  kind: fc.constant(KIND.message),
  flags: fc.integer({ min: 0, max: 7 }),
  channel: fc.nat(0xffffffff),
  acknowledged: fc.nat(0xffffffff),
  type: fc.nat(0xffff),
  id: fc.nat(0xffffffff),
  payload: fc.uint8Array({ maxLength: 300 }).map((bytes) => Buffer.from(bytes)),
})

describe('frames', () => {
  it('are the same wherever the stream is cut in two', () => {
    const stream = encodeAll(samples)
    for (let cut = 0; cut <= stream.length; cut++) {
      expect(read([stream.subarray(0, cut), stream.subarray(cut)])).toEqual({ frames: samples })
    }
  })

  it('are the same wherever the stream is cut in three', () => {
    const some = samples.slice(0, 2)
    const stream = encodeAll(some)
    for (let first = 0; first <= stream.length; first++) {
      for (let second = first; second <= stream.length; second++) {
        const chunks = [stream.subarray(0, first), stream.subarray(first, second), stream.subarray(second)]
        expect(read(chunks).frames).toEqual(some)
      }
    }
  })

  it('are the same byte by byte', () => {
    const stream = encodeAll(samples)
    const bytes = Array.from(stream, (_, index) => stream.subarray(index, index + 1))
    expect(read(bytes)).toEqual({ frames: samples })
  })

  it('come back as they were sent, any frames in any pieces', () => {
    fc.assert(
      fc.property(fc.array(arbitraryFrame, { maxLength: 6 }), fc.array(fc.nat(400)), (frames, sizes) => {
        let rest = encodeAll(frames)
        const chunks: Buffer[] = []
        for (const size of sizes) {
          chunks.push(rest.subarray(0, size))
          rest = rest.subarray(size)
        }
        expect(read([...chunks, rest])).toEqual({ frames })
      }),
    )
  })

  it('of the largest size pass, and share the memory of the chunk that they fill', () => {
    const payload = random.bytes(LIMITS.linkPayloadMax)
    const stream = encodeFrame(frame({ payload }), 0)
    const whole = Buffer.from(new Uint8Array(stream).buffer)
    expect(read([whole]).frames[0]?.payload.buffer).toBe(whole.buffer)
    const pieces: Buffer[] = []
    for (let at = 0; at < stream.length; at += 65_536) pieces.push(stream.subarray(at, at + 65_536))
    expect(read(pieces).frames[0]?.payload.equals(payload)).toBe(true)
  })

  it('come back as they were sent where the stream puts them in their place, in any pieces', () => {
    const length = fc.oneof(fc.nat(300), fc.integer({ min: 60_000, max: 200_000 }))
    const frames = fc
      .array(length, { maxLength: 6 })
      .map((lengths) => lengths.map((bytes) => frame({ payload: random.bytes(bytes) })))
    const sizes = fc.array(fc.oneof(fc.integer({ min: 1, max: 300 }), fc.integer({ min: 1, max: 1 << 20 })), {
      minLength: 1,
    })
    fc.assert(
      fc.property(frames, sizes, (sent, some) => {
        // A few bytes at a time only where that does not take for ever.
        const bytes = encodeAll(sent)
        const pieces = bytes.length / Math.max(...some) > 2_000 ? [1_000] : some
        const got = fill(bytes, pieces)
        // Vitest compares large buffers byte by byte.
        expect(got.map(({ payload }, index) => sent[index]?.payload.equals(payload))).toEqual(
          sent.map(() => true),
        )
      }),
      { numRuns: 50 },
    )
  })

  it('where the stream puts them in their place are checked all the same', () => {
    const stream = encodeFrame(frame({ payload: random.bytes(300_000) }), 0)
    for (const at of [FRAME_HEADER_SIZE, 100_000, stream.length - 1]) {
      const damaged = Buffer.from(stream)
      damaged[at] = (damaged[at] ?? 0) ^ 1
      expect(() => fill(damaged, [1 << 20])).toThrow(LinkError)
    }
  })

  it('wait in memory of their own while nobody asks for them', () => {
    const reader = new FrameReader(SESSION_PHASE)
    const frames = [1, 2].map((index) => frame({ payload: Buffer.alloc(1000, index) }))
    for (const [index, one] of frames.entries()) {
      const room = reader.room()
      reader.took(room, encodeFrame(one, index).copy(room))
    }
    expect([reader.next(), reader.next()]).toEqual(frames)
  })

  it('give the memory of a large payload to a later one when they are released, and not before', () => {
    const reader = new FrameReader(SESSION_PHASE)
    const sent = [1, 2, 3, 4].map((index) => frame({ payload: Buffer.alloc(LIMITS.mirrorPieceBytes, index) }))
    const memory: ArrayBufferLike[] = []
    const frames = sent.map((one, index) => {
      const [got] = fill(encodeFrame(one, index), [1 << 20], reader)
      if (got === undefined) throw new Error('a frame')
      memory.push(got.payload.buffer)
      expect(got.payload.equals(one.payload)).toBe(true)
      if (index > 0) got.release?.()
      if (index > 1) got.release?.() // once is enough
      return got
    })
    expect(memory[1]).not.toBe(memory[0])
    expect(memory[2]).toBe(memory[1])
    expect(memory[3]).toBe(memory[1])
    expect(frames[0]?.payload.equals(sent[0]?.payload ?? Buffer.alloc(0))).toBe(true)
    reader.trim()
    reader.trim()
    const [later] = fill(
      encodeFrame(frame({ payload: Buffer.alloc(LIMITS.mirrorPieceBytes) }), 4),
      [1 << 20],
      reader,
    )
    expect(memory).not.toContain(later?.payload.buffer)
  })

  it('with a small payload keep no large chunk in memory', () => {
    const stream = encodeAll([
      frame({ payload: Buffer.alloc(100) }),
      frame({ payload: Buffer.alloc(64 * 1024) }),
    ])
    const chunk = Buffer.from(new Uint8Array(stream).buffer)
    expect(read([chunk]).frames[0]?.payload.buffer).not.toBe(chunk.buffer)
  })
})

describe('damage to a frame', () => {
  it('is found wherever a bit of the stream is flipped, and nothing after it is delivered', () => {
    const stream = encodeAll(samples)
    const starts: number[] = []
    for (let at = 0, index = 0; index < samples.length; index++) {
      starts.push(at)
      at += FRAME_HEADER_SIZE + (samples[index]?.payload.length ?? 0)
    }
    for (let bit = 0; bit < stream.length * 8; bit++) {
      const damaged = Buffer.from(stream)
      damaged[bit >> 3] = (damaged[bit >> 3] ?? 0) ^ (1 << (bit & 7))
      const whole = starts.findLastIndex((start) => start <= bit >> 3)
      const { frames, error } = read([damaged])
      expect(frames).toEqual(samples.slice(0, whole))
      const offset = (bit >> 3) - (starts[whole] ?? 0)
      const expected =
        offset < 4 ? 'BAD_MAGIC' : offset === 4 ? 'BAD_FRAMING' : offset < 40 ? 'BAD_HEADER' : 'BAD_PAYLOAD'
      expect(error?.code).toBe(expected)
    }
  })

  it('is found wherever the stream ends inside a frame', () => {
    const stream = encodeFrame(samples[3] as Frame, 0)
    for (let length = 1; length < stream.length; length++) {
      expect(codeOf(stream.subarray(0, length))).toBe('TRUNCATED')
    }
  })

  it('is found in any bytes that are not frames, and never more than an error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 1, maxLength: 200 }), (bytes) => {
        const { frames, error } = read([Buffer.from(bytes)])
        expect(frames).toEqual([])
        expect(error).toBeInstanceOf(LinkError)
      }),
    )
  })

  it('is found after any mutation of a stream: removed, repeated, swapped or changed pieces', () => {
    const mutation = fc.record({
      kind: fc.constantFrom('remove', 'repeat', 'overwrite', 'insert' as const),
      at: fc.nat(),
      length: fc.integer({ min: 1, max: 120 }),
      bytes: fc.uint8Array({ minLength: 1, maxLength: 60 }),
    })
    fc.assert(
      fc.property(fc.array(arbitraryFrame, { minLength: 1, maxLength: 4 }), mutation, (frames, change) => {
        const stream = encodeAll(frames)
        const at = change.at % stream.length
        const end = Math.min(stream.length, at + change.length)
        const [head, cut, tail] = [stream.subarray(0, at), stream.subarray(at, end), stream.subarray(end)]
        const pieces = {
          remove: [head, tail],
          repeat: [head, cut, cut, tail],
          insert: [head, change.bytes, cut, tail],
          overwrite: [head, change.bytes.subarray(0, cut.length), cut.subarray(change.bytes.length), tail],
        }
        const mutated = Buffer.concat(pieces[change.kind])
        const result = read([mutated])
        // What is delivered is what was sent, up to where the damage begins; unless nothing was damaged, there is an error,
        // or the end was cut off exactly between frames.
        expect(frames.slice(0, result.frames.length)).toEqual(result.frames)
        if (result.error === undefined) expect(stream.subarray(0, mutated.length).equals(mutated)).toBe(true)
        else expect(result.error.fate === 'damage' || result.error.code === 'TLS').toBe(true)
      }),
      { numRuns: 500 },
    )
  })

  it('is a frame that is missing, repeated or out of order', () => {
    const [a, b, c] = [0, 1, 2].map((sequence) => encodeFrame(frame(), sequence)) as [Buffer, Buffer, Buffer]
    expect(codeOf(Buffer.concat([a, c]))).toBe('BAD_SEQUENCE')
    expect(codeOf(Buffer.concat([a, a]))).toBe('BAD_SEQUENCE')
    expect(codeOf(Buffer.concat([a, c, b]))).toBe('BAD_SEQUENCE')
    expect(codeOf(b)).toBe('BAD_SEQUENCE')
  })

  it('is a payload past the bound of its kind, before it is waited for or stored', () => {
    const tooLong = rewrite(encodeFrame(frame(), 0), (bytes) =>
      bytes.writeUInt32LE(LIMITS.linkPayloadMax + 1, 28),
    )
    expect(codeOf(tooLong)).toBe('TOO_LONG')
    const hello = frame({ kind: KIND.hello, channel: 0 })
    const early = rewrite(encodeFrame(hello, 0), (bytes) =>
      bytes.writeUInt32LE(LIMITS.linkHandshakePayloadMax + 1, 28),
    )
    expect(codeOf(early, HANDSHAKE_PHASE)).toBe('TOO_LONG')
    const credit = rewrite(encodeFrame(frame({ kind: KIND.credit }), 0), (bytes) =>
      bytes.writeUInt32LE(1, 28),
    )
    expect(codeOf(credit)).toBe('TOO_LONG')
  })

  it('is a kind that has no place in the phase, or that does not exist', () => {
    expect(codeOf(encodeFrame(frame(), 0), HANDSHAKE_PHASE)).toBe('BAD_FRAME')
    expect(codeOf(encodeFrame(frame({ kind: KIND.hello }), 0))).toBe('BAD_FRAME')
    expect(codeOf(rewrite(encodeFrame(frame(), 0), (bytes) => bytes.writeUInt8(200, 5)))).toBe('BAD_FRAME')
  })

  it('is a flag that does not exist or has no place', () => {
    expect(codeOf(encodeFrame(frame({ flags: 8 }), 0))).toBe('BAD_FRAME')
    expect(codeOf(encodeFrame(frame({ kind: KIND.credit, flags: FLAG.reply }), 0))).toBe('BAD_FRAME')
    expect(codeOf(rewrite(encodeFrame(frame(), 0), (bytes) => bytes.writeUInt16LE(1, 22)))).toBe('BAD_FRAME')
  })

  it('is another framing version, and the error says which', () => {
    const newer = rewrite(encodeFrame(frame(), 0), (bytes) => bytes.writeUInt8(2, 4))
    const { error } = read([newer])
    expect(error?.code).toBe('BAD_FRAMING')
    expect(error?.message).toContain('framing version 2')
  })

  it('is another protocol, told at its first bytes', () => {
    expect(codeOf(Buffer.from('GET / HTTP/1.1\r\n'))).toBe('BAD_MAGIC')
    expect(codeOf(Buffer.from([0x16, 0x03, 0x01, 0x02]))).toBe('TLS')
  })
})
