import { afterEach, describe, expect, it } from 'vitest'
import type { MirrorInfo, VerifyResult } from '../../src/mirror/types.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { Pair, type Side } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import type { DatapathChoice } from '../support/served-pool.ts'

const MIB = 1 << 20
const UNIT = 64 * 1024
const SIZE = 24 * MIB + 4096

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

/** Writes here and there in the first `span` bytes until it is told to stop. */
function load(client: NbdClient, seed: number, span = SIZE, writers = 3): { stop(): Promise<void> } {
  let going = true
  const random = new Random(seed)
  const work = async (): Promise<void> => {
    while (going) await client.write(random.bytes(4096), random.below(span / 4096) * 4096)
  }
  const all = Promise.all(Array.from({ length: writers }, work))
  return {
    stop: async () => {
      going = false
      await all
    },
  }
}

async function verified(side: Side, options: { repair?: boolean } = {}): Promise<VerifyResult> {
  await side.mirrors.verify('data', undefined, options)
  await until(() => side.show('data').verify?.ended !== null, 'the end of the comparison', 30_000)
  const { verify } = side.show('data')
  if (verify === null) throw new Error('no comparison')
  expect(verify.failure).toBeNull()
  return verify
}

const DATAPATHS: DatapathChoice[] = ['native', 'portable']
const MODES: [MirrorInfo['mode'], MirrorInfo['state']][] = [
  ['sync', 'insync'],
  ['async', 'cycling'],
]

describe.each(DATAPATHS)('a comparison of a live pair, %s', (datapath) => {
  describe.each(MODES)('%s', (mode, state) => {
    async function start(): Promise<{ one: Side; two: Side; client: NbdClient }> {
      // What is asked travels more slowly than what is written: the other side answers of a later moment, unless writes wait.
      const delayOfConnection = (index: number): number => (index === 1 ? 10 : 0)
      pair = await Pair.open({ datapath }, { datapath }, { delayOfConnection })
      const { one, two } = pair
      await one.pool.createVolume({ name: 'data', size: SIZE })
      const client = await one.connect('data')
      const random = new Random(7)
      for (let at = 0; at < SIZE; at += 3 * MIB)
        await client.write(random.bytes(Math.min(MIB, SIZE - at)), at)
      await one.mirrors.add({ volume: 'data', peer: pair.address, mode, intervalMs: 50 })
      await one.reach('data', state)
      return { one, two, client }
    }

    it('gives no false alarm while clients write', async () => {
      const { one, client } = await start()
      // One region never rests: its signatures are the same at a point in time only.
      const writing = load(client, 3, MIB, 16)
      for (let round = 0; round < 3; round++) {
        const { differences, compared } = await verified(one)
        expect(differences).toEqual([])
        expect(compared).toBeGreaterThanOrEqual(8 * MIB)
      }
      await writing.stop()
    })

    it('finds every unit that differs, and mends it when it is told to', async () => {
      const { one, two, client } = await start()
      await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
      const damage = [3 * UNIT, 4 * UNIT, 9 * MIB + 512, 24 * MIB]
      for (const at of damage) {
        expect(await two.pool.volume('data').submit('write', at, 512, 0, Buffer.alloc(512, 0xbd))).toBe(0)
      }
      // Formatted on one side only.
      expect(await two.pool.volume('data').submit('write', 2 * MIB, 512, 0, Buffer.alloc(512, 0xbd))).toBe(0)
      const expected = [
        { offset: 2 * MIB, length: UNIT },
        { offset: 3 * UNIT, length: 2 * UNIT },
        { offset: 9 * MIB, length: UNIT },
        { offset: 24 * MIB, length: 4096 },
      ]
      const order = (list: VerifyResult['differences']) => [...list].sort((a, b) => a.offset - b.offset)
      const found = await verified(one)
      expect(order(found.differences)).toEqual(order(expected))
      expect(found.repaired).toBe(false)
      const writing = load(client, 5)
      const repaired = await verified(one, { repair: true })
      await writing.stop()
      expect(repaired.repaired).toBe(true)
      await one.reach('data', state)
      await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
      expect((await verified(one)).differences).toEqual([])
      expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
    })

    it('mends more than it compares at one point in time', async () => {
      const { one, two } = await start()
      await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
      for (let at = 0; at < 24 * MIB; at += MIB) {
        expect(await two.pool.volume('data').submit('write', at, 512, 0, Buffer.alloc(512, 0xbd))).toBe(0)
      }
      const repaired = await verified(one, { repair: true })
      expect(repaired.repaired).toBe(true)
      expect(repaired.differing).toBe(24 * UNIT)
      await one.reach('data', state)
      await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
      expect((await verified(one)).differences).toEqual([])
      expect((await two.content('data')).equals(await one.content('data'))).toBe(true)
    })

    it('ends when the mirror is paused', async () => {
      const { one, two } = await start()
      await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
      expect(await two.pool.volume('data').submit('write', 0, 512, 0, Buffer.alloc(512, 0xbd))).toBe(0)
      await one.mirrors.verify('data', undefined, {})
      await one.mirrors.pause('data', undefined)
      await until(() => one.show('data').verify?.ended !== null, 'the end of the comparison', 30_000)
      await one.mirrors.resume('data', undefined)
      await one.reach('data', state)
      expect((await verified(one)).differing).toBe(UNIT)
    })
  })
})
