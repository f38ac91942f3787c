/** Mirrors in words, tables and bars. Pure functions. */
import { formatDuration } from '../base/durations.ts'
import { approximateSize, formatSize } from '../base/sizes.ts'
import type { MirrorInfo, MirrorSide, VerifyResult } from '../mirror/types.ts'
import { duration, padStart, pairs, percent, plural, progressBar, table } from './text.ts'

/** `data/site-b`; no volume has a slash in its name. */
export function mirrorLabel({ volume, name }: Pick<MirrorInfo, 'volume' | 'name'>): string {
  return `${volume}/${name}`
}

/** `copying 42.1 %`, `degraded: the peer is gone`; what else is to be said comes after it. */
export function mirrorStateText(info: MirrorInfo): string {
  const { state, reason, progress } = info
  const share = progress === null ? '' : ` ${percent(progress.done, progress.total)}`
  const what =
    state === 'copying' || state === 'comparing' || progress === null
      ? `${state}${share}`
      : `${state}, ${WORK[progress.what]}${share}`
  return reason === null ? what : `${what}: ${reason}`
}

const WORK = { comparing: 'comparing', copying: 'copying', cycle: 'sending', verifying: 'verifying' } as const

/** `0`, `3.1s`, `4.2M, 3.1s`; `4.2M` where the secondary has no point in time yet. */
export function lagText({ lag }: MirrorInfo): string {
  const { bytes, seconds } = lag
  if (bytes === 0) return seconds === null || seconds === 0 ? '0' : secondsText(seconds)
  return seconds === null ? approximateSize(bytes) : `${approximateSize(bytes)}, ${secondsText(seconds)}`
}

function secondsText(seconds: number): string {
  return seconds < 10 ? `${Math.max(0, seconds).toFixed(1)}s` : duration(seconds)
}

/** `async every 5s, at most 50M/s` */
export function modeText({ mode, intervalMs, onLoss, rate }: MirrorInfo): string {
  const how =
    mode === 'async'
      ? `async every ${formatDuration(intervalMs)}`
      : `sync, ${onLoss === 'block' ? 'writes wait' : 'writes go on'} when the peer is lost`
  return rate === null ? how : `${how}, at most ${approximateSize(rate)}/s`
}

export function mirrorTable(mirrors: readonly MirrorInfo[]): string[] {
  const columns = [
    { title: 'volume' },
    { title: 'mirror' },
    { title: 'role' },
    { title: 'mode' },
    { title: 'target' },
    { title: 'lag' },
    { title: 'state' },
  ]
  const rows = mirrors.map((info) => [
    info.volume,
    info.name,
    info.role,
    info.mode,
    targetText(info),
    lagText(info),
    mirrorStateText(info),
  ])
  return table(columns, rows)
}

function targetText({ kind, peer, target }: MirrorInfo): string {
  return kind === 'nbd' ? peer : `${target} of ${peer}`
}

/** One line for the work of a mirror, or for its state where it has none. */
export function mirrorBar(info: MirrorInfo, columns: number, unicode: boolean): string {
  const { progress } = info
  if (progress === null) return `${mirrorLabel(info)}  ${mirrorStateText(info)}`
  const { done, total, speed, remainingMs, what } = progress
  const doing = {
    done,
    total,
    speed: speed > 0 ? speed : null,
    remaining: remainingMs === null ? null : remainingMs / 1000,
    state: 'waiting',
  }
  return progressBar(`${mirrorLabel(info)} ${WORK[what]}`, doing, columns, unicode)
}

/** What a change of role has done; what a forced one leaves behind is told while it is still there. */
export function roleText(info: MirrorInfo): string {
  const text = `mirror ${mirrorLabel(info)}: this side is the ${info.role} now`
  const { changed } = info.local
  if (info.role === 'primary') {
    const waits = info.mode === 'sync' && info.onLoss === 'block' && !info.connected
    const how = '`mirror set --on-loss continue` or `mirror pause`'
    return waits ? `${text}; writes wait until the other side is back: ${how} lets them go on` : text
  }
  if (changed === 0) return text
  return `${text}; the other side lacks ${formatSize(changed)} of what was changed here, which is thrown away when that one is promoted`
}

export function mirrorLines(info: MirrorInfo): string[] {
  const { counters, kind, role, verify, progress } = info
  const here = role === 'primary' ? 'sends' : 'receives'
  const entries: [string, string][] = [
    ['mirror', mirrorLabel(info)],
    ['relation', info.relation],
    ['role', `${role}: this side ${here}`],
    ['peer', kind === 'nbd' ? info.peer : `${info.peer}, volume ${info.target}`],
    ['address', info.address ?? 'the peer connects to this side'],
    ['mode', modeText(info)],
    ['begun with', INIT[info.init]],
    ['state', `${mirrorStateText(info)}, since ${info.since}`],
    ['connected', info.connected ? 'yes' : 'no'],
    ['secondary', consistencyText(info)],
    ['lag', lagText(info)],
  ]
  if (progress !== null) {
    const { done, total, speed, remainingMs } = progress
    const left = remainingMs === null ? '' : `, ${duration(remainingMs / 1000)} left`
    entries.push([
      WORK[progress.what],
      `${approximateSize(done)} of ${approximateSize(total)}, ${approximateSize(Math.round(speed))}/s${left}`,
    ])
  }
  entries.push(
    [
      'sent',
      `${approximateSize(counters.sentBytes)} in ${plural(counters.units, 'copy unit')} of ${formatSize(info.unitBytes)}, ` +
        `${plural(counters.holes, 'hole')}; ${approximateSize(counters.wireBytes)} on the wire`,
    ],
    [
      'done',
      `${plural(counters.cycles, 'cycle')} (last agreed: ${info.cycle}), ${plural(counters.signatures, 'region')} compared, ` +
        `${plural(counters.saves, 'unit')} saved, ${plural(counters.forwarded, 'request')} to both sides` +
        (counters.laneWrites > 0 ? `, ${counters.laneWrites} of them on lanes` : ''),
    ],
    ['this side', sideText(info.local)],
    ['other side', info.remote === null ? 'not known yet' : sideText(info.remote)],
  )
  if (verify !== null) entries.push(['verified', verifyText(verify)])
  return pairs(entries)
}

const INIT = {
  realized: 'what either side has realized',
  signature: 'signatures of everything',
  full: 'everything realized here',
} as const

function consistencyText({ consistent, pointInTime }: MirrorInfo): string {
  if (!consistent) return 'not consistent yet'
  return pointInTime ? 'a point in time' : 'consistent; while a cycle is sent it is not (NBD export)'
}

function sideText(side: MirrorSide): string {
  const consistent = side.consistent ? '' : ', not consistent'
  const changed = side.changed > 0 ? `, ${approximateSize(side.changed)} changed since both were equal` : ''
  return `${side.role}, ${approximateSize(side.size)}, generation ${side.generation.slice(0, 8)}${changed}${consistent}`
}

/** One sentence. */
export function verifyText(verify: VerifyResult): string {
  const compared = `${approximateSize(verify.compared)} compared`
  if (verify.failure !== null) return `${compared}, then failed: ${verify.failure}`
  const running = verify.ended === null ? ' so far' : ''
  if (verify.differing === 0) return `${compared}${running}, no differences`
  const repaired = verify.repaired ? ', repaired' : ''
  return `${compared}${running}, ${formatSize(verify.differing)} differ${repaired}`
}

/** A table of what differs, and a remark where there is more than it shows. */
export function differenceLines(verify: VerifyResult): string[] {
  const { differences, differing } = verify
  if (differences.length === 0) return []
  const line = (offset: string, length: string) => `${padStart(offset, 16)}  ${padStart(length, 16)}`
  const shown = differences.reduce((sum, { length }) => sum + length, 0)
  const lines = [
    line('OFFSET', 'LENGTH'),
    ...differences.map(({ offset, length }) => line(formatSize(offset), formatSize(length))),
  ]
  if (shown < differing) lines.push(`and more: ${formatSize(differing - shown)} are not listed`)
  return lines
}
