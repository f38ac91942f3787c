import { afterEach, describe, expect, it } from 'vitest'
import { closeRigs, Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { CMD, FLAG, statusFilter } from '../support/wire-client.ts'

describe.each(implementations)('block status: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(['structured', 'extended'] as const)('%s replies', (mode) => {
    it('carries several contexts, in one reply', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.statusOf = (context, { length }) => [
        { length: 4096, flags: context },
        { length: length - 4096, flags: context + 1 },
      ]
      const client = await rig.connect(mode, { contexts: [5, 0xfffffff0, 17] })
      const reply = await client.request({ command: CMD.STATUS, offset: 4096, length: 40_960 })
      expect(reply.errno).toBe(0)
      expect(reply.status).toEqual(
        [5, 0xfffffff0, 17].map((context) => ({
          context,
          extents: [
            { length: 4096, flags: context },
            { length: 36_864, flags: context + 1 },
          ],
        })),
      )
      expect(reply.chunks.map(({ done }) => done)).toEqual([false, false, true])
      expect(rig.policy.seen).toHaveLength(1)
      expect(rig.policy.seen[0]).toMatchObject({
        kind: 'status',
        offset: 4096,
        length: 40_960,
        contexts: [5, 0xfffffff0, 17],
      })
    })

    it('says what is formatted', async () => {
      const rig = await Rig.open(implementation, { stripes: 10, size: 9 * 4096 + 512 })
      for (const stripe of [0, 4, 5, 9]) rig.setStripe(stripe, stripe + 1, false)
      const client = await rig.connect(mode, { contexts: [1] })
      const reply = await client.request({ command: CMD.STATUS, offset: 0, length: rig.size })
      expect(reply.status[0]?.extents).toEqual([
        { length: 4096, flags: 0 },
        { length: 3 * 4096, flags: 3 },
        { length: 2 * 4096, flags: 0 },
        { length: 3 * 4096, flags: 3 },
        { length: 512, flags: 0 },
      ])
    })

    it('sends one extent, within the request, where REQ_ONE asks for it', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.statusOf = () => [
        { length: 100_000, flags: 1 },
        { length: 50_000, flags: 0 },
      ]
      const client = await rig.connect(mode, { contexts: [1, 2] })
      const reply = await client.request({
        command: CMD.STATUS,
        offset: 0,
        length: 70_000,
        flags: FLAG.REQ_ONE,
      })
      expect(reply.status).toEqual([
        { context: 1, extents: [{ length: 70_000, flags: 1 }] },
        { context: 2, extents: [{ length: 70_000, flags: 1 }] },
      ])
      expect((rig.policy.seen[0]?.flags ?? 0) & FLAG.REQ_ONE).toBe(FLAG.REQ_ONE)
    })

    it('lets only the last extent reach past the request, and drops those behind it', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.statusOf = () => [
        { length: 10_000, flags: 1 },
        { length: 90_000, flags: 0 },
        { length: 10_000, flags: 1 },
      ]
      const client = await rig.connect(mode, { contexts: [1] })
      const reply = await client.request({ command: CMD.STATUS, offset: 0, length: 20_000 })
      const extents = reply.status[0]?.extents ?? []
      expect(extents).toHaveLength(2)
      expect(extents[0]).toEqual({ length: 10_000, flags: 1 })
      expect(extents[1]?.length).toBeGreaterThanOrEqual(10_000)
      expect(extents[1]?.length).toBeLessThanOrEqual(90_000)
    })

    it('bounds the number of extents in a reply', async () => {
      const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 8000 })
      const count = 100_000
      rig.policy.statusOf = () =>
        Array.from({ length: count }, (_, index) => ({ length: 4096, flags: index & 1 }))
      const client = await rig.connect(mode, { contexts: [1] })
      const reply = await client.request({ command: CMD.STATUS, offset: 0, length: count * 4096 })
      const extents = reply.status[0]?.extents ?? []
      expect(extents).toHaveLength(65_536)
      expect(extents[65_535]).toEqual({ length: 4096, flags: 1 })
    })

    it('reports an error of the policy', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.hold()
      const client = await rig.connect(mode, { contexts: [1] })
      const reply = client.request({ command: CMD.STATUS, offset: 0, length: 4096 })
      const upcall = await rig.policy.next('status')
      expect(() => rig.datapath.complete(upcall.id, 0)).toThrow() // success has results
      rig.datapath.complete(upcall.id, 5)
      expect(await reply).toMatchObject({ errno: 5, status: [] })
    })

    it('refuses a block status where no context was negotiated', async () => {
      const rig = await Rig.open(implementation)
      const client = await rig.connect(mode)
      expect((await client.request({ command: CMD.STATUS, offset: 0, length: 4096 })).errno).toBe(22)
      expect(rig.policy.seen).toEqual([])
    })
  })

  it('says lengths beyond 32 bits with extended headers, and cuts them in compact ones', async () => {
    const huge = 6 * 2 ** 32
    for (const mode of ['structured', 'extended'] as const) {
      const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: huge / 2 ** 20 })
      rig.policy.statusOf = () => [
        { length: huge - 2 ** 20, flags: 3 },
        { length: 2 ** 20, flags: 0 },
      ]
      const client = await rig.connect(mode, { contexts: [9] })
      const length = mode === 'extended' ? huge : 2 ** 32 - 4096
      const reply = await client.request({ command: CMD.STATUS, offset: 0, length })
      const extents = reply.status[0]?.extents ?? []
      expect(rig.policy.seen[0]?.length).toBe(length)
      if (mode === 'extended') {
        expect(extents).toEqual([
          { length: huge - 2 ** 20, flags: 3 },
          { length: 2 ** 20, flags: 0 },
        ])
      } else {
        expect(extents).toHaveLength(1)
        expect(extents[0]?.flags).toBe(3)
        expect(extents[0]?.length).toBeGreaterThan(2 ** 31)
        expect(extents[0]?.length).toBeLessThan(2 ** 32)
      }
    }
  })

  it('takes trims and zeroes of more than 32 bits with extended headers', async () => {
    const huge = 6 * 2 ** 32
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: huge / 2 ** 20 })
    rig.policy.hold()
    const client = await rig.connect('extended')
    for (const command of [CMD.TRIM, CMD.ZERO]) {
      const reply = client.request({ command, offset: 4096, length: huge - 8192 })
      const upcall = await rig.policy.next()
      expect(upcall).toMatchObject({ offset: 4096, length: huge - 8192 })
      rig.datapath.complete(upcall.id, 0)
      expect((await reply).errno).toBe(0)
    }
  })

  it('asks only for the contexts that a filter names', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.statusOf = (context, { length }) => [{ length, flags: context }]
    const client = await rig.connect('extended', { contexts: [11, 22, 33] })
    const ask = (payload: Buffer) => client.request({ command: CMD.STATUS, offset: 8192, payload })
    const some = await ask(statusFilter(100_000, [33, 11]))
    expect(some.status.map(({ context }) => context).sort()).toEqual([11, 33])
    expect(some.status[0]?.extents[0]?.length).toBe(100_000)
    expect(rig.policy.seen[0]).toMatchObject({ offset: 8192, length: 100_000 })
    expect([...(rig.policy.seen[0]?.contexts ?? [])].sort()).toEqual([11, 33])
    const all = await ask(statusFilter(4096, [11, 22, 33]))
    expect(all.status).toHaveLength(3)
    for (const bad of [
      statusFilter(4096, []), // no context at all
      statusFilter(4096, [11, 44]), // one that was not negotiated
      statusFilter(4096, [11, 11]), // one twice
      statusFilter(0, [11]), // no range
      statusFilter(rig.size, [11]), // past the end
      statusFilter(4096, [11, 22, 33, 11]), // more than there are
      statusFilter(4096, [11]).subarray(0, 10), // cut
      Buffer.alloc(70_000),
    ]) {
      expect((await ask(bad)).errno).toBe(22)
    }
    expect(rig.policy.seen).toHaveLength(2)
    expect((await ask(statusFilter(4096, [22]))).status).toEqual([
      { context: 22, extents: [{ length: 4096, flags: 22 }] },
    ])
  })
})
