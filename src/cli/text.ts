/** Text for terminals: widths, tables, bars. Pure functions. */
import { stripVTControlCharacters } from 'node:util'
import { approximateSize } from '../base/sizes.ts'

/** Columns a text takes in a terminal; no control characters in it but escape sequences. */
export function textWidth(text: string): number {
  const shown = text.includes('\x1b') ? stripVTControlCharacters(text) : text
  let width = 0
  for (const { segment } of new Intl.Segmenter('en', { granularity: 'grapheme' }).segment(shown)) {
    width += isWide(segment.codePointAt(0) ?? 0) ? 2 : 1
  }
  return width
}

/** East Asian wide characters and emoji (Unicode, "East Asian Width", in whole blocks). */
function isWide(code: number): boolean {
  return (
    (code >= 0x1100 && code <= 0x115f) ||
    (code >= 0x2e80 && code <= 0xa4cf) ||
    (code >= 0xac00 && code <= 0xd7a3) ||
    (code >= 0xf900 && code <= 0xfaff) ||
    (code >= 0xfe30 && code <= 0xfe6f) ||
    (code >= 0xff00 && code <= 0xff60) ||
    (code >= 0xffe0 && code <= 0xffe6) ||
    (code >= 0x1f300 && code <= 0x1faff) ||
    (code >= 0x20000 && code <= 0x3fffd)
  )
}

export function padEnd(text: string, width: number): string {
  return text + ' '.repeat(Math.max(0, width - textWidth(text)))
}

export function padStart(text: string, width: number): string {
  return ' '.repeat(Math.max(0, width - textWidth(text))) + text
}

/** Cut to a width, so that a line that is redrawn never wraps. Where it is cut, it loses its colours. */
export function truncate(text: string, width: number): string {
  if (textWidth(text) <= width) return text
  let result = ''
  let used = 0
  const shown = stripVTControlCharacters(text)
  for (const { segment } of new Intl.Segmenter('en', { granularity: 'grapheme' }).segment(shown)) {
    const next = isWide(segment.codePointAt(0) ?? 0) ? 2 : 1
    if (used + next > width - 1) break
    result += segment
    used += next
  }
  return `${result}…`
}

export interface Column {
  readonly title: string
  readonly right?: boolean // numbers line up at their end
}

/** Lines of a table: a title row in capitals, two spaces between columns. */
export function table(columns: readonly Column[], rows: readonly (readonly string[])[]): string[] {
  const titles = columns.map((column) => column.title.toUpperCase())
  const widths = columns.map((_, index) =>
    [titles, ...rows].reduce((width, row) => Math.max(width, textWidth(row[index] ?? '')), 0),
  )
  const line = (cells: readonly string[]) =>
    columns
      .map(({ right }, index) => (right === true ? padStart : padEnd)(cells[index] ?? '', widths[index] ?? 0))
      .join('  ')
      .trimEnd()
  return [line(titles), ...rows.map(line)]
}

/** Lines of `label  value` pairs, values lined up. */
export function pairs(entries: readonly (readonly [string, string])[]): string[] {
  const width = entries.reduce((most, [label]) => Math.max(most, textWidth(label)), 0)
  return entries.map(([label, value]) => `${padEnd(label, width)}  ${value}`.trimEnd())
}

/** 12.4 %; never 0 % of something nor 100 % of less than all. */
export function percent(part: number, whole: number): string {
  if (whole <= 0) return '-'
  if (part >= whole) return '100 %'
  if (part <= 0) return '0 %'
  const value = (100 * part) / whole
  if (value < 0.1) return '<0.1 %'
  if (value > 99.9) return '>99.9 %'
  return `${value.toFixed(1)} %`
}

/** 93 → `1m33s`, 7384 → `2h03m`; seconds in. */
export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return 'unknown'
  const whole = Math.max(0, Math.round(seconds))
  const two = (value: number) => String(value).padStart(2, '0')
  if (whole < 60) return `${whole}s`
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`
  if (whole < 86_400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`
  return `${Math.floor(whole / 86_400)}d${two(Math.floor((whole % 86_400) / 3600))}h`
}

export interface Progress {
  readonly done: number
  readonly total: number
  readonly speed: number | null // bytes a second; null: nothing moves
  readonly remaining: number | null // seconds; null: not known
  readonly state: string // said instead of speed and time where nothing moves
}

/** `log  ████████▌         42.1 %   118M/s  3m12s left`; not wider than `columns` if that is possible. */
export function progressBar(label: string, progress: Progress, columns: number, unicode: boolean): string {
  const { done, total, speed, remaining, state } = progress
  const left = remaining === null ? '' : `  ${duration(remaining)} left`
  const rest = speed === null ? state : `${padStart(approximateSize(Math.round(speed)), 6)}/s${left}`
  const tail = `  ${padStart(percent(done, total), 6)}  ${rest}`
  const width = Math.max(8, Math.min(40, columns - textWidth(label) - textWidth(tail) - 2))
  return `${label}  ${bar(total === 0 ? 1 : done / total, width, unicode)}${tail}`
}

/** A bar of `width` columns; `unicode` draws eighths. */
export function bar(share: number, width: number, unicode: boolean): string {
  const filled = Math.min(1, Math.max(0, share)) * width
  if (!unicode) return '#'.repeat(Math.floor(filled)).padEnd(width, '.')
  const eighths = Math.floor(filled * 8)
  const part = ' ▏▎▍▌▋▊▉'[eighths % 8] ?? ' '
  const full = Math.floor(eighths / 8)
  return `${'█'.repeat(full)}${full < width ? part : ''}`.padEnd(width)
}

export function plural(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`
}
