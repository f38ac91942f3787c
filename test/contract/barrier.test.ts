import { afterEach, describe, expect, it } from 'vitest'
import { closeRigs, pattern, Rig, type RigClient } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { isPending, until, within } from '../support/poll.ts'
import { CMD, encodeRequest } from '../support/wire-client.ts'

describe.each(implementations)('barrier and life cycle: $name', (implementation) => {
  afterEach(closeRigs)

  /** One client stops in the middle of a payload for direct stripes, another one never takes a reply. */
  async function stalledClients(rig: Rig): Promise<{ half: RigClient; deaf: RigClient }> {
    const half = await rig.connect('structured')
    const write = encodeRequest({ command: CMD.WRITE, offset: 0, payload: pattern(200_000) }, 'structured')
    half.socket.write(write.subarray(0, 150_001))
    const deaf = await rig.connect('simple')
    deaf.socket.pause()
    const read = encodeRequest({ command: CMD.READ, offset: 0, length: rig.size }, 'simple')
    deaf.socket.write(Buffer.concat(Array.from({ length: 40 }, () => read)))
    await until(
      () => rig.datapath.exportCounters(rig.exportId).reads > 0,
      'the first read of the deaf client',
    )
    return { half, deaf }
  }

  it('resolves when nothing is under way, and several at once', async () => {
    const rig = await Rig.open(implementation)
    await within(rig.datapath.barrier(), 'a barrier')
    await within(Promise.all(Array.from({ length: 20 }, () => rig.datapath.barrier())), '20 barriers')
  })

  it('waits for no stalled client', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536 })
    rig.formatAll()
    await stalledClients(rig)
    await within(rig.datapath.barrier(), 'a barrier', 5000)
    rig.direct.clearRange(0, 64)
    await within(rig.datapath.barrier(), 'another barrier', 5000)
    const client = await rig.connect()
    await within(client.read(0, 4096), 'a read', 5000)
  })

  it('after clearing direct bits and a barrier, no write changes a slot', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 32 })
    rig.formatAll()
    const clients = await Promise.all([0, 1, 2].map(() => rig.connect()))
    let stop = false
    let writes = 0
    const writers = clients.map(async (client, index) => {
      for (let round = 0; !stop; round++) {
        const length = [512, 4096, 65_536, 300_000, 2_000_000][round % 5] ?? 512
        await Promise.all(
          Array.from({ length: 8 }, async (_, at) => {
            const offset = (round * 77_777 + at * 131_072 + index * 999) % (rig.size - length)
            await client.write(offset, pattern(length, round * 100 + at))
            writes++
          }),
        )
      }
    })
    for (let round = 0; round < 15; round++) {
      const before = writes
      await until(() => writes > before + 20, 'writes under way')
      rig.policy.hold()
      await rig.policy.idle() // what it decided before sets direct bits and writes by itself
      rig.direct.clearRange(0, 32)
      await within(rig.datapath.barrier(), 'a barrier')
      const image = Array.from({ length: 32 }, (_, stripe) => rig.slotBytes(stripe + 1))
      await until(() => rig.policy.held.length >= 3, 'writes that ask')
      for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve))
      for (let stripe = 0; stripe < 32; stripe++) {
        expect(rig.slotBytes(stripe + 1).equals(image[stripe] ?? Buffer.alloc(0)), `stripe ${stripe}`).toBe(
          true,
        )
      }
      rig.direct.setRange(0, 32)
      rig.policy.letGo()
    }
    stop = true
    await Promise.all(writers)
  })

  it('after moving a stripe and a barrier, no read sees the old slot', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 40 })
    const content = pattern(65_536, 1)
    const slotOf = (stripe: number, turn: number): number => 1 + stripe + 40 * turn
    for (let stripe = 0; stripe < 40; stripe++) {
      rig.putSlotBytes(slotOf(stripe, 0), content)
      rig.putSlotBytes(slotOf(stripe, 1), Buffer.alloc(65_536, 0xdd))
      rig.setStripe(stripe, slotOf(stripe, 0), false)
    }
    const all = Buffer.concat(Array.from({ length: 40 }, () => content))
    const clients = await Promise.all([0, 1, 2].map(() => rig.connect()))
    let stop = false
    let reads = 0
    const readers = clients.map(async (client) => {
      while (!stop) {
        const results = await Promise.all([
          client.read(0, rig.size),
          client.read(4096, 65_536),
          client.read(65_536 * 7, 4096),
          client.read(65_536 * 11 + 100, 500_000),
        ])
        reads += results.length
        expect(results[0]?.equals(all)).toBe(true)
        expect(results[1]?.equals(all.subarray(4096, 4096 + 65_536))).toBe(true)
        expect(results[2]?.equals(all.subarray(65_536 * 7, 65_536 * 7 + 4096))).toBe(true)
        expect(results[3]?.equals(all.subarray(65_536 * 11 + 100, 65_536 * 11 + 500_100))).toBe(true)
      }
    })
    const running = Promise.all(readers)
    const mover = async (): Promise<void> => {
      for (let turn = 1; turn <= 20; turn++) {
        const before = reads
        await until(() => reads > before + 4, 'reads under way')
        for (let stripe = 0; stripe < 40; stripe++) {
          rig.putSlotBytes(slotOf(stripe, turn % 2), content)
          Atomics.store(rig.tables.slots, stripe, slotOf(stripe, turn % 2))
        }
        await within(rig.datapath.barrier(), 'a barrier')
        for (let stripe = 0; stripe < 40; stripe++) {
          rig.putSlotBytes(slotOf(stripe, (turn + 1) % 2), Buffer.alloc(65_536, 0xdd))
        }
      }
      stop = true
    }
    await Promise.race([mover(), running])
    await running
    expect(rig.policy.seen).toEqual([])
  })

  it('retable grows an export under its sessions, and lets go of the old tables', async () => {
    const rig = await Rig.open(implementation, { stripes: 16, fill: 3 })
    rig.formatAll()
    for (let stripe = 0; stripe < 16; stripe++) rig.putSlotBytes(stripe + 1, pattern(4096, stripe))
    const client = await rig.connect()
    expect((await client.request({ command: CMD.READ, offset: rig.size, length: 1 })).errno).toBe(22)
    const old = rig.tables
    const grown = rig.tablesOfSize(rig.size + 100 * 4096 + 512)
    const retabled = rig.datapath.retable(rig.exportId, grown.tables)
    rig.use(grown)
    await within(retabled, 'retable')
    old.slots.fill(999)
    old.init.fill(0)
    old.direct.fill(0xffffffff)
    expect((await client.read(5 * 4096, 4096)).equals(pattern(4096, 5))).toBe(true)
    expect((await client.read(rig.size - 5000, 5000)).equals(Buffer.alloc(5000, 3))).toBe(true)
    await client.write(rig.size - 512, pattern(512))
    expect((await client.read(rig.size - 512, 512)).equals(pattern(512))).toBe(true)
    expect((await client.request({ command: CMD.READ, offset: rig.size, length: 1 })).errno).toBe(22)
    await client.write(4096, pattern(4096, 44))
    expect(rig.slotBytes(2).equals(pattern(4096, 44))).toBe(true)
    expect(rig.datapath.exportCounters(rig.exportId)).toMatchObject({ inPlaceWrites: 1 })
  })

  it('retable shrinks an export under a stalled write, which is refused', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 16 })
    rig.formatAll()
    const client = await rig.connect()
    const { bytes, reply } = client.prepare({
      command: CMD.WRITE,
      offset: 8 * 65_536,
      payload: pattern(8 * 65_536, 2),
    })
    client.socket.write(bytes.subarray(0, 28 + 100)) // nothing that could be in place before the shrink
    const other = await rig.connect()
    await other.read(0, 100)
    const shrunk = rig.tablesOfSize(8 * 65_536)
    const retabled = rig.datapath.retable(rig.exportId, shrunk.tables)
    rig.use(shrunk)
    await within(retabled, 'retable')
    client.socket.write(bytes.subarray(128))
    expect((await reply).errno).toBe(28)
    expect((await client.request({ command: CMD.READ, offset: 8 * 65_536, length: 1 })).errno).toBe(22)
    expect((await client.read(0, 100)).length).toBe(100)
    for (let slot = 10; slot <= 16; slot++)
      expect(rig.slotBytes(slot).equals(Buffer.alloc(65_536))).toBe(true)
  })

  it('closeExport answers what is in flight, ends the sessions, and forgets the export', async () => {
    const rig = await Rig.open(implementation)
    rig.formatAll(false)
    const otherTables = rig.tablesOfSize(rig.size).tables
    const otherId = rig.openExport('other', otherTables)
    const clients = await Promise.all([0, 1, 2].map(() => rig.connect()))
    const other = await rig.connect('simple', { exportId: otherId })
    expect(rig.datapath.sessionCount(rig.exportId)).toBe(3)
    rig.policy.hold()
    const replies = clients.map((client) => client.request({ command: CMD.TRIM, offset: 0, length: 4096 }))
    await until(() => rig.policy.held.length === 3, 'three upcalls')
    const closed = rig.datapath.closeExport(rig.exportId)
    expect(() =>
      rig.datapath.serve(rig.exportId, {
        socket: other.socket,
        received: Buffer.alloc(0),
        mode: 'simple',
        contexts: [],
        readOnly: false,
        onClose: () => {},
      }),
    ).toThrow()
    // Requests that come now are not read any more, or they are among the last that are: both end soon.
    const late = clients.map((client) =>
      client.read(0, 10).then(
        () => 'answered',
        () => 'ended',
      ),
    )
    expect(await isPending(closed)).toBe(true)
    for (const { id } of rig.policy.held.splice(0)) rig.datapath.complete(id, 0)
    for (const reply of replies) expect((await reply).errno).toBe(0)
    await within(closed, 'closeExport')
    expect(['answered', 'ended']).toEqual(
      expect.arrayContaining(await within(Promise.all(late), 'late reads')),
    )
    await until(() => clients.every(({ ends }) => ends.length > 0), 'every onClose')
    for (const { ends } of clients) expect(ends).toEqual(['closed'])
    expect(() => rig.datapath.sessionCount(rig.exportId)).toThrow()
    expect(rig.policy.held).toEqual([])
    expect((await other.read(0, 10)).length).toBe(10)
    expect(rig.datapath.sessionCount(otherId)).toBe(1)
  })

  it('closeExport is not held up by clients that stall', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536 })
    rig.formatAll()
    const { half, deaf } = await stalledClients(rig)
    const idle = await rig.connect()
    await within(rig.datapath.closeExport(rig.exportId), 'closeExport', 8000)
    await until(() => [half, deaf, idle].every(({ ends }) => ends.length > 0), 'every onClose')
    expect(half.ends).toEqual(['closed'])
    expect(idle.ends).toEqual(['closed'])
    expect(deaf.ends).toHaveLength(1)
  })

  it('closeExport lets a client that reads have all of its replies', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536 })
    rig.formatAll()
    rig.putSlotBytes(1, pattern(65_536))
    const client = await rig.connect('simple')
    client.socket.pause()
    const reads = Array.from({ length: 8 }, () => client.read(0, rig.size))
    const started = (): number => rig.datapath.exportCounters(rig.exportId).reads
    await until(() => started() > 0, 'a read in flight')
    const atLeast = started()
    const closed = rig.datapath.closeExport(rig.exportId)
    await new Promise((resolve) => setImmediate(resolve))
    client.socket.resume()
    const results = await Promise.allSettled(reads)
    const answered = results.filter(({ status }) => status === 'fulfilled')
    expect(answered.length).toBeGreaterThanOrEqual(atLeast)
    for (const result of results) {
      if (result.status === 'rejected') continue // it was not in flight
      expect(result.value.subarray(0, 65_536).equals(pattern(65_536))).toBe(true)
    }
    await within(closed, 'closeExport')
  })

  it('close ends everything, once', async () => {
    const rig = await Rig.open(implementation)
    const clients = await Promise.all(Array.from({ length: 10 }, () => rig.connect()))
    await Promise.all(clients.map((client) => client.write(0, pattern(4096))))
    await Promise.all([within(rig.datapath.close(), 'close'), rig.datapath.close()])
    await until(() => clients.every(({ ends }) => ends.length > 0), 'every onClose')
    for (const { ends } of clients) expect(ends).toEqual(['closed'])
    expect(rig.memberTotals().writeBytes).toBeGreaterThanOrEqual(4096)
    await expect(rig.datapath.writeSlot(1, 0, Buffer.alloc(10))).rejects.toMatchObject({
      code: 'SHUTTING_DOWN',
    })
    await expect(rig.datapath.sync()).rejects.toMatchObject({ code: 'SHUTTING_DOWN' })
    expect(() => rig.openExport('late', rig.tables)).toThrow()
  })

  it('close waits for a full-stripe write under way', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 2 ** 20, stripes: 16, formatUnit: 16 })
    const slots = Array.from({ length: 16 }, (_, index) => index + 1)
    let done = false
    const formatted = rig.datapath
      .formatUnit({ export: rig.exportId, stripe: 0, slots, overlays: [] })
      .then(() => {
        done = true
      })
    await within(rig.datapath.close(), 'close')
    await new Promise((resolve) => setImmediate(resolve))
    expect(done).toBe(true)
    await formatted
  })

  it('serves a socket that has ended before it is handed over', async () => {
    const rig = await Rig.open(implementation)
    const client = await rig.connect('simple', {
      beforeServe: async (socket, own) => {
        own.destroy()
        socket.resume() // so that the server side learns of it
        await until(() => socket.destroyed, 'the end')
      },
    })
    await until(() => client.ends.length > 0, 'onClose')
    expect(client.ends).toHaveLength(1)
    expect(rig.datapath.sessionCount(rig.exportId)).toBe(0)
  })
})
