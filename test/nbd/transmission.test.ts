import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { COMMAND, COMMAND_FLAG, MAGIC, type ReplyMode } from '../../src/nbd/constants.ts'
import { NBD_ERRNO } from '../../src/nbd/errno.ts'
import { encodeFilteredStatusRequest, writeRequest } from '../../src/nbd/replies.ts'
import {
  decodeRequest,
  decodeStatusFilter,
  HANG_UP,
  type Request,
  requestHeaderSize,
  type SessionRules,
  validateRequest,
  validateStatusFilter,
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
