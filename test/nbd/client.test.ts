import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { describe, expect, it, onTestFinished } from 'vitest'
import { ProtocolError, StoreError, UserError } from '../../src/base/errors.ts'
import { describeNbdExport, listNbdExports, NbdClient, type NbdClientOptions } from '../../src/nbd/client.ts'
import {
  CHUNK,
  COMMAND,
  COMMAND_FLAG,
  OPTION,
  OPTION_REPLY,
  type ReplyMode,
} from '../../src/nbd/constants.ts'
import { NBD_ERRNO } from '../../src/nbd/errno.ts'
import { encodeGreeting, encodeOptionReply } from '../../src/nbd/handshake.ts'
import { type ExportCatalog, Negotiation } from '../../src/nbd/negotiation.ts'
import {
  decodeRequest,
  type Request,
  requestHeaderSize,
  writeChunkHeader,
  writeDataChunkPrefix,
  writeHoleChunk,
  writeNoneChunk,
  writePlainReply,
  writeSimpleReply,
  writeStatusChunk,
} from '../../src/nbd/transmission.ts'
import { hasProgram, startNbdkit, startQemuNbd, startScripted, temporaryDirectory } from './servers.ts'

const MiB = 1024 * 1024

async function connect(uri: string, options?: NbdClientOptions): Promise<NbdClient> {
  const client = await NbdClient.connect(uri, options)
  onTestFinished(() => client.close())
  return client
}

async function failure(promise: Promise<unknown>): Promise<unknown> {
  try {
    await promise
  } catch (error) {
    return error
  }
  throw new Error('it succeeded')
}

describe.skipIf(!hasProgram('nbdkit'))('against nbdkit', () => {
  for (const mode of ['simple', 'structured', 'extended'] as const) {
    it(`reads back what it wrote, asking for ${mode}`, async () => {
      const server = await startNbdkit('memory', '64M')
      const client = await connect(server.uri(), { mode })
      expect(client.size).toBe(64 * MiB)
      // This nbdkit knows no extended headers: the client takes what is second best.
      expect(client.export.mode).toBe(mode === 'simple' ? 'simple' : 'structured')
      const content = randomBytes(3 * MiB + 17)
      await client.write(content, 12345)
      const back = Buffer.alloc(content.length, 0xee)
      await client.read(back, 12345)
      expect(back.equals(content)).toBe(true)
      const around = Buffer.alloc(2, 0xee)
      await client.read(around, 12344)
      expect(around.equals(Buffer.from([0, content[0] ?? 0]))).toBe(true)
    })
  }

  it('cuts long reads and writes into what the server takes', async () => {
    const server = await startNbdkit(
      'memory',
      '128M',
      '--filter=blocksize-policy',
      'blocksize-maximum=1M',
      'blocksize-error-policy=error',
    )
    const client = await connect(server.uri())
    expect(client.payloadMax).toBe(MiB)
    const content = randomBytes(70 * MiB + 1)
    await client.write(content, 1)
    const back = Buffer.alloc(content.length)
    await client.read(back, 1)
    expect(back.equals(content)).toBe(true)
  })

  it('keeps many requests in flight and matches their replies', async () => {
    const server = await startNbdkit('memory', '16M', '--filter=delay', 'rdelay=200ms', '-t', '16')
    const client = await connect(server.uri(), { inFlightMax: 16 })
    const content = randomBytes(16 * MiB)
    await client.write(content, 0)
    const start = performance.now()
    const reads = Array.from({ length: 64 }, async (_, i) => {
      const target = Buffer.alloc(4096)
      await client.read(target, i * 8192)
      expect(target.equals(content.subarray(i * 8192, i * 8192 + 4096))).toBe(true)
    })
    await Promise.all(reads)
    expect(performance.now() - start).toBeLessThan(64 * 200) // one after the other would take that long; together, a sixteenth
  })

  it('maps extents, trims and zeroes', async () => {
    const server = await startNbdkit('memory', '1G')
    const client = await connect(server.uri())
    const extents = async () => {
      const found: [number, number, number][] = []
      for await (const extent of client.extents(0, client.size))
        found.push([extent.offset, extent.length, extent.flags])
      return found
    }
    expect(await extents()).toEqual([[0, 1024 * MiB, 3]])
    await client.write(Buffer.alloc(MiB, 1), 512 * MiB)
    expect(await extents()).toEqual([
      [0, 512 * MiB, 3],
      [512 * MiB, MiB, 0],
      [513 * MiB, 511 * MiB, 3],
    ])
    await client.zero({ offset: 512 * MiB, length: MiB / 2 }, { durable: true })
    await client.trim({ offset: 512 * MiB + MiB / 2, length: MiB / 2 })
    await client.flush()
    await client.cache({ offset: 0, length: MiB })
    expect(await extents()).toEqual([[0, 1024 * MiB, 3]])
    const one = await client.blockStatus({ offset: 4096, length: 8192 }, { one: true })
    expect(one.get('base:allocation')).toEqual([{ length: 8192, flags: 3 }])
  })

  it('turns error replies into StoreErrors and goes on', async () => {
    const server = await startNbdkit(
      '--filter=error',
      'memory',
      '1M',
      'error-pread=ENOSPC',
      'error-pread-rate=100%',
    )
    for (const mode of ['simple', 'structured'] as const) {
      const client = await connect(server.uri(), { mode })
      const error = await failure(client.read(Buffer.alloc(512), 512))
      expect(error).toBeInstanceOf(StoreError)
      expect(error).toMatchObject({
        code: 'NO_SPACE',
        message: expect.stringMatching(/read of 512 bytes at 512/),
      })
      await client.write(Buffer.alloc(512), 0)
    }
  })

  it('refuses to write to a read-only export', async () => {
    const server = await startNbdkit('-r', 'memory', '1M')
    const client = await connect(server.uri())
    expect(client.readOnly).toBe(true)
    expect(await failure(client.write(Buffer.alloc(1), 0))).toMatchObject({ code: 'READ_ONLY' })
  })

  it('sends exactly what a tool wants to send', async () => {
    const server = await startNbdkit('memory', '1M')
    const client = await connect(server.uri())
    expect(await client.raw({ command: COMMAND.READ, offset: MiB, length: 1 })).toMatchObject({
      errno: NBD_ERRNO.EINVAL,
    })
    const past = { command: COMMAND.WRITE, offset: MiB - 1, length: 2, payload: Buffer.alloc(2) }
    expect(await client.raw(past)).toMatchObject({ errno: NBD_ERRNO.ENOSPC })
    expect(await client.raw({ command: 77 })).toMatchObject({ errno: NBD_ERRNO.EINVAL })
    expect(await client.raw({ command: COMMAND.FLUSH })).toMatchObject({ errno: 0 })
  })

  it('checks ranges before it sends anything', async () => {
    const server = await startNbdkit('memory', '1M')
    const client = await connect(server.uri())
    for (const offset of [-1, MiB, MiB - 1]) {
      expect(await failure(client.read(Buffer.alloc(2), offset))).toMatchObject({ code: 'INVALID' })
    }
  })

  it('lists and describes exports', async () => {
    const server = await startNbdkit(
      '--filter=exportname',
      'memory',
      '1M',
      'exportname=one',
      'exportname=zwölf',
      'exportname-list=explicit',
      'exportdesc=fixed:some words',
    )
    expect(await listNbdExports(server.uri())).toEqual([
      { name: 'one', description: 'some words' },
      { name: 'zwölf', description: 'some words' },
    ])
    const described = await describeNbdExport(server.uri('zwölf'))
    expect(described).toMatchObject({ size: MiB, description: 'some words', mode: 'structured' })
    expect(described.contexts.map((context) => context.name)).toEqual(['base:allocation'])
  })

  it('says that an export does not exist', async () => {
    const server = await startNbdkit(
      '--filter=exportname',
      'memory',
      '1M',
      'exportname=one',
      'exportname-strict=true',
    )
    const error = await failure(NbdClient.connect(server.uri('two')))
    expect(error).toBeInstanceOf(UserError)
    expect(error).toMatchObject({ code: 'NOT_FOUND', message: expect.stringContaining('"two"') })
    await connect(server.uri('one'))
  })

  it('falls back to EXPORT_NAME, with and without newstyle, and refuses oldstyle', async () => {
    for (const mask of ['0', '1', '2']) {
      const server = await startNbdkit(`--mask-handshake=${mask}`, 'memory', '1M')
      const client = await connect(server.uri())
      expect(client.export.mode).toBe(mask === '1' ? 'structured' : 'simple')
      await client.write(Buffer.from('abc'), 0)
      const back = Buffer.alloc(3)
      await client.read(back, 0)
      expect(back.toString()).toBe('abc')
    }
    const old = await startNbdkit('-o', 'memory', '1M')
    expect(await failure(NbdClient.connect(old.uri()))).toBeInstanceOf(ProtocolError)
  })

  it('closes softly: what was started is finished', async () => {
    const image = join(temporaryDirectory(), 'image')
    writeFileSync(image, '')
    truncateSync(image, MiB)
    const server = await startNbdkit('file', image)
    const client = await connect(server.uri(), { inFlightMax: 2 })
    const content = randomBytes(MiB)
    const writes = Array.from({ length: 32 }, (_, i) =>
      client.write(content.subarray(i * 32768, (i + 1) * 32768), i * 32768),
    )
    await client.close()
    await Promise.all(writes)
    expect(readFileSync(image).equals(content)).toBe(true)
  })

  it('drops the connection when told to', async () => {
    const server = await startNbdkit('memory', '1M', '--filter=delay', 'rdelay=10')
    const client = await connect(server.uri())
    const read = failure(client.read(Buffer.alloc(512), 0))
    client.destroy()
    expect(await read).toMatchObject({ code: 'MEMBER_IO' })
    await client.gone
    await client.close()
  })

  it('rejects everything when the server dies', async () => {
    const server = await startNbdkit('memory', '1M', '--filter=delay', 'rdelay=10')
    const client = await connect(server.uri(), { inFlightMax: 2 })
    const reads = Array.from({ length: 5 }, () => failure(client.read(Buffer.alloc(512), 0)))
    server.process.kill('SIGKILL')
    for (const error of await Promise.all(reads)) expect(error).toMatchObject({ code: 'MEMBER_IO' })
    await client.gone
    expect(await failure(client.flush())).toMatchObject({ code: 'MEMBER_IO' })
  })
})

describe.skipIf(!hasProgram('qemu-nbd'))('against qemu-nbd', () => {
  it('reads, writes, zeroes and maps a qcow2 image', async () => {
    const image = join(temporaryDirectory(), 'image.qcow2')
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', image, '1G'])
    const server = await startQemuNbd('-f', 'qcow2', '--discard=unmap', '-x', 'disk', '-D', 'a disk', image)
    expect(await listNbdExports(server.uri())).toEqual([{ name: 'disk', description: 'a disk' }])
    const client = await connect(server.uri('disk'))
    expect(client.export).toMatchObject({ size: 1024 * MiB, name: 'disk', description: 'a disk' })
    const content = randomBytes(5 * MiB)
    await client.write(content, 100 * MiB, { durable: true })
    const back = Buffer.alloc(content.length)
    await client.read(back, 100 * MiB)
    expect(back.equals(content)).toBe(true)
    await client.zero({ offset: 101 * MiB, length: MiB }, { release: true })
    await client.flush()
    const zeroed = Buffer.alloc(3 * MiB)
    await client.read(zeroed, 100 * MiB)
    expect(
      zeroed.equals(
        Buffer.concat([content.subarray(0, MiB), Buffer.alloc(MiB), content.subarray(2 * MiB, 3 * MiB)]),
      ),
    ).toBe(true)
    const extents: [number, number, boolean][] = []
    for await (const extent of client.extents(0, client.size)) {
      extents.push([extent.offset / MiB, extent.length / MiB, (extent.flags & 2) !== 0])
    }
    expect(extents).toEqual([
      [0, 100, true],
      [100, 1, false],
      [101, 1, true],
      [102, 3, false],
      [105, 919, true],
    ])
    expect((await describeNbdExport(server.uri('disk'))).contexts.map((c) => c.name)).toContain(
      'base:allocation',
    )
    expect(await failure(NbdClient.connect(server.uri('nobody')))).toMatchObject({ code: 'NOT_FOUND' })
  })
})

// ---------------------------------------------------------------------------------- servers that misbehave

const CATALOG: ExportCatalog = {
  list: () => [{ name: 'disk', description: '' }],
  find: () => ({
    name: 'disk',
    description: '',
    size: MiB,
    readOnly: false,
    canMultiConn: true,
    contexts: [
      { id: 5, name: 'base:allocation' },
      { id: 6, name: 'fullstripe:init' },
    ],
  }),
}

/** Negotiates honestly, then answers each request with what `answer` makes. */
async function startLiar(answer: (request: Request, mode: ReplyMode) => Buffer | 'hang up'): Promise<string> {
  return await startScripted((socket) => {
    const negotiation = new Negotiation(CATALOG)
    let mode: ReplyMode | undefined
    let pending: Buffer = Buffer.alloc(0)
    socket.write(negotiation.takeOutput())
    socket.on('data', (chunk) => {
      if (mode === undefined) {
        const outcome = negotiation.receive(chunk)
        socket.write(negotiation.takeOutput())
        if (outcome?.kind !== 'transmission') return
        mode = outcome.mode
        pending = outcome.leftover
      } else {
        pending = Buffer.concat([pending, chunk])
      }
      const extended = mode === 'extended'
      const size = requestHeaderSize(extended)
      while (pending.length >= size) {
        const request = decodeRequest(pending, extended)
        if (pending.length < size + request.payloadLength) return
        pending = pending.subarray(size + request.payloadLength)
        const bytes = answer(request, mode)
        if (bytes === 'hang up') socket.destroy()
        else socket.write(bytes)
      }
    })
  })
}

function bytes(write: (target: Buffer) => number): Buffer {
  const target = Buffer.alloc(4096)
  return target.subarray(0, write(target))
}

/** A data chunk of `length` letters at `offset`. */
const data = (to: Request, extended: boolean, done: boolean, offset: number, length: number) =>
  Buffer.concat([
    bytes((t) => writeDataChunkPrefix(t, 0, to, extended, done, offset, length)),
    Buffer.alloc(length, 97),
  ])

describe('against a server that breaks the protocol', () => {
  const read = (client: NbdClient) => client.read(Buffer.alloc(1000), 2000)
  const status = (client: NbdClient) => client.blockStatus({ offset: 0, length: 4096 })
  const otherCookie = (request: Request) => ({ ...request, cookieLow: request.cookieLow + 1 })
  const cases: [string, (client: NbdClient) => Promise<unknown>, ReplyMode, (request: Request) => Buffer][] =
    [
      [
        'a reply that nobody waits for',
        read,
        'structured',
        (r) => data(otherCookie(r), false, true, 2000, 1000),
      ],
      ['data before the range', read, 'structured', (r) => data(r, false, true, 1999, 1000)],
      ['data past the range', read, 'extended', (r) => data(r, true, true, 2000, 1001)],
      [
        'data twice',
        read,
        'extended',
        (r) => Buffer.concat([data(r, true, false, 2000, 600), data(r, true, true, 2400, 600)]),
      ],
      [
        'data inside of data',
        read,
        'extended',
        (r) => Buffer.concat([data(r, true, false, 2500, 100), data(r, true, true, 2000, 1000)]),
      ],
      [
        'data that overlaps what came before',
        read,
        'extended',
        (r) => Buffer.concat([data(r, true, false, 2000, 600), data(r, true, true, 2400, 400)]),
      ],
      [
        'data that overlaps what comes after',
        read,
        'extended',
        (r) => Buffer.concat([data(r, true, false, 2400, 600), data(r, true, true, 2100, 400)]),
      ],
      ['too little data', read, 'structured', (r) => data(r, false, true, 2000, 999)],
      ['success without data', read, 'structured', (r) => bytes((t) => writeNoneChunk(t, 0, r, false))],
      [
        'a hole past the range',
        read,
        'structured',
        (r) => bytes((t) => writeHoleChunk(t, 0, r, false, true, 2000, 2 ** 31)),
      ],
      ['a simple reply to a read', read, 'structured', (r) => bytes((t) => writeSimpleReply(t, 0, r, 0))],
      ['data for a flush', (c) => c.flush(), 'structured', (r) => data(r, false, true, 0, 1)],
      [
        'a status for a read',
        read,
        'structured',
        (r) => bytes((t) => writeStatusChunk(t, 0, r, false, true, 5, [{ length: 1, flags: 0 }])),
      ],
      [
        'an error chunk without an error',
        read,
        'structured',
        (r) =>
          Buffer.concat([
            bytes((t) => writeChunkHeader(t, 0, r, false, true, CHUNK.ERROR, 6)),
            Buffer.alloc(6),
          ]),
      ],
      ['no status', status, 'extended', (r) => bytes((t) => writeNoneChunk(t, 0, r, true))],
      [
        'a status of another context',
        status,
        'extended',
        (r) => bytes((t) => writeStatusChunk(t, 0, r, true, true, 6, [{ length: 1, flags: 0 }])),
      ],
      ['garbage', read, 'extended', () => Buffer.alloc(64, 0x77)],
    ]
  for (const [what, act, mode, answer] of cases) {
    it(`ends the connection over ${what}`, async () => {
      const uri = await startLiar(answer)
      const client = await connect(uri, { mode })
      const error = await failure(act(client))
      expect(error).toBeInstanceOf(ProtocolError)
      expect(error).toMatchObject({ message: expect.stringContaining(uri.slice(-20)) })
      await client.gone
      expect(await failure(client.flush())).toBe(error)
    })
  }

  it('reports a lost connection', async () => {
    const client = await connect(await startLiar(() => 'hang up'))
    expect(await failure(client.read(Buffer.alloc(10), 0))).toMatchObject({ code: 'MEMBER_IO' })
  })

  it('puts chunks in any order into place', async () => {
    const uri = await startLiar((r) =>
      Buffer.concat([
        data(r, true, false, 2700, 300),
        bytes((t) => writeHoleChunk(t, 0, r, true, false, 2100, 600)),
        data(r, true, true, 2000, 100),
      ]),
    )
    const client = await connect(uri)
    const target = Buffer.alloc(1000, 0xee)
    await client.read(target, 2000)
    expect(target.toString('latin1')).toBe(`${'a'.repeat(100)}${'\0'.repeat(600)}${'a'.repeat(300)}`)
  })

  it('treats an unknown error as INVALID and repeats the words of the server', async () => {
    const client = await connect(
      await startLiar((r, mode) => bytes((t) => writePlainReply(t, 0, r, mode, 4711))),
    )
    expect(await failure(client.flush())).toMatchObject({
      code: 'INVALID',
      message: expect.stringContaining('4711'),
    })
  })

  it('asks for one context only where the server can filter', async () => {
    const seen: Request[] = []
    const uri = await startLiar((r) => {
      seen.push(r)
      return bytes((t) => writeStatusChunk(t, 0, r, true, true, 6, [{ length: 2 ** 40, flags: 1 }]))
    })
    const client = await connect(uri, {
      contexts: ['base:allocation', 'fullstripe:init', 'x-nobody:has-this'],
    })
    expect(client.export.contexts.map((context) => context.id)).toEqual([5, 6])
    const answer = await client.blockStatus({ offset: 512, length: 1024 }, { contexts: ['fullstripe:init'] })
    expect([...answer]).toEqual([['fullstripe:init', [{ length: 2 ** 40, flags: 1 }]]])
    expect(seen[0]).toMatchObject({ flags: COMMAND_FLAG.PAYLOAD_LEN, offset: 512, payloadLength: 12 })
  })

  const greeting = encodeGreeting(3)
  const ack = encodeOptionReply(OPTION.EXTENDED_HEADERS, OPTION_REPLY.ACK)
  for (const [what, script, expected] of [
    ['another protocol', Buffer.from('SSH-2.0-OpenSSH_9.2p1 Debian\r\n'), ProtocolError],
    ['garbage after the greeting', Buffer.concat([greeting, Buffer.alloc(100, 1)]), ProtocolError],
    [
      'a reply to another option',
      Buffer.concat([greeting, encodeOptionReply(OPTION.LIST, OPTION_REPLY.ACK)]),
      ProtocolError,
    ],
    [
      'an endless reply',
      Buffer.concat([greeting, ack, encodeOptionReply(OPTION.SET_META_CONTEXT, 4, Buffer.alloc(1e5))]),
      ProtocolError,
    ],
    [
      'a demand for TLS',
      Buffer.concat([greeting, encodeOptionReply(OPTION.EXTENDED_HEADERS, OPTION_REPLY.ERR_TLS_REQD)]),
      UserError,
    ],
    [
      'a shutdown',
      Buffer.concat([greeting, encodeOptionReply(OPTION.EXTENDED_HEADERS, OPTION_REPLY.ERR_SHUTDOWN)]),
      UserError,
    ],
  ] as const) {
    it(`gives up in the handshake over ${what}`, async () => {
      const uri = await startScripted((socket) => socket.write(script))
      expect(await failure(NbdClient.connect(uri))).toBeInstanceOf(expected)
    })
  }

  it('gives up when the server hangs up during the handshake', async () => {
    for (const cut of [0, 5, 18, 30]) {
      const uri = await startScripted((socket) => socket.end(Buffer.concat([greeting, ack]).subarray(0, cut)))
      expect(await failure(NbdClient.connect(uri))).toMatchObject({ code: 'UNREACHABLE' })
    }
  })

  it('gives up on a server that says nothing', async () => {
    const uri = await startScripted(() => undefined)
    const error = await failure(NbdClient.connect(uri, { handshakeMsMax: 50 }))
    expect(error).toMatchObject({ code: 'UNREACHABLE', message: expect.stringContaining('50 ms') })
  })
})

describe('where nobody listens', () => {
  it('says so', async () => {
    const path = join(temporaryDirectory(), 'nobody.sock')
    expect(await failure(NbdClient.connect(`nbd+unix:///?socket=${path}`))).toMatchObject({
      code: 'UNREACHABLE',
    })
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as AddressInfo
    await new Promise((resolve) => server.close(resolve))
    expect(await failure(listNbdExports(`nbd://127.0.0.1:${port}`))).toMatchObject({ code: 'UNREACHABLE' })
  })

  it('refuses what it cannot do', async () => {
    expect(await failure(NbdClient.connect('nbds://127.0.0.1'))).toMatchObject({ code: 'REFUSED' })
    expect(await failure(NbdClient.connect('nbd://127.0.0.1:0'))).toMatchObject({ code: 'USAGE' })
    expect(await failure(NbdClient.connect(`nbd+unix:///?socket=/${'x'.repeat(120)}`))).toMatchObject({
      code: 'USAGE',
    })
  })
})
