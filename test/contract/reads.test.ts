import { openSync } from 'node:fs'
import { afterEach, describe, expect, it } from 'vitest'
import type { ReplyMode } from '../../src/datapath/datapath.ts'
import { closeRigs, pattern, Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { within } from '../support/poll.ts'
import { CMD, FLAG } from '../support/wire-client.ts'

const modes: readonly ReplyMode[] = ['simple', 'structured', 'extended']

describe.each(implementations)('reads: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(modes)('%s replies', (mode) => {
    it.each([
      { members: 1, chunkSize: 4096 },
      { members: 2, chunkSize: 4096 },
      { members: 3, chunkSize: 8192 },
    ])('finds every byte of formatted stripes: $members members, chunk $chunkSize', async (shape) => {
      const rig = await Rig.open(implementation, { ...shape, stripes: 16 })
      // Slots in an order of their own, so that neighbours on the volume are none on the members.
      for (let stripe = 0; stripe < 16; stripe++) {
        const slot = 1 + ((stripe * 7) % 16)
        rig.putSlotBytes(slot, pattern(rig.stripeSize, stripe))
        rig.setStripe(stripe, slot, true)
      }
      const all = Buffer.concat(Array.from({ length: 16 }, (_, stripe) => pattern(rig.stripeSize, stripe)))
      const client = await rig.connect(mode)
      expect((await client.read(0, rig.size)).equals(all)).toBe(true)
      for (const [offset, length] of [
        [0, 1],
        [rig.size - 1, 1],
        [4095, 2],
        [rig.stripeSize - 3, 7],
        [rig.stripeSize * 2 + 511, rig.stripeSize * 3 + 77],
        [12345, 4096],
      ] as const) {
        expect((await client.read(offset, length)).equals(all.subarray(offset, offset + length))).toBe(true)
      }
    })

    it('joins neighbouring slots and still reads each from its place', async () => {
      const rig = await Rig.open(implementation, { stripes: 12 })
      const slots = [1, 2, 3, 9, 10, 8, 4, 5, 6, 30, 31, 32]
      slots.forEach((slot, stripe) => {
        rig.putSlotBytes(slot, pattern(rig.stripeSize, slot))
        rig.setStripe(stripe, slot, false)
      })
      const client = await rig.connect(mode)
      const all = Buffer.concat(slots.map((slot) => pattern(rig.stripeSize, slot)))
      expect((await client.read(0, rig.size)).equals(all)).toBe(true)
      expect((await client.read(100, rig.size - 200)).equals(all.subarray(100, rig.size - 100))).toBe(true)
    })

    it('reads unformatted stripes as the fill byte, without member I/O', async () => {
      for (const fill of [0, 0xe5]) {
        const rig = await Rig.open(implementation, { fill, members: 2 })
        rig.putSlotBytes(1, pattern(rig.stripeSize)) // what no client may see
        const client = await rig.connect(mode)
        const data = await client.read(777, 100_000)
        expect(data.equals(Buffer.alloc(100_000, fill))).toBe(true)
        expect(rig.memberTotals()).toMatchObject({ reads: 0, readBytes: 0 })
        expect(rig.policy.seen).toEqual([])
        expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({
          reads: 1,
          readBytes: 100_000,
          errors: 0,
        })
      }
    })

    it('mixes formatted and unformatted stripes in one read', async () => {
      for (const fill of [0, 0x11]) {
        const rig = await Rig.open(implementation, { fill, stripes: 10 })
        const expected = Buffer.alloc(rig.size, fill)
        for (const stripe of [0, 3, 4, 9]) {
          pattern(rig.stripeSize, stripe + 50).copy(expected, stripe * rig.stripeSize)
          rig.putSlotBytes(stripe + 20, pattern(rig.stripeSize, stripe + 50))
          rig.setStripe(stripe, stripe + 20, true)
        }
        const client = await rig.connect(mode)
        expect((await client.read(0, rig.size)).equals(expected)).toBe(true)
        expect((await client.read(5000, 20_000)).equals(expected.subarray(5000, 25_000))).toBe(true)
        expect(rig.memberTotals().readBytes).toBeLessThanOrEqual(4 * rig.stripeSize + 20_000)
      }
    })

    it('reads what lies past the end of a member file as zeros', async () => {
      const rig = await Rig.open(implementation, { members: 2, fill: 0x77 })
      rig.formatAll()
      rig.putSlotBytes(1, pattern(rig.stripeSize))
      rig.truncateMembers(rig.layout.dataOffset + 1 * 4096 + 1000)
      const client = await rig.connect(mode)
      const data = await client.read(0, 3 * rig.stripeSize)
      const expected = Buffer.alloc(3 * rig.stripeSize)
      pattern(rig.stripeSize).copy(expected, 0, 0, 1000)
      pattern(rig.stripeSize).copy(expected, 4096, 4096, 5096)
      expect(data.equals(expected)).toBe(true)
    })

    it('reads the last stripe of a volume that cuts it short', async () => {
      const rig = await Rig.open(implementation, { stripes: 3, size: 2 * 4096 + 512 })
      rig.formatAll()
      rig.putSlotBytes(3, pattern(4096, 3))
      const client = await rig.connect(mode)
      expect((await client.read(2 * 4096, 512)).equals(pattern(4096, 3).subarray(0, 512))).toBe(true)
      const past = await client.request({ command: CMD.READ, offset: 2 * 4096, length: 513 })
      expect(past.errno).toBe(22)
    })

    it('sees a stripe as soon as the policy has published it', async () => {
      const rig = await Rig.open(implementation)
      const client = await rig.connect(mode)
      expect((await client.read(4096, 4096)).equals(Buffer.alloc(4096))).toBe(true)
      rig.putSlotBytes(5, pattern(4096))
      rig.setStripe(1, 5, false)
      expect((await client.read(4096, 4096)).equals(pattern(4096))).toBe(true)
      rig.putSlotBytes(6, pattern(4096, 6))
      Atomics.store(rig.tables.slots, 1, 6)
      expect((await client.read(4096, 4096)).equals(pattern(4096, 6))).toBe(true)
      rig.init.clear(1)
      expect((await client.read(4096, 4096)).equals(Buffer.alloc(4096))).toBe(true)
    })

    it('follows an init bit that stands for several stripes', async () => {
      const rig = await Rig.open(implementation, { formatUnit: 4, stripes: 64 })
      for (let index = 0; index < 4; index++) {
        rig.putSlotBytes(40 - index, pattern(4096, index))
        Atomics.store(rig.tables.slots, 36 + index, 40 - index)
      }
      const client = await rig.connect(mode)
      expect((await client.read(36 * 4096, 16384)).equals(Buffer.alloc(16384))).toBe(true)
      rig.init.set(9)
      const data = await client.read(36 * 4096, 16384)
      expect(data.equals(Buffer.concat([0, 1, 2, 3].map((index) => pattern(4096, index))))).toBe(true)
    })

    it('answers a read of 32 MiB and pipelined reads of all sizes', async () => {
      const size = 32 * 2 ** 20
      const rig = await Rig.open(implementation, { chunkSize: 65536, stripes: 512 })
      const expected = Buffer.alloc(size)
      for (let stripe = 0; stripe < 512; stripe += 2) {
        const bytes = pattern(65536, stripe + 1)
        bytes.copy(expected, stripe * 65536)
        rig.putSlotBytes(600 - stripe, bytes)
        rig.setStripe(stripe, 600 - stripe, true)
      }
      const client = await rig.connect(mode)
      expect((await client.read(0, size)).equals(expected)).toBe(true)
      const requests = Array.from({ length: 200 }, (_, index) => {
        const length = 1 + ((index * 7919) % 300_000)
        const offset = (index * 104_729 * 13) % (size - length)
        return { offset, length, data: client.read(offset, length) }
      })
      for (const { offset, length, data } of requests) {
        expect((await data).equals(expected.subarray(offset, offset + length))).toBe(true)
      }
      expect(rig.datapath.exportCounters(rig.exportId).reads).toBe(201)
    })
  })

  describe.each(['structured', 'extended'] as const)('chunks in %s replies', (mode) => {
    it('announces unformatted stripes as holes and the others as data', async () => {
      const rig = await Rig.open(implementation, { stripes: 8 })
      for (const stripe of [2, 3, 6]) {
        rig.putSlotBytes(stripe + 10, pattern(4096, stripe))
        rig.setStripe(stripe, stripe + 10, true)
      }
      const client = await rig.connect(mode)
      const reply = await client.request({ command: CMD.READ, offset: 100, length: 8 * 4096 - 200 })
      expect(contentOf(reply.chunks)).toEqual([
        ['hole', 100, 2 * 4096 - 100],
        ['data', 2 * 4096, 2 * 4096],
        ['hole', 4 * 4096, 2 * 4096],
        ['data', 6 * 4096, 4096],
        ['hole', 7 * 4096, 4096 - 100],
      ])
    })

    it('sends data for an unformatted stripe that is filled with something else', async () => {
      const rig = await Rig.open(implementation, { fill: 9 })
      const client = await rig.connect(mode)
      const reply = await client.request({ command: CMD.READ, offset: 0, length: 9000 })
      expect(reply.chunks.every((chunk) => chunk.type !== 'hole')).toBe(true)
      expect(reply.data.equals(Buffer.alloc(9000, 9))).toBe(true)
    })

    it('sends one chunk where DF asks for it', async () => {
      const rig = await Rig.open(implementation, { stripes: 8, members: 3 })
      rig.putSlotBytes(11, pattern(rig.stripeSize))
      rig.setStripe(3, 11, true)
      const client = await rig.connect(mode)
      const reply = await client.request({ command: CMD.READ, offset: 0, length: rig.size, flags: FLAG.DF })
      expect(contentOf(reply.chunks)).toEqual([['data', 0, rig.size]])
      const expected = Buffer.alloc(rig.size)
      pattern(rig.stripeSize).copy(expected, 3 * rig.stripeSize)
      expect(reply.data.equals(expected)).toBe(true)
      const empty = await client.request({ command: CMD.READ, offset: 0, length: 4096, flags: FLAG.DF })
      expect(contentOf(empty.chunks)).toHaveLength(1)
    })
  })

  it('sends large replies to their end, however the client takes them', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 256 })
    rig.formatAll()
    const client = await rig.connect('structured')
    for (let round = 0; round < 40; round++) {
      const data = await within(client.read(0, rig.size), `read ${round}`, 5000)
      expect(data.length).toBe(rig.size)
    }
  })

  it('caches without an answer of its own kind, and counts no upcall', async () => {
    const rig = await Rig.open(implementation, { stripes: 300 })
    rig.formatAll()
    const client = await rig.connect('structured')
    expect((await client.request({ command: CMD.CACHE, offset: 4000, length: 1_000_000 })).errno).toBe(0)
    expect((await client.request({ command: CMD.CACHE, offset: 4000, length: 2_000_000 })).errno).toBe(22)
    expect(rig.policy.seen).toEqual([])
  })

  it.each(modes)(
    'answers with EIO when a member cannot be read, and the session goes on (%s)',
    async (mode) => {
      const openMember = (path: string): number => openSync(path, 'w') // not for reading
      const rig = await Rig.open(implementation, { stripes: 400, members: 2, openMember })
      for (let stripe = 4; stripe < 400; stripe++) rig.setStripe(stripe, stripe + 1, true)
      const client = await rig.connect(mode)
      for (const [offset, length] of [
        [8 * rig.stripeSize, 100],
        [2 * rig.stripeSize, 8 * rig.stripeSize],
        [0, 400 * rig.stripeSize], // far too much to be read in one piece
      ] as const) {
        const reply = await client.request({ command: CMD.READ, offset, length })
        expect(reply.errno).toBe(5)
        expect((await client.read(0, 4 * rig.stripeSize)).equals(Buffer.alloc(4 * rig.stripeSize))).toBe(true)
      }
      expect(rig.datapath.exportCounters(rig.exportId).errors).toBe(3)
      await expect(rig.datapath.readSlot(9, 100, Buffer.alloc(100))).rejects.toMatchObject({
        name: 'StoreError',
        code: 'MEMBER_IO',
        message: expect.stringMatching(/member 1.*offset/),
      })
    },
  )
})

function contentOf(
  chunks: readonly { type: string; offset: number; length: number }[],
): [string, number, number][] {
  return chunks
    .filter(({ type }) => type !== 'none')
    .map(({ type, offset, length }) => [type, offset, length])
}
