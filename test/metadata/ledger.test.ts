import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import {
  CHANGE,
  type Change,
  createJournalFile,
  Journal,
  openJournalFile,
} from '../../src/metadata/journal.ts'
import { Ledger } from '../../src/metadata/ledger.ts'
import { METADATA_VERSION, type MetadataPage, type PoolRecord } from '../../src/metadata/records.ts'
import { MetadataStore } from '../../src/metadata/store.ts'
import { VolumeTables } from '../../src/volume/tables.ts'
import { until } from '../support/poll.ts'

/** The ledger over a real LMDB, real journal files and real tables; only the sync of the members is the test's. */
const pool: PoolRecord = {
  version: METADATA_VERSION,
  uuid: '6b1f3f0e-3f0a-4f6e-9d55-0d9f2f8a4c11',
  created: '2026-01-01T00:00:00.000Z',
  chunkSize: 65536,
  dataMembers: 1,
  parityMembers: 0,
  dataOffset: 1 << 20,
  slots: 1 << 20,
  generation: 1,
  members: ['member-0'],
}
const BOOT = '11111111-2222-4333-8444-555555555555'
const REBOOT = '99999999-2222-4333-8444-555555555555'
const SHAPE = { size: 65536 * 400_000, stripeSize: 65536, formatUnit: 1 }

let directory: string
let steps: string[]
let syncMembers: () => Promise<void>
let store: MetadataStore
let journal: Journal
let tables: VolumeTables
let ledger: Ledger
/** While it is there writes to the journal fail, and do this many bytes all the same. */
let tear: ((length: number) => number) | undefined

function openJournal(bootId = BOOT): Journal {
  const files = [0, 1].map((i) => {
    const file = openJournalFile(join(directory, `journal-${i}`))
    const write = (source: Buffer, position: number): void => {
      const written = tear?.(source.length)
      file.write(source.subarray(0, written), position)
      if (written === undefined) return
      throw Object.assign(new Error('EIO: i/o error, write'), { code: 'EIO' })
    }
    return { ...file, write }
  })
  return new Journal([files[0]!, files[1]!], { pool: pool.uuid, bootId })
}

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'fullstripe-ledger-'))
  for (const i of [0, 1]) createJournalFile(join(directory, `journal-${i}`))
  store = await MetadataStore.create(join(directory, 'metadata'), pool)
  journal = openJournal()
  journal.recover(0)
  await journal.start(0)
  tables = new VolumeTables(1, SHAPE)
  steps = []
  tear = undefined
  syncMembers = async () => {
    steps.push('sync')
  }
  ledger = new Ledger({
    journal,
    store,
    source: {
      dirtyPages: () => tables.dirtyPages,
      takeDirtyPages: () => tables.takeDirtyPages(),
      returnDirtyPages: (pages) => {
        for (const page of pages) tables.returnDirtyPage(page)
      },
    },
    syncMembers: () => syncMembers(),
    onTrouble: (kind, message) => steps.push(`${kind}: ${message}`),
    onDurable: (sequence) => steps.push(`durable ${sequence}`),
  })
})

afterEach(async () => {
  syncMembers = async () => {}
  await ledger.close().catch(() => {})
  journal.close()
  await store.close()
  rmSync(directory, { recursive: true })
})

function format(stripe: number): Promise<number> {
  const changes: Change[] = [
    { op: CHANGE.slots, medium: 1, first: stripe, count: 1, slot: stripe + 1 },
    { op: CHANGE.formatted, medium: 1, first: stripe, count: 1, slot: 0 },
  ]
  return ledger.record(changes, () => {
    for (const change of changes) tables.apply(change)
  })
}

function storedTables(): VolumeTables {
  const loaded = new VolumeTables(1, SHAPE)
  for (const kind of ['map', 'init'] as const) {
    for (const page of store.pages(1, kind)) loaded.loadPage(kind, page.index, page.bytes)
  }
  loaded.finishLoading()
  return loaded
}

describe('ledger', () => {
  it('records in one frame what one turn changes, and applies it at once', async () => {
    const sequences = await Promise.all([format(1), format(2), format(3)])
    expect(sequences).toEqual([1, 1, 1])
    expect([1, 2, 3].map((stripe) => tables.slotOf(stripe))).toEqual([2, 3, 4])
    expect(steps).toEqual([]) // nothing durable yet
  })

  it('promises durability after the members were synced, and only of what was recorded before', async () => {
    await format(1)
    let release = (): void => {}
    syncMembers = () => new Promise((resolve) => (release = resolve))
    const flushed = ledger.flush()
    await format(2) // while the members are being synced
    release()
    await flushed
    expect(ledger.durableSequence).toBe(1)
    const recovered = openJournal(REBOOT).recover(0)
    expect(recovered.changes.filter((c) => c.op === CHANGE.slots).map((c) => c.first)).toEqual([1])
    expect(recovered.dropped).toBe(1)
  })

  it('gives a flush that comes while another runs a sync of its own, shared by all that came', async () => {
    await format(1)
    let syncs = 0
    let release = (): void => {}
    syncMembers = () => {
      syncs++
      return new Promise((resolve) => (release = resolve))
    }
    const first = ledger.flush()
    const later = [ledger.flush(), ledger.flush(), ledger.flush()]
    expect(syncs).toBe(1)
    release()
    await first
    await new Promise((resolve) => setImmediate(resolve))
    expect(syncs).toBe(2)
    release()
    await Promise.all(later)
    expect(syncs).toBe(2)
  })

  it('writes no mark where nothing was recorded since the last', async () => {
    await format(1)
    await ledger.flush()
    const sequence = journal.lastSequence
    await ledger.flush()
    await ledger.flush()
    expect(journal.lastSequence).toBe(sequence)
  })

  it('stores in a checkpoint exactly the changes up to its sequence', async () => {
    await format(10)
    let release = (): void => {}
    syncMembers = () => new Promise((resolve) => (release = resolve))
    const done = ledger.checkpoint()
    await format(11) // after the pages were copied
    release()
    await done
    const stored = storedTables()
    expect([stored.slotOf(10), stored.slotOf(11)]).toEqual([11, 0])
    expect(store.checkpoint()).toBe(1)
    // The rest is in the journal: together they are everything.
    for (const change of openJournal().recover(store.checkpoint()).changes) stored.apply(change)
    expect(stored.slotOf(11)).toBe(12)
  })

  it('loses nothing over thousands of changes, journal turns and checkpoints', async () => {
    const stripes = 300_000 // twice what the journal holds
    for (let at = 0; at < stripes; at += 10_000) {
      await Promise.all(Array.from({ length: 10_000 }, (_, i) => format(at + i)))
    }
    const stored = storedTables()
    for (const change of openJournal().recover(store.checkpoint()).changes) stored.apply(change)
    expect(stored.formattedUnits).toBe(stripes)
    for (let stripe = 0; stripe < stripes; stripe++) {
      if (stored.slots[stripe] !== stripe + 1)
        expect.fail(`stripe ${stripe} is in slot ${stored.slots[stripe]}`)
    }
  })

  it('keeps pages dirty when LMDB takes no commit, says so once, and catches up', async () => {
    const commit = store.commit.bind(store)
    let failing = true
    store.commit = (what) => (failing ? Promise.reject(new Error('disk full')) : commit(what))
    await format(1)
    await expect(ledger.checkpoint()).rejects.toThrow('disk full')
    await expect(ledger.checkpoint()).rejects.toThrow('disk full')
    expect(steps.filter((step) => step.startsWith('checkpoint'))).toHaveLength(1)
    await format(2) // the journal still takes changes
    failing = false
    await ledger.checkpoint()
    expect([storedTables().slotOf(1), storedTables().slotOf(2)]).toEqual([2, 3])
  })

  it('tries again by itself, also where the clock of the machine is set back meanwhile', async () => {
    const commit = store.commit.bind(store)
    store.commit = () => Promise.reject(new Error('disk full'))
    await format(1)
    vi.useFakeTimers({ toFake: ['Date'] })
    try {
      await expect(ledger.checkpoint()).rejects.toThrow('disk full')
      vi.setSystemTime(Date.now() - 3_600_000)
      store.commit = commit
      await until(() => store.checkpoint() === 1, 'a checkpoint')
    } finally {
      vi.useRealTimers()
    }
    expect(storedTables().slotOf(1)).toBe(2)
  })

  it('never promises anything again after a failed sync', async () => {
    await format(1)
    syncMembers = () => Promise.reject(new Error('EIO'))
    await expect(ledger.flush()).rejects.toThrow(/EIO/)
    syncMembers = async () => {} // the kernel forgets the error; we do not
    await expect(ledger.flush()).rejects.toThrow(/takes no changes/)
    await expect(format(2)).rejects.toThrow(/takes no changes/)
    expect(ledger.durableSequence).toBe(0)
  })

  it('stores records and pages of a change in one transaction', async () => {
    await ledger.checkpointWith(() => {
      tables.setSlots(5, 1, 77)
      const pages: MetadataPage[] = [{ medium: 9, kind: 'map', index: 0, bytes: Buffer.alloc(8, 1) }]
      return { pages, pool: { ...pool, generation: 2 } }
    })
    expect(storedTables().slotOf(5)).toBe(77)
    expect(store.pool().generation).toBe(2)
    expect([...store.pages(9, 'map')]).toHaveLength(1)
  })

  it('makes records durable without their data when it is asked to harden', async () => {
    const hot = { op: CHANGE.hot, medium: 1, first: 9, count: 1, slot: 0 }
    await Promise.all([format(1), ledger.record([hot], () => {})])
    syncMembers = () => Promise.reject(new Error('not asked for'))
    await ledger.harden()
    syncMembers = async () => {}
    const recovered = openJournal(REBOOT).recover(0)
    expect(recovered.bits).toEqual([hot])
    expect(recovered.changes).toEqual([])
    expect(steps).toEqual([])
  })

  it('counts syncs, so that others can tell what a later one covers', async () => {
    expect([ledger.syncsBegun, ledger.lastSync]).toEqual([0, 0])
    let release = (): void => {}
    syncMembers = () => new Promise((resolve) => (release = resolve))
    const flushed = ledger.flush()
    expect([ledger.syncsBegun, ledger.lastSync]).toEqual([1, 0])
    release()
    await flushed
    expect(ledger.lastSync).toBe(1)
    syncMembers = async () => {}
    await format(1)
    await ledger.checkpoint()
    expect([ledger.syncsBegun, ledger.lastSync]).toEqual([2, 2])
  })

  it('never syncs the members for a flush and a checkpoint at once: one of them would miss the error', async () => {
    await format(1)
    let running = 0
    let most = 0
    syncMembers = async () => {
      most = Math.max(most, ++running)
      await new Promise((resolve) => setImmediate(resolve))
      running--
      if (most > 0) throw new Error('EIO')
    }
    const outcomes = await Promise.allSettled([ledger.flush(), ledger.checkpoint(), ledger.flush()])
    expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected'])
    expect(most).toBe(1)
    expect(store.checkpoint()).toBe(0)
    expect(steps.filter((step) => step.startsWith('sync: '))).toEqual(['sync: EIO'])
  })

  it('takes an I/O error of LMDB for a failed sync, and no room for what may pass', async () => {
    await format(1)
    const commit = store.commit.bind(store)
    store.commit = () => Promise.reject(new StoreError('NO_SPACE', 'metadata: commit failed: MDB_MAP_FULL'))
    await expect(ledger.checkpoint()).rejects.toMatchObject({ code: 'NO_SPACE' })
    await expect(ledger.commit({})).rejects.toMatchObject({ code: 'NO_SPACE' })
    await ledger.flush()
    store.commit = () => Promise.reject(new StoreError('MEMBER_IO', 'metadata: commit failed: EIO'))
    await expect(ledger.checkpoint()).rejects.toThrow(/takes no changes/)
    store.commit = commit
    await expect(ledger.flush()).rejects.toThrow(/takes no changes/)
    await expect(ledger.commit({})).rejects.toThrow(/takes no changes/)
    await expect(ledger.harden()).rejects.toThrow(/takes no changes/)
  })

  it('tells the journal of a failed sync: a restart under the same kernel takes only what was flushed', async () => {
    await format(1)
    await ledger.flush()
    await format(2)
    expect(
      openJournal()
        .recover(0)
        .changes.filter(({ op }) => op === CHANGE.slots),
    ).toHaveLength(2)
    syncMembers = () => Promise.reject(new Error('EIO'))
    await expect(ledger.flush()).rejects.toThrow(/EIO/)
    const recovered = openJournal().recover(0)
    expect(recovered.changes.filter(({ op }) => op === CHANGE.slots).map(({ first }) => first)).toEqual([1])
    expect(recovered.dropped).toBe(1)
  })

  it('leaves the journal trusted when anything but a sync fails: a restart finds every answered write', async () => {
    await format(1)
    const { mark } = journal
    journal.mark = () => {
      throw new StoreError('MEMBER_IO', 'journal: write failed')
    }
    await expect(ledger.flush()).rejects.toThrow(/takes no changes/)
    journal.mark = mark
    expect(openJournal().recover(0)).toMatchObject({ dropped: 0 })
  })

  it('goes on after a frame that failed, none of which counts', async () => {
    tear = (length) => {
      tear = undefined
      return length - 8 // which are zeros, as is what lies there
    }
    await expect(format(1)).rejects.toThrow(/write failed/)
    expect(ledger.failure).toBeUndefined()
    expect(openJournal().recover(0).changes).toEqual([])
    await format(2)
    const recovered = openJournal().recover(0)
    expect(recovered.changes.filter(({ op }) => op === CHANGE.slots).map(({ first }) => first)).toEqual([2])
  })

  it('fails before anybody learns of a frame that failed and counts all the same', async () => {
    let writes = 0
    tear = (length) => (++writes === 1 ? length - 8 : 0)
    await format(1).catch(() => steps.push('refused'))
    expect(steps).toEqual([expect.stringMatching(/^sync: .*could not be taken back: EIO/), 'refused'])
    tear = undefined
    await expect(format(2)).rejects.toThrow(/takes no changes/)
    await expect(ledger.commit({})).rejects.toThrow(/takes no changes/)
    await expect(ledger.flush()).rejects.toThrow(/takes no changes/)
    expect(
      openJournal()
        .recover(0)
        .changes.filter(({ op }) => op === CHANGE.slots),
    ).toMatchObject([{ first: 1 }])
  })

  it('leaves the journal trusted when LMDB fails', async () => {
    await format(1)
    store.commit = () => Promise.reject(new StoreError('MEMBER_IO', 'metadata: commit failed: EIO'))
    await expect(ledger.checkpoint()).rejects.toThrow(/takes no changes/)
    expect(openJournal().recover(0)).toMatchObject({ dropped: 0 })
  })

  it('flushes when it closes, also where no map has changed', async () => {
    await format(1)
    await ledger.checkpoint()
    steps = []
    await ledger.close() // what was written in place since is nothing that a checkpoint knows of
    expect(steps).toEqual(['sync'])
  })
})
