import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { CHANGE } from '../../src/metadata/journal.ts'
import { checkPool } from '../../src/volume/check.ts'
import {
  closeParts,
  createPool,
  openPoolParts,
  Pool,
  type PoolEvent,
  volumeNameProblem,
} from '../../src/volume/pool.ts'

const log = pino({ level: 'silent' })
const MiB = 2 ** 20
const TiB = 2 ** 40

let base: string
let directory: string
let events: PoolEvent[]
beforeEach(() => {
  base = mkdtempSync(join(tmpdir(), 'fullstripe-pool-'))
  directory = join(base, 'pool')
  events = []
})
afterEach(() => rmSync(base, { recursive: true, force: true }))

const open = (): Promise<Pool> =>
  Pool.open(directory, { datapath: 'portable', log, onEvent: (event) => events.push(event) })

describe('pool', () => {
  it('is made in an empty directory and opened again, empty', async () => {
    const made = await createPool(directory, { capacity: 64 * MiB })
    expect(made).toMatchObject({ capacity: 64 * MiB, stripeSize: 65536, slotsUsed: 0, dataMembers: 1 })
    const pool = await open()
    expect(pool.info()).toMatchObject({ uuid: made.uuid, slots: 1024, slotsUsed: 0 })
    expect(pool.volumes()).toEqual([])
    await pool.close()
    expect((await checkPool(directory)).status).toBe('clean')
  })

  it('takes no space and no time for a huge volume, thin or thick', async () => {
    await createPool(directory, { capacity: 40 * TiB })
    const pool = await open()
    const before = process.memoryUsage().rss
    await pool.createVolume({ name: 'thin', size: 16 * TiB })
    await pool.createVolume({ name: 'thick', size: 16 * TiB, provision: 'thick' })
    expect(pool.info().reserved).toBe(16 * TiB)
    expect(process.memoryUsage().rss - before).toBeLessThan(150e6)
    await pool.close()
    const again = await open()
    expect(again.volumes().map((volume) => volume.info().size)).toEqual([16 * TiB, 16 * TiB])
    expect(again.info().reserved).toBe(16 * TiB)
    await again.close()
    expect(
      readdirSync(directory).reduce((sum, name) => sum + statSync(join(directory, name)).blocks * 512, 0),
    ).toBeLessThan(64 * MiB)
  })

  it('keeps names, sizes, provision and fill over a restart; renames and deletes', async () => {
    await createPool(directory, { capacity: 64 * MiB })
    let pool = await open()
    await pool.createVolume({ name: 'a', size: 1 * MiB, formatUnit: 4, fill: 0xe5, readOnly: true })
    await pool.createVolume({ name: 'b', size: 3 * 512, provision: 'thick' })
    await pool.renameVolume('b', 'c')
    await pool.close()
    pool = await open()
    expect(pool.volumes().map((volume) => volume.name)).toEqual(['a', 'c'])
    expect(pool.volume('a').info()).toMatchObject({
      size: MiB,
      formatUnit: 4,
      fill: 0xe5,
      readOnly: true,
      stripes: 16,
    })
    expect(pool.volume('c').info()).toMatchObject({ size: 1536, provision: 'thick', stripes: 1 })
    await pool.deleteVolume('c')
    expect(() => pool.volume('c')).toThrow(/no volume "c"/)
    expect(pool.info().reserved).toBe(0)
    await pool.close()
    pool = await open()
    expect(pool.volumes().map((volume) => volume.name)).toEqual(['a'])
    await pool.close()
  })

  it('refuses what cannot be a volume, each with its reason, and stays as it was', async () => {
    await createPool(directory, { capacity: 16 * MiB })
    const pool = await open()
    await pool.createVolume({ name: 'taken', size: MiB })
    const bad: [Parameters<Pool['createVolume']>[0], RegExp][] = [
      [{ name: 'x', size: 0 }, /larger than zero/],
      [{ name: 'x', size: -4096 }, /larger than zero/],
      [{ name: 'x', size: Number.NaN }, /larger than zero/],
      [{ name: 'x', size: 1000 }, /not a multiple of 512/],
      [{ name: 'x', size: 2 ** 52 }, /beyond the limit/],
      [{ name: 'x', size: MiB, formatUnit: 0 }, /format unit/],
      [{ name: 'x', size: MiB, formatUnit: 257 }, /format unit/],
      [{ name: 'x', size: MiB, fill: 256 }, /fill byte/],
      [{ name: 'x', size: 64 * MiB, provision: 'thick' }, /no contiguous/],
      [{ name: 'taken', size: MiB }, /exists already/],
      [{ name: 'a/b', size: MiB }, /contains \//],
      [{ name: 'a@b', size: MiB }, /contains/],
      [{ name: 'a\nb', size: MiB }, /control characters/],
      [{ name: '', size: MiB }, /empty/],
      [{ name: 'n'.repeat(256), size: MiB }, /longer than 255/],
      [{ name: ' x', size: MiB }, /white space/],
      [{ name: '..', size: MiB }, /not allowed/],
    ]
    for (const [options, reason] of bad)
      await expect(pool.createVolume(options), JSON.stringify(options)).rejects.toThrow(reason)
    expect(pool.volumes().map((volume) => volume.name)).toEqual(['taken'])
    expect(pool.info().reserved).toBe(0)
    await pool.close()
  })

  it('names what is wrong with a name, and takes any other', () => {
    for (const name of ['a', 'vm 1', 'größe', '日本', 'a.b:c', 'n'.repeat(255)])
      expect(volumeNameProblem(name)).toBeUndefined()
  })

  it('has one owner at a time', async () => {
    await createPool(directory, { capacity: 16 * MiB })
    const pool = await open()
    await expect(open()).rejects.toMatchObject({ code: 'BUSY' })
    await expect(checkPool(directory)).rejects.toMatchObject({ code: 'BUSY' })
    await pool.close()
    await (await open()).close()
  })

  it('is not made over something else, and leaves nothing behind when it cannot be made', async () => {
    await createPool(directory, { capacity: 16 * MiB })
    await expect(createPool(directory)).rejects.toMatchObject({ code: 'EXISTS' })
    const other = join(base, 'other')
    await expect(createPool(other, { members: [join(base, 'missing-directory', 'disk')] })).rejects.toThrow(
      /member 0/,
    )
    await expect(createPool(other, { capacity: 0 })).rejects.toThrow(/capacity/)
    expect(existsSync(other)).toBe(false)
    await expect(Pool.open(join(base, 'nothing'), { datapath: 'portable', log })).rejects.toMatchObject({
      code: 'NOT_FOUND',
    })
  })

  it('refuses a journal that formats what has no slots, by name, and so does the check', async () => {
    await createPool(directory, { capacity: 64 * MiB })
    const pool = await open()
    await pool.createVolume({ name: 'a', size: MiB })
    await pool.close()
    const parts = await openPoolParts(directory, 'test')
    const { lastSequence } = parts.journal.recover(parts.store.checkpoint())
    await parts.journal.start(lastSequence)
    const [record] = [...parts.store.volumes()]
    parts.journal.append([{ op: CHANGE.formatted, medium: record?.medium ?? 0, first: 5, count: 1, slot: 0 }])
    await parts.journal.sync()
    await closeParts(parts)
    await expect(open()).rejects.toMatchObject({ message: expect.stringContaining('unit 5 of medium') })
    const { status, findings } = await checkPool(directory)
    expect(status).toBe('damaged')
    expect(findings.map(({ message }) => message).join()).toContain('unit 5 of medium')
  })
})
