/**
 * fullstripe status [--watch]: the daemon, its pool, its volumes and their mirrors. With --watch it draws the same lines again
 * every second, with the rates since the last time; elsewhere than on a terminal, block after block.
 */
import type { StatusInfo } from '../api/types.ts'
import { approximateSize } from '../base/sizes.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { type Cli, clientOf, interruption, pause, type Root } from './cli.ts'
import { formatterBar } from './format.ts'
import { mirrorBar, mirrorTable } from './mirror-text.ts'
import type { Output } from './output.ts'
import { Screen } from './screen.ts'
import { duration, pairs, percent, plural, table } from './text.ts'
import { stateText } from './volume.ts'

const WATCH_MS = 1000

export function statusCommand(root: Root, cli: Cli): void {
  root.command(
    'status',
    'The daemon, its pool, its volumes and their mirrors',
    (command) =>
      command
        .option('watch', {
          alias: 'w',
          type: 'boolean',
          default: false,
          describe: 'Again every second, with rates',
        })
        .example('fullstripe status --watch', 'until interrupted'),
    async (argv) => {
      const client = clientOf(argv)
      const { output } = cli
      if (!argv.watch) {
        const status = await client.get<StatusInfo>('/v1/status')
        output.result(status, () => statusLines(status, undefined, output))
        return
      }
      const stop = interruption()
      const screen = output.terminal ? new Screen(output) : undefined
      let before: StatusInfo | undefined
      while (!stop.signal.aborted) {
        const status = await client.get<StatusInfo>('/v1/status')
        if (output.json) output.object(status)
        else if (screen !== undefined) screen.draw(statusLines(status, before, output))
        else for (const line of [...statusLines(status, before, output), '']) output.line(line)
        await output.drained()
        before = status
        await pause(WATCH_MS, stop.signal)
      }
      stop.restore()
    },
  )
}

function statusLines(status: StatusInfo, before: StatusInfo | undefined, output: Output): string[] {
  const { pool, datapath } = status
  const uptime = (Date.parse(status.now) - Date.parse(status.started)) / 1000
  const failed = pool.members.filter((member) => member.state !== 'online')
  const lines = pairs([
    [
      'daemon',
      `${status.state} for ${duration(uptime)}, version ${status.version}, pid ${status.pid}, ${approximateSize(status.memory)} of memory`,
    ],
    ['listening', status.listen.join(' ')],
    ...(status.link === null ? [] : [['link', status.link] satisfies [string, string]]),
    [
      'datapath',
      `${datapath.kind} (${datapath.engine}, ${plural(datapath.threads, 'thread')}): ${datapath.reason}`,
    ],
    [
      'pool',
      `${pool.directory}: ${approximateSize(pool.used)} of ${approximateSize(pool.capacity)} used (${percent(pool.used, pool.capacity)}), ${plural(pool.members.length, 'member')}${diskText(pool)}`,
    ],
    ...failed.map((member): [string, string] => ['FAILED', `member ${member.index}: ${member.path}`]),
    ...(pool.failure === null ? [] : [['FAILED', pool.failure] satisfies [string, string]]),
    ['clients', plural(status.sessions, 'connection')],
  ])
  lines.push('')
  if (status.volumes.length === 0)
    lines.push('no volumes; create one with: fullstripe volume create NAME --size 10G')
  else lines.push(...(before === undefined ? plainTable(status) : rateTable(status, before)))
  const { mirrors } = status
  if (mirrors.length > 0) lines.push('', ...mirrorTable(mirrors))
  const moving = mirrors.filter(({ progress }) => progress !== null)
  if (moving.length > 0) lines.push('', 'mirroring')
  for (const mirror of moving) lines.push(`  ${mirrorBar(mirror, output.columns - 2, output.unicode)}`)
  const formatting = status.volumes.filter((volume) => volume.formatter.state === 'running')
  if (formatting.length > 0) lines.push('', 'formatting')
  for (const volume of formatting) lines.push(`  ${formatterBar(volume, output.columns - 2, output.unicode)}`)
  return lines
}

/** A sparse pool promises more than the file system below it may have. */
function diskText(pool: StatusInfo['pool']): string {
  return pool.fileSystemAvailable === null
    ? ''
    : `, ${approximateSize(pool.fileSystemAvailable)} free on disk`
}

const LEADING = [
  { title: 'volume' },
  { title: 'size', right: true },
  { title: 'formatted', right: true },
  { title: 'clients', right: true },
]

function leadingCells(volume: VolumeInfo): string[] {
  const { name, size, stripesFormatted, stripes, sessions } = volume
  return [name, approximateSize(size), percent(stripesFormatted, stripes), String(sessions)]
}

function plainTable(status: StatusInfo): string[] {
  const columns = [
    ...LEADING,
    { title: 'read', right: true },
    { title: 'written', right: true },
    { title: 'errors', right: true },
    { title: 'state' },
  ]
  const rows = status.volumes.map((volume) => [
    ...leadingCells(volume),
    approximateSize(volume.counters.readBytes),
    approximateSize(volume.counters.writeBytes),
    String(volume.counters.errors),
    stateText(volume),
  ])
  return table(columns, rows)
}

function rateTable(status: StatusInfo, before: StatusInfo): string[] {
  const columns = [
    ...LEADING,
    { title: 'reads/s', right: true },
    { title: 'read', right: true },
    { title: 'writes/s', right: true },
    { title: 'write', right: true },
    { title: 'errors', right: true },
    { title: 'state' },
  ]
  const seconds = Math.max(0.001, (Date.parse(status.now) - Date.parse(before.now)) / 1000)
  const rows = status.volumes.map((volume) => {
    const rate = volumeRates(
      volume,
      before.volumes.find((old) => old.uuid === volume.uuid),
      seconds,
    )
    return [
      ...leadingCells(volume),
      rate.reads.toFixed(0),
      `${approximateSize(Math.round(rate.readBytes))}/s`,
      rate.writes.toFixed(0),
      `${approximateSize(Math.round(rate.writeBytes))}/s`,
      String(volume.counters.errors),
      stateText(volume),
    ]
  })
  return table(columns, rows)
}

export interface Rates {
  readonly reads: number
  readonly readBytes: number
  readonly writes: number
  readonly writeBytes: number
}

/** Per second. Counters that went back (the daemon was started again) count from zero. */
export function volumeRates(now: VolumeInfo, before: VolumeInfo | undefined, seconds: number): Rates {
  const rate = (counter: keyof Rates) => {
    const from = before?.counters[counter] ?? now.counters[counter]
    const to = now.counters[counter]
    return (to >= from ? to - from : to) / seconds
  }
  return {
    reads: rate('reads'),
    readBytes: rate('readBytes'),
    writes: rate('writes'),
    writeBytes: rate('writeBytes'),
  }
}
