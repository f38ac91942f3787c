/**
 * The negotiation as real clients see it: nbdinfo and nbdsh (libnbd), qemu-img, nbd-client, against the listener with a
 * real pool and the portable datapath. What happens after the handshake is tested in test/contract and test/interop.
 */
import { execFile, execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { PoolExports } from '../../src/daemon/exports.ts'
import { Listener } from '../../src/daemon/listener.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { hasProgram } from './servers.ts'

const MiB = 2 ** 20
let directory: string
let pool: Pool
let listener: Listener
let port: number

beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), 'fullstripe-interop-'))
  const log = pino({ level: process.env['TEST_LOG'] ?? 'silent' })
  await createPool(join(directory, 'pool'), { capacity: 256 * MiB })
  pool = await Pool.open(join(directory, 'pool'), { datapath: 'portable', log })
  await pool.createVolume({ name: 'disk', size: 100 * MiB })
  await pool.createVolume({ name: 'größer & more', size: 2 ** 44, readOnly: true })
  const uris = [`nbd+unix:///?socket=${directory}/nbd.sock`, 'nbd://127.0.0.1:0']
  listener = await Listener.open({ uris, exports: new PoolExports(pool), log, closeMsMax: 100 })
  port = Number(/:(\d+)$/.exec(listener.addresses()[1] ?? '')?.[1])
})
afterAll(async () => {
  await listener.close()
  await pool.close()
  rmSync(directory, { recursive: true, force: true })
})

const uri = (name: string) => `nbd+unix:///${encodeURIComponent(name)}?socket=${directory}/nbd.sock`

/** nbdsh belongs to the system's Python, which another one in front of the path would hide; libnbd shows what it was told. */
const env = { ...process.env, PATH: `/usr/bin:${process.env['PATH']}`, LIBNBD_DEBUG: '1' }

async function run(program: string, ...args: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(program, args, { timeout: 20_000, env })
  return stdout
}

function hasNbdsh(): boolean {
  try {
    execFileSync('nbdsh', ['-c', 'pass'], { env, stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

async function failing(program: string, ...args: string[]): Promise<string> {
  try {
    await run(program, ...args)
  } catch (error) {
    return error instanceof Error ? error.message : String(error)
  }
  throw new Error(`${program} succeeded`)
}

describe.skipIf(!hasProgram('nbdinfo'))('nbdinfo', () => {
  it('lists the volumes', async () => {
    const listed: unknown = JSON.parse(await run('nbdinfo', '--json', '--list', uri('')))
    expect(listed).toMatchObject({
      protocol: 'newstyle-fixed',
      TLS: false,
      structured: true,
      exports: [
        { 'export-name': 'disk', 'export-size': 100 * MiB, description: 'thin volume' },
        { 'export-name': 'größer & more', 'export-size': 2 ** 44, description: 'thin volume, read-only' },
      ],
    })
  })

  it('describes a volume, over TCP too', async () => {
    for (const address of [uri('disk'), `nbd://127.0.0.1:${port}/disk`]) {
      const described: unknown = JSON.parse(await run('nbdinfo', '--json', address))
      expect(described).toMatchObject({
        exports: [
          {
            'export-name': 'disk',
            'export-size': 100 * MiB,
            is_read_only: false,
            can_cache: true,
            can_df: true,
            can_fast_zero: true,
            can_flush: true,
            can_fua: true,
            can_multi_conn: true,
            can_trim: true,
            can_zero: true,
            contexts: ['base:allocation', 'fullstripe:init'],
            block_size_minimum: 1,
            block_size_preferred: 4096,
            block_size_maximum: 32 * MiB,
          },
        ],
      })
    }
    expect(JSON.parse(await run('nbdinfo', '--json', uri('größer & more')))).toMatchObject({
      exports: [{ is_read_only: true }],
    })
  })

  it('maps both contexts of an empty volume', async () => {
    const base: unknown = JSON.parse(await run('nbdinfo', '--json', '--map', uri('disk')))
    expect(base).toMatchObject([{ offset: 0, length: 100 * MiB, type: 3 }])
    const init: unknown = JSON.parse(await run('nbdinfo', '--json', '--map=fullstripe:init', uri('disk')))
    expect(init).toMatchObject([{ offset: 0, length: 100 * MiB }])
  })

  it('is told that a volume does not exist, and that there is no default', async () => {
    expect(await failing('nbdinfo', uri('nobody'))).toContain('no export "nobody"')
    expect(await failing('nbdinfo', '--size', uri(''))).toContain('there is no default export')
  })

  it('is told that TLS is not supported', async () => {
    expect(await failing('nbdinfo', `nbds://127.0.0.1:${port}/disk`)).toContain('TLS is not supported here')
  })
})

describe.skipIf(!hasNbdsh())('nbdsh', () => {
  const shell = async (...lines: string[]) => {
    const program = lines.flatMap((line) => ['-c', line])
    return (await run('nbdsh', ...program)).trim().split('\n')
  }
  const connect = () => `h.connect_uri("${uri('disk')}")`

  it('negotiates in option mode, step by step', async () => {
    const found = await shell(
      'h.set_opt_mode(True)',
      'h.set_full_info(True)',
      `h.connect_uri("${uri('')}")`,
      'names = []',
      'h.opt_list(lambda name, text: names.append(name))',
      'print(names)',
      'h.set_export_name("disk")',
      'contexts = []',
      'h.opt_list_meta_context(lambda name: contexts.append(name))',
      'print(contexts)',
      'h.add_meta_context("fullstripe:init")',
      'h.opt_info()',
      'print(h.get_size(), h.can_meta_context("fullstripe:init"), h.can_meta_context("base:allocation"))',
      'h.opt_go()',
      'print(h.get_canonical_export_name(), h.get_protocol(), h.get_structured_replies_negotiated())',
      'h.pwrite(b"hello", 4096)',
      'print(bytes(h.pread(5, 4096)))',
      'h.shutdown()',
    )
    expect(found).toEqual([
      "['disk', 'größer & more']",
      "['base:allocation', 'fullstripe:init']",
      `${100 * MiB} True False`,
      'disk newstyle-fixed True',
      "b'hello'",
    ])
  })

  it('goes on after options that were refused', async () => {
    const found = await shell(
      'h.set_opt_mode(True)',
      `h.connect_uri("${uri('nobody')}")`,
      'import errno',
      'def attempt(what):\n  try:\n    what(); print("accepted")\n  except nbd.Error as e:\n    print(e.errno)',
      'attempt(h.opt_info)',
      'attempt(h.opt_go)',
      'h.set_export_name("disk")',
      'attempt(h.opt_go)',
      'print(h.get_size())',
    )
    expect(found).toEqual(['ENOENT', 'ENOENT', 'accepted', String(100 * MiB)])
  })

  it('says goodbye with ABORT', async () => {
    expect(
      await shell('h.set_opt_mode(True)', connect(), 'h.opt_abort()', 'print(h.aio_is_closed())'),
    ).toEqual(['True'])
  })

  for (const [what, setUp, expected] of [
    ['structured replies', 'pass', 'newstyle-fixed True True'],
    ['simple replies', 'h.set_request_structured_replies(False)', 'newstyle-fixed False False'],
    [
      'EXPORT_NAME, padded',
      'h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)',
      'newstyle-fixed True True',
    ],
    ['plain newstyle', 'h.set_handshake_flags(0)', 'newstyle False False'],
    [
      'plain newstyle without zeroes',
      'h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)',
      'newstyle False False',
    ],
  ] as const) {
    it(`reads and writes with ${what}`, async () => {
      const state =
        'h.get_protocol(), h.get_structured_replies_negotiated(), h.can_meta_context("base:allocation")'
      const found = await shell(
        'h.add_meta_context("base:allocation")',
        setUp,
        connect(),
        `print(${state})`,
        'h.pwrite(bytes(range(256)) * 256, 12345)',
        'h.flush()',
        'print(h.pread(65536, 12345) == bytes(range(256)) * 256)',
      )
      expect(found).toEqual([expected, 'True'])
    })
  }
})

describe.skipIf(!hasProgram('qemu-img'))('qemu-img', () => {
  it('opens a volume', async () => {
    const info: unknown = JSON.parse(await run('qemu-img', 'info', '--output=json', '-f', 'raw', uri('disk')))
    expect(info).toMatchObject({ 'virtual-size': 100 * MiB })
  })

  it('copies an image to it and back', async () => {
    const image = join(directory, 'image')
    const back = join(directory, 'back')
    await run('qemu-img', 'create', '-q', '-f', 'raw', image, '100M')
    await run('qemu-io', '-f', 'raw', '-c', 'write -P 0x5a 1M 3M', '-c', 'write -P 0x11 99M 1M', image)
    await run('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', image, uri('disk'))
    await run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri('disk'), back)
    expect(await run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', image, back)).toMatch(/identical/)
  })
})

describe.skipIf(!hasProgram('nbd-client'))('nbd-client', () => {
  it('lists the volumes', async () => {
    const listed = await run('nbd-client', '-l', '127.0.0.1', String(port))
    expect(listed).toMatch(/^disk/m)
    expect(listed).toMatch(/^größer & more/m)
  })
})
