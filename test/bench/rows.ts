/** The rows of the comparison, what each must reach, and how rounds become a verdict. */
import type { Load, Measured } from './fio.ts'

const KiB = 1024
const MiB = 1024 * KiB

export interface Row extends Load {
  readonly title: string
  readonly portable: boolean // the portable datapath runs this row too
  readonly throughputMin: number // of the native datapath: times that of the fastest peer
  readonly cpuMax: number | null // of the native datapath: times that of the same peer, a request
}

/** Of the portable datapath, in the rows that it runs: times the throughput of the fastest peer. */
export const PORTABLE_THROUGHPUT_MIN = 0.4

function pair(
  what: string,
  read: Load['pattern'],
  write: Load['pattern'],
  row: Omit<Row, 'title' | 'pattern'>,
): Row[] {
  return [
    { title: `${what} read`, pattern: read, ...row },
    { title: `${what} write`, pattern: write, ...row },
  ]
}

const single = { block: 4 * KiB, depth: 1, connections: 1, portable: true, throughputMin: 1.5, cpuMax: null }
const deep = { block: 4 * KiB, depth: 32, connections: 1, portable: true, throughputMin: 1, cpuMax: 0.7 }
const wide = { block: 4 * KiB, depth: 16, connections: 4, portable: true, throughputMin: 1, cpuMax: 0.7 }
const large = { block: MiB, depth: 8, connections: 1, portable: false, throughputMin: 1.1, cpuMax: 0.7 }

export const ROWS: readonly Row[] = [
  ...pair('4K random, depth 1', 'randread', 'randwrite', single),
  ...pair('4K random, depth 32', 'randread', 'randwrite', deep),
  ...pair('4K random, 4 x depth 16', 'randread', 'randwrite', wide),
  ...pair('1M sequential, depth 8', 'read', 'write', large),
]

/** One server in one round. */
export interface Sample {
  readonly requestsPerSecond: number
  readonly bytesPerSecond: number
  readonly cpuMicroseconds: number // of the server, a request
}

export function sampleOf(measured: Measured, cpuSeconds: number): Sample {
  return {
    requestsPerSecond: measured.requests / measured.seconds,
    bytesPerSecond: measured.bytes / measured.seconds,
    cpuMicroseconds: (cpuSeconds * 1e6) / measured.requests,
  }
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  const [low, high] = [sorted[sorted.length % 2 === 0 ? middle - 1 : middle], sorted[middle]]
  if (low === undefined || high === undefined) throw new Error('median of nothing')
  return (low + high) / 2
}

export function medianSample(samples: readonly Sample[]): Sample {
  return {
    requestsPerSecond: median(samples.map((sample) => sample.requestsPerSecond)),
    bytesPerSecond: median(samples.map((sample) => sample.bytesPerSecond)),
    cpuMicroseconds: median(samples.map((sample) => sample.cpuMicroseconds)),
  }
}

export interface Verdict {
  readonly server: string
  readonly peer: string // the one with the highest throughput in this row
  readonly throughputRatio: number
  readonly throughputMin: number
  readonly cpuRatio: number
  readonly cpuMax: number | null
  readonly reached: boolean
}

/** Compares one of ours with the fastest peer of the row. `results` hold medians by server. */
export function verdictOf(
  row: Row,
  server: string,
  portable: boolean,
  results: ReadonlyMap<string, Sample>,
  peers: readonly string[],
): Verdict {
  const own = results.get(server)
  const known = peers.flatMap((name) => {
    const sample = results.get(name)
    return sample === undefined ? [] : [{ name, sample }]
  })
  const [best] = known.toSorted((a, b) => b.sample.requestsPerSecond - a.sample.requestsPerSecond)
  if (own === undefined || best === undefined) throw new Error(`no result to compare for ${server}`)
  const throughputRatio = own.requestsPerSecond / best.sample.requestsPerSecond
  const cpuRatio = own.cpuMicroseconds / best.sample.cpuMicroseconds
  const throughputMin = portable ? PORTABLE_THROUGHPUT_MIN : row.throughputMin
  const cpuMax = portable ? null : row.cpuMax
  const reached = throughputRatio >= throughputMin && (cpuMax === null || cpuRatio <= cpuMax)
  return { server, peer: best.name, throughputRatio, throughputMin, cpuRatio, cpuMax, reached }
}
