import { execFileSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  CAPACITY_DEFAULT,
  type CreateMembersOptions,
  createMembers,
} from '../../src/stripe/create-members.ts'
import { capacityOf, memberSizeOf } from '../../src/stripe/geometry.ts'
import { FileMember } from '../../src/stripe/member.ts'
import { catalogPath, openMembers } from '../../src/stripe/members.ts'
import { isZero } from '../../src/stripe/superblock.ts'
import { attachLoop, loopProblem, mountProblem } from './loop-device.ts'
import {
  at,
  create,
  KiB,
  MiB,
  OTHER_UUID,
  open,
  refused,
  TiB,
  trio,
  UUID,
  useDirectory,
} from './pool-fixture.ts'

useDirectory()

/** What is in the directory and what it costs, to see that a failed creation left nothing. */
const listing = (): string[] => readdirSync(at('.')).map((name) => `${name} ${statSync(at(name)).size}`)

describe('creating on named files', () => {
  it('makes k sparse files of their full size, without space', async () => {
    const pool = await create({ paths: trio(), chunkSize: 16 * KiB, capacity: 3 * TiB })
    const { geometry } = pool.expected
    expect(geometry).toMatchObject({
      dataMembers: 3,
      parityMembers: 0,
      chunkSize: 16 * KiB,
      stripeSize: 48 * KiB,
    })
    expect(capacityOf(geometry)).toBeGreaterThanOrEqual(3 * TiB)
    expect(capacityOf(geometry) - 3 * TiB).toBeLessThan(geometry.stripeSize)
    for (const path of trio()) {
      const { size, blocks, mode } = statSync(path)
      expect(size).toBe(memberSizeOf(geometry))
      expect(blocks * 512).toBeLessThan(MiB)
      expect(mode & 0o777).toBe(0o600)
    }
    const { members, notes } = await open(pool)
    expect(members.map((member) => member.path)).toEqual(trio())
    expect(notes).toEqual([])
  })

  it('keeps paths inside the pool directory relative, so that it can be moved', async () => {
    mkdirSync(at('pool'))
    const made = await createMembers({
      directory: at('pool'),
      uuid: UUID,
      created: 1,
      capacity: MiB,
      paths: [at('pool/x'), at('y')],
    })
    await made.keep()
    expect(made.members.map((member) => member.path)).toEqual(['x', at('y')])
    renameSync(at('pool'), at('moved'))
    const expected = { uuid: UUID, generation: made.generation, geometry: made.geometry }
    const { members } = await openMembers(at('moved'), ['x', at('y')], expected)
    expect(members[0]?.path).toBe(at('moved/x'))
    await Promise.all(members.map((member) => member.close()))
    expect(catalogPath('/pool', '/pool')).toBe('/pool')
    expect(catalogPath('/pool', '/pool/../other')).toBe('/other')
    expect(catalogPath('/pool', '/pool/..x')).toBe('..x')
  })

  it('takes an empty file, and an existing one with its size', async () => {
    writeFileSync(at('a'), '')
    writeFileSync(at('b'), '')
    truncateSync(at('b'), 5 * MiB)
    const pool = await create({ paths: [at('a'), at('b')] })
    expect(pool.expected.geometry.slots).toBe((5 * MiB - MiB) / (64 * KiB))
    expect(statSync(at('a')).size).toBe(memberSizeOf(pool.expected.geometry))
    expect(statSync(at('b')).size).toBe(5 * MiB)
    await open(pool)
  })

  it('uses what fits the smallest of several existing files', async () => {
    for (const [name, size] of [
      ['a', 4 * MiB],
      ['b', 3 * MiB],
    ] as const) {
      writeFileSync(at(name), '')
      truncateSync(at(name), size)
    }
    const { expected } = await create({ paths: [at('a'), at('b')] })
    expect(expected.geometry.slots).toBe((2 * MiB) / (64 * KiB))
  })

  it('shrinks a capacity that nobody asked for until the files can have it', async () => {
    const { expected } = await create({ paths: [at('a')] })
    const capacity = capacityOf(expected.geometry)
    expect(capacity).toBeGreaterThan(7 * TiB) // ext4 has files of 16 TiB, most others far larger ones
    expect(capacity).toBeLessThanOrEqual(CAPACITY_DEFAULT)
  })

  it('with the smallest chunk counts slots within their limit', async () => {
    const { expected } = await create({ paths: [at('a')], chunkSize: 4 * KiB })
    expect(capacityOf(expected.geometry)).toBeGreaterThan(3 * TiB)
  })

  it('undo puts everything back', async () => {
    writeFileSync(at('b'), '')
    writeFileSync(at('c'), '')
    truncateSync(at('c'), 8 * MiB)
    const made = await createMembers({ directory: at('.'), uuid: UUID, created: 1, paths: trio() })
    expect(existsSync(at('a'))).toBe(true)
    await made.undo()
    expect(listing()).toEqual(['b 0', `c ${8 * MiB}`])
    expect(isZero(readFileSync(at('c')))).toBe(true)
    await create({ paths: trio() })
  })
})

describe('a creation that is refused leaves nothing behind', () => {
  const cases: [
    string,
    Partial<CreateMembersOptions> | (() => Partial<CreateMembersOptions>),
    string,
    string?,
  ][] = [
    [
      'parity in this release',
      () => ({ paths: trio(), parity: 1 }),
      'parity 1 is not in this release',
      'USAGE',
    ],
    ['parity of nonsense', () => ({ paths: trio(), parity: 7 }), 'parity 7 is not possible', 'USAGE'],
    ['parity without members', { parity: 2 }, 'parity 2 is not in this release', 'USAGE'],
    ['more parity than members', () => ({ paths: [at('a')], parity: 2 }), '-1 data members', 'USAGE'],
    [
      'an odd chunk',
      () => ({ paths: trio(), chunkSize: 5000 }),
      'chunk size 5000 is not a power of two',
      'USAGE',
    ],
    ['a small chunk', { chunkSize: 512 }, 'chunk size 512 is outside 4K to 1M', 'USAGE'],
    ['capacity 0', { capacity: 0 }, 'capacity 0 is not a positive size', 'USAGE'],
    [
      'negative capacity',
      () => ({ paths: trio(), capacity: -5 }),
      'capacity -5 is not a positive size',
      'USAGE',
    ],
    ['capacity beyond counting', { capacity: 2 ** 50 }, 'is too large for stripes of 64K', 'USAGE'],
    [
      '33 members',
      () => ({ paths: Array.from({ length: 33 }, (_, i) => at(`m${i}`)) }),
      '33 members are too many',
      'USAGE',
    ],
    [
      'a file named twice',
      () => ({ paths: [at('a'), at('b'), at('x/../a')] }),
      `member 2 (${'{a}'}) is the same as member 0`,
      'USAGE',
    ],
    [
      'a missing directory',
      () => ({ paths: [at('a'), at('b'), at('x/c')] }),
      'its directory does not exist',
      'NOT_FOUND',
    ],
    ['a directory', () => ({ paths: [at('a'), at('b'), '/'] }), 'member 2 (/) is a directory'],
    [
      'a character device',
      () => ({ paths: [at('a'), '/dev/null'] }),
      'member 1 (/dev/null) is neither a file nor a block device',
    ],
  ]
  it.each(cases)('%s', async (_name, options, message, code = 'REFUSED') => {
    const given = typeof options === 'function' ? options() : options
    await expect(create(given)).rejects.toEqual(refused(message.replace('{a}', at('a')), code))
    expect(listing()).toEqual([])
  })

  it('a file with data, named with what it holds and how to give that up', async () => {
    writeFileSync(at('c'), Buffer.alloc(2 * MiB).fill('precious', 100, 108))
    const before = readFileSync(at('c'))
    await expect(create({ paths: trio() })).rejects.toEqual(
      refused(`member 2 (${at('c')}) holds data of an unknown kind`),
    )
    await expect(create({ paths: trio() })).rejects.toEqual(refused(`wipefs -a ${at('c')}`))
    expect(listing()).toEqual([`c ${2 * MiB}`])
    expect(readFileSync(at('c')).equals(before)).toBe(true)
    await create({ paths: trio(), force: true })
  })

  it('a member of another pool, even one that is closed', async () => {
    await create({ paths: [at('c')], uuid: OTHER_UUID, capacity: MiB })
    await expect(create({ paths: trio() })).rejects.toEqual(
      refused(`member 2 (${at('c')}) holds member 0 of pool ${OTHER_UUID}`),
    )
    expect(readdirSync(at('.'))).toEqual(['c'])
  })

  it('a file that is too small, with or without a capacity', async () => {
    writeFileSync(at('c'), '')
    truncateSync(at('c'), MiB + 64 * KiB)
    await expect(create({ paths: trio() })).rejects.toEqual(
      refused(`member 2 (${at('c')}) is too small: it has 1088K, 1152K are needed`),
    )
    await expect(create({ paths: trio(), capacity: 30 * MiB })).rejects.toEqual(refused('is too small'))
    expect(listing()).toEqual([`c ${MiB + 64 * KiB}`])
  })

  it('a member in use', async () => {
    writeFileSync(at('c'), '')
    const holder = FileMember.open(0, at('c'))
    await expect(create({ paths: trio() })).rejects.toEqual(refused('is in use by another process', 'BUSY'))
    await holder.close()
    expect(listing()).toEqual(['c 0'])
  })

  it('two names of one file', async () => {
    writeFileSync(at('a'), '')
    symlinkSync(at('a'), at('b'))
    await expect(create({ paths: [at('a'), at('b')] })).rejects.toEqual(
      refused(`is the same as member 0 (${at('a')})`, 'USAGE'),
    )
  })

  it('existing data is back, byte for byte, when a later step fails under --force', async () => {
    const precious = Buffer.alloc(2 * MiB, 'precious')
    writeFileSync(at('a'), precious)
    const made = await createMembers({
      directory: at('.'),
      uuid: UUID,
      created: 1,
      paths: [at('a')],
      force: true,
    })
    expect(readFileSync(at('a')).equals(precious)).toBe(false)
    await made.undo()
    expect(readFileSync(at('a')).equals(precious)).toBe(true)
  })

  it('leaves no descriptor behind', async () => {
    writeFileSync(at('c'), 'data')
    const before = readdirSync('/proc/self/fd').length
    await expect(create({ paths: trio() })).rejects.toThrow()
    expect(readdirSync('/proc/self/fd').length).toBe(before)
  })
})

describe('the default members', () => {
  it('are one sparse file where it may be as large as that', async () => {
    const pool = await create({ capacity: TiB })
    expect(pool.paths).toEqual(['member-0'])
    expect(pool.expected.geometry).toMatchObject({
      chunkSize: 64 * KiB,
      dataMembers: 1,
      stripeSize: 64 * KiB,
    })
    await open(pool)
  })

  it('without a capacity have room for a thick volume of 16 TiB, with few files and whole stripes of 64 KiB', async () => {
    const pool = await create()
    const { geometry } = pool.expected
    expect(capacityOf(geometry)).toBeGreaterThan(16 * TiB)
    expect(geometry.stripeSize).toBe(64 * KiB)
    expect(geometry.dataMembers).toBeLessThanOrEqual(2)
    expect(statSync(at('member-0')).blocks * 512).toBeLessThan(MiB)
    await open(pool)
  })

  it('are not made over what is there', async () => {
    writeFileSync(at('member-0'), 'something')
    await expect(create()).rejects.toEqual(refused(`member 0 (${at('member-0')}) exists already`, 'EXISTS'))
    expect(readFileSync(at('member-0'), 'utf8')).toBe('something')
  })

  describe('where files cannot be large', () => {
    /** The kernel's own limit on the size of files of this process: EFBIG, as a file system would say it. */
    const limitFiles = (bytes: string): void => {
      execFileSync('prlimit', ['--pid', String(process.pid), `--fsize=${bytes}:`], { stdio: 'pipe' })
    }
    afterEach(() => limitFiles('unlimited'))

    it.each([
      [40, 2, 32],
      [20, 4, 16],
      [10, 8, 8],
      [6, 16, 4],
    ])('of %d MiB, 64 MiB take %d of them with chunks of %d KiB', async (limit, count, chunk) => {
      limitFiles(String(limit * MiB))
      const pool = await create({ capacity: 64 * MiB })
      expect(pool.paths).toEqual(Array.from({ length: count }, (_, index) => `member-${index}`))
      expect(pool.expected.geometry).toMatchObject({
        chunkSize: chunk * KiB,
        dataMembers: count,
        stripeSize: 64 * KiB,
      })
      expect(readdirSync(at('.'))).toHaveLength(count)
      await open(pool)
    })

    it('a capacity that does not fit into 16 of them is refused, and nothing is left', async () => {
      limitFiles(String(4 * MiB))
      await expect(create({ capacity: 64 * MiB })).rejects.toEqual(refused('ask for a smaller --capacity'))
      await expect(create({ capacity: 64 * MiB, paths: trio() })).rejects.toEqual(
        refused('does not hold files of'),
      )
      expect(readdirSync(at('.'))).toEqual([])
    })

    it('a capacity that nobody asked for is made to fit', async () => {
      limitFiles(String(300 * MiB))
      const pool = await create()
      expect(capacityOf(pool.expected.geometry)).toBeGreaterThan(2 * 2 ** 30)
      await open(pool)
    })

    it('a limit below everything is an error, not an endless loop', async () => {
      limitFiles(String(64 * KiB))
      await expect(create()).rejects.toEqual(refused('does not hold files of even one stripe'))
      await expect(create({ paths: trio() })).rejects.toEqual(
        refused('does not hold files of even one stripe'),
      )
      expect(readdirSync(at('.'))).toEqual([])
    })
  })
})

const unmountable = mountProblem()
const whyNot = unmountable === undefined ? '' : ` (skipped: ${unmountable})`
describe.skipIf(unmountable !== undefined)(`a file system of its own${whyNot}`, () => {
  const mount = (...options: string[]): void =>
    void execFileSync('mount', [...options, at('disk')], { stdio: 'pipe' })
  beforeEach(() => {
    mkdirSync(at('disk'))
    mount('-t', 'tmpfs', '-o', 'size=1m', 'tmpfs')
  })
  afterEach(() => void execFileSync('umount', [at('disk')], { stdio: 'pipe' }))

  it('that is full is reported, and creation leaves nothing', async () => {
    const filler = openSync(at('disk/filler'), 'w')
    expect(() => {
      for (;;) writeSync(filler, Buffer.alloc(65_536, 1))
    }).toThrow('ENOSPC')
    closeSync(filler)
    await expect(create({ directory: at('disk'), capacity: TiB })).rejects.toEqual(
      refused(`member 0 (${at('disk/member-0')}): write of 4096 bytes at 0 failed: ENOSPC`, 'FAILED'),
    )
    expect(readdirSync(at('disk'))).toEqual(['filler'])
  })

  it('that is read-only is reported, at creation and at opening', async () => {
    const pool = await create({ directory: at('disk'), capacity: TiB })
    mount('-o', 'remount,ro')
    await expect(create({ paths: [at('disk/other')] })).rejects.toEqual(
      refused(`member 0 (${at('disk/other')}) is read-only`),
    )
    await expect(openMembers(at('disk'), pool.paths, pool.expected)).rejects.toEqual(
      refused(`member 0 (${at('disk/member-0')}) is read-only: make it writable`),
    )
    mount('-o', 'remount,rw')
    const { members } = await openMembers(at('disk'), pool.paths, pool.expected)
    await members[0]?.close()
  })
})

const problem = loopProblem()
describe.skipIf(problem !== undefined)(
  `block devices${problem === undefined ? '' : ` (skipped: ${problem})`}`,
  () => {
    it('become members with their whole size, and are refused while they hold data', async () => {
      const loops = [attachLoop(at('backing-0'), 40 * MiB), attachLoop(at('backing-1'), 32 * MiB)]
      try {
        const paths = loops.map((loop) => loop.path)
        const pool = await create({ paths })
        expect(pool.expected.geometry.slots).toBe((31 * MiB) / (64 * KiB))
        const { members } = await open(pool)
        expect(members.map((member) => [member.kind, member.size])).toEqual([
          ['device', 40 * MiB],
          ['device', 32 * MiB],
        ])
        await expect(create({ paths })).rejects.toEqual(
          refused(`member 0 (${paths[0]}) holds member 0 of pool ${UUID}`),
        )
        await expect(open({ ...pool, paths: paths.toReversed() })).rejects.toEqual(
          refused('is in the wrong order'),
        )
      } finally {
        for (const loop of loops) loop.detach()
      }
    })

    it('with a file system are refused untouched, and taken after the advice was followed', async () => {
      const loop = attachLoop(at('backing'), 32 * MiB)
      try {
        execFileSync('mkfs.ext4', ['-q', loop.path], { stdio: 'pipe' })
        const error = await create({ paths: [loop.path] }).catch((reason: unknown) => reason)
        expect(error).toEqual(refused(`holds an ext2/3/4 file system`))
        execFileSync('e2fsck', ['-fn', loop.path], { stdio: 'pipe' })
        const advice = /\((wipefs .*)\)$/.exec(String(error))?.[1]
        execFileSync('sh', ['-c', advice ?? 'false'], { stdio: 'pipe' })
        await open(await create({ paths: [loop.path] }))
      } finally {
        loop.detach()
      }
    })
  },
)
