/**
 * npm run bench: the figures of this server next to those of nbdkit's file plugin, qemu-nbd and nbd-server, on one file
 * system, in one run.
 *
 * All servers run for the whole time. A row is measured in rounds: every server once, in turn, for a moment, then the
 * next round; so what else the machine does falls on all of them. The medians of the rounds are compared, and each
 * of ours with the peer that was fastest in that row. CPU is the server's, not the client's.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { arch, cpus, release, tmpdir, totalmem } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { runFio } from './fio.ts'
import { intentsCost } from './intents.ts'
import { mirrorFigures } from './mirrors.ts'
import { cpuSeconds } from './processes.ts'
import { type Check, checkLines, mark, textTable } from './report.ts'
import { medianSample, ROWS, type Row, type Sample, sampleOf, type Verdict, verdictOf } from './rows.ts'
import { fullPoolOpens, hugeVolumes } from './scale.ts'
import { PEER_NAMES, type Server, startOurs, startPeer } from './servers.ts'
import { firstWrites } from './thin.ts'

const MiB = 2 ** 20

const USAGE = `usage: scripts/bench [--quick] [--json FILE] [--directory DIR] [--only compare|thin|intents|mirrors|scale] [--row TEXT] [--strict]
  --quick       fewer and shorter rounds, smaller disks
  --json FILE   writes everything measured
  --directory   where the disks lie (default: the directory for temporary files)
  --only PART   one part: the comparison, first writes, intents, mirrors, sizes
  --row TEXT    only rows of the comparison whose title has this text
  --strict      exit status 1 where a figure was missed`

interface Options {
  readonly quick: boolean
  readonly strict: boolean
  readonly json: string | undefined
  readonly directory: string
  readonly only: string | undefined
  readonly row: string | undefined
}

interface RowResult {
  readonly title: string
  readonly rounds: Record<string, readonly Sample[]>
  readonly medians: Record<string, Sample>
  readonly verdicts: readonly Verdict[]
}

function readOptions(): Options {
  const { values } = parseArgs({
    options: {
      quick: { type: 'boolean', default: false },
      strict: { type: 'boolean', default: false },
      json: { type: 'string' },
      directory: { type: 'string' },
      only: { type: 'string' },
      row: { type: 'string' },
    },
  })
  if (values.only !== undefined && !['compare', 'thin', 'intents', 'mirrors', 'scale'].includes(values.only))
    throw new Error(USAGE)
  return {
    ...values,
    directory: values.directory ?? tmpdir(),
    json: values.json,
    only: values.only,
    row: values.row,
  }
}

/** What goes on, on standard error; the tables go to standard output. */
const progress = (text: string) => process.stderr.write(`bench: ${text}\n`)

async function compare(directory: string, options: Options): Promise<RowResult[]> {
  const size = (options.quick ? 128 : 512) * MiB
  const rounds = options.quick ? 3 : 5
  const seconds = options.quick ? 1 : 3
  const rows = ROWS.filter(({ title }) => options.row === undefined || title.includes(options.row))
  const servers: Server[] = []
  const results: RowResult[] = []
  try {
    for (const datapath of ['native', 'portable'] as const) {
      progress(`starting and filling fullstripe ${datapath}`)
      servers.push(await startOurs(directory, datapath, size))
    }
    for (const name of PEER_NAMES) {
      progress(`starting and filling ${name}`)
      servers.push(await startPeer(directory, name, size))
    }
    for (const row of rows) {
      const taking = servers.filter((server) => row.portable || !isPortable(server))
      const samples = new Map<string, Sample[]>(taking.map(({ name }) => [name, []]))
      for (let round = 1; round <= rounds; round++) {
        progress(`${row.title}: round ${round} of ${rounds}`)
        for (const server of taking) samples.get(server.name)?.push(await measure(server, row, size, seconds))
      }
      results.push(resultOf(row, taking, samples))
    }
  } finally {
    for (const server of servers) await server.stop()
  }
  return results
}

const isPortable = (server: Server) => server.name === 'fullstripe portable'

async function measure(server: Server, row: Row, size: number, seconds: number): Promise<Sample> {
  const before = cpuSeconds(server.pid)
  const measured = await runFio(server.uri, row, { size, seconds })
  return sampleOf(measured, cpuSeconds(server.pid) - before)
}

function resultOf(
  row: Row,
  servers: readonly Server[],
  samples: ReadonlyMap<string, readonly Sample[]>,
): RowResult {
  const medians = new Map([...samples].map(([name, list]) => [name, medianSample(list)]))
  const peers = servers.filter(({ ours }) => !ours).map(({ name }) => name)
  const verdicts = servers
    .filter(({ ours }) => ours)
    .map((server) => verdictOf(row, server.name, isPortable(server), medians, peers))
  return {
    title: row.title,
    rounds: Object.fromEntries(samples),
    medians: Object.fromEntries(medians),
    verdicts,
  }
}

function comparisonLines(results: readonly RowResult[]): string {
  const head = ['', 'requests/s', 'MB/s', 'CPU us/request', 'throughput', 'to reach', 'CPU', 'to reach', '']
  const lines: string[][] = []
  for (const { title, medians, verdicts } of results) {
    lines.push([title])
    for (const [name, sample] of Object.entries(medians)) {
      const verdict = verdicts.find(({ server }) => server === name)
      lines.push([
        `  ${name}`,
        sample.requestsPerSecond.toFixed(0),
        (sample.bytesPerSecond / 1e6).toFixed(0),
        sample.cpuMicroseconds.toFixed(1),
        ...(verdict === undefined ? [] : verdictCells(verdict)),
      ])
    }
  }
  return textTable([head, ...lines])
}

function verdictCells(verdict: Verdict): string[] {
  return [
    `${verdict.throughputRatio.toFixed(2)} x ${verdict.peer}`,
    `>= ${verdict.throughputMin}`,
    `${verdict.cpuRatio.toFixed(2)} x`,
    verdict.cpuMax === null ? '-' : `<= ${verdict.cpuMax}`,
    mark(verdict.reached),
  ]
}

async function run(options: Options): Promise<boolean> {
  const wants = (part: string) => options.only === undefined || options.only === part
  mkdirSync(options.directory, { recursive: true })
  const directory = mkdtempSync(join(options.directory, 'fullstripe-bench-'))
  const checks: Check[] = []
  let comparison: RowResult[] = []
  try {
    if (wants('compare')) comparison = await compare(directory, options)
    for (const datapath of ['native', 'portable'] as const) {
      if (wants('thin')) {
        progress(`first writes, ${datapath}`)
        checks.push(...(await firstWrites(directory, datapath, (options.quick ? 32 : 128) * MiB)))
      }
      if (wants('intents')) {
        progress(`intents, ${datapath}`)
        checks.push(...(await intentsCost(directory, datapath, options.quick)))
      }
      if (wants('mirrors')) {
        progress(`mirrors, ${datapath}`)
        checks.push(...(await mirrorFigures(directory, datapath, options.quick)))
      }
      if (wants('scale')) {
        progress(`16 TiB volumes, ${datapath}`)
        checks.push(...(await hugeVolumes(directory, datapath)))
      }
    }
    if (wants('scale')) {
      progress('a pool with 16 million stripes')
      checks.push(...(await fullPoolOpens(directory, 'native')))
    }
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
  const machine = {
    processors: cpus().length,
    model: cpus()[0]?.model ?? '',
    memory: totalmem(),
    kernel: release(),
    arch: arch(),
    node: process.version,
  }
  console.log(
    `\n${machine.processors} x ${machine.model}, Linux ${machine.kernel}, node ${machine.node}; ${options.quick ? 'quick run' : 'full run'}\n`,
  )
  if (comparison.length > 0) console.log(`${comparisonLines(comparison)}\n`)
  if (checks.length > 0) console.log(`${checkLines(checks)}\n`)
  if (options.json !== undefined) {
    const report = { date: new Date().toISOString(), quick: options.quick, machine, comparison, checks }
    writeFileSync(options.json, `${JSON.stringify(report, null, 2)}\n`)
  }
  const marks = [
    ...comparison.flatMap(({ verdicts }) => verdicts.map(({ reached }) => reached)),
    ...checks.map(({ reached }) => reached),
  ]
  const missed = marks.filter((reached) => !reached).length
  console.log(`${marks.length - missed} of ${marks.length} figures reached`)
  return missed === 0
}

try {
  const options = readOptions()
  const reached = await run(options)
  if (!reached && options.strict) process.exitCode = 1
} catch (error) {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : String(error)}\n`)
  process.exitCode = 1
}
