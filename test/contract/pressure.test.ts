import { readdirSync } from 'node:fs'
import { afterEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { closeRigs, pattern, Rig, type RigClient } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { until, within } from '../support/poll.ts'
import { CMD, encodeRequest, FLAG } from '../support/wire-client.ts'

const MiB = 2 ** 20

describe.each(implementations)('pressure: $name', (implementation) => {
  afterEach(closeRigs)

  /** Enough round trips for the datapath to have read whatever it is willing to read of others. */
  async function roundTrips(client: RigClient): Promise<void> {
    for (let turn = 0; turn < 50; turn++) await within(client.read(0, 512), 'a read of another client', 5000)
  }

  it('a client that never reads costs bounded memory, holds up nobody, and in the end gets everything', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 64 })
    rig.formatAll()
    for (let stripe = 0; stripe < 64; stripe++) rig.putSlotBytes(stripe + 1, pattern(65_536, stripe))
    const before = process.memoryUsage().rss
    const deaf = await rig.connect('structured')
    deaf.socket.pause()
    const asked = 200 // of 1 MiB each
    const reads = Array.from({ length: asked }, (_, index) => ({
      stripe: (index * 3) % 48,
      ...deaf.prepare({ command: CMD.READ, offset: ((index * 3) % 48) * 65_536, length: MiB }),
    }))
    deaf.socket.write(Buffer.concat(reads.map(({ bytes }) => bytes)))
    const other = await rig.connect('structured')
    await until(() => rig.datapath.exportCounters(rig.exportId).reads > 0, 'reads of the deaf client')
    await roundTrips(other)
    const started = rig.datapath.exportCounters(rig.exportId).readBytes
    expect(started).toBeLessThan(LIMITS.replyBytesQueuedPerConnection + 8 * MiB)
    expect(process.memoryUsage().rss - before).toBeLessThan(
      2 * LIMITS.replyBytesQueuedPerConnection + 40 * MiB,
    )
    deaf.socket.resume()
    for (const { stripe, reply } of reads) {
      const { data } = await within(reply, 'a reply to the deaf client')
      expect(data.subarray(0, 65_536).equals(pattern(65_536, stripe))).toBe(true)
    }
  })

  it('bounds the requests of a connection that wait for a decision', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const eager = await rig.connect('structured')
    const other = await rig.connect('structured')
    const trims = Array.from({ length: 2000 }, () =>
      eager.prepare({ command: CMD.TRIM, offset: 0, length: 4096 }),
    )
    eager.socket.write(Buffer.concat(trims.map(({ bytes }) => bytes)))
    await until(
      () => rig.policy.held.length >= LIMITS.requestsInFlightPerConnection,
      'as many as are allowed',
    )
    await roundTrips(other)
    expect(rig.policy.held.length).toBe(LIMITS.requestsInFlightPerConnection)
    const flushed = other.request({ command: CMD.FLUSH })
    await until(() => rig.policy.held.some(({ kind }) => kind === 'sync'), 'the upcall of another client')
    rig.policy.letGo()
    expect((await flushed).errno).toBe(0)
    for (const { reply } of trims) expect((await within(reply, 'a trim')).errno).toBe(0)
    expect(rig.policy.seen).toHaveLength(2001)
  })

  it('bounds the payload of a connection that waits for a decision', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536 })
    rig.policy.hold()
    const eager = await rig.connect('structured')
    const other = await rig.connect('structured')
    const payload = pattern(MiB)
    const writes = Array.from({ length: 120 }, () =>
      eager.request({ command: CMD.WRITE, offset: 0, payload }),
    )
    const most = LIMITS.payloadInFlightPerConnection / MiB
    await until(() => rig.policy.held.length >= most - 2, 'as many as are allowed')
    await roundTrips(other)
    expect(rig.policy.held.length).toBeLessThanOrEqual(most)
    const written = other.request({ command: CMD.WRITE, offset: 3 * MiB, payload: pattern(4096) })
    await until(() => rig.policy.held.some(({ length }) => length === 4096), 'the upcall of another client')
    rig.policy.letGo()
    expect((await written).errno).toBe(0)
    for (const write of writes) expect((await within(write, 'a write', 20_000)).errno).toBe(0)
    expect((await other.read(0, MiB)).equals(payload)).toBe(true)
  })

  it('bounds the payload of all connections together, and still serves each', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 256 })
    rig.policy.hold()
    const eager = await Promise.all(Array.from({ length: 6 }, () => rig.connect('structured')))
    const payload = pattern(4 * MiB)
    const writes = eager.flatMap((client) =>
      Array.from({ length: 15 }, () => client.request({ command: CMD.WRITE, offset: 0, payload })),
    )
    const most = LIMITS.payloadInFlightTotal / (4 * MiB)
    await until(() => rig.policy.held.length >= most - eager.length, 'as many as are allowed')
    const late = await rig.connect('structured')
    await roundTrips(late)
    expect(rig.policy.held.length).toBeLessThanOrEqual(most + eager.length)
    // Whoever comes late is served too: a small request at once, a large one at the latest when there is room again.
    const small = late.request({ command: CMD.WRITE, offset: 0, payload: pattern(5000) })
    await until(() => rig.policy.held.some(({ length }) => length === 5000), 'a late write')
    const index = rig.policy.held.findIndex(({ length }) => length === 5000)
    for (const { id } of rig.policy.held.splice(index, 1)) rig.datapath.complete(id, 28)
    expect((await small).errno).toBe(28)
    writes.push(late.request({ command: CMD.WRITE, offset: 0, payload: pattern(8 * MiB) }))
    rig.policy.letGo()
    for (const write of writes) expect((await within(write, 'a write', 20_000)).errno).toBe(0)
  })

  it('clients that stop in mid-payload hold up nobody', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 512 })
    rig.formatAll()
    const large = pattern(32 * MiB, 2)
    const write = encodeRequest({ command: CMD.WRITE, offset: 0, payload: large }, 'structured')
    const stalled = await Promise.all(
      Array.from({ length: 12 }, async (_, index) => {
        const client = await rig.connect('structured')
        client.socket.write(write.subarray(0, index * 100_000))
        return client
      }),
    )
    const client = await rig.connect('structured')
    for (let turn = 0; turn < 20; turn++) {
      await within(client.write(16 * MiB, pattern(4096, turn)), 'a small write', 5000)
      const read = await within(client.read(16 * MiB, 4096), 'a small read', 5000)
      expect(read.equals(pattern(4096, turn))).toBe(true)
    }
    await within(client.write(0, large), 'a large write', 10_000)
    const back = await within(client.read(16 * MiB, 16 * MiB), 'a large read', 10_000)
    expect(back.equals(large.subarray(16 * MiB))).toBe(true)
    for (const each of stalled) each.destroy()
    await until(() => rig.datapath.sessionCount(rig.exportId) === 1, 'the stalled clients to be gone')
  })

  it('takes large requests through in parts where others hold all of the memory', async () => {
    const rig = await Rig.open(implementation, { chunkSize: 65_536, stripes: 700, fill: 0x5a })
    const large = pattern(32 * MiB, 2)
    const write = encodeRequest({ command: CMD.WRITE, offset: 0, payload: large }, 'structured')
    for (let index = 0; index < LIMITS.payloadInFlightTotal / large.length; index++) {
      const client = await rig.connect('structured')
      client.socket.write(write.subarray(0, 300_000))
    }
    await roundTrips(await rig.connect('structured'))
    const seen = rig.policy.seen.length
    for (const mode of ['simple', 'structured', 'extended'] as const) {
      const client = await rig.connect(mode)
      const data = pattern(3 * MiB + 5000, mode.length)
      const offset = 33 * MiB + 777
      await within(client.write(offset, data, FLAG.FUA), `a large write, ${mode}`, 20_000)
      for (const flags of mode === 'simple' ? [0] : [0, FLAG.DF]) {
        const back = await within(
          client.read(offset - 1000, data.length + 2000, flags),
          'a large read',
          20_000,
        )
        expect(back.subarray(1000, -1000).equals(data)).toBe(true)
        expect(back.subarray(0, 1000).equals(Buffer.alloc(1000, 0x5a))).toBe(true)
      }
      // Others of the same connection go on beside it.
      const both = await within(
        Promise.all([
          client.read(offset, 2 * MiB),
          client.read(offset, 4096),
          client.write(offset, data.subarray(0, 4096)),
        ]),
        'large and small together',
        20_000,
      )
      expect(both[0].equals(data.subarray(0, 2 * MiB))).toBe(true)
    }
    const writes = rig.policy.seen.slice(seen).filter(({ kind }) => kind === 'write')
    expect(Math.max(...writes.map(({ length }) => length))).toBeLessThanOrEqual(
      LIMITS.payloadAlwaysPerConnection,
    )
  })

  it('completes a pipelined mix in whatever order the answers come', async () => {
    const rig = await Rig.open(implementation, { fill: 0x61 })
    for (let stripe = 0; stripe < 64; stripe += 2) {
      rig.putSlotBytes(stripe + 1, pattern(4096, stripe))
      rig.setStripe(stripe, stripe + 1, true)
    }
    rig.policy.hold()
    const client = await rig.connect('structured')
    const order: string[] = []
    const note = (name: string, reply: Promise<{ errno: number }>): Promise<void> =>
      reply.then(({ errno }) => {
        order.push(`${name} ${errno}`)
      })
    const all = [
      note('flush', client.request({ command: CMD.FLUSH })),
      note('undecided', client.request({ command: CMD.WRITE, offset: 4096, payload: pattern(4096, 90) })),
      note('direct', client.request({ command: CMD.WRITE, offset: 8192, payload: pattern(4096, 91) })),
      note('trim', client.request({ command: CMD.TRIM, offset: 0, length: 4096 })),
      note('read', client.request({ command: CMD.READ, offset: 6 * 4096, length: 8192 })),
      note('refused', client.request({ command: CMD.READ, offset: rig.size, length: 1 })),
    ]
    await until(() => rig.policy.held.length === 3 && order.length === 3, 'what needs no decision')
    expect([...order].sort()).toEqual(['direct 0', 'read 0', 'refused 22'])
    const [flush, write, trim] = rig.policy.held.splice(0)
    rig.datapath.complete(trim!.id, 95)
    await until(() => order.length === 4, 'the trim')
    await rig.policy.decide(write!)
    await until(() => order.length === 5, 'the write')
    rig.datapath.complete(flush!.id, 0)
    await Promise.all(all)
    expect(order.slice(3)).toEqual(['trim 95', 'undecided 0', 'flush 0'])
    expect((await client.read(4096, 4096)).equals(pattern(4096, 90))).toBe(true)
    expect((await client.read(8192, 4096)).equals(pattern(4096, 91))).toBe(true)
  })

  it('serves 500 connections at once', async () => {
    const rig = await Rig.open(implementation, { stripes: 600 })
    const clients: RigClient[] = []
    for (let index = 0; index < 500; index++) {
      clients.push(
        await rig.connect(index % 2 === 0 ? 'structured' : 'simple', {
          transport: index % 5 === 0 ? 'tcp' : 'unix',
        }),
      )
    }
    expect(rig.datapath.sessionCount(rig.exportId)).toBe(500)
    for (let round = 0; round < 3; round++) {
      await Promise.all(
        clients.map((client, index) => client.write(index * 4096, pattern(4096, index + round))),
      )
      const got = await Promise.all(
        clients.map((client, index) => client.read(((index + 7) % 500) * 4096, 4096)),
      )
      got.forEach((data, index) => {
        expect(data.equals(pattern(4096, ((index + 7) % 500) + round))).toBe(true)
      })
    }
    await Promise.all(
      clients.map(async (client, index) => {
        if (index % 2 === 0) return client.disconnect()
        client.destroy()
        return client.closed
      }),
    )
    await until(() => clients.every(({ ends }) => ends.length === 1), 'every onClose')
    clients.forEach(({ ends }, index) => {
      expect(ends).toEqual([index % 2 === 0 ? 'disconnect' : 'hangup'])
    })
    expect(rig.datapath.sessionCount(rig.exportId)).toBe(0)
  })

  it('leaks no descriptor, thread or memory over thousands of connections', async () => {
    const rig = await Rig.open(implementation, { stripes: 300, chunkSize: 65_536 })
    const ends: RigClient[] = []
    const whole = encodeRequest({ command: CMD.WRITE, offset: 0, payload: pattern(8 * MiB) }, 'structured')
    const half = whole.subarray(0, 200_000)
    const churn = async (count: number): Promise<void> => {
      for (let index = 0; index < count; index++) {
        const client = await rig.connect('structured', { transport: index % 10 === 0 ? 'tcp' : 'unix' })
        ends.push(client)
        switch (index % 5) {
          case 0: // never says anything
            client.destroy()
            break
          case 1: // works, and leaves politely
            await client.write((index % 300) * 65_536, pattern(4096))
            await client.read(0, 200_000)
            await client.disconnect()
            break
          case 2: // leaves in mid-payload
            client.socket.write(half, () => client.destroy())
            break
          case 3: // leaves without taking its replies
            client.socket.pause()
            for (let turn = 0; turn < 5; turn++)
              client.request({ command: CMD.READ, offset: 0, length: MiB }).catch(() => {})
            setImmediate(() => client.destroy())
            break
          default: // talks nonsense
            client.socket.write('no NBD at all, but long enough to be one request')
        }
        await client.closed
      }
      await until(() => ends.every((client) => client.ends.length === 1), 'every onClose')
      await until(() => rig.datapath.sessionCount(rig.exportId) === 0, 'no sessions')
      ends.length = 0
    }
    const descriptors = (): number => readdirSync('/proc/self/fd').length
    const threads = (): number => readdirSync('/proc/self/task').length
    await churn(500)
    const before = { descriptors: descriptors(), threads: threads(), rss: process.memoryUsage().rss }
    await churn(1500)
    await until(() => descriptors() <= before.descriptors, 'as few descriptors as before')
    expect(threads()).toBeLessThanOrEqual(before.threads)
    expect(process.memoryUsage().rss - before.rss).toBeLessThan(60 * MiB)
    // Nothing that those clients held counts against the ones that come now.
    rig.policy.hold()
    const client = await rig.connect('structured')
    const payload = pattern(MiB)
    const writes = Array.from({ length: 32 }, (_, index) =>
      client.request({ command: CMD.WRITE, offset: (250 + index) * 65_536, payload }),
    )
    await until(() => rig.policy.held.length === 32, '32 MiB to be taken in')
    rig.policy.letGo()
    for (const write of writes) expect((await write).errno).toBe(0)
  }, 60_000)
})
