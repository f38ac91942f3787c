import { afterEach, describe, expect, it } from 'vitest'
import type { Upcall } from '../../src/datapath/datapath.ts'
import { closeRigs, pattern, Rig, type RigClient } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { CMD, type WireReply } from '../support/wire-client.ts'

const shapes = [
  { members: 1, chunkSize: 4096, formatUnit: 1 },
  { members: 1, chunkSize: 4096, formatUnit: 4 },
  { members: 2, chunkSize: 8192, formatUnit: 1 },
  { members: 3, chunkSize: 4096, formatUnit: 3 },
]

describe.each(implementations)('formatting: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(shapes)('k=$members, chunk $chunkSize, format unit $formatUnit', (shape) => {
    async function start(fill: number): Promise<{ rig: Rig; client: RigClient; unitSize: number }> {
      const rig = await Rig.open(implementation, { ...shape, fill, stripes: 4 * shape.formatUnit })
      rig.policy.hold()
      const client = await rig.connect('structured')
      return { rig, client, unitSize: rig.stripeSize * shape.formatUnit }
    }

    const slotsFor = (first: number, step = 1): number[] =>
      Array.from({ length: shape.formatUnit }, (_, index) => first + index * step)

    function unitBytes(rig: Rig, slots: readonly number[]): Buffer {
      return Buffer.concat(slots.map((slot) => rig.slotBytes(slot)))
    }

    it('writes fill, request and nothing else, in one full-stripe write', async () => {
      const { rig, client, unitSize } = await start(0x5a)
      const payload = pattern(777, 3)
      const reply = client.request({ command: CMD.WRITE, offset: unitSize + 1234, payload })
      const upcall = await rig.policy.next('write')
      const slots = slotsFor(9, -1)
      for (const slot of slots) rig.putSlotBytes(slot, pattern(rig.stripeSize, 66)) // what the disk held before
      await rig.datapath.formatUnit({
        export: rig.exportId,
        stripe: shape.formatUnit,
        slots,
        overlays: [upcall.id],
      })
      const expected = Buffer.alloc(unitSize, 0x5a)
      payload.copy(expected, 1234)
      expect(unitBytes(rig, slots).equals(expected)).toBe(true)
      expect(rig.memberTotals()).toMatchObject({ reads: 0, writeBytes: unitSize })
      expect(rig.datapath.exportCounters(rig.exportId).fullStripeWrites).toBe(shape.formatUnit)
      rig.datapath.complete(upcall.id, 0)
      expect((await reply).errno).toBe(0)
    })

    it('lays overlays in their order over what lies under, each clipped to the unit', async () => {
      const { rig, client, unitSize } = await start(0x11)
      const base = slotsFor(20)
      const absent = 0 // of several stripes, one may have nothing under it
      for (const slot of base) rig.putSlotBytes(slot, pattern(rig.stripeSize, slot))
      const replies: Promise<WireReply>[] = []
      const upcalls: Upcall[] = []
      const ask = async (request: { command: number; offset: number; length?: number; payload?: Buffer }) => {
        replies.push(client.request(request))
        upcalls.push(await rig.policy.next())
      }
      const from = unitSize // the unit is number 1
      await ask({ command: CMD.WRITE, offset: from - 100, payload: pattern(500, 1) }) // begins before it
      await ask({ command: CMD.TRIM, offset: from + 200, length: 100 })
      await ask({ command: CMD.WRITE, offset: from + 250, payload: pattern(20, 2) })
      await ask({ command: CMD.ZERO, offset: from + unitSize - 50, length: 500 }) // ends behind it
      await ask({ command: CMD.WRITE, offset: from + unitSize - 10, payload: pattern(3000, 3) })
      const expected = Buffer.concat(
        base.map((slot, index) =>
          index === 1 && shape.formatUnit > 1
            ? Buffer.alloc(rig.stripeSize, 0x11)
            : pattern(rig.stripeSize, slot),
        ),
      )
      pattern(500, 1).copy(expected, 0, 100)
      expected.fill(0, 200, 300)
      pattern(20, 2).copy(expected, 250)
      expected.fill(0, unitSize - 50)
      pattern(3000, 3).copy(expected, unitSize - 10, 0, 10)
      const slots = slotsFor(40, 2)
      await rig.datapath.formatUnit({
        export: rig.exportId,
        stripe: shape.formatUnit,
        slots,
        baseSlots: base.map((slot, index) => (index === 1 ? absent : slot)),
        overlays: upcalls.map(({ id }) => id),
      })
      expect(unitBytes(rig, slots).equals(expected)).toBe(true)
      // Not in their order, the result is another one.
      const other = slotsFor(70)
      await rig.datapath.formatUnit({
        export: rig.exportId,
        stripe: shape.formatUnit,
        slots: other,
        baseSlots: base,
        overlays: upcalls.map(({ id }) => id).reverse(),
      })
      expect(unitBytes(rig, other).equals(expected)).toBe(false)
      for (const { id } of upcalls) rig.datapath.complete(id, 0)
      for (const reply of replies) expect((await reply).errno).toBe(0)
    })

    it('reads nothing under a request that covers everything', async () => {
      const { rig, client, unitSize } = await start(0)
      const payload = pattern(3 * unitSize, 8)
      const reply = client.request({ command: CMD.WRITE, offset: 0, payload })
      const upcall = await rig.policy.next('write')
      for (const unit of [0, 1, 2]) {
        await rig.datapath.formatUnit({
          export: rig.exportId,
          stripe: unit * shape.formatUnit,
          slots: slotsFor(10 + unit * 10),
          baseSlots: slotsFor(90),
          overlays: [upcall.id],
        })
        const got = unitBytes(rig, slotsFor(10 + unit * 10))
        expect(got.equals(payload.subarray(unit * unitSize, (unit + 1) * unitSize))).toBe(true)
      }
      expect(rig.memberTotals()).toMatchObject({ reads: 0, writeBytes: 3 * unitSize })
      rig.datapath.complete(upcall.id, 0)
      expect((await reply).errno).toBe(0)
    })

    it('fills a unit from many small requests, as a sequential fill brings them', async () => {
      const { rig, client, unitSize } = await start(0x33)
      const all = pattern(unitSize, 4)
      const replies: Promise<WireReply>[] = []
      const ids: number[] = []
      for (let at = 0; at < unitSize; at += 1024) {
        replies.push(client.request({ command: CMD.WRITE, offset: at, payload: all.subarray(at, at + 1024) }))
        ids.push((await rig.policy.next('write')).id)
      }
      const slots = slotsFor(10)
      await rig.datapath.formatUnit({ export: rig.exportId, stripe: 0, slots, overlays: ids })
      expect(unitBytes(rig, slots).equals(all)).toBe(true)
      expect(rig.memberTotals()).toMatchObject({ reads: 0, writeBytes: unitSize })
      for (const id of ids) rig.datapath.complete(id, 0)
      for (const reply of replies) expect((await reply).errno).toBe(0)
    })

    it('copies what lies under without any request (a background copy, a format job)', async () => {
      const { rig, unitSize } = await start(0x21)
      for (const slot of slotsFor(10)) rig.putSlotBytes(slot, pattern(rig.stripeSize, slot))
      const { exportId, datapath } = rig
      await datapath.formatUnit({
        export: exportId,
        stripe: 0,
        slots: slotsFor(30),
        baseSlots: slotsFor(10),
        overlays: [],
      })
      expect(unitBytes(rig, slotsFor(30)).equals(unitBytes(rig, slotsFor(10)))).toBe(true)
      await datapath.formatUnit({ export: exportId, stripe: 0, slots: slotsFor(50), overlays: [] })
      expect(unitBytes(rig, slotsFor(50)).equals(Buffer.alloc(unitSize, 0x21))).toBe(true)
    })

    it('writes the part of a request that lies in a stripe, in place', async () => {
      const { rig, client } = await start(0)
      const { stripeSize, datapath } = rig
      for (const slot of [5, 6, 7]) rig.putSlotBytes(slot, pattern(stripeSize, slot))
      const payload = pattern(2 * stripeSize, 9)
      const replies = [client.request({ command: CMD.WRITE, offset: 100, payload })]
      const write = await rig.policy.next('write')
      await datapath.writePart(write.id, 0, 5)
      await datapath.writePart(write.id, 1, 6)
      await datapath.writePart(write.id, 2, 7)
      expect(
        rig
          .slotBytes(5)
          .equals(
            Buffer.concat([pattern(stripeSize, 5).subarray(0, 100), payload.subarray(0, stripeSize - 100)]),
          ),
      ).toBe(true)
      expect(rig.slotBytes(6).equals(payload.subarray(stripeSize - 100, 2 * stripeSize - 100))).toBe(true)
      expect(
        rig
          .slotBytes(7)
          .equals(
            Buffer.concat([payload.subarray(2 * stripeSize - 100), pattern(stripeSize, 7).subarray(100)]),
          ),
      ).toBe(true)
      replies.push(client.request({ command: CMD.ZERO, offset: stripeSize + 10, length: 20 }))
      const zero = await rig.policy.next('zero')
      await datapath.writePart(zero.id, 1, 6)
      replies.push(client.request({ command: CMD.TRIM, offset: 0, length: 50 }))
      const trim = await rig.policy.next('trim')
      await datapath.writePart(trim.id, 0, 5)
      const six = payload.subarray(stripeSize - 100, 2 * stripeSize - 100)
      six.fill(0, 10, 30)
      expect(rig.slotBytes(6).equals(six)).toBe(true)
      expect(rig.slotBytes(5, 0, 50).equals(Buffer.alloc(50))).toBe(true)
      expect(rig.slotBytes(5, 50, 50).equals(pattern(stripeSize, 5).subarray(50, 100))).toBe(true)
      for (const { id } of [write, zero, trim]) datapath.complete(id, 0)
      for (const reply of replies) expect((await reply).errno).toBe(0)
      expect(datapath.exportCounters(rig.exportId).fullStripeWrites).toBe(0)
    })

    it('reads and writes slots for the policy, any range of them', async () => {
      const { rig } = await start(0)
      const { stripeSize, datapath } = rig
      const image = pattern(stripeSize, 1)
      await datapath.writeSlot(3, 0, image)
      expect(rig.slotBytes(3).equals(image)).toBe(true)
      const part = pattern(stripeSize - 700, 2)
      await datapath.writeSlot(3, 300, part)
      part.copy(image, 300)
      expect(rig.slotBytes(3).equals(image)).toBe(true)
      const target = Buffer.alloc(stripeSize - 99, 0xff)
      await datapath.readSlot(3, 99, target)
      expect(target.equals(image.subarray(99))).toBe(true)
      const beyond = Buffer.alloc(stripeSize, 0xff)
      await datapath.readSlot(5000, 0, beyond)
      expect(beyond.equals(Buffer.alloc(stripeSize))).toBe(true)
    })
  })

  it('stores fill behind the end of a volume that cuts its last stripe short', async () => {
    const rig = await Rig.open(implementation, { stripes: 3, size: 2 * 4096 + 512, fill: 0x42 })
    rig.policy.hold()
    const client = await rig.connect('structured')
    const reply = client.request({ command: CMD.WRITE, offset: 2 * 4096, payload: pattern(512) })
    const upcall = await rig.policy.next('write')
    rig.putSlotBytes(4, pattern(4096, 99))
    await rig.datapath.formatUnit({ export: rig.exportId, stripe: 2, slots: [4], overlays: [upcall.id] })
    expect(rig.slotBytes(4).equals(Buffer.concat([pattern(512), Buffer.alloc(4096 - 512, 0x42)]))).toBe(true)
    rig.datapath.complete(upcall.id, 0)
    expect((await reply).errno).toBe(0)
  })

  it('formats the last unit of a volume that has fewer stripes than the others', async () => {
    const rig = await Rig.open(implementation, { stripes: 6, formatUnit: 4, fill: 7 })
    rig.policy.hold()
    const client = await rig.connect('structured')
    const reply = client.request({ command: CMD.WRITE, offset: 5 * 4096, payload: pattern(4096) })
    const upcall = await rig.policy.next('write')
    await rig.datapath.formatUnit({ export: rig.exportId, stripe: 4, slots: [8, 9], overlays: [upcall.id] })
    expect(rig.slotBytes(8).equals(Buffer.alloc(4096, 7))).toBe(true)
    expect(rig.slotBytes(9).equals(pattern(4096))).toBe(true)
    expect(rig.slotBytes(10).equals(Buffer.alloc(4096))).toBe(true)
    rig.datapath.complete(upcall.id, 0)
    expect((await reply).errno).toBe(0)
  })

  it('a format of many mebibytes, with others at the same time', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: 16, formatUnit: 8 })
    rig.policy.hold()
    const client = await rig.connect('structured')
    const payload = pattern(9 * 2 ** 20, 5)
    const reply = client.request({ command: CMD.WRITE, offset: 2 ** 19, payload })
    const upcall = await rig.policy.next('write')
    await Promise.all(
      [0, 1].map((unit) => {
        const slots = Array.from({ length: 8 }, (_, index) => 3 + unit * 8 + index)
        return rig.datapath.formatUnit({
          export: rig.exportId,
          stripe: unit * 8,
          slots,
          overlays: [upcall.id],
        })
      }),
    )
    for (let stripe = 0; stripe < 16; stripe++) rig.setStripe(stripe, 3 + stripe, false)
    rig.datapath.complete(upcall.id, 0)
    expect((await reply).errno).toBe(0)
    const expected = Buffer.alloc(rig.size)
    payload.copy(expected, 2 ** 19)
    expect((await client.read(0, rig.size)).equals(expected)).toBe(true)
  })

  it('makes completed writes durable on every member, however many ask at once', async () => {
    const rig = await Rig.open(implementation, { members: 3 })
    await rig.datapath.writeSlot(1, 0, pattern(rig.stripeSize))
    await rig.datapath.sync()
    const once = rig.datapath.memberCounters().map(({ syncs }) => syncs)
    expect(once).toEqual([1, 1, 1])
    const first = rig.datapath.sync()
    // Those that come while one runs share the next one: theirs may have written after the first had begun.
    const later = Array.from({ length: 20 }, () => rig.datapath.sync())
    await Promise.all([first, ...later])
    for (const { syncs } of rig.datapath.memberCounters()) {
      expect(syncs).toBeGreaterThanOrEqual(1 + 2)
      expect(syncs).toBeLessThanOrEqual(1 + 21)
    }
  })

  it('punches, or says that it cannot', async () => {
    const rig = await Rig.open(implementation, { members: 2 })
    for (const slot of [1, 2, 3, 4]) rig.putSlotBytes(slot, pattern(rig.stripeSize, slot))
    const punched = await rig.datapath.punch(2, 2)
    for (const slot of [2, 3]) {
      const want = punched ? Buffer.alloc(rig.stripeSize) : pattern(rig.stripeSize, slot)
      expect(rig.slotBytes(slot).equals(want)).toBe(true)
    }
    for (const slot of [1, 4]) expect(rig.slotBytes(slot).equals(pattern(rig.stripeSize, slot))).toBe(true)
    if (implementation.kind === 'portable') expect(punched).toBe(false)
  })
})
