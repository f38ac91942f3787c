import { type ChildProcess, spawn } from 'node:child_process'
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, describe, expect, it, onTestFinished, vi } from 'vitest'
import { NbdLink } from '../../src/mirror/nbd-link.ts'
import { NbdRemote } from '../../src/mirror/nbd-remote.ts'
import type { MirrorAddOptions, MirrorInfo } from '../../src/mirror/types.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { COMMAND_FLAG } from '../../src/nbd/constants.ts'
import { createPool } from '../../src/volume/pool.ts'
import { answers } from '../nbd/servers.ts'
import { Side } from '../support/mirror-pair.ts'
import { isPending, until } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { type DatapathChoice, ServedPool } from '../support/served-pool.ts'

/** Volumes that are mirrored to servers of others. */
vi.setConfig({ testTimeout: 60_000 })

const KIB = 1 << 10
const MIB = 1 << 20
const UNIT = 64 * KIB
const SIZE = 64 * MIB
const DATAPATHS: DatapathChoice[] = ['native', 'portable']

let side: Side | undefined
afterEach(async () => {
  await side?.destroy()
  side = undefined
})

/** A server at a socket of its own, which dies and comes back there. */
class Target {
  readonly directory = mkdtempSync(join(tmpdir(), 'fullstripe-target-'))
  readonly socket = join(this.directory, 'target.sock')
  readonly uri = `nbd+unix:///?socket=${this.socket}`
  readonly log = join(this.directory, 'log')
  readonly image = join(this.directory, 'image')
  readonly trouble = join(this.directory, 'trouble') // while it exists, the error filter is on
  readonly #command: (target: Target) => readonly string[]
  #child: ChildProcess | undefined

  static async start(command: (target: Target) => readonly string[]): Promise<Target> {
    const target = new Target(command)
    onTestFinished(async () => {
      await target.kill()
      rmSync(target.directory, { recursive: true, force: true })
    })
    await target.start()
    return target
  }

  private constructor(command: (target: Target) => readonly string[]) {
    this.#command = command
  }

  async start(): Promise<void> {
    rmSync(this.socket, { force: true })
    writeFileSync(this.log, '')
    const [program = '', ...args] = this.#command(this)
    const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
    this.#child = child
    let words = ''
    child.stderr?.on('data', (chunk: Buffer) => {
      words += chunk.toString()
    })
    await until(async () => {
      if (child.exitCode !== null) throw new Error(`${program}: ${words}`)
      return await answers(this.socket)
    }, `${program} listens`)
  }

  /** Says nothing from here on: every thread of it is stopped. */
  async stall(): Promise<void> {
    const child = this.#child
    if (child?.pid === undefined) throw new Error('the target does not run')
    child.kill('SIGSTOP')
    const tasks = `/proc/${child.pid}/task`
    const stopped = (task: string): boolean => / T /.test(readFileSync(join(tasks, task, 'stat'), 'latin1'))
    await until(() => readdirSync(tasks).every(stopped), 'the target is stopped')
  }

  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child === undefined || child.exitCode !== null) return
    const gone = new Promise((resolve) => child.once('close', resolve))
    child.kill('SIGKILL')
    await gone
  }

  async client<T>(work: (client: NbdClient) => Promise<T>): Promise<T> {
    const client = await NbdClient.connect(this.uri)
    try {
      return await work(client)
    } finally {
      await client.close()
    }
  }

  async content(size = SIZE): Promise<Buffer> {
    const target = Buffer.alloc(size)
    await this.client((client) => client.read(target, 0))
    return target
  }

  /** Requests of one kind that the log filter saw since the start. */
  requests(kind: 'Read' | 'Write' | 'Zero' | 'Flush'): { offset: number; length: number; fua: boolean }[] {
    const lines = readFileSync(this.log, 'utf8').split('\n')
    return lines
      .filter((line) => new RegExp(`[0-9] ${kind} `).test(line))
      .map((line) => ({
        offset: Number(/offset=(0x[0-9a-f]+)/.exec(line)?.[1] ?? 0),
        length: Number(/count=(0x[0-9a-f]+)/.exec(line)?.[1] ?? 0),
        fua: /fua=1/.test(line),
      }))
  }
}

const nbdkit =
  (...args: string[]) =>
  ({ socket, log }: Target): string[] => [
    'nbdkit',
    '-f',
    '-U',
    socket,
    '--filter=log',
    ...args,
    `logfile=${log}`,
    'logappend=true',
  ]
const memory = (...args: string[]) => nbdkit(...args, 'memory', String(SIZE))
const file =
  (size = SIZE) =>
  (target: Target): string[] => {
    if (!existsSync(target.image)) sparse(target.image, size)
    return nbdkit('file', target.image)(target)
  }
const qemu = (target: Target): string[] => {
  if (!existsSync(target.image)) sparse(target.image, SIZE)
  return ['qemu-nbd', '--persistent', '--shared=0', '-f', 'raw', '-k', target.socket, target.image]
}

/** Forgets everything; and FUA is something that clients have to do with flushes. */
const withoutFua = (target: Target): string[] => [
  ...nbdkit('eval')(target),
  `get_size=echo ${SIZE}`,
  'pread=head -c $3 /dev/zero',
  'pwrite=cat > /dev/null',
  'can_flush=exit 0',
  'flush=exit 0',
  'can_fua=echo none',
  'can_zero=exit 0',
  'zero=exit 0',
  'can_extents=exit 0',
  `extents=echo 0 ${SIZE} hole,zero`,
]

function sparse(path: string, size: number): void {
  writeFileSync(path, '')
  truncateSync(path, size)
}

const sum = (ranges: readonly { length: number }[]): number =>
  ranges.reduce((all, { length }) => all + length, 0)
const inUnits = (
  units: ReadonlySet<number>,
  { offset, length }: { offset: number; length: number },
): boolean => {
  for (let unit = Math.floor(offset / UNIT); unit < (offset + length) / UNIT; unit++)
    if (!units.has(unit)) return false
  return true
}

async function open(datapath: DatapathChoice, fill = 0): Promise<{ one: Side; client: NbdClient }> {
  side = await Side.create({ datapath })
  await side.pool.createVolume({ name: 'data', size: SIZE, fill })
  return { one: side, client: await side.connect('data') }
}

const add = (one: Side, target: Target, more: Partial<MirrorAddOptions> = {}): Promise<MirrorInfo> =>
  one.mirrors.add({ volume: 'data', peer: target.uri, ...more })

/** Everything is there, and no cycle is under way. */
async function settle(one: Side): Promise<MirrorInfo> {
  await one.reach('data', 'insync', 'cycling')
  await until(() => one.show('data').lag.bytes === 0, 'nothing lacking')
  return one.show('data')
}

async function same(one: Side, target: Target): Promise<boolean> {
  return (await target.content()).equals(await one.content('data'))
}

/** Requests of all kinds and alignments, some at the same time. */
async function scribble(client: NbdClient, random: Random, count: number): Promise<void> {
  for (let round = 0; round < count / 8; round++) {
    await Promise.all(
      Array.from({ length: 8 }, async () => {
        const length = 1 + random.below(3 * UNIT)
        const offset = random.below(SIZE - length)
        const kind = random.below(10)
        if (kind === 0) await client.trim({ offset, length })
        else if (kind === 1) await client.zero({ offset, length }, { release: random.below(2) === 0 })
        else await client.write(random.bytes(length), offset, { durable: random.below(8) === 0 })
      }),
    )
  }
}

const TARGETS: [string, (target: Target) => readonly string[]][] = [
  ['qemu-nbd', qemu],
  ['nbdkit file', file()],
  ['nbdkit memory', memory()],
  ['nbdkit without zeroing', memory('--filter=nozero')],
  [
    'nbdkit without block status, one connection',
    (target) => [...memory('--filter=noextents', '--filter=multi-conn')(target), 'multi-conn-mode=disable'],
  ],
  [
    'nbdkit with blocks of 4 KiB',
    (target) => [
      ...memory('--filter=blocksize-policy')(target),
      'blocksize-minimum=4096',
      'blocksize-error-policy=error',
    ],
  ],
  ['nbdkit that is larger', file(SIZE + 5 * MIB)],
]

describe.each(DATAPATHS)('a mirror to an NBD export, %s', (datapath) => {
  describe.each(TARGETS)('%s', (_name, command) => {
    it.each(['sync', 'async'] as const)(
      '%s: equal, with what was there before and what comes',
      async (mode) => {
        const { one, client } = await open(datapath)
        const target = await Target.start(command)
        const random = new Random(7)
        await scribble(client, random, 40)
        await target.client((there) => there.write(random.bytes(3 * UNIT), 40 * MIB))
        const added = await add(one, target, { mode, ...(mode === 'async' ? { intervalMs: 50 } : {}) })
        expect(added).toMatchObject({
          kind: 'nbd',
          peer: target.uri,
          pointInTime: mode === 'sync',
          role: 'primary',
        })
        await scribble(client, random, 80)
        await settle(one)
        await scribble(client, random, 80)
        await client.flush()
        const info = await settle(one)
        expect(info).toMatchObject({ consistent: true, connected: true, reason: null })
        expect(await same(one, target)).toBe(true)
      },
    )
  })

  it('the initial copy takes what is realized on one side only, and no more', async () => {
    const { one, client } = await open(datapath)
    const target = await Target.start(file())
    const content = new Random(3).bytes(UNIT)
    const both = 100 * UNIT
    for (const unit of [0, 5, 6, 7, 900, 1023]) await client.write(content, unit * UNIT)
    await client.write(content, both)
    await target.client(async (there) => {
      await there.write(content, both)
      await there.write(content, 500 * UNIT + 4096)
      await there.flush()
    })
    await target.kill()
    await target.start()
    await add(one, target)
    const info = await settle(one)
    expect(sum(target.requests('Write'))).toBe(6 * UNIT)
    expect(info.counters).toMatchObject({ sentBytes: 6 * UNIT, units: 6, holes: 2 })
    expect(info.counters.wireBytes).toBeGreaterThan(6 * UNIT)
    expect(info.counters.wireBytes).toBeLessThan(7 * UNIT)
    expect(sum(target.requests('Read'))).toBeLessThanOrEqual(MIB) // the region that both have
    expect(await same(one, target)).toBe(true)
  })

  it.each(['native', 'none'])(
    'flush and FUA reach the export before they are answered (FUA: %s)',
    async (fua) => {
      const { one, client } = await open(datapath)
      const target = await Target.start(fua === 'native' ? memory() : withoutFua)
      await add(one, target, { mode: 'sync' })
      await settle(one)
      const before = target.requests('Flush').length
      await client.write(Buffer.alloc(UNIT, 1), 0, { durable: true })
      const [written] = target.requests('Write')
      const flushed = target.requests('Flush').length
      expect(written).toEqual({ offset: 0, length: UNIT, fua: fua === 'native' })
      if (fua === 'none') expect(flushed).toBeGreaterThan(before)
      await client.write(Buffer.alloc(UNIT, 1), UNIT)
      await client.flush()
      expect(target.requests('Flush').length).toBeGreaterThan(flushed)
    },
  )

  it.each(['sync', 'async'] as const)('%s: killed and started again, it gets what changed', async (mode) => {
    const { one, client } = await open(datapath)
    const target = await Target.start(file())
    const random = new Random(11)
    for (let unit = 0; unit < 200; unit++) await client.write(random.bytes(UNIT), unit * UNIT)
    await add(one, target, { mode, ...(mode === 'async' ? { intervalMs: 50 } : {}) })
    await settle(one)
    await client.write(random.bytes(UNIT), 300 * UNIT)
    await client.flush()
    await settle(one)
    await target.kill()
    await one.reach('data', 'degraded')
    const changed = new Set([3, 77, 199, 800])
    for (const unit of changed) await client.write(random.bytes(UNIT), unit * UNIT)
    await client.trim({ offset: 20 * UNIT, length: UNIT })
    expect(one.show('data')).toMatchObject({ connected: false, state: 'degraded', consistent: true })
    expect(one.show('data').reason).toContain(target.uri)
    await target.start()
    await settle(one)
    const written = target.requests('Write')
    expect(written.every((range) => inUnits(changed, range))).toBe(true)
    expect(sum(written)).toBe(4 * UNIT)
    expect(await same(one, target)).toBe(true)
  })

  it('sync, block: writes wait for the export to come back', async () => {
    const { one, client } = await open(datapath)
    const target = await Target.start(file())
    await add(one, target, { mode: 'sync', onLoss: 'block' })
    await settle(one)
    await target.kill()
    await one.reach('data', 'degraded')
    const written = client.write(Buffer.alloc(UNIT, 3), UNIT, { durable: true })
    expect(await isPending(written)).toBe(true)
    await target.start()
    await written
    expect(await same(one, target)).toBe(true)
  })

  it('is found again after a restart of this side, and gets what changed', async () => {
    const { one, client } = await open(datapath)
    const target = await Target.start(file())
    const random = new Random(12)
    for (let unit = 0; unit < 100; unit++) await client.write(random.bytes(UNIT), unit * UNIT)
    await add(one, target, { mode: 'sync' })
    await settle(one)
    await one.mirrors.pause('data')
    await client.write(random.bytes(UNIT), 50 * UNIT)
    await one.mirrors.resume('data')
    await settle(one)
    await client.flush()
    await target.kill()
    await one.reach('data', 'degraded')
    await client.write(random.bytes(UNIT), 51 * UNIT)
    await client.close()
    await one.restart()
    await target.start()
    await settle(one)
    expect(target.requests('Write')).toMatchObject([{ offset: 51 * UNIT, length: UNIT }])
    expect(await same(one, target)).toBe(true)
  })

  it.each(['sync', 'async'] as const)(
    '%s: an error of the export degrades the mirror, and no client sees it',
    async (mode) => {
      const { one, client } = await open(datapath)
      const target = await Target.start((own) => [
        ...memory('--filter=error')(own),
        'error=EIO',
        'error-pwrite-rate=100%',
        `error-file=${own.trouble}`,
      ])
      const random = new Random(13)
      await client.write(random.bytes(MIB), 0)
      await add(one, target, { mode, ...(mode === 'async' ? { intervalMs: 50 } : {}) })
      await settle(one)
      writeFileSync(target.trouble, '')
      await client.write(random.bytes(MIB), MIB / 2)
      await client.write(random.bytes(UNIT), 2 * MIB, { durable: true })
      const { reason } = await one.reach('data', 'degraded')
      expect(reason).toMatch(/write of .* failed with error 5/)
      await scribble(client, random, 40)
      await client.flush()
      rmSync(target.trouble)
      await settle(one)
      expect(await same(one, target)).toBe(true)
    },
  )

  it.each(['sync', 'async'] as const)('%s: what others wrote there is found, and replaced', async (mode) => {
    const { one, client } = await open(datapath)
    const target = await Target.start(memory())
    const random = new Random(19)
    await client.write(random.bytes(2 * MIB), 0)
    await add(one, target, { mode, ...(mode === 'async' ? { intervalMs: 50 } : {}) })
    await settle(one)
    await target.client((there) => there.write(random.bytes(4096), 7 * UNIT))
    await target.client((there) => there.write(random.bytes(4096), 700 * UNIT))
    await one.mirrors.verify('data', undefined, { repair: true })
    await until(() => one.show('data').verify?.ended !== null, 'the comparison ends')
    expect(one.show('data').verify).toMatchObject({
      failure: null,
      repaired: true,
      differences: [
        { offset: 7 * UNIT, length: UNIT },
        { offset: 700 * UNIT, length: UNIT },
      ],
    })
    await settle(one)
    expect(await same(one, target)).toBe(true)
  })

  it('what is not formatted reads as the fill there', async () => {
    const { one, client } = await open(datapath, 0xa5)
    const target = await Target.start(memory())
    await client.write(Buffer.alloc(UNIT, 1), 5 * UNIT)
    await add(one, target, { mode: 'sync' })
    await settle(one)
    await client.write(Buffer.alloc(100, 2), 9 * UNIT + 50)
    await client.trim({ offset: 5 * UNIT + 512, length: 4096 })
    expect(await same(one, target)).toBe(true)
    expect((await target.content())[SIZE - 1]).toBe(0xa5)
  })

  it('what is trimmed gives its space back there', async () => {
    const { one, client } = await open(datapath)
    const target = await Target.start(memory())
    await client.write(new Random(1).bytes(4 * MIB), 0)
    await add(one, target, { mode: 'sync' })
    await settle(one)
    await client.trim({ offset: MIB, length: 2 * MIB })
    const extents = await target.client(async (there) => {
      const found = []
      for await (const extent of there.extents(0, 4 * MIB)) found.push(extent)
      return found
    })
    expect(extents.map(({ offset, length, flags }) => [offset, length, flags])).toEqual([
      [0, MIB, 0],
      [MIB, 2 * MIB, 3],
      [3 * MIB, MIB, 0],
    ])
    expect(await same(one, target)).toBe(true)
  })

  it('a volume of a daemon of ours is a target like others', async () => {
    const { one, client } = await open(datapath)
    const directory = join(mkdtempSync(join(tmpdir(), 'fullstripe-target-')), 'pool')
    await createPool(directory, { capacity: 256 * MIB })
    const other = await ServedPool.open(directory, datapath)
    onTestFinished(async () => {
      await side?.destroy()
      side = undefined
      await other.close()
      rmSync(join(directory, '..'), { recursive: true, force: true })
    })
    await other.pool.createVolume({ name: 'copy', size: SIZE })
    const there = await other.connect('copy')
    const random = new Random(17)
    await scribble(client, random, 40)
    await one.mirrors.add({ volume: 'data', peer: there.uri, mode: 'sync' })
    await settle(one)
    await scribble(client, random, 80)
    const copy = Buffer.alloc(SIZE)
    await there.read(copy, 0)
    expect(copy.equals(await one.content('data'))).toBe(true)
    expect(one.show('data')).toMatchObject({ name: 'copy', target: 'copy' })
  })
})

describe('what is no target', () => {
  it('is refused by name', async () => {
    const { one, client } = await open('portable')
    await client.close()
    await one.pool.createVolume({ name: 'more', size: MIB })
    const small = await Target.start(nbdkit('memory', String(SIZE - 512)))
    const readOnly = await Target.start(nbdkit('-r', 'memory', String(SIZE)))
    const target = await Target.start(memory())
    const refused = (options: MirrorAddOptions) => expect(one.mirrors.add(options)).rejects
    await refused({ volume: 'data', peer: small.uri }).toMatchObject({
      code: 'REFUSED',
      message: `${small.uri}: the export has 67108352 bytes, and the volume 67108864`,
    })
    await refused({ volume: 'data', peer: readOnly.uri }).toMatchObject({
      code: 'REFUSED',
      message: `${readOnly.uri}: the export is read-only`,
    })
    await refused({ volume: 'data', peer: `${target.uri}x` }).toMatchObject({ code: 'FAILED' })
    await refused({ volume: 'data', peer: 'nbd+unix:///?socket=here' }).toMatchObject({ code: 'USAGE' })
    await refused({ volume: 'data', peer: target.uri, target: 'copy' }).toMatchObject({ code: 'USAGE' })
    expect(one.mirrors.list()).toEqual([])
    await add(one, target, { name: 'first' })
    await refused({ volume: 'more', peer: target.uri }).toMatchObject({
      code: 'EXISTS',
      message: `${target.uri} is the target of mirror data/first already`,
    })
    await settle(one)
    await expect(one.mirrors.demote('data')).rejects.toMatchObject({ code: 'REFUSED' })
    await expect(one.mirrors.promote('data')).rejects.toMatchObject({ code: 'BUSY' })
    await one.mirrors.remove('data')
    expect(one.mirrors.list()).toEqual([])
    await add(one, target)
    await settle(one)
  })

  it('says so when the volume grows beyond it, and goes on when it has grown, too', async () => {
    const { one, client } = await open('portable')
    const target = await Target.start(file())
    await add(one, target, { mode: 'sync' })
    await settle(one)
    await one.pool.volume('data').resize(SIZE + MIB)
    const { reason } = await one.reach('data', 'degraded')
    expect(reason).toBe(`${target.uri}: the export has 67108864 bytes, and the volume 68157440`)
    await client.write(Buffer.alloc(UNIT, 9), 0)
    await target.kill()
    truncateSync(target.image, SIZE + MIB)
    await target.start()
    await settle(one)
    expect((await target.content(SIZE + MIB)).equals(await one.content('data'))).toBe(true)
  })
})

/** As a memory of its own, whose flushes wait while there is a file `trouble`; each leaves a file `flushing`. */
const slowToFlush = (target: Target): string[] => [
  ...nbdkit('eval')(target),
  `get_size=echo ${SIZE}`,
  `get_ready=truncate -s ${SIZE} ${target.image}`,
  `pread=dd if=${target.image} iflag=skip_bytes,count_bytes,fullblock skip=$4 count=$3 bs=64k status=none`,
  `pwrite=dd of=${target.image} oflag=seek_bytes conv=notrunc seek=$4 bs=64k status=none`,
  `flush=touch ${target.directory}/flushing; while [ -e ${target.trouble} ]; do sleep 0.02; done`,
  'can_write=exit 0',
  'can_flush=exit 0',
  'can_fua=echo none',
  'can_zero=exit 3',
]

describe('intents of a volume that is mirrored to an NBD export', () => {
  it.each(DATAPATHS)('%s: stay while the server has answered and not flushed', async (datapath) => {
    side = await Side.create({ datapath, hotRegions: 1 })
    const one = side
    await one.pool.createVolume({ name: 'data', size: SIZE, intents: true, regionSize: MIB })
    const client = await one.connect('data')
    const target = await Target.start(slowToFlush)
    await add(one, target, { mode: 'sync' })
    await settle(one)
    writeFileSync(target.trouble, '')
    await client.write(Buffer.alloc(UNIT, 1), 0)
    rmSync(join(target.directory, 'flushing'), { force: true })
    const other = client.write(Buffer.alloc(UNIT, 2), 8 * MIB)
    const map = one.pool.volume('data').intentMap
    // It needs the only place.
    await Promise.race([
      other,
      until(() => existsSync(join(target.directory, 'flushing')), 'a flush over there'),
    ])
    expect(map?.isHot(0)).toBe(true)
    rmSync(target.trouble)
    await other
    expect(map?.isHot(0)).toBe(false)
    expect(map?.isHot(8)).toBe(true)
  })
})

describe('a session with an NBD export', () => {
  const options = (target: Target) => ({ uri: target.uri, size: SIZE, unitBytes: UNIT, fill: 0 })
  const write = (offset: number, byte: number, flags = 0) => ({
    kind: 'write' as const,
    offset,
    length: 100,
    flags,
    payload: (_from: number, into: Buffer) => into.fill(byte),
  })

  it('makes durable what came before, in pieces, with the last of them', async () => {
    const target = await Target.start(memory())
    const remote = await NbdRemote.open(options(target))
    const piece = (offset: number, flags = 0) => ({ ...write(offset, 1, flags), length: UNIT })
    await remote.apply(piece(0, COMMAND_FLAG.FUA))
    expect(target.requests('Flush')).toEqual([])
    await remote.apply(piece(UNIT))
    await remote.apply(piece(2 * UNIT, COMMAND_FLAG.FUA))
    expect(target.requests('Flush').length).toBe(1)
    expect(remote.doubtful()).toEqual([])
    remote.close('done')
    await remote.closed
  })

  it('doubts what was answered and not flushed', async () => {
    const target = await Target.start(memory())
    const remote = await NbdRemote.open(options(target))
    await remote.apply(write(4096, 1))
    expect(remote.doubtful()).toEqual([{ offset: 0, length: UNIT }])
    expect(remote.mayLose(UNIT - 512, 512)).toBe(true)
    expect(remote.mayLose(UNIT, SIZE - UNIT)).toBe(false)
    await remote.settle()
    expect(remote.doubtful()).toEqual([])
    expect(remote.mayLose(0, SIZE)).toBe(false)
    expect(target.requests('Flush').length).toBe(1)
    await remote.settle()
    expect(target.requests('Flush').length).toBe(1)
    await remote.apply(write(8192, 1, COMMAND_FLAG.FUA))
    expect(remote.doubtful()).toEqual([])
    await remote.apply(write(UNIT, 1))
    const missed: number[] = []
    const opened: NbdRemote[] = []
    const link = new NbdLink({
      open: async () => {
        const again = await NbdRemote.open(options(target))
        opened.push(again)
        return again
      },
      attach: () => {},
      refused: () => {},
      missed: (offset) => missed.push(offset),
    })
    link.start(remote)
    await target.kill()
    expect(await remote.ended).toMatchObject({ fate: 'lost' })
    await until(() => missed.length > 0, 'it is missed')
    expect(missed).toEqual([UNIT])
    await target.start()
    await until(() => opened.length > 0, 'it connects again')
    await link.close('the test is over')
    expect(await opened[0]?.ended).toMatchObject({ message: 'the test is over' })
  })

  it('ends when the server says nothing any more', async () => {
    const target = await Target.start(memory())
    const remote = await NbdRemote.open({ ...options(target), silenceMs: 100 })
    await target.stall()
    await expect(remote.apply(write(0, 1))).rejects.toMatchObject({ fate: 'lost' })
    expect(await remote.ended).toMatchObject({ message: expect.stringContaining('no answer for') })
    await remote.closed
  })

  it('writes parts of large blocks one after the other', async () => {
    const target = await Target.start((own) => [
      ...memory('--filter=blocksize-policy')(own),
      'blocksize-minimum=4096',
      'blocksize-error-policy=error',
    ])
    const remote = await NbdRemote.open(options(target))
    await Promise.all(Array.from({ length: 82 }, (_, index) => remote.apply(write(index * 100, index + 1))))
    remote.close('done')
    await remote.closed
    const content = Buffer.alloc(12288)
    await target.client((client) => client.read(content, 0))
    for (let at = 0; at < 8200; at++) expect(content[at]).toBe(Math.floor(at / 100) + 1)
    expect(content.subarray(8200).every((byte) => byte === 0)).toBe(true)
  })
})
