/**
 * Looks whether a file or device that is to become a member holds somebody's data. Nothing is guessed: anything but
 * zeros where the superblocks and everybody's headers lie counts as data, and the table below only gives it a name.
 *
 * The first 1 MiB (all that lies before slot 0) must be zero. At the end of a device there may be old data, because
 * a disk that was wiped quickly is full of it; only the signatures that live there (the second GPT, md 0.90 and
 * 1.0) are looked for.
 */
import { DATA_OFFSET_DEFAULT } from './geometry.ts'
import type { Member } from './member.ts'
import { decodeSuperblock, isZero, SUPERBLOCK_SIZE } from './superblock.ts'

interface Signature {
  readonly offset: number
  readonly bytes: Buffer
  readonly name: string
}

const MD_MAGIC = Buffer.from([0xfc, 0x4e, 0x2b, 0xa9])
const GPT_MAGIC = text('EFI PART')

/** The specific ones first: many of them also carry the boot sector's mark at 510. */
const HEAD: readonly Signature[] = [
  { offset: 1080, bytes: Buffer.from([0x53, 0xef]), name: 'an ext2/3/4 file system' },
  { offset: 0, bytes: text('XFSB'), name: 'an XFS file system' },
  { offset: 65_600, bytes: text('_BHRfS_M'), name: 'a btrfs file system' },
  { offset: 0, bytes: text('LUKS'), name: 'an encrypted volume (LUKS)' },
  { offset: 512, bytes: text('LABELONE'), name: 'an LVM physical volume' },
  { offset: 512, bytes: GPT_MAGIC, name: 'a partition table (GPT)' },
  { offset: 4096, bytes: GPT_MAGIC, name: 'a partition table (GPT)' },
  { offset: 4086, bytes: text('SWAPSPACE2'), name: 'swap space' },
  { offset: 0, bytes: MD_MAGIC, name: 'a member of a md array' },
  { offset: 4096, bytes: MD_MAGIC, name: 'a member of a md array' },
  { offset: 32_769, bytes: text('CD001'), name: 'a CD image (ISO 9660)' },
  { offset: 0, bytes: text('QFI'), name: 'a qcow2 image' },
  { offset: 510, bytes: Buffer.from([0x55, 0xaa]), name: 'a partition table or boot sector' },
]

/** At any sector of the last 128 KiB. */
const TAIL: readonly Omit<Signature, 'offset'>[] = [
  { bytes: GPT_MAGIC, name: 'a partition table (GPT, at its end)' },
  { bytes: MD_MAGIC, name: 'a member of a md array' },
]
const TAIL_BYTES = 128 * 1024
const SECTOR = 512

/** What the member holds, as in "it holds ..."; undefined where it is free to take. */
export async function describeContent(member: Member): Promise<string | undefined> {
  const head = Buffer.alloc(Math.min(member.size, DATA_OFFSET_DEFAULT))
  await member.read(head, 0)
  if (!isZero(head)) return ownerOf(head) ?? nameOf(head) ?? 'data of an unknown kind'

  const tail = Buffer.alloc(Math.min(member.size - head.length, TAIL_BYTES))
  // Whole sectors from the start of the member: that is how these signatures are aligned.
  const tailOffset = Math.ceil((member.size - tail.length) / SECTOR) * SECTOR
  const sectors = tail.subarray(0, Math.max(0, member.size - tailOffset))
  await member.read(sectors, tailOffset)
  for (let at = 0; at < sectors.length; at += SECTOR) {
    const found = TAIL.find(({ bytes }) => sectors.subarray(at, at + bytes.length).equals(bytes))
    if (found !== undefined) return found.name
  }
  return undefined
}

function ownerOf(head: Buffer): string | undefined {
  for (const offset of [0, SUPERBLOCK_SIZE]) {
    const block = head.subarray(offset, offset + SUPERBLOCK_SIZE)
    if (block.length < SUPERBLOCK_SIZE) return undefined
    const decoded = decodeSuperblock(block)
    if (decoded.state === 'valid') {
      return `member ${decoded.superblock.memberIndex} of pool ${decoded.superblock.uuid}`
    }
    if (decoded.state !== 'foreign') return 'a member of some pool'
  }
  return undefined
}

function nameOf(head: Buffer): string | undefined {
  return HEAD.find(({ offset, bytes }) => head.subarray(offset, offset + bytes.length).equals(bytes))?.name
}

function text(signature: string): Buffer {
  return Buffer.from(signature, 'latin1')
}
