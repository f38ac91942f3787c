import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import type { SecurityOptions } from '../../src/link/security.ts'
import { Mirrors } from '../../src/mirror/mirrors.ts'
import type { MirrorInfo } from '../../src/mirror/types.ts'
import type { NbdClient } from '../../src/nbd/client.ts'
import { createPool, type Pool, type PoolCreateOptions } from '../../src/volume/pool.ts'
import { FaultRelay, type FaultRelayOptions } from './fault-relay.ts'
import { until } from './poll.ts'
import { type DatapathChoice, ServedPool } from './served-pool.ts'

/** One daemon of a pair, in this process: a pool, its NBD clients, its mirrors and its link. */
export interface SideOptions {
  readonly datapath: DatapathChoice
  readonly pool?: PoolCreateOptions
  readonly security?: SecurityOptions
  readonly name?: string
  readonly listen?: string
  readonly threads?: number // of the native datapath
  readonly hotRegions?: number
}

export class Side {
  readonly directory: string
  readonly #options: SideOptions
  #served: ServedPool | undefined
  #mirrors: Mirrors | undefined
  readonly events: { kind: string; object: string; message: string }[] = []
  #listen = '127.0.0.1:0'

  static async create(options: SideOptions): Promise<Side> {
    const side = new Side(options)
    await createPool(side.directory, { capacity: 4 * 2 ** 30, ...options.pool })
    await side.open()
    return side
  }

  private constructor(options: SideOptions) {
    this.directory = join(mkdtempSync(join(tmpdir(), 'fullstripe-mirror-')), 'pool')
    this.#options = options
    this.#listen = options.listen ?? this.#listen
  }

  get pool(): Pool {
    if (this.#served === undefined) throw new Error('the side is closed')
    return this.#served.pool
  }
  get mirrors(): Mirrors {
    if (this.#mirrors === undefined) throw new Error('the side is closed')
    return this.#mirrors
  }
  get port(): number {
    return Number(this.mirrors.listening?.split(':').at(-1))
  }

  async open(): Promise<void> {
    const { datapath, name = 'side', threads, hotRegions } = this.#options
    const log = pino({ level: process.env['TEST_LOG'] ?? 'silent' })
    this.#served = await ServedPool.open(this.directory, datapath, {
      ...(threads === undefined ? {} : { threads }),
      ...(hotRegions === undefined ? {} : { hotSet: { regionsMax: hotRegions } }),
    })
    this.#mirrors = await Mirrors.open({
      pool: this.pool,
      log,
      link: {
        listen: this.#listen,
        name: `${name}-${this.pool.info().uuid.slice(0, 8)}`,
        ...this.#options.security,
      },
      software: 'test',
      event: (_level, kind, object, message) => this.events.push({ kind, object, message }),
    })
    await this.#mirrors.listen()
    this.#listen = `127.0.0.1:${this.port}` // the same again after a restart
  }

  uri(volume: string): string {
    if (this.#served === undefined) throw new Error('the side is closed')
    return this.#served.uri(volume)
  }

  connect(volume: string, contexts?: readonly string[]): Promise<NbdClient> {
    if (this.#served === undefined) throw new Error('the side is closed')
    return this.#served.connect(volume, contexts === undefined ? {} : { contexts })
  }

  async close(): Promise<void> {
    await this.#mirrors?.close()
    await this.#served?.close()
    this.#mirrors = undefined
    this.#served = undefined
  }

  async restart(): Promise<void> {
    await this.close()
    await this.open()
  }

  async destroy(): Promise<void> {
    await this.close()
    rmSync(join(this.directory, '..'), { recursive: true, force: true })
  }

  show(volume: string, name?: string): MirrorInfo {
    return this.mirrors.show(volume, name)
  }

  /** Resolves when the mirror is in one of the states. */
  async reach(volume: string, ...states: MirrorInfo['state'][]): Promise<MirrorInfo> {
    try {
      await until(() => states.includes(this.show(volume).state), states.join(' or '))
    } catch (error) {
      const { state, reason, progress } = this.show(volume)
      throw new Error(`the mirror is ${state} (${reason}), ${JSON.stringify(progress)}`, { cause: error })
    }
    return this.show(volume)
  }

  /** All of a volume's content, as a client reads it. */
  async content(volume: string): Promise<Buffer> {
    const target = Buffer.alloc(this.pool.volume(volume).size)
    for (let at = 0; at < target.length; at += 1 << 20) {
      await this.pool.volume(volume).read(at, target.subarray(at, Math.min(target.length, at + (1 << 20))))
    }
    return target
  }
}

/** Two sides, and a relay between them that can be a bad network. */
export class Pair {
  readonly one: Side
  readonly two: Side
  readonly relay: FaultRelay

  static async open(
    one: SideOptions,
    two: SideOptions = one,
    relay: Omit<FaultRelayOptions, 'port'> = {},
  ): Promise<Pair> {
    const sides = [
      await Side.create({ name: 'one', ...one }),
      await Side.create({ name: 'two', ...two }),
    ] as const
    return new Pair(sides[0], sides[1], await FaultRelay.open({ port: sides[1].port, ...relay }))
  }

  private constructor(one: Side, two: Side, relay: FaultRelay) {
    this.one = one
    this.two = two
    this.relay = relay
  }

  get address(): string {
    return `127.0.0.1:${this.relay.port}`
  }

  async close(): Promise<void> {
    await this.one.destroy()
    await this.two.destroy()
    await this.relay.close()
  }
}
