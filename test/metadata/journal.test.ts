import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  CHANGE,
  type Change,
  createJournalFile,
  Journal,
  type JournalFile,
  openJournalFile,
} from '../../src/metadata/journal.ts'

const POOL = '6b1f3f0e-3f0a-4f6e-9d55-0d9f2f8a4c11'
const BOOT = '11111111-2222-4333-8444-555555555555'
const REBOOT = '99999999-2222-4333-8444-555555555555'

const change = (first: number): Change => ({
  op: CHANGE.slots,
  medium: 7,
  first,
  count: 1,
  slot: first + 100,
})

/** A journal file in memory, small enough to fill, which knows what was synced. */
class MemoryFile implements JournalFile {
  content: Buffer
  synced: Buffer
  failing = false
  /** What a write that fails does all the same, of the bytes that it has. */
  torn: (length: number) => number = () => 0
  readonly size: number
  constructor(size: number) {
    this.size = size
    this.content = Buffer.alloc(size)
    this.synced = Buffer.alloc(size)
  }
  read(target: Buffer, position: number): void {
    this.content.copy(target, 0, position, position + target.length)
  }
  write(source: Buffer, position: number): void {
    if (this.failing) {
      source.copy(this.content, position, 0, this.torn(source.length))
      throw new Error('no such luck')
    }
    source.copy(this.content, position)
  }
  async sync(): Promise<void> {
    this.content.copy(this.synced)
  }
  close(): void {}
  powerCut(): void {
    this.synced.copy(this.content)
  }
}

function memoryPair(size = 4096 + 2048): [MemoryFile, MemoryFile] {
  return [new MemoryFile(size), new MemoryFile(size)]
}

function reopened(files: [JournalFile, JournalFile], bootId = BOOT): Journal {
  return new Journal(files, { pool: POOL, bootId })
}

async function started(files: [JournalFile, JournalFile]): Promise<Journal> {
  const journal = reopened(files)
  expect(journal.recover(0)).toEqual({ changes: [], bits: [], lastSequence: 0, dropped: 0 })
  await journal.start(0)
  return journal
}

describe('journal', () => {
  it('gives back, in order, what was appended and never synced, after the death of the process', async () => {
    const files = memoryPair()
    const journal = await started(files)
    for (let i = 0; i < 10; i++) expect(journal.append([change(i), change(i + 50)])).toBe(i + 1)
    const { changes, lastSequence } = reopened(files).recover(0)
    expect(lastSequence).toBe(10)
    expect(changes.map((c) => c.first)).toEqual(Array.from({ length: 10 }, (_, i) => [i, i + 50]).flat())
    expect(changes[0]).toEqual(change(0))
  })

  it('gives back only what LMDB lacks', async () => {
    const files = memoryPair()
    const journal = await started(files)
    for (let i = 0; i < 5; i++) journal.append([change(i)])
    expect(
      reopened(files)
        .recover(3)
        .changes.map((c) => c.first),
    ).toEqual([3, 4])
  })

  it('after a power cut gives back what the last durable mark covers, and nothing that was merely on disk', async () => {
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    const covered = journal.append([change(2)])
    journal.append([change(3)]) // recorded while the members were being synced: its data may be missing
    journal.mark(covered)
    await journal.sync()
    journal.append([change(4)])
    await Promise.all(files.map((file) => file.sync())) // the kernel wrote it back on its own
    for (const file of files) file.powerCut()
    const recovery = reopened(files, REBOOT).recover(0)
    expect(recovery.changes.map((c) => c.first)).toEqual([1, 2])
    expect(recovery.dropped).toBe(2)
  })

  it('after a power cut without any mark gives back nothing', async () => {
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    await Promise.all(files.map((file) => file.sync()))
    expect(reopened(files, REBOOT).recover(0).changes).toEqual([])
  })

  it('ends at the first torn frame, wherever it is torn', async () => {
    const files = memoryPair()
    const journal = await started(files)
    for (let i = 0; i < 3; i++) journal.append([change(i)])
    const whole = Buffer.from(files[0].content)
    const frame = 48 // 24 bytes of header, one record
    for (let at = 4096 + frame; at < 4096 + 2 * frame; at++) {
      whole.copy(files[0].content)
      files[0].content.writeUInt8((files[0].content.readUInt8(at) + 1) & 255, at)
      expect(
        reopened(files)
          .recover(0)
          .changes.map((c) => c.first),
        `byte ${at}`,
      ).toEqual([0])
    }
  })

  it('turns to the other file when one is full, and back only after a checkpoint', async () => {
    const files = memoryPair()
    const journal = await started(files)
    let appended = 0
    while (journal.hasRoom(1)) {
      journal.append([change(appended)])
      appended++
    }
    expect(appended).toBeGreaterThan(2048 / 48) // more than one file holds
    expect(reopened(files).recover(0).changes).toHaveLength(appended)
    const sequence = journal.lastSequence
    journal.checkpointed(sequence)
    expect(journal.hasRoom(1)).toBe(true)
    for (let i = 0; i < 20; i++) journal.append([change(1000 + i)])
    // Frames of the earlier turn lie behind the new ones in the same file; they must not come back.
    const { changes } = reopened(files).recover(sequence)
    expect(changes.map((c) => c.first)).toEqual(Array.from({ length: 20 }, (_, i) => 1000 + i))
  })

  it('always has room for the mark of a flush behind the last append', async () => {
    const files = memoryPair()
    const journal = await started(files)
    while (journal.hasRoom(1)) journal.append([change(1)])
    journal.mark(journal.lastSequence)
    await journal.sync()
    expect(reopened(files, REBOOT).recover(0).dropped).toBe(0)
  })

  it('does not count a frame that could not be written', async () => {
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    files[0].failing = true
    expect(() => journal.append([change(2)])).toThrow(/write failed/)
    files[0].failing = false
    expect(journal.append([change(3)])).toBe(2)
    expect(
      reopened(files)
        .recover(0)
        .changes.map((c) => c.first),
    ).toEqual([1, 3])
  })

  it('does not count a frame of which only the end is missing, where the end is what was there before', async () => {
    // The last eight bytes of this one are zeros, as those of a file that nobody has written to.
    const changes = [change(2), { ...change(3), op: CHANGE.released, slot: 0 }]
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    let failures = 0
    files[0].torn = (length) => {
      if (++failures === 1) files[0].failing = false // the next write is one that succeeds
      return length - 8
    }
    files[0].failing = true
    expect(() => journal.append(changes)).toThrow(/write failed/)
    expect(failures).toBe(1)
    expect(journal.failure).toBeUndefined()
    const found = reopened(files).recover(0)
    expect(found.changes.map((c) => c.first)).toEqual([1])
    expect(found.lastSequence).toBe(1)
    expect(journal.append([change(4)])).toBe(2)
  })

  it('fails for good where such a frame cannot be taken back', async () => {
    const changes = [change(2), { ...change(3), op: CHANGE.released, slot: 0 }]
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    let failures = 0
    files[0].torn = (length) => (++failures === 1 ? length - 8 : 0)
    files[0].failing = true
    expect(() => journal.append(changes)).toThrow(/could not be taken back/)
    files[0].failing = false
    // Whoever reads it does what the frame says: so nothing else may be said.
    expect(
      reopened(files)
        .recover(0)
        .changes.map((c) => c.first),
    ).toEqual([1, 2, 3])
    for (const write of [
      () => journal.append([change(4)]),
      () => journal.mark(1),
      () => journal.distrust(),
    ]) {
      expect(write).toThrow(/could not be taken back/)
    }
    expect(journal.failure).toMatchObject({ code: 'MEMBER_IO' })
    expect(reopened(files).recover(0).lastSequence).toBe(2)
  })

  it('refuses the files of another pool and of a newer version', async () => {
    const files = memoryPair()
    await started(files)
    const other = new Journal(files, { pool: POOL.replace('6', '7'), bootId: BOOT })
    expect(() => other.recover(0)).toThrow(/belongs to pool 6b1f/)
  })
})

describe('journal files', () => {
  let directory: string
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'fullstripe-journal-'))
  })
  afterEach(() => rmSync(directory, { recursive: true }))

  it('work on real files', async () => {
    const paths = ['a', 'b'].map((name) => join(directory, name))
    for (const path of paths) createJournalFile(path)
    const open = (): [JournalFile, JournalFile] => [
      openJournalFile(paths[0] ?? ''),
      openJournalFile(paths[1] ?? ''),
    ]
    const journal = await started(open())
    journal.append([change(5)])
    journal.close()
    const again = reopened(open())
    expect(again.recover(0).changes).toEqual([change(5)])
    again.close()
  })

  it('gives back intents that were synced, also where no mark covers the changes next to them', async () => {
    const files = memoryPair()
    const journal = await started(files)
    const hot = (first: number): Change => ({ op: CHANGE.hot, medium: 7, first, count: 1, slot: 0 })
    journal.append([change(1)])
    journal.mark(journal.lastSequence)
    journal.append([hot(5), change(2)])
    journal.append([{ ...hot(5), op: CHANGE.cool }])
    await journal.sync()
    journal.append([hot(6)]) // not synced
    for (const file of files) file.powerCut()
    const recovered = reopened(files, REBOOT).recover(0)
    expect(recovered.changes).toEqual([change(1)])
    expect(recovered.bits).toEqual([hot(5), { ...hot(5), op: CHANGE.cool }])
    expect(recovered.dropped).toBe(1)
    // Under the same kernel everything counts.
    expect(reopened(files).recover(0).changes).toEqual([change(1), change(2)])
  })

  it('gives back copy units in order, also where no mark covers the changes next to them', async () => {
    const files = memoryPair()
    const journal = await started(files)
    const copy = (op: 'copySet' | 'copyClear', first: number): Change => ({
      op: CHANGE[op],
      medium: 9,
      first,
      count: 3,
      slot: 0,
    })
    const records = [copy('copySet', 5), copy('copyClear', 5), copy('copySet', 6)]
    for (const record of records) journal.append([change(1), record])
    await journal.sync()
    for (const file of files) file.powerCut()
    expect(reopened(files, REBOOT).recover(0)).toMatchObject({ changes: [], bits: records, dropped: 3 })
  })

  it('takes a restart for a power cut once it was told to trust the page cache no more', async () => {
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    journal.mark(journal.lastSequence)
    journal.append([change(2)])
    journal.distrust()
    const second = reopened(files)
    expect(second.recover(0)).toMatchObject({ changes: [change(1)], dropped: 1, lastSequence: 4 })
    await second.start(4) // LMDB has that
    second.append([change(3)])
    expect(reopened(files).recover(4).changes).toEqual([change(3)])
  })

  it('can be told so between recovery and start, too, in whichever file is the newer one', async () => {
    for (const frames of [1, 40]) {
      const files = memoryPair()
      const journal = await started(files)
      for (let i = 0; i < frames; i++) journal.append([change(i)])
      const second = reopened(files)
      const { lastSequence } = second.recover(0)
      expect(lastSequence).toBe(frames)
      second.distrust()
      const third = reopened(files).recover(0)
      expect(third).toMatchObject({ changes: [], dropped: frames, lastSequence: frames + 1 })
    }
  })

  it('shares syncs, and never tries one again after one that failed', async () => {
    const files = memoryPair()
    const journal = await started(files)
    let syncs = 0
    let go = (): void => {}
    files[0].sync = () => {
      syncs++
      return new Promise((resolve) => (go = resolve))
    }
    journal.append([change(1)])
    const first = journal.sync()
    const later = [2, 3, 4].map((i) => {
      journal.append([change(i)])
      return journal.sync()
    })
    go()
    await first
    await new Promise((resolve) => setImmediate(resolve))
    expect(syncs).toBe(2)
    go()
    await Promise.all(later)
    expect(syncs).toBe(2)

    files[0].sync = () => Promise.reject(new Error('EIO'))
    journal.append([change(5)])
    await expect(journal.sync()).rejects.toMatchObject({ code: 'MEMBER_IO' })
    files[0].sync = async () => {} // the kernel forgets
    await expect(journal.sync()).rejects.toThrow(/sync failed: EIO/)
    journal.append([change(6)])
    await expect(journal.sync()).rejects.toThrow(/sync failed: EIO/)
  })

  it('refuses a file of a newer version, and takes one of an older', async () => {
    const files = memoryPair()
    const journal = await started(files)
    journal.append([change(1)])
    const rewrite = (version: number): void => {
      const header = files[0].content.subarray(0, 4096)
      header.writeUInt32LE(version, 8)
      header.writeUInt32LE(crc32(header.subarray(0, 4092)), 4092)
    }
    rewrite(3)
    expect(() => reopened(files).recover(0)).toThrow(/version 3 is newer/)
    rewrite(1)
    expect(reopened(files).recover(0).changes).toEqual([]) // frames speak of the header that they were written under
  })
})
