import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import type { HotSetOptions } from '../../src/volume/hot-set.ts'
import { createPool } from '../../src/volume/pool.ts'
import type { ChangeWatcher } from '../../src/volume/watchers.ts'
import { until } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS } from '../support/volumes.ts'

/** What whoever does every request elsewhere, too, may rely on (watchers.ts). */
const STRIPE = 4096
const REGION = 4 * STRIPE

describe.each(DATAPATHS)('requests that are forwarded, over %s', (datapath) => {
  let base: string
  let served: ServedPool
  let client: NbdClient

  beforeEach(() => {
    base = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'fullstripe-watchers-'))
  })
  afterEach(async () => {
    await served.close()
    rmSync(base, { recursive: true, force: true })
  })

  async function start(
    hotSet: HotSetOptions,
    forward: ChangeWatcher['forward'],
    needs: Pick<ChangeWatcher, 'needsIntent' | 'settle'> = {
      needsIntent: () => false,
      settle: async () => {},
    },
  ): Promise<void> {
    const directory = join(base, 'pool')
    await createPool(directory, { capacity: 1 << 22, chunkSize: STRIPE })
    served = await ServedPool.open(directory, datapath, { hotSet })
    await served.pool.createVolume({ name: 'v', size: 16 * REGION, intents: true, regionSize: REGION })
    served.pool.volume('v').watch({
      prepare: () => undefined,
      mayOpen: () => false,
      forwards: true,
      forward,
      failedHere: () => {},
      ...needs,
      flush: () => undefined,
      sizeChanges: async () => {},
      sizeChanged: () => {},
    })
    client = await served.connect('v')
  }

  it('go to the other side when their intents are recorded, part by part, whole', async () => {
    const seen: { offset: number; length: number; hot: boolean }[] = []
    await start({}, (_upcall, offset, length) => {
      const map = served.pool.volume('v').intentMap
      seen.push({ offset, length, hot: map?.isHot(map.regionOf(offset / STRIPE)) === true })
      return undefined
    })
    await client.write(Buffer.alloc(2 * REGION, 1), REGION - STRIPE / 2)
    await client.trim({ offset: REGION, length: STRIPE })
    await client.write(Buffer.alloc(512, 2), 9 * REGION + 512)
    expect(seen.every(({ hot }) => hot)).toBe(true)
    const first = seen.slice(0, 9).sort((a, b) => a.offset - b.offset)
    expect(first[0]).toMatchObject({ offset: REGION - STRIPE / 2, length: STRIPE / 2 })
    expect(first.reduce((sum, { length }) => sum + length, 0)).toBe(2 * REGION)
    expect(seen.slice(9)).toEqual([
      { offset: REGION, length: STRIPE, hot: true },
      { offset: 9 * REGION + 512, length: 512, hot: true },
    ])
  })

  it('keep their region hot until the other side has them', async () => {
    let known = (): void => {}
    let asked = 0
    const isKnown = new Promise<void>((resolve) => {
      known = resolve
    })
    await start({ regionsMax: 1, coolMs: 1 }, () => {
      asked++
      return { answered: Promise.resolve(), known: isKnown }
    })
    const { intentMap } = served.pool.volume('v')
    await client.write(Buffer.alloc(512, 1), 0)
    const other = client.write(Buffer.alloc(512, 2), 8 * REGION)
    for (let n = 0; n < 8; n++) await client.flush() // whatever would cool it has had its turn
    expect(intentMap?.isHot(0)).toBe(true)
    expect(asked).toBe(1)
    known()
    await other
    expect(asked).toBe(2)
    expect(intentMap?.isHot(8)).toBe(true)
  })
  it('keep regions hot that they need for something else, and are asked to settle when there is no room', async () => {
    const needed = new Set([0])
    let settle = (): void => {}
    let asked = 0
    await start({ regionsMax: 1, coolMs: 1 }, () => undefined, {
      needsIntent: (offset, length) => [...needed].some((at) => at < offset + length && at + REGION > offset),
      settle: () => {
        if (needed.size === 0) return Promise.resolve()
        asked++
        return new Promise((resolve) => {
          settle = () => {
            needed.clear()
            resolve()
          }
        })
      },
    })
    const { intentMap } = served.pool.volume('v')
    await client.write(Buffer.alloc(512, 1), 0)
    const other = client.write(Buffer.alloc(512, 2), 8 * REGION)
    await until(() => asked > 0, 'somebody waits for the region to be needed no longer')
    for (let n = 0; n < 8; n++) await client.flush() // whatever would cool it has had its turn
    expect(intentMap?.isHot(0)).toBe(true)
    settle()
    await other
    expect(intentMap?.isHot(8)).toBe(true)
    expect(intentMap?.isHot(0)).toBe(false)
  })
})
