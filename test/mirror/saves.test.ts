import { afterEach, describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import { Saves } from '../../src/mirror/saves.ts'
import { Pair, Side } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { DATAPATHS } from '../support/volumes.ts'

/** Slots in memory; as many as there are. */
function slots(count: number) {
  const stripeSize = 4096
  const content = new Map<number, Buffer>()
  const free = Array.from({ length: count }, (_, index) => index + 1)
  const givers = new Set<() => void>()
  return {
    free,
    givers,
    whenWanted: (giveBack: () => void) => {
      givers.add(giveBack)
      return () => void givers.delete(giveBack)
    },
    wanted: () => {
      for (const giveBack of [...givers]) giveBack()
    },
    stripeSize,
    allocate: async (wanted: number) => {
      if (free.length < wanted) throw new StoreError('NO_SPACE', 'full')
      return free.splice(0, wanted)
    },
    write: async (slot: number, source: Buffer) => {
      content.set(slot, Buffer.from(source))
    },
    read: async (slot: number, target: Buffer) => {
      content.get(slot)?.copy(target)
    },
    give: (back: readonly number[]) => free.push(...back),
  }
}

const host = (store: ReturnType<typeof slots>) => ({
  ...store,
  free: (back: readonly number[]) => void store.give(back),
})

describe('content that is saved before it is overwritten', () => {
  it('stays in memory up to the bound, and goes to free slots beyond it', async () => {
    const random = new Random(1)
    const store = slots(100)
    const saves = new Saves(host(store), 3 * 8192)
    const contents = Array.from({ length: 8 }, () => random.bytes(8192))
    const kept = []
    for (const content of contents) kept.push(await saves.keep(Buffer.from(content)))
    expect(store.free.length).toBe(100 - 5 * 2)
    for (const [index, saved] of kept.entries())
      expect((await saved.take()).equals(contents[index] ?? Buffer.alloc(0))).toBe(true)
    expect(store.free.length).toBe(100)
    // The memory is free again, too.
    for (let n = 0; n < 3; n++) (await saves.keep(Buffer.alloc(8192))).forget()
    await saves.keep(Buffer.alloc(3 * 8192))
    expect(store.free.length).toBe(100)
  })

  it('gives slots back where they are forgotten, or cannot be written', async () => {
    const store = slots(4)
    const saves = new Saves(host(store), 0)
    const saved = await saves.keep(Buffer.alloc(4096 * 3 + 512))
    expect(store.free.length).toBe(0)
    await expect(saves.keep(Buffer.alloc(4096))).rejects.toThrow('full')
    saved.forget()
    saved.forget()
    expect(store.free.length).toBe(4)
    const failing = new Saves(
      { ...host(store), write: () => Promise.reject(new StoreError('MEMBER_IO', 'no')) },
      0,
    )
    await expect(failing.keep(Buffer.alloc(8192))).rejects.toThrow('no')
    expect(store.free.length).toBe(4)
  })

  it('reads back a last piece that is no whole stripe', async () => {
    const saves = new Saves(host(slots(4)), 0)
    const content = new Random(5).bytes(4096 + 512)
    const saved = await saves.keep(Buffer.from(content))
    expect((await saved.take()).equals(content)).toBe(true)
  })

  it('gives slots back when they are wanted: what was in them is lost, and nothing is kept until all of it is forgotten', async () => {
    const store = slots(10)
    const saves = new Saves(host(store), 4096)
    const inMemory = await saves.keep(Buffer.alloc(4096, 1))
    expect(store.givers.size).toBe(0)
    const first = await saves.keep(Buffer.alloc(8192, 2))
    const second = await saves.keep(Buffer.alloc(8192, 3))
    expect(store.givers.size).toBe(1)
    store.wanted()
    expect(store.free.length).toBe(10)
    expect(store.givers.size).toBe(0)
    expect((await inMemory.take()).equals(Buffer.alloc(4096, 1))).toBe(true)
    await expect(saves.keep(Buffer.alloc(4096))).rejects.toMatchObject({ code: 'NO_SPACE' })
    await expect(first.take()).rejects.toMatchObject({ code: 'NO_SPACE' })
    await expect(saves.keep(Buffer.alloc(4096))).rejects.toMatchObject({ code: 'NO_SPACE' })
    second.forget()
    second.forget()
    first.forget()
    expect(store.free.length).toBe(10)
    const again = await saves.keep(Buffer.alloc(8192, 4))
    expect((await again.take()).equals(Buffer.alloc(8192, 4))).toBe(true)
    expect(store.free.length).toBe(10)
    expect(store.givers.size).toBe(0)
  })

  it('does not give back what is being read or written', async () => {
    const store = slots(4)
    let goOn = (): void => {}
    const held = new Promise<void>((resolve) => {
      goOn = resolve
    })
    const slow = {
      ...host(store),
      read: async (slot: number, target: Buffer) => {
        await held
        await store.read(slot, target)
      },
    }
    const saves = new Saves(slow, 0)
    const saved = await saves.keep(Buffer.alloc(8192, 7))
    const taking = saved.take()
    const keeping = saves.keep(Buffer.alloc(4096))
    store.wanted()
    expect(store.free.length).toBe(1)
    goOn()
    expect((await taking).equals(Buffer.alloc(8192, 7))).toBe(true)
    const kept = await keeping
    expect(store.free.length).toBe(3)
    kept.forget()
    expect(store.free.length).toBe(4)
  })
})

describe.each(DATAPATHS)('the room of a pool and its mirrors over %s', (datapath) => {
  const ends: (() => Promise<void>)[] = []
  afterEach(async () => {
    for (const end of ends.splice(0)) await end()
  })
  const MiB = 2 ** 20
  const UNIT = 65536

  it('what can be done without leaves the last slots to clients, and gives all back where they lack some', async () => {
    const side = await Side.create({ datapath, pool: { capacity: 160 * UNIT } })
    ends.push(() => side.destroy())
    const volume = await side.pool.createVolume({ name: 'data', size: 200 * UNIT })
    const client = await side.connect('data')
    const scratch = volume.scratch()
    const spare = 160 - Math.ceil(160 / LIMITS.poolReserveShare)
    let taken = await scratch.allocate(spare)
    const end = scratch.whenWanted(() => {
      scratch.free(taken)
      taken = []
    })
    await expect(scratch.allocate(1)).rejects.toMatchObject({ code: 'NO_SPACE' })
    await client.write(Buffer.alloc((160 - spare) * UNIT, 1), 0)
    expect(taken.length).toBe(spare)
    await client.write(Buffer.alloc(UNIT, 2), 199 * UNIT)
    expect(taken.length).toBe(0)
    await client.write(Buffer.alloc(spare * UNIT - UNIT, 3), (160 - spare) * UNIT)
    await expect(client.write(Buffer.alloc(UNIT), 180 * UNIT)).rejects.toMatchObject({ code: 'NO_SPACE' })
    end()
  })

  it('what a slow cycle saves never fails the clients of other volumes, and the mirror goes on later', async () => {
    const pair = await Pair.open({ datapath, pool: { capacity: 152 * MiB } }, { datapath })
    ends.push(() => pair.close())
    const { one, two, relay } = pair
    const size = 64 * MiB
    await one.pool.createVolume({ name: 'data', size })
    await one.pool.createVolume({ name: 'other', size: 80 * MiB })
    const client = await one.connect('data')
    const other = await one.connect('other')
    const fill = async (byte: number): Promise<void> => {
      for (let at = 0; at < size; at += MiB) await client.write(Buffer.alloc(MiB, byte), at)
    }
    await fill(1)
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 100 })
    await one.reach('data', 'cycling')
    await until(() => one.show('data').lag.bytes === 0, 'in step', 30_000)
    await one.mirrors.pause('data')
    await fill(2)
    relay.up.bytesPerSecond = MiB
    await one.mirrors.resume('data')
    await until(() => one.show('data').progress?.what === 'cycle', 'a cycle')
    await fill(3) // more of it is saved than what is kept in memory
    expect(one.show('data').counters.saves * UNIT).toBeGreaterThan(LIMITS.mirrorSavedMax + 8 * MiB)
    for (let at = 0; at < 80 * MiB; at += MiB) await other.write(Buffer.alloc(MiB, 4), at)
    relay.up.bytesPerSecond = Number.POSITIVE_INFINITY
    await until(() => one.show('data').lag.bytes === 0, 'in step again', 60_000)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  }, 120_000)

  it('attempts that fail while content is sent come further and further apart, until one gets through', async () => {
    const pair = await Pair.open({ datapath }, { datapath, pool: { capacity: 8 * MiB } })
    ends.push(() => pair.close())
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: 24 * MiB })
    const client = await one.connect('data')
    for (let at = 0; at < 24 * MiB; at += MiB) await client.write(Buffer.alloc(MiB, 1), at)
    const failures: number[] = []
    const watch = setInterval(() => {
      const count = one.events.filter(({ message }) => message.startsWith('copying -> connecting')).length
      if (count > failures.length) failures.push(performance.now())
    }, 5)
    ends.push(async () => clearInterval(watch))
    await one.mirrors.add({ volume: 'data', peer: pair.address, intervalMs: 100 })
    await until(() => failures.length >= 3, 'three failures', 30_000)
    const [first = 0, second = 0, third = 0] = failures
    expect(second - first).toBeGreaterThan(LIMITS.mirrorRetryMsMin - 50)
    expect(third - second).toBeGreaterThan(2 * LIMITS.mirrorRetryMsMin - 50)
    clearInterval(watch)
    await client.trim({ offset: 4 * MiB, length: 20 * MiB })
    await one.reach('data', 'cycling')
    await until(() => one.show('data').lag.bytes === 0, 'in step', 30_000)
    expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
  }, 60_000)
})
