import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import type { CopyMapPage, MirrorList, StatusInfo } from '../../src/api/types.ts'
import type { MirrorInfo, PeerInfo } from '../../src/mirror/types.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { type CommandResult, DaemonProcess, fullstripe, temporaryDirectory } from '../support/daemon.ts'
import { until } from '../support/poll.ts'

/** What operators of two daemons see of a mirror between them. The tests are steps of one story, in order. */
vi.setConfig({ testTimeout: 120_000, hookTimeout: 60_000 })

const MiB = 2 ** 20
const directory = temporaryDirectory('fullstripe-cli-mirrors-')
const north = join(directory.path, 'north')
const south = join(directory.path, 'south')
let northDaemon: DaemonProcess
let southDaemon: DaemonProcess
let address: string

beforeAll(async () => {
  for (const pool of [north, south]) {
    expect((await fullstripe(['pool', 'create', pool, '--capacity', '256M'])).code).toBe(0)
  }
  southDaemon = await DaemonProcess.start(south, ['--link', '127.0.0.1:0', '--link-name', 'south'])
  address = String((await southDaemon.status()).link)
  northDaemon = await DaemonProcess.start(north, ['--link-name', 'north'])
})
afterAll(async () => {
  await Promise.all([northDaemon.stop(), southDaemon.stop()])
  directory.remove()
})

const run = (pool: string, ...args: string[]) => fullstripe([...args, '--pool', pool])
/** The output of a command that succeeds. */
async function said(pool: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await run(pool, ...args)
  expect({ args, code, stderr }).toEqual({ args, code: 0, stderr: '' })
  return stdout
}
async function json<T>(pool: string, ...args: string[]): Promise<T> {
  const value: T = JSON.parse(await said(pool, ...args, '--json'))
  return value
}
/** The outcome of a command that fails: one line, nothing on stdout. */
function failure({ code, stdout, stderr }: CommandResult): { code: number | null; message: string } {
  expect(stdout).toBe('')
  expect(stderr).toMatch(/^fullstripe: [^\n]+\n$/)
  return { code, message: stderr.slice('fullstripe: '.length).trimEnd() }
}

const connect = (pool: string, name: string) =>
  NbdClient.connect(`nbd+unix:///${name}?socket=${join(pool, 'nbd.sock')}`)

async function write(pool: string, byte: number, offset: number, length = 65536): Promise<void> {
  const client = await connect(pool, 'data')
  await client.write(Buffer.alloc(length, byte), offset)
  await client.flush()
  await client.close()
}

/** The first byte at each of the offsets. */
async function bytesAt(pool: string, name: string, ...offsets: number[]): Promise<number[]> {
  const client = await connect(pool, name)
  const found: number[] = []
  for (const offset of offsets) {
    const target = Buffer.alloc(512)
    await client.read(target, offset)
    found.push(target[0] ?? -1)
  }
  await client.close()
  return found
}

describe('a mirror on the command line', () => {
  it('is refused where there is nobody or nothing to mirror', async () => {
    await said(north, 'volume', 'create', 'data', '--size', '16M')
    expect(failure(await run(north, 'mirror', 'show', 'data'))).toEqual({
      code: 1,
      message: 'volume data has no mirror',
    })
    expect(await said(north, 'mirror', 'list')).toMatch(/^no mirrors; add one with: /)
    expect(failure(await run(north, 'mirror', 'add', 'none', address)).code).toBe(1)
    expect(failure(await run(north, 'mirror', 'add', 'data', 'nowhere')).code).toBe(2)
    // 3 would say that the daemon here does not answer.
    const nobody = await Promise.all(
      ['127.0.0.1:1', 'nbd://127.0.0.1:1'].map((peer) => run(north, 'mirror', 'add', 'data', peer)),
    )
    expect(nobody.map((result) => failure(result).code)).toEqual([1, 1])
    expect(await json<MirrorInfo[]>(north, 'mirror', 'list')).toEqual([])
  })

  it('is added, makes the volume there, and copies what is there', async () => {
    await write(north, 1, 0)
    await write(north, 2, 5 * MiB)
    const text = await said(
      ...[north, 'mirror', 'add', 'data', address, '--target', 'copy', '--name', 'south'],
      ...['--interval', '100ms', '--wait'],
    )
    expect(text).toMatch(
      /^mirror data\/south added: async every 100ms, to volume copy of south-\w{8}\nmirror data\/south: cycling[^\n]*\n$/,
    )
    const info = await json<MirrorInfo>(north, 'mirror', 'show', 'data')
    expect(info).toMatchObject({
      role: 'primary',
      state: 'cycling',
      consistent: true,
      target: 'copy',
      address,
    })
    const [other] = await json<MirrorInfo[]>(south, 'mirror', 'list')
    expect(other).toMatchObject({ volume: 'copy', role: 'secondary', relation: info.relation })
    expect(other?.peer).toMatch(/^north-\w{8}$/)
    expect(await said(north, 'mirror', 'wait', 'data', '--for', 'consistent', '--timeout', '1m')).toMatch(
      /^mirror data\/south: cycling/,
    )
    expect(await bytesAt(south, 'copy', 0, MiB, 5 * MiB)).toEqual([1, 0, 2])
    expect(failure(await run(north, 'mirror', 'wait', 'data', '--for', 'insync'))).toEqual({
      code: 1,
      message: 'mirror data/south is async and never insync: wait for cycling',
    })
  })

  it('makes the daemons know each other, and one that is connected is not forgotten', async () => {
    expect(await said(north, 'peer', 'list')).toMatch(
      new RegExp(`^PEER +CONNECTED +MIRRORS +FINGERPRINT\n${address} +yes +data/south +sha256:\\S+\n$`),
    )
    const [peer] = await json<PeerInfo[]>(south, 'peer', 'list')
    expect(peer).toMatchObject({ name: expect.stringMatching(/^north-\w{8}$/), connected: true })
    expect(peer?.mirrors).toEqual([expect.stringMatching(/^copy\/north/)])
    expect(failure(await run(north, 'peer', 'forget', address))).toEqual({
      code: 1,
      message: `the peer ${address} is connected, and has the identity that is pinned: there is nothing to forget`,
    })
    expect(failure(await run(north, 'peer', 'forget', 'south'))).toEqual({
      code: 1,
      message: 'there is no peer "south": see the names with: fullstripe peer list',
    })
    expect(failure(await run(north, 'peer')).code).toBe(2)
  })

  it('is in status, the metrics and the map', async () => {
    const status = await json<StatusInfo>(north, 'status')
    expect(status.mirrors).toMatchObject([{ volume: 'data', name: 'south' }])
    expect(await said(south, 'status')).toMatch(new RegExp(`^link +${address}$`, 'm'))
    expect(southDaemon.stderr).toContain(`for peers on ${address}`)
    expect(status.link).toBe(null)
    expect(await said(north, 'status')).toMatch(/^data +south +primary +async +copy of south-\w{8} +\S/m)
    expect(await said(north, 'volume', 'map', 'data', '--draw')).toContain('the mirror lacks:')
    expect(await northDaemon.client.get<MirrorList>('/v1/volumes/data/mirrors')).toMatchObject({
      mirrors: [{ name: 'south' }],
    })
  })

  it('brings what is written, and is only read there', async () => {
    await write(north, 3, 9 * MiB)
    await until(
      async () => (await bytesAt(south, 'copy', 9 * MiB))[0] === 3,
      'a cycle has brought it',
      30_000,
    )
    const client = await connect(south, 'copy')
    await expect(client.write(Buffer.alloc(512, 9), 0)).rejects.toThrow()
    await client.close()
  })

  it('notes what changes in a pause, and shows it', async () => {
    expect(await said(north, 'mirror', 'pause', 'data', 'south')).toBe('mirror data/south: paused\n')
    await write(north, 4, 2 * MiB)
    expect((await json<MirrorInfo>(north, 'mirror', 'show', 'data')).lag.bytes).toBeGreaterThanOrEqual(65536)
    const map = await json<CopyMapPage>(north, 'volume', 'map', 'data', '--mirror', 'south')
    const lacking = map.extents.filter(({ copied }) => !copied)
    expect(lacking.some(({ offset, length }) => offset <= 2 * MiB && offset + length > 2 * MiB)).toBe(true)
    expect(failure(await run(north, 'mirror', 'wait', 'data', '--timeout', '300ms'))).toEqual({
      code: 1,
      message: 'after 300ms mirror data/south is paused',
    })
    await said(north, 'mirror', 'resume', 'data')
    await said(north, 'mirror', 'wait', 'data', '--timeout', '1m')
    await until(async () => (await bytesAt(south, 'copy', 2 * MiB))[0] === 4, 'it follows', 30_000)
  })

  it('is changed while it works', async () => {
    expect(await said(north, 'mirror', 'set', 'data', '--rate', '20M')).toBe(
      'mirror data/south: async every 100ms, at most 20M/s\n',
    )
    await said(north, 'mirror', 'set', 'data', '--mode', 'sync', '--rate', '0')
    expect(await said(north, 'mirror', 'wait', 'data', '--timeout', '1m')).toBe('mirror data/south: insync\n')
    await write(north, 5, 3 * MiB)
    expect(await bytesAt(south, 'copy', 3 * MiB)).toEqual([5])
  })

  it('is verified', async () => {
    expect(await said(north, 'mirror', 'verify', 'data')).toMatch(
      /^mirror data\/south: \S+ compared, no differences\n$/,
    )
  })

  it('changes its roles', async () => {
    expect(failure(await run(south, 'mirror', 'promote', 'copy')).code).toBe(1) // the other side is primary
    expect(await said(north, 'mirror', 'demote', 'data')).toBe(
      'mirror data/south: this side is the secondary now\n',
    )
    expect(await said(south, 'mirror', 'promote', 'copy')).toMatch(/: this side is the primary now\n$/)
    expect(await said(south, 'mirror', 'wait', 'copy', '--timeout', '1m')).toMatch(/: insync\n$/)
    const client = await connect(south, 'copy')
    await client.write(Buffer.alloc(512, 6), 0)
    await client.close()
    expect(await bytesAt(north, 'data', 0, 5 * MiB)).toEqual([6, 2])
    const { counters, role } = await json<MirrorInfo>(south, 'mirror', 'show', 'copy')
    expect(role).toBe('primary')
    expect(counters).toMatchObject({ sentBytes: 0, forwarded: 1 }) // nothing else was different
    expect(counters.wireBytes).toBeLessThan(65536)
  })

  it('splits where both sides are primary, and is settled', async () => {
    await said(north, 'mirror', 'promote', 'data', '--force')
    await write(north, 7, 7 * MiB)
    const client = await connect(south, 'copy')
    await client.write(Buffer.alloc(65536, 8), 8 * MiB) // is thrown away
    await client.close()
    const wait = async () => run(north, 'mirror', 'wait', 'data', '--for', 'splitbrain', '--timeout', '1m')
    expect((await wait()).code).toBe(0)
    expect(failure(await run(north, 'mirror', 'wait', 'data'))).toMatchObject({
      code: 1,
      message: expect.stringContaining('fullstripe mirror resolve data south --discard local|remote'),
    })
    await said(north, 'mirror', 'resolve', 'data', '--discard', 'remote')
    await said(north, 'mirror', 'wait', 'data', '--timeout', '1m')
    expect(await json<MirrorInfo>(north, 'mirror', 'show', 'data')).toMatchObject({ role: 'primary' })
    expect(await bytesAt(south, 'copy', 0, 5 * MiB, 7 * MiB, 8 * MiB)).toEqual([6, 2, 7, 0])
    const { counters } = await json<MirrorInfo>(north, 'mirror', 'show', 'data')
    expect(counters.sentBytes).toBe(65536) // what either side had changed, and no more
    expect(counters.holes).toBe(1)
  })

  it('is removed on both sides, and the volumes stay', async () => {
    expect(await said(north, 'mirror', 'remove', 'data')).toBe('mirror data/south removed\n')
    for (const pool of [north, south]) expect(await json<MirrorInfo[]>(pool, 'mirror', 'list')).toEqual([])
    expect(await bytesAt(south, 'copy', 7 * MiB)).toEqual([7])
  })
})

describe('a mirror to an NBD export on the command line', () => {
  const show = () => json<MirrorInfo>(north, 'mirror', 'show', 'data')

  it('is added by its URI', async () => {
    await said(south, 'volume', 'create', 'small', '--size', '1M')
    const uri = (name: string) => `nbd+unix:///${name}?socket=${join(south, 'nbd.sock')}`
    expect(failure(await run(north, 'mirror', 'add', 'data', uri('small')))).toEqual({
      code: 1,
      message: `${uri('small')}: the export has 1048576 bytes, and the volume 16777216`,
    })
    const args = ['mirror', 'add', 'data', 'nbd+unix:///copy?socket=south/nbd.sock', '--interval', '100ms']
    const added = await fullstripe([...args, '--wait', '--pool', north], { cwd: directory.path })
    expect(added).toMatchObject({ code: 0, stderr: '' })
    expect(added.stdout).toMatch(/^mirror data\/copy added: async every 100ms, to nbd\+unix:/)
    expect(await show()).toMatchObject({
      kind: 'nbd',
      peer: uri('copy'),
      pointInTime: false,
      state: 'cycling',
    })
    expect(await said(north, 'mirror', 'show', 'data')).toContain(
      'while a cycle is sent it is not (NBD export)',
    )
    await write(north, 11, 11 * MiB)
    await until(async () => (await bytesAt(south, 'copy', 11 * MiB))[0] === 11, 'it follows', 30_000)
  })

  it('has what clients were told, and what they were not, after a kill of this side', async () => {
    await said(north, 'mirror', 'set', 'data', '--mode', 'sync')
    await said(north, 'mirror', 'wait', 'data', '--timeout', '1m')
    await write(north, 12, 12 * MiB)
    expect(await bytesAt(south, 'copy', 12 * MiB)).toEqual([12])
    const client = await connect(north, 'data')
    const writes = Array.from({ length: 64 }, (_, index) =>
      client.write(Buffer.alloc(4096, 13), index * 65536).catch(() => undefined),
    )
    await writes[20]
    await northDaemon.stop('SIGKILL')
    await Promise.all(writes)
    northDaemon = await DaemonProcess.start(north, ['--link-name', 'north'])
    await said(north, 'mirror', 'wait', 'data', '--timeout', '1m')
    const offsets = Array.from({ length: 256 }, (_, index) => index * 65536)
    expect(await bytesAt(south, 'copy', ...offsets)).toEqual(await bytesAt(north, 'data', ...offsets))
    expect(await said(north, 'mirror', 'verify', 'data')).toMatch(/ compared, no differences\n$/)
  })

  it('ends, and the volume goes', async () => {
    expect(failure(await run(north, 'mirror', 'demote', 'data')).message).toContain('cannot be primary')
    expect(await said(north, 'mirror', 'remove', 'data')).toBe('mirror data/copy removed\n')
    await said(north, 'volume', 'delete', 'data')
  })
})
