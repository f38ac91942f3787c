import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { afterEach, describe, expect, it } from 'vitest'
import type { AdoptedRequest, Upcall } from '../../src/datapath/datapath.ts'
import { closeRigs, pattern, Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { isPending, until, within } from '../support/poll.ts'
import { CMD } from '../support/wire-client.ts'

const shapes = [
  { members: 1, chunkSize: 4096, formatUnit: 1 },
  { members: 3, chunkSize: 4096, formatUnit: 2 },
]

/** An adopted request as the policy sees it. */
function adopted(rig: Rig, request: AdoptedRequest): Upcall {
  const { kind, offset, length } = request
  return { id: rig.datapath.adopt(rig.exportId, request), kind, flags: 0, offset, length, contexts: [] }
}

function write(offset: number, payload: Buffer): AdoptedRequest {
  return { kind: 'write', offset, length: payload.length, payload }
}

describe.each(implementations)('adopted requests: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(shapes)('k=$members, format unit $formatUnit', (shape) => {
    it('are overlays of a full-stripe write, beside those of clients and in their order', async () => {
      const rig = await Rig.open(implementation, { ...shape, fill: 0x5a, stripes: 8 })
      rig.policy.hold()
      const unitSize = rig.stripeSize * shape.formatUnit
      const client = await rig.connect('structured')
      const reply = client.request({ command: CMD.WRITE, offset: unitSize + 700, payload: pattern(900, 2) })
      const theirs = await rig.policy.next('write')
      const first = adopted(rig, write(unitSize - 100, pattern(1000, 1)))
      const zero = adopted(rig, { kind: 'zero', offset: unitSize + 1500, length: 200 })
      const last = adopted(rig, write(unitSize + 1600, pattern(unitSize, 3)))
      const slots = Array.from({ length: shape.formatUnit }, (_, index) => 10 - index)
      await rig.datapath.formatUnit({
        export: rig.exportId,
        stripe: shape.formatUnit,
        slots,
        overlays: [first.id, theirs.id, zero.id, last.id],
      })
      const expected = Buffer.alloc(unitSize, 0x5a)
      pattern(1000, 1).copy(expected, 0, 100)
      pattern(900, 2).copy(expected, 700)
      expected.fill(0, 1500, 1700)
      pattern(unitSize, 3).copy(expected, 1600)
      expect(Buffer.concat(slots.map((slot) => rig.slotBytes(slot))).equals(expected)).toBe(true)
      for (const { id } of [last, zero, first, theirs]) rig.datapath.complete(id, 0)
      expect((await reply).errno).toBe(0)
      expect(client.outstanding).toBe(0)
    })

    it('are written in parts, each to its slot', async () => {
      const rig = await Rig.open(implementation, { ...shape, stripes: 8 })
      const before = pattern(rig.stripeSize, 9)
      for (const slot of [3, 4, 5]) rig.putSlotBytes(slot, before)
      const payload = pattern(2 * rig.stripeSize, 4)
      const { id } = adopted(rig, write(2 * rig.stripeSize + 512, payload))
      await Promise.all([
        rig.datapath.writePart(id, 2, 4),
        rig.datapath.writePart(id, 3, 3),
        rig.datapath.writePart(id, 4, 5),
      ])
      await expect(rig.datapath.writePart(id, 5, 6)).rejects.toThrow(/does not touch/)
      rig.datapath.complete(id, 0)
      const parts = [rig.slotBytes(4), rig.slotBytes(3), rig.slotBytes(5)]
      const head = before.subarray(0, 512)
      expect(Buffer.concat(parts).equals(Buffer.concat([head, payload, before.subarray(512)]))).toBe(true)
      const trim = adopted(rig, { kind: 'trim', offset: 2 * rig.stripeSize + 100, length: 50 })
      await rig.datapath.writePart(trim.id, 2, 4)
      rig.datapath.complete(trim.id, 0)
      expect(rig.slotBytes(4, 100, 50).equals(Buffer.alloc(50))).toBe(true)
      expect(rig.slotBytes(4, 150, 100).equals(before.subarray(150, 250))).toBe(true)
    })

    it('run through a policy like those of clients, who read the result', async () => {
      const rig = await Rig.open(implementation, { ...shape, fill: 7, stripes: 12 })
      const client = await rig.connect('structured')
      const expected = Buffer.alloc(rig.size, 7)
      await client.write(rig.stripeSize, pattern(2000, 50))
      pattern(2000, 50).copy(expected, rig.stripeSize)
      const requests = Array.from({ length: 20 }, (_, index) => {
        const payload = pattern(1 + ((index * 3989) % (2 * rig.stripeSize)), index)
        return write((index * 7919) % (rig.size - payload.length), payload)
      })
      for (const request of requests) {
        await rig.policy.decide(adopted(rig, request))
        request.payload?.copy(expected, request.offset)
      }
      expect((await client.read(0, rig.size)).equals(expected)).toBe(true)
    })
  })

  it('are told to no handler and counted nowhere', async () => {
    const rig = await Rig.open(implementation)
    rig.formatAll()
    const { id } = adopted(rig, write(0, pattern(4096)))
    await rig.datapath.writePart(id, 0, 1)
    rig.datapath.complete(id, 5) // an error, too, is told to nobody
    await new Promise((resolve) => setImmediate(resolve))
    expect(rig.policy.seen).toEqual([])
    expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({ writes: 0, upcalls: 0, errors: 0 })
    expect(rig.memberTotals()).toMatchObject({ writes: 1, writeBytes: 4096 })
  })

  it('have ids of their own until they are completed, once', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const client = await rig.connect('structured')
    const replies = Array.from({ length: 10 }, () => client.request({ command: CMD.FLUSH }))
    await until(() => rig.policy.held.length === 10, 'upcalls of the client')
    const mine = Array.from({ length: 10 }, (_, index) => adopted(rig, write(0, pattern(512, index))))
    expect(new Set([...mine, ...rig.policy.held].map(({ id }) => id)).size).toBe(20)
    for (const { id } of mine) rig.datapath.complete(id, 0)
    // Places of the completed ones are used again, by clients and by us, while their ids are not.
    const trims = Array.from({ length: 10 }, () => {
      return client.request({ command: CMD.TRIM, offset: 0, length: 512 })
    })
    await until(() => rig.policy.held.length === 20, 'more of them')
    const more = Array.from({ length: 10 }, (_, index) => adopted(rig, write(0, pattern(512, 100 + index))))
    for (const { id } of mine) {
      expect(() => rig.datapath.complete(id, 0)).toThrow(/not outstanding/)
      expect(() => rig.datapath.readPayload(id, 0, Buffer.alloc(1))).toThrow(/not outstanding/)
      await expect(rig.datapath.writePart(id, 0, 1)).rejects.toThrow(/not outstanding/)
    }
    for (const [index, { id }] of more.entries()) {
      const got = Buffer.alloc(512)
      rig.datapath.readPayload(id, 0, got)
      expect(got.equals(pattern(512, 100 + index))).toBe(true)
      rig.datapath.complete(id, 0)
    }
    rig.policy.letGo()
    for (const reply of [...replies, ...trims]) expect((await reply).errno).toBe(0)
  })

  it('cannot be completed while a command uses them', async () => {
    const rig = await Rig.open(implementation)
    const { id } = adopted(rig, write(0, pattern(4096)))
    const formatted = rig.datapath.formatUnit({
      export: rig.exportId,
      stripe: 0,
      slots: [1],
      overlays: [id],
    })
    expect(() => rig.datapath.complete(id, 0)).toThrow(/while its payload is being written/)
    await formatted
    rig.datapath.complete(id, 0)
    expect(rig.slotBytes(1).equals(pattern(4096))).toBe(true)
  })

  it('keep their payload although nobody else does', async () => {
    setFlagsFromString('--expose-gc')
    const collect = runInNewContext('gc') as () => void
    const size = 2 ** 20
    const rig = await Rig.open(implementation, { chunkSize: size, stripes: 8 })
    const mine = Array.from({ length: 8 }, (_, index) => {
      return adopted(rig, write(index * size, Buffer.from(pattern(size, index))))
    })
    for (let turn = 0; turn < 3; turn++) {
      collect()
      await new Promise((resolve) => setImmediate(resolve))
    }
    const others = mine.map(() => Buffer.alloc(size, 0xdd)) // where those payloads were
    for (const [index, { id }] of mine.entries()) {
      await rig.datapath.writePart(id, index, 1 + index)
      rig.datapath.complete(id, 0)
      expect(rig.slotBytes(1 + index).equals(pattern(size, index))).toBe(true)
    }
    expect(others.length).toBe(8)
  })

  it('must lie in the volume and have a payload exactly where they are writes', async () => {
    const rig = await Rig.open(implementation, { stripes: 4 })
    const refused: AdoptedRequest[] = [
      { kind: 'write', offset: 0, length: 10 },
      { kind: 'write', offset: 0, length: 10, payload: Buffer.alloc(9) },
      { kind: 'trim', offset: 0, length: 10, payload: Buffer.alloc(10) },
      { kind: 'zero', offset: rig.size - 9, length: 10 },
      { kind: 'zero', offset: 0, length: 0 },
      write(rig.size, Buffer.alloc(1)),
    ]
    for (const request of refused) expect(() => adopted(rig, request)).toThrow()
    const grown = rig.tablesOfSize(rig.size + 4096)
    const end = rig.size
    await rig.datapath.retable(rig.exportId, grown.tables)
    rig.use(grown)
    const { id } = adopted(rig, write(end, pattern(4096)))
    await rig.datapath.writePart(id, 4, 9)
    rig.datapath.complete(id, 0)
    expect(rig.slotBytes(9).equals(pattern(4096))).toBe(true)
  })

  it.each(['closeExport', 'close'] as const)('%s waits until they are completed', async (how) => {
    const rig = await Rig.open(implementation)
    rig.formatAll()
    const client = await rig.connect('structured')
    const payload = pattern(4096, 6)
    const one = adopted(rig, write(4096, payload))
    const two = adopted(rig, { kind: 'trim', offset: 0, length: 512 })
    const closed = how === 'close' ? rig.datapath.close() : rig.datapath.closeExport(rig.exportId)
    await until(() => client.ends.length === 1, 'the end of the session')
    expect(() => rig.datapath.adopt(rig.exportId, write(0, payload))).toThrow(
      expect.objectContaining({ code: 'SHUTTING_DOWN' }),
    )
    await rig.datapath.writePart(one.id, 1, 2)
    rig.datapath.complete(one.id, 0)
    expect(await isPending(closed)).toBe(true)
    const got = Buffer.alloc(4096)
    await rig.datapath.readRange(rig.exportId, 4096, got) // their policy may need it
    expect(got.equals(payload)).toBe(true)
    expect(await isPending(closed)).toBe(true)
    rig.datapath.complete(two.id, 0)
    await within(closed, how)
    await expect(rig.datapath.readRange(rig.exportId, 0, got)).rejects.toMatchObject({
      code: 'SHUTTING_DOWN',
    })
  })
})

describe.each(implementations)('readPayload: $name', (implementation) => {
  afterEach(closeRigs)

  it.each([1, 512, 5000, 70_000, 3_000_000])(
    'copies from a write of %i bytes, however it arrives',
    async (length) => {
      const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 64 })
      rig.policy.hold()
      const offset = 66_000
      for (const mode of ['simple', 'extended'] as const) {
        const client = await rig.connect(mode)
        const payload = pattern(length, length)
        const { bytes, reply } = client.prepare({ command: CMD.WRITE, offset, payload })
        for (let at = 0; at < bytes.length; ) {
          const part = 1 + ((at * 7919) % 60_000)
          client.socket.write(bytes.subarray(at, at + part))
          at += part
          await new Promise((resolve) => setImmediate(resolve))
        }
        const upcall = await rig.policy.next('write')
        expect(upcall).toMatchObject({ offset, length })
        for (const [from, size] of [
          [0, length],
          [0, 1],
          [length - 1, 1],
          [Math.floor(length / 3), Math.ceil(length / 2)],
          [length, 0],
        ] as const) {
          const target = Buffer.alloc(size + 2, 0xee)
          rig.datapath.readPayload(upcall.id, from, target.subarray(1, 1 + size))
          const edge = Buffer.from([0xee])
          expect(target.equals(Buffer.concat([edge, payload.subarray(from, from + size), edge]))).toBe(true)
        }
        expect(() => rig.datapath.readPayload(upcall.id, length, Buffer.alloc(1))).toThrow()
        expect(() => rig.datapath.readPayload(upcall.id, -1, Buffer.alloc(1))).toThrow()
        rig.datapath.complete(upcall.id, 0)
        expect((await reply).errno).toBe(0)
      }
    },
  )

  it('counts from the upcall, where the beginning of the request went in place', async () => {
    const stripe = 65_536
    const rig = await Rig.open(implementation, { chunkSize: stripe, stripes: 32 })
    rig.formatAll()
    rig.direct.clearRange(16, 32)
    rig.policy.hold()
    const client = await rig.connect('structured')
    const payload = pattern(20 * stripe, 3)
    const { bytes, reply } = client.prepare({ command: CMD.WRITE, offset: 4 * stripe, payload })
    client.socket.write(bytes.subarray(0, 8 * stripe))
    await new Promise((resolve) => setImmediate(resolve))
    client.socket.write(bytes.subarray(8 * stripe))
    const upcall = await rig.policy.next('write')
    expect(upcall.offset + upcall.length).toBe(24 * stripe)
    const got = Buffer.alloc(upcall.length)
    rig.datapath.readPayload(upcall.id, 0, got)
    expect(got.equals(payload.subarray(upcall.offset - 4 * stripe))).toBe(true)
    rig.datapath.complete(upcall.id, 0)
    expect((await reply).errno).toBe(0)
  })

  it('copies from what was adopted, and only writes have something to copy', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const payload = pattern(5000, 1)
    const { id } = adopted(rig, write(300, payload))
    const got = Buffer.alloc(600)
    rig.datapath.readPayload(id, 4400, got)
    expect(got.equals(payload.subarray(4400))).toBe(true)
    expect(() => rig.datapath.readPayload(id, 4401, got)).toThrow()
    rig.datapath.complete(id, 0)
    const zero = adopted(rig, { kind: 'zero', offset: 0, length: 5000 })
    expect(() => rig.datapath.readPayload(zero.id, 0, got)).toThrow(/only a write/)
    rig.datapath.complete(zero.id, 0)
    const client = await rig.connect('structured')
    const flushed = client.request({ command: CMD.FLUSH })
    const flush = await rig.policy.next('sync')
    expect(() => rig.datapath.readPayload(flush.id, 0, Buffer.alloc(0))).toThrow(/only a write/)
    rig.datapath.complete(flush.id, 0)
    expect((await flushed).errno).toBe(0)
  })
})
