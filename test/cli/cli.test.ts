import { spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import type { StatusInfo } from '../../src/api/types.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import type { CheckReport } from '../../src/volume/check.ts'
import type { PoolInfo } from '../../src/volume/pool.ts'
import type { MapExtent, VolumeInfo } from '../../src/volume/volume.ts'
import { type CommandResult, DaemonProcess, fullstripe, temporaryDirectory } from '../support/daemon.ts'

/** Dozens of processes, on a machine that may run other tests at once. */
vi.setConfig({ testTimeout: 120_000, hookTimeout: 60_000 })

const MiB = 1 << 20
const directory = temporaryDirectory()
const pool = join(directory.path, 'pool')
const env = { FULLSTRIPE_POOL: pool }
const cli = (...args: string[]) => fullstripe(args, { env })
const json = async <T>(...args: string[]): Promise<T> => {
  const { code, stdout, stderr } = await cli(...args, '--json')
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  const value: T = JSON.parse(stdout)
  return value
}
let daemon: DaemonProcess

beforeAll(async () => {
  expect((await fullstripe(['pool', 'create', pool, '--capacity', '256M'])).code).toBe(0)
  daemon = await DaemonProcess.start(pool, ['--datapath', 'portable'])
})
afterAll(async () => {
  await daemon.stop()
  directory.remove()
})

async function write(name: string, offset: number): Promise<void> {
  const client = await NbdClient.connect(`nbd+unix:///${name}?socket=${join(pool, 'nbd.sock')}`)
  await client.write(Buffer.alloc(4096, 1), offset)
  await client.close()
}

/** The outcome of a command that fails: one line, nothing on stdout. */
function failure({ code, stdout, stderr }: CommandResult): { code: number | null; message: string } {
  expect(stdout).toBe('')
  expect(stderr).toMatch(/^fullstripe: [^\n]+\n$/)
  return { code, message: stderr.slice('fullstripe: '.length).trimEnd() }
}

describe('the tour', () => {
  it('makes, shows, changes and deletes a volume', async () => {
    expect(await cli('volume', 'list')).toMatchObject({
      code: 0,
      stdout: 'no volumes; create one with: fullstripe volume create NAME --size 10G\n',
    })
    expect((await cli('volume', 'create', 'data', '--size', '1G')).stdout).toBe(
      'volume data created: 1G, thin\n',
    )
    await write('data', 65536)
    const list = await cli('volume', 'list')
    expect(list.stdout.split('\n').map((line) => line.split(/ {2,}/))).toEqual([
      ['NAME', 'SIZE', 'USED', 'FORMATTED', 'PROVISION', 'CLIENTS', 'STATE'],
      ['data', '1G', '64K', '<0.1 %', 'thin', expect.stringMatching(/^[01]$/)],
      [''],
    ])
    const volumes = await json<VolumeInfo[]>('volume', 'list')
    expect(volumes).toMatchObject([{ name: 'data', size: 1024 * MiB, stripesFormatted: 1 }])
    expect(await json<VolumeInfo>('volume', 'show', 'data')).toMatchObject({ uuid: volumes[0]?.uuid })
    expect((await cli('volume', 'show', 'data')).stdout).toMatch(
      /^used +64K \(<0\.1 % of 16384 stripes formatted\)$/m,
    )
    expect((await cli('volume', 'resize', 'data', '--size', '2G')).stdout).toContain(
      'volume data is 2G now\n',
    )
    expect((await cli('volume', 'rename', 'data', 'files')).stdout).toBe('volume data is called files now\n')
    expect((await cli('volume', 'delete', 'files', '--force')).stdout).toBe('volume files deleted\n')
  })

  it('shows the pool and the daemon', async () => {
    const info = await json<PoolInfo>('pool', 'show')
    expect(info).toMatchObject({ directory: pool, stripeSize: 65536 })
    expect((await cli('pool', 'show')).stdout).toMatch(/^capacity +\d+M \(\d+ stripes of 64K\)$/m)
    const status = await json<StatusInfo>('status')
    expect(status).toMatchObject({ state: 'serving', pid: daemon.pid, datapath: { kind: 'portable' } })
    const text = (await cli('status')).stdout
    expect(text).toMatch(/^daemon +serving for /m)
    expect(text).toMatch(/^datapath +portable \(node, 1 thread\): /m)
    expect(text).toContain(`listening  nbd+unix:///?socket=${pool}/nbd.sock\n`)
  })

  it('maps a volume as extents and as a picture', async () => {
    await cli('volume', 'create', 'map', '--size', '1M')
    await write('map', 0)
    await write('map', 15 * 65536)
    const { extents } = await json<{ extents: MapExtent[] }>('volume', 'map', 'map')
    expect(extents.map(({ length, formatted }) => [length / 65536, formatted])).toEqual([
      [1, true],
      [14, false],
      [1, true],
    ])
    expect(
      (await cli('volume', 'map', 'map')).stdout.split('\n').map((line) => line.trim().split(/ +/).join(' ')),
    ).toEqual(['OFFSET LENGTH FORMATTED', '0 64K yes', '64K 896K no', '960K 64K yes', ''])
    const drawn = await fullstripe(['volume', 'map', 'map', '--draw'], {
      env: { ...env, LANG: 'C.UTF-8', LC_ALL: '' },
    })
    expect(drawn.stdout).toMatch(
      /^█·{14}█\n· unformatted .*one cell = 64K\nmap: 12\.5 % of 1M formatted, 128K used\n/,
    )
    const ascii = await fullstripe(['volume', 'map', 'map', '--draw'], { env: { ...env, LC_ALL: 'C' } })
    expect(ascii.stdout).toMatch(/^#\.{14}#\n/)
    const part = await json<{ extents: MapExtent[] }>(
      'volume',
      'map',
      'map',
      '--offset',
      '32K',
      '--length',
      '64K',
    )
    expect(part.extents).toEqual([
      { offset: 32768, length: 32768, formatted: true },
      { offset: 65536, length: 32768, formatted: false },
    ])
    await cli('volume', 'delete', 'map', '--force')
  })

  it('lists more extents than fit in one page, also through a pipe that is closed early', async () => {
    await cli('volume', 'create', 'pages', '--size', '2G')
    const client = await NbdClient.connect(`nbd+unix:///pages?socket=${join(pool, 'nbd.sock')}`)
    const source = Buffer.alloc(512, 1)
    for (let stripe = 0; stripe < 3000; stripe++) await client.write(source, stripe * 2 * 65536)
    await client.close()
    const { extents } = await json<{ extents: MapExtent[] }>('volume', 'map', 'pages')
    expect(extents.length).toBe(6000)
    expect(extents.every((extent, index) => extent.formatted === (index % 2 === 0))).toBe(true)
    expect(extents.reduce((sum, { length }) => sum + length, 0)).toBe(2048 * MiB)
    await cli('volume', 'delete', 'pages', '--force')
  })

  it('formats a thick volume and waits for it', async () => {
    await cli('volume', 'create', 'thick', '--size', '32M', '--provision', 'thick')
    expect((await cli('volume', 'format', 'thick', '--rate', '1M')).stdout).toMatch(
      /^volume thick: formatting running at .* at no more than 1M\/s\n$/,
    )
    expect((await cli('volume', 'format', 'thick', '--pause')).stdout).toMatch(
      /^volume thick: formatting paused at /,
    )
    expect((await cli('volume', 'format', 'thick', '--rate', '0', '--wait')).stdout).toBe(
      'volume thick: formatted\n',
    )
    expect(await json<VolumeInfo>('volume', 'show', 'thick')).toMatchObject({
      stripesFormatted: 512,
      formatter: { state: 'done' },
    })
    await cli('volume', 'delete', 'thick')
  })

  it('prints events, and follows them until interrupted', async () => {
    const { events } = await json<{ events: { kind: string; object: string }[] }>('events')
    expect(events[0]).toMatchObject({ kind: 'daemon.started', object: pool })
    expect((await cli('events')).stdout).toMatch(
      /^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d {2}info {3}daemon\.started +.*serving on nbd\+unix/,
    )
  })

  it('measures, on a volume of its own that it deletes again', async () => {
    const { volume, results } = await json<{ volume: string; results: { requests: number }[] }>(
      ...['bench', '--seconds', '1', '--pattern', 'random', '--depth', '4'],
    )
    expect(volume).toMatch(/^bench-/)
    expect(results).toMatchObject([
      { write: true, pattern: 'random', block: 4096, depth: 4, connections: 1 },
      { write: false, pattern: 'random', block: 4096, depth: 4, connections: 1 },
    ])
    for (const { requests } of results) expect(requests).toBeGreaterThan(100)
    expect(await json('volume', 'list')).toEqual([])
  })

  it('says in help what every command does', async () => {
    for (const command of [[], ['serve'], ['pool', 'create'], ['volume', 'map'], ['attach'], ['check']]) {
      const { code, stdout, stderr } = await cli(...command, '--help')
      expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
      expect(stdout).toContain('Examples:')
    }
    expect((await cli('--version')).stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
  })
})

describe('bad input', () => {
  const create = (name: string, size: string) => cli('volume', 'create', '--size', size, '--', name)
  it.each([
    ['size zero', 'x', '0', /size/],
    ['an unaligned size', 'x', '1000', /512/],
    ['a size beyond the limit', 'x', '8000P', /size|larger/],
    ['a size of letters', 'x', 'huge', /"huge" is not a size/],
    ['a name with /', 'a/b', '1M', /name "a\/b"/],
    ['a name with @', 'a@b', '1M', /name "a@b"/],
    ['a control character', 'a\u001bb', '1M', /control characters/],
    ['a name that is too long', 'n'.repeat(256), '1M', /255/],
    ['an empty name', '', '1M', /empty/],
  ])('%s: one line, exit code 2', async (_, name, size, message) => {
    const { code, message: text } = failure(await create(name, size))
    expect(code).toBe(2)
    expect(text).toMatch(message)
  })

  it('names that are taken or unknown: one line, exit code 1', async () => {
    await create('taken', '1M')
    expect(failure(await create('taken', '1M'))).toMatchObject({
      code: 1,
      message: expect.stringContaining('taken'),
    })
    for (const args of [['show'], ['delete'], ['map'], ['format'], ['resize', '--size', '1M'], ['rename']]) {
      const [command = '', ...more] = args
      const words = command === 'rename' ? ['none', 'other'] : ['none']
      const { code, message } = failure(await cli('volume', command, ...words, ...more))
      expect({ code, message }).toMatchObject({ code: 1, message: expect.stringContaining('none') })
    }
    expect(failure(await cli('volume', 'resize', 'taken', '--size', '512K'))).toMatchObject({
      code: 1,
      message: expect.stringContaining('--force'),
    })
    expect(failure(await cli('volume', 'format', 'taken'))).toMatchObject({
      code: 1,
      message: expect.stringContaining('thin'),
    })
    await cli('volume', 'delete', 'taken')
  })

  it('an error is an object with --json', async () => {
    const { code, stdout, stderr } = await cli('volume', 'show', 'none', '--json')
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
    expect(JSON.parse(stderr)).toEqual({
      error: { code: 'NOT_FOUND', message: expect.stringContaining('none') },
    })
  })

  it('names that look like numbers and options are names', async () => {
    for (const name of ['007', '--size', 'ü 数%2F?']) {
      expect((await create(name, '1M')).code, name).toBe(0)
      expect((await cli('volume', 'show', '--json', '--', name)).stdout, name).toContain(JSON.stringify(name))
      expect((await cli('volume', 'delete', '--', name)).code, name).toBe(0)
    }
  })

  it('no pool said: wrong usage; no daemon there: exit code 3', async () => {
    expect(failure(await fullstripe(['status']))).toEqual({
      code: 2,
      message: 'which pool? give --pool DIR or set FULLSTRIPE_POOL',
    })
    const idle = join(directory.path, 'idle')
    await fullstripe(['pool', 'create', idle])
    for (const command of [['status'], ['volume', 'list'], ['events', '--follow'], ['bench']]) {
      expect(failure(await fullstripe([...command, '--pool', idle]))).toEqual({
        code: 3,
        message: `no daemon serves the pool ${idle}: start it with: fullstripe serve ${idle}`,
      })
    }
    const none = join(directory.path, 'none')
    expect(failure(await fullstripe(['status', '--pool', none]))).toMatchObject({
      code: 3,
      message: expect.stringContaining(`fullstripe pool create ${none}`),
    })
  })

  it('serve makes nothing: what is no pool is refused', async () => {
    const empty = join(directory.path, 'empty')
    expect(failure(await fullstripe(['serve', empty]))).toMatchObject({
      code: 1,
      message: expect.stringContaining(`fullstripe pool create ${empty}`),
    })
    expect(existsSync(empty)).toBe(false)
    const other = temporaryDirectory()
    writeFileSync(join(other.path, 'letter.txt'), 'dear')
    expect(failure(await fullstripe(['serve', other.path]))).toMatchObject({
      code: 1,
      message: expect.stringContaining('fullstripe pool create'),
    })
    expect(readdirSync(other.path)).toEqual(['letter.txt'])
    other.remove()
  })

  it('what lies in the way of the control socket stays there, and the daemon ends', async () => {
    const blocked = join(directory.path, 'blocked')
    await fullstripe(['pool', 'create', blocked])
    writeFileSync(join(blocked, 'control.sock'), 'precious')
    const { code, stderr } = await fullstripe(['serve', blocked, '--log-level', 'silent'])
    expect({ code, stderr }).toEqual({
      code: 1,
      stderr: expect.stringMatching(/^fullstripe: .*control\.sock is in the way[^\n]*\n$/),
    })
    expect(statSync(join(blocked, 'control.sock')).size).toBe(8)
    expect((await fullstripe(['check', blocked])).code).toBe(0) // and it has let the pool go
  })

  it('a pool in use is neither served again nor checked nor made anew', async () => {
    for (const args of [
      ['serve', pool],
      ['check', pool],
      ['pool', 'create', pool],
    ]) {
      const { code, message } = failure(await fullstripe(args))
      expect(code).toBe(1)
      expect(message).toContain(pool)
    }
    expect((await daemon.status()).state).toBe('serving')
  })

  it('a port or socket in use is said, and the pool is free again', async () => {
    const second = join(directory.path, 'second')
    await fullstripe(['pool', 'create', second])
    const server = createServer()
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const address = server.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    for (const uri of [`nbd://127.0.0.1:${port}`, `nbd+unix:///?socket=${join(pool, 'nbd.sock')}`]) {
      const { code, stderr } = await fullstripe(['serve', second, '--listen', uri, '--log-level', 'silent'])
      expect(code).toBe(1)
      expect(stderr).toMatch(/^fullstripe: cannot listen on [^\n]*\n$/)
    }
    server.close()
    expect((await fullstripe(['check', second])).code).toBe(0)
  })

  it.each([['nbd://127.0.0.1:99999'], ['http://127.0.0.1'], ['nbds://127.0.0.1'], ['nbd+unix:///']])(
    '--listen %s is wrong usage',
    async (uri) => {
      const idle = join(directory.path, 'listen')
      if (!existsSync(idle)) await fullstripe(['pool', 'create', idle])
      expect((await fullstripe(['serve', idle, '--listen', uri, '--log-level', 'silent'])).code).toBe(2)
    },
  )

  it('a configuration file is read strictly', async () => {
    const file = join(directory.path, 'config.json')
    writeFileSync(file, '{"datapaths": "portable"}')
    expect(failure(await fullstripe(['serve', pool, '--config', file]))).toMatchObject({
      code: 2,
      message: expect.stringContaining('unknown key "datapaths"'),
    })
  })

  it('attach says what is missing here', async () => {
    await cli('volume', 'create', 'disk', '--size', '1M')
    expect(failure(await cli('attach', 'none'))).toMatchObject({
      code: 1,
      message: expect.stringContaining('none'),
    })
    expect(failure(await cli('attach', 'disk', '--timeout', 'soon')).code).toBe(2)
    const missing = !existsSync('/sys/block/nbd0')
    if (missing || process.geteuid?.() !== 0) {
      const { code, message } = failure(await cli('attach', 'disk'))
      expect(code).toBe(1)
      expect(message).toMatch(
        process.geteuid?.() === 0 ? /driver is missing.*modprobe nbd/ : /run it as root/,
      )
    }
    await cli('volume', 'delete', 'disk')
  })
})

describe('check', () => {
  it('finds a new pool clean', async () => {
    const checked = join(directory.path, 'checked')
    await fullstripe(['pool', 'create', checked])
    expect(await fullstripe(['check', checked])).toMatchObject({
      code: 0,
      stdout: 'clean: 0 volumes, 0 slots in use\n',
    })
    const { stdout } = await fullstripe(['check', checked, '--json'])
    const report: CheckReport = JSON.parse(stdout)
    expect(report).toMatchObject({ status: 'clean', findings: [] })
  })

  it('fails on what is no pool', async () => {
    expect(failure(await fullstripe(['check', directory.path])).code).toBe(1)
  })
})

describe('pool create', () => {
  it('takes members, chunk size and capacity', async () => {
    const at = join(directory.path, 'striped')
    const members = ['a', 'b'].map((name) => join(directory.path, `member-${name}`))
    const options = members.flatMap((path) => ['--member', path])
    for (const path of members) writeFileSync(path, '')
    const { code, stdout, stderr } = await fullstripe([
      'pool',
      'create',
      at,
      ...options,
      '--chunk',
      '16K',
      '--capacity',
      '64M',
      '--json',
    ])
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    const info: PoolInfo = JSON.parse(stdout)
    expect(info).toMatchObject({ chunkSize: 16384, dataMembers: 2, stripeSize: 32768 })
    expect(info.members.map(({ path }) => path)).toEqual(members)
  })

  it.each([
    [['--chunk', '1000'], 2],
    [['--chunk', '0'], 2],
    [['--capacity', '0'], 2],
    [['--parity', '3'], 2],
    [['--member', ''], 2],
  ])('%j is refused, and nothing is left behind', async (options, expected) => {
    const at = join(directory.path, 'refused')
    const { code, message } = failure(await fullstripe(['pool', 'create', at, ...options]))
    expect({ code, message }).toMatchObject({ code: expected })
    expect(existsSync(at)).toBe(false)
  })

  it('says that a pool cannot be written', async () => {
    const closed = join(directory.path, 'closed')
    const root = process.geteuid?.() === 0
    const run = (...command: string[]) => spawnSync(command[0] ?? '', command.slice(1)).status
    // Permission bits do not stop root; a read-only file system does.
    if (root) {
      mkdirSync(closed)
      expect(run('mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', closed)).toBe(0)
    }
    try {
      expect((await fullstripe(['pool', 'create', closed])).code).toBe(0)
      if (root) expect(run('mount', '-o', 'remount,ro', closed)).toBe(0)
      else chmodSync(closed, 0o500)
      const { code, message } = failure(await fullstripe(['serve', closed]))
      expect(code).toBe(1)
      expect(message).toContain(closed)
    } finally {
      if (root) run('umount', closed)
      else chmodSync(closed, 0o700)
    }
  })
})
