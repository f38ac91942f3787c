/**
 * fullstripe bench [NAME]: a quick look at how fast the running daemon answers here, through its socket, with our
 * own NBD client. One JavaScript process is the client, and often the limit; comparisons need better tools.
 *
 * Without a name it makes a volume for itself, which it deletes in the end, and so may also write. A volume that is
 * named is only read, unless --write says that its data may go.
 */
import { randomBytes } from 'node:crypto'
import { createHistogram } from 'node:perf_hooks'
import type { StatusInfo } from '../api/types.ts'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize, formatSize, parseSize } from '../base/sizes.ts'
import { NbdClient } from '../nbd/client.ts'
import type { PoolInfo } from '../volume/pool.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { exportUri } from './addresses.ts'
import { type Cli, clientOf, interruption, parseCount, type Root } from './cli.ts'
import { type Client, volumePath } from './client.ts'
import { table } from './text.ts'

interface Row {
  readonly write: boolean
  readonly pattern: 'random' | 'sequential'
  readonly block: number // bytes
  readonly depth: number // requests in flight on each connection
  readonly connections: number
}

interface Result extends Row {
  readonly seconds: number
  readonly requests: number
  readonly requestsPerSecond: number
  readonly bytesPerSecond: number
  readonly microseconds: {
    readonly p50: number
    readonly p99: number
    readonly p999: number
    readonly max: number
  }
}

const KiB = 1024
const MiB = 1024 * KiB
const READS: readonly Row[] = [
  { write: false, pattern: 'random', block: 4 * KiB, depth: 1, connections: 1 },
  { write: false, pattern: 'random', block: 4 * KiB, depth: 32, connections: 1 },
  { write: false, pattern: 'random', block: 4 * KiB, depth: 16, connections: 4 },
  { write: false, pattern: 'sequential', block: MiB, depth: 8, connections: 1 },
]
const asWrite = (row: Row): Row => ({ ...row, write: true })

/** Of the volume that bench makes for itself; it leaves most of a small pool alone. */
const SCRATCH_SIZE_MAX = 512 * MiB
const SCRATCH_SIZE_MIN = 16 * MiB

export function benchCommand(root: Root, cli: Cli): void {
  root.command(
    'bench [name]',
    'Measure how fast the running daemon answers',
    (command) =>
      command
        .positional('name', {
          type: 'string',
          describe: 'A volume (default: one made for this and deleted again)',
        })
        .option('write', {
          type: 'boolean',
          default: false,
          describe: 'Also write to the named volume: ITS DATA IS LOST',
        })
        .option('seconds', { type: 'string', requiresArg: true, default: '2', describe: 'For each row' })
        .option('pattern', { choices: ['random', 'sequential'] as const, describe: 'Measure this alone' })
        .option('block', {
          type: 'string',
          requiresArg: true,
          describe: 'Bytes of a request',
          defaultDescription: '4K, or 1M in sequence',
        })
        .option('depth', {
          type: 'string',
          requiresArg: true,
          describe: 'Requests in flight on each connection',
          defaultDescription: '32',
        })
        .option('connections', {
          alias: 'C',
          type: 'string',
          requiresArg: true,
          describe: 'Connections',
          defaultDescription: '1',
        })
        .example('fullstripe bench', 'some rows, on a volume of its own')
        .example(
          'fullstripe bench data --pattern random --block 8K --depth 16',
          'one row, reading the volume data',
        ),
    async (argv) => {
      const seconds = parseCount(argv.seconds, '--seconds', 1, 3600)
      const single = singleRow(argv)
      const client = clientOf(argv)
      const mayWrite = argv.name === undefined || argv.write
      const reads = single === undefined ? READS : [single]
      const rows = mayWrite ? [...reads.toReversed().map(asWrite), ...reads] : reads
      const volume =
        argv.name === undefined
          ? await makeScratch(client)
          : await client.get<VolumeInfo>(volumePath(argv.name))
      const stop = interruption()
      const results: Result[] = []
      try {
        if (mayWrite && volume.readOnly)
          throw new UserError('REFUSED', `volume ${volume.name} is read-only: bench it without --write`)
        const uri = exportUri((await client.get<StatusInfo>('/v1/status')).listen, volume.name)
        if (argv.name === undefined) await fill(uri, volume.size, stop.signal)
        for (const row of rows) {
          if (stop.signal.aborted) break
          if (!cli.output.json && cli.output.terminal) process.stderr.write(`\r${titleOf(row)} ...\x1b[K`)
          results.push(await measure(uri, volume.size, row, seconds, stop.signal))
        }
      } finally {
        stop.restore()
        if (!cli.output.json && cli.output.terminal) process.stderr.write('\r\x1b[K')
        if (argv.name === undefined) await client.delete<null>(volumePath(volume.name, '?force=true'))
      }
      cli.output.result({ volume: volume.name, results }, () => resultLines(results))
    },
  )
}

function singleRow(argv: {
  pattern: 'random' | 'sequential' | undefined
  block: string | undefined
  depth: string | undefined
  connections: string | undefined
}): Row | undefined {
  const { pattern = 'random', block, depth = '32', connections = '1' } = argv
  if (
    argv.pattern === undefined &&
    block === undefined &&
    argv.depth === undefined &&
    argv.connections === undefined
  )
    return undefined
  const bytes = block === undefined ? (pattern === 'random' ? 4 * KiB : MiB) : parseSize(block, '--block')
  if (bytes < LIMITS.sectorSize || bytes % LIMITS.sectorSize !== 0 || bytes > LIMITS.requestPayloadMax) {
    throw new UserError(
      'USAGE',
      `--block must be a multiple of ${LIMITS.sectorSize} up to ${formatSize(LIMITS.requestPayloadMax)}, not ${block}`,
    )
  }
  return {
    write: false,
    pattern,
    block: bytes,
    depth: parseCount(depth, '--depth', 1, LIMITS.requestsInFlightPerConnection),
    connections: parseCount(connections, '--connections', 1, LIMITS.nbdClientConnectionsMax),
  }
}

async function makeScratch(client: Client): Promise<VolumeInfo> {
  const pool = await client.get<PoolInfo>('/v1/pool')
  const free = Math.min(
    pool.capacity - pool.used - pool.reserved,
    pool.fileSystemAvailable ?? Number.POSITIVE_INFINITY,
  )
  const size = Math.min(SCRATCH_SIZE_MAX, Math.floor(free / 4 / MiB) * MiB)
  if (size < SCRATCH_SIZE_MIN) {
    throw new UserError(
      'FAILED',
      `the pool has only ${approximateSize(Math.max(0, free))} free: name a volume to be read`,
    )
  }
  return client.post<VolumeInfo>('/v1/volumes', { name: `bench-${randomBytes(4).toString('hex')}`, size })
}

/** Every stripe gets its first write, so that what follows measures volumes as they are in use. */
async function fill(uri: string, size: number, signal: AbortSignal): Promise<void> {
  const client = await NbdClient.connect(uri)
  const source = randomBytes(MiB)
  let next = 0
  const worker = async () => {
    while (next < size && !signal.aborted) {
      const offset = next
      next += source.length
      await client.write(source.subarray(0, Math.min(source.length, size - offset)), offset)
    }
  }
  try {
    await Promise.all(Array.from({ length: 8 }, worker))
  } finally {
    await client.close()
  }
}

async function measure(
  uri: string,
  size: number,
  row: Row,
  seconds: number,
  signal: AbortSignal,
): Promise<Result> {
  const places = Math.floor(size / row.block)
  if (places === 0)
    throw new UserError('USAGE', `the volume is smaller than one request of ${formatSize(row.block)}`)
  const clients: NbdClient[] = []
  const latency = createHistogram()
  const source = randomBytes(row.block)
  let requests = 0
  let place = 0
  const nextOffset = () =>
    (row.pattern === 'random' ? Math.floor(Math.random() * places) : place++ % places) * row.block
  let end = 0
  const worker = async (client: NbdClient) => {
    const buffer = row.write ? source : Buffer.allocUnsafe(row.block)
    for (let began = performance.now(); began < end && !signal.aborted; ) {
      if (row.write) await client.write(buffer, nextOffset())
      else await client.read(buffer, nextOffset())
      const now = performance.now()
      latency.record(Math.max(1, Math.round((now - began) * 1000)))
      requests++
      began = now
    }
  }
  try {
    for (let index = 0; index < row.connections; index++) {
      clients.push(await NbdClient.connect(uri, { inFlightMax: row.depth }))
    }
    const from = performance.now()
    end = from + seconds * 1000
    await Promise.all(clients.flatMap((client) => Array.from({ length: row.depth }, () => worker(client))))
    const elapsed = (performance.now() - from) / 1000
    const at = (percentile: number) => (requests === 0 ? 0 : latency.percentile(percentile))
    return {
      ...row,
      seconds: elapsed,
      requests,
      requestsPerSecond: requests / elapsed,
      bytesPerSecond: (requests * row.block) / elapsed,
      microseconds: { p50: at(50), p99: at(99), p999: at(99.9), max: requests === 0 ? 0 : latency.max },
    }
  } finally {
    await Promise.all(clients.map((client) => client.close()))
  }
}

function titleOf(row: Row): string {
  return `${formatSize(row.block)} ${row.pattern} ${row.write ? 'write' : 'read'}`
}

function resultLines(results: readonly Result[]): string[] {
  const right = (title: string) => ({ title, right: true })
  const columns = [
    { title: 'requests' },
    right('connections'),
    right('depth'),
    right('per second'),
    right('throughput'),
    right('p50'),
    right('p99'),
    right('p99.9'),
    right('max'),
  ]
  const rows = results.map((result) => [
    titleOf(result),
    String(result.connections),
    String(result.depth),
    result.requestsPerSecond.toFixed(0),
    `${approximateSize(Math.round(result.bytesPerSecond))}/s`,
    ...Object.values(result.microseconds).map(microseconds),
  ])
  return table(columns, rows)
}

function microseconds(value: number): string {
  return value >= 10_000 ? `${(value / 1000).toFixed(0)} ms` : `${value} us`
}
