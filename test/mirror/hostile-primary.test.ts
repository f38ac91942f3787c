import { afterEach, describe, expect, it, vi } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import type { Channel, Message } from '../../src/link/channel.ts'
import type { LinkClient } from '../../src/link/client.ts'
import { Session } from '../../src/link/session.ts'
import { ask } from '../../src/mirror/asks.ts'
import {
  CHANNELS,
  encodeOperations,
  encodeRanges,
  json,
  MESSAGE,
  type PutHeader,
  putHeader,
  readRemoteHello,
} from '../../src/mirror/protocol.ts'
import type { RemoteHello } from '../../src/mirror/remote.ts'
import { checkPool } from '../../src/volume/check.ts'
import { connect } from '../link/pair.ts'
import { CommitGate, failingCommits, Gate } from '../support/faults.ts'
import { Side } from '../support/mirror-pair.ts'
import { until, within } from '../support/poll.ts'
import { sectorData } from '../support/sector-data.ts'
import { DATAPATHS } from '../support/volumes.ts'
import { SMALL_POOL } from './versions.ts'

/**
 * A primary that is who it says it is, and says what no honest one says: its session ends, or it gets an error. The daemon, its other volumes
 * and its pool are as before, and the mirror goes on in the next session.
 */
const UNIT = 4096
const UNITS = 64
const SIZE = UNITS * UNIT
const GENERATION = { current: 'g', history: [] }
const DATAPATH = DATAPATHS.at(-1) ?? 'portable'

/** The messages of a primary, in any order that a test likes. */
class Hostile {
  readonly side: Side
  size = SIZE
  cycle = 0
  #client: LinkClient | undefined
  #sessions: Session[] = []
  #control: Channel | undefined
  #data: Channel | undefined

  constructor(side: Side) {
    this.side = side
  }

  get session(): Session {
    const session = this.#sessions.at(-1)
    if (session === undefined) throw new Error('there is no session')
    return session
  }
  get control(): Channel {
    if (this.#control === undefined) throw new Error('there is no channel')
    return this.#control
  }
  get data(): Channel {
    if (this.#data === undefined) throw new Error('there is no channel')
    return this.#data
  }

  async connect(): Promise<void> {
    this.#client = connect(this.side.port, {
      capabilities: [{ name: 'mirror-1', required: true }],
      purpose: 'mirror',
      connections: 1,
      retryMs: { min: 1, max: 1 },
      onSession: (session) => this.#sessions.push(session),
    })
    await until(() => this.#sessions.length > 0, 'a session')
  }

  async close(): Promise<void> {
    await this.#client?.close()
  }

  async create(): Promise<void> {
    await ask(this.session, 'create', {
      relation: 'r',
      from: 'data',
      volume: 'data',
      size: this.size,
      unitBytes: UNIT,
      fill: 0,
      mode: 'async',
      init: 'full',
      intervalMs: 1000,
      onLoss: 'continue',
    })
  }

  async open(): Promise<void> {
    await this.openControl()
    this.#data = await this.openData()
  }

  async openControl(): Promise<void> {
    this.#control = await this.session.open(CHANNELS.control, { relation: 'r' })
    this.#control.onMessage(() => {})
  }

  async openData(): Promise<Channel> {
    const options = { bulk: true, ordered: false, window: LIMITS.mirrorDataWindow }
    const data = await this.session.open(CHANNELS.data, { relation: 'r' }, options)
    data.onMessage(() => {})
    return data
  }

  /** Other channels, in another session where the last one has ended. */
  async again(): Promise<RemoteHello> {
    await until(() => this.session.endReason === undefined, 'another session')
    await this.open()
    return this.hello()
  }

  async hello(change: object = {}): Promise<RemoteHello> {
    const hello = {
      generation: GENERATION,
      base: 'g',
      cycle: this.cycle,
      size: this.size,
      initialized: true,
      changed: 0,
      mode: 'async',
      intervalMs: 1000,
      onLoss: 'continue',
      unitBytes: UNIT,
      ...change,
    }
    return readRemoteHello((await this.control.request(MESSAGE.hello, json(hello))).payload)
  }

  put(offset: number, content: Buffer, header: Partial<PutHeader> = {}): Promise<Message> {
    const head = putHeader({ offset, unit: offset, length: content.length, ...header })
    return this.data.request(MESSAGE.put, [head, content])
  }

  hole(...ranges: { offset: number; length: number }[]): Promise<Message> {
    return this.data.request(MESSAGE.hole, encodeRanges(ranges))
  }

  commit(change: object = {}): Promise<Message> {
    const info = { cycle: ++this.cycle, consistent: true, generation: GENERATION, size: this.size }
    return this.control.request(MESSAGE.commit, json({ ...info, follow: false, ...change }))
  }

  operation(offset: number, content: Buffer): Promise<void> {
    const head = { id: 1, kind: 'write', flags: 0, offset, length: content.length } as const
    return this.control.send(MESSAGE.operations, [encodeOperations([head]), content])
  }

  /** Everything, as an honest primary would. */
  async fill(content: Buffer): Promise<void> {
    for (let at = 0; at < content.length; at += 16 * UNIT)
      await this.put(at, content.subarray(at, at + 16 * UNIT))
    await this.commit()
  }

  /** Sends and is told that it makes no sense. */
  async refused(send: () => Promise<unknown>, what = 'it'): Promise<void> {
    const { session } = this
    const fail = vi.spyOn(Session.prototype, 'fail')
    const sent = Promise.allSettled([send()])
    await within(session.ended, `the session ends by ${what}`)
    expect(
      fail.mock.calls.map(([{ code }]) => code),
      what,
    ).toEqual(['BAD_FRAME'])
    fail.mockRestore()
    await sent
  }
}

const cleanups: (() => Promise<void>)[] = []
const gates: { open(): void }[] = []
afterEach(async () => {
  for (const gate of gates.splice(0)) gate.open()
  vi.restoreAllMocks()
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup()
})

function held<T extends { open(): void }>(gate: T): T {
  gates.push(gate)
  return gate
}

const here = (token: bigint, size = SIZE): Buffer => sectorData(token, 0, size)

/** A secondary with a first commit in it, and another volume with content. */
async function prepared() {
  const side = await Side.create({ datapath: DATAPATH, pool: SMALL_POOL })
  cleanups.push(() => side.destroy())
  await side.pool.createVolume({ name: 'other', size: SIZE })
  const client = await side.connect('other')
  const other = here(77n)
  await client.write(other.subarray(0, SIZE / 2), 0)
  const hostile = new Hostile(side)
  await hostile.connect()
  cleanups.push(() => hostile.close())
  await hostile.create()
  await hostile.open()
  await hostile.hello()
  await hostile.fill(here(1n))

  /** `content` is what the mirror has. Slots with two owners would be seen by the other volume, which takes all it can get. */
  const unharmed = async (content: Buffer): Promise<void> => {
    expect((await side.content('data')).equals(content)).toBe(true)
    await client.write(other.subarray(SIZE / 2), SIZE / 2)
    expect((await side.content('data')).equals(content)).toBe(true)
    expect((await side.content('other')).equals(other)).toBe(true)
    await hostile.again()
    await hostile.fill(here(5n))
    expect((await side.content('data')).equals(here(5n))).toBe(true)
    expect((await side.content('other')).equals(other)).toBe(true)
    await side.close()
    const { findings } = await checkPool(side.directory)
    expect(findings.filter(({ severity }) => severity === 'error')).toEqual([])
  }
  return { side, hostile, unharmed }
}

type Attack = readonly [name: string, send: (hostile: Hostile) => Promise<unknown>]

const ATTACKS: readonly Attack[] = [
  ['a put', (hostile) => hostile.put(3 * UNIT, here(3n).subarray(0, UNIT))],
  ['a piece', (hostile) => hostile.put(0, here(3n).subarray(0, UNIT), { length: 2 * UNIT })],
  ['a hole', (hostile) => hostile.hole({ offset: 0, length: SIZE })],
  ['a commit', (hostile) => hostile.commit()],
  [
    'a hand-over',
    (hostile) => {
      const info = { cycle: 9, consistent: true, generation: GENERATION, size: SIZE, follow: false }
      return hostile.control.request(MESSAGE.handOver, json(info))
    },
  ],
  ['a hello', (hostile) => hostile.hello()],
  ['a hello of another size', (hostile) => hostile.hello({ size: SIZE / 2 })],
  ['an operation', (hostile) => hostile.operation(0, here(3n).subarray(0, UNIT))],
]

describe('a primary that does not wait', () => {
  it.each(ATTACKS)('%s while a commit makes the volume quiet', async (_name, send) => {
    const { side, hostile, unharmed } = await prepared()
    await hostile.put(0, here(2n))
    const gate = held(new Gate(side.pool.datapath, 'barrier'))
    const committed = hostile.commit()
    committed.catch(() => {})
    await until(() => gate.held.length > 0, 'the commit is under way')
    await hostile.refused(() => send(hostile))
    gate.open()
    await hostile.again() // answered after it
    await unharmed(here(2n))
  })

  it.each(ATTACKS)('%s while a commit becomes durable', async (_name, send) => {
    const { hostile, unharmed } = await prepared()
    await hostile.put(0, here(2n))
    const gate = held(new CommitGate(({ putMirrors }) => putMirrors !== undefined))
    hostile.commit().catch(() => {})
    await until(() => gate.held.length > 0, 'the commit is under way')
    await hostile.refused(() => send(hostile))
    gate.open()
    await hostile.again()
    await unharmed(here(2n))
  })

  it.each(ATTACKS)('%s while a hello that wants another size is under way', async (_name, send) => {
    const { side, hostile, unharmed } = await prepared()
    await hostile.put(0, here(2n))
    const gate = held(new CommitGate(({ putMirrors }) => putMirrors !== undefined))
    hostile.hello({ mode: 'sync', size: 2 * SIZE }).catch(() => {})
    await until(() => gate.held.length > 0, 'the hello is under way')
    await hostile.refused(() => send(hostile))
    gate.open()
    await hostile.again()
    expect(side.pool.volume('data').size).toBe(SIZE)
    await unharmed(here(1n))
  })

  it('a commit while a put is under way, or a unit has come in part', async () => {
    const { side, hostile, unharmed } = await prepared()
    const gate = held(new Gate(side.pool.datapath, 'formatUnit'))
    hostile.put(0, here(2n)).catch(() => {})
    await until(() => gate.held.length > 0, 'the put is under way')
    await hostile.refused(() => hostile.commit())
    gate.open()
    await hostile.again()
    await hostile.put(0, here(2n).subarray(0, UNIT), { length: 2 * UNIT })
    await hostile.refused(() => hostile.commit())
    await unharmed(here(1n))
  })

  it('anything before a hello', async () => {
    const { hostile, unharmed } = await prepared()
    for (const [name, send] of ATTACKS.filter(([name]) => !name.includes('hello'))) {
      await hostile.open()
      await hostile.refused(() => send(hostile), name)
      await hostile.again()
    }
    await unharmed(here(1n))
  })

  it('staging and commits while operations follow', async () => {
    const { hostile, unharmed } = await prepared()
    for (const [name, send] of ATTACKS.filter(([name]) => !/hello|operation/.test(name))) {
      await hostile.commit({ follow: true })
      await hostile.refused(() => send(hostile), name)
      await hostile.again()
    }
    await unharmed(here(1n))
  })
})

describe('a primary whose session ends in the middle', () => {
  it('its commit is done, and the next hello is answered after it', async () => {
    const { hostile, unharmed } = await prepared()
    await hostile.put(0, here(2n))
    const gate = held(new CommitGate(({ putMirrors }) => putMirrors !== undefined))
    hostile.commit({ follow: true }).catch(() => {})
    await until(() => gate.held.length > 0, 'the commit is under way')
    const { data } = hostile
    await hostile.open() // in the same link session
    const hello = hostile.hello()
    await within(data.ended, 'the channel of the time before')
    gate.open()
    expect(await hello).toMatchObject({ cycle: hostile.cycle, role: 'secondary' })
    await hostile.put(0, here(3n))
    await hostile.commit()
    await unharmed(here(3n))
  })

  it('data without a mirror to talk about', async () => {
    const { side, hostile, unharmed } = await prepared()
    hostile.control.close()
    await until(() => !side.show('data').connected, 'it is noticed')
    const data = await hostile.openData()
    await within(data.ended, 'it is closed')
    await unharmed(here(1n))
  })

  it('a session that begins while the mirror is removed', async () => {
    const { side, hostile } = await prepared()
    const gate = held(new CommitGate(({ dropMirrors }) => dropMirrors !== undefined))
    const removed = side.mirrors.remove('data')
    await until(() => gate.held.length > 0, 'it is being removed')
    await hostile.openControl()
    const { control } = hostile
    const hello = hostile.hello()
    hello.catch(() => {})
    gate.open()
    await removed
    await within(control.ended, 'nobody is there')
    await expect(hello).rejects.toThrow(/the mirror is removed/)
    expect((await side.content('data')).equals(here(1n))).toBe(true)
    await side.close()
    expect((await checkPool(side.directory)).findings).toEqual([])
  })

  it('a session that begins while this side is promoted', async () => {
    const { side, hostile } = await prepared()
    const gate = held(new CommitGate(({ putMirrors }) => putMirrors !== undefined))
    const promoted = side.mirrors.promote('data', undefined, { force: true })
    await until(() => gate.held.length > 0, 'it is being promoted')
    await hostile.open()
    const hello = hostile.hello({ size: SIZE / 2 })
    await hostile.data.request(MESSAGE.bitmap, json({ kind: 'differs', from: 0 }))
    gate.open()
    await promoted
    expect((await hello).role).toBe('primary')
    expect(side.pool.volume('data').size).toBe(SIZE)
    await hostile.refused(() => hostile.put(0, here(2n)))
    expect((await side.content('data')).equals(here(1n))).toBe(true)
  })

  it('a removal that cannot be stored: the peer is told, and the mirror goes on', async () => {
    const { hostile, unharmed } = await prepared()
    const mend = failingCommits(({ dropMirrors }) => dropMirrors !== undefined)
    const asked = ask(hostile.session, 'remove', { relation: 'r' })
    await expect(asked).rejects.toThrow(/the peer says: .*disk full/)
    mend()
    await unharmed(here(1n))
  })
})

describe('a primary that cannot count', () => {
  const two = { unit: 0, length: 2 * UNIT }
  const byte = Buffer.alloc(1)
  const huge = Number.MAX_SAFE_INTEGER
  const operations = (offset: number, length: number, count = 1): Buffer => {
    const heads = Array.from({ length: count }, (_, id) => ({ id, kind: 'write' as const, flags: 0 }))
    return encodeOperations(heads.map((head) => ({ ...head, offset, length })))
  }
  const bitmap = (from: unknown) => (hostile: Hostile) =>
    hostile.data.request(MESSAGE.bitmap, json({ kind: 'realized', from }))

  const attacks: readonly Attack[] = [
    ['a piece that came already', (h) => h.put(0, Buffer.alloc(UNIT), two)],
    ['a piece that is larger than what lacks', (h) => h.put(0, Buffer.alloc(2 * UNIT - 512), two)],
    ['a piece of half a block', (h) => h.put(UNIT, Buffer.alloc(512), two)],
    ['a piece behind its unit', (h) => h.put(2 * UNIT, Buffer.alloc(UNIT), two)],
    ['a piece that reaches past its unit', (h) => h.put(UNIT, Buffer.alloc(2 * UNIT), two)],
    ['a piece before its unit', (h) => h.put(0, Buffer.alloc(UNIT), { unit: UNIT, length: 2 * UNIT })],
    ['a unit of two lengths', (h) => h.put(UNIT, Buffer.alloc(UNIT), { unit: 0, length: 3 * UNIT })],
    ['a put of nothing', (h) => h.put(0, Buffer.alloc(0))],
    ['a put of no length', (h) => h.put(0, byte, { length: 0 })],
    ['a put of half a unit', (h) => h.put(0, Buffer.alloc(512))],
    ['a put beside units', (h) => h.put(512, Buffer.alloc(UNIT))],
    ['a put past the end', (h) => h.put(SIZE, Buffer.alloc(UNIT))],
    ['a put of too much', (h) => h.put(0, byte, { length: SIZE * 1024 })],
    ['a put somewhere far away', (h) => h.put(huge - (huge % UNIT), byte, { length: UNIT })],
    ['a put of a huge length', (h) => h.put(0, byte, { length: huge })],
    ['no hole', (h) => h.hole()],
    ['a hole of no length', (h) => h.hole({ offset: 0, length: 0 })],
    ['a hole past the end', (h) => h.hole({ offset: 0, length: SIZE + UNIT })],
    ['a hole of half a unit', (h) => h.hole({ offset: 0, length: 512 })],
    ['a hole of a huge length', (h) => h.hole({ offset: huge - (huge % UNIT), length: huge })],
    [
      'more holes than a message has',
      (h) => h.hole(...Array.from({ length: 2 ** 20 / UNITS + 1 }, () => ({ offset: 0, length: SIZE }))),
    ],
    [
      'more signatures than an answer holds',
      (h) =>
        h.data.request(
          MESSAGE.signatures,
          encodeRanges(Array.from({ length: 33_281 }, () => ({ offset: 0, length: 1 }))),
        ),
    ],
    [
      'a signature of too much',
      (h) => h.data.request(MESSAGE.signatures, encodeRanges([{ offset: 0, length: huge }])),
    ],
    ['a bitmap from nowhere', bitmap(-1)],
    ['a bitmap from half a unit', bitmap(0.5)],
    ['a bitmap from further than numbers go', bitmap(2 ** 60)],
    ['a hello of no size', (h) => h.hello({ size: 0 })],
    ['a hello of half a byte', (h) => h.hello({ size: 0.5 })],
    ['a hello of more than numbers go', (h) => h.hello({ size: 2 ** 60 })],
    ['a hello of a unit that is none', (h) => h.hello({ unitBytes: -UNIT })],
    ['a commit of another size', (h) => h.commit({ size: 2 * SIZE })],
    ['a commit of a cycle below none', (h) => h.commit({ cycle: -1 })],
    ['operations that are not there', (h) => h.control.send(MESSAGE.operations, operations(0, 1, 4))],
    ['an operation of nothing', (h) => h.control.send(MESSAGE.operations, operations(0, 0))],
    ['an operation of too much', (h) => h.control.send(MESSAGE.operations, operations(0, huge))],
    ['a message of no type', (h) => h.data.request(99, byte)],
  ]

  it('numbers that make no sense end the session', async () => {
    const { hostile, unharmed } = await prepared()
    for (const [name, send] of attacks) {
      if (name.includes('operation')) await hostile.commit({ follow: true })
      else await hostile.put(0, Buffer.alloc(UNIT), two)
      await hostile.refused(() => send(hostile), name)
      await hostile.again()
    }
    await unharmed(here(1n))
  })

  it('a size that no volume has, and pages past the end, get an answer', async () => {
    const { hostile, unharmed } = await prepared()
    await bitmap(huge)(hostile)
    for (const size of [SIZE + 1, huge])
      await expect(hostile.hello({ size })).rejects.toThrow(/the size .* is (not a multiple|beyond)/)
    await expect(hostile.hello({ unitBytes: 2 * UNIT })).rejects.toThrow(/unit is 4096/)
    await hostile.hello()
    await hostile.put(0, here(2n))
    await hostile.commit()
    await unharmed(here(2n))
  })

  it('many units that come in part take a bounded part of the memory', async () => {
    const { side, hostile } = await prepared()
    hostile.size = 80 << 20
    await hostile.hello()
    const piece = Buffer.alloc(UNIT)
    for (const _again of [1, 2]) {
      for (let unit = 0; unit < 64; unit++) await hostile.put(unit << 20, piece, { length: 1 << 20 })
      const more = hostile.put(64 << 20, piece, { length: 1 << 20 })
      await expect(more).rejects.toThrow(/too many copy units arrive in pieces/)
      await hostile.open() // forgets them
      await hostile.hello()
    }
    await hostile.put(UNIT, piece, { unit: 0, length: 2 * UNIT })
    await hostile.put(0, Buffer.alloc(UNIT, 9), { unit: 0, length: 2 * UNIT })
    await hostile.commit()
    const content = (await side.content('data')).subarray(0, 2 * UNIT)
    expect(content.equals(Buffer.concat([Buffer.alloc(UNIT, 9), piece]))).toBe(true)
  })

  it('signatures of many requests are computed one after the other', async () => {
    const { side, hostile } = await prepared()
    const volume = side.pool.volume('data')
    const waiting: (() => void)[] = []
    vi.spyOn(volume, 'read').mockImplementation(() => new Promise((resolve) => waiting.push(resolve)))
    const asked = Array.from({ length: 20 }, () =>
      hostile.data.request(MESSAGE.signatures, encodeRanges([{ offset: 0, length: SIZE }])),
    )
    await hostile.data.request(MESSAGE.bitmap, json({ kind: 'differs', from: 0 })) // all have come
    for (const request of asked) {
      await until(() => waiting.length > 0, 'the next one')
      expect(waiting.length).toBe(1)
      waiting.pop()?.()
      expect((await request).payload.length).toBe(32)
    }
  })
})
