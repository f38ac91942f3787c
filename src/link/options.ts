/** What both ends of a link are given. */
import { randomUUID } from 'node:crypto'
import type { Clock } from '../base/clock.ts'
import { LIMITS } from '../base/limits.ts'
import type { GreetOptions } from './greet.ts'
import type { Party } from './handshake.ts'
import type { Capability } from './hello.ts'
import type { Identity } from './identity.ts'
import type { PeerStore } from './peers.ts'
import type { Security } from './security.ts'

/** As pino has it. */
export interface LinkLog {
  debug(fields: object, message: string): void
  info(fields: object, message: string): void
  warn(fields: object, message: string): void
}

export interface LinkOptions {
  readonly identity: Identity
  /** What this side calls itself: the peer pins the identity under it. Without control characters, up to 255 bytes. */
  readonly name: string
  readonly software: string // name and version, for the peer's logs
  readonly security: Security
  readonly peers: PeerStore
  readonly capabilities?: readonly Capability[]
  readonly log?: LinkLog
  readonly clock?: Clock
  /** Bytes that the peer may have on their way to us in each connection. */
  readonly window?: number
  readonly silenceMs?: number
  readonly handshakeMs?: number
  /** Of this run of the daemon. */
  readonly instance?: string
}

const SILENT_LOG: LinkLog = { debug: () => undefined, info: () => undefined, warn: () => undefined }

export function partyOf(options: LinkOptions): Party {
  return {
    identity: options.identity,
    name: options.name,
    instance: options.instance ?? randomUUID(),
    software: options.software,
    capabilities: options.capabilities ?? [],
    window: options.window ?? LIMITS.linkConnectionWindow,
    key: options.security.key,
  }
}

export function greetOptionsOf({ clock, window, silenceMs, handshakeMs }: LinkOptions): GreetOptions {
  return {
    ...(clock === undefined ? {} : { clock }),
    ...(window === undefined ? {} : { window }),
    ...(silenceMs === undefined ? {} : { silenceMs }),
    ...(handshakeMs === undefined ? {} : { handshakeMs }),
  }
}

export function logOf(options: LinkOptions): LinkLog {
  return options.log ?? SILENT_LOG
}
