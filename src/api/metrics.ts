/** GET /metrics: the Prometheus text format, version 0.0.4. */
import type { FastifyInstance } from 'fastify'
import type { Daemon } from '../daemon/daemon.ts'
import { MIRROR_STATES } from '../mirror/state.ts'
import type { MirrorControl, MirrorInfo } from '../mirror/types.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { statusOf } from './pool.ts'
import type { StatusInfo } from './types.ts'

export function metricsRoutes(app: FastifyInstance, daemon: Daemon, mirrors: MirrorControl): void {
  app.get(
    '/metrics',
    { schema: { summary: 'Metrics in the Prometheus text format' } },
    async (_request, reply) => {
      reply.type('text/plain; version=0.0.4; charset=utf-8')
      return metricsText(statusOf(daemon, mirrors), process.cpuUsage())
    },
  )
}

interface Sample {
  readonly labels?: Readonly<Record<string, string | number>>
  readonly value: number
}

type Metric = (name: string, type: 'gauge' | 'counter', help: string, samples: readonly Sample[]) => void

export function metricsText(status: StatusInfo, cpu: NodeJS.CpuUsage): string {
  const lines: string[] = []
  const metric: Metric = (name, type, help, samples) => {
    lines.push(`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`)
    for (const { labels, value } of samples) lines.push(`${name}${labelText(labels)} ${value}`)
  }
  const { pool, volumes, members } = status
  const one = (value: number) => [{ value }]

  metric('fullstripe_info', 'gauge', 'Version and datapath of the daemon.', [
    {
      labels: { version: status.version, datapath: status.datapath.kind, engine: status.datapath.engine },
      value: 1,
    },
  ])
  metric('fullstripe_sessions', 'gauge', 'Connections of clients.', one(status.sessions))
  metric('fullstripe_pool_capacity_bytes', 'gauge', 'What the pool can hold.', one(pool.capacity))
  metric('fullstripe_pool_used_bytes', 'gauge', 'What the pool holds.', one(pool.used))
  metric('fullstripe_pool_reserved_bytes', 'gauge', 'Promised to thick volumes.', one(pool.reserved))
  if (pool.fileSystemAvailable !== null) {
    const help = 'Free on the file system below file members.'
    metric('fullstripe_pool_file_system_available_bytes', 'gauge', help, one(pool.fileSystemAvailable))
  }

  metric(
    'fullstripe_pool_read_only',
    'gauge',
    '1 after a failed sync, until a restart: writes and flushes fail.',
    one(pool.state === 'read-only' ? 1 : 0),
  )

  const eachMember = (value: (index: number) => number) =>
    members.map((_, index) => ({
      labels: { member: index, path: pool.members[index]?.path ?? '' },
      value: value(index),
    }))
  metric(
    'fullstripe_member_online',
    'gauge',
    '1 while a member answers.',
    eachMember((index) => (pool.members[index]?.state === 'online' ? 1 : 0)),
  )
  for (const [field, name, help] of MEMBER_COUNTERS) {
    metric(
      `fullstripe_member_${name}_total`,
      'counter',
      help,
      eachMember((index) => members[index]?.[field] ?? 0),
    )
  }

  const eachVolume = (value: (volume: StatusInfo['volumes'][number]) => number) =>
    volumes.map((volume) => ({ labels: { volume: volume.name }, value: value(volume) }))
  metric(
    'fullstripe_volume_size_bytes',
    'gauge',
    'Size of a volume.',
    eachVolume((volume) => volume.size),
  )
  metric(
    'fullstripe_volume_used_bytes',
    'gauge',
    'Space a volume takes.',
    eachVolume((volume) => volume.used),
  )
  metric(
    'fullstripe_volume_formatted_ratio',
    'gauge',
    'Share of the stripes that hold data.',
    eachVolume((volume) => (volume.stripes === 0 ? 0 : volume.stripesFormatted / volume.stripes)),
  )
  metric(
    'fullstripe_volume_sessions',
    'gauge',
    'Connections to a volume.',
    eachVolume((volume) => volume.sessions),
  )
  const kept = volumes.filter(({ intents }) => intents !== null)
  const eachIntents = (value: (intents: NonNullable<VolumeInfo['intents']>) => number) =>
    kept.flatMap(({ name, intents }) =>
      intents === null ? [] : [{ labels: { volume: name }, value: value(intents) }],
    )
  if (kept.length > 0) {
    metric(
      'fullstripe_volume_hot_regions',
      'gauge',
      'Regions that may hold changes that are not durable.',
      eachIntents(({ hot }) => hot),
    )
    metric(
      'fullstripe_volume_announced_regions_total',
      'counter',
      'Regions that were announced.',
      eachIntents(({ announced }) => announced),
    )
    metric(
      'fullstripe_volume_suspect_bytes',
      'gauge',
      'What was hot when the daemon was stopped out of order.',
      eachIntents(({ suspect }) => suspect),
    )
  }
  for (const [field, name, help] of VOLUME_COUNTERS) {
    metric(
      `fullstripe_volume_${name}_total`,
      'counter',
      help,
      eachVolume((volume) => volume.counters[field]),
    )
  }

  if (status.mirrors.length > 0) mirrorMetrics(status.mirrors, metric)

  metric('process_resident_memory_bytes', 'gauge', 'Resident memory.', one(status.memory))
  metric(
    'process_cpu_seconds_total',
    'counter',
    'CPU time, user and system.',
    one((cpu.user + cpu.system) / 1e6),
  )
  metric('process_start_time_seconds', 'gauge', 'Start time.', one(Date.parse(status.started) / 1000))
  return `${lines.join('\n')}\n`
}

function mirrorMetrics(mirrors: readonly MirrorInfo[], metric: Metric): void {
  const labelsOf = ({ volume, name, role }: MirrorInfo) => ({ volume, mirror: name, role })
  const each = (value: (mirror: MirrorInfo) => number | null) =>
    mirrors.flatMap((mirror) => {
      const sample = value(mirror)
      return sample === null ? [] : [{ labels: labelsOf(mirror), value: sample }]
    })
  metric(
    'fullstripe_mirror_state',
    'gauge',
    '1 for the state that a mirror is in, 0 for the others.',
    mirrors.flatMap((mirror) =>
      MIRROR_STATES.map((state) => ({
        labels: { ...labelsOf(mirror), state },
        value: mirror.state === state ? 1 : 0,
      })),
    ),
  )
  const gauge = (name: string, help: string, value: (mirror: MirrorInfo) => number | null) =>
    metric(`fullstripe_mirror_${name}`, 'gauge', help, each(value))
  gauge('connected', '1 while there is a connection to the peer.', ({ connected }) => Number(connected))
  gauge('consistent', '1 while the secondary is a point in time.', ({ consistent }) => Number(consistent))
  gauge('lag_bytes', 'What the secondary lacks.', ({ lag }) => lag.bytes)
  gauge(
    'lag_seconds',
    'Age of what the secondary has; absent where it has nothing.',
    ({ lag }) => lag.seconds,
  )
  gauge(
    'progress_ratio',
    'Share done of the work that goes on; absent where there is none.',
    ({ progress }) => (progress === null ? null : progress.total === 0 ? 1 : progress.done / progress.total),
  )
  gauge('differing_bytes', 'What the last comparison found; absent before one.', ({ verify }) =>
    verify === null ? null : verify.differing,
  )
  for (const [field, name, help] of MIRROR_COUNTERS) {
    metric(
      `fullstripe_mirror_${name}_total`,
      'counter',
      help,
      each(({ counters }) => counters[field]),
    )
  }
}

const MIRROR_COUNTERS = [
  ['sentBytes', 'sent_bytes', 'Content sent.'],
  ['wireBytes', 'wire_bytes', 'All that was written to the link.'],
  ['units', 'units', 'Copy units sent with content.'],
  ['holes', 'holes', 'Copy units sent as holes.'],
  ['signatures', 'signatures', 'Regions compared.'],
  ['cycles', 'cycles', 'Cycles that the secondary has committed.'],
  ['saves', 'saves', 'Copy units saved for the sender before they were overwritten.'],
  ['forwarded', 'forwarded_requests', 'Requests that went to both sides at once.'],
  ['laneWrites', 'lane_writes', 'Of these, writes that needed no decision on either side.'],
] as const

const MEMBER_COUNTERS = [
  ['reads', 'reads', 'Reads of a member.'],
  ['readBytes', 'read_bytes', 'Bytes read from a member.'],
  ['writes', 'writes', 'Writes to a member.'],
  ['writeBytes', 'written_bytes', 'Bytes written to a member.'],
  ['syncs', 'syncs', 'Syncs of a member.'],
] as const

const VOLUME_COUNTERS = [
  ['reads', 'reads', 'Read requests.'],
  ['readBytes', 'read_bytes', 'Bytes read.'],
  ['writes', 'writes', 'Write requests.'],
  ['writeBytes', 'written_bytes', 'Bytes written.'],
  ['flushes', 'flushes', 'Flush requests.'],
  ['trims', 'trims', 'Trim requests.'],
  ['zeroes', 'zeroes', 'Write-zeroes requests.'],
  ['errors', 'errors', 'Requests answered with an error.'],
  ['upcalls', 'upcalls', 'Requests that needed a decision.'],
  ['inPlaceWrites', 'in_place_writes', 'Writes that needed no decision.'],
  ['laneWrites', 'lane_writes', 'Of these, made on both sides of a mirror.'],
  ['laneBytes', 'lane_bytes', 'Bytes written on both sides of a mirror without a decision.'],
  ['fullStripeWrites', 'full_stripe_writes', 'Stripes written whole, by their first write.'],
] as const

function labelText(labels: Sample['labels']): string {
  if (labels === undefined) return ''
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${escapeLabel(String(value))}"`)
  return `{${pairs.join(',')}}`
}

function escapeLabel(value: string): string {
  return value.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n')
}
