import { describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import {
  capacityOf,
  chunkOffsetOf,
  chunkOn,
  createGeometry,
  DATA_OFFSET_DEFAULT,
  dataMemberOf,
  type Geometry,
  geometryProblem,
  memberSizeOf,
  parityMemberOf,
  shapeProblem,
  slotsForCapacity,
  slotsForMemberSize,
} from '../../src/stripe/geometry.ts'

const KiB = 1024
const MiB = 1024 * KiB

/** As later releases will have it; this one only computes with it. */
function withParity(dataMembers: number, parityMembers: number): Geometry {
  const chunkSize = 64 * KiB
  return {
    chunkSize,
    dataMembers,
    parityMembers,
    stripeSize: dataMembers * chunkSize,
    dataOffset: MiB,
    slots: 1000,
  }
}

describe('createGeometry', () => {
  it('gives the embedded default', () => {
    expect(createGeometry({ chunkSize: 64 * KiB, dataMembers: 1, parityMembers: 0, slots: 17 })).toEqual({
      chunkSize: 64 * KiB,
      dataMembers: 1,
      parityMembers: 0,
      stripeSize: 64 * KiB,
      dataOffset: MiB,
      slots: 17,
    })
  })

  it('counts usable bytes without slot 0, and member bytes with it', () => {
    const geometry = createGeometry({ chunkSize: 16 * KiB, dataMembers: 3, parityMembers: 0, slots: 11 })
    expect(capacityOf(geometry)).toBe(10 * 48 * KiB)
    expect(memberSizeOf(geometry)).toBe(MiB + 11 * 16 * KiB)
  })

  it('carries the largest pool without losing a digit', () => {
    const slots = LIMITS.slotsPerPoolMax
    const geometry = createGeometry({ chunkSize: MiB, dataMembers: 4, parityMembers: 0, slots })
    expect(BigInt(memberSizeOf(geometry))).toBe(BigInt(MiB) + BigInt(slots) * BigInt(MiB))
    expect(BigInt(chunkOffsetOf(geometry, slots - 1))).toBe(BigInt(MiB) * BigInt(slots))
  })

  it.each([
    [{ chunkSize: 0 }, 'chunk size 0 is not a power of two'],
    [{ chunkSize: -4096 }, 'chunk size -4096 is not a power of two'],
    [{ chunkSize: 48 * KiB }, 'chunk size 49152 is not a power of two'],
    [{ chunkSize: 4096.5 }, 'chunk size 4096.5 is not a power of two'],
    [{ chunkSize: Number.NaN }, 'chunk size NaN is not a power of two'],
    [{ chunkSize: 2 * KiB }, 'chunk size 2K is outside 4K to 1M'],
    [{ chunkSize: 2 * MiB }, 'chunk size 2M is outside 4K to 1M'],
    [{ dataMembers: 0 }, '0 data members are not possible'],
    [{ dataMembers: -1 }, '-1 data members are not possible'],
    [{ dataMembers: 1.5 }, '1.5 data members are not possible'],
    [{ dataMembers: 33 }, '33 members are too many: a pool has at most 32'],
    [{ dataMembers: 31, parityMembers: 2 }, '33 members are too many'],
    [{ dataMembers: 5, chunkSize: MiB }, '5 members with chunks of 1M make stripes above 4M'],
    [{ parityMembers: 1 }, 'parity 1 is not in this release'],
    [{ parityMembers: 2 }, 'parity 2 is not in this release'],
    [{ parityMembers: 3 }, 'parity 3 is not possible'],
    [{ parityMembers: -1 }, 'parity -1 is not possible'],
    [{ slots: 1 }, '1 slots are too few'],
    [{ slots: 2.5 }, '2.5 slots are too few'],
    [{ slots: 2 ** 32 }, '4294967296 slots are more than 4294967295'],
    [{ dataOffset: 0 }, 'data offset 0 is not a multiple'],
    [{ dataOffset: MiB + 4096 }, `data offset ${MiB + 4096} is not a multiple`],
    [{ dataOffset: 2 ** 53 - 64 * KiB }, 'is too large'],
  ])('refuses %j', (wrong, problem) => {
    const good = { chunkSize: 64 * KiB, dataMembers: 1, parityMembers: 0, slots: 100 }
    expect(() => createGeometry({ ...good, ...wrong })).toThrow(
      expect.objectContaining({
        name: 'UserError',
        code: 'USAGE',
        message: expect.stringContaining(problem),
      }),
    )
  })

  it('has good defaults for every chunk size and member count within the limits', () => {
    for (let chunkSize = LIMITS.chunkSizeMin; chunkSize <= LIMITS.chunkSizeMax; chunkSize *= 2) {
      for (let dataMembers = 1; dataMembers <= LIMITS.membersMax; dataMembers++) {
        const shape = { chunkSize, dataMembers, parityMembers: 0 }
        expect(shapeProblem(shape) === undefined).toBe(chunkSize * dataMembers <= LIMITS.stripeSizeMax)
        if (shapeProblem(shape) !== undefined) continue
        expect(geometryProblem({ ...shape, dataOffset: DATA_OFFSET_DEFAULT, slots: 2 })).toBeUndefined()
      }
    }
  })
})

describe('placement', () => {
  it('rotates as the table in the file comment says', () => {
    const geometry = withParity(3, 1)
    const row = (slot: number) => [0, 1, 2].map((chunk) => dataMemberOf(geometry, slot, chunk))
    expect([row(1), parityMemberOf(geometry, 1, 0)]).toEqual([[1, 2, 3], 0])
    expect([row(2), parityMemberOf(geometry, 2, 0)]).toEqual([[2, 3, 0], 1])
    expect([row(3), parityMemberOf(geometry, 3, 0)]).toEqual([[3, 0, 1], 2])
    expect([row(4), parityMemberOf(geometry, 4, 0)]).toEqual([[0, 1, 2], 3])
  })

  it.each([
    [1, 0],
    [2, 0],
    [3, 0],
    [4, 1],
    [6, 2],
    [30, 2],
  ])('k=%d p=%d: a slot has one chunk on every member, and chunkOn is the inverse', (k, p) => {
    const geometry = withParity(k, p)
    for (const slot of [1, 2, 3, 31, 32, 33, 999, 2 ** 32 - 2]) {
      const members: number[] = []
      for (let chunk = 0; chunk < k; chunk++) members.push(dataMemberOf(geometry, slot, chunk))
      for (let parity = 0; parity < p; parity++) members.push(parityMemberOf(geometry, slot, parity))
      expect(new Set(members).size).toBe(k + p)
      expect(members.map((member) => chunkOn(geometry, slot, member))).toEqual(
        members.map((_, chunk) => chunk),
      )
    }
  })

  it('chunks of neighbouring slots do not overlap, and none reaches into the superblocks or past the member', () => {
    const geometry = withParity(2, 0)
    expect(chunkOffsetOf(geometry, 1)).toBe(MiB + 64 * KiB)
    expect(chunkOffsetOf(geometry, 2) - chunkOffsetOf(geometry, 1)).toBe(geometry.chunkSize)
    expect(chunkOffsetOf(geometry, 999) + geometry.chunkSize).toBe(memberSizeOf(geometry))
    expect(() => chunkOffsetOf(geometry, 0)).toThrow('slot number')
    expect(() => chunkOffsetOf(geometry, 1000)).toThrow('slot number')
    expect(() => dataMemberOf(geometry, 1, 2)).toThrow('data chunk index')
    expect(() => parityMemberOf(geometry, 1, 0)).toThrow('parity chunk index')
  })
})

describe('sizes', () => {
  it('rounds a capacity up to whole stripes beside slot 0', () => {
    expect(slotsForCapacity(1, 64 * KiB)).toBe(2)
    expect(slotsForCapacity(64 * KiB, 64 * KiB)).toBe(2)
    expect(slotsForCapacity(64 * KiB + 1, 64 * KiB)).toBe(3)
    expect(slotsForCapacity(16 * 2 ** 40, 64 * KiB)).toBe(2 ** 28 + 1)
  })

  it.each([0, -1, 1.5, Number.NaN, 2 ** 60])('refuses a capacity of %d', (capacity) => {
    expect(() => slotsForCapacity(capacity, 64 * KiB)).toThrow('is not a positive size')
  })

  it('says the largest capacity, and takes that one', () => {
    expect(() => slotsForCapacity(256 * 2 ** 40, 64 * KiB)).toThrow('at most 262143G')
    expect(slotsForCapacity(262_143 * 2 ** 30, 64 * KiB)).toBeLessThanOrEqual(LIMITS.slotsPerPoolMax)
    expect(slotsForCapacity((LIMITS.slotsPerPoolMax - 1) * 64 * KiB, 64 * KiB)).toBe(LIMITS.slotsPerPoolMax)
  })

  it('takes the slots that fit on a member', () => {
    expect(slotsForMemberSize(0, 4096)).toBe(0)
    expect(slotsForMemberSize(MiB + 4095, 4096)).toBe(0)
    expect(slotsForMemberSize(MiB + 3 * 4096 - 1, 4096)).toBe(2)
    expect(slotsForMemberSize(2 ** 52, 4096)).toBe(LIMITS.slotsPerPoolMax)
  })
})
