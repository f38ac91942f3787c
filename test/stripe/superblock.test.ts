import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { createGeometry } from '../../src/stripe/geometry.ts'
import {
  decodeSuperblock,
  encodeSuperblock,
  isZero,
  readSuperblocks,
  SUPERBLOCK_AREA,
  SUPERBLOCK_SIZE,
  type Superblock,
} from '../../src/stripe/superblock.ts'

const superblock: Superblock = {
  uuid: '01234567-89ab-cdef-fedc-ba9876543210',
  memberIndex: 2,
  geometry: createGeometry({ chunkSize: 65_536, dataMembers: 3, parityMembers: 0, slots: 2 ** 32 - 1 }),
  generation: 2 ** 40 + 7,
  created: Date.UTC(2024, 1, 29, 12),
}

/** Changes a field and makes the checksum right again, as a later program or a forger would. */
function altered(change: (block: Buffer) => void): Buffer {
  const block = encodeSuperblock(superblock)
  change(block)
  block.writeUInt32LE(0, 12)
  block.writeUInt32LE(crc32(block), 12)
  return block
}

function area(primary: Buffer, copy: Buffer): Buffer {
  return Buffer.concat([primary, copy])
}

describe('one superblock', () => {
  it('reads back what was written', () => {
    const block = encodeSuperblock(superblock)
    expect(block.length).toBe(SUPERBLOCK_SIZE)
    expect(decodeSuperblock(block)).toEqual({ state: 'valid', superblock })
  })

  it('has the documented bytes', () => {
    const block = encodeSuperblock(superblock)
    expect(block.subarray(0, 8).toString('latin1')).toBe('FULLSTRP')
    expect(block.readUInt32LE(8)).toBe(1)
    expect(block.subarray(16, 32).toString('hex')).toBe('0123456789abcdeffedcba9876543210')
    expect([32, 36, 40, 44].map((offset) => block.readUInt32LE(offset))).toEqual([2, 3, 0, 65_536])
    expect([48, 56, 64].map((offset) => block.readBigUInt64LE(offset))).toEqual([
      1_048_576n,
      2n ** 32n - 1n,
      2n ** 40n + 7n,
    ])
    expect(block.readBigUInt64LE(72)).toBe(BigInt(superblock.created))
    expect(isZero(block.subarray(80))).toBe(true)
    const zeroed = Buffer.from(block).fill(0, 12, 16)
    expect(block.readUInt32LE(12)).toBe(crc32(zeroed))
  })

  it('notices every changed bit', () => {
    const block = encodeSuperblock(superblock)
    for (let bit = 0; bit < SUPERBLOCK_SIZE * 8; bit++) {
      const mask = 1 << (bit & 7)
      block[bit >>> 3] = (block[bit >>> 3] ?? 0) ^ mask
      const { state } = decodeSuperblock(block)
      block[bit >>> 3] = (block[bit >>> 3] ?? 0) ^ mask
      if (state !== (bit < 64 ? 'foreign' : 'damaged')) throw new Error(`bit ${bit}: ${state}`)
    }
  })

  it('never throws and never accepts random bytes, with or without the magic', () => {
    const magic = Buffer.from('FULLSTRP')
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 200, maxLength: 200 }), fc.boolean(), (bytes, ours) => {
        const block = Buffer.alloc(SUPERBLOCK_SIZE)
        block.set(bytes)
        if (ours) magic.copy(block)
        return decodeSuperblock(block).state === (ours ? 'damaged' : 'foreign')
      }),
    )
  })

  it.each([
    ['a version of 0', (b: Buffer) => b.writeUInt32LE(0, 8), 'its version is 0'],
    ['a member index past the end', (b: Buffer) => b.writeUInt32LE(3, 32), 'it is member 3 of 3'],
    ['no data members', (b: Buffer) => b.writeUInt32LE(0, 36), '0 data members'],
    ['2^32-1 data members', (b: Buffer) => b.writeUInt32LE(0xffffffff, 36), 'members are too many'],
    ['parity', (b: Buffer) => b.writeUInt32LE(1, 40), 'parity 1 is not in this release'],
    ['an odd chunk size', (b: Buffer) => b.writeUInt32LE(65_537, 44), 'not a power of two'],
    ['a data offset of 0', (b: Buffer) => b.writeBigUInt64LE(0n, 48), 'data offset 0'],
    ['a huge data offset', (b: Buffer) => b.writeBigUInt64LE(2n ** 64n - 1n, 48), 'data offset'],
    ['2^32 slots', (b: Buffer) => b.writeBigUInt64LE(2n ** 32n, 56), 'slots are more than'],
    ['one slot', (b: Buffer) => b.writeBigUInt64LE(1n, 56), '1 slots are too few'],
    ['generation 0', (b: Buffer) => b.writeBigUInt64LE(0n, 64), 'its generation is 0'],
    ['a huge generation', (b: Buffer) => b.writeBigUInt64LE(2n ** 63n, 64), 'its generation is'],
    ['a huge time', (b: Buffer) => b.writeBigUInt64LE(2n ** 63n, 72), 'its time of creation is'],
  ])('calls %s damage even under a right checksum', (_name, change, reason) => {
    const decoded = decodeSuperblock(altered(change))
    expect(decoded).toEqual({ state: 'damaged', reason: expect.stringContaining(reason) })
  })

  it('knows a newer version from a damaged version field', () => {
    const newer = altered((block) => block.writeUInt32LE(2, 8))
    expect(decodeSuperblock(newer)).toEqual({ state: 'newer', version: 2 })
    const torn = encodeSuperblock(superblock)
    torn.writeUInt32LE(2, 8)
    expect(decodeSuperblock(torn).state).toBe('damaged')
  })

  it('asserts what it is asked to write', () => {
    const wrong: [Partial<Superblock>, string][] = [
      [{ uuid: 'not a uuid' }, 'superblock uuid'],
      [{ uuid: superblock.uuid.toUpperCase() }, 'superblock uuid'],
      [{ memberIndex: 3 }, 'superblock member index'],
      [{ generation: 0 }, 'superblock generation'],
      [{ geometry: { ...superblock.geometry, slots: 0 } }, 'superblock geometry'],
    ]
    for (const [change, message] of wrong) {
      expect(() => encodeSuperblock({ ...superblock, ...change })).toThrow(message)
    }
  })
})

describe('both superblocks', () => {
  const good = encodeSuperblock(superblock)
  const blank = Buffer.alloc(SUPERBLOCK_SIZE)
  const garbage = Buffer.alloc(SUPERBLOCK_SIZE, 0xe5)
  const torn = Buffer.concat([good.subarray(0, 72), Buffer.alloc(SUPERBLOCK_SIZE - 72, 0xff)])
  const newer = altered((block) => block.writeUInt32LE(9, 8))
  const later = encodeSuperblock({ ...superblock, generation: superblock.generation + 1 })

  it('agree', () => {
    expect(readSuperblocks(area(good, good))).toEqual({ state: 'valid', superblock, note: undefined })
  })

  it.each([
    ['torn', torn, 'the primary superblock is damaged (its checksum does not match); its copy is used'],
    ['wiped', blank, 'the primary superblock is missing; its copy is used'],
    ['overwritten', garbage, 'the primary superblock is missing; its copy is used'],
  ])('falls back to the copy when the primary is %s, and says so', (_name, primary, note) => {
    expect(readSuperblocks(area(primary, good))).toEqual({ state: 'valid', superblock, note })
  })

  it('uses the primary when the copy is damaged, and says so', () => {
    const note = 'the copy of the superblock is damaged (its checksum does not match); the primary is used'
    expect(readSuperblocks(area(good, torn))).toEqual({ state: 'valid', superblock, note })
  })

  it('uses the later one when an update was interrupted between the two', () => {
    const reading = readSuperblocks(area(later, good))
    expect(reading).toMatchObject({ state: 'valid', superblock: { generation: superblock.generation + 1 } })
    expect(reading).toMatchObject({ note: expect.stringContaining('the later one is used') })
    expect(readSuperblocks(area(good, later))).toMatchObject({
      superblock: { generation: superblock.generation + 1 },
    })
  })

  it('refuses two that contradict each other', () => {
    const other = encodeSuperblock({ ...superblock, memberIndex: 1 })
    expect(readSuperblocks(area(good, other))).toMatchObject({
      state: 'damaged',
      reason: expect.stringContaining('different members'),
    })
    const smaller = encodeSuperblock({ ...superblock, geometry: { ...superblock.geometry, slots: 5 } })
    expect(readSuperblocks(area(good, smaller))).toMatchObject({
      state: 'damaged',
      reason: expect.stringContaining('contradict'),
    })
  })

  it('refuses a newer version wherever it is', () => {
    for (const both of [area(newer, newer), area(newer, good), area(good, newer), area(torn, newer)]) {
      expect(readSuperblocks(both)).toEqual({ state: 'newer', version: 9 })
    }
  })

  it('tells blank, foreign and damaged apart', () => {
    expect(readSuperblocks(Buffer.alloc(SUPERBLOCK_AREA))).toEqual({ state: 'blank' })
    expect(readSuperblocks(area(garbage, blank))).toEqual({ state: 'foreign' })
    expect(readSuperblocks(area(blank, torn)).state).toBe('damaged')
    expect(readSuperblocks(area(torn, torn)).state).toBe('damaged')
  })
})

describe('isZero', () => {
  it('finds a single byte anywhere', () => {
    expect(isZero(Buffer.alloc(0))).toBe(true)
    expect(isZero(Buffer.alloc(1))).toBe(true)
    expect(isZero(Buffer.alloc(100))).toBe(true)
    for (let at = 0; at < 100; at++) expect(isZero(Buffer.alloc(100).fill(1, at, at + 1))).toBe(false)
    expect(isZero(Buffer.alloc(100, 1))).toBe(false)
  })
})
