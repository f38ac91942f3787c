import { UserError } from './errors.ts'

const UNITS_MS: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 }

/**
 * Parses `500ms`, `5s`, `1.5m`, `2h`, `1d` into milliseconds.
 * @param what names the option in the error
 * @throws UserError USAGE when it is no duration, has no unit, is not a whole number of milliseconds or is past 2^53
 */
export function parseDuration(text: string, what = 'duration'): number {
  const match = /^(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)$/.exec(text.trim())
  const unit = UNITS_MS[match?.[2] ?? '']
  if (match === null || unit === undefined) {
    throw new UserError(
      'USAGE',
      `${what} "${text}" is not a duration: use ms, s, m, h, d (for example 500ms, 5s or 2m)`,
    )
  }
  const exact = Number(match[1]) * unit
  const ms = Math.round(exact)
  if (Math.abs(exact - ms) > 1e-6 * Math.max(1, ms)) {
    throw new UserError('USAGE', `${what} "${text}" is not a whole number of milliseconds`)
  }
  if (!Number.isSafeInteger(ms))
    throw new UserError('USAGE', `${what} "${text}" is longer than this program can count`)
  return ms
}

/** 90000 → `90s`, 120000 → `2m`; exact, so it reads back to the same number. */
export function formatDuration(ms: number): string {
  for (const unit of ['d', 'h', 'm', 's']) {
    const scale = UNITS_MS[unit] ?? 1
    if (ms >= scale && ms % scale === 0) return `${ms / scale}${unit}`
  }
  return `${ms}ms`
}
