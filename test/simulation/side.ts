import { pino } from 'pino'
import { newIdentity } from '../../src/link/identity.ts'
import { MemoryPeers } from '../../src/link/peers.ts'
import { Mirrors } from '../../src/mirror/mirrors.ts'
import type { Pool } from '../../src/volume/pool.ts'
import type { Volume } from '../../src/volume/volume.ts'
import type { Event } from './history.ts'
import { CHUNK, Machine, type MachineShape } from './machine.ts'
import type { SimNetwork } from './network.ts'
import type { Process } from './process.ts'
import type { Scheduler } from './scheduler.ts'

/** One of two machines: the daemon that runs there, and what outlasts it. */
export type Phase = 'down' | 'opening' | 'open' | 'up'

/** Keys are the same in all simulations: making one takes as long as many steps. */
const IDENTITIES = new Map<string, ReturnType<typeof newIdentity>>()
const log = pino({ level: 'silent' })

export type OnEvent = (kind: string, message: string) => void

export class Side {
  readonly name: string
  readonly machine: Machine
  readonly #scheduler: Scheduler
  readonly #network: SimNetwork
  readonly #peers = new MemoryPeers()
  readonly #onEvent: OnEvent
  phase: Phase = 'down'
  process: Process | undefined
  #pool: Pool | undefined
  #mirrors: Mirrors | undefined
  /** What has happened since its content was looked at last. */
  event: Event = 'closed'
  /** Its content was looked at since it was opened. */
  looked = false
  boots = 0

  constructor(
    name: string,
    scheduler: Scheduler,
    network: SimNetwork,
    shape: MachineShape,
    onEvent: OnEvent,
  ) {
    this.name = name
    this.#scheduler = scheduler
    this.#network = network
    this.#onEvent = onEvent
    this.machine = new Machine(scheduler, shape, false)
  }

  get address(): string {
    return `${this.name}:1`
  }

  get pool(): Pool {
    if (this.#pool === undefined) throw new Error(`${this.name} is not open`)
    return this.#pool
  }

  get mirrors(): Mirrors {
    if (this.#mirrors === undefined) throw new Error(`${this.name} is not open`)
    return this.#mirrors
  }

  /** The mirrored volume, if it is there. */
  get volume(): Volume | undefined {
    return this.#pool?.volumes().find(({ name }) => name === VOLUME)
  }

  /** Opens the pool; peers are not let in yet. In the context of `process`. */
  async open(process: Process): Promise<void> {
    const random = this.#scheduler.random
    this.process = process
    this.phase = 'opening'
    this.boots++
    this.looked = false
    this.#pool = undefined
    this.#mirrors = undefined
    const pool = await this.machine.open(process, {
      inlineBytesMax: random.pick([0, CHUNK, 256 * 1024]),
      punches: random.below(2) === 0,
      hotSet: { regionsMax: random.pick([1, 2, 4, 64]), coolMs: random.pick([20, 1_000]) },
    })
    let identity = IDENTITIES.get(this.name)
    if (identity === undefined) {
      identity = newIdentity()
      IDENTITIES.set(this.name, identity)
    }
    this.#pool = pool
    this.#mirrors = await Mirrors.open({
      pool,
      log,
      link: { listen: this.address, name: this.name },
      software: 'simulation',
      event: (_level, kind, _object, message) => {
        this.#scheduler.trace(() => `  ${this.name}: ${kind}: ${message}`)
        this.#onEvent(kind, message)
      },
      world: {
        identity,
        peers: this.#peers,
        listen: (take) => this.#network.listen(this.name, process, take),
        dial: (address) => this.#network.dial(process, address.split(':')[0] ?? ''),
        random: () => random.below(1_000) / 1_000,
      },
    })
    this.phase = 'open'
  }

  /** Peers are let in, and dialled. */
  async listen(): Promise<void> {
    await this.mirrors.listen()
    this.phase = 'up'
  }

  /** All content, as a client reads it. */
  async content(volume: Volume): Promise<Buffer> {
    const content = Buffer.alloc(volume.size)
    await volume.read(0, content)
    return content
  }

  async close(): Promise<void> {
    await this.mirrors.close()
    await this.pool.close()
    this.event = 'closed'
  }

  /** The process is gone. @param power whether the machine's power fails, too */
  died(power: boolean, closed = false): void {
    const { process } = this
    if (process === undefined) return
    process.alive = false
    this.#scheduler.clear(process)
    this.#network.processDied(this.name, process, power)
    this.machine.processDied(process)
    if (power) {
      const told = this.machine.powerFailed()
      this.#scheduler.trace(() => `${this.name}: the power fails: ${told}`)
    } else this.#scheduler.trace(() => `${this.name}: the process is gone`)
    if (power) this.event = 'lost power'
    else if (!closed && this.event !== 'lost power') this.event = 'died'
    this.phase = 'down'
    this.process = undefined
  }

  /** Before the machine boots. @returns what is wrong with the pool */
  async check(): Promise<string | undefined> {
    const { findings } = await this.machine.check()
    const errors = findings.filter(({ severity }) => severity === 'error')
    this.machine.digest()
    if (errors.length === 0) return undefined
    return `check of ${this.name}: ${errors.map(({ object, message }) => `${object} ${message}`).join('; ')}`
  }
}

export const VOLUME = 'data'
