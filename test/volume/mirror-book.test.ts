import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { Bitmap } from '../../src/base/bitmap.ts'
import { type Change, Journal } from '../../src/metadata/journal.ts'
import type { MirrorRecord, PageKind } from '../../src/metadata/records.ts'
import { checkPool } from '../../src/volume/check.ts'
import type { StoredMirror } from '../../src/volume/mirror-book.ts'
import { closeParts, createPool, openPoolParts, type VolumeCreateOptions } from '../../src/volume/pool.ts'
import { CommitGate, failingCommits } from '../support/faults.ts'
import { mirrorRecord } from '../support/mirror-sample.ts'
import { isPending, until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { ServedPool } from '../support/served-pool.ts'
import { copyPool } from '../support/volumes.ts'

/** What the pool keeps of mirrors: over restarts, kills and transactions that fail. */
const KiB = 1024
const MiB = 1024 * KiB
const STRIPE = 4 * KiB
const REGION = 16 * KiB
const UNIT = 64 * KiB
const UNITS = 64

vi.setConfig({ testTimeout: 60_000 }) // processes and disks, on machines that do other things, too

describe('the mirrors of a pool', () => {
  let base: string
  let directory: string
  let served: ServedPool
  let mend: () => void

  beforeEach(() => {
    base = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'fullstripe-mirrors-'))
    directory = join(base, 'pool')
    mend = () => {}
  })
  afterEach(async () => {
    mend()
    await served?.close().catch(() => {})
    rmSync(base, { recursive: true, force: true })
  })

  async function open(): Promise<void> {
    served = await ServedPool.open(directory, 'portable', { hotSet: { coolMs: 60_000 } })
  }
  async function start(volume: Partial<VolumeCreateOptions> = {}): Promise<void> {
    await createPool(directory, { capacity: 4 * MiB, chunkSize: STRIPE })
    await open()
    await served.pool.createVolume({
      name: 'v',
      size: UNITS * UNIT,
      intents: true,
      regionSize: REGION,
      ...volume,
    })
  }
  async function restart(): Promise<void> {
    await served.close()
    expect(await checkPool(directory)).toMatchObject({ status: 'clean' })
    await open()
  }
  /** Goes on with what a daemon that was killed now would leave. */
  async function crash(): Promise<void> {
    const copy = join(base, `crashed-${Math.random()}`)
    copyPool(directory, copy)
    await served.close()
    directory = copy
    expect(await checkPool(directory)).toMatchObject({ status: 'clean' })
    await open()
  }
  const book = () => served.pool.mirrors
  const volume = () => served.pool.volume('v')
  const only = (): StoredMirror => {
    const [mirror, ...more] = book().all()
    if (mirror === undefined || more.length > 0) throw new Error('not one mirror')
    return mirror
  }
  const units = ({ map }: StoredMirror = only()) => {
    const found: number[] = []
    for (let unit = map.nextSet(0); unit < map.unitCount; unit = map.nextSet(unit + 1)) found.push(unit)
    expect(map.count).toBe(found.length)
    return found
  }
  const bitsOf = (set: Iterable<number>, length = UNITS) => {
    const bits = new Bitmap(length)
    for (const unit of set) bits.set(unit)
    return bits
  }
  const make =
    (change: Partial<MirrorRecord> = {}) =>
    (id: number): MirrorRecord =>
      mirrorRecord({ id, volume: volume().record.id, unitBytes: UNIT, ...change })
  const set = (first: number, count = 1) => ({ first, count, set: true })
  const clear = (first: number, count = 1) => ({ first, count, set: false })
  /** Looks into the files of a pool that is being served, as another daemon would find them. */
  async function storedPages(medium: number, kind: PageKind): Promise<Buffer[]> {
    const copy = join(base, `looked-at-${Math.random()}`)
    copyPool(directory, copy)
    const parts = await openPoolParts(copy, 'test')
    try {
      return [...parts.store.pages(medium, kind)].map(({ bytes }) => Buffer.from(bytes))
    } finally {
      await closeParts(parts)
    }
  }
  async function tamper(
    change: (parts: Awaited<ReturnType<typeof openPoolParts>>) => unknown,
  ): Promise<void> {
    await served.close()
    const parts = await openPoolParts(directory, 'test')
    await change(parts)
    await closeParts(parts)
  }

  it('are there again after a restart, with their volumes', async () => {
    await start()
    const generation = { current: 'generation-1', history: ['generation-0'] }
    const far = await book().add(make(), (id) => ({ generation, secondaryOf: id }))
    const near = await book().add(make({ name: 'near', unitBytes: 2 * UNIT }))
    expect(near.record.id).not.toBe(far.record.id)
    expect([far.map.unitCount, near.map.unitCount]).toEqual([UNITS, UNITS / 2])
    await book().record(far.record.id, [set(3), set(5, 4), clear(6)])
    await book().save(far.record.id, { cycle: 7, base: 'generation-1' })
    const records = book()
      .all()
      .map(({ record }) => record)
    await restart()
    expect(
      book()
        .of(volume().record.id)
        .map(({ record }) => record),
    ).toEqual(records)
    expect(records[0]).toMatchObject({ cycle: 7, base: 'generation-1', name: 'far' })
    expect(volume().record).toMatchObject({ generation, secondaryOf: far.record.id })
    expect(book().all().map(units)).toEqual([[3, 5, 7, 8], []])
    expect(book().of(99)).toEqual([])
    await served.pool.createVolume({ name: 'w', size: MiB }) // no number is given twice
    expect(served.pool.volume('w').record.id).toBeGreaterThan(near.record.id)
  })

  it('have their bits in the journal, without any checkpoint, and then in pages', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().record(id, [set(10, 10)])
    await book().record(id, [clear(12), clear(19)])
    expect(await storedPages(id, 'copy')).toEqual([])
    await crash()
    expect(units()).toEqual([10, 11, 13, 14, 15, 16, 17, 18])
    expect(await storedPages(id, 'copy')).toHaveLength(1)
    await book().record(id, [set(0)])
    await volume().resize(UNITS * UNIT + STRIPE) // a checkpoint
    await book().record(id, [clear(UNITS - 1, 2)]) // what a resize marks
    await book().record(id, [clear(10, 10)])
    await crash()
    expect(units()).toEqual([0])
    await book().record(id, [clear(0)])
    await restart()
    expect(await storedPages(id, 'copy')).toEqual([]) // an empty page is not stored
  })

  it('have to copy what was hot when the daemon stopped', async () => {
    await start()
    const primary = (await book().add(make())).record.id
    const coarse = (await book().add(make({ name: 'coarse', unitBytes: 3 * UNIT }))).record.id
    const fine = (await book().add(make({ name: 'fine', unitBytes: STRIPE }))).record.id
    const other = { name: 'w', size: UNITS * UNIT, intents: true, regionSize: REGION }
    const { id: w } = (await served.pool.createVolume(other)).record
    await book().add(make({ name: 'back', role: 'secondary', volume: w }))
    await (await served.connect('w')).write(Buffer.alloc(512, 1), 9 * REGION)
    const client = await served.connect('v')
    await client.write(Buffer.alloc(512, 1), 9 * REGION) // in unit 2
    await client.write(Buffer.alloc(512, 1), 25 * REGION) // in unit 6
    await book().record(primary, [set(40)])
    const found = () =>
      Object.fromEntries(
        book()
          .all()
          .map((mirror) => [mirror.record.name, units(mirror)]),
      )
    const expected = {
      far: [2, 6, 40],
      coarse: [0, 2],
      fine: [36, 37, 38, 39, 100, 101, 102, 103],
      back: [],
    }
    await crash()
    expect(found()).toEqual(expected)
    // In the transaction of the opening, not just in memory.
    const [page] = await storedPages(primary, 'copy')
    expect(page?.readUInt32LE(0)).toBe((1 << 2) | (1 << 6))
    // They stay suspect until somebody says that they are not.
    for (const id of [primary, coarse, fine])
      await book().record(id, [clear(0, served.pool.volume('v').size / STRIPE)])
    await restart()
    expect(found()).toEqual({ ...expected, far: [2, 6] })
    await volume().acknowledge()
    await book().record(primary, [clear(0, UNITS)])
    await restart()
    expect(found()).toEqual({ ...expected, far: [] })
  })

  it('have nothing to copy after an orderly stop', async () => {
    await start()
    await book().add(make())
    const client = await served.connect('v')
    await client.write(Buffer.alloc(512, 1), 9 * REGION)
    await restart()
    expect(units()).toEqual([])
  })

  it('replace all bits and the record in one transaction', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().record(id, [set(0, 8)])
    const bits = bitsOf([7, 8, 63])
    const saved = book().save(id, { cycle: 1 }, { bits, volume: { readOnly: true } })
    bits.set(20) // counts as it was at the call
    await saved
    await book().save(id, { rate: 1000 })
    expect(units()).toEqual([7, 8, 63])
    await crash()
    expect(units()).toEqual([7, 8, 63])
    expect(only().record).toMatchObject({ cycle: 1, rate: 1000 })
    expect(volume().record.readOnly).toBe(true)
    await book().save(id, {}, { bits: bitsOf([]) })
    await crash()
    expect(units()).toEqual([])
  })

  it('take others along into their transactions', async () => {
    await start()
    const { id } = (await book().add(make())).record
    const steps: string[] = []
    const prepare = () => {
      steps.push('done')
      return () => steps.push('undone')
    }
    await book().save(id, { cycle: 1 }, { prepare })
    mend = failingCommits()
    await expect(book().save(id, { cycle: 2 }, { prepare })).rejects.toThrow(/disk full/)
    mend()
    const throws = () => {
      throw new Error('not now')
    }
    await expect(book().save(id, { cycle: 3 }, { prepare: throws, bits: bitsOf([1]) })).rejects.toThrow(
      /not now/,
    )
    expect(steps).toEqual(['done', 'done', 'undone'])
    expect(only().record.cycle).toBe(1)
    await book().record(id, [set(2)]) // nothing keeps it waiting
    expect(units()).toEqual([2])
  })

  it('change in the order of the calls, also where one of them takes its time', async () => {
    await start()
    const { id } = (await book().add(make())).record
    const gate = new CommitGate(({ putMirrors }) => putMirrors !== undefined)
    mend = () => gate.open()
    const calls = [
      book().record(id, [set(1), set(5)]),
      book().save(id, { cycle: 1 }, { bits: bitsOf([3, 4]) }),
      book().record(id, [clear(3), set(9)]),
      book().save(id, { cycle: 2 }, { bits: bitsOf([9, 10, 11, 12]) }),
      book().save(id, { cycle: 3 }),
      book().record(id, [clear(11), set(20)]),
    ]
    await until(() => gate.held.length > 0, 'the first is being stored')
    expect(units()).toEqual([3, 4])
    expect(await isPending(calls[2] ?? Promise.resolve())).toBe(true)
    gate.open()
    await Promise.all(calls)
    expect(units()).toEqual([9, 10, 12, 20])
    expect(only().record.cycle).toBe(3)
    await crash()
    expect(units()).toEqual([9, 10, 12, 20])
    expect(only().record.cycle).toBe(3)
  })

  it('put what is asked for in one turn into one frame, with few records', async () => {
    await start()
    const { id } = (await book().add(make({ unitBytes: STRIPE }))).record
    const frames: (readonly Change[])[] = []
    const { append } = Journal.prototype
    mend = () => {
      Journal.prototype.append = append
    }
    Journal.prototype.append = function (this: Journal, changes: readonly Change[]): number {
      frames.push(changes)
      return append.call(this, changes)
    }
    const random = new Random(3)
    const order = Array.from({ length: 1000 }, (_, unit) => unit).sort(() => random.below(3) - 1)
    await Promise.all(order.map((unit) => book().record(id, [set(unit)])))
    await Promise.all([book().record(id, [clear(7), clear(8)]), book().record(id, [set(8)])])
    mend()
    expect(frames.map((changes) => changes.map(({ op, first, count }) => [op, first, count]))).toEqual([
      [[6, 0, 1000]],
      [
        [7, 7, 2],
        [6, 8, 1],
      ],
    ])
    expect(units()).toEqual(Array.from({ length: 1000 }, (_, unit) => unit).filter((unit) => unit !== 7))
    // More than a frame takes, all of them apart.
    await book().record(
      id,
      Array.from({ length: 500 }, (_, i) => clear(2 * i)),
    )
    expect(only().map.count).toBe(499)
  })

  it('follow the size of the volume', async () => {
    await start()
    const { id } = (await book().add(make())).record
    const fine = (await book().add(make({ name: 'fine', unitBytes: STRIPE }))).record.id
    await book().record(id, [set(0), set(30, 34)])
    await book().record(fine, [set(16 * UNITS - 1)])
    const counts = () =>
      book()
        .all()
        .map(({ map }) => [map.unitCount, map.count])
    mend = failingCommits()
    await expect(volume().resize(32 * UNIT, { force: true })).rejects.toThrow(/disk full/)
    await expect(volume().resize(80 * UNIT)).rejects.toThrow(/disk full/)
    mend()
    expect(counts()).toEqual([
      [UNITS, 35],
      [16 * UNITS, 1],
    ])
    await volume().resize(32 * UNIT - STRIPE, { force: true })
    expect(counts()).toEqual([
      [32, 3],
      [32 * 16 - 1, 1], // the last one left
    ])
    await crash()
    await volume().resize(80 * UNIT)
    expect(counts()).toEqual([
      [80, 3 + 48], // and what was added
      [80 * 16, 1 + 48 * 16 + 1],
    ])
    await book().record(id, [clear(79)])
    await crash()
    expect(counts()).toEqual([
      [80, 3 + 47],
      [80 * 16, 1 + 48 * 16 + 1],
    ])
  })

  it('stay as they were where a transaction fails', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().record(id, [set(4)])
    mend = failingCommits()
    await expect(book().add(make({ name: 'other' }), () => ({ readOnly: true }))).rejects.toThrow(/disk full/)
    await expect(book().save(id, { cycle: 5 })).rejects.toThrow(/disk full/)
    let undone = 0
    const later = await Promise.allSettled([
      book().save(id, { cycle: 6 }, { bits: bitsOf([1, 2]) }),
      book().record(id, [set(40)]),
      book().save(id, {}, { bits: bitsOf([1]), volume: { readOnly: true }, prepare: () => () => undone++ }),
    ])
    expect(later.map(({ status }) => status)).toEqual(['rejected', 'fulfilled', 'rejected'])
    expect(undone).toBe(1)
    await expect(book().remove(id, { readOnly: true })).rejects.toThrow(/disk full/)
    await expect(served.pool.deleteVolume('v', { force: true })).rejects.toThrow(/disk full/)
    mend()
    expect(units()).toEqual([4, 40])
    expect(only().record.cycle).toBe(0)
    expect(volume().record.readOnly).toBe(false)
    await book().record(id, [set(50)]) // they are served as before
    await book().save(id, { cycle: 8 })
    await book().add(make({ name: 'other' }))
    await crash()
    expect(book().all().map(units)).toEqual([[4, 40, 50], []])
    expect(
      book()
        .all()
        .map(({ record }) => record.cycle),
    ).toEqual([8, 0])
  })

  it('go with all that is theirs, and nothing is kept of them afterwards', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().record(id, [set(1)])
    await volume().resize(UNITS * UNIT + STRIPE)
    expect(await storedPages(id, 'copy')).toHaveLength(1)
    await book().record(id, [set(2)])
    const saved = book().save(id, { cycle: 1 }, { bits: bitsOf([5]) })
    await book().remove(id, { generation: { current: 'g', history: [] } })
    await saved
    expect(book().all()).toEqual([])
    for (const late of [
      book().record(id, [set(1)]),
      book().save(id, {}),
      book().save(id, {}, { bits: bitsOf([1]) }),
      book().remove(id),
    ])
      await expect(late).rejects.toMatchObject({ code: 'NOT_FOUND' })
    expect(await storedPages(id, 'copy')).toEqual([])
    await crash()
    expect(book().all()).toEqual([])
    expect(volume().record.generation?.current).toBe('g')
    const again = await book().add(make())
    expect(again.record.id).toBeGreaterThan(id)
    expect(units()).toEqual([])
  })

  it('keep their volume from being deleted, unless forced', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().record(id, [set(1)])
    await expect(served.pool.deleteVolume('v')).rejects.toMatchObject({
      code: 'REFUSED',
      message: expect.stringMatching(/has mirrors \(far\): remove them first/),
    })
    await volume().resize(UNITS * UNIT + STRIPE)
    await served.pool.deleteVolume('v', { force: true })
    expect(book().all()).toEqual([])
    await expect(book().record(id, [set(2)])).rejects.toMatchObject({ code: 'NOT_FOUND' })
    await crash()
    expect(book().all()).toEqual([])
    expect(await storedPages(id, 'copy')).toEqual([])
  })

  it('have names of their own', async () => {
    await start()
    await book().add(make())
    await expect(book().add(make())).rejects.toMatchObject({ code: 'EXISTS' })
    await expect(book().add(make({ name: 'x', volume: 4711 }))).rejects.toMatchObject({ code: 'NOT_FOUND' })
    await served.pool.createVolume({ name: 'w', size: MiB })
    await book().add(make({ volume: served.pool.volume('w').record.id }))
    expect(book().all()).toHaveLength(2)
  })

  it('are the primary of all mirrors, or the secondary of one', async () => {
    await start()
    const { id } = (await book().add(make())).record
    const secondaryOf = (mirror: number) => ({ secondaryOf: mirror })
    const second = make({ name: 'second', role: 'secondary' })
    await expect(book().add(second, secondaryOf)).rejects.toMatchObject({ code: 'REFUSED' })
    // What is asked for at once is looked at when it is stored.
    const other = book().add(make({ name: 'other' }))
    const demoted = book().save(id, { role: 'secondary' }, { volume: secondaryOf(id) })
    await expect(demoted).rejects.toMatchObject({ code: 'REFUSED' })
    await book().remove((await other).record.id)
    await book().save(id, { role: 'secondary' }, { volume: secondaryOf(id) })
    await expect(book().add(make({ name: 'other' }))).rejects.toMatchObject({ code: 'REFUSED' })
    await expect(book().add(second, secondaryOf)).rejects.toMatchObject({ code: 'REFUSED' })
    await restart()
    expect(only().record.role).toBe('secondary')
    expect(volume().record.secondaryOf).toBe(id)
  })

  it('are checked: one whose volume is gone stops the opening, and is repaired away', async () => {
    await start()
    const { id } = (await book().add(make())).record
    await book().save(id, {}, { bits: bitsOf([1]) })
    const record = volume().record
    await tamper(({ store }) => store.commit({ dropVolumes: [record] }))
    await expect(open()).rejects.toThrow(`mirror far (${id}): there is no volume ${record.id}`)
    expect(await checkPool(directory)).toMatchObject({
      status: 'damaged',
      findings: [{ object: 'mirror far', message: expect.stringMatching(/there is no volume/) }],
    })
    expect(await checkPool(directory, { repair: true })).toMatchObject({ status: 'repaired' })
    expect(await checkPool(directory)).toMatchObject({ status: 'clean', findings: [] })
    await open()
    expect(book().all()).toEqual([])
  })

  it('are checked: pages of no mirror, bits past the end, a writer that is gone', async () => {
    await start()
    const { id } = (await book().add(make())).record
    const { record } = volume()
    const bytes = Buffer.alloc(4096, 1)
    await tamper(({ store }) =>
      store.commit({
        pages: [
          { medium: 700, kind: 'copy', index: 0, bytes },
          { medium: record.medium, kind: 'copy', index: 0, bytes },
          { medium: id, kind: 'suspect', index: 0, bytes },
        ],
      }),
    )
    const { findings } = await checkPool(directory)
    expect(findings.map(({ object }) => object).sort()).toEqual(['medium 700', `mirror ${id}`, 'volume v'])
    expect(await checkPool(directory, { repair: true })).toMatchObject({ status: 'repaired' })
    await restart()
    await tamper(({ store }) => store.commit({ pages: [{ medium: id, kind: 'copy', index: 0, bytes }] }))
    await expect(open()).rejects.toThrow(/copy bit 64 of medium .* lies past the end of its volume/)
    expect(await checkPool(directory, { repair: true })).toMatchObject({
      status: 'damaged',
      findings: [{ object: 'mirror far of volume v', message: expect.stringMatching(/copy bit 64/) }],
    })
    const secondaryOf = 4711
    const parts = await openPoolParts(directory, 'test')
    await parts.store.commit({
      pages: [{ medium: id, kind: 'copy', index: 0, bytes: undefined }],
      putVolumes: [{ ...record, secondaryOf }],
      putMirrors: [make()(800)],
    })
    await closeParts(parts)
    expect((await checkPool(directory)).findings.map(({ message }) => message)).toEqual([
      expect.stringMatching(/another one of this name/),
      expect.stringMatching(/mirror 4711 writes it, and there is no such mirror/),
    ])
  })

  it('come to a pool of an older version when it is opened, and from then on older programs refuse it', async () => {
    await start()
    await tamper(({ store, record }) => store.commit({ pool: { ...record, version: 2 } }))
    await open()
    expect(served.pool.info().version).toBe(3)
    const { id } = (await book().add(make())).record
    await book().record(id, [set(2)])
    await restart()
    expect(units()).toEqual([2])
    await tamper(({ store, record }) => {
      expect(record.version).toBe(3)
      return store.commit({ pool: { ...record, version: 4 } })
    })
    await expect(open()).rejects.toThrow(/version 4 is newer than this program's 3/)
  })

  it('are what a plain set is, whatever happens', async () => {
    await start({ intents: false })
    const random = new Random(17)
    const { id } = (await book().add(make({ unitBytes: STRIPE }))).record
    let size = 16 * UNITS
    const model = new Set<number>()
    for (let step = 0; step < 160; step++) {
      const what = random.below(40)
      if (what < 30) {
        const first = random.below(size)
        const change = { first, count: 1 + random.below(size - first), set: random.below(2) === 0 }
        const done = book().record(id, [change])
        for (let unit = first; unit < first + change.count; unit++)
          if (change.set) model.add(unit)
          else model.delete(unit)
        if (random.below(3) === 0) await done
      } else if (what < 36) {
        const wanted = Array.from({ length: random.below(20) }, () => random.below(size))
        const fails = random.below(3) === 0
        if (fails) mend = failingCommits()
        const saved = book().save(id, { cycle: step }, { bits: bitsOf(wanted, size) })
        const later = book().record(id, [set(step % size)])
        if (fails) await expect(saved).rejects.toThrow(/disk full/)
        else {
          model.clear()
          for (const unit of wanted) model.add(unit)
        }
        model.add(step % size)
        await Promise.all([fails || saved, later])
        mend()
      } else if (what < 38) {
        await book().record(id, [set(0)])
        model.add(0)
        const wanted = 8 * UNITS + random.below(16 * UNITS)
        await volume().resize(wanted * STRIPE, { force: true })
        for (let unit = Math.min(size, wanted) - 1; unit < wanted; unit++) model.add(unit)
        size = wanted
        for (const unit of model) if (unit >= size) model.delete(unit)
      } else {
        await book().record(id, [clear(1)])
        model.delete(1)
        if (what === 38) await crash()
        else await restart()
      }
      if (step % 10 === 0) {
        await book().record(id, [clear(2)])
        model.delete(2)
        expect(units()).toEqual([...model].sort((a, b) => a - b))
      }
    }
  })
})
