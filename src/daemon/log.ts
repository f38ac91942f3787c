/**
 * The daemon's log goes to stderr: JSON lines for collectors, or one readable line an entry where stderr is a
 * terminal. Written synchronously, so that the last line before an exit is never lost.
 */
import { writeSync } from 'node:fs'
import { pino } from 'pino'
import type { LogLevel } from './config.ts'

export function createLog(level: LogLevel, terminal: boolean): pino.Logger {
  const options: pino.LoggerOptions = { level, base: { pid: process.pid } }
  if (!terminal) return pino(options, pino.destination({ fd: 2, sync: true }))
  return pino(options, { write: (line: string) => writeAll(readable(line)) })
}

/** Details of every line, which say nothing new to whoever sits at the terminal. */
const HIDDEN = new Set(['pid', 'hostname', 'event', 'object', 'pool'])

/** `12:43:01 warn  pool is 91 % full (object=pool)` */
export function readable(line: string): string {
  const parsed: unknown = JSON.parse(line)
  if (typeof parsed !== 'object' || parsed === null) return line
  const { level, time, msg, err, ...rest }: Record<string, unknown> = { ...parsed }
  const clock = new Date(Number(time)).toTimeString().slice(0, 8)
  const label = (pino.levels.labels[Number(level)] ?? 'info').padEnd(5)
  const details = Object.entries(rest)
    .filter(([key]) => !HIDDEN.has(key))
    .map(([key, value]) => `${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`)
  const tail = details.length > 0 ? ` (${details.join(', ')})` : ''
  return `${clock} ${label} ${String(msg ?? '')}${tail}${stackOf(err)}\n`
}

function stackOf(error: unknown): string {
  if (typeof error !== 'object' || error === null) return ''
  if ('stack' in error && typeof error.stack === 'string')
    return `\n  ${error.stack.replaceAll('\n', '\n  ')}`
  return ''
}

function writeAll(text: string): void {
  try {
    writeSync(2, text)
  } catch {
    // A log line that cannot be written (terminal gone, pipe full) must not stop a storage daemon.
  }
}
