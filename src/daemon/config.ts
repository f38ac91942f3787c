/**
 * What a daemon is told: the command line over a configuration file over the defaults. A file is JSON with the
 * keys of the command line; an unknown key or a value of the wrong kind is refused by name, never ignored.
 */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatNbdUri } from '../nbd/uri.ts'

export const DATAPATH_CHOICES = ['auto', 'native', 'portable'] as const
export type DatapathChoice = (typeof DATAPATH_CHOICES)[number]

export const LOG_LEVELS = ['debug', 'info', 'warn', 'error', 'silent'] as const
export type LogLevel = (typeof LOG_LEVELS)[number]

/** What a configuration file or the command line may say; what is absent is decided elsewhere. */
export interface ConfigValues {
  listen?: readonly string[] // NBD URIs
  datapath?: DatapathChoice
  threads?: number // I/O threads; absent: the datapath decides
  hotRegions?: number // most regions announced at a time
  logLevel?: LogLevel
}

export interface DaemonConfig {
  readonly pool: string // absolute path
  readonly listen: readonly string[]
  readonly datapath: DatapathChoice
  readonly threads: number | undefined
  readonly hotRegions: number
  readonly logLevel: LogLevel
}

export function defaultListen(pool: string): string {
  return formatNbdUri({ address: { transport: 'unix', path: resolve(pool, 'nbd.sock') } })
}

export function resolveConfig(pool: string, flags: ConfigValues, file: ConfigValues = {}): DaemonConfig {
  const listen = flags.listen ?? file.listen ?? [defaultListen(pool)]
  return {
    pool: resolve(pool),
    listen,
    datapath: flags.datapath ?? file.datapath ?? 'auto',
    threads: flags.threads ?? file.threads,
    hotRegions: flags.hotRegions ?? file.hotRegions ?? LIMITS.hotRegionsMax,
    logLevel: flags.logLevel ?? file.logLevel ?? 'info',
  }
}

/** @throws UserError USAGE that names the file and, where there is one, the key */
export function readConfigFile(path: string): ConfigValues {
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (error) {
    throw new UserError('USAGE', `cannot read the configuration file ${path}: ${messageOf(error)}`, {
      cause: error,
    })
  }
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (error) {
    throw new UserError('USAGE', `${path} is not JSON: ${messageOf(error)}`, { cause: error })
  }
  return checkConfig(value, path)
}

/** The same checks for whatever source; `source` is named in the errors. */
export function checkConfig(value: unknown, source: string): ConfigValues {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new UserError('USAGE', `${source} must hold one JSON object, for example {"threads": 2}`)
  }
  const config: ConfigValues = {}
  for (const [key, entry] of Object.entries(value)) {
    switch (key) {
      case 'listen':
        config.listen = checkListen(entry, source)
        break
      case 'datapath':
        config.datapath = oneOf(DATAPATH_CHOICES, entry, 'datapath', source)
        break
      case 'threads':
        config.threads = checkCount(entry, 'threads', LIMITS.datapathThreadsMax, source)
        break
      case 'hot-regions':
        config.hotRegions = checkCount(entry, 'hot-regions', LIMITS.hotRegionsLimit, source)
        break
      case 'log-level':
        config.logLevel = oneOf(LOG_LEVELS, entry, 'log-level', source)
        break
      default:
        throw new UserError(
          'USAGE',
          `${source}: unknown key "${key}"; the keys are listen, datapath, threads, hot-regions and log-level`,
        )
    }
  }
  return config
}

function checkCount(value: unknown, key: string, max: number, source: string): number {
  if (typeof value === 'number' && Number.isInteger(value) && value >= 1 && value <= max) return value
  throw new UserError(
    'USAGE',
    `${source}: ${key} must be a whole number from 1 to ${max}, not ${JSON.stringify(value)}`,
  )
}

function checkListen(value: unknown, source: string): readonly string[] {
  const list = typeof value === 'string' ? [value] : value
  if (
    Array.isArray(list) &&
    list.length > 0 &&
    list.every((item) => typeof item === 'string' && item !== '')
  ) {
    return list
  }
  throw new UserError(
    'USAGE',
    `${source}: listen must be a list of NBD URIs, for example ["nbd://127.0.0.1:10809"]`,
  )
}

function oneOf<T extends string>(choices: readonly T[], value: unknown, key: string, source: string): T {
  const found = choices.find((choice) => choice === value)
  if (found !== undefined) return found
  throw new UserError(
    'USAGE',
    `${source}: ${key} must be one of ${choices.join(', ')}, not ${JSON.stringify(value)}`,
  )
}
