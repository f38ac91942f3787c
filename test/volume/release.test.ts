import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { createPool } from '../../src/volume/pool.ts'
import { failingSyncs } from '../support/faults.ts'
import { isPending, until } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'
import { DATAPATHS } from '../support/volumes.ts'

/** When slots that were given back may hold something else. */
const STRIPE = 4096

describe.each(DATAPATHS)('slots that were given back, %s', (datapath) => {
  let directory: string
  let served: ServedPool
  let mend = (): void => {}

  beforeEach(async () => {
    directory = mkdtempSync(join(tmpdir(), 'fullstripe-release-'))
    await createPool(join(directory, 'pool'), { capacity: 64 * STRIPE, chunkSize: STRIPE })
    served = await ServedPool.open(join(directory, 'pool'), datapath)
  })
  afterEach(async () => {
    mend()
    await served.close().catch(() => {}) // after a failure it says that it could not store all
    rmSync(directory, { recursive: true })
  })

  it('take a first write to a thick volume only when no read can still be using them', async () => {
    await served.pool.createVolume({ name: 'v', size: 8 * STRIPE, provision: 'thick' })
    const client = await served.connect('v')
    await client.write(Buffer.alloc(STRIPE, 1), 0)
    const target = served.pool.datapath
    const barrier = target.barrier.bind(target)
    let barriers = 0
    let letGo = (): void => {}
    // The first is the one before the bits are cleared. The second stands for a read that began in between and takes its time.
    target.barrier = () => {
      barriers++
      if (barriers !== 2) return barrier()
      return new Promise<void>((resolve) => {
        letGo = resolve
      }).then(() => barrier())
    }
    const trimmed = client.trim({ offset: 0, length: STRIPE })
    await until(() => barriers === 2, 'the second barrier')
    const written = (await served.connect('v')).write(Buffer.alloc(512, 2), 0)
    const formatted = served.pool.volume('v').info().counters.fullStripeWrites
    await until(() => served.pool.volume('v').info().counters.upcalls > 2, 'the write is with the policy')
    expect(await isPending(written)).toBe(true)
    expect(served.pool.volume('v').info().counters.fullStripeWrites).toBe(formatted)
    letGo()
    await trimmed
    await written
    const content = Buffer.alloc(STRIPE)
    await client.read(content, 0)
    expect(content.equals(Buffer.concat([Buffer.alloc(512, 2), Buffer.alloc(STRIPE - 512)]))).toBe(true)
  })

  it('are not written to after a failure: what was to be stored then may be found stored later', async () => {
    const size = 4 * STRIPE + 512 // growing it formats what the old end cut off its last unit
    await served.pool.createVolume({ name: 'v', size, formatUnit: 3 })
    const client = await served.connect('v')
    await client.write(Buffer.alloc(512, 1), 4 * STRIPE)
    mend = failingSyncs()
    await expect(client.flush()).rejects.toThrow()
    mend()
    const writes = () => served.pool.datapath.memberCounters().reduce((sum, each) => sum + each.writes, 0)
    const before = writes()
    await expect(served.pool.volume('v').resize(20 * STRIPE)).rejects.toThrow(/takes no changes/)
    expect(writes()).toBe(before)
  })
})
