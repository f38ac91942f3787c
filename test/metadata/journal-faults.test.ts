import { describe, expect, it } from 'vitest'
import { CHANGE, type Change, Journal, type JournalFile } from '../../src/metadata/journal.ts'

/**
 * The journal on files that lose writes page by page at a power cut, and that fail in the middle of a change of files:
 * what an earlier life left behind must never be taken for what a later one wrote.
 */
const POOL = '6b1f3f0e-3f0a-4f6e-9d55-0d9f2f8a4c11'
const BOOTS = ['11111111-2222-4333-8444-555555555555', '99999999-2222-4333-8444-555555555555']
const PAGE = 4096
const HEADER = 4096
const FRAME = 48 // with one change

const change = (first: number): Change => ({
  op: CHANGE.slots,
  medium: 7,
  first,
  count: 1,
  slot: first + 100,
})
const firsts = (changes: readonly Change[]) => changes.map((each) => each.first)

class PagedFile implements JournalFile {
  readonly size = HEADER + 2 * PAGE
  readonly content = Buffer.alloc(this.size)
  #durable = Buffer.alloc(this.size)
  refuses: (position: number) => boolean = () => false

  read(target: Buffer, position: number): void {
    this.content.copy(target, 0, position, position + target.length)
  }
  write(source: Buffer, position: number): void {
    if (this.refuses(position)) throw Object.assign(new Error('EIO: i/o error, write'), { code: 'EIO' })
    source.copy(this.content, position)
  }
  async sync(): Promise<void> {
    this.#durable = Buffer.from(this.content)
  }
  close(): void {}
  /** Pages that were written since the last sync come back old, apart from those that the kernel wrote back by itself. */
  powerCut(writtenBack: (page: number) => boolean): void {
    for (let page = 0; page * PAGE < this.size; page++) {
      if (!writtenBack(page)) this.#durable.copy(this.content, page * PAGE, page * PAGE, (page + 1) * PAGE)
    }
    this.#durable = Buffer.from(this.content)
  }
}

const journalOn = (files: readonly [JournalFile, JournalFile], boot: number) =>
  new Journal(files, { pool: POOL, bootId: BOOTS[boot] ?? '' })

describe('journal after a power cut', () => {
  it('never takes frames whose header was lost for those of a later life', async () => {
    const files: [PagedFile, PagedFile] = [new PagedFile(), new PagedFile()]
    const first = journalOn(files, 0)
    first.recover(0)
    await first.start(0)
    // Three turns: file 0, file 1, file 0 again. The first two are synced and in LMDB.
    const fill = (): void => {
      const turn = (files[0].size - HEADER) / FRAME
      for (let i = 0; i < Math.floor(turn); i++) first.append([change(i)])
    }
    for (let turn = 0; turn < 2; turn++) {
      fill()
      await first.sync()
      first.checkpointed(first.lastSequence)
    }
    const checkpoint = first.lastSequence
    for (let i = 0; i < 100; i++) first.append([change(7000 + i)])
    // The pages of the new frames reach the disk, the header that begins their turn does not.
    for (const file of files) file.powerCut((page) => page > 0)

    const second = journalOn(files, 1)
    const recovered = second.recover(checkpoint)
    expect(firsts(recovered.changes)).toEqual([])
    await second.start(recovered.lastSequence)
    for (let i = 0; i < 5; i++) second.append([change(i)])
    // The daemon is killed; the same kernel still has everything it wrote, and nothing that it did not write counts.
    const third = journalOn(files, 1).recover(recovered.lastSequence)
    expect(firsts(third.changes)).toEqual([0, 1, 2, 3, 4])
  })
})

describe('journal on a failing disk', () => {
  it('fails the append that cannot begin a new turn with a store error, and loses nothing that was recorded', async () => {
    const files: [PagedFile, PagedFile] = [new PagedFile(), new PagedFile()]
    const journal = journalOn(files, 0)
    journal.recover(0)
    await journal.start(0)
    const whole = Math.floor((files[0].size - HEADER) / FRAME)
    for (let i = 0; i < 2 * whole; i++) journal.append([change(i)])
    journal.checkpointed(whole) // the first file is free again
    files[0].refuses = (position) => position === 0
    expect(() => journal.append([change(9001)])).toThrow(
      expect.objectContaining({ name: 'StoreError', code: 'MEMBER_IO' }),
    )
    expect(() => journal.append([change(9002)])).toThrow(expect.objectContaining({ name: 'StoreError' }))
    expect(firsts(journalOn(files, 0).recover(whole).changes)).toEqual(
      Array.from({ length: whole }, (_, i) => whole + i),
    )
    files[0].refuses = () => false
    journal.append([change(9003)])
    expect(firsts(journalOn(files, 0).recover(whole).changes).at(-1)).toBe(9003)
    expect(journalOn(files, 0).recover(whole).changes).toHaveLength(whole + 1)
  })

  it('never takes what lies behind a gap for what a later life wrote under the same sequences', async () => {
    const files: [PagedFile, PagedFile] = [new PagedFile(), new PagedFile()]
    const first = journalOn(files, 0)
    first.recover(0)
    await first.start(0)
    const whole = Math.floor((files[0].size - HEADER) / FRAME)
    for (let i = 0; i < whole + 10; i++) first.append([change(i)])
    // The first file's last page is lost, the second file is there.
    files[0].powerCut((page) => page !== 2)
    files[1].powerCut(() => true)

    const second = journalOn(files, 1)
    const { lastSequence } = second.recover(0)
    expect(lastSequence).toBeLessThan(whole)
    await second.start(lastSequence)
    // The last ones have the sequences of the frames in the second file.
    for (let sequence = lastSequence + 1; sequence <= whole + 5; sequence++) {
      expect(second.append([change(5000 + sequence)])).toBe(sequence)
    }
    // Killed, when LMDB had everything up to where the second file begins.
    expect(firsts(journalOn(files, 1).recover(whole).changes)).toEqual(
      [1, 2, 3, 4, 5].map((i) => 5000 + whole + i),
    )
  })

  it('keeps what was recorded when the first frame of a new turn cannot be written', async () => {
    const files: [PagedFile, PagedFile] = [new PagedFile(), new PagedFile()]
    const journal = journalOn(files, 0)
    journal.recover(0)
    await journal.start(0)
    const whole = Math.floor((files[0].size - HEADER) / FRAME)
    for (let i = 0; i < whole; i++) journal.append([change(i)])
    files[1].refuses = (position) => position === HEADER
    expect(() => journal.append([change(9001)])).toThrow(expect.objectContaining({ code: 'MEMBER_IO' }))
    files[1].refuses = () => false
    journal.append([change(9002)])
    const recovered = firsts(journalOn(files, 0).recover(0).changes)
    expect(recovered).toHaveLength(whole + 1)
    expect(recovered.at(-1)).toBe(9002)
  })
})
