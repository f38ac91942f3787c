import { randomBytes } from 'node:crypto'
import { closeSync, constants, fdatasync, fstatSync, fsyncSync, openSync, readSync, writeSync } from 'node:fs'
import { promisify } from 'node:util'
import { crc32 } from 'node:zlib'
import { assert } from '../base/assert.ts'
import { messageOf, StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Rounds } from '../base/rounds.ts'

/**
 * The journal holds the map changes that LMDB does not hold yet, in two files of fixed size which take turns.
 *
 *   file    4096-byte header, then frames back to back, each 8-byte aligned
 *   header  | magic 8 bytes | version u32 | salt u32 | epoch u64 | pool 36 bytes | boot id 36 bytes | zeros | crc32 u32 |
 *   frame   | magic u32 | length u32 | sequence u64 | kind u32 | crc32 u32 | payload, `length` bytes |
 *   kinds   1 changes: records of 24 bytes        2 durable mark: covered sequence u64        3 distrust: nothing
 *
 * The checksum of a frame goes on from that of the header under which it was written, and no two headers are alike: each
 * turn of a file has a salt of its own. So frames of another turn never pass for frames of this one, not even of
 * a turn whose header a power cut has lost (the next life then counts its epoch again). Sequences are consecutive
 * over both files; recovery stops at the first gap.
 *
 * What makes it safe:
 *  1. A frame is written (page cache) before the write it describes is answered: it survives a kill of this process.
 *  2. A durable mark is written only after the members were synced, and then the journal is synced: everything
 *     up to `covered` survives a power cut. Frames past the last mark may be on disk while their data is not, so
 *     after a reboot (another boot id) they are ignored; after a mere restart the page cache still has both.
 *     Bits of intents and of mirrors (`hot`, `cool`, `copySet`, `copyClear`) speak of no data: they count wherever they can be
 *     read. Who needs one durable syncs the journal, no member, before the write that it announces.
 *  3. After a failed sync the page cache may hold what no disk will: a distrust frame makes a mere restart count as a reboot.
 *     No sync is tried again after one that failed: the kernel may have forgotten what it could not write.
 *  4. A file is taken into use again only after LMDB has committed every frame in it.
 *  5. Both files are written in full when they are made, so an append never needs space.
 *  6. A frame that failed to be written does not count before anybody learns of the failure. Some of it may be all of it, where
 *     the rest is what lay there before: then it is overwritten. Where that fails, too, the journal fails for good, and nothing may be
 *     changed any more: whoever reads it next does what the frame says.
 */

export const CHANGE_RECORD_SIZE = 24
const HEADER_SIZE = 4096
const FRAME_HEADER_SIZE = 24
const FRAME_PAYLOAD_MAX = 1 << 20
const FILE_MAGIC = Buffer.from('FULLSJNL')
const FILE_VERSION = 2 // 1 had no intents and no distrust
const FRAME_MAGIC = 0x464a524d
const KIND_CHANGES = 1
const KIND_DURABLE = 2
const KIND_DISTRUST = 3

/** What a record does to the tables of one medium. `count` runs over consecutive stripes or units. */
export const CHANGE = {
  /** Stripes [first, first + count) get slots [slot, slot + count). Slot 0: they have none. */
  slots: 1,
  /** Format units [first, first + count) are formatted. */
  formatted: 2,
  /** Format units [first, first + count) are not formatted any more. */
  released: 3,
  /** Regions [first, first + count) may be changed from now on (src/metadata/intents.ts). */
  hot: 4,
  /** All that was changed in regions [first, first + count) is durable, and nothing changes there before they are hot again. */
  cool: 5,
  /** Copy units [first, first + count) of a mirror (its id is the medium) may differ from what its secondary has (src/metadata/copy.ts). */
  copySet: 6,
  /** The secondary has copy units [first, first + count). */
  copyClear: 7,
} as const

export interface Change {
  readonly op: number // of CHANGE
  readonly medium: number // of a volume; for copy units a mirror's id
  readonly first: number // stripe, format unit, region or copy unit
  readonly count: number
  readonly slot: number // `slots` only, else 0
}

/** The few calls the journal makes on its files; the simulation gives it files that lose and tear writes. */
export interface JournalFile {
  readonly size: number // bytes
  read(target: Buffer, position: number): void
  write(source: Buffer, position: number): void
  sync(): Promise<void>
  close(): void
}

const fdatasyncAsync = promisify(fdatasync)

export function openJournalFile(path: string): JournalFile {
  const fd = openSync(path, constants.O_RDWR)
  const size = fstatSync(fd).size
  return {
    size,
    read(target, position) {
      if (readSync(fd, target, 0, target.length, position) !== target.length) {
        throw new StoreError('DAMAGED', `${path}: shorter than a journal file, at ${position}`)
      }
    },
    write(source, position) {
      for (let done = 0; done < source.length; ) {
        done += writeSync(fd, source, done, source.length - done, position + done)
      }
    },
    sync: () => fdatasyncAsync(fd),
    close: () => closeSync(fd),
  }
}

/** Makes an empty journal file, every block of it written and synced. */
export function createJournalFile(path: string): void {
  const fd = openSync(path, 'wx', 0o600)
  try {
    const zeros = Buffer.alloc(1 << 20)
    for (let at = 0; at < LIMITS.journalFileBytes; at += zeros.length)
      writeSync(fd, zeros, 0, zeros.length, at)
    fsyncSync(fd)
  } finally {
    closeSync(fd)
  }
}

export interface JournalIdentity {
  readonly pool: string // uuid
  readonly bootId: string // uuid of this boot of the kernel
  /** A number of 32 bits for each turn of a file; at random where nobody says otherwise. */
  readonly salt?: () => number
}

export interface Recovery {
  readonly changes: readonly Change[] // of tables, to be applied in order
  readonly bits: readonly Change[] // the same for bits that speak of no data; also of frames that no mark covers
  readonly lastSequence: number // of any frame seen; the next frame gets the one after
  readonly dropped: number // frames that were not covered by a durable mark when the machine stopped
}

interface Side {
  readonly file: JournalFile
  epoch: number
  seed: number // of the checksums of its frames: the header's checksum
  end: number // where the next frame goes; HEADER_SIZE when empty
  lastSequence: number // of the frames in it; 0 when it holds none
  unsynced: boolean
}

interface Frame {
  readonly sequence: number
  readonly end: number // position behind it
  readonly kind: number
  readonly payload: Buffer
}

export class Journal {
  readonly #sides: readonly [Side, Side]
  readonly #identity: JournalIdentity
  readonly #syncs = new Rounds(() => this.#syncSides())
  #syncFailed: StoreError | undefined
  #failure: StoreError | undefined
  #active: 0 | 1 = 0
  #sequence = 0
  #lastChange = 0
  #checkpointed = 0 // frames up to here are in LMDB

  constructor(files: readonly [JournalFile, JournalFile], identity: JournalIdentity) {
    const side = (file: JournalFile): Side => ({
      file,
      epoch: 0,
      seed: 0,
      end: HEADER_SIZE,
      lastSequence: 0,
      unsynced: false,
    })
    this.#sides = [side(files[0]), side(files[1])]
    this.#identity = identity
  }

  get lastSequence(): number {
    return this.#sequence
  }

  /** A frame that failed may be found by the next recovery: from then on whatever contradicts it must not be done. */
  get failure(): StoreError | undefined {
    return this.#failure
  }

  /** Of the newest frame with changes; marks behind it need no mark of their own. */
  get lastChangeSequence(): number {
    return this.#lastChange
  }

  /**
   * Reads what an earlier run left behind. The caller applies the changes, commits them to LMDB together with
   * `lastSequence`, and then calls `start`; until that, nothing is written here, except by `distrust`.
   * @param checkpoint last sequence that LMDB holds
   * @throws StoreError DAMAGED when a file belongs to another pool, is of a newer version or holds what none writes
   */
  recover(checkpoint: number): Recovery {
    const headers = ([0, 1] as const).map((index) => ({
      index,
      header: this.#readHeader(this.#sides[index]),
    }))
    const frames: Frame[] = []
    let trusted = true
    let last = checkpoint
    for (const { index, header } of headers.sort((a, b) => (a.header?.epoch ?? 0) - (b.header?.epoch ?? 0))) {
      if (header === undefined) continue
      const side = this.#sides[index]
      side.epoch = header.epoch
      side.seed = header.checksum
      this.#active = index
      for (const frame of this.#readFrames(side)) {
        if (frame.sequence > checkpoint) {
          if (frame.sequence !== last + 1) break // a gap: what follows was never promised
          frames.push(frame)
          last = frame.sequence
          trusted &&= header.bootId === this.#identity.bootId && frame.kind !== KIND_DISTRUST
        }
        side.end = frame.end
        side.lastSequence = frame.sequence
      }
    }
    this.#sequence = last
    this.#checkpointed = checkpoint
    let covered = trusted ? last : checkpoint
    for (const frame of frames) {
      if (frame.kind === KIND_DURABLE) covered = Math.max(covered, coveredBy(frame))
    }
    const changes: Change[] = []
    const bits: Change[] = []
    let dropped = 0
    for (const frame of frames) {
      if (frame.kind !== KIND_CHANGES) continue
      let drops = false
      for (const change of decodeChanges(frame.payload)) {
        if (isBits(change)) bits.push(change)
        else if (frame.sequence <= covered) changes.push(change)
        else drops = true
      }
      if (drops) dropped++
    }
    return { changes, bits, lastSequence: last, dropped }
  }

  /**
   * Begins a new turn of the first file, after LMDB has everything up to `sequence` durably. The other one gets a new header too:
   * behind a gap it may hold frames whose sequences are about to be given again, and they must not count then.
   */
  async start(sequence: number): Promise<void> {
    this.#sequence = sequence
    this.#lastChange = sequence
    this.#checkpointed = sequence
    const epoch = Math.max(this.#sides[0].epoch, this.#sides[1].epoch)
    this.#begin(this.#sides[1], epoch + 1)
    this.#begin(this.#sides[0], epoch + 2)
    this.#active = 0
    await this.sync()
  }

  /** Whether `count` records fit without waiting for a checkpoint. */
  hasRoom(count: number): boolean {
    // One mark more must always fit behind the changes, or FLUSH could find no room.
    const need = alignFrame(count * CHANGE_RECORD_SIZE) + 4 * alignFrame(8)
    const active = this.#sides[this.#active]
    return (
      active.end + need <= active.file.size || (this.#otherIsFree() && HEADER_SIZE + need <= active.file.size)
    )
  }

  /** Whether a checkpoint should be taken, so that there is always a free file to turn to. */
  get wantsCheckpoint(): boolean {
    const active = this.#sides[this.#active]
    return active.end > active.file.size / 2 && active.lastSequence > this.#checkpointed
  }

  /**
   * Appends one frame. It survives the death of this process from the moment this returns.
   * @returns its sequence
   * @throws StoreError MEMBER_IO when the file cannot be written; the frame then does not count, unless the journal has failed
   */
  append(changes: readonly Change[]): number {
    assert(
      changes.length > 0 && changes.length * CHANGE_RECORD_SIZE <= FRAME_PAYLOAD_MAX,
      'journal frame size',
    )
    const payload = Buffer.allocUnsafe(changes.length * CHANGE_RECORD_SIZE)
    changes.forEach((change, index) => {
      encodeChange(change, payload, index * CHANGE_RECORD_SIZE)
    })
    this.#lastChange = this.#write(KIND_CHANGES, payload)
    return this.#lastChange
  }

  /** States that the data of all frames up to `covered` is durable on the members. Takes effect with `sync`. */
  mark(covered: number): void {
    assert(covered <= this.#sequence)
    const payload = Buffer.alloc(8)
    payload.writeBigUInt64LE(BigInt(covered))
    this.#write(KIND_DURABLE, payload)
  }

  /**
   * A sync of the members or of this journal has failed: from now on only what a mark covers counts, whoever reads this. It is
   * for those who read it under the same kernel, so it need not be durable.
   * @throws StoreError MEMBER_IO or NO_SPACE
   */
  distrust(): void {
    this.#write(KIND_DISTRUST, Buffer.alloc(0))
  }

  /** Makes all frames durable that were appended before the call. @throws StoreError MEMBER_IO, from then on always */
  sync(): Promise<void> {
    return this.#syncs.run()
  }

  async #syncSides(): Promise<void> {
    for (const side of this.#sides) {
      if (this.#syncFailed !== undefined) throw this.#syncFailed
      if (!side.unsynced) continue
      side.unsynced = false // before the call: what is written during it needs another one
      try {
        await side.file.sync()
      } catch (error) {
        const failed = new StoreError('MEMBER_IO', `journal: sync failed: ${messageOf(error)}`, {
          cause: error,
        })
        this.#syncFailed = failed
        throw failed
      }
    }
  }

  /** LMDB holds every frame up to `sequence`, durably. */
  checkpointed(sequence: number): void {
    assert(sequence >= this.#checkpointed && sequence <= this.#sequence)
    this.#checkpointed = sequence
  }

  close(): void {
    for (const side of this.#sides) side.file.close()
  }

  #otherIsFree(): boolean {
    return (this.#sides[this.#active === 0 ? 1 : 0]?.lastSequence ?? 0) <= this.#checkpointed
  }

  #write(kind: number, payload: Buffer): number {
    if (this.#failure !== undefined) throw this.#failure
    const size = alignFrame(payload.length)
    let side = this.#sides[this.#active]
    if (side.end + size > side.file.size) {
      if (!this.#otherIsFree()) throw new StoreError('NO_SPACE', 'journal: full, waiting for a checkpoint')
      const next = this.#active === 0 ? 1 : 0
      // First the header: where it cannot be written, the journal stays with the file that it has.
      this.#begin(this.#sides[next], side.epoch + 1)
      this.#active = next
      side = this.#sides[next]
      assert(side.end + size <= side.file.size)
    }
    const sequence = this.#sequence + 1
    const frame = Buffer.alloc(size)
    frame.writeUInt32LE(FRAME_MAGIC, 0)
    frame.writeUInt32LE(payload.length, 4)
    frame.writeBigUInt64LE(BigInt(sequence), 8)
    frame.writeUInt32LE(kind, 16)
    payload.copy(frame, FRAME_HEADER_SIZE)
    frame.writeUInt32LE(frameChecksum(frame, payload.length, side.seed), 20)
    try {
      side.file.write(frame, side.end)
    } catch (error) {
      throw this.#takeBack(side, frame, error)
    }
    this.#sequence = sequence
    side.end += size
    side.lastSequence = sequence
    side.unsynced = true
    return sequence
  }

  /** Rule 6. @returns what to tell of it */
  #takeBack(side: Side, frame: Buffer, cause: unknown): StoreError {
    const what = `journal: write failed at ${side.end}: ${messageOf(cause)}`
    try {
      const found = Buffer.alloc(frame.length)
      side.file.read(found, side.end)
      if (found.equals(frame)) side.file.write(Buffer.alloc(frame.length), side.end)
    } catch (error) {
      const text = `${what}; what is there all the same could not be taken back: ${messageOf(error)}`
      this.#failure = new StoreError('MEMBER_IO', text, { cause })
      return this.#failure
    }
    return new StoreError('MEMBER_IO', what, { cause })
  }

  #begin(side: Side, epoch: number): void {
    assert(side.lastSequence <= this.#checkpointed, 'journal file taken over too early')
    const header = Buffer.alloc(HEADER_SIZE)
    FILE_MAGIC.copy(header, 0)
    header.writeUInt32LE(FILE_VERSION, 8)
    header.writeUInt32LE(this.#identity.salt?.() ?? randomBytes(4).readUInt32LE(), 12)
    header.writeBigUInt64LE(BigInt(epoch), 16)
    header.write(this.#identity.pool, 24, 36, 'latin1')
    header.write(this.#identity.bootId, 60, 36, 'latin1')
    const checksum = crc32(header.subarray(0, HEADER_SIZE - 4))
    header.writeUInt32LE(checksum, HEADER_SIZE - 4)
    try {
      side.file.write(header, 0)
    } catch (error) {
      throw new StoreError('MEMBER_IO', `journal: a file cannot be begun: ${messageOf(error)}`, {
        cause: error,
      })
    }
    side.epoch = epoch
    side.seed = checksum
    side.end = HEADER_SIZE
    side.lastSequence = 0
    side.unsynced = true
  }

  #readHeader(side: Side): { epoch: number; checksum: number; bootId: string } | undefined {
    if (side.file.size < HEADER_SIZE) throw new StoreError('DAMAGED', 'journal: a file is truncated')
    const header = Buffer.alloc(HEADER_SIZE)
    side.file.read(header, 0)
    if (!header.subarray(0, 8).equals(FILE_MAGIC)) return undefined // never begun
    // A header torn by a power cut: no frame under it was ever synced, so there is nothing to lose.
    const checksum = crc32(header.subarray(0, HEADER_SIZE - 4))
    if (header.readUInt32LE(HEADER_SIZE - 4) !== checksum) return undefined
    const version = header.readUInt32LE(8)
    if (version > FILE_VERSION) {
      throw new StoreError(
        'DAMAGED',
        `journal: version ${version} is newer than this program's ${FILE_VERSION}; use a newer fullstripe`,
      )
    }
    const pool = header.toString('latin1', 24, 60)
    if (pool !== this.#identity.pool) {
      throw new StoreError(
        'DAMAGED',
        `journal: belongs to pool ${pool}, not to ${this.#identity.pool}; put the right files back`,
      )
    }
    return { epoch: Number(header.readBigUInt64LE(16)), checksum, bootId: header.toString('latin1', 60, 96) }
  }

  *#readFrames(side: Side): Generator<Frame> {
    const content = Buffer.alloc(side.file.size - HEADER_SIZE)
    side.file.read(content, HEADER_SIZE)
    for (let at = 0; at + FRAME_HEADER_SIZE <= content.length; ) {
      const length = content.readUInt32LE(at + 4)
      if (content.readUInt32LE(at) !== FRAME_MAGIC || length > FRAME_PAYLOAD_MAX) return
      const size = alignFrame(length)
      if (at + size > content.length) return
      const frame = content.subarray(at, at + size)
      if (frame.readUInt32LE(20) !== frameChecksum(frame, length, side.seed)) return
      yield {
        sequence: Number(frame.readBigUInt64LE(8)),
        end: HEADER_SIZE + at + size,
        kind: frame.readUInt32LE(16),
        payload: frame.subarray(FRAME_HEADER_SIZE, FRAME_HEADER_SIZE + length),
      }
      at += size
    }
  }
}

function alignFrame(payloadLength: number): number {
  return Math.ceil((FRAME_HEADER_SIZE + payloadLength) / 8) * 8
}

function frameChecksum(frame: Buffer, payloadLength: number, seed: number): number {
  const head = crc32(frame.subarray(0, 20), seed)
  return crc32(frame.subarray(FRAME_HEADER_SIZE, FRAME_HEADER_SIZE + payloadLength), head)
}

/** What a durable mark covers: frames before it. @throws StoreError DAMAGED where no journal would have written that */
function coveredBy({ sequence, payload }: Frame): number {
  const covered = payload.length === 8 ? Number(payload.readBigUInt64LE(0)) : Number.POSITIVE_INFINITY
  if (covered < sequence) return covered
  throw new StoreError(
    'DAMAGED',
    `journal: frame ${sequence} is a mark that covers what comes after it, or no number`,
  )
}

/**     0      4        8         12       16      20
 *      | op   | medium | first   | count  | slot  | 0    |   all u32, little endian */
function encodeChange(change: Change, target: Buffer, at: number): void {
  target.writeUInt32LE(change.op, at)
  target.writeUInt32LE(change.medium, at + 4)
  target.writeUInt32LE(change.first, at + 8)
  target.writeUInt32LE(change.count, at + 12)
  target.writeUInt32LE(change.slot, at + 16)
  target.writeUInt32LE(0, at + 20)
}

function* decodeChanges(payload: Buffer): Generator<Change> {
  for (let at = 0; at + CHANGE_RECORD_SIZE <= payload.length; at += CHANGE_RECORD_SIZE) {
    yield {
      op: payload.readUInt32LE(at),
      medium: payload.readUInt32LE(at + 4),
      first: payload.readUInt32LE(at + 8),
      count: payload.readUInt32LE(at + 12),
      slot: payload.readUInt32LE(at + 16),
    }
  }
}

/** Whether a record speaks of intents. */
export function isIntent({ op }: Change): boolean {
  return op === CHANGE.hot || op === CHANGE.cool
}

/** Whether a record speaks of a mirror's copy units. */
export function isCopy({ op }: Change): boolean {
  return op === CHANGE.copySet || op === CHANGE.copyClear
}

/** Whether a record speaks of no data, so that it counts wherever it can be read. */
function isBits(change: Change): boolean {
  return isIntent(change) || isCopy(change)
}
