/**
 * One daemon: a pool, the listener that brings clients to it, the front ends that control it, and its events.
 *
 * Start: the pool first (its lock makes this the only daemon, so stale sockets may be removed), then the sockets.
 * Stop: no new clients, then no new commands, then the pool drains, flushes and unlocks. What a client was
 * promised is durable by then or was never flushed.
 *
 *   starting --> serving --> draining --> stopped
 *       \                        \
 *        +--> failed <------------+
 */
import type { pino } from 'pino'
import { assert } from '../base/assert.ts'
import { messageOf } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Mirrors } from '../mirror/mirrors.ts'
import { Pool, type PoolEvent } from '../volume/pool.ts'
import type { DaemonConfig, LinkConfig } from './config.ts'
import { EventLog } from './events.ts'
import { PoolExports } from './exports.ts'
import { Listener } from './listener.ts'
import { VERSION } from './version.ts'

export type DaemonState = 'starting' | 'serving' | 'draining' | 'stopped' | 'failed'

const NEXT: Record<DaemonState, readonly DaemonState[]> = {
  starting: ['serving', 'failed'], // the pool is being opened, or sockets bound
  serving: ['draining'], // clients and commands are taken
  draining: ['stopped', 'failed'], // requests in flight are answered, metadata is made durable
  stopped: [], // the pool is closed and unlocked
  failed: [], // it could not be opened or closed; what was flushed is safe
}

/** Something that takes commands for the daemon; it is closed before the pool is. */
export interface FrontEnd {
  close(): Promise<void>
}

export class Daemon {
  readonly config: DaemonConfig
  readonly log: pino.Logger
  readonly events = new EventLog(LIMITS.eventsKept)
  readonly started = new Date()
  #state: DaemonState = 'starting'
  #pool: Pool | undefined
  #mirrors: Mirrors | undefined
  #listener: Listener | undefined
  readonly #frontEnds: FrontEnd[] = []
  #stopping: Promise<void> | undefined
  #probing: NodeJS.Timeout | undefined
  #probeRunning = false

  private constructor(config: DaemonConfig, log: pino.Logger) {
    this.config = config
    this.log = log
  }

  /** @throws UserError BUSY (another daemon has the pool), NOT_FOUND (no pool there), and what sockets throw */
  static async start(config: DaemonConfig, log: pino.Logger): Promise<Daemon> {
    const daemon = new Daemon(config, log)
    try {
      await daemon.#open()
    } catch (error) {
      daemon.#enter('failed')
      await daemon.#abandon()
      throw error
    }
    return daemon
  }

  get state(): DaemonState {
    return this.#state
  }

  get pool(): Pool {
    assert(this.#pool !== undefined, 'daemon has no pool yet')
    return this.#pool
  }

  get mirrors(): Mirrors {
    assert(this.#mirrors !== undefined, 'daemon has no mirrors yet')
    return this.#mirrors
  }

  /** NBD URIs, with ports as bound. */
  get listening(): readonly string[] {
    return this.#listener?.addresses() ?? []
  }

  addFrontEnd(frontEnd: FrontEnd): void {
    assert(this.#state === 'serving', 'front ends join a serving daemon')
    this.#frontEnds.push(frontEnd)
  }

  /** Every caller gets the same promise. Rejects when the pool could not be closed in order. */
  stop(): Promise<void> {
    this.#stopping ??= this.#stop()
    return this.#stopping
  }

  async #open(): Promise<void> {
    const { config, log } = this
    this.#pool = await Pool.open(config.pool, {
      datapath: config.datapath,
      ...(config.threads === undefined ? {} : { threads: config.threads }),
      hotSet: { regionsMax: config.hotRegions },
      log,
      onEvent: (event) => this.events.append(event), // the pool has logged it
    })
    // Before the first client: from then on every change is noted.
    this.#mirrors = await Mirrors.open({
      pool: this.#pool,
      link: { ...config.link, name: linkName(config.link, this.#pool.info().uuid) },
      software: `fullstripe ${VERSION}`,
      log: log.child({ part: 'link' }),
      event: (level, kind, object, message, who) => this.#tell(level, kind, object, message, who),
    })
    this.#listener = await Listener.open({ uris: config.listen, exports: new PoolExports(this.#pool), log })
    await this.#mirrors.listen()
    this.#enter('serving')
    const link = this.#mirrors.listening
    const peers = link === undefined ? '' : `, for peers on ${link}`
    this.#record('info', 'daemon.started', `serving on ${this.listening.join(' ')}${peers}`)
    this.#probing = setInterval(() => this.#probe(), LIMITS.memberProbeMs)
  }

  async #stop(): Promise<void> {
    this.#enter('draining')
    this.#record('info', 'daemon.draining', 'taking no new clients, answering what is in flight')
    clearInterval(this.#probing)
    try {
      await this.#listener?.close()
      this.events.close() // ends the streams that front ends would wait for
      for (const frontEnd of this.#frontEnds) await frontEnd.close()
      await this.#mirrors?.close()
      await this.pool.close()
    } catch (error) {
      this.#enter('failed')
      throw error
    }
    this.#enter('stopped')
  }

  /** After a failed start: whatever was opened is closed, and the first error stays the one that is reported. */
  async #abandon(): Promise<void> {
    try {
      await this.#listener?.close()
      await this.#mirrors?.close()
      await this.#pool?.close()
    } catch (error) {
      this.log.error({ err: error }, `closing after a failed start: ${messageOf(error)}`)
    }
  }

  /** Members that were removed or cut short are noticed even while nobody writes to them. */
  #probe(): void {
    if (this.#probeRunning) return
    this.#probeRunning = true
    this.pool
      .probeMembers()
      .catch((error: unknown) =>
        this.log.error({ err: error }, `looking after the members: ${messageOf(error)}`),
      )
      .finally(() => {
        this.#probeRunning = false
      })
  }

  #record(level: PoolEvent['level'], kind: string, message: string): void {
    this.#tell(level, kind, this.config.pool, message)
  }

  #tell(level: PoolEvent['level'], kind: string, object: string, message: string, who: object = {}): void {
    this.events.append({ time: new Date().toISOString(), level, kind, object, message })
    this.log[level]({ event: kind, object, ...who }, message)
  }

  #enter(next: DaemonState): void {
    assert(NEXT[this.#state].includes(next), `daemon: ${this.#state} -> ${next}`)
    this.#state = next
  }
}

/** Unique for each pool of a machine: peers pin identities under it. */
function linkName({ name }: LinkConfig, pool: string): string {
  return `${name}-${pool.slice(0, 8)}`
}
