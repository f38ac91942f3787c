import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { describeContent } from '../../src/stripe/content.ts'
import { FileMember } from '../../src/stripe/member.ts'

const MiB = 2 ** 20
let directory: string
let path: string

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'fullstripe-content-'))
  path = join(directory, 'file')
  writeFileSync(path, '')
})
afterEach(() => rmSync(directory, { recursive: true }))

async function content(): Promise<string | undefined> {
  const member = FileMember.open(0, path)
  try {
    return await describeContent(member)
  } finally {
    await member.close()
  }
}

/** A tool that is part of every system with disks, or the reason to skip. */
function missing(command: string): boolean {
  try {
    execFileSync('sh', ['-c', `command -v ${command}`], {
      stdio: 'pipe',
      env: { PATH: '/usr/sbin:/sbin:/usr/bin:/bin' },
    })
    return false
  } catch {
    return true
  }
}

describe('describeContent', () => {
  it.each([0, 1, 511, 4096, 100_000, MiB, MiB + 1000, 300 * MiB])(
    'finds nothing in %d zeros',
    async (size) => {
      truncateSync(path, size)
      expect(await content()).toBeUndefined()
    },
  )

  it('takes any byte of the first MiB for data', async () => {
    for (const offset of [0, 8191, 8192, 65_536, MiB - 1]) {
      writeFileSync(path, Buffer.alloc(2 * MiB).fill(1, offset, offset + 1))
      expect(await content()).toBe('data of an unknown kind')
    }
    writeFileSync(path, Buffer.alloc(2 * MiB).fill(1, MiB, MiB + 1))
    expect(await content()).toBeUndefined()
  })

  it.each([
    ['EFI PART', 'a partition table (GPT, at its end)', -512],
    ['EFI PART', 'a partition table (GPT, at its end)', -4096],
    ['\xfc\x4e\x2b\xa9', 'a member of a md array', -65_536],
    ['\xfc\x4e\x2b\xa9', 'a member of a md array', -8192],
  ])('finds %j at the end', async (magic, name, fromEnd) => {
    const bytes = Buffer.alloc(2 * MiB + 512)
    bytes.write(magic, bytes.length + fromEnd, 'latin1')
    writeFileSync(path, bytes)
    expect(await content()).toBe(name)
  })

  it.each([
    ['mkfs.ext4', ['-q', '-F'], 'an ext2/3/4 file system', 16],
    ['mkfs.xfs', ['-q', '-f'], 'an XFS file system', 512],
    ['mkswap', [], 'swap space', 16],
  ])('knows what %s made', async (command, options, name, mebibytes) => {
    if (missing(command)) return console.warn(`skipped: ${command} is not installed`)
    truncateSync(path, mebibytes * MiB)
    const env = { PATH: '/usr/sbin:/sbin:/usr/bin:/bin' }
    execFileSync(command, [...options, path], { stdio: 'pipe', env })
    expect(await content()).toBe(name)
    // The advice that goes with the refusal works.
    execFileSync('wipefs', ['-a', path], { stdio: 'pipe', env })
    execFileSync('dd', ['if=/dev/zero', `of=${path}`, 'bs=1M', 'count=1', 'conv=notrunc'], { stdio: 'pipe' })
    expect(await content()).toBeUndefined()
  })
})
