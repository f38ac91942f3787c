import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import { CHUNK, MAGIC, REPLY_FLAG, type ReplyMode } from '../../src/nbd/constants.ts'
import {
  decodeErrorPayload,
  decodeHolePayload,
  decodeReply,
  decodeStatusPayload,
  replyHeaderSize,
} from '../../src/nbd/replies.ts'
import {
  chunkHeaderSize,
  clipExtents,
  dataChunkPrefixSize,
  errorChunkSize,
  errorOffsetChunkSize,
  holeChunkSize,
  readUInt64,
  statusChunkSize,
  writeDataChunkPrefix,
  writeErrorChunk,
  writeErrorOffsetChunk,
  writeHoleChunk,
  writeNoneChunk,
  writePlainReply,
  writeSimpleReply,
  writeStatusChunk,
} from '../../src/nbd/transmission.ts'
import { fc, test } from './property.ts'

describe('replies', () => {
  const to = { cookieHigh: 0x01020304, cookieLow: 0x05060708, offsetHigh: 0xffffffff, offsetLow: 0xfffffffe }
  const cookie = 0x01020304 * 2 ** 32 + 0x05060708

  it('writes a simple reply of the specification', () => {
    const target = Buffer.alloc(18, 0xaa)
    expect(writeSimpleReply(target, 1, to, 5)).toBe(17)
    expect(target.toString('hex')).toBe(`aa${'67446698'}${'00000005'}${'0102030405060708'}aa`)
    expect(decodeReply(target.subarray(1), 0)).toMatchObject({ kind: 'simple', errno: 5 })
  })

  it('writes chunk headers of the specification', () => {
    const structured = Buffer.alloc(20)
    expect(writeNoneChunk(structured, 0, to, false)).toBe(20)
    expect(structured.toString('hex')).toBe('668e33ef' + '0001' + '0000' + '0102030405060708' + '00000000')
    const extended = Buffer.alloc(32)
    expect(writeNoneChunk(extended, 0, to, true)).toBe(32)
    expect(extended.toString('hex')).toBe(
      '6e8a278c' + '0001' + '0000' + '0102030405060708' + 'fffffffffffffffe' + '0000000000000000',
    )
  })

  for (const extended of [false, true]) {
    const mode: ReplyMode = extended ? 'extended' : 'structured'
    describe(mode, () => {
      /** Decodes what `write` wrote: the header, and the payload that it announces. */
      const written = (size: number, write: (target: Buffer, at: number) => number) => {
        const target = Buffer.alloc(size + 8, 0xee)
        expect(write(target, 3)).toBe(3 + size) // it fills its size exactly ...
        expect(target.subarray(0, 3).equals(Buffer.alloc(3, 0xee))).toBe(true)
        expect(target.subarray(3 + size).equals(Buffer.alloc(5, 0xee))).toBe(true) // ... and nothing else
        const headerSize = chunkHeaderSize(extended)
        expect(replyHeaderSize(target, 3, mode)).toBe(headerSize)
        const header = decodeReply(target, 3)
        if (header.kind !== 'chunk') throw new Error('not a chunk')
        // Past 2^53, as this cookie is not: compare the words.
        expect(header.cookie).toBe(cookie)
        return { ...header, payload: target.subarray(3 + headerSize, 3 + size) }
      }

      it('data', () => {
        const prefix = dataChunkPrefixSize(extended)
        const chunk = written(prefix, (t, at) =>
          writeDataChunkPrefix(t, at, to, extended, true, 2 ** 41 + 1, 700),
        )
        expect(chunk).toMatchObject({ type: CHUNK.OFFSET_DATA, done: true, payloadLength: 708 })
        expect(readUInt64(chunk.payload, 0)).toBe(2 ** 41 + 1)
      })

      it('hole', () => {
        const chunk = written(holeChunkSize(extended), (t, at) =>
          writeHoleChunk(t, at, to, extended, false, 2 ** 41, 2 ** 32 - 1),
        )
        expect(chunk).toMatchObject({ type: CHUNK.OFFSET_HOLE, done: false, payloadLength: 12 })
        expect(decodeHolePayload(chunk.payload)).toEqual({ offset: 2 ** 41, length: 2 ** 32 - 1 })
      })

      it('error, with and without words', () => {
        const words = Buffer.from('zu spät')
        const size = errorChunkSize(extended, words.length)
        const chunk = written(size, (t, at) => writeErrorChunk(t, at, to, extended, 28, words))
        expect(chunk).toMatchObject({ type: CHUNK.ERROR, done: true })
        expect(decodeErrorPayload(chunk.type, chunk.payload)).toEqual({ errno: 28, message: 'zu spät' })
        const bare = written(errorChunkSize(extended), (t, at) => writeErrorChunk(t, at, to, extended, 5))
        expect(decodeErrorPayload(bare.type, bare.payload)).toEqual({ errno: 5, message: '' })
      })

      it('error with an offset', () => {
        const words = Buffer.from('bad sector')
        const chunk = written(errorOffsetChunkSize(extended, words.length), (t, at) =>
          writeErrorOffsetChunk(t, at, to, extended, false, 5, 2 ** 40 + 3, words),
        )
        expect(chunk).toMatchObject({ type: CHUNK.ERROR_OFFSET, done: false })
        const decoded = { errno: 5, message: 'bad sector', offset: 2 ** 40 + 3 }
        expect(decodeErrorPayload(chunk.type, chunk.payload)).toEqual(decoded)
      })

      it('block status', () => {
        const extents = [
          { length: 65536, flags: 3 },
          { length: 2 ** 32 - 4096, flags: 0 },
        ]
        const chunk = written(statusChunkSize(extended, 2), (t, at) =>
          writeStatusChunk(t, at, to, extended, true, 9, extents),
        )
        expect(chunk.type).toBe(extended ? CHUNK.BLOCK_STATUS_EXT : CHUNK.BLOCK_STATUS)
        expect(decodeStatusPayload(chunk.type, chunk.payload)).toEqual({ context: 9, extents })
      })

      it('plain success and plain failure', () => {
        const none = written(chunkHeaderSize(extended), (t, at) => writePlainReply(t, at, to, mode, 0))
        expect(none).toMatchObject({ type: CHUNK.NONE, done: true, payloadLength: 0 })
        const error = written(errorChunkSize(extended), (t, at) => writePlainReply(t, at, to, mode, 22))
        expect(decodeErrorPayload(error.type, error.payload).errno).toBe(22)
      })
    })
  }

  it('answers in the framing of simple mode', () => {
    const target = Buffer.alloc(16)
    expect(writePlainReply(target, 0, to, 'simple', 22)).toBe(16)
    expect(decodeReply(target, 0)).toMatchObject({ kind: 'simple', errno: 22 })
  })

  it('carries 64-bit extents with extended headers', () => {
    const extents = [{ length: 2 ** 45 + 512, flags: 1 }]
    const target = Buffer.alloc(statusChunkSize(true, 1))
    writeStatusChunk(target, 0, to, true, true, 1, extents)
    expect(decodeStatusPayload(CHUNK.BLOCK_STATUS_EXT, target.subarray(32)).extents).toEqual(extents)
  })

  it('refuses chunks whose payload contradicts itself', () => {
    const bad: [string, () => unknown][] = [
      ['hole of 11 bytes', () => decodeHolePayload(Buffer.alloc(11))],
      ['hole of no bytes', () => decodeHolePayload(Buffer.alloc(12))],
      ['status without extents', () => decodeStatusPayload(CHUNK.BLOCK_STATUS, Buffer.alloc(4))],
      ['status with half an extent', () => decodeStatusPayload(CHUNK.BLOCK_STATUS, Buffer.alloc(16))],
      ['status with an empty extent', () => decodeStatusPayload(CHUNK.BLOCK_STATUS, Buffer.alloc(12))],
      ['status that miscounts', () => decodeStatusPayload(CHUNK.BLOCK_STATUS_EXT, Buffer.alloc(24, 1))],
      ['error of 5 bytes', () => decodeErrorPayload(CHUNK.ERROR, Buffer.alloc(5))],
      [
        'error with too long words',
        () => decodeErrorPayload(CHUNK.ERROR, Buffer.from('000000050001', 'hex')),
      ],
      ['error with offset, cut', () => decodeErrorPayload(CHUNK.ERROR_OFFSET, Buffer.alloc(13))],
    ]
    for (const [what, decode] of bad) expect(decode, what).toThrow(ProtocolError)
  })

  it('knows which headers each mode has', () => {
    const magic = (value: number) => {
      const bytes = Buffer.alloc(4)
      bytes.writeUInt32BE(value)
      return bytes
    }
    expect(replyHeaderSize(magic(MAGIC.simpleReply), 0, 'simple')).toBe(16)
    expect(replyHeaderSize(magic(MAGIC.simpleReply), 0, 'structured')).toBe(16)
    expect(replyHeaderSize(magic(MAGIC.structuredReply), 0, 'structured')).toBe(20)
    expect(replyHeaderSize(magic(MAGIC.extendedReply), 0, 'extended')).toBe(32)
    expect(replyHeaderSize(magic(MAGIC.extendedReply).subarray(0, 3), 0, 'extended')).toBeUndefined()
    expect(() => replyHeaderSize(magic(MAGIC.structuredReply), 0, 'simple')).toThrow(ProtocolError)
    expect(() => replyHeaderSize(magic(MAGIC.simpleReply), 0, 'extended')).toThrow(ProtocolError)
    expect(() => replyHeaderSize(magic(MAGIC.extendedReply), 0, 'structured')).toThrow(ProtocolError)
    expect(REPLY_FLAG.DONE).toBe(1)
  })
})

describe('clipExtents', () => {
  const extents = [
    { length: 100, flags: 0 },
    { length: 200, flags: 3 },
    { length: 300, flags: 0 },
  ]

  it('stops with the extent that reaches the requested length', () => {
    expect(clipExtents(extents, 100, false, false)).toEqual(extents.slice(0, 1))
    expect(clipExtents(extents, 101, false, false)).toEqual(extents.slice(0, 2))
    expect(clipExtents(extents, 9999, false, false)).toEqual(extents)
  })

  it('gives one extent within the request for REQ_ONE', () => {
    expect(clipExtents(extents, 500, true, false)).toEqual([{ length: 100, flags: 0 }])
    expect(clipExtents(extents, 60, true, true)).toEqual([{ length: 60, flags: 0 }])
  })

  it('cuts what does not fit 32 bits, and leaves out what follows', () => {
    const long = [{ length: 2 ** 40, flags: 3 }, ...extents]
    expect(clipExtents(long, 2 ** 31, false, false)).toEqual([{ length: 2 ** 32 - 4096, flags: 3 }])
    expect(clipExtents(long, 2 ** 41, false, true)).toEqual(long)
  })

  it('bounds the count', () => {
    const many = Array.from({ length: LIMITS.blockStatusExtentsMax + 5 }, (_, i) => ({
      length: 1,
      flags: i % 2,
    }))
    expect(clipExtents(many, many.length, false, true)).toHaveLength(LIMITS.blockStatusExtentsMax)
  })

  test.prop({
    lengths: fc.array(fc.oneof(fc.integer({ min: 1, max: 1000 }), fc.integer({ min: 1, max: 2 ** 33 })), {
      minLength: 1,
      maxLength: 20,
    }),
    length: fc.integer({ min: 1, max: 2 ** 32 - 1 }),
    one: fc.boolean(),
    extended: fc.boolean(),
  })('keeps the rules of the specification', ({ lengths, length, one, extended }) => {
    const all = lengths.map((value, index) => ({ length: value, flags: index }))
    const clipped = clipExtents(all, length, one, extended)
    expect(clipped.length).toBeGreaterThan(0)
    const beforeLast = clipped.slice(0, -1).reduce((sum, extent) => sum + extent.length, 0)
    expect(beforeLast).toBeLessThan(length)
    if (one) {
      expect(clipped).toHaveLength(1)
      expect(clipped[0]?.length).toBeLessThanOrEqual(length)
    }
    clipped.forEach((extent, index) => {
      expect(extent.flags).toBe(index)
      expect(extent.length).toBeLessThanOrEqual(all[index]?.length ?? 0)
      if (index < clipped.length - 1) expect(extent.length).toBe(all[index]?.length)
      if (!extended) expect(extent.length).toBeLessThan(2 ** 32)
    })
  })
})
