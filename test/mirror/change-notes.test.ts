import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { CHANGE } from '../../src/metadata/journal.ts'
import { ChangeNotes } from '../../src/mirror/change-notes.ts'
import type { StoredMirror } from '../../src/volume/mirror-book.ts'
import { createPool } from '../../src/volume/pool.ts'
import { CommitGate, failingAppends } from '../support/faults.ts'
import { mirrorRecord } from '../support/mirror-sample.ts'
import { isPending, until } from '../support/poll.ts'
import { ServedPool } from '../support/served-pool.ts'

/** What a mirror's primary notes, until the pool's files know it. */
const UNIT = 65536
const UNITS = 64

describe('changes that the secondary lacks', () => {
  let base: string
  let served: ServedPool
  let stored: StoredMirror
  let notes: ChangeNotes

  beforeEach(async () => {
    base = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'fullstripe-notes-'))
    const directory = join(base, 'pool')
    await createPool(directory, { capacity: 4 << 20, chunkSize: 4096 })
    served = await ServedPool.open(directory, 'portable')
    const volume = await served.pool.createVolume({ name: 'v', size: UNITS * UNIT, intents: true })
    stored = await served.pool.mirrors.add((id) =>
      mirrorRecord({ id, volume: volume.record.id, unitBytes: UNIT, initialized: true, clean: true }),
    )
    notes = new ChangeNotes(served.pool.mirrors, stored)
  })
  afterEach(async () => {
    notes.stop()
    await served.close()
    rmSync(base, { recursive: true, force: true })
  })

  const needed = (unit: number, count = 1): boolean => notes.needsIntent(unit * UNIT, count * UNIT)

  it('need their intents until they are recorded, those of other units do not', async () => {
    const gate = new CommitGate(({ putMirrors = [] }) => putMirrors.length > 0)
    const saved = served.pool.mirrors.save(stored.record.id, {}, { bits: notes.bits.union() })
    await until(() => gate.held.length > 0, 'the bitmap is being stored')
    notes.change(3)
    notes.changeRange(7 * UNIT + 512, UNIT) // two units
    const settled = notes.settle()
    expect(await isPending(settled)).toBe(true)
    expect([needed(2), needed(3), needed(4), needed(6), needed(7), needed(8), needed(9)]).toEqual([
      false,
      true,
      false,
      false,
      true,
      true,
      false,
    ])
    expect([needed(0, 3), needed(0, UNITS), needed(9, UNITS - 9)]).toEqual([false, true, false])
    gate.open()
    await Promise.all([saved, settled])
    expect(needed(0, UNITS)).toBe(false)
    expect([3, 7, 8].every((unit) => stored.map.get(unit))).toBe(true)
    expect(stored.map.count).toBe(3)
  })

  it('that could not be recorded are recorded later, and all intents are needed until then', async () => {
    notes.change(1)
    await notes.settle()
    const mend = failingAppends((changes) =>
      changes.some(({ op }) => op === CHANGE.copySet)
        ? new StoreError('NO_SPACE', 'journal: disk full')
        : undefined,
    )
    try {
      notes.change(20)
      await expect(notes.settle()).rejects.toMatchObject({ code: 'NO_SPACE' })
      expect(stored.map.get(20)).toBe(false)
      expect(needed(40)).toBe(true)
      notes.change(20) // it is noted already
      expect(needed(40)).toBe(true)
    } finally {
      mend()
    }
    await until(() => !needed(0, UNITS), 'it is tried again')
    expect([1, 20].every((unit) => stored.map.get(unit))).toBe(true)
    expect(stored.map.count).toBe(2)
  })

  it('that could not be recorded are recorded when somebody waits for that', async () => {
    const mend = failingAppends(() => new StoreError('NO_SPACE', 'journal: disk full'))
    notes.change(5)
    await notes.settle().catch(() => {})
    mend()
    notes.stop() // nobody tries again by itself
    await notes.settle()
    expect(needed(0, UNITS)).toBe(false)
    expect(stored.map.get(5)).toBe(true)
  })
})
