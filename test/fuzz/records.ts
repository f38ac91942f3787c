/** Targets that read one thing at once: the data of options, text that people write, and what lies on disk. */
import { isDeepStrictEqual } from 'node:util'
import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import { ProtocolError, StoreError, UserError } from '../../src/base/errors.ts'
import { formatSize, parseSize } from '../../src/base/sizes.ts'
import { CHANGE, Journal, type JournalFile } from '../../src/metadata/journal.ts'
import {
  decodeExportRequest,
  decodeInfo,
  decodeListedExport,
  decodeMetaContext,
  decodeMetaContextRequest,
  encodeExportRequest,
  encodeListedExport,
  encodeMetaContext,
  encodeMetaContextRequest,
} from '../../src/nbd/handshake.ts'
import { formatNbdUri, parseNbdUri } from '../../src/nbd/uri.ts'
import { createGeometry } from '../../src/stripe/geometry.ts'
import {
  encodeSuperblock,
  readSuperblocks,
  SUPERBLOCK_AREA,
  SUPERBLOCK_SIZE,
} from '../../src/stripe/superblock.ts'
import { go, meta } from '../nbd/talk.ts'
import type { Target } from './fuzz.ts'

const bytesOf = (maxLength: number) => fc.uint8Array({ maxLength }).map((bytes) => Buffer.from(bytes))

/** Runs what may refuse its input in its own way, and in no other. @returns undefined where it did */
function orRefused<T>(kind: new (...args: never[]) => Error, run: () => T): T | undefined {
  try {
    return run()
  } catch (error) {
    if (!(error instanceof kind)) throw error
    return undefined
  }
}

// ---------------------------------------------------------------------------------------- the data of options

/** Decoders of option data; those with an encoder have to give the same bytes back. */
const DECODERS: readonly ((data: Buffer) => Buffer | undefined)[] = [
  (data) => encodeExportRequest(decodeExportRequest(data)),
  (data) => encodeMetaContextRequest(decodeMetaContextRequest(data)),
  (data) => encodeListedExport(decodeListedExport(data)),
  (data) => encodeMetaContext(decodeMetaContext(data)),
  (data) => {
    decodeInfo(data)
    return undefined
  },
]

const optionData: Target = {
  name: 'option-data',
  inputMax: 16_384,
  built: fc
    .tuple(
      fc.nat(DECODERS.length - 1),
      fc.oneof(
        bytesOf(64),
        fc.constantFrom(go('disk', [1, 3]), meta('größer', 'base:', 'x-a:b'), go(''), meta('')),
        fc
          .tuple(fc.string({ unit: 'grapheme' }), fc.array(fc.string({ unit: 'grapheme' }), { maxLength: 4 }))
          .map(([name, queries]) => meta(name, ...queries)),
        fc
          .tuple(fc.string({ unit: 'grapheme' }), fc.array(fc.nat(0xffff), { maxLength: 4 }))
          .map(([name, infos]) => go(name, infos)),
      ),
    )
    .map(([which, data]) => Buffer.concat([Buffer.from([which]), data])),
  allocationMax: (length) => 16 * 1024 + 64 * length,
  check(input) {
    const data = input.subarray(1)
    const decode = DECODERS[(input[0] ?? 0) % DECODERS.length]!
    const again = orRefused(ProtocolError, () => decode(data))
    if (again !== undefined && !again.equals(data))
      throw new Error(`it reads back as ${again.toString('hex')}`)
  },
}

// ------------------------------------------------------------------------------------------------------- text

const character = fc.constantFrom(
  ...'nbd+unix:///host@[]?socket=&%25%00%zz#./A1~\u00fc'.split(''),
  'nbd://',
  'nbds+unix:///',
  '%',
  '%2F',
  '%C3%BC',
  'x-a=',
  '\0',
)

const uri: Target = {
  name: 'uri',
  inputMax: 16_384,
  built: fc.oneof(
    fc.array(character, { maxLength: 30 }).map((parts) => Buffer.from(parts.join(''))),
    fc
      .tuple(
        fc.constantFrom('nbd://', 'nbds://', 'nbd+unix://', 'NBD://'),
        fc.webAuthority({ withPort: true, withUserInfo: true, withIPv4: true, withIPv6: true }),
        fc.webPath(),
        fc.webQueryParameters(),
      )
      .map(([scheme, authority, path, query]) => Buffer.from(`${scheme}${authority}${path}?${query}`)),
  ),
  allocationMax: (length) => 64 * 1024 + 64 * length,
  check(input) {
    const parsed = orRefused(UserError, () => parseNbdUri(input.toString('utf8')))
    if (parsed === undefined) return
    const text = formatNbdUri(parsed)
    const again = parseNbdUri(text)
    if (!isDeepStrictEqual(again, parsed)) throw new Error(`written as ${text} it is another one`)
  },
}

const size: Target = {
  name: 'size',
  inputMax: 4096,
  built: fc.oneof(
    fc
      .array(fc.constantFrom(...'0123456789.KMGTPEkib -+e\n'.split('')), { maxLength: 24 })
      .map((parts) => Buffer.from(parts.join(''))),
    bytesOf(16),
  ),
  allocationMax: (length) => 16 * 1024 + 64 * length,
  check(input) {
    const bytes = orRefused(UserError, () => parseSize(input.toString('utf8')))
    if (bytes === undefined) return
    if (!Number.isSafeInteger(bytes) || bytes < 0) throw new Error(`it is ${bytes}`)
    if (parseSize(formatSize(bytes)) !== bytes)
      throw new Error(`written as ${formatSize(bytes)} it is another`)
  },
}

// ------------------------------------------------------------------------------------------------- superblocks

const CHECKSUM_AT = 12
/** An input is both copies without the zeros behind their fields: 80 bytes each, then what to do to the checksums. */
const FIELDS = 80

function superblockArea(input: Buffer): Buffer {
  const area = Buffer.alloc(SUPERBLOCK_AREA)
  for (const copy of [0, 1]) {
    const block = area.subarray(copy * SUPERBLOCK_SIZE, (copy + 1) * SUPERBLOCK_SIZE)
    input.subarray(copy * FIELDS, (copy + 1) * FIELDS).copy(block)
    // Else no change of a byte would get past the checksum.
    if (((input[2 * FIELDS] ?? 0) & (1 << copy)) !== 0) continue
    block.writeUInt32LE(0, CHECKSUM_AT)
    block.writeUInt32LE(crc32(block), CHECKSUM_AT)
  }
  return area
}

const superblock: Target = {
  name: 'superblock',
  inputMax: 2 * FIELDS + 1,
  built: fc
    .record({
      generations: fc.tuple(fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 5 })),
      dataMembers: fc.integer({ min: 1, max: 32 }),
      chunkSize: fc.constantFrom(4096, 65536, 2 ** 20),
      slots: fc.integer({ min: 2, max: 2 ** 32 - 1 }),
      spoil: fc.constantFrom(0, 0, 0, 1, 2, 3),
    })
    .map(({ generations, dataMembers, chunkSize, slots, spoil }) => {
      const stripeMax = 4 * 2 ** 20
      const geometry = createGeometry({
        chunkSize: Math.min(chunkSize, 2 ** Math.floor(Math.log2(stripeMax / dataMembers))),
        dataMembers,
        parityMembers: 0,
        slots,
      })
      const uuid = '01234567-89ab-cdef-fedc-ba9876543210'
      const copies = generations.map((generation) =>
        encodeSuperblock({ uuid, memberIndex: 0, geometry, generation, created: 7 }).subarray(0, FIELDS),
      )
      return Buffer.concat([...copies, Buffer.from([spoil])])
    }),
  allocationMax: () => 8 * SUPERBLOCK_AREA,
  check(input) {
    const area = superblockArea(input)
    const reading = readSuperblocks(area)
    if (reading.state !== 'valid') return
    // What it takes for valid can be written again, and is one of the two.
    const again = encodeSuperblock(reading.superblock).subarray(0, FIELDS)
    const copies = [0, SUPERBLOCK_SIZE].map((at) => area.subarray(at, at + FIELDS))
    if (!copies.some((copy) => copy.equals(again))) throw new Error('what it read is in neither copy')
  },
}

// ----------------------------------------------------------------------------------------------------- journal

const POOL = '6b1f3f0e-3f0a-4f6e-9d55-0d9f2f8a4c11'
const BOOT = '11111111-2222-4333-8444-555555555555'
const HEADER_SIZE = 4096
const FRAME_HEADER = 24
const FILE_SIZE = HEADER_SIZE + 2048

class MemoryFile implements JournalFile {
  readonly size = FILE_SIZE
  readonly content = Buffer.alloc(FILE_SIZE)
  read(target: Buffer, position: number): void {
    this.content.copy(target, 0, position, position + target.length)
  }
  write(source: Buffer, position: number): void {
    source.copy(this.content, position)
  }
  async sync(): Promise<void> {}
  close(): void {}
}

/**
 * An input is: two bytes of options, the two headers (96 bytes each, their zeros left out), and the frames of both files.
 *   options 0  bits 0, 1: the header of that file keeps a wrong checksum; bits 2, 3: its frames keep theirs;
 *              bits 4, 5: the file was begun under another boot
 *   options 1  the checkpoint
 */
const HEADER_FIELDS = 96
const FRAMES = FILE_SIZE - HEADER_SIZE

function journalFile(input: Buffer, side: number): MemoryFile {
  const file = new MemoryFile()
  const options = input[0] ?? 0
  input.subarray(2 + side * HEADER_FIELDS, 2 + (side + 1) * HEADER_FIELDS).copy(file.content)
  const framesAt = 2 + 2 * HEADER_FIELDS + side * FRAMES
  input.subarray(framesAt, framesAt + FRAMES).copy(file.content, HEADER_SIZE)
  const seed = crc32(file.content.subarray(0, HEADER_SIZE - 4))
  file.content.writeUInt32LE((options & (1 << side)) === 0 ? seed : 7, HEADER_SIZE - 4)
  if ((options & (4 << side)) !== 0) return file
  // Checksums made right again, frame by frame, as far as lengths lead.
  for (let at = HEADER_SIZE; at + FRAME_HEADER <= FILE_SIZE; ) {
    const length = file.content.readUInt32LE(at + 4)
    if (length > FILE_SIZE - at - FRAME_HEADER) break
    const head = crc32(file.content.subarray(at, at + 20), seed)
    const payloadAt = at + FRAME_HEADER
    file.content.writeUInt32LE(crc32(file.content.subarray(payloadAt, payloadAt + length), head), at + 20)
    at += Math.ceil((FRAME_HEADER + length) / 8) * 8
  }
  return file
}

/** What a journal writes that is told to do this. */
export function journalInput(steps: readonly number[], options: number, checkpoint: number): Buffer {
  const files = [new MemoryFile(), new MemoryFile()] as const
  const journal = new Journal([files[0], files[1]], { pool: POOL, bootId: BOOT })
  journal.recover(0)
  // `start` writes the header at once; what it then waits for are syncs, which a memory file has none of.
  void journal.start(0)
  for (const step of steps) {
    const change = { op: CHANGE.slots, medium: 1, first: step, count: 1, slot: step + 100 }
    if (!journal.hasRoom(3)) journal.checkpointed(journal.lastSequence)
    if (step % 3 === 2) journal.mark(journal.lastSequence)
    else journal.append(step % 3 === 1 ? [change] : [change, { ...change, op: CHANGE.formatted, slot: 0 }])
  }
  return Buffer.concat([
    Buffer.from([options, checkpoint]),
    ...files.map(({ content }) => content.subarray(0, HEADER_FIELDS)),
    ...files.map(({ content }) => content.subarray(HEADER_SIZE)),
  ])
}

const journal: Target = {
  name: 'journal',
  inputMax: 2 + 2 * HEADER_FIELDS + 2 * FRAMES,
  built: fc
    .tuple(fc.array(fc.nat(200), { maxLength: 60 }), fc.nat(63), fc.nat(20))
    .map(([steps, options, checkpoint]) => journalInput(steps, options, checkpoint)),
  allocationMax: () => 32 * FILE_SIZE,
  check(input) {
    const bootId = ((input[0] ?? 0) & 0x30) === 0 ? BOOT : '99999999-2222-4333-8444-555555555555'
    const checkpoint = input[1] ?? 0
    const recover = () => {
      const files = [journalFile(input, 0), journalFile(input, 1)] as const
      const before = files.map(({ content }) => Buffer.from(content))
      const recovered = orRefused(StoreError, () =>
        new Journal([files[0], files[1]], { pool: POOL, bootId }).recover(checkpoint),
      )
      if (files.some(({ content }, side) => !content.equals(before[side]!))) {
        throw new Error('recovery writes to the journal')
      }
      return recovered
    }
    const recovered = recover()
    if (recovered === undefined) return
    const { changes, lastSequence } = recovered
    if (lastSequence < checkpoint) throw new Error(`sequence ${lastSequence} is before the checkpoint`)
    if (changes.length > (2 * FRAMES) / 24) throw new Error(`${changes.length} changes in so few bytes`)
    if (!isDeepStrictEqual(recover(), recovered)) throw new Error('the second time it reads something else')
  },
}

export const RECORD_TARGETS: readonly Target[] = [optionData, uri, size, superblock, journal]
