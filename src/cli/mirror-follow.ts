/** Watching a mirror until it is where somebody wants it, with a bar on a terminal. */
import { formatDuration } from '../base/durations.ts'
import { UserError } from '../base/errors.ts'
import { MIRROR_STATES, type MirrorState } from '../mirror/state.ts'
import type { MirrorInfo, VerifyResult } from '../mirror/types.ts'
import { type Cli, interruption, pause } from './cli.ts'
import { type Client, mirrorPath } from './client.ts'
import { mirrorBar, mirrorLabel, mirrorStateText } from './mirror-text.ts'
import { Screen } from './screen.ts'

export const GOALS = ['operation', 'consistent', ...MIRROR_STATES] as const
/** What may be waited for; `operation` is insync or cycling, as the mode has it. */
export type Goal = (typeof GOALS)[number]

const POLL_MS = 250
const REDRAW_MS = 500

/** @throws UserError where the mirror can never come there, or only with an operator's help */
export function reached(info: MirrorInfo, goal: Goal): boolean {
  if (goal === 'consistent' ? info.consistent : info.state === goal) return true
  if (goal === 'operation' && OPERATION[info.mode] === info.state) return true
  const label = mirrorLabel(info)
  if (info.state === 'splitbrain') {
    throw new UserError(
      'FAILED',
      `mirror ${label} is in split brain; settle it with: fullstripe mirror resolve ${info.volume} ${info.name} --discard local|remote`,
    )
  }
  const other = OPERATION[info.mode]
  if ((goal === 'insync' || goal === 'cycling') && goal !== other) {
    throw new UserError('REFUSED', `mirror ${label} is ${info.mode} and never ${goal}: wait for ${other}`)
  }
  return false
}

/**
 * Whether the comparison that was begun just now has ended.
 * @param last the one before
 * @throws UserError where it never will
 */
export function verified(info: MirrorInfo, last: VerifyResult | null): boolean {
  const { verify, role } = info
  if (verify === null) {
    const why = role === 'primary' ? 'the role of this side changed' : `this side is the ${role} now`
    throw new UserError('FAILED', `mirror ${mirrorLabel(info)}: the comparison did not end: ${why}`)
  }
  return verify.started !== last?.started && verify.ended !== null
}

const OPERATION: Record<MirrorInfo['mode'], MirrorState> = { sync: 'insync', async: 'cycling' }

export interface FollowOptions {
  readonly timeoutMs?: number | undefined
  readonly done: (info: MirrorInfo) => boolean
}

/** @throws UserError FAILED when it was interrupted or took too long, and what `done` throws */
export async function follow(
  client: Client,
  { volume, name }: Pick<MirrorInfo, 'volume' | 'name'>,
  { timeoutMs = Number.POSITIVE_INFINITY, done }: FollowOptions,
  cli: Cli,
): Promise<MirrorInfo> {
  const { output } = cli
  const stop = interruption()
  const screen = output.terminal && !output.json ? new Screen(output) : undefined
  const deadline = performance.now() + timeoutMs
  try {
    for (;;) {
      const info = await client.get<MirrorInfo>(mirrorPath(volume, name))
      screen?.draw([mirrorBar(info, output.columns, output.unicode)])
      if (done(info)) return info
      const still = `mirror ${mirrorLabel(info)} is ${mirrorStateText(info)}`
      if (stop.signal.aborted) throw new UserError('FAILED', `interrupted: ${still}, and goes on`)
      const left = deadline - performance.now()
      if (left <= 0) throw new UserError('FAILED', `after ${formatDuration(timeoutMs)} ${still}`)
      await pause(Math.min(left, screen === undefined ? POLL_MS : REDRAW_MS), stop.signal)
    }
  } finally {
    stop.restore()
  }
}
