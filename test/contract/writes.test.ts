import { closeSync, openSync } from 'node:fs'
import { afterEach, describe, expect, it } from 'vitest'
import type { ReplyMode } from '../../src/datapath/datapath.ts'
import { closeRigs, pattern, Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { until } from '../support/poll.ts'
import { CMD, FLAG } from '../support/wire-client.ts'

const modes: readonly ReplyMode[] = ['simple', 'structured', 'extended']

describe.each(implementations)('writes: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(modes)('%s replies', (mode) => {
    it.each([
      { members: 1, chunkSize: 4096 },
      { members: 2, chunkSize: 4096 },
      { members: 3, chunkSize: 8192 },
    ])('go in place where all direct bits are 1: $members members, chunk $chunkSize', async (shape) => {
      const rig = await Rig.open(implementation, { ...shape, stripes: 16 })
      const content: Buffer[] = []
      for (let stripe = 0; stripe < 16; stripe++) {
        const slot = 1 + ((stripe * 5) % 16)
        content[stripe] = pattern(rig.stripeSize, stripe)
        rig.putSlotBytes(slot, pattern(rig.stripeSize, stripe))
        rig.setStripe(stripe, slot, true)
      }
      const expected = Buffer.concat(content)
      const client = await rig.connect(mode)
      let seed = 100
      for (const [offset, length] of [
        [0, 1],
        [4095, 2],
        [rig.stripeSize - 3, 7],
        [rig.stripeSize * 2 + 511, rig.stripeSize * 3 + 77],
        [rig.size - 4096, 4096],
        [rig.stripeSize * 7, rig.stripeSize],
        [rig.size - 1, 1],
      ] as const) {
        const payload = pattern(length, seed++)
        payload.copy(expected, offset)
        await client.write(offset, payload)
      }
      for (let stripe = 0; stripe < 16; stripe++) {
        const want = expected.subarray(stripe * rig.stripeSize, (stripe + 1) * rig.stripeSize)
        expect(rig.slotBytes(1 + ((stripe * 5) % 16)).equals(want)).toBe(true)
      }
      expect(rig.policy.seen).toEqual([])
      const counters = rig.datapath.exportCounters(rig.exportId)
      expect(counters).toMatchObject({ writes: 7, upcalls: 0, errors: 0, fullStripeWrites: 0 })
      expect(counters.inPlaceWrites).toBeGreaterThanOrEqual(7)
      expect(rig.memberTotals().writeBytes).toBe(counters.writeBytes)
    })

    it('become one upcall each where a direct bit is 0, and change nothing before it is answered', async () => {
      const rig = await Rig.open(implementation, { members: 2 })
      rig.formatAll(false)
      rig.policy.hold()
      const client = await rig.connect(mode)
      const payload = pattern(3 * rig.stripeSize, 3)
      const written = client.request({ command: CMD.WRITE, offset: 1000, payload, flags: FLAG.FUA })
      const upcall = await rig.policy.next('write')
      expect(upcall).toMatchObject({
        offset: 1000,
        length: payload.length,
        flags: expectedFlags(mode),
        contexts: [],
      })
      expect(rig.memberTotals()).toMatchObject({ writes: 0, reads: 0 })
      expect(rig.policy.held).toEqual([])
      rig.datapath.complete(upcall.id, 28)
      expect((await written).errno).toBe(28)
      expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({
        upcalls: 1,
        errors: 1,
        inPlaceWrites: 0,
      })
    })

    it('that touch direct and other stripes leave only undecided bytes to the policy, in one upcall', async () => {
      const rig = await Rig.open(implementation, { stripes: 16 })
      rig.formatAll(true)
      rig.direct.clear(9)
      const client = await rig.connect(mode)
      const payload = pattern(6 * 4096 - 200, 3)
      await client.write(6 * 4096 + 100, payload)
      const expected = Buffer.alloc(rig.size)
      payload.copy(expected, 6 * 4096 + 100)
      expect((await client.read(0, rig.size)).equals(expected)).toBe(true)
      expect(rig.policy.seen).toHaveLength(1)
      const [upcall] = rig.policy.seen
      // A datapath may do what comes before the undecided stripe in place; the rest is one upcall to the end.
      expect(upcall?.offset).toBeLessThanOrEqual(9 * 4096)
      expect(upcall?.offset).toBeGreaterThanOrEqual(6 * 4096 + 100)
      expect((upcall?.offset ?? 0) + (upcall?.length ?? 0)).toBe(6 * 4096 + 100 + payload.length)
    })

    it('format a stripe on its first write and then go in place', async () => {
      const rig = await Rig.open(implementation, { fill: 0xaa, members: 2 })
      const client = await rig.connect(mode)
      await client.write(rig.stripeSize + 10, pattern(100, 1))
      await client.write(rig.stripeSize + 500, pattern(100, 2))
      await client.write(rig.stripeSize + 600, pattern(100, 3))
      const expected = Buffer.alloc(rig.stripeSize, 0xaa)
      pattern(100, 1).copy(expected, 10)
      pattern(100, 2).copy(expected, 500)
      pattern(100, 3).copy(expected, 600)
      expect((await client.read(rig.stripeSize, rig.stripeSize)).equals(expected)).toBe(true)
      expect(rig.policy.seen.map(({ kind }) => kind)).toEqual(['write'])
      expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({ fullStripeWrites: 1 })
      expect(rig.memberTotals().writeBytes).toBe(rig.stripeSize + 200)
      expect(rig.memberTotals().readBytes).toBe(rig.stripeSize) // of the client's read: the format read nothing
    })

    it('return to the policy when it clears a direct bit', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const client = await rig.connect(mode)
      await client.write(4096, pattern(4096, 1))
      expect(rig.policy.seen).toHaveLength(0)
      rig.direct.clear(1)
      await client.write(4096, pattern(4096, 2))
      expect(rig.policy.seen).toHaveLength(1)
      await client.write(4096, pattern(4096, 3)) // the policy has set it again
      expect(rig.policy.seen).toHaveLength(1)
      expect(rig.slotBytes(2).equals(pattern(4096, 3))).toBe(true)
    })

    it('with FUA go in place first and then ask for a sync', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      rig.policy.hold()
      const client = await rig.connect(mode)
      const written = client.request({
        command: CMD.WRITE,
        offset: 4096,
        payload: pattern(4096),
        flags: FLAG.FUA,
      })
      const upcall = await rig.policy.next('sync')
      expect(upcall.flags & FLAG.FUA).toBe(FLAG.FUA)
      expect(upcall.length).toBe(4096)
      expect(upcall.offset).toBe(4096)
      expect(rig.slotBytes(2).equals(pattern(4096))).toBe(true)
      expect(client.outstanding).toBe(1)
      rig.datapath.complete(upcall.id, 0)
      expect((await written).errno).toBe(0)
      expect(rig.policy.held).toEqual([])
    })

    it('carry payloads up to 32 MiB, in place and undecided', async () => {
      const size = 32 * 2 ** 20
      const rig = await Rig.open(implementation, { chunkSize: 65536, stripes: 600 })
      const client = await rig.connect(mode)
      const first = pattern(size, 1)
      await client.write(0, first)
      expect(rig.policy.seen.map(({ length }) => length)).toEqual([size])
      expect((await client.read(0, size)).equals(first)).toBe(true)
      const second = pattern(size, 2)
      await client.write(0, second)
      expect(rig.policy.seen).toHaveLength(1)
      expect((await client.read(0, size)).equals(second)).toBe(true)
      const tooLong = { command: CMD.WRITE, offset: 0, payload: Buffer.alloc(size + 1) }
      const refused = await client.request(tooLong).then(
        ({ errno }) => errno,
        () => 'ended',
      )
      expect(['ended', 22]).toContain(refused)
    })
  })

  it('trims, zeroes and flushes are always upcalls, with their flags', async () => {
    const rig = await Rig.open(implementation)
    rig.formatAll()
    rig.policy.hold()
    const client = await rig.connect('structured')
    const replies = [
      client.request({ command: CMD.TRIM, offset: 4096, length: 8192, flags: FLAG.FUA }),
      client.request({
        command: CMD.ZERO,
        offset: 100,
        length: 200_000,
        flags: FLAG.NO_HOLE | FLAG.FAST_ZERO,
      }),
      client.request({ command: CMD.FLUSH }),
    ]
    const trim = await rig.policy.next('trim')
    expect(trim).toMatchObject({ flags: FLAG.FUA, offset: 4096, length: 8192 })
    const zero = await rig.policy.next('zero')
    expect(zero).toMatchObject({ flags: FLAG.NO_HOLE | FLAG.FAST_ZERO, offset: 100, length: 200_000 })
    const flush = await rig.policy.next('sync')
    expect(flush).toMatchObject({ flags: 0, offset: 0, length: 0 })
    expect(new Set([trim.id, zero.id, flush.id]).size).toBe(3)
    // Answered in another order than asked.
    rig.datapath.complete(flush.id, 0)
    expect((await replies[2])?.errno).toBe(0)
    rig.datapath.complete(zero.id, 95)
    expect((await replies[1])?.errno).toBe(95)
    expect(client.outstanding).toBe(1)
    rig.datapath.complete(trim.id, 0)
    expect((await replies[0])?.errno).toBe(0)
    expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({
      trims: 1,
      zeroes: 1,
      flushes: 1,
      upcalls: 3,
      errors: 1,
      writes: 0,
    })
    expect(rig.memberTotals()).toMatchObject({ reads: 0, writes: 0 })
  })

  it('a trim or zero may be longer than the largest payload', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: 100 })
    rig.policy.hold()
    const client = await rig.connect('structured')
    const done = client.request({ command: CMD.TRIM, offset: 0, length: rig.size })
    const upcall = await rig.policy.next('trim')
    expect(upcall.length).toBe(rig.size)
    rig.datapath.complete(upcall.id, 0)
    expect((await done).errno).toBe(0)
  })

  it('an upcall is answered exactly once', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const client = await rig.connect('structured', { contexts: [7] })
    const flushed = client.request({ command: CMD.FLUSH })
    const upcall = await rig.policy.next('sync')
    expect(() => rig.datapath.complete(upcall.id + 1000, 0)).toThrow()
    expect(() =>
      rig.datapath.completeStatus(upcall.id, [{ context: 7, extents: [{ length: 1, flags: 0 }] }]),
    ).toThrow()
    rig.datapath.complete(upcall.id, 0)
    expect(() => rig.datapath.complete(upcall.id, 0)).toThrow()
    expect((await flushed).errno).toBe(0)
    const status = client.request({ command: CMD.STATUS, offset: 0, length: 4096 })
    const asked = await rig.policy.next('status')
    rig.datapath.completeStatus(asked.id, [{ context: 7, extents: [{ length: 4096, flags: 5 }] }])
    expect(() =>
      rig.datapath.completeStatus(asked.id, [{ context: 7, extents: [{ length: 4096, flags: 5 }] }]),
    ).toThrow()
    expect((await status).status).toEqual([{ context: 7, extents: [{ length: 4096, flags: 5 }] }])
  })

  it('tells upcalls that arrived together in batches, never from inside a call of the policy', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const client = await rig.connect('structured')
    const requests = Array.from({ length: 50 }, (_, index) =>
      client.prepare({ command: CMD.TRIM, offset: index * 4096, length: 4096 }),
    )
    client.socket.write(Buffer.concat(requests.map(({ bytes }) => bytes)))
    await until(() => rig.policy.held.length === 50, '50 upcalls')
    expect(rig.policy.batches.length).toBeLessThan(25)
    expect(rig.policy.held.map(({ offset }) => offset)).toEqual(requests.map((_, index) => index * 4096))
    rig.policy.letGo()
    for (const { reply } of requests) expect((await reply).errno).toBe(0)
  })

  it('a session that is read-only refuses what writes, reads on, and swallows the payload', async () => {
    const rig = await Rig.open(implementation)
    rig.formatAll()
    const client = await rig.connect('structured', { readOnly: true })
    for (const request of [
      { command: CMD.WRITE, offset: 0, payload: pattern(100_000) },
      { command: CMD.TRIM, offset: 0, length: 4096 },
      { command: CMD.ZERO, offset: 0, length: 4096 },
    ]) {
      expect((await client.request(request)).errno).toBe(1)
    }
    expect((await client.read(0, 4096)).equals(Buffer.alloc(4096))).toBe(true)
    await client.flush()
    expect(rig.memberTotals().writes).toBe(0)
    expect(rig.policy.seen.filter(({ kind }) => kind !== 'sync')).toEqual([])
  })

  it('answers with EIO when a member cannot be written, and the session goes on', async () => {
    const openMember = (path: string): number => {
      closeSync(openSync(path, 'w'))
      return openSync(path, 'r')
    }
    const rig = await Rig.open(implementation, { stripes: 400, openMember })
    rig.formatAll()
    const client = await rig.connect('structured')
    for (const length of [4096, 300 * 4096]) {
      const reply = await client.request({ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(length) })
      expect(reply.errno).toBe(5)
    }
    expect((await client.read(0, 4096)).equals(Buffer.alloc(4096))).toBe(true)
    expect(rig.datapath.exportCounters(rig.exportId).errors).toBe(2)
    await expect(rig.datapath.writeSlot(1, 0, Buffer.alloc(4096))).rejects.toMatchObject({
      name: 'StoreError',
      code: 'MEMBER_IO',
      message: expect.stringMatching(/member 0.*offset 12288/),
    })
  })

  it('answers with ENOSPC when the file system below a member is full', async () => {
    const rig = await Rig.open(implementation, { openMember: () => openSync('/dev/full', 'r+') })
    rig.formatAll()
    const client = await rig.connect('structured')
    const reply = await client.request({ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(4096) })
    expect(reply.errno).toBe(28)
    expect((await client.read(0, 100)).equals(Buffer.alloc(100))).toBe(true)
    rig.policy.hold()
    const undecided = client.request({ command: CMD.TRIM, offset: 4096, length: 4096 })
    const upcall = await rig.policy.next('trim')
    const full = expect.objectContaining({ name: 'StoreError', code: 'NO_SPACE' })
    await expect(rig.datapath.writePart(upcall.id, 1, 2)).rejects.toEqual(full)
    await expect(
      rig.datapath.formatUnit({ export: rig.exportId, stripe: 1, slots: [2], overlays: [upcall.id] }),
    ).rejects.toEqual(full)
    rig.datapath.complete(upcall.id, 28)
    expect((await undecided).errno).toBe(28)
    expect(rig.datapath.exportCounters(rig.exportId).fullStripeWrites).toBe(0)
  })

  it('a member that cannot be synced fails every sync from then on', async () => {
    // fdatasync of a device that is no disk is refused.
    const rig = await Rig.open(implementation, { openMember: () => openSync('/dev/full', 'r+') })
    await expect(rig.datapath.sync()).rejects.toMatchObject({ name: 'StoreError', code: 'MEMBER_IO' })
    await expect(rig.datapath.sync()).rejects.toMatchObject({ name: 'StoreError', code: 'MEMBER_IO' })
  })
})

function expectedFlags(mode: ReplyMode): number {
  return mode === 'extended' ? FLAG.FUA | FLAG.PAYLOAD_LEN : FLAG.FUA
}
