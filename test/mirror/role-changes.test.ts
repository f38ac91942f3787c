import { cpSync, rmSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterEach, describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import type { MirrorAddOptions } from '../../src/mirror/types.ts'
import { NBD_ERRNO } from '../../src/nbd/errno.ts'
import { Pair, type Side } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'
import { SMALL_POOL } from './versions.ts'

/** Changes of role that meet each other, fail half-way, or meet a side that was set back: nothing is lost unseen, and all can be settled. */
const SIZE = 64 * 4096
const BLOCK = 4096

const pairs: Pair[] = []
afterEach(async () => {
  await Promise.all(pairs.splice(0).map((pair) => pair.close()))
})

async function mirrored(
  options: Partial<MirrorAddOptions> = {},
  volume: { provision?: 'thin' | 'thick' } = {},
) {
  const pair = await Pair.open({ datapath: 'portable', pool: SMALL_POOL })
  pairs.push(pair)
  await pair.one.pool.createVolume({ name: 'data', size: SIZE, ...volume })
  for (let at = 0; at < SIZE; at += BLOCK) await write(pair.one, at, 1)
  await pair.one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 20, ...options })
  await settled(pair.one)
  return pair
}

/** As a client does. @returns errno */
function write(side: Side, offset: number, byte: number): Promise<number> {
  return side.pool.volume('data').submit('write', offset, BLOCK, 0, Buffer.alloc(BLOCK, byte))
}

async function settled(side: Side): Promise<void> {
  const { mode } = side.show('data')
  const done = (): boolean => {
    const { state, lag, connected } = side.show('data')
    return connected && lag.bytes === 0 && state === (mode === 'sync' ? 'insync' : 'cycling')
  }
  await until(done, 'nothing is lacking')
}

async function equal({ one, two }: Pair): Promise<void> {
  expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
}

async function part({ one, two, relay }: Pair): Promise<void> {
  relay.onConnect = 'reset'
  relay.cut()
  await until(() => !two.show('data').connected && !one.show('data').connected, 'it is noticed')
}

async function swap(from: Side, to: Side): Promise<void> {
  await from.mirrors.demote('data')
  await to.mirrors.promote('data')
  await settled(to)
}

/** Both are primary, and know. */
async function split(pair: Pair): Promise<void> {
  await part(pair)
  await pair.two.mirrors.promote('data')
  pair.relay.onConnect = 'forward'
  await pair.one.reach('data', 'splitbrain')
  await pair.two.reach('data', 'splitbrain')
}

describe('changes of role', () => {
  it('two at once: the second looks at what the first has left', async () => {
    const pair = await mirrored({}, { provision: 'thick' })
    const { one, two } = pair
    await split(pair)
    await write(two, 0, 2)
    const resolve = () => one.mirrors.resolve('data', undefined, 'local')
    const [first, second] = await Promise.allSettled([resolve(), resolve()])
    expect(first).toMatchObject({ status: 'fulfilled', value: { role: 'secondary' } })
    expect(second).toMatchObject({ status: 'rejected', reason: { code: 'REFUSED' } })
    await settled(two)
    await equal(pair)
    const demote = () => two.mirrors.demote('data')
    const demoted = await Promise.allSettled([demote(), demote()])
    expect(demoted).toMatchObject([{ status: 'fulfilled' }, { reason: { code: 'BUSY' } }])
    const promote = () => one.mirrors.promote('data')
    const promoted = await Promise.allSettled([promote(), promote()])
    expect(promoted).toMatchObject([{ status: 'fulfilled' }, { reason: { code: 'BUSY' } }])
    await settled(one)
    expect(one.show('data').local.history).toHaveLength(2)
  })

  it('a volume gives up what it has reserved once', async () => {
    const pair = await mirrored({}, { provision: 'thick' })
    const volume = pair.one.pool.volume('data')
    await Promise.all([volume.becomeThin(), volume.becomeThin()])
    expect(volume.record.provision).toBe('thin')
    expect(await write(pair.one, 0, 2)).toBe(0)
  })

  it.each(['resolve --discard local', 'demote --force'] as const)(
    'writes that wait for the secondary fail where they are thrown away: %s',
    async (how) => {
      const pair = await mirrored({ mode: 'sync', onLoss: 'block' })
      const { one, two } = pair
      if (how === 'demote --force') await part(pair)
      else await split(pair)
      const writing = write(one, 0, 2)
      await until(() => one.show('data').lag.bytes > 0, 'it is done here')
      expect(await isPending(writing)).toBe(true)
      // Before the role is stored: nobody may be told of success from then on.
      let told: number | undefined
      writing.then((errno) => {
        told = errno
      })
      const save = one.pool.mirrors.save.bind(one.pool.mirrors)
      let before: number | undefined
      one.pool.mirrors.save = async (id, change, also) => {
        if (change.role === 'secondary') {
          await sleep(50)
          before = told
        }
        return save(id, change, also)
      }
      if (how === 'demote --force') await one.mirrors.demote('data', undefined, { force: true })
      else await one.mirrors.resolve('data', undefined, 'local')
      expect(before).toBe(NBD_ERRNO.ESHUTDOWN)
      if (how === 'demote --force') {
        pair.relay.onConnect = 'forward'
        await two.mirrors.promote('data')
      }
      await two.mirrors.change('data', undefined, { onLoss: 'continue' })
      await settled(two)
      await equal(pair)
      expect((await one.content('data'))[0]).toBe(1)
    },
  )

  it('what could not be stored changes nothing: the mirror goes on', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    await split(pair)
    await write(one, 0, 2)
    const { mirrors } = one.pool
    const save = mirrors.save.bind(mirrors)
    mirrors.save = () => Promise.reject(new StoreError('NO_SPACE', 'metadata: disk full'))
    await expect(one.mirrors.resolve('data', undefined, 'local')).rejects.toThrow('disk full')
    mirrors.save = save
    expect(one.show('data').role).toBe('primary')
    await two.mirrors.resolve('data', undefined, 'local')
    await settled(one)
    await equal(pair)
    expect((await two.content('data'))[0]).toBe(2)
  })

  it('what a removal that failed leaves is a mirror: changes are noted, the session comes again', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    await part(pair)
    const undo = [one, two].map((side) => {
      const { mirrors } = side.pool
      const remove = mirrors.remove.bind(mirrors)
      mirrors.remove = () => Promise.reject(new StoreError('NO_SPACE', 'metadata: disk full'))
      return () => {
        mirrors.remove = remove
      }
    })
    await expect(one.mirrors.remove('data')).rejects.toThrow('disk full')
    await write(one, 0, 2)
    expect(one.show('data').lag.bytes).toBe(BLOCK)
    await expect(two.mirrors.remove('data')).rejects.toThrow('disk full')
    expect(two.pool.volume('data').readOnly).toBe(true)
    await one.restart()
    pair.relay.onConnect = 'forward'
    await settled(one)
    await equal(pair)
    expect((await two.content('data'))[0]).toBe(2)
    for (const step of undo) step()
  })

  it('a removal while writes come, and are sent, ends nothing else', async () => {
    const pair = await mirrored()
    const { one } = pair
    let going = true
    const writing = (async () => {
      for (let n = 0; going; n++) {
        expect(await write(one, (n % 60) * BLOCK, n % 256)).toBe(0)
        await sleep(1)
      }
    })()
    for (let round = 0; round < 4; round++) {
      one.events.length = 0
      await one.mirrors.remove('data')
      const kinds = one.events.map(({ kind }) => kind)
      expect(kinds).toContain('mirror.removed')
      expect(kinds).not.toContain('mirror.failed')
      await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 20 })
      await until(() => one.show('data').state === 'cycling', 'it cycles')
    }
    going = false
    await writing
    await settled(one)
    await equal(pair)
  })

  it('a mirror that is being added while the volume becomes a secondary is refused', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    const other = await Pair.open({ datapath: 'portable', pool: SMALL_POOL })
    pairs.push(other)
    const three = other.two
    const create = three.pool.createVolume.bind(three.pool)
    let go = (): void => {}
    let asked = false
    three.pool.createVolume = async (options) => {
      asked = true
      await new Promise<void>((resolve) => {
        go = resolve
      })
      return create(options)
    }
    const adding = one.mirrors.add({ volume: 'data', peer: other.address, name: 'three' })
    adding.catch(() => {})
    await until(() => asked, 'it is asked over there')
    await one.mirrors.demote('data')
    go()
    await expect(adding).rejects.toThrow(/is the secondary of mirror/)
    expect(one.mirrors.list()).toHaveLength(1)
    expect(three.mirrors.list()).toEqual([])
    await two.mirrors.promote('data')
    await settled(two)
    await equal(pair)
  })

  it('what a primary sends during a forced promotion comes too late', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    const { mirrors } = two.pool
    const save = mirrors.save.bind(mirrors)
    mirrors.save = async (id, change, also) => {
      if (change.role === 'primary') {
        // The other side comes back meanwhile, with a change.
        await write(one, 0, 2)
        await sleep(1.5 * LIMITS.mirrorRetryMsMin)
      }
      return save(id, change, also)
    }
    await two.mirrors.promote('data', undefined, { force: true })
    const { generation } = one.show('data').local
    expect(two.show('data').local).toMatchObject({ role: 'primary', history: [generation] })
    expect(two.show('data').local.generation).not.toBe(generation)
    expect((await two.content('data'))[0]).toBe(1)
    await one.reach('data', 'splitbrain')
    await two.reach('data', 'splitbrain')
    await two.mirrors.resolve('data', undefined, 'local')
    await settled(one)
    await equal(pair)
  })

  it('a primary that was set back beyond what its secondary has: told, and settled', async () => {
    const pair = await setBack()
    const { one, two } = pair
    expect((await two.content('data'))[BLOCK]).toBe(3)
    await one.mirrors.resolve('data', undefined, 'remote')
    await settled(one)
    await equal(pair)
    expect((await two.content('data'))[BLOCK]).toBe(1)
    await write(one, 0, 4)
    await settled(one)
    await one.restart()
    await settled(one)
    expect(one.show('data').counters.signatures).toBe(0)
    await equal(pair)
  })

  it('a primary that was set back in one generation: told, and settled', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    await one.close()
    const backup = `${one.directory}-backup`
    cpSync(one.directory, backup, { recursive: true })
    await one.open()
    for (let n = 2; n < 5; n++) {
      await settled(one)
      await write(one, BLOCK, n)
    }
    await settled(one)
    await one.close()
    rmSync(one.directory, { recursive: true })
    cpSync(backup, one.directory, { recursive: true })
    await one.open()
    const { reason } = await one.reach('data', 'splitbrain')
    expect(reason).toContain('this side was set back')
    expect((await two.content('data'))[BLOCK]).toBe(4)
    await one.mirrors.resolve('data', undefined, 'remote')
    await settled(one)
    await equal(pair)
    expect((await two.content('data'))[BLOCK]).toBe(1)
    await one.restart()
    await settled(one)
    expect(one.show('data').counters.signatures).toBe(0)
  })

  it('a side that gives up before the two were compared says that anything may differ', async () => {
    const pair = await setBack()
    const { one, two } = pair
    await one.mirrors.pause('data') // nothing is compared yet
    const { mirrors } = one.pool
    const { id } = mirrors.all()[0]?.record ?? { id: 0 }
    const { local, cycle } = two.show('data')
    await mirrors.save(id, { clean: false, base: local.generation, cycle })
    await part(pair)
    await one.mirrors.demote('data', undefined, { force: true })
    pair.relay.onConnect = 'forward'
    await two.mirrors.promote('data')
    await settled(two)
    await equal(pair)
    expect((await one.content('data'))[BLOCK]).toBe(3)
  })

  it.each(['one yields', 'two yields', 'one discards', 'two is demoted'] as const)(
    'promoted before the first copy has ended: the other mirrors go on, and it can be settled: %s',
    async (how) => {
      const pair = await Pair.open({ datapath: 'portable', pool: SMALL_POOL })
      pairs.push(pair)
      const { one, two } = pair
      for (const name of ['data', 'other']) await one.pool.createVolume({ name, size: SIZE })
      for (let at = 0; at < SIZE; at += BLOCK) await write(one, at, 1)
      await one.mirrors.add({ volume: 'other', peer: pair.address, mode: 'sync' })
      await one.mirrors.add({ volume: 'data', peer: pair.address, rate: 16_384, intervalMs: 20 })
      await one.reach('data', 'copying')
      await one.close()
      await until(() => !two.show('data').connected, 'it is noticed')
      await two.mirrors.promote('data', undefined, { force: true })
      await write(two, 0, 2)
      const demoted = how === 'two is demoted'
      if (demoted) await two.mirrors.demote('data', undefined, { force: true })
      await one.open()
      await one.reach('data', demoted ? 'copying' : 'splitbrain')
      if (!demoted) await two.reach('data', 'splitbrain')
      await one.reach('other', 'insync')
      const accepted = pair.relay.accepted
      const oneWins = how === 'two yields' || demoted
      const winner = oneWins ? one : two
      if (how === 'one yields') await two.mirrors.resolve('data', undefined, 'remote')
      else if (how === 'one discards') await one.mirrors.resolve('data', undefined, 'local')
      else if (how === 'two yields') await one.mirrors.resolve('data', undefined, 'remote')
      await winner.mirrors.change('data', undefined, { rate: null })
      await settled(winner)
      await equal(pair)
      expect((await winner.content('data'))[0]).toBe(oneWins ? 1 : 2)
      expect(one.show('other').state).toBe('insync')
      expect(pair.relay.accepted).toBe(accepted)
    },
  )

  it.each(['beyond changes of roles', 'in one generation'] as const)(
    'a primary that was set back to a smaller size cuts nothing off before that is settled: %s',
    async (how) => {
      const pair = await setBack(2 * SIZE, how === 'beyond changes of roles')
      const { one, two } = pair
      expect(one.pool.volume('data').size).toBe(SIZE)
      expect(two.pool.volume('data').size).toBe(2 * SIZE)
      expect((await two.content('data'))[SIZE]).toBe(5)
      await one.mirrors.resolve('data', undefined, 'remote')
      await settled(one)
      expect(two.pool.volume('data').size).toBe(SIZE)
      await equal(pair)
      await one.pool.volume('data').resize(SIZE / 2, { force: true })
      await settled(one)
      expect(two.pool.volume('data').size).toBe(SIZE / 2)
    },
  )

  it('a forced demotion tells what the other side lacks', async () => {
    const pair = await mirrored()
    const { one, two } = pair
    await part(pair)
    await write(one, 0, 2)
    await write(one, 5 * BLOCK, 2)
    const { local } = await one.mirrors.demote('data', undefined, { force: true })
    expect(local).toMatchObject({ role: 'secondary', changed: 2 * BLOCK })
    const told = one.events.find(({ kind }) => kind === 'mirror.demoted')
    expect(told?.message).toContain('lacks 8K')
    pair.relay.onConnect = 'forward'
    await two.mirrors.promote('data')
    await settled(two)
    await swap(two, one)
    const planned = two.events.find(({ kind }) => kind === 'mirror.demoted')
    expect(planned?.message).not.toContain('lacks')
  })
})

/** The first side is one that was copied away before the volume had the size, and before the roles went over and back. */
async function setBack(size = SIZE, swaps = true): Promise<Pair> {
  const pair = await mirrored()
  const { one, two } = pair
  await one.close()
  const backup = `${one.directory}-backup`
  cpSync(one.directory, backup, { recursive: true })
  await one.open()
  await settled(one)
  if (size > SIZE) {
    await one.pool.volume('data').resize(size)
    await settled(one)
    await write(one, SIZE, 5)
    await settled(one)
  }
  if (swaps) {
    await swap(one, two)
    await write(two, 0, 2)
    await settled(two)
    await swap(two, one)
  }
  await write(one, BLOCK, 3)
  await settled(one)
  await one.close()
  rmSync(one.directory, { recursive: true })
  cpSync(backup, one.directory, { recursive: true })
  await one.open()
  await one.reach('data', 'splitbrain')
  return pair
}
