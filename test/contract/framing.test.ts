import { afterEach, describe, expect, it } from 'vitest'
import type { ReplyMode } from '../../src/datapath/datapath.ts'
import { closeRigs, pattern, Rig, type RigClient } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { isPending, until, within } from '../support/poll.ts'
import { CMD, encodeRequest, FLAG, statusFilter, type WireRequest } from '../support/wire-client.ts'

const modes: readonly ReplyMode[] = ['simple', 'structured', 'extended']

describe.each(implementations)('framing: $name', (implementation) => {
  afterEach(closeRigs)

  describe.each(modes)('%s mode', (mode) => {
    /** One of everything, small, and refused requests with payloads between them. */
    function requests(): { request: WireRequest; errno: number }[] {
      const all: { request: WireRequest; errno: number }[] = [
        { request: { command: CMD.WRITE, offset: 100, payload: pattern(33, 1) }, errno: 0 },
        { request: { command: CMD.WRITE, offset: 64 * 4096, payload: pattern(5) }, errno: 28 },
        { request: { command: CMD.READ, offset: 4096 * 9, length: 100 }, errno: 0 },
        { request: { command: 77, offset: 0, length: 100 }, errno: 22 },
        {
          request: { command: CMD.WRITE, offset: 5 * 4096, payload: pattern(17, 2), flags: FLAG.FUA },
          errno: 0,
        },
        { request: { command: CMD.TRIM, offset: 4096, length: 4096 }, errno: 0 },
        { request: { command: CMD.FLUSH }, errno: 0 },
        { request: { command: CMD.READ, offset: 0, length: 0 }, errno: 22 },
        { request: { command: CMD.WRITE, offset: 0, payload: Buffer.alloc(0) }, errno: 22 },
        { request: { command: CMD.READ, offset: 2 ** 52, length: 1 }, errno: 22 },
      ]
      if (mode !== 'simple') {
        all.push({ request: { command: CMD.STATUS, offset: 0, length: 8192 }, errno: 0 })
      }
      if (mode === 'extended') {
        all.push({ request: { command: CMD.STATUS, offset: 0, payload: statusFilter(8192, [3]) }, errno: 0 })
        all.push({ request: { command: CMD.STATUS, offset: 0, payload: statusFilter(8192, [4]) }, errno: 22 })
      }
      return all
    }

    it('understands the same requests wherever the stream is cut', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const client = await rig.connect(mode, { contexts: mode === 'simple' ? [] : [3] })
      const total = requests()
        .map(({ request }) => encodeRequest(request, mode).length)
        .reduce((sum, length) => sum + length, 0)
      for (let cut = 0; cut <= total; cut++) {
        const prepared = requests().map(({ request, errno }) => ({
          ...client.prepare(request),
          errno,
          request,
        }))
        const stream = Buffer.concat(prepared.map(({ bytes }) => bytes))
        expect(stream.length).toBe(total)
        const before = client.received
        client.socket.write(stream.subarray(0, cut))
        // The first part is on its own once something of it has been answered, or a turn has passed.
        if (cut > 140) await until(() => client.received > before, 'a first reply')
        else await new Promise((resolve) => setImmediate(resolve))
        client.socket.write(stream.subarray(cut))
        for (const { reply, errno, request } of prepared) {
          expect((await reply).errno, `command ${request.command} cut at ${cut}`).toBe(errno)
        }
      }
      expect(rig.slotBytes(1, 100, 33).equals(pattern(33, 1))).toBe(true)
      expect(rig.slotBytes(6, 0, 17).equals(pattern(17, 2))).toBe(true)
      expect(client.ends).toEqual([])
    })

    it('understands a stream that comes byte by byte', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const client = await rig.connect(mode, { contexts: mode === 'simple' ? [] : [3], transport: 'tcp' })
      client.socket.setNoDelay(true)
      const prepared = requests().map(({ request, errno }) => ({ ...client.prepare(request), errno }))
      for (const byte of Buffer.concat(prepared.map(({ bytes }) => bytes))) {
        await new Promise<void>((resolve) => client.socket.write(Buffer.of(byte), () => resolve()))
      }
      for (const { reply, errno } of prepared) expect((await reply).errno).toBe(errno)
    })

    it('takes over bytes that were already received, whole requests and parts', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const cookie = 0x1122334455667788n
      const write = encodeRequest({ command: CMD.WRITE, offset: 4096, payload: pattern(3000) }, mode, cookie)
      const read = encodeRequest({ command: CMD.READ, offset: 4096, length: 3000 }, mode, cookie + 1n)
      const stream = Buffer.concat([write, read])
      rig.putSlotBytes(2, pattern(3000)) // the two may happen in either order
      for (const cut of [1, 20, 30, 1000, write.length, write.length + 10, stream.length]) {
        const transport = cut % 2 === 0 ? 'tcp' : 'unix'
        const client = await rig.connect(mode, { received: stream.subarray(0, cut), transport })
        const written = client.prepare({
          command: CMD.WRITE,
          offset: 4096,
          payload: pattern(3000),
          cookie,
        }).reply
        const got = client.prepare({
          command: CMD.READ,
          offset: 4096,
          length: 3000,
          cookie: cookie + 1n,
        }).reply
        client.socket.write(stream.subarray(cut))
        expect((await written).errno).toBe(0)
        expect((await got).data.equals(pattern(3000))).toBe(true)
        await client.disconnect()
      }
    })

    it('refuses what does not fit the volume, with the right number', async () => {
      const rig = await Rig.open(implementation, { size: 63 * 4096 + 512 })
      const { size } = rig
      const client = await rig.connect(mode, { contexts: mode === 'simple' ? [] : [1] })
      const cases: [WireRequest, number][] = [
        [{ command: CMD.READ, offset: size, length: 1 }, 22],
        [{ command: CMD.READ, offset: size - 1, length: 2 }, 22],
        [{ command: CMD.READ, offset: 0, length: size + 1 }, 22],
        [{ command: CMD.WRITE, offset: size - 1, payload: Buffer.alloc(2) }, 28],
        [{ command: CMD.WRITE, offset: 2 ** 53 - 1, payload: Buffer.alloc(4096) }, 28],
        [{ command: CMD.ZERO, offset: size - 1, length: 2 }, 28],
        [{ command: CMD.TRIM, offset: size - 1, length: 2 }, 22],
        [{ command: CMD.READ, offset: 10, length: 0 }, 22],
        [{ command: CMD.TRIM, offset: 10, length: 0 }, 22],
        [{ command: CMD.READ, offset: 0, length: 1, flags: FLAG.NO_HOLE }, 22],
        [{ command: CMD.WRITE, offset: 0, payload: Buffer.alloc(9), flags: FLAG.FAST_ZERO }, 22],
        [{ command: CMD.FLUSH, offset: 1 }, 22],
        [{ command: 8, offset: 0, length: 1 }, 22],
        [{ command: 0xffff, offset: 0, length: 1 }, 22],
      ]
      if (mode === 'simple') cases.push([{ command: CMD.STATUS, offset: 0, length: 1 }, 22])
      if (mode !== 'simple') cases.push([{ command: CMD.STATUS, offset: 0, length: size + 1 }, 22])
      for (const [request, errno] of cases) {
        expect(
          (await client.request(request)).errno,
          JSON.stringify({ ...request, payload: undefined }),
        ).toBe(errno)
      }
      expect((await client.read(size - 1, 1)).length).toBe(1)
      const { errors, upcalls } = rig.datapath.exportCounters(rig.exportId)
      expect({ errors, upcalls }).toEqual({ errors: cases.length, upcalls: 0 })
      expect(rig.memberTotals()).toMatchObject({ reads: 0, writes: 0 })
    })

    it('refuses a read above the largest payload', async () => {
      const rig = await Rig.open(implementation, { chunkSize: 2 ** 20 })
      const client = await rig.connect(mode)
      const reply = await client.request({ command: CMD.READ, offset: 0, length: 2 ** 25 + 1 })
      expect(reply.errno).toBe(mode === 'simple' ? 22 : 75)
      expect((await client.read(0, 10)).length).toBe(10)
    })

    it.each([
      ['zeros', Buffer.alloc(200)],
      ['ones', Buffer.alloc(200, 0xff)],
      ['text', Buffer.from('GET / HTTP/1.1\r\nHost: example\r\n\r\n'.repeat(4))],
      ['the magic of another mode', wrongMagic(mode)],
    ])('ends a session that sends %s', async (_what, garbage) => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const client = await rig.connect(mode)
      const other = await rig.connect(mode)
      const before = client.request({ command: CMD.READ, offset: 0, length: 4096 })
      client.socket.write(garbage)
      expect((await before).errno).toBe(0) // what came before it is answered
      await within(client.closed, 'the end of the session')
      await until(() => client.ends.length > 0, 'onClose')
      expect(client.ends).toEqual(['protocol'])
      expect((await other.read(0, 10)).length).toBe(10)
      expect(rig.datapath.sessionCount(rig.exportId)).toBe(1)
    })

    it('ends after a disconnect, when what came before it is answered', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.hold()
      const client = await rig.connect(mode)
      const flushed = client.request({ command: CMD.FLUSH })
      const read = client.request({ command: CMD.READ, offset: 0, length: 100_000 })
      client.socket.write(encodeRequest({ command: CMD.DISC }, mode))
      client.socket.write(encodeRequest({ command: CMD.TRIM, offset: 0, length: 4096 }, mode)) // nobody hears it
      const upcall = await rig.policy.next('sync')
      await read
      expect(await isPending(client.closed)).toBe(true)
      expect(client.ends).toEqual([])
      rig.datapath.complete(upcall.id, 0)
      expect((await flushed).errno).toBe(0)
      await within(client.closed, 'the end of the session')
      await until(() => client.ends.length > 0, 'onClose')
      expect(client.ends).toEqual(['disconnect'])
      expect(rig.datapath.sessionCount(rig.exportId)).toBe(0)
      expect(rig.policy.held).toEqual([])
    })

    it('answers a client that has closed its sending half', async () => {
      const rig = await Rig.open(implementation)
      rig.policy.hold()
      const client = await rig.connect(mode)
      const flushed = client.prepare({ command: CMD.FLUSH })
      const read = client.prepare({ command: CMD.READ, offset: 0, length: 1_00_000 })
      client.socket.end(Buffer.concat([flushed.bytes, read.bytes]))
      const upcall = await rig.policy.next('sync')
      rig.datapath.complete(upcall.id, 0)
      expect((await flushed.reply).errno).toBe(0)
      expect((await read.reply).errno).toBe(0)
      await until(() => client.ends.length > 0, 'onClose')
      expect(client.ends).toEqual(['hangup'])
    })

    it('survives hang-ups everywhere in a stream of requests', async () => {
      const rig = await Rig.open(implementation)
      rig.formatAll()
      const stream = Buffer.concat(
        requests().map(({ request }, index) => encodeRequest(request, mode, BigInt(index))),
      )
      const clients: RigClient[] = []
      for (let cut = 0; cut < stream.length; cut += 3) {
        const client = await rig.connect(mode, { contexts: mode === 'simple' ? [] : [3] })
        // It knows all the cookies, so whatever it still hears is fine.
        for (let index = 0; index < 20; index++) client.prepare({ command: CMD.FLUSH, cookie: BigInt(index) })
        client.socket.write(stream.subarray(0, cut), () => client.destroy())
        clients.push(client)
      }
      await until(() => clients.every(({ ends }) => ends.length > 0), 'every onClose')
      for (const { ends } of clients) expect(ends).toEqual(['hangup'])
      expect(rig.datapath.sessionCount(rig.exportId)).toBe(0)
    })
  })

  it('ends a session in mid-payload with upcalls outstanding, and waits for them', async () => {
    const rig = await Rig.open(implementation)
    rig.policy.hold()
    const client = await rig.connect('structured')
    client.request({ command: CMD.WRITE, offset: 8192, payload: pattern(5000, 1) }).catch(() => {})
    client.request({ command: CMD.TRIM, offset: 0, length: 4096 }).catch(() => {})
    const half = encodeRequest({ command: CMD.WRITE, offset: 0, payload: pattern(100_000) }, 'structured')
    client.socket.write(half.subarray(0, 60_000))
    const write = await rig.policy.next('write')
    const trim = await rig.policy.next('trim')
    client.destroy()
    await client.closed
    // The payload is still there for the policy, and both want their answer.
    await rig.datapath.formatUnit({ export: rig.exportId, stripe: 2, slots: [7], overlays: [write.id] })
    expect(rig.slotBytes(7).equals(pattern(5000, 1).subarray(0, 4096))).toBe(true)
    rig.datapath.complete(write.id, 0)
    rig.datapath.complete(trim.id, 5)
    await until(() => client.ends.length > 0, 'onClose')
    expect(client.ends).toEqual(['hangup'])
    expect(rig.datapath.sessionCount(rig.exportId)).toBe(0)
    expect(rig.policy.held).toEqual([]) // the half request never became one
    expect(() => rig.datapath.complete(write.id, 0)).toThrow()
  })

  it('ends a session that announces an endless payload', async () => {
    const rig = await Rig.open(implementation)
    const header = Buffer.alloc(32)
    header.writeUInt32BE(0x21e41c71, 0)
    header.writeUInt16BE(FLAG.PAYLOAD_LEN, 4)
    header.writeUInt16BE(CMD.WRITE, 6)
    header.writeBigUInt64BE(2n ** 63n, 24)
    const client = await rig.connect('extended')
    client.socket.write(header)
    await within(client.closed, 'the end of the session')
    await until(() => client.ends.length > 0, 'onClose')
    expect(client.ends).toEqual(['protocol'])
  })

  it('skips the payload of every refused extended request', async () => {
    const rig = await Rig.open(implementation)
    const client = await rig.connect('extended', { contexts: [1] })
    for (const command of [CMD.READ, CMD.FLUSH, CMD.TRIM, CMD.CACHE, CMD.ZERO, 99]) {
      const reply = await client.request({ command, offset: 0, payload: pattern(70_000) })
      expect(reply.errno).toBe(22)
    }
    // A write without the flag has no payload, and a length that means nothing.
    expect((await client.request({ command: CMD.WRITE, offset: 0, length: 4096 })).errno).toBe(22)
    expect((await client.read(0, 10)).length).toBe(10)
    expect(rig.policy.seen).toEqual([])
  })
})

function wrongMagic(mode: ReplyMode): Buffer {
  const other = mode === 'extended' ? 'simple' : 'extended'
  return encodeRequest({ command: CMD.READ, offset: 0, length: 512 }, other)
}
