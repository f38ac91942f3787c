import { openSync } from 'node:fs'
import { afterEach, describe, expect, it } from 'vitest'
import { closeRigs, pattern, Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { isPending, until, within } from '../support/poll.ts'
import { CMD } from '../support/wire-client.ts'

const shapes = [
  { members: 1, chunkSize: 4096, formatUnit: 1, fill: 0 },
  { members: 1, chunkSize: 4096, formatUnit: 4, fill: 0x77 },
  { members: 2, chunkSize: 8192, formatUnit: 1, fill: 0x11 },
  { members: 3, chunkSize: 4096, formatUnit: 3, fill: 0 },
]

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

describe.each(implementations)('readRange: $name', (implementation) => {
  afterEach(closeRigs)

  async function read(rig: Rig, offset: number, length: number): Promise<Buffer> {
    const target = Buffer.alloc(length + 2, 0xee)
    await within(rig.datapath.readRange(rig.exportId, offset, target.subarray(1, 1 + length)), 'a range')
    expect([target[0], target[length + 1]]).toEqual([0xee, 0xee])
    return target.subarray(1, 1 + length)
  }

  it.each(shapes)('reads what a client reads: k=$members, unit $formatUnit, fill $fill', async (shape) => {
    const stripeSize = shape.members * shape.chunkSize
    const rig = await Rig.open(implementation, { ...shape, size: 24 * stripeSize - 1536, stripes: 24 })
    const model = Buffer.alloc(24 * stripeSize, shape.fill)
    // Neighbours upwards, downwards, scattered; units that are not formatted between them and at either end of a range.
    const slots = [1, 2, 3, 40, 39, 38, 7, 8, 9, 50, 20, 70, 0, 0, 0, 11, 12, 13, 0, 0, 0, 14, 15, 16]
    for (let stripe = 0; stripe < 24; stripe++) {
      rig.putSlotBytes(slots[stripe] ?? 0, pattern(stripeSize, 100 + stripe)) // slot 0 is nobody's
    }
    for (let unit = 0; unit * shape.formatUnit < 24; unit++) {
      const stripes = Array.from({ length: shape.formatUnit }, (_, index) => unit * shape.formatUnit + index)
      if (stripes.some((stripe) => (slots[stripe] ?? 0) === 0)) continue
      for (const stripe of stripes) {
        rig.setStripe(stripe, slots[stripe] ?? 0, stripe % 2 === 0)
        pattern(stripeSize, 100 + stripe).copy(model, stripe * stripeSize)
      }
    }
    const client = await rig.connect('simple')
    const whole = await client.read(0, rig.size)
    expect(whole.equals(model.subarray(0, rig.size))).toBe(true)
    for (const [offset, length] of [
      [0, rig.size],
      [0, 0],
      [rig.size, 0],
      [rig.size - 1, 1],
      [0, 1],
      [stripeSize - 1, 2],
      [stripeSize + 100, 3 * stripeSize],
      [11 * stripeSize + 5, 5 * stripeSize],
      [12 * stripeSize + 1, stripeSize - 2],
      [20 * stripeSize + 9, rig.size - 20 * stripeSize - 9],
    ] as const) {
      const got = await read(rig, offset, length)
      expect(got.equals(model.subarray(offset, offset + length)), `${length} bytes at ${offset}`).toBe(true)
    }
    const ranges = Array.from({ length: 100 }, (_, index) => {
      const offset = (index * 7919) % rig.size
      return { offset, length: Math.min(rig.size - offset, 1 + ((index * 104_729) % (6 * stripeSize))) }
    })
    await Promise.all(
      ranges.map(async ({ offset, length }) => {
        expect((await read(rig, offset, length)).equals(model.subarray(offset, offset + length))).toBe(true)
      }),
    )
    expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({ reads: 1, upcalls: 0 })
  })

  it('reads slots that follow each other in one go', async () => {
    for (const members of [1, 3]) {
      const rig = await Rig.open(implementation, { members, stripes: 64 })
      rig.formatAll()
      for (let stripe = 0; stripe < 64; stripe++) {
        rig.putSlotBytes(stripe + 1, pattern(rig.stripeSize, stripe))
      }
      const got = await read(rig, 0, rig.size)
      for (let stripe = 0; stripe < 64; stripe++) {
        const part = got.subarray(stripe * rig.stripeSize, (stripe + 1) * rig.stripeSize)
        expect(part.equals(pattern(rig.stripeSize, stripe)), `stripe ${stripe}`).toBe(true)
      }
      expect(rig.memberTotals().readBytes).toBe(rig.size)
      // node:fs has vectored reads of one target only: the portable one reads chunk by chunk there.
      const calls = members === 1 || implementation.kind === 'native' ? members : 64 * members
      expect(rig.memberTotals().reads).toBe(calls)
      await rig.close()
    }
  })

  it('reads zeros behind the end of a member file', async () => {
    for (const members of [1, 2]) {
      const rig = await Rig.open(implementation, { members, stripes: 8, fill: 9 })
      rig.formatAll()
      rig.putSlotBytes(1, pattern(rig.stripeSize, 1))
      rig.putSlotBytes(2, pattern(100, 2))
      const expected = Buffer.alloc(rig.size)
      pattern(rig.stripeSize, 1).copy(expected)
      pattern(100, 2).copy(expected, rig.stripeSize)
      expect((await read(rig, 0, rig.size)).equals(expected)).toBe(true)
      await rig.close()
    }
  })

  it('asserts that the range lies in the volume, as it is now', async () => {
    const rig = await Rig.open(implementation, { stripes: 8, fill: 4 })
    const { datapath, exportId } = rig
    await expect(datapath.readRange(exportId, rig.size - 9, Buffer.alloc(10))).rejects.toThrow(
      /within the volume/,
    )
    await expect(datapath.readRange(exportId, -1, Buffer.alloc(10))).rejects.toThrow(/within the volume/)
    const before = rig.size
    const grown = rig.tablesOfSize(before + 4096)
    const retabled = datapath.retable(exportId, grown.tables)
    rig.use(grown)
    expect((await read(rig, before - 9, 1000)).equals(Buffer.alloc(1000, 4))).toBe(true)
    await retabled
    const shrunk = rig.tablesOfSize(4096)
    await datapath.retable(exportId, shrunk.tables)
    rig.use(shrunk)
    await expect(datapath.readRange(exportId, 4096, Buffer.alloc(1))).rejects.toThrow(/within the volume/)
  })

  it('fails with the member that fails, and reads around it', async () => {
    const openMember = (path: string): number => {
      if (!path.endsWith('member-1')) return openSync(path, 'w+')
      return openSync(path, 'w')
    }
    const rig = await Rig.open(implementation, { members: 2, stripes: 16, openMember })
    const { datapath, exportId } = rig
    rig.putSlotBytes(2, pattern(4096, 1)) // chunk 0 of slot 2 is on member 0
    for (const stripe of [2, 3, 4]) rig.setStripe(stripe, stripe, true)
    for (const length of [5000, 3 * rig.stripeSize]) {
      await expect(
        datapath.readRange(exportId, 2 * rig.stripeSize, Buffer.alloc(length)),
      ).rejects.toMatchObject({
        name: 'StoreError',
        code: 'MEMBER_IO',
        message: expect.stringMatching(/member 1.*offset 1[0-9]+/),
      })
    }
    const got = await read(rig, 2 * rig.stripeSize - 100, 4196)
    expect(got.equals(Buffer.concat([Buffer.alloc(100), pattern(4096, 1)]))).toBe(true)
    await within(datapath.barrier(), 'a barrier after failures')
  })

  it('is waited for by a barrier that comes after it', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: 32 })
    rig.formatAll()
    for (let stripe = 0; stripe < 32; stripe++) rig.putSlotBytes(stripe + 1, pattern(2 ** 20, stripe))
    for (let round = 0; round < 5; round++) {
      let left = 32
      const reads = Array.from({ length: 32 }, async (_, index) => {
        await rig.datapath.readRange(rig.exportId, index * 2 ** 20, Buffer.allocUnsafe(2 ** 20))
        left--
      })
      await within(rig.datapath.barrier(), 'a barrier')
      await turn()
      expect(left).toBe(0)
      await Promise.all(reads)
    }
  })

  it('sees no slot that was given up before a barrier', async () => {
    const size = 65_536
    const rig = await Rig.open(implementation, { chunkSize: size, stripes: 40 })
    const content = pattern(size, 1)
    const slotOf = (stripe: number, round: number): number => 1 + stripe + 40 * (round % 2)
    for (let stripe = 0; stripe < 40; stripe++) {
      rig.putSlotBytes(slotOf(stripe, 0), content)
      rig.putSlotBytes(slotOf(stripe, 1), Buffer.alloc(size, 0xdd))
      rig.setStripe(stripe, slotOf(stripe, 0), false)
    }
    const all = Buffer.concat(Array.from({ length: 40 }, () => content))
    let stop = false
    let reads = 0
    const readers = Array.from({ length: 4 }, async (_, index) => {
      while (!stop) {
        const offset = index * 100_000 + (reads % 7) * 512
        const target = Buffer.allocUnsafe(2 ** 20)
        await rig.datapath.readRange(rig.exportId, offset, target)
        reads++
        expect(target.equals(all.subarray(offset, offset + 2 ** 20))).toBe(true)
      }
    })
    const running = Promise.all(readers)
    const mover = async (): Promise<void> => {
      for (let round = 1; round <= 20; round++) {
        const before = reads
        await until(() => reads > before + 4, 'reads under way')
        for (let stripe = 0; stripe < 40; stripe++) {
          rig.putSlotBytes(slotOf(stripe, round), content)
          Atomics.store(rig.tables.slots, stripe, slotOf(stripe, round))
        }
        await within(rig.datapath.barrier(), 'a barrier')
        for (let stripe = 0; stripe < 40; stripe++) {
          rig.putSlotBytes(slotOf(stripe, round + 1), Buffer.alloc(size, 0xdd))
        }
      }
      stop = true
    }
    await Promise.race([mover(), running])
    await running
  })

  it.each(['closeExport', 'close'] as const)('%s waits for it', async (how) => {
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: 64 })
    rig.formatAll()
    for (let stripe = 0; stripe < 64; stripe++) rig.putSlotBytes(stripe + 1, pattern(2 ** 20, stripe))
    let left = 64
    const reads = Array.from({ length: 64 }, async (_, index) => {
      const target = Buffer.allocUnsafe(2 ** 20)
      await rig.datapath.readRange(rig.exportId, index * 2 ** 20, target)
      expect(target.equals(pattern(2 ** 20, index))).toBe(true)
      left--
    })
    await within(how === 'close' ? rig.datapath.close() : rig.datapath.closeExport(rig.exportId), how)
    await turn()
    expect(left).toBe(0)
    await Promise.all(reads)
  })

  it('does not keep an export from being closed, once nobody is left to answer', async () => {
    const rig = await Rig.open(implementation)
    rig.formatAll()
    rig.policy.hold()
    const client = await rig.connect('structured')
    const reply = client.request({ command: CMD.TRIM, offset: 0, length: 512 })
    const upcall = await rig.policy.next('trim')
    let reads = 0
    const reader = async (): Promise<never> => {
      for (;;) {
        await rig.datapath.readRange(rig.exportId, 0, Buffer.allocUnsafe(4 * 4096))
        reads++
      }
    }
    const readers = Promise.allSettled([reader(), reader(), reader()])
    const closed = rig.datapath.closeExport(rig.exportId)
    const before = reads
    await until(() => reads > before + 20, 'reads while the export is being closed')
    expect(await isPending(closed)).toBe(true)
    rig.datapath.complete(upcall.id, 0)
    expect((await reply).errno).toBe(0)
    await within(closed, 'closeExport')
    await turn()
    const last = reads
    for (const ended of await within(readers, 'the ends of the readers')) {
      expect(ended).toMatchObject({ status: 'rejected', reason: { code: 'SHUTTING_DOWN' } })
    }
    expect(reads).toBe(last)
  })
})
