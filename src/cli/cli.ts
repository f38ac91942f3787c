/** What every command group gets: the options all commands share, and where to write. */
import type { Argv } from 'yargs'
import { UserError } from '../base/errors.ts'
import { Client } from './client.ts'
import type { Output } from './output.ts'

/** Options before or after any command. */
export interface Globals {
  json: boolean
  pool: string | undefined
}
export type Root = Argv<Globals>

export interface Cli {
  readonly output: Output
  /** Ends the process with this code when the command has returned. */
  exitCode: number
}

/** `--pool`, or FULLSTRIPE_POOL. @throws UserError USAGE where neither says which */
export function poolOf(argv: { pool: string | undefined }): string {
  const { FULLSTRIPE_POOL } = process.env
  const pool = argv.pool ?? FULLSTRIPE_POOL
  if (pool === undefined || pool === '') {
    throw new UserError('USAGE', 'which pool? give --pool DIR or set FULLSTRIPE_POOL')
  }
  return pool
}

export function clientOf(argv: { pool: string | undefined }): Client {
  return new Client(poolOf(argv))
}

/** A whole number option. @throws UserError USAGE */
export function parseCount(text: string, what: string, min: number, max: number): number {
  const value = /^(0[xX][0-9a-fA-F]{1,8}|\d{1,15})$/.test(text) ? Number(text) : Number.NaN
  if (Number.isInteger(value) && value >= min && value <= max) return value
  throw new UserError('USAGE', `${what} must be a whole number from ${min} to ${max}, not "${text}"`)
}

/** Aborts on SIGINT and SIGTERM, for commands that run until told to stop. */
export function interruption(): { readonly signal: AbortSignal; restore(): void } {
  const controller = new AbortController()
  const stop = () => controller.abort()
  process.once('SIGINT', stop)
  process.once('SIGTERM', stop)
  return {
    signal: controller.signal,
    restore: () => {
      process.off('SIGINT', stop)
      process.off('SIGTERM', stop)
    },
  }
}

/** Resolves after `milliseconds` or when the signal fires. */
export function pause(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal?.aborted === true) return resolve()
    const end = () => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', end)
      resolve()
    }
    const timer = setTimeout(end, milliseconds)
    signal?.addEventListener('abort', end)
  })
}
