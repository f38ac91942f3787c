/**
 * Where a command writes. Results go to stdout, for people or, with --json, for programs; errors are one line on
 * stderr. A reader that goes away (`| head`) ends the command quietly.
 */
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { ApiError } from './client.ts'

export class Output {
  json = false

  get terminal(): boolean {
    return process.stdout.isTTY === true
  }

  get columns(): number {
    const { COLUMNS } = process.env
    const columns = process.stdout.isTTY === true ? process.stdout.columns : Number(COLUMNS)
    return Number.isInteger(columns) && columns >= 20 ? columns : 80
  }

  get rows(): number {
    return process.stdout.isTTY === true ? process.stdout.rows : 24
  }

  /** Colour only where a person sees it and has not said no (https://no-color.org). */
  get colour(): boolean {
    const { NO_COLOR, TERM } = process.env
    return this.terminal && (NO_COLOR === undefined || NO_COLOR === '') && TERM !== 'dumb'
  }

  /** Block characters need a UTF-8 locale. */
  get unicode(): boolean {
    const { LC_ALL, LC_CTYPE, LANG, TERM } = process.env
    return TERM !== 'linux' && /utf-?8/i.test(LC_ALL || LC_CTYPE || LANG || '')
  }

  line(text = ''): void {
    process.stdout.write(`${text}\n`)
  }

  /** One result: an object for programs, lines for people. */
  result(value: unknown, lines: () => readonly string[]): void {
    if (this.json) this.line(JSON.stringify(value, undefined, 2))
    else for (const line of lines()) this.line(line)
  }

  /** One object of a stream, on a line of its own. */
  object(value: unknown): void {
    this.line(JSON.stringify(value))
  }

  /** Resolves when the reader can take more. */
  async drained(): Promise<void> {
    if (!process.stdout.writableNeedDrain) return
    await new Promise<void>((resolve) => process.stdout.once('drain', () => resolve()))
  }

  /** A remark beside the result. */
  note(text: string): void {
    if (!this.json) process.stderr.write(`fullstripe: ${text}\n`)
  }

  error(error: unknown): void {
    const { code, message } = describe(error)
    if (this.json) process.stderr.write(`${JSON.stringify({ error: { code, message } })}\n`)
    else process.stderr.write(`fullstripe: ${message}\n`)
  }
}

/** 0 done, 1 failed, 2 wrong usage, 3 daemon not reachable. */
export function exitCodeOf(error: unknown): number {
  switch (describe(error).code) {
    case 'USAGE':
      return 2
    case 'UNREACHABLE':
      return 3
    default:
      return 1
  }
}

function describe(error: unknown): { code: string; message: string } {
  const message = messageOf(error)
    .replaceAll(/\s*\n\s*/g, ' ')
    .trim()
  if (error instanceof UserError || error instanceof ApiError) return { code: error.code, message }
  return { code: systemCode(error) ?? 'FAILED', message }
}

/** `fullstripe ... | head` closes our stdout: that is an end, not an error. */
export function endOnClosedPipe(): void {
  process.stdout.on('error', (error) => {
    if (systemCode(error) === 'EPIPE') process.exit(0)
    throw error
  })
}
