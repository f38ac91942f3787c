/**
 * What a daemon is told: the command line over a configuration file over the defaults. A file is JSON with the
 * keys of the command line; an unknown key or a value of the wrong kind is refused by name, never ignored.
 */
import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { resolve } from 'node:path'
import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { hasControlCharacters } from '../base/text.ts'
import { parseLinkAddress } from '../link/address.ts'
import type { SecurityOptions, TlsOptions } from '../link/security.ts'
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
  link?: string // HOST:PORT to listen on
  linkName?: string
  linkKey?: string // path
  linkTlsCert?: string // path
  linkTlsKey?: string // path
  linkTlsCa?: string // path
  linkAllowPlain?: boolean
}

/** The link to other daemons; what it is protected with counts also where this one only dials. */
export interface LinkConfig extends SecurityOptions {
  readonly listen: string | undefined // HOST:PORT, port 0 takes a free one; undefined: this daemon only dials
  readonly name: string // what this daemon calls itself
  readonly allowPlain: boolean
}

export interface DaemonConfig {
  readonly pool: string // absolute path
  readonly listen: readonly string[]
  readonly datapath: DatapathChoice
  readonly threads: number | undefined
  readonly hotRegions: number
  readonly logLevel: LogLevel
  readonly link: LinkConfig
}

export function defaultListen(pool: string): string {
  return formatNbdUri({ address: { transport: 'unix', path: resolve(pool, 'nbd.sock') } })
}

/** @throws UserError USAGE where what was said does not go together */
export function resolveConfig(pool: string, flags: ConfigValues, file: ConfigValues = {}): DaemonConfig {
  const listen = flags.listen ?? file.listen ?? [defaultListen(pool)]
  return {
    pool: resolve(pool),
    listen,
    datapath: flags.datapath ?? file.datapath ?? 'auto',
    threads: flags.threads ?? file.threads,
    hotRegions: flags.hotRegions ?? file.hotRegions ?? LIMITS.hotRegionsMax,
    logLevel: flags.logLevel ?? file.logLevel ?? 'info',
    link: resolveLink({ ...file, ...flags }),
  }
}

function resolveLink(values: ConfigValues): LinkConfig {
  const tls = resolveTls(values)
  const { link: listen, linkKey, linkName = hostname(), linkAllowPlain = false } = values
  if (listen !== undefined) parseLinkAddress(listen, 'link', 0)
  checkLinkName(linkName)
  return {
    listen,
    name: linkName,
    allowPlain: linkAllowPlain,
    ...(linkKey === undefined ? {} : { keyFile: resolve(linkKey) }),
    ...(tls === undefined ? {} : { tls }),
  }
}

/** Both sides prove themselves, so it is all three or none. */
function resolveTls({ linkTlsCert, linkTlsKey, linkTlsCa }: ConfigValues): TlsOptions | undefined {
  if (linkTlsCert !== undefined && linkTlsKey !== undefined && linkTlsCa !== undefined) {
    return { certificate: resolve(linkTlsCert), key: resolve(linkTlsKey), authority: resolve(linkTlsCa) }
  }
  const files = { 'link-tls-cert': linkTlsCert, 'link-tls-key': linkTlsKey, 'link-tls-ca': linkTlsCa }
  const missing = Object.entries(files).flatMap(([key, path]) => (path === undefined ? [key] : []))
  if (missing.length === 3) return undefined
  throw new UserError(
    'USAGE',
    `${Object.keys(files).join(', ')} go together: ${missing.join(' and ')} ${missing.length === 1 ? 'is' : 'are'} missing`,
  )
}

/** Peers take as many bytes as a volume's name has; the daemon appends eight digits of its pool (daemon.ts). */
const LINK_NAME_BYTES_MAX = LIMITS.volumeNameBytesMax - 9

function checkLinkName(name: string): void {
  const bytes = Buffer.byteLength(name)
  if (bytes >= 1 && bytes <= LINK_NAME_BYTES_MAX && !hasControlCharacters(name)) return
  throw new UserError(
    'USAGE',
    `link-name has to be 1 to ${LINK_NAME_BYTES_MAX} bytes without control characters, not ${JSON.stringify(name)}`,
  )
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
      case 'link':
        config.link = checkText(entry, key, source)
        break
      case 'link-name':
        config.linkName = checkText(entry, key, source)
        break
      case 'link-key':
        config.linkKey = checkText(entry, key, source)
        break
      case 'link-tls-cert':
        config.linkTlsCert = checkText(entry, key, source)
        break
      case 'link-tls-key':
        config.linkTlsKey = checkText(entry, key, source)
        break
      case 'link-tls-ca':
        config.linkTlsCa = checkText(entry, key, source)
        break
      case 'link-allow-plain':
        config.linkAllowPlain = checkFlag(entry, key, source)
        break
      default:
        throw new UserError('USAGE', `${source}: unknown key "${key}"; the keys are ${KEYS}`)
    }
  }
  return config
}

const KEYS =
  'listen, datapath, threads, hot-regions, log-level, link, link-name, link-key, link-tls-cert, link-tls-key, ' +
  'link-tls-ca and link-allow-plain'

function checkText(value: unknown, key: string, source: string): string {
  if (typeof value === 'string' && value !== '') return value
  throw new UserError('USAGE', `${source}: ${key} must be a text, not ${JSON.stringify(value)}`)
}

function checkFlag(value: unknown, key: string, source: string): boolean {
  if (typeof value === 'boolean') return value
  throw new UserError('USAGE', `${source}: ${key} must be true or false, not ${JSON.stringify(value)}`)
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
