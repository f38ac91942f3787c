import { beforeEach, describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { IntentMap } from '../../src/metadata/intents.ts'
import { CHANGE } from '../../src/metadata/journal.ts'
import { HotSet, type HotSetHost } from '../../src/volume/hot-set.ts'
import { VolumeIntents } from '../../src/volume/intents.ts'
import { until } from '../support/poll.ts'

/** The hot set alone, over a host whose every answer the test gives, or which notes what it was asked. */
const UNITS = 400

let steps: string[]
let syncs: { begun: number; last: number }
let hold: ((what: string) => Promise<void>) | undefined
let direct: Set<number> // units that are written in place with no decision
let busy = new Set<number>() // units that are on their way to somewhere
let settle: (() => void)[] = [] // whoever waits for those

const host: HotSetHost = {
  record: async (changes, apply) => {
    const text = changes.map(
      ({ op, first, count }) => `${op === CHANGE.hot ? 'hot' : 'cool'} ${first}+${count}`,
    )
    steps.push(text.join(', '))
    await hold?.('record')
    apply()
  },
  harden: async () => {
    steps.push('harden')
    await hold?.('harden')
  },
  barrier: async () => {
    steps.push('barrier')
    await hold?.('barrier')
  },
  flush: async () => {
    steps.push('flush')
    const sync = ++syncs.begun
    await hold?.('flush')
    syncs.last = sync
  },
  syncsBegun: () => syncs.begun,
  lastSync: () => syncs.last,
  onTrouble: (message) => steps.push(`trouble: ${message}`),
}

function volume(set: HotSet, map = new IntentMap(7, 4, UNITS)): VolumeIntents {
  return new VolumeIntents(set, map, {
    openUnits: (first, count) => {
      for (let unit = first; unit < first + count; unit++) direct.add(unit)
    },
    clearUnits: (first, count) => {
      for (let unit = first; unit < first + count; unit++) direct.delete(unit)
    },
    areClear: (first, count) => ![...direct].some((unit) => unit >= first && unit < first + count),
    areBusy: (first, count) => [...busy].some((unit) => unit >= first && unit < first + count),
    settled: () => new Promise((resolve) => settle.push(resolve)),
  })
}
const turn = () => new Promise((resolve) => setImmediate(resolve))
const regionOf = (unit: number) => unit * 4

beforeEach(() => {
  steps = []
  syncs = { begun: 0, last: 0 }
  hold = undefined
  direct = new Set()
  busy = new Set()
  settle = []
})

describe('the hot set', () => {
  it('records, hardens, and only then lets writes go in place', async () => {
    const set = new HotSet(host, { coolMs: 60_000 })
    const intents = volume(set)
    const held: (() => void)[] = []
    hold = () => new Promise((resolve) => held.push(resolve))
    const announced = intents.announce(regionOf(3), false)
    expect(intents.tryPin(12)).toBeUndefined()
    await turn()
    held.shift()?.()
    await turn()
    expect(steps).toEqual(['hot 3+1', 'harden'])
    expect(intents.map.isHot(3)).toBe(true)
    expect(intents.tryPin(12)).toBeUndefined() // recorded, not durable
    expect(intents.isHot(12)).toBe(false)
    expect(direct.size).toBe(0)
    held.shift()?.()
    await announced
    expect([...direct]).toEqual([12, 13, 14, 15])
    expect(intents.isHot(15)).toBe(true)
    expect(intents.isHot(16)).toBe(false)
    const region = intents.tryPin(13)
    expect(region?.pins).toBe(1)
  })

  it('has one mark for all who wait for a region', async () => {
    const intents = volume(new HotSet(host, { coolMs: 60_000 }))
    await Promise.all([0, 1, 2, 3].map((unit) => intents.announce(unit, false)))
    expect(steps).toEqual(['hot 0+1', 'harden'])
    expect(intents.announced).toBe(1)
  })

  it('announces what lies ahead, as long as nothing has to cool for it', async () => {
    const intents = volume(new HotSet(host, { coolMs: 60_000, regionsMax: 16 }))
    await intents.announce(0, true)
    expect(intents.announced).toBe(9)
    await intents.announce(regionOf(50), true)
    expect(intents.announced).toBe(14) // 16, less an eighth
    await intents.announce(regionOf(98), true)
    expect(intents.announced).toBe(15)
  })

  it('cools what nobody comes to: direct bits, barrier, flush, record', async () => {
    const set = new HotSet(host, { coolMs: 5 })
    const intents = volume(set)
    await Promise.all([intents.announce(0, false), intents.announce(regionOf(1), false)])
    await intents.announce(regionOf(9), false)
    steps = []
    await until(() => intents.map.hotCount === 0, 'all are cool')
    expect(direct.size).toBe(0)
    // The first barrier is that of the sweep which cleared the bits.
    expect(steps).toEqual(['barrier', 'barrier', 'flush', 'cool 0+2, cool 9+1'])
    await set.close()
  })

  it('does not flush for what a flush of somebody else has covered', async () => {
    const set = new HotSet(host, { coolMs: 20 })
    const intents = volume(set)
    await intents.announce(0, false)
    await until(() => direct.size === 0 && steps.includes('barrier'), 'the bits are clear')
    await turn()
    await host.flush()
    steps = []
    await until(() => intents.map.hotCount === 0, 'it is cool')
    expect(steps.filter((step) => step === 'flush')).toEqual([])
    await set.close()
  })

  it('keeps what somebody comes to while it cools, at whatever moment', async () => {
    for (const moment of ['barrier', 'flush', 'record'] as const) {
      steps = []
      direct.clear()
      const held: (() => void)[] = []
      const set = new HotSet(host, { coolMs: 5 })
      const intents = volume(set)
      await intents.announce(0, false)
      hold = (what) => (what === moment ? new Promise((resolve) => held.push(resolve)) : Promise.resolve())
      const reached = (): boolean => held.length > 0 && (moment !== 'record' || steps.includes('cool 0+1'))
      await until(reached, moment)
      const region = intents.tryPin(2)
      if (moment === 'record') {
        // Too late: it is marked again, behind the record that is being made.
        expect(region).toBeUndefined()
        hold = undefined
        const again = intents.announce(2, false)
        for (const go of held.splice(0)) go()
        await again
        expect(steps.filter((step) => step.startsWith('hot') || step.startsWith('cool'))).toEqual([
          'hot 0+1',
          'cool 0+1',
          'hot 0+1',
        ])
        // The order in which the ledger applies them.
        expect(intents.isHot(2)).toBe(true)
      } else {
        expect(intents.isHot(2)).toBe(true)
        expect(direct.has(0)).toBe(true)
        hold = undefined
        for (const go of held.splice(0)) go()
        await turn()
        expect(intents.map.isHot(0)).toBe(true)
        expect(steps).not.toContain('cool 0+1')
        if (region !== undefined) intents.unpin(region)
      }
      await set.close()
    }
  })

  it('makes room by the clock: who was come to since its hand passed stays', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 16 })
    const intents = volume(set)
    for (let region = 0; region < 60; region++) {
      await intents.announce(regionOf(region), false)
      expect(intents.map.hotCount).toBeLessThanOrEqual(16)
      // The first region is in use all the time.
      const pinned = intents.tryPin(0)
      if (pinned === undefined) await intents.announce(0, false)
      else intents.unpin(pinned)
    }
    await turn()
    const cooled = steps
      .join(', ')
      .split(', ')
      .filter((step) => step.startsWith('cool'))
    expect(cooled.length).toBeGreaterThan(20)
    // Only where none was idle: a flush takes no time here, so that it has no chance then.
    expect(cooled.filter((step) => step.startsWith('cool 0+')).length).toBeLessThanOrEqual(3)
    await set.close()
  })

  it('cools nothing that is held, and goes on when it is let go', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 3 })
    const intents = volume(set)
    const pins = []
    for (const region of [0, 1, 2]) {
      await intents.announce(regionOf(region), false)
      pins.push(intents.tryPin(regionOf(region)))
    }
    let hot = false
    const waiting = intents.announce(regionOf(3), false).then(() => {
      hot = true
    })
    for (let i = 0; i < 5; i++) await turn()
    expect(hot).toBe(false)
    expect(intents.map.hotCount).toBe(3)
    const [first] = pins
    if (first !== undefined) intents.unpin(first)
    await waiting
    expect([...intents.map.hot()]).toEqual([1, 2, 3])
    await set.close()
  })

  it('cools no region in which something is on its way, and waits for nobody where others can cool', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 4 })
    const intents = volume(set)
    busy.add(regionOf(0)).add(regionOf(2) + 3)
    for (const region of [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) await intents.announce(regionOf(region), false)
    expect(intents.map.isHot(0) && intents.map.isHot(2)).toBe(true)
    expect(intents.map.hotCount).toBeLessThanOrEqual(4)
    expect(settle).toEqual([])
    busy.clear()
    for (const region of [10, 11, 12, 13, 14, 15, 16, 17]) await intents.announce(regionOf(region), false)
    expect(intents.map.isHot(0) || intents.map.isHot(2)).toBe(false)
    await set.close()
  })

  it('waits, without asking again and again, where something is on its way in all of them', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 2 })
    const intents = volume(set)
    for (const region of [0, 1]) busy.add(regionOf(region))
    for (const region of [0, 1]) await intents.announce(regionOf(region), false)
    expect(settle).toEqual([]) // nobody waits for a place
    let hot = false
    const announced = intents.announce(regionOf(2), false).then(() => {
      hot = true
    })
    await until(() => settle.length > 0, 'it waits for them')
    const asked = steps.length
    for (let i = 0; i < 20; i++) await turn()
    expect({ hot, asked: steps.length, waits: settle.length }).toEqual({ hot: false, asked, waits: 1 })
    expect(steps).not.toContain('flush')
    // Something is over, but in neither of them: it looks again, and waits again.
    settle.shift()?.()
    await until(() => settle.length > 0, 'it waits again')
    expect([...intents.map.hot()]).toEqual([0, 1])
    busy.delete(regionOf(1))
    settle.shift()?.()
    await announced
    expect(intents.map.isHot(0)).toBe(true)
    expect(intents.map.isHot(1)).toBe(false)
    await set.close()
  })

  it('does not take a region for quiet before what is on its way there is over', async () => {
    const set = new HotSet(host, { coolMs: 5 })
    const intents = volume(set)
    await intents.announce(0, false)
    busy.add(0)
    await until(
      () => direct.size === 0 && steps.filter((step) => step === 'barrier').length >= 3,
      'it is idle',
    )
    expect(intents.map.isHot(0)).toBe(true)
    await host.flush()
    steps = []
    busy.clear()
    await until(() => !intents.map.isHot(0), 'it is cool')
    // A sync that began before it was over tells nothing.
    expect(steps.slice(0, 2)).toEqual(['barrier', 'flush'])
    await set.close()
  })

  it('fails those who wait for a place when nothing can be flushed, and leaves the others hot', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 2 })
    const intents = volume(set)
    hold = async (what) => {
      if (what === 'flush') throw new StoreError('MEMBER_IO', 'no such luck')
    }
    for (const region of [0, 1]) await intents.announce(regionOf(region), false)
    await expect(intents.announce(regionOf(2), false)).rejects.toThrow('no such luck')
    expect(steps.join()).toMatch(/trouble: .*no such luck/)
    expect([...intents.map.hot()]).toEqual([0, 1])
    await turn() // what was begun before it is mended
    hold = undefined
    await intents.announce(regionOf(2), false)
    expect(intents.isHot(regionOf(2))).toBe(true)
    await set.close()
  })

  it('forgets a region whose mark cannot be made, and marks it when it can', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 2 })
    const intents = volume(set)
    hold = async (what) => {
      if (what === 'record') throw new StoreError('NO_SPACE', 'full')
    }
    for (let i = 0; i < 5; i++) await expect(intents.announce(0, false)).rejects.toThrow('full')
    hold = undefined
    await Promise.all([0, 1].map((region) => intents.announce(regionOf(region), false)))
    expect([...intents.map.hot()]).toEqual([0, 1])
    await set.close()
  })

  it('forgets what is dropped in every state, and its places are free', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 4 })
    const intents = volume(set)
    const held: (() => void)[] = []
    await Promise.all([0, 1].map((region) => intents.announce(regionOf(region), false)))
    const pinned = intents.tryPin(0)
    hold = (what) => (what === 'harden' ? new Promise((resolve) => held.push(resolve)) : Promise.resolve())
    const marking = [2, 3, 4, 5].map((region) => intents.announce(regionOf(region), false))
    await turn()
    intents.drop()
    hold = undefined
    for (const go of held.splice(0)) go()
    await Promise.all(marking)
    for (const unit of [0, 4, 8, 12, 16, 20]) expect(intents.isHot(unit)).toBe(false)
    if (pinned !== undefined) intents.unpin(pinned)
    const other = volume(set, new IntentMap(8, 4, UNITS))
    await Promise.all([10, 11, 12, 13].map((region) => other.announce(regionOf(region), false)))
    expect(other.map.hotCount).toBe(4)
    await set.close()
  })

  it('cools what was hot before it began', async () => {
    const map = new IntentMap(7, 4, UNITS)
    map.apply({ op: CHANGE.hot, medium: 7, first: 5, count: 3, slot: 0 })
    const set = new HotSet(host, { coolMs: 5 })
    const intents = volume(set, map)
    const region = intents.tryPin(regionOf(6))
    expect(region).toBeDefined()
    expect(direct.has(24)).toBe(true)
    await until(() => map.hotCount === 1, 'the others are cool')
    if (region !== undefined) intents.unpin(region)
    await until(() => map.hotCount === 0, 'all are cool')
    expect(direct.size).toBe(0)
    await set.close()
  })

  it('serves many volumes, and marks of one do not stand for those of another', async () => {
    const set = new HotSet(host, { coolMs: 60_000, regionsMax: 6 })
    const volumes = [1, 2, 3].map((medium) => volume(set, new IntentMap(medium, 4, UNITS)))
    for (let i = 0; i < 30; i++) {
      direct.clear() // their units are not told apart here
      for (const [index, intents] of volumes.entries()) {
        direct.clear()
        await intents.announce(regionOf(i + index), false)
      }
      expect(volumes.reduce((sum, { map }) => sum + map.hotCount, 0)).toBeLessThanOrEqual(6)
    }
    await set.close()
  })
})
