import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  closeSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { createGeometry, memberSizeOf } from '../../src/stripe/geometry.ts'
import { FileMember, readableSize } from '../../src/stripe/member.ts'
import { writeSuperblocks } from '../../src/stripe/members.ts'
import { attachLoop, type LoopDevice, loopProblem, mountProblem } from './loop-device.ts'

const MiB = 2 ** 20
let directory: string
const opened: FileMember[] = []
const devices: LoopDevice[] = []

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'fullstripe-member-'))
})
afterEach(async () => {
  for (const member of opened.splice(0)) await member.close()
  for (const device of devices.splice(0)) device.detach()
  rmSync(directory, { recursive: true })
})

function open(path: string, mode: 'create' | 'existing' = 'existing', index = 1): FileMember {
  const member = FileMember.open(index, path, mode)
  opened.push(member)
  return member
}

function fileOf(size: number, name = 'file'): string {
  const path = join(directory, name)
  writeFileSync(path, '')
  truncateSync(path, size)
  return path
}

function device(size: number): string {
  const loop = attachLoop(join(directory, `backing-${devices.length}`), size)
  devices.push(loop)
  return loop.path
}

const errorOf = (action: () => unknown): unknown => {
  try {
    return action()
  } catch (error) {
    return error
  }
}

describe('a file member', () => {
  it('is created for its owner only, and never over something', () => {
    const path = join(directory, 'new')
    const member = open(path, 'create')
    expect(statSync(path).mode & 0o777).toBe(0o600)
    expect(member).toMatchObject({ kind: 'file', size: 0, name: `member 1 (${path})`, index: 1 })
    expect(errorOf(() => open(path, 'create'))).toMatchObject({
      code: 'EXISTS',
      message: expect.stringContaining(path),
    })
  })

  it('reads what was written, at any offset', async () => {
    const member = open(fileOf(4 * MiB))
    const source = Buffer.from('some bytes')
    await member.write(source, 3 * MiB + 7)
    await member.sync()
    const target = Buffer.alloc(14)
    await member.read(target, 3 * MiB + 5)
    expect(target.toString('latin1')).toBe('\0\0some bytes\0\0')
  })

  it('refuses a read past its end, naming member, length and offset', async () => {
    const path = fileOf(8192)
    const member = open(path)
    await expect(member.read(Buffer.alloc(4096), 6000)).rejects.toMatchObject({
      name: 'StoreError',
      code: 'MEMBER_IO',
      message: `member 1 (${path}): read of 4096 bytes at 6000 failed: it ends at 8192`,
    })
  })

  const unmountable = mountProblem()
  const skipped = unmountable === undefined ? '' : ` (skipped: ${unmountable})`
  it.skipIf(skipped !== '')(`says NO_SPACE when the file system below is full${skipped}`, async () => {
    const mountPoint = join(directory, 'small')
    mkdirSync(mountPoint)
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mountPoint])
    try {
      const path = join(mountPoint, 'file')
      writeFileSync(path, '')
      truncateSync(path, 16 * MiB)
      const member = open(path)
      await expect(member.write(Buffer.alloc(4 * MiB, 1), 0)).rejects.toMatchObject({
        name: 'StoreError',
        code: 'NO_SPACE',
      })
      await member.close()
    } finally {
      execFileSync('umount', [mountPoint])
    }
  })

  it('reports a failing device as MEMBER_IO', async () => {
    const member = open(fileOf(8192))
    closeSync(member.fd) // what the kernel then says stands for any failing call
    const borrowed = openSync('/proc/self/mem', 'r') // keeps the number taken, and fails reads and writes at 0
    expect(borrowed).toBe(member.fd)
    await expect(member.read(Buffer.alloc(512), 0)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    await expect(member.write(Buffer.alloc(512), 0)).rejects.toMatchObject({ code: 'MEMBER_IO' })
    await expect(member.sync()).rejects.toMatchObject({
      code: 'MEMBER_IO',
      message: expect.stringContaining('sync failed'),
    })
  })

  it('gives the space of a range back', async () => {
    const path = fileOf(8 * MiB)
    const member = open(path)
    await member.write(Buffer.alloc(4 * MiB, 7), 0)
    await member.sync()
    const before = statSync(path).blocks
    expect(await member.punch(MiB, 2 * MiB)).toBe(true)
    expect(statSync(path).blocks).toBeLessThanOrEqual(before - (2 * MiB) / 512)
    const bytes = readFileSync(path)
    expect(bytes.length).toBe(8 * MiB)
    expect(bytes.indexOf(0)).toBe(MiB)
    expect(bytes.lastIndexOf(7)).toBe(4 * MiB - 1)
    expect(bytes.indexOf(7, MiB)).toBe(3 * MiB)
  })

  it('says that it cannot give space back where fallocate fails', async () => {
    const member = open(fileOf(8192))
    expect(await member.punch(-1, 4096)).toBe(false)
  })

  it('finds its superblocks, also in a file shorter than those', async () => {
    const geometry = createGeometry({ chunkSize: 65_536, dataMembers: 2, parityMembers: 0, slots: 5 })
    const path = fileOf(memberSizeOf(geometry))
    const member = open(path)
    expect(await member.identify()).toEqual({ state: 'blank' })
    const superblock = {
      uuid: '00000000-0000-4000-8000-000000000001',
      memberIndex: 1,
      geometry,
      generation: 1,
      created: 1,
    }
    await writeSuperblocks(member, superblock)
    expect(await member.identify()).toEqual({ state: 'valid', superblock, note: undefined })
    await member.close()
    truncateSync(path, 4096)
    expect(await open(path).identify()).toMatchObject({
      state: 'valid',
      note: expect.stringContaining('copy'),
    })
    const empty = open(fileOf(0, 'empty'))
    expect(await empty.identify()).toEqual({ state: 'blank' })
  })
})

describe('opening', () => {
  it('names what is wrong with a path', () => {
    const missing = join(directory, 'missing')
    expect(errorOf(() => open(missing))).toMatchObject({
      name: 'UserError',
      code: 'NOT_FOUND',
      message: `member 1 (${missing}) is missing: put it back at this path`,
    })
    expect(errorOf(() => open(join(missing, 'x'), 'create'))).toMatchObject({
      message: expect.stringContaining('its directory does not exist'),
    })
    expect(errorOf(() => open(directory))).toMatchObject({
      code: 'REFUSED',
      message: expect.stringContaining('is a directory'),
    })
    expect(errorOf(() => open('/dev/null'))).toMatchObject({
      message: expect.stringContaining('neither a file nor a block device'),
    })
    const fifo = join(directory, 'fifo')
    execFileSync('mkfifo', [fifo])
    expect(errorOf(() => open(fifo))).toMatchObject({
      message: expect.stringContaining('neither a file nor a block device'),
    })
    const link = join(directory, 'link')
    symlinkSync(missing, link)
    expect(errorOf(() => open(link))).toMatchObject({ code: 'NOT_FOUND' })
  })

  it('claims the file: not twice, under no name, until closed', async () => {
    const path = fileOf(8192)
    const hard = join(directory, 'hard')
    linkSync(path, hard)
    const member = open(path)
    expect(errorOf(() => open(hard))).toMatchObject({
      code: 'BUSY',
      message: expect.stringContaining('in use by another process'),
    })
    await member.close()
    await member.close() // harmless
    open(hard)
  })

  it('refuses a file that another process holds', async () => {
    const path = fileOf(8192)
    const child = spawn('flock', ['-x', path, 'sh', '-c', 'echo held; exec sleep 1000'], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    await once(child.stdout, 'data')
    expect(errorOf(() => open(path))).toMatchObject({ code: 'BUSY' })
    // flock(1) waits for its command, and that one has the lock too.
    const [inner] = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'latin1').trim().split(' ')
    process.kill(Number(inner), 'SIGKILL')
    await once(child, 'exit')
    open(path)
  })

  it('leaves no descriptor behind when it fails', () => {
    const path = fileOf(8192)
    open(path)
    const before = readdirSync('/proc/self/fd').length
    for (const each of [path, '/dev/null', directory, join(directory, 'missing')])
      errorOf(() => FileMember.open(0, each))
    expect(readdirSync('/proc/self/fd').length).toBe(before)
  })
})

describe('probe', () => {
  it('is content while nothing happened, also after growth and writes', async () => {
    const path = fileOf(8192)
    const member = open(path)
    await member.write(Buffer.alloc(100, 1), 0)
    expect(await member.probe()).toBeUndefined()
    truncateSync(path, 16_384)
    expect(await member.probe()).toBeUndefined()
  })

  it('notices a deleted file, and says where its content still is', async () => {
    const path = fileOf(8192)
    const member = open(path)
    await member.write(Buffer.from('precious'), 0)
    unlinkSync(path)
    const report = await member.probe()
    expect(report).toContain(`member 1 (${path}) was deleted`)
    const rescue = /\/proc\/\d+\/fd\/\d+/.exec(report ?? '')?.[0]
    expect(readFileSync(rescue ?? '').toString('latin1', 0, 8)).toBe('precious')
  })

  it('notices a file that was cut short', async () => {
    const path = fileOf(65_536)
    const member = open(path)
    truncateSync(path, 4096)
    expect(await member.probe()).toBe(
      `member 1 (${path}) was cut short (4K instead of 64K): stop the daemon and restore it`,
    )
  })

  it('notices a file that was moved away or replaced', async () => {
    const path = fileOf(8192)
    const member = open(path)
    renameSync(path, join(directory, 'elsewhere'))
    expect(await member.probe()).toContain('is no longer at its path: put it back')
    fileOf(8192)
    expect(await member.probe()).toContain('is no longer at its path, another one is')
    renameSync(join(directory, 'elsewhere'), path)
    expect(await member.probe()).toBeUndefined()
  })
})

describe('readableSize', () => {
  it.each([0, 1, 2, 511, 512, 4096, 1_000_003, 2 ** 33 + 5])('finds %d bytes without being told', (size) => {
    const fd = openSync(fileOf(size), 'r')
    try {
      expect(readableSize(fd)).toBe(size)
    } finally {
      closeSync(fd)
    }
  })
})

const problem = loopProblem()
describe.skipIf(problem !== undefined)(
  `a block device${problem === undefined ? '' : ` (skipped: ${problem})`}`,
  () => {
    it('has its size, and the same one found by reading', async () => {
      const member = open(device(33 * MiB + 512))
      expect(member).toMatchObject({ kind: 'device', size: 33 * MiB + 512 })
      expect(readableSize(member.fd)).toBe(33 * MiB + 512)
      await expect(member.read(Buffer.alloc(1024), 33 * MiB)).rejects.toMatchObject({ code: 'MEMBER_IO' })
      await expect(member.write(Buffer.alloc(1024), 33 * MiB)).rejects.toMatchObject({ name: 'StoreError' })
      expect(await member.probe()).toBeUndefined()
    })

    it('reads, writes, syncs and gives space back', async () => {
      const path = device(16 * MiB)
      const member = open(path)
      await member.write(Buffer.alloc(4 * MiB, 9), 0)
      await member.sync()
      const backing = devices[0]?.backing ?? ''
      const before = statSync(backing).blocks
      expect(await member.punch(MiB, 2 * MiB)).toBe(true)
      await member.sync()
      expect(statSync(backing).blocks).toBeLessThan(before)
      const bytes = Buffer.alloc(4 * MiB)
      await member.read(bytes, 0)
      expect([bytes.indexOf(0), bytes.indexOf(9, MiB)]).toEqual([MiB, 3 * MiB])
    })

    it('is refused while somebody else has claimed it, and keeps others out', async () => {
      const path = device(32 * MiB)
      execFileSync('mkfs.ext4', ['-q', path], { stdio: 'pipe' })
      const mountPoint = join(directory, 'mounted')
      mkdirSync(mountPoint)
      execFileSync('mount', [path, mountPoint])
      try {
        expect(errorOf(() => open(path))).toMatchObject({
          code: 'BUSY',
          message: expect.stringContaining('is in use: unmount it'),
        })
      } finally {
        execFileSync('umount', [mountPoint])
      }
      const member = open(path)
      expect(errorOf(() => open(path))).toMatchObject({ code: 'BUSY' })
      expect(() => execFileSync('mount', [path, mountPoint], { stdio: 'pipe' })).toThrow()
      await member.close()
      open(path)
    })

    it('is refused when it is read-only', () => {
      const path = device(4 * MiB)
      execFileSync('blockdev', ['--setro', path])
      expect(errorOf(() => open(path))).toMatchObject({
        code: 'REFUSED',
        message: expect.stringContaining('is read-only'),
      })
    })

    it('notices that it has shrunk', async () => {
      const path = device(8 * MiB)
      const member = open(path)
      truncateSync(devices[0]?.backing ?? '', 4 * MiB)
      execFileSync('losetup', ['--set-capacity', path])
      expect(await member.probe()).toContain('was cut short (4M instead of 8M)')
    })
  },
)
