import { UserError } from './errors.ts'

const UNITS: Record<string, number> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40, P: 2 ** 50 }

/**
 * Parses `4096`, `64K`, `10G`, `1.5T`, `64KiB` (powers of 1024) into bytes.
 * @param what names the option in the error
 * @throws UserError USAGE when it is no size, is not a whole number of bytes or is past 2^53
 */
export function parseSize(text: string, what = 'size'): number {
  const match = /^(\d+(?:\.\d+)?)\s*(?:([KMGTP])(?:i?B)?|B?)$/i.exec(text.trim())
  const unit = UNITS[(match?.[2] ?? '').toUpperCase()]
  if (match === null || unit === undefined) {
    throw new UserError(
      'USAGE',
      `${what} "${text}" is not a size: write bytes or use K, M, G, T, P (for example 64K or 10G)`,
    )
  }
  const bytes = Number(match[1]) * unit
  if (!Number.isInteger(bytes))
    throw new UserError('USAGE', `${what} "${text}" is not a whole number of bytes`)
  if (!Number.isSafeInteger(bytes))
    throw new UserError('USAGE', `${what} "${text}" is larger than this program can count`)
  return bytes
}

/** 65536 → `64K`; exact, so it reads back to the same number. */
export function formatSize(bytes: number): string {
  for (const unit of ['P', 'T', 'G', 'M', 'K']) {
    const scale = UNITS[unit] ?? 1
    if (bytes >= scale && bytes % scale === 0) return `${bytes / scale}${unit}`
  }
  return String(bytes)
}

/** 1234567 → `1.2M`; rounded, for people. */
export function approximateSize(bytes: number): string {
  const units = ['', 'K', 'M', 'G', 'T', 'P']
  let value = bytes
  let unit = 0
  // 1023.96K would be rounded to 1024K; it is a little less than 1.0M, and reads better as that.
  for (; unit < units.length - 1 && value >= (unit === 0 ? 1024 : 1023.5); unit++) value /= 1024
  if (unit === 0) return `${bytes}`
  return `${Number.isInteger(value) || value >= 99.95 ? value.toFixed(0) : value.toFixed(1)}${units[unit]}`
}
