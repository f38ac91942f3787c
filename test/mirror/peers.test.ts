import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, afterEach, describe, expect, it, vi } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { Channel } from '../../src/link/channel.ts'
import type { MirrorInit } from '../../src/mirror/types.ts'
import { checkPool } from '../../src/volume/check.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { failing, failingCommits, Gate } from '../support/faults.ts'
import { Pair, type Side } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { sectorData } from '../support/sector-data.ts'
import type { DatapathChoice } from '../support/served-pool.ts'
import { DATAPATHS } from '../support/volumes.ts'
import { SMALL_POOL, Versions } from './versions.ts'

/** Peers that are not who they should be, have no room, no disk, no volume; volumes that change under a mirror; and what the sides have at the start. */
const SIZE = 127 * 4096 + 1024

const directory = temporaryDirectory('fullstripe-keys-')
afterAll(() => directory.remove())
const pairs: Pair[] = []
afterEach(async () => {
  vi.useRealTimers()
  await Promise.all(pairs.splice(0).map((pair) => pair.close()))
})

async function opened(...options: Parameters<typeof Pair.open>): Promise<Pair> {
  const pair = await Pair.open(...options)
  pairs.push(pair)
  return pair
}

async function mirrored(datapath: DatapathChoice, mode: 'sync' | 'async', size = SIZE) {
  const pair = await opened({ datapath, pool: SMALL_POOL })
  await pair.one.pool.createVolume({ name: 'data', size })
  const client = await pair.one.connect('data')
  const versions = new Versions(size)
  await versions.fill(client)
  await pair.one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 20 })
  await settled(pair.one)
  return { pair, client, versions }
}

function keyFile(name: string, letter: string): string {
  const path = join(directory.path, name)
  writeFileSync(path, letter.repeat(32), { mode: 0o600 })
  return path
}

async function settled(side: Side, volume = 'data'): Promise<void> {
  await side.reach(volume, side.show(volume).mode === 'sync' ? 'insync' : 'cycling')
  await until(() => side.show(volume).lag.bytes === 0, 'nothing is lacking', 20_000)
}

async function equal({ one, two }: Pair, volume = 'data'): Promise<void> {
  const here = await one.content(volume)
  const there = await two.content(volume)
  expect(there.length).toBe(here.length)
  expect(there.equals(here)).toBe(true)
}

async function checked(pair: Pair): Promise<void> {
  for (const side of [pair.one, pair.two]) {
    await side.close()
    const { findings } = await checkPool(side.directory)
    expect(findings.filter(({ severity }) => severity === 'error')).toEqual([])
  }
}

describe('who the peer is', () => {
  it('a peer with another key is refused, and nothing is left behind', async () => {
    const pair = await opened(
      { datapath: 'portable', pool: SMALL_POOL, security: { keyFile: keyFile('one', 'a') } },
      { datapath: 'portable', pool: SMALL_POOL, security: { keyFile: keyFile('two', 'b') } },
    )
    await pair.one.pool.createVolume({ name: 'data', size: SIZE })
    await expect(pair.one.mirrors.add({ volume: 'data', peer: pair.address })).rejects.toThrow(
      /was not mirrored|cannot reach/,
    )
    expect(pair.one.mirrors.list()).toEqual([])
    expect(pair.two.pool.volumes()).toEqual([])
  })
})

it('a volume with any name that it can have is mirrored', async () => {
  const pair = await opened({ datapath: 'portable', pool: SMALL_POOL })
  const name = 'می\u200cخواهم 👩\u200d💻'
  await pair.one.pool.createVolume({ name, size: SIZE })
  await pair.one.mirrors.add({ volume: name, peer: pair.address, mode: 'sync' })
  await pair.one.reach(name, 'insync')
  expect(pair.two.show(name).target).toBe(name)
})

it('this daemon is no peer of its own', async () => {
  const { one } = await opened({ datapath: 'portable', pool: SMALL_POOL })
  await one.pool.createVolume({ name: 'data', size: SIZE })
  for (const target of ['data', 'other']) {
    await expect(
      one.mirrors.add({ volume: 'data', peer: `127.0.0.1:${one.port}`, target }),
    ).rejects.toMatchObject({ code: 'REFUSED', message: expect.stringMatching(/is this daemon itself/) })
  }
  expect(one.pool.volumes().map(({ name }) => name)).toEqual(['data'])
  await until(async () => (await one.mirrors.peers.list()).every(({ connected }) => !connected), 'no session')
})

it('what the peer removes is not dialled any more, and the peer has the answer first', async () => {
  const pair = await opened({ datapath: 'portable', pool: SMALL_POOL })
  const { one, two } = pair
  for (const name of ['data', 'other']) {
    await one.pool.createVolume({ name, size: SIZE })
    await one.mirrors.add({ volume: name, peer: pair.address, mode: 'sync' })
    await one.reach(name, 'insync')
  }
  await two.mirrors.remove('data')
  await two.restart() // it may have to be dialled for the other one
  await one.reach('other', 'insync')
  await two.mirrors.remove('other')
  await until(async () => (await one.mirrors.peers.list()).every(({ connected }) => !connected), 'no session')
  expect(one.mirrors.list()).toEqual([])
  const told = two.events.filter(({ kind }) => kind === 'mirror.removed').map(({ message }) => message)
  expect(told).toEqual(['the mirror is removed', 'the mirror is removed'])
})

it('a mirror whose answer was lost when it was added is told of over there: where, and how to end it', async () => {
  const pair = await opened({ datapath: 'portable', pool: SMALL_POOL })
  const { one, two } = pair
  await one.pool.createVolume({ name: 'data', size: SIZE })
  const add = (): Promise<unknown> => one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
  const reply = vi.spyOn(Channel.prototype, 'reply').mockImplementationOnce(async () => pair.relay.cut())
  await expect(add()).rejects.toThrow(/was not mirrored/)
  reply.mockRestore()
  const hint =
    /^the peer says: .* secondary of another mirror, data\/(\S+) of volume data of (\S+); .* end it at (\S+) with: (.*) \(/
  const found = hint.exec(String((await add().catch((error: Error) => error.message)) ?? ''))
  const [mirror] = two.mirrors.list()
  expect(found?.slice(1)).toEqual([
    mirror?.name,
    mirror?.peer,
    expect.stringMatching(/^two-/),
    `fullstripe mirror remove data ${mirror?.name}`,
  ])
  await two.mirrors.remove('data', found?.[1])
  await add()
  await one.reach('data', 'insync')
})

describe('one peer under two addresses', () => {
  it('each mirror has the session of its own address, and the other one while that is lost', async () => {
    const pair = await opened({ datapath: 'portable', pool: SMALL_POOL })
    const { one, two } = pair
    const addresses = { first: pair.address, second: `localhost:${two.port}` }
    const states = (): string[] =>
      one.events.map(({ kind, object }) => `${object} ${kind}`).filter((text) => /degraded|insync/.test(text))
    for (const [name, peer] of Object.entries(addresses)) {
      await one.pool.createVolume({ name, size: SIZE })
      await one.mirrors.add({ volume: name, peer, mode: 'sync', name: 'm' })
      await one.reach(name, 'insync')
    }
    // Nothing happened to the first one meanwhile, and each of them has one session.
    await new Promise((resolve) => setTimeout(resolve, 500))
    expect(states()).toEqual(['first/m mirror.insync', 'second/m mirror.insync'])
    expect((await one.mirrors.peers.list()).map(({ name, connected }) => [name, connected])).toEqual(
      Object.values(addresses)
        .sort()
        .map((name) => [name, true]),
    )
    pair.relay.cut()
    await until(() => states().length === 4, 'it is degraded and comes back')
    expect(states().slice(2)).toEqual(['first/m mirror.degraded', 'first/m mirror.insync'])
    await one.mirrors.remove('second')
    expect(one.show('first').connected).toBe(true)
  })
})

describe.each(DATAPATHS)('peers, %s', (datapath) => {
  /** What hardly depends on the datapath is tested with one. */
  const once = datapath === DATAPATHS.at(-1) ? it : undefined

  once?.(
    'the secondary is deleted by force: the primary says so and goes on; removed and added again it is mirrored',
    async () => {
      for (const mode of ['async', 'sync'] as const) {
        const { pair, client, versions } = await mirrored(datapath, mode)
        const { one, two } = pair
        versions.start(client)
        await expect(two.pool.deleteVolume('data')).rejects.toThrow(/mirrors/)
        await expect(one.pool.deleteVolume('data')).rejects.toThrow(/client|mirrors/)
        await until(() => versions.answers > 150, 'clients write')
        await two.pool.deleteVolume('data', { force: true })
        await until(() => /no such mirror/.test(one.show('data').reason ?? ''), 'it is told')
        const { answers } = versions
        await until(() => versions.answers > answers + 50, 'clients go on')
        await one.mirrors.remove('data')
        await one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 20 })
        await versions.stop()
        expect(versions.errors).toEqual([])
        await settled(one)
        await equal(pair)
        await checked(pair)
      }
    },
  )

  once?.(
    'another identity under a known name is refused, until its operator forgets the peer; the mirror goes on then',
    async () => {
      const { pair, client, versions } = await mirrored(datapath, 'sync')
      for (const [changed, other] of [
        [pair.two, pair.one],
        [pair.one, pair.two],
      ] as const) {
        const [known] = await other.mirrors.peers.list()
        expect(known).toMatchObject({ connected: true, mirrors: [expect.stringMatching(/^data\//)] })
        const name = known?.name ?? ''
        await expect(other.mirrors.peers.forget(name)).rejects.toMatchObject({ code: 'BUSY' })
        await expect(other.mirrors.peers.forget('nobody')).rejects.toMatchObject({ code: 'NOT_FOUND' })
        const writer = changed === pair.one ? undefined : client
        await changed.close()
        rmSync(join(changed.directory, 'identity'))
        await changed.open()
        const { one, two } = pair
        if (writer !== undefined) await versions.write(writer, 5)
        const refusal = /has the identity sha256:\S+, and sha256:\S+ is pinned: .*fullstripe peer forget/
        await until(() => refusal.test(one.show('data').reason ?? ''), 'it says why')
        expect((await other.mirrors.peers.list()).map(({ connected }) => connected)).toEqual([false])

        const forgotten = await other.mirrors.peers.forget(name)
        expect(forgotten).toEqual({ ...known, connected: false })
        if (other === two) await one.mirrors.resume('data') // or after a while
        await settled(one)
        const [again] = await other.mirrors.peers.list()
        expect(again).toMatchObject({ name, connected: true, mirrors: known?.mirrors })
        expect(again?.fingerprint).not.toBe(known?.fingerprint)
        await equal(pair)
        // That is stored: nobody else comes under that name.
        await other.restart()
        await settled(one)
        expect((await other.mirrors.peers.list())[0]).toMatchObject({ name, fingerprint: again?.fingerprint })
        expect(other.events.some(({ kind }) => kind === 'peer.forgotten')).toBe(true)
        expect(two.pool.mirrors.all()[0]?.record.peer.fingerprint).toMatch(/^sha256:/)
        expect(one.pool.mirrors.all()[0]?.record.peer.fingerprint).toMatch(/^sha256:/)
      }
    },
    60_000,
  )

  once?.(
    'a primary is deleted by force while the link is down and writers wait; and a deletion that cannot be stored',
    async () => {
      const { pair, client, versions } = await mirrored(datapath, 'sync')
      const { one, two } = pair
      await one.mirrors.change('data', undefined, { onLoss: 'block' })
      await settled(one)
      const mend = failingCommits(
        (commit) => commit.dropVolumes !== undefined && commit.dropVolumes.length > 0,
      )
      await expect(one.pool.deleteVolume('data', { force: true })).rejects.toThrow(/not deleted/)
      mend()
      await settled(one)
      const again = await one.connect('data')
      await versions.write(again, 3)
      await equal(pair)
      pair.relay.onConnect = 'reset'
      pair.relay.cut()
      await one.reach('data', 'degraded')
      const writing = versions.write(again, 1)
      await until(() => one.show('data').lag.bytes > 0, 'it is done here')
      await one.pool.deleteVolume('data', { force: true })
      await writing
      expect(one.mirrors.list()).toEqual([])
      await until(() => !two.show('data').connected, 'it is noticed')
      await client.close()
      await two.mirrors.promote('data')
      await two.mirrors.remove('data')
      await checked(pair)
    },
  )

  once?.each(['async', 'sync'] as const)(
    'no room on the secondary: it says so, and heals when there is (%s)',
    async (mode) => {
      const pair = await opened(
        { datapath, pool: SMALL_POOL },
        { datapath, pool: { ...SMALL_POOL, capacity: 400 * 4096 } },
      )
      const { one, two } = pair
      await one.pool.createVolume({ name: 'data', size: SIZE })
      await two.pool.createVolume({ name: 'other', size: 320 * 4096 })
      const other = await two.connect('other')
      await other.write(Buffer.alloc(320 * 4096, 5), 0)
      const client = await one.connect('data')
      const versions = new Versions(SIZE)
      await versions.write(client, 10)
      await one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 20 })
      await settled(one)
      await versions.fill(client)
      await until(
        () => one.events.some(({ message }) => /NO_SPACE|space|ENOSPC|full/i.test(message)),
        'it is told',
      )
      await versions.write(client, 20)
      await other.trim({ offset: 0, length: 300 * 4096 })
      await settled(one)
      expect(versions.errors).toEqual([])
      await equal(pair)
      await checked(pair)
    },
  )

  it.each(['async', 'sync'] as const)('a member of the secondary fails for a while (%s)', async (mode) => {
    const { pair, client, versions } = await mirrored(datapath, mode)
    const { one, two } = pair
    const error = (): Error => new StoreError('MEMBER_IO', 'member: no such luck')
    const mend = [
      failing(two.pool.datapath, 'formatUnit', error),
      failing(two.pool.datapath, 'writePart', error),
    ]
    await versions.write(client, 10)
    await until(() => one.show('data').reason !== null && one.show('data').state === 'degraded', 'it is told')
    await versions.write(client, 10)
    for (const each of mend) each()
    await settled(one)
    expect(versions.errors).toEqual([])
    await equal(pair)
  })

  it('a put of a session that was lost does not overtake that of the next', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'async')
    const { one, two } = pair
    const gate = new Gate(two.pool.datapath, 'formatUnit')
    await versions.write(client, 1)
    await until(() => gate.held.length === 1, 'the put is under way')
    pair.relay.cut()
    await until(() => one.show('data').state === 'degraded', 'it is noticed')
    for (let n = 0; n < 3; n++) await versions.fill(client)
    await until(
      () => one.show('data').state === 'negotiating' && two.show('data').connected,
      'another session',
    )
    gate.open()
    await settled(one)
    await equal(pair)
    await checked(pair)
  })

  it('the secondary stops, or is promoted, in the middle of a commit', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'async')
    const { one, two } = pair
    for (const way of ['stop', 'promote'] as const) {
      const gate = new Gate(two.pool.datapath, 'barrier')
      await versions.fill(client)
      await until(() => gate.held.length > 0, 'the commit is under way')
      pair.relay.onConnect = 'reset'
      pair.relay.cut()
      await until(() => !two.show('data').connected, 'it is noticed')
      const done = way === 'stop' ? two.restart() : two.mirrors.promote('data')
      gate.open()
      await done
      expect(versions.check(await two.content('data')), way).toBeUndefined()
      pair.relay.onConnect = 'forward'
      if (way === 'stop') await settled(one)
    }
    await one.reach('data', 'splitbrain')
    await one.mirrors.resolve('data', undefined, 'remote')
    await settled(one)
    await equal(pair)
    await checked(pair)
  })

  it.each(['copying', 'cycling', 'insync'] as const)('the volume grows and shrinks: %s', async (state) => {
    const pair = await opened({ datapath, pool: SMALL_POOL })
    const { one } = pair
    await one.pool.createVolume({ name: 'data', size: SIZE })
    const client = await one.connect('data')
    const random = new Random(5)
    const fill = async (connection: typeof client): Promise<void> =>
      connection.write(random.bytes(SIZE - (SIZE % 512)), 0)
    await fill(client)
    const mode = state === 'insync' ? 'sync' : 'async'
    await one.mirrors.add({
      volume: 'data',
      peer: pair.address,
      mode,
      intervalMs: 20,
      rate: state === 'copying' ? 200_000 : null,
    })
    if (state === 'copying') await until(() => one.show('data').counters.units > 10, 'the copy is under way')
    else await settled(one)
    const volume = one.pool.volume('data')
    for (const size of [SIZE * 2, SIZE + 512, SIZE - 8192, SIZE - 8192 - 512, SIZE * 3]) {
      const writing = client.write(random.bytes(4096), 4096 * random.below(100))
      await volume.resize(size, { force: true })
      await writing
      await one.mirrors.change('data', undefined, { rate: null })
      await settled(one)
      await equal(pair)
    }
    await client.close()
    await checked(pair)
  })

  once?.(
    'cut off and grown again while the secondary was away: what was cut off is gone there, too',
    async () => {
      for (const [small, restarts] of [
        [SIZE - 8 * 4096, []],
        [SIZE - 512, ['cut', 'grown']],
        [512, ['grown']],
      ] as const) {
        const { pair, client } = await mirrored(datapath, 'async')
        const { one, two } = pair
        await client.close()
        pair.relay.onConnect = 'reset'
        pair.relay.cut()
        await one.reach('data', 'degraded')
        await one.pool.volume('data').resize(small, { force: true })
        if (restarts.some((when) => when === 'cut')) await one.restart()
        await one.pool.volume('data').resize(SIZE)
        if (restarts.some((when) => when === 'grown')) await one.restart()
        expect((await two.content('data')).equals(await one.content('data'))).toBe(false)
        pair.relay.onConnect = 'forward'
        await settled(one)
        await equal(pair)
      }
    },
  )

  once?.('paused and resumed, another mode, another rate, while clients write', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'async')
    const { one, two } = pair
    versions.start(client)
    for (const mode of ['sync', 'async', 'sync'] as const) {
      await one.mirrors.change('data', undefined, { mode })
      await one.reach('data', mode === 'sync' ? 'insync' : 'cycling')
      await one.mirrors.pause('data')
      expect(one.show('data').state).toBe('paused')
      // What was on its way lands yet.
      await two.reach('data', 'paused')
      await two.pool.volume('data').quiesce(() => {})
      const image = await two.content('data')
      expect(versions.check(image)).toBeUndefined()
      const { answers } = versions
      await until(() => versions.answers > answers + 20, 'clients go on')
      expect((await two.content('data')).equals(image)).toBe(true)
      await one.mirrors.resume('data')
      await one.reach('data', mode === 'sync' ? 'insync' : 'cycling')
    }
    await one.mirrors.change('data', undefined, { rate: 1 << 20 })
    await one.mirrors.change('data', undefined, { rate: null })
    await versions.stop()
    await settled(one)
    expect(versions.errors).toEqual([])
    await equal(pair)
  })

  once?.each<MirrorInit>(['realized', 'signature', 'full'])(
    'content on both sides, --init %s: what travels',
    async (init) => {
      const pair = await opened({ datapath, pool: { capacity: 256 << 20 } })
      const { one, two } = pair
      const size = 32 << 20
      for (const side of [one, two]) await side.pool.createVolume({ name: 'data', size })
      const here = await one.connect('data')
      const there = await two.connect('data')
      const MIB = 1 << 20
      for (const [at, one, two] of [
        [0, 1n, 1n], // the same
        [4, 2n, 3n], // another
        [8, 4n, undefined],
        [12, undefined, 5n],
      ] as const) {
        if (one !== undefined) await here.write(sectorData(one, at * MIB, 2 * MIB), at * MIB)
        if (two !== undefined) await there.write(sectorData(two, at * MIB, 2 * MIB), at * MIB)
      }
      await there.close()
      await until(() => two.pool.volume('data').info().sessions === 0, 'nobody is connected')
      const used = two.pool.volume('data').info().used
      await one.mirrors.add({ volume: 'data', peer: pair.address, mode: 'async', intervalMs: 20, init })
      await settled(one)
      await equal(pair)
      const { sentBytes, wireBytes, signatures } = one.show('data').counters
      expect(sentBytes).toBe((init === 'full' ? 6 : 4) * MIB)
      expect(wireBytes - sentBytes).toBeLessThan(100_000)
      if (init === 'full') expect(signatures).toBe(0)
      else expect(signatures).toBeGreaterThan(0)
      expect(two.pool.volume('data').info().used).toBe(used)
      await checked(pair)
    },
  )

  it.each([
    { name: 'a larger format unit here', one: { unit: 4, chunk: 4096 }, two: { unit: 1, chunk: 4096 } },
    { name: 'a larger format unit there', one: { unit: 1, chunk: 4096 }, two: { unit: 4, chunk: 4096 } },
    { name: 'larger stripes there', one: { unit: 1, chunk: 4096 }, two: { unit: 1, chunk: 65536 } },
    {
      name: 'larger stripes here',
      one: { unit: 1, chunk: 65536 },
      two: { unit: 3, chunk: 8192 },
      refused: true,
    },
  ])('$name, both modes, thick here, fill byte 7', async ({ one: a, two: b, refused }) => {
    const pair = await opened(
      { datapath, pool: { capacity: 64 << 20, chunkSize: a.chunk } },
      { datapath, pool: { capacity: 64 << 20, chunkSize: b.chunk } },
    )
    const { one, two } = pair
    const size = 5 * 65536 + 512
    for (const fill of [0, 7]) {
      const name = `data${fill}`
      await one.pool.createVolume({ name, size, formatUnit: a.unit, fill, provision: 'thick' })
      await two.pool.createVolume({ name, size, formatUnit: b.unit, fill, provision: 'thick' })
      const mirror = one.mirrors.add({ volume: name, peer: pair.address, mode: 'sync' })
      if (refused === true) {
        await expect(mirror).rejects.toThrow(/multiple/)
        continue
      }
      await mirror
      const client = await one.connect(name)
      const random = new Random(9)
      const change = async (): Promise<void> => {
        for (let n = 0; n < 30; n++) {
          const offset = 512 * random.below(size / 512 - 40)
          const length = 512 * (1 + random.below(39))
          const what = random.below(4)
          if (what === 0) await client.trim({ offset, length })
          else if (what === 1) await client.zero({ offset, length }, { fast: n % 2 === 0 }).catch(() => {})
          else await client.write(random.bytes(length), offset)
        }
        await client.trim({ offset: 65536, length: size - 65536 })
        // A whole unit here, and a part of one there that is formatted: fast here, and not there.
        const unit = a.unit * a.chunk
        await client.trim({ offset: 0, length: 65536 })
        await client.write(random.bytes(512), 0)
        await client.zero({ offset: unit, length: unit }, { fast: true }).catch(() => {})
        await client.write(random.bytes(512), size - 512)
      }
      await settled(one, name)
      await change()
      expect(one.events.filter(({ kind }) => kind === 'mirror.refused')).toEqual([])
      expect(one.show(name).state).toBe('insync')
      await equal(pair, name)
      await one.mirrors.change(name, undefined, { mode: 'async', intervalMs: 20 })
      await change()
      await settled(one, name)
      await equal(pair, name)
    }
    await checked(pair)
  })

  once?.(
    'what cannot be a secondary is refused: another size, another fill byte, a client, a volume with mirrors',
    async () => {
      const { pair } = await mirrored(datapath, 'sync')
      const { one, two } = pair
      await one.pool.createVolume({ name: 'x', size: SIZE })
      const add = (target: string): Promise<unknown> =>
        one.mirrors.add({ volume: 'x', peer: pair.address, target })
      await two.pool.createVolume({ name: 'size', size: SIZE * 2 })
      await two.pool.createVolume({ name: 'fill', size: SIZE, fill: 9 })
      await two.pool.createVolume({ name: 'used', size: SIZE })
      await two.connect('used')
      await expect(add('size')).rejects.toThrow(/cannot be the secondary: it has/)
      await expect(add('fill')).rejects.toThrow(/fill byte/)
      await expect(add('used')).rejects.toThrow(/connected client/)
      await expect(add('data')).rejects.toThrow(/secondary of another/)
      expect(one.mirrors.list().length).toBe(1)
      expect(two.mirrors.list().length).toBe(1)
    },
  )

  once?.('the clock jumps by a day, forwards and back', async () => {
    const { pair, client, versions } = await mirrored(datapath, 'async')
    vi.useFakeTimers({ toFake: ['Date'] })
    for (const jump of [86_400_000, -2 * 86_400_000]) {
      vi.setSystemTime(Date.now() + jump)
      await versions.write(client, 10)
      const { cycles } = pair.one.show('data').counters
      await until(
        () => pair.one.show('data').counters.cycles > cycles || pair.one.show('data').lag.bytes === 0,
        'a cycle',
      )
      expect(pair.one.show('data').lag.seconds).toBeLessThan(60)
      expect(pair.one.show('data').lag.seconds).toBeGreaterThanOrEqual(0)
    }
    await settled(pair.one)
    await equal(pair)
  })
})
