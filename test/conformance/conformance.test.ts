/**
 * Our server against the table of checks: both datapaths as a daemon serves them, over a unix socket and TCP, and the
 * native one with the thread pool that takes over where io_uring is refused. Every check is a test of its own.
 */
import { join } from 'node:path'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Listener } from '../../src/daemon/listener.ts'
import type { ExportDescription } from '../../src/nbd/negotiation.ts'
import { formatNbdUri, parseNbdUri } from '../../src/nbd/uri.ts'
import { DaemonProcess, fullstripe, temporaryDirectory } from '../support/daemon.ts'
import { Rig } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { DATAPATHS } from '../support/volumes.ts'
import { runCheck } from './check.ts'
import { CHECKS, checksNamed } from './checks.ts'
import { Context, type Facts, probe, type Target } from './context.ts'

const SIZE = 80 * 2 ** 20 + 512 // above the largest payload, and not a multiple of 4096
const DEADLINE_MS = 10_000

/** The only rules that are about something we do not do. A longer list is a feature lost. */
const NOT_OURS: ReadonlyMap<string, string> = new Map([
  ['client-flags.unoffered', 'the server offers NO_ZEROES'],
  ['df.not-offered', 'the server offers DF'],
  ['zeroes.fast-not-offered', 'the server offers FAST_ZERO'],
  ['unaligned', 'the minimum block size is 1'],
])

function notOurs(id: string): string | undefined {
  const plain = id.replace(/@.*/, '')
  return NOT_OURS.get(plain) ?? NOT_OURS.get(plain.replace(/\..*/, ''))
}

interface Served {
  readonly addresses: Readonly<Record<'unix' | 'tcp', string>>
  stop(): Promise<void>
}

async function startDaemon(datapath: string): Promise<Served> {
  const directory = temporaryDirectory()
  const pool = join(directory.path, 'pool')
  const run = async (...args: string[]) => {
    const { code, stderr } = await fullstripe(args)
    if (code !== 0) throw new Error(stderr)
  }
  await run('pool', 'create', pool)
  const unix = `nbd+unix:///?socket=${join(directory.path, 'nbd.sock')}`
  const listen = ['--listen', unix, '--listen', 'nbd://127.0.0.1:0']
  const daemon = await DaemonProcess.start(pool, [...listen, '--datapath', datapath])
  await run('volume', 'create', 'disk', '--size', String(SIZE), '--pool', pool)
  await run('volume', 'create', 'frozen', '--size', String(SIZE), '--read-only', '--pool', pool)
  const { listen: bound } = await daemon.status()
  return {
    addresses: { unix, tcp: bound.find((uri) => uri.startsWith('nbd://'))! },
    stop: async () => {
      const { code } = await daemon.stop()
      directory.remove()
      expect(code, `the daemon ended in order: ${daemon.stderr}`).toBe(0)
    },
  }
}

/** The native datapath with its thread pool, behind the daemon's own negotiation. */
async function startThreads(): Promise<Served> {
  const threads = implementations.find(({ name }) => name === 'native, threads')
  if (threads === undefined) throw new Error('there is no implementation with threads')
  const rig = await Rig.open(threads, {
    chunkSize: 65536,
    dataOffset: 65536,
    stripes: Math.ceil(SIZE / 65536),
    size: SIZE,
  })
  const described = (name: string): ExportDescription => ({
    name,
    description: `the disk called ${name}`,
    size: SIZE,
    readOnly: name === 'frozen',
    canMultiConn: true,
    contexts: [
      { id: 1, name: 'base:allocation' },
      { id: 2, name: 'fullstripe:init' },
    ],
  })
  const listener = await Listener.open({
    uris: [`nbd+unix:///?socket=${join(rig.directory, 'nbd.sock')}`, 'nbd://127.0.0.1:0'],
    log: pino({ level: 'silent' }),
    exports: {
      list: () => ['disk', 'frozen'].map(described),
      find: (name) => (['disk', 'frozen'].includes(name) ? described(name) : undefined),
      serve: (_name, session) => rig.datapath.serve(rig.exportId, session),
    },
  })
  const [unix = '', tcp = ''] = listener.addresses()
  return {
    addresses: { unix, tcp },
    stop: async () => {
      await listener.close()
      await rig.close()
    },
  }
}

type Transport = 'unix' | 'tcp'
const SERVERS: readonly (readonly [string, readonly Transport[], () => Promise<Served>])[] = [
  ...DATAPATHS.map(
    (name) => [name, ['unix', 'tcp'] as readonly Transport[], () => startDaemon(name)] as const,
  ),
  ...(implementations.some(({ name }) => name === 'native, threads')
    ? [['native, threads', ['unix'] as readonly Transport[], startThreads] as const]
    : []),
]

describe.each(SERVERS)('%s', (_name, transports, start) => {
  let served: Served
  beforeAll(async () => {
    served = await start()
  })
  afterAll(async () => {
    await served?.stop()
  })

  describe.each(transports)('over %s', (transport) => {
    let target: Target
    let facts: Facts
    beforeAll(async () => {
      const { address } = parseNbdUri(served.addresses[transport])
      const named = (exportName: string) => parseNbdUri(formatNbdUri({ address, exportName }))
      target = { uri: named('disk'), readOnly: named('frozen'), mayWrite: true }
      facts = await probe(target.uri, DEADLINE_MS)
    })

    for (const check of CHECKS) {
      it(`${check.id}: ${check.rule}`, async () => {
        const { verdict, detail } = await runCheck(check, new Context(target, facts), DEADLINE_MS)
        const reason = notOurs(check.id)
        expect({ verdict, detail }).toEqual(
          reason === undefined ? { verdict: 'pass', detail: '' } : { verdict: 'n/a', detail: reason },
        )
      })
    }
  })
})

describe('the table', () => {
  it('names each check once, and each cites a section', () => {
    expect(new Set(CHECKS.map(({ id }) => id)).size).toBe(CHECKS.length)
    for (const { id, section, rule } of CHECKS) {
      expect(id).toMatch(/^[a-z0-9_-]+(\.[a-z0-9_-]+)?(@(simple|structured|extended))?$/)
      expect(section.length * rule.length).toBeGreaterThan(0)
    }
  })

  it('finds checks by the beginning of their names', () => {
    expect(checksNamed('df').length).toBeGreaterThan(4)
    expect(checksNamed('disc.at-once@simple')).toHaveLength(1)
    expect(checksNamed('disc.at')).toHaveLength(0)
  })

  it('leaves nothing out that it once had', () => {
    expect(CHECKS.length).toBeGreaterThanOrEqual(480)
  })
})
