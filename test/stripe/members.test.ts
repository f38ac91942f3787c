import {
  closeSync,
  copyFileSync,
  openSync,
  readdirSync,
  renameSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { crc32 } from 'node:zlib'
import { beforeEach, describe, expect, it } from 'vitest'
import { FileMember } from '../../src/stripe/member.ts'
import { openMembers } from '../../src/stripe/members.ts'
import {
  at,
  create,
  type MemberPool,
  MiB,
  OTHER_UUID,
  open,
  overwrite,
  refused,
  superblockOf,
  trio,
  useDirectory,
} from './pool-fixture.ts'

useDirectory()

describe('opening is refused by name for', () => {
  let pool: MemberPool
  beforeEach(async () => {
    pool = await create({ paths: trio(), capacity: 3 * MiB })
  })
  const second = (text: string): string => `member 1 (${at('b')}) ${text}`

  it('a missing member', async () => {
    unlinkSync(at('b'))
    await expect(open(pool)).rejects.toEqual(refused(second('is missing: put it back at this path')))
  })

  it('a foreign member: another pool', async () => {
    overwrite(at('b'), superblockOf(pool, 1, { uuid: OTHER_UUID }))
    await expect(open(pool)).rejects.toEqual(refused(second(`is foreign: it belongs to pool ${OTHER_UUID}`)))
  })

  it('a foreign member: something else altogether', async () => {
    writeFileSync(at('b'), Buffer.alloc(8 * MiB, 'text '))
    await expect(open(pool)).rejects.toEqual(refused(second('is foreign: it has no superblock')))
  })

  it('a wiped or empty member', async () => {
    writeFileSync(at('b'), Buffer.alloc(8 * MiB))
    await expect(open(pool)).rejects.toEqual(refused(second('is blank')))
    writeFileSync(at('b'), '')
    await expect(open(pool)).rejects.toEqual(refused(second('is blank')))
  })

  it('a truncated member', async () => {
    const size = statSync(at('b')).size
    truncateSync(at('b'), size - 1)
    await expect(open(pool)).rejects.toEqual(refused(second('is truncated')))
    truncateSync(at('b'), 8192)
    await expect(open(pool)).rejects.toEqual(refused(second('is truncated (8K instead of')))
    truncateSync(at('b'), size)
    await open(pool)
  })

  it('members in the wrong order', async () => {
    renameSync(at('b'), at('x'))
    renameSync(at('c'), at('b'))
    renameSync(at('x'), at('c'))
    const error = await open(pool).catch((reason: unknown) => reason)
    expect(error).toEqual(refused(second('is in the wrong order: it is member 2 of this pool')))
    expect(error).toEqual(refused(`member 2 (${at('c')}) is in the wrong order: it is member 1`))
  })

  it('a copy of another member', async () => {
    copyFileSync(at('a'), at('b'))
    await expect(open(pool)).rejects.toEqual(refused(second('is a duplicate of member 0')))
  })

  it('one file under two names', async () => {
    unlinkSync(at('b'))
    symlinkSync(at('a'), at('b'))
    await expect(open(pool)).rejects.toEqual(refused(second(`is the same as member 0 (${at('a')})`), 'USAGE'))
  })

  it('a stale member', async () => {
    const later = { ...pool, expected: { ...pool.expected, generation: 2 } }
    overwrite(at('a'), superblockOf(later, 0))
    overwrite(at('c'), superblockOf(later, 2))
    await expect(open(later)).rejects.toEqual(refused(second('is stale (generation 1, the pool has 2)')))
  })

  it('metadata older than the members', async () => {
    overwrite(at('b'), superblockOf(pool, 1, { generation: 5 }))
    await expect(open(pool)).rejects.toEqual(
      refused(second("is newer than the pool's metadata (generation 5")),
    )
  })

  it('a geometry that is not the catalog’s', async () => {
    overwrite(at('b'), superblockOf(pool, 1, { geometry: { ...pool.expected.geometry, slots: 7 } }))
    await expect(open(pool)).rejects.toEqual(refused(second('contradicts the catalog: its slots is 7')))
  })

  it('a newer version', async () => {
    overwrite(at('b'), superblockOf(pool, 1), (block) => {
      block.writeUInt32LE(2, 8)
      block.writeUInt32LE(0, 12)
      block.writeUInt32LE(crc32(block), 12)
      return block
    })
    await expect(open(pool)).rejects.toEqual(
      refused(second('was written by a newer release (superblock version 2, this one knows 1)')),
    )
  })

  it('two damaged superblocks; one is survived and reported', async () => {
    const damage = (offset: number): void => {
      const fd = openSync(at('b'), 'r+')
      writeSync(fd, Buffer.from([0xee]), 0, 1, offset)
      closeSync(fd)
    }
    damage(50)
    const { notes } = await open(pool)
    expect(notes).toEqual([
      second('')
        .trim()
        .concat(': the primary superblock is damaged (its checksum does not match); its copy is used'),
    ])
    damage(4096 + 50)
    await expect(open(pool)).rejects.toEqual(
      refused(second('has a damaged superblock (its checksum does not match)')),
    )
  })

  it('a member in use', async () => {
    const holder = FileMember.open(1, at('b'))
    await expect(open(pool)).rejects.toEqual(refused(second('is in use by another process'), 'BUSY'))
    await holder.close()
    await open(pool)
  })

  it('several at once, all in one line; nothing stays open', async () => {
    unlinkSync(at('a'))
    truncateSync(at('c'), 10_000)
    const before = readdirSync('/proc/self/fd').length
    const error = await open(pool).catch((reason: unknown) => reason)
    expect(error).toEqual(refused(`member 0 (${at('a')}) is missing`))
    expect(error).toEqual(refused(`member 2 (${at('c')}) is truncated`))
    expect(String(error)).not.toContain('\n')
    expect(readdirSync('/proc/self/fd').length).toBe(before)
  })

  it('a catalog with too few paths', async () => {
    await expect(openMembers(at('.'), pool.paths.slice(1), pool.expected)).rejects.toMatchObject({
      name: 'StoreError',
      code: 'DAMAGED',
      message: 'the catalog lists 2 members of 3',
    })
  })
})
