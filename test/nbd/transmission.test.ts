import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import { CHUNK, COMMAND, COMMAND_FLAG, MAGIC, REPLY_FLAG, type ReplyMode } from '../../src/nbd/constants.ts'
import { NBD_ERRNO } from '../../src/nbd/errno.ts'
import {
  decodeErrorPayload,
  decodeHolePayload,
  decodeReply,
  decodeStatusPayload,
  encodeFilteredStatusRequest,
  replyHeaderSize,
  writeRequest,
} from '../../src/nbd/replies.ts'
import {
  chunkHeaderSize,
  clipExtents,
  dataChunkPrefixSize,
  decodeRequest,
  decodeStatusFilter,
  errorChunkSize,
  errorOffsetChunkSize,
  HANG_UP,
  holeChunkSize,
  type Request,
  readUInt64,
  requestHeaderSize,
  type SessionRules,
  statusChunkSize,
  validateRequest,
  validateStatusFilter,
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

const MiB = 1024 * 1024

/** A request as it would come off the wire, so that decoding is part of every validation below. */
function request(
  command: number,
  options: { flags?: number; offset?: number; length?: number; extended?: boolean } = {},
): Request {
  const extended = options.extended ?? false
  const header = Buffer.alloc(requestHeaderSize(extended))
  const outgoing = { flags: options.flags ?? 0, command, cookie: 7, offset: options.offset ?? 0 }
  writeRequest(header, 0, { ...outgoing, length: options.length ?? 4096 }, extended)
  return decodeRequest(header, extended)
}

function rules(changes: Partial<SessionRules> = {}): SessionRules {
  return {
    size: 100 * MiB,
    readOnly: false,
    mode: 'structured',
    contexts: [1, 2],
    payloadMax: 32 * MiB,
    ...changes,
  }
}

describe('decodeRequest', () => {
  it('reads the layout of the specification, compact', () => {
    const bytes = Buffer.from(
      '25609513' + '0001' + '0006' + 'ff00ff00deadbeef' + '0000010000000002' + 'fffffffe',
      'hex',
    )
    expect(decodeRequest(bytes, false)).toEqual({
      flags: COMMAND_FLAG.FUA,
      command: COMMAND.WRITE_ZEROES,
      cookieHigh: 0xff00ff00,
      cookieLow: 0xdeadbeef,
      offsetHigh: 0x100,
      offsetLow: 2,
      offset: 2 ** 40 + 2,
      length: 0xfffffffe,
      payloadLength: 0,
    })
  })

  it('reads the layout of the specification, extended, at any position', () => {
    const bytes = Buffer.from(
      'aa' + '21e41c71' + '0020' + '0001' + '0000000000000007' + '0000000000001000' + '0000000000000200',
      'hex',
    )
    const decoded = decodeRequest(bytes, true, 1)
    expect(decoded).toMatchObject({ command: COMMAND.WRITE, flags: COMMAND_FLAG.PAYLOAD_LEN, cookieLow: 7 })
    expect(decoded).toMatchObject({ offset: 4096, length: 512, payloadLength: 512 })
  })

  it('says how many bytes follow, whether the request is valid or not', () => {
    expect(request(COMMAND.WRITE, { length: 10 }).payloadLength).toBe(10)
    expect(request(COMMAND.READ, { length: 10 }).payloadLength).toBe(0)
    // The payload flag means nothing in compact headers.
    expect(request(COMMAND.READ, { length: 10, flags: COMMAND_FLAG.PAYLOAD_LEN }).payloadLength).toBe(0)
    expect(request(COMMAND.WRITE, { length: 10, extended: true }).payloadLength).toBe(0)
    const flags = COMMAND_FLAG.PAYLOAD_LEN
    expect(request(COMMAND.TRIM, { length: 10, flags, extended: true }).payloadLength).toBe(10)
  })

  it('refuses the magic of the other mode and any other', () => {
    for (const [magic, extended] of [
      [MAGIC.request, true],
      [MAGIC.extendedRequest, false],
      [0, false],
      [0x12560953, false],
    ] as const) {
      const header = Buffer.alloc(32)
      header.writeUInt32BE(magic)
      expect(() => decodeRequest(header, extended)).toThrow(ProtocolError)
    }
  })

  test.prop({
    flags: fc.integer({ min: 0, max: 0xffff }),
    command: fc.integer({ min: 0, max: 0xffff }),
    cookie: fc.maxSafeNat(),
    offset: fc.maxSafeNat(),
    length: fc.integer({ min: 0, max: 2 ** 32 - 1 }),
    extended: fc.boolean(),
  })('reads back what the client wrote', ({ extended, cookie, ...fields }) => {
    const header = Buffer.alloc(requestHeaderSize(extended))
    expect(writeRequest(header, 0, { ...fields, cookie }, extended)).toBe(header.length)
    const decoded = decodeRequest(header, extended)
    expect(decoded).toMatchObject(fields)
    expect(decoded.cookieHigh * 2 ** 32 + decoded.cookieLow).toBe(cookie)
  })
})

describe('validateRequest', () => {
  const { EPERM, EINVAL, ENOSPC, EOVERFLOW } = NBD_ERRNO
  const size = 100 * MiB
  const flag = COMMAND_FLAG
  const all: readonly ReplyMode[] = ['simple', 'structured', 'extended']
  const write = (mode: ReplyMode) => (mode === 'extended' ? flag.PAYLOAD_LEN : 0)

  // [what, command, flags, offset, length, session, expected]; in each of the three modes where `modes` is left out
  const cases: {
    what: string
    command: number
    flags?: number
    offset?: number
    length?: number
    session?: Partial<SessionRules>
    modes?: readonly ReplyMode[]
    expected: number
  }[] = [
    { what: 'a read', command: COMMAND.READ, expected: 0 },
    { what: 'a read of one byte', command: COMMAND.READ, offset: 1, length: 1, expected: 0 },
    { what: 'a read of the last byte', command: COMMAND.READ, offset: size - 1, length: 1, expected: 0 },
    {
      what: 'a read one byte past the end',
      command: COMMAND.READ,
      offset: size - 1,
      length: 2,
      expected: EINVAL,
    },
    { what: 'a read at the end', command: COMMAND.READ, offset: size, length: 1, expected: EINVAL },
    {
      what: 'a read far past the end',
      command: COMMAND.READ,
      offset: 2 ** 60,
      length: 512,
      expected: EINVAL,
    },
    { what: 'a read of nothing', command: COMMAND.READ, length: 0, expected: EINVAL },
    { what: 'a read of 32 MiB', command: COMMAND.READ, length: 32 * MiB, expected: 0 },
    {
      what: 'a larger read',
      command: COMMAND.READ,
      length: 32 * MiB + 1,
      modes: ['simple'],
      expected: EINVAL,
    },
    {
      what: 'a larger read',
      command: COMMAND.READ,
      length: 32 * MiB + 1,
      modes: ['structured', 'extended'],
      expected: EOVERFLOW,
    },
    { what: 'a read with FUA', command: COMMAND.READ, flags: flag.FUA, expected: 0 },
    { what: 'a read with DF', command: COMMAND.READ, flags: flag.DF, modes: ['simple'], expected: EINVAL },
    {
      what: 'a read with DF',
      command: COMMAND.READ,
      flags: flag.DF,
      modes: ['structured', 'extended'],
      expected: 0,
    },
    { what: 'a read with NO_HOLE', command: COMMAND.READ, flags: flag.NO_HOLE, expected: EINVAL },
    { what: 'a read with REQ_ONE', command: COMMAND.READ, flags: flag.REQ_ONE, expected: EINVAL },
    { what: 'a read with an unknown flag', command: COMMAND.READ, flags: 1 << 9, expected: EINVAL },
    { what: 'a read with a payload', command: COMMAND.READ, flags: flag.PAYLOAD_LEN, expected: EINVAL },
    { what: 'a read of a read-only export', command: COMMAND.READ, session: { readOnly: true }, expected: 0 },

    { what: 'a write', command: COMMAND.WRITE, expected: 0 },
    { what: 'a write with FUA', command: COMMAND.WRITE, flags: flag.FUA, expected: 0 },
    { what: 'a write with DF', command: COMMAND.WRITE, flags: flag.DF, expected: EINVAL },
    { what: 'a write with NO_HOLE', command: COMMAND.WRITE, flags: flag.NO_HOLE, expected: EINVAL },
    { what: 'a write of nothing', command: COMMAND.WRITE, length: 0, expected: EINVAL },
    { what: 'a write up to the end', command: COMMAND.WRITE, offset: size - 4096, expected: 0 },
    { what: 'a write past the end', command: COMMAND.WRITE, offset: size - 4095, expected: ENOSPC },
    { what: 'a write far past the end', command: COMMAND.WRITE, offset: 2 ** 53, expected: ENOSPC },
    {
      what: 'a write to a read-only export',
      command: COMMAND.WRITE,
      session: { readOnly: true },
      expected: EPERM,
    },
    { what: 'a write of 32 MiB', command: COMMAND.WRITE, length: 32 * MiB, expected: 0 },
    {
      what: 'a larger write',
      command: COMMAND.WRITE,
      length: 32 * MiB + 1,
      modes: ['simple', 'structured'],
      expected: EINVAL,
    },
    {
      what: 'a larger write',
      command: COMMAND.WRITE,
      length: 32 * MiB + 1,
      modes: ['extended'],
      expected: HANG_UP,
    },
    { what: 'an absurd write', command: COMMAND.WRITE, length: 2 ** 32 - 1, expected: HANG_UP },

    { what: 'a flush', command: COMMAND.FLUSH, length: 0, expected: 0 },
    { what: 'a flush with FUA', command: COMMAND.FLUSH, flags: flag.FUA, length: 0, expected: 0 },
    {
      what: 'a flush of a read-only export',
      command: COMMAND.FLUSH,
      length: 0,
      session: { readOnly: true },
      expected: 0,
    },
    { what: 'a flush with a length', command: COMMAND.FLUSH, length: 1, expected: EINVAL },
    { what: 'a flush with an offset', command: COMMAND.FLUSH, offset: 1, length: 0, expected: EINVAL },
    { what: 'a flush with DF', command: COMMAND.FLUSH, flags: flag.DF, length: 0, expected: EINVAL },

    { what: 'a trim', command: COMMAND.TRIM, flags: flag.FUA, length: size, expected: 0 },
    { what: 'a trim past the end', command: COMMAND.TRIM, offset: size, length: 1, expected: EINVAL },
    { what: 'a trim of nothing', command: COMMAND.TRIM, length: 0, expected: EINVAL },
    { what: 'a trim with NO_HOLE', command: COMMAND.TRIM, flags: flag.NO_HOLE, expected: EINVAL },
    {
      what: 'a trim of a read-only export',
      command: COMMAND.TRIM,
      session: { readOnly: true },
      expected: EPERM,
    },

    { what: 'a cache', command: COMMAND.CACHE, length: size, expected: 0 },
    {
      what: 'a cache of a read-only export',
      command: COMMAND.CACHE,
      session: { readOnly: true },
      expected: 0,
    },
    { what: 'a cache past the end', command: COMMAND.CACHE, offset: size, expected: EINVAL },
    { what: 'a cache with a flag', command: COMMAND.CACHE, flags: flag.DF, expected: EINVAL },

    {
      what: 'zeroing with all its flags',
      command: COMMAND.WRITE_ZEROES,
      flags: flag.FUA | flag.NO_HOLE | flag.FAST_ZERO,
      length: size,
      expected: 0,
    },
    { what: 'zeroing past the end', command: COMMAND.WRITE_ZEROES, offset: size - 1, expected: ENOSPC },
    { what: 'zeroing nothing', command: COMMAND.WRITE_ZEROES, length: 0, expected: EINVAL },
    { what: 'zeroing with REQ_ONE', command: COMMAND.WRITE_ZEROES, flags: flag.REQ_ONE, expected: EINVAL },
    {
      what: 'zeroing a read-only export',
      command: COMMAND.WRITE_ZEROES,
      session: { readOnly: true },
      expected: EPERM,
    },
    {
      what: 'zeroing with a payload',
      command: COMMAND.WRITE_ZEROES,
      flags: flag.PAYLOAD_LEN,
      expected: EINVAL,
    },

    { what: 'block status', command: COMMAND.BLOCK_STATUS, flags: flag.REQ_ONE, length: size, expected: 0 },
    {
      what: 'block status without contexts',
      command: COMMAND.BLOCK_STATUS,
      session: { contexts: [] },
      expected: EINVAL,
    },
    {
      what: 'block status past the end',
      command: COMMAND.BLOCK_STATUS,
      offset: 1,
      length: size,
      expected: EINVAL,
    },
    { what: 'block status of nothing', command: COMMAND.BLOCK_STATUS, length: 0, expected: EINVAL },
    { what: 'block status with DF', command: COMMAND.BLOCK_STATUS, flags: flag.DF, expected: EINVAL },

    { what: 'a disconnect', command: COMMAND.DISC, length: 0, expected: 0 },
    {
      what: 'a disconnect with nonsense in it',
      command: COMMAND.DISC,
      flags: 3,
      offset: 5,
      length: 6,
      expected: 0,
    },
    { what: 'a resize', command: COMMAND.RESIZE, expected: EINVAL },
    { what: 'an unknown command', command: 0x7fff, expected: EINVAL },
    { what: 'an unknown command, read-only', command: 99, session: { readOnly: true }, expected: EINVAL },
  ]

  for (const entry of cases) {
    for (const mode of entry.modes ?? all) {
      it(`${mode}: ${entry.what} -> ${entry.expected}`, () => {
        const flags = (entry.flags ?? 0) | (entry.command === COMMAND.WRITE ? write(mode) : 0)
        const { offset, length } = entry
        const extended = mode === 'extended'
        const decoded = request(entry.command, {
          flags,
          extended,
          ...(offset === undefined ? {} : { offset }),
          ...(length === undefined ? {} : { length }),
        })
        expect(validateRequest(decoded, rules({ mode, ...entry.session }))).toBe(entry.expected)
      })
    }
  }

  it('refuses an extended write without the payload flag, and a compact one with it', () => {
    expect(validateRequest(request(COMMAND.WRITE, { extended: true }), rules({ mode: 'extended' }))).toBe(
      EINVAL,
    )
    expect(validateRequest(request(COMMAND.WRITE, { flags: flag.PAYLOAD_LEN }), rules())).toBe(EINVAL)
  })

  it('lets effect lengths past 32 bits through with extended headers', () => {
    const session = rules({ mode: 'extended', size: 2 ** 44 })
    for (const command of [COMMAND.TRIM, COMMAND.WRITE_ZEROES, COMMAND.CACHE, COMMAND.BLOCK_STATUS]) {
      expect(validateRequest(request(command, { length: 2 ** 44, extended: true }), session)).toBe(0)
      expect(validateRequest(request(command, { length: 2 ** 44 + 1, extended: true }), session)).not.toBe(0)
    }
  })

  it('is not fooled by offsets and lengths near 2^64', () => {
    const header = Buffer.alloc(32, 0xff)
    header.writeUInt32BE(MAGIC.extendedRequest, 0)
    header.writeUInt16BE(0, 4)
    header.writeUInt16BE(COMMAND.READ, 6)
    const session = rules({ mode: 'extended', size: Number.MAX_SAFE_INTEGER })
    expect(validateRequest(decodeRequest(header, true), session)).toBe(EINVAL)
    header.writeBigUInt64BE(0n, 16)
    expect(validateRequest(decodeRequest(header, true), session)).toBe(EINVAL)
    header.writeBigUInt64BE(2n ** 53n - 2n, 16)
    header.writeBigUInt64BE(2n, 24)
    expect(validateRequest(decodeRequest(header, true), session)).toBe(EINVAL)
    header.writeBigUInt64BE(1n, 24)
    expect(validateRequest(decodeRequest(header, true), session)).toBe(0)
  })

  test.prop({
    flags: fc.integer({ min: 0, max: 0xffff }),
    command: fc.integer({ min: 0, max: 10 }),
    offset: fc.oneof(fc.integer({ min: 0, max: 2 ** 21 }), fc.maxSafeNat()),
    length: fc.oneof(fc.integer({ min: 0, max: 2 ** 21 }), fc.integer({ min: 0, max: 2 ** 32 - 1 })),
    mode: fc.constantFrom<ReplyMode>('simple', 'structured', 'extended'),
    readOnly: fc.boolean(),
  })('lets nothing through that reaches outside of the volume or writes to a read-only one', (input) => {
    const session = rules({ size: 2 ** 20, mode: input.mode, readOnly: input.readOnly })
    const decoded = request(input.command, { ...input, extended: input.mode === 'extended' })
    if (validateRequest(decoded, session) !== 0) return
    const { command } = decoded
    if (command === COMMAND.DISC || command === COMMAND.FLUSH) return
    if (command === COMMAND.BLOCK_STATUS && decoded.payloadLength > 0) return // its range is in the payload
    expect(decoded.length).toBeGreaterThan(0)
    expect(decoded.offset + decoded.length).toBeLessThanOrEqual(session.size)
    const reads: number[] = [COMMAND.READ, COMMAND.CACHE, COMMAND.BLOCK_STATUS]
    if (session.readOnly) expect(reads).toContain(command)
  })
})

describe('block status with a filter', () => {
  const session = rules({ mode: 'extended', size: 2 ** 40, contexts: [1, 2, 3] })
  const filtered = (length: number, contexts: readonly number[], offset = 0) => {
    const bytes = encodeFilteredStatusRequest({ flags: 0, command: 0, cookie: 1, offset, length }, contexts)
    const decoded = decodeRequest(bytes, true)
    const errno = validateRequest(decoded, session)
    if (errno !== 0) return errno
    const payload = bytes.subarray(requestHeaderSize(true))
    expect(payload.length).toBe(decoded.payloadLength)
    return validateStatusFilter(decodeStatusFilter(payload), decoded, session)
  }

  it('takes known contexts, each once, in any order', () => {
    expect(filtered(2 ** 40, [3, 1])).toBe(0)
    expect(filtered(1, [2], 2 ** 40 - 1)).toBe(0)
  })

  it('refuses unknown and repeated contexts, none, and too many', () => {
    expect(filtered(4096, [4])).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(4096, [1, 1])).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(4096, [])).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(4096, [1, 2, 3, 1])).toBe(NBD_ERRNO.EINVAL)
  })

  it('checks the range that is in the payload', () => {
    expect(filtered(0, [1])).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(2 ** 40 + 1, [1])).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(2 ** 40, [1], 1)).toBe(NBD_ERRNO.EINVAL)
    expect(filtered(1, [1], 2 ** 41)).toBe(NBD_ERRNO.EINVAL)
  })

  it('refuses payloads of a wrong length', () => {
    for (const length of [1, 4, 8, 11, 13, 14, 15, 18]) {
      const flags = COMMAND_FLAG.PAYLOAD_LEN
      const decoded = request(COMMAND.BLOCK_STATUS, { flags, length, extended: true })
      expect(validateRequest(decoded, session)).toBe(NBD_ERRNO.EINVAL)
    }
  })
})

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
