import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { afterEach, describe, expect, it } from 'vitest'
import { Pair } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'

const run = promisify(execFile)
const MIB = 1 << 20
const UNIT = 64 * 1024

let pair: Pair | undefined
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

describe('fullstripe:copy:NAME', () => {
  it('tells what the secondary lacks, also to others', async () => {
    pair = await Pair.open({ datapath: 'native' })
    const { one } = pair
    await one.pool.createVolume({ name: 'data', size: 8 * MIB + 4096 })
    const writer = await one.connect('data', ['base:allocation', 'fullstripe:init'])
    await writer.write(new Random(1).bytes(MIB), 0)
    await one.mirrors.add({ volume: 'data', peer: pair.address, name: 'site-b', intervalMs: 10 })
    await one.reach('data', 'cycling')
    await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
    const context = 'fullstripe:copy:site-b'
    const reader = await one.connect('data', [context])
    const extents = async () => {
      const found = []
      for await (const extent of reader.extents(0, reader.size, context)) found.push(extent)
      return found
    }
    expect(await extents()).toEqual([{ offset: 0, length: 8 * MIB + 4096, flags: 0 }])
    await one.mirrors.pause('data')
    await writer.write(Buffer.alloc(4096, 1), 3 * UNIT + 512)
    await writer.trim({ offset: 5 * UNIT, length: 2 * UNIT })
    await writer.write(Buffer.alloc(512, 1), 8 * MIB + 1024)
    const lacking = [
      { offset: 0, length: 3 * UNIT, flags: 0 },
      { offset: 3 * UNIT, length: UNIT, flags: 1 },
      { offset: 4 * UNIT, length: UNIT, flags: 0 },
      { offset: 5 * UNIT, length: 2 * UNIT, flags: 1 },
      { offset: 7 * UNIT, length: 8 * MIB - 7 * UNIT, flags: 0 },
      { offset: 8 * MIB, length: 4096, flags: 1 },
    ]
    expect(await extents()).toEqual(lacking)
    expect([...one.mirrors.copyExtents('data', 'site-b', 0, 8 * MIB + 4096)]).toEqual(
      lacking.map(({ offset, length, flags }) => ({ offset, length, copied: flags === 0 })),
    )
    const { stdout } = await run('nbdinfo', ['--json', `--map=${context}`, one.uri('data')])
    const told: unknown = JSON.parse(stdout)
    expect(told).toEqual(
      lacking.map(({ offset, length, flags }) => expect.objectContaining({ offset, length, type: flags })),
    )
    await one.mirrors.resume('data')
    await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
    expect(await extents()).toEqual([{ offset: 0, length: 8 * MIB + 4096, flags: 0 }])
    // It goes with the mirror.
    await one.mirrors.remove('data')
    const later = await one.connect('data', ['base:allocation', context])
    expect(later.export.contexts.map(({ name }) => name)).toEqual(['base:allocation'])
  })
})
