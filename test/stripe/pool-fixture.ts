/** A directory, and pools of members in it, for the tests of creating and opening them. */
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect } from 'vitest'
import { type CreateMembersOptions, createMembers } from '../../src/stripe/create-members.ts'
import { type ExpectedPool, type OpenedMembers, openMembers } from '../../src/stripe/members.ts'
import { encodeSuperblock, type Superblock } from '../../src/stripe/superblock.ts'

export const KiB = 1024
export const MiB = 1024 * KiB
export const TiB = 2 ** 40
export const UUID = '5d5d1f9e-0000-4000-8000-0123456789ab'
export const OTHER_UUID = '77777777-0000-4000-8000-0123456789ab'

let directory = ''

/** Gives every test of the file an empty directory of its own. */
export function useDirectory(): void {
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'fullstripe-members-'))
  })
  afterEach(() => rmSync(directory, { recursive: true }))
}

export const at = (name: string): string => join(directory, name)
export const trio = (): string[] => [at('a'), at('b'), at('c')]

export interface MemberPool {
  readonly expected: ExpectedPool
  readonly paths: string[]
}

export async function create(options: Partial<CreateMembersOptions> = {}): Promise<MemberPool> {
  const made = await createMembers({ directory, uuid: UUID, created: 1_700_000_000_000, ...options })
  await made.keep()
  const expected = { uuid: options.uuid ?? UUID, generation: made.generation, geometry: made.geometry }
  return { expected, paths: made.members.map((member) => member.path) }
}

/** Opens and closes again. */
export async function open(pool: MemberPool): Promise<OpenedMembers> {
  const result = await openMembers(directory, pool.paths, pool.expected)
  await Promise.all(result.members.map((member) => member.close()))
  return result
}

export const refused = (message: string, code = 'REFUSED'): unknown =>
  expect.objectContaining({ name: 'UserError', code, message: expect.stringContaining(message) })

/** Writes superblocks as some other program or another time would have. */
export function overwrite(
  path: string,
  superblock: Superblock,
  change = (block: Buffer): Buffer => block,
): void {
  const block = change(encodeSuperblock(superblock))
  const fd = openSync(path, 'r+')
  writeSync(fd, Buffer.concat([block, block]), 0, 8192, 0)
  closeSync(fd)
}

export const superblockOf = (
  pool: MemberPool,
  memberIndex: number,
  change: Partial<Superblock> = {},
): Superblock => ({
  uuid: pool.expected.uuid,
  memberIndex,
  geometry: pool.expected.geometry,
  generation: pool.expected.generation,
  created: 1,
  ...change,
})
