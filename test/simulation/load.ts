import { StoreError } from '../../src/base/errors.ts'
import { COMMAND, COMMAND_FLAG } from '../../src/nbd/constants.ts'
import { NBD_ERRNO } from '../../src/nbd/errno.ts'
import type { Pool } from '../../src/volume/pool.ts'
import type { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import type { Process } from './process.ts'
import { SimClient } from './socket.ts'
import { intentsOf, isRefusal, type SimVolume, type SimVolumes, STRIPES_MAX, sizeOf } from './volumes.ts'

/**
 * What clients and an operator do to a pool in one life: connections that keep a few requests in flight each, and one
 * administrative change after the other. Answers are compared with the histories as they come.
 */
export interface LoadShape {
  readonly clients: number
  readonly requests: number // of all clients together
  readonly changes: number // of the operator
  readonly depth: number // requests that a client keeps in flight
  /** Shares of the kinds of request. */
  readonly mix: Readonly<Record<RequestKind, number>>
  /** No pool holds all that its volumes could. */
  readonly tight: boolean
}

export type RequestKind = 'write' | 'read' | 'trim' | 'zero' | 'flush'
export const KINDS: readonly RequestKind[] = ['write', 'read', 'trim', 'zero', 'flush']

interface Lane {
  readonly client: SimClient
  readonly volume: SimVolume
  readonly id: number
  inFlight: number
  next: number // where a sequential stream goes on; bytes
}

export class Load {
  readonly #process: Process
  readonly #random: Random
  readonly #pool: Pool
  readonly #volumes: SimVolumes
  readonly #shape: LoadShape
  readonly #stripeSize: number
  readonly #lanes: Lane[] = []
  readonly #fail: (problem: string) => void
  #left: number
  #changesUnderWay = 1
  answered = 0

  constructor(
    process: Process,
    pool: Pool,
    volumes: SimVolumes,
    shape: LoadShape,
    stripeSize: number,
    fail: (problem: string) => void,
  ) {
    this.#process = process
    this.#random = process.random
    this.#pool = pool
    this.#volumes = volumes
    this.#shape = shape
    this.#stripeSize = stripeSize
    this.#fail = fail
    this.#left = shape.requests
  }

  start(): void {
    for (let index = 0; index < this.#shape.clients; index++) this.#connect(index)
    this.#operate().then(
      () => {
        this.#changesUnderWay--
      },
      (error: unknown) => this.#fail(`an administrative change: ${String(error)}`),
    )
  }

  /** Everything was asked and answered, or lost with its connection. */
  get done(): boolean {
    if (this.#changesUnderWay > 0) return false
    return this.#lanes.every((lane) => lane.client.lost || (lane.inFlight === 0 && this.#left <= 0))
  }

  get story(): string {
    const waiting = this.#lanes.filter(({ client }) => !client.lost && client.outstanding > 0)
    return `${waiting.map(({ id, client }) => `client ${id} waits for ${client.outstanding} answers`).join(', ')}${this.#changesUnderWay > 0 ? ', an administrative change is under way' : ''}`
  }

  hangUp(): void {
    for (const { client } of this.#lanes) client.hangUp()
  }

  // ---- clients -----------------------------------------------------------------------------------------

  #connect(id: number): void {
    const { there } = this.#volumes
    if (there.length === 0) return
    const volume = this.#random.pick(there)
    const client = new SimClient(this.#process, id, () => {
      // Its volume was deleted: somebody else takes over what it had left to do.
      if (this.#process.alive && this.#left > 0) this.#connect(id + 100)
    })
    const lane: Lane = { client, volume, id, inFlight: 0, next: 0 }
    this.#lanes.push(lane)
    this.#pool.datapath.serve(this.#pool.volume(volume.name).exportId, {
      socket: client.server,
      received: Buffer.alloc(0),
      mode: 'simple',
      contexts: [],
      readOnly: false,
      onClose: () => {},
    })
    this.#think(lane)
  }

  #think(lane: Lane): void {
    this.#process.event('client', lane.id, () => {
      const burst = this.#random.below(4) === 0 ? this.#shape.depth : 1
      for (let n = 0; n < burst; n++) {
        if (this.#left <= 0 || lane.client.lost || lane.inFlight >= this.#shape.depth) return
        this.#left--
        lane.inFlight++
        this.#ask(lane)
      }
      if (lane.inFlight < this.#shape.depth) this.#think(lane)
    })
  }

  #ask(lane: Lane): void {
    const { volume, client, id } = lane
    const { history } = volume
    const random = this.#random
    const kind = this.#kind()
    const { resizes } = volume
    const flags = this.#flags(kind)
    const durable = (flags & COMMAND_FLAG.FUA) !== 0
    const { offset, length } = kind === 'flush' ? { offset: 0, length: 0 } : this.#range(lane, kind)
    const told = `client ${id} ${kind}${durable ? ' FUA' : ''} ${volume.name} ${offset / SECTOR}+${length / SECTOR}`
    const over = (errno: number, succeeded: () => string | undefined): void => {
      this.#process.scheduler.trace(() => `  answered ${errno}: ${told}`)
      this.answered++
      lane.inFlight--
      const problem = errno === 0 ? succeeded() : this.#judge(errno, volume, resizes, flags)
      if (problem !== undefined) this.#fail(`${told}: ${problem}`)
      this.#think(lane)
    }
    switch (kind) {
      case 'write': {
        const token = this.#volumes.newToken()
        const { data, answered } = history.write(offset, length, token)
        this.#process.scheduler.trace(() => `  ${told} of ${token}`)
        client.request(COMMAND.WRITE, flags, offset, length, data, (errno) => {
          over(errno, () => void answered(durable))
        })
        return
      }
      case 'read': {
        const check = history.read(offset, length)
        this.#process.scheduler.trace(() => `  ${told}`)
        client.request(COMMAND.READ, 0, offset, length, undefined, (errno, data) =>
          over(errno, () => check(data)),
        )
        return
      }
      case 'trim':
      case 'zero': {
        const answered = history.zero(offset, length)
        const command = kind === 'trim' ? COMMAND.TRIM : COMMAND.WRITE_ZEROES
        const extra = kind === 'zero' && random.below(4) === 0 ? COMMAND_FLAG.NO_HOLE : 0
        this.#process.scheduler.trace(() => `  ${told}${extra === 0 ? '' : ' NO_HOLE'}`)
        client.request(command, flags | extra, offset, length, undefined, (errno) => {
          over(errno, () => void answered(durable))
        })
        return
      }
      case 'flush': {
        const answered = history.flush()
        this.#process.scheduler.trace(() => `  ${told}`)
        client.request(COMMAND.FLUSH, 0, 0, 0, undefined, (errno) => over(errno, () => void answered()))
        return
      }
    }
  }

  #kind(): RequestKind {
    const { mix } = this.#shape
    let roll = this.#random.below(KINDS.reduce((sum, kind) => sum + mix[kind], 0))
    for (const kind of KINDS) {
      roll -= mix[kind]
      if (roll < 0) return kind
    }
    return 'write'
  }

  #flags(kind: RequestKind): number {
    if (kind === 'read' || kind === 'flush') return 0
    const fast = kind === 'zero' && this.#random.below(6) === 0 ? COMMAND_FLAG.FAST_ZERO : 0
    return fast | (this.#random.below(10) === 0 ? COMMAND_FLAG.FUA : 0)
  }

  /** Sectors, stripes, units, more than a unit, everything; streams; most of it in few places, so that requests meet. */
  #range(lane: Lane, kind: RequestKind): { offset: number; length: number } {
    const { size, options } = lane.volume
    const random = this.#random
    const unit = (options.formatUnit ?? 1) * this.#stripeSize
    const within = (offset: number, length: number): { offset: number; length: number } => {
      const from = Math.min(offset, size - SECTOR)
      return { offset: from, length: Math.max(SECTOR, Math.min(length, size - from)) }
    }
    const places = random.below(2) === 0 ? Math.max(1, Math.ceil(size / 4)) : size
    const offset = random.below(places / SECTOR) * SECTOR
    const whole = kind === 'trim' || kind === 'zero' ? 6 : 4
    switch (random.below(whole + 5)) {
      case 0:
        return within(offset, SECTOR)
      case 1:
        return within(offset, SECTOR * (1 + random.below((2 * this.#stripeSize) / SECTOR)))
      case 2: {
        if (lane.next >= size) lane.next = 0
        const range = within(lane.next, this.#stripeSize / 2)
        lane.next = range.offset + range.length
        return range
      }
      case 3:
        return within(Math.floor(offset / this.#stripeSize) * this.#stripeSize, this.#stripeSize)
      case 4:
        return within(offset, unit + random.below(3) * this.#stripeSize)
      case 5:
        return random.below(3) === 0 ? { offset: 0, length: size } : within(offset, SECTOR * 3)
      default:
        return within(Math.floor(offset / unit) * unit, unit * (1 + random.below(3)))
    }
  }

  /** @returns why an error is not to be expected here */
  #judge(errno: number, volume: SimVolume, resizes: number, flags: number): string | undefined {
    if (this.#process.faulted) return undefined
    if (errno === NBD_ERRNO.ENOSPC && this.#shape.tight) return undefined
    if (errno === NBD_ERRNO.ENOTSUP && (flags & COMMAND_FLAG.FAST_ZERO) !== 0) return undefined
    const resized = volume.resizes !== resizes || volume.nextSizes.length > 0
    if (resized && (errno === NBD_ERRNO.ENOSPC || errno === NBD_ERRNO.EINVAL)) return undefined
    return `error ${errno}, and nothing has failed`
  }

  // ---- the operator --------------------------------------------------------------------------------------

  async #operate(): Promise<void> {
    for (let n = 0; n < this.#shape.changes; n++) {
      await new Promise<void>((resolve) => this.#process.event('operator', n, resolve))
      const { there } = this.#volumes
      const volume = there.length > 0 ? this.#random.pick(there) : undefined
      const action = this.#random.below(10)
      if (volume === undefined || (action < 3 && there.length < 5)) await this.#create()
      else if (action < 5 && there.length > 1) await this.#delete(volume)
      else if (action < 8) await this.#resize(volume)
      else if (volume.options.provision === 'thick') await this.#format(volume)
      else await this.#flush(volume)
    }
  }

  async #create(): Promise<void> {
    const random = this.#random
    const formatUnit = random.pick([1, 1, 2, 3])
    const options = {
      name: this.#volumes.newName(),
      size: sizeOf(
        1 + random.below(10),
        this.#stripeSize,
        random.below(2) * random.below(this.#stripeSize / SECTOR),
      ),
      provision: random.below(3) === 0 ? ('thick' as const) : ('thin' as const),
      formatUnit,
      fill: random.below(4) === 0 ? 0xee : 0,
      ...intentsOf(random, formatUnit * this.#stripeSize),
    }
    const volume = this.#volumes.add(options)
    await this.#change(
      `create ${volume.name}`,
      () => this.#pool.createVolume(options).then(() => {}),
      () => {
        volume.state = 'there'
        if (this.#left > 0) this.#connect(20 + random.below(20))
      },
      () => {
        // Where nobody knows what was stored, the next restart tells.
        if (!this.#process.commitUncertain) volume.state = 'deleted'
      },
    )
  }

  async #delete(volume: SimVolume): Promise<void> {
    volume.state = 'deleting'
    await this.#change(
      `delete ${volume.name}`,
      () => this.#pool.deleteVolume(volume.name, { force: true }),
      () => {
        volume.state = 'deleted'
      },
      () => {
        if (!this.#process.commitUncertain) volume.state = 'there'
      },
    )
  }

  async #resize(volume: SimVolume): Promise<void> {
    const random = this.#random
    const stripes = Math.ceil(volume.size / this.#stripeSize)
    const wanted = Math.max(1, Math.min(STRIPES_MAX, stripes + random.pick([-8, -3, -1, 0, 1, 2, 7])))
    const size = sizeOf(wanted, this.#stripeSize, random.below(2) * random.below(this.#stripeSize / SECTOR))
    volume.nextSizes.push(size)
    const before = volume.size
    const gone = size < before ? volume.history.cutOff(size, before - size) : undefined
    await this.#change(
      `resize ${volume.name} from ${before / SECTOR} to ${size / SECTOR} sectors`,
      () => this.#pool.volume(volume.name).resize(size, { force: true }),
      () => {
        gone?.()
        volume.size = size
        if (!this.#process.commitUncertain) volume.nextSizes = []
        volume.resizes++
      },
      () => {
        volume.resizes++
        if (!this.#process.commitUncertain) volume.nextSizes = []
      },
    )
  }

  async #format(volume: SimVolume): Promise<void> {
    const running = this.#pool.volume(volume.name).info().formatter.state === 'running'
    const rate = this.#random.below(2) === 0 ? null : 64 * this.#stripeSize
    await this.#change(`formatter of ${volume.name}`, () => {
      const at = this.#pool.volume(volume.name)
      return running ? at.pauseFormatter() : at.startFormatter({ rate })
    })
  }

  async #flush(volume: SimVolume): Promise<void> {
    const answered = volume.history.flush()
    await this.#change(`flush ${volume.name}`, () => this.#pool.volume(volume.name).flush(), answered)
  }

  async #change(
    told: string,
    action: () => Promise<void>,
    done: () => void = () => {},
    failed: () => void = () => {},
  ): Promise<void> {
    const { scheduler } = this.#process
    scheduler.trace(() => `  ${told}`)
    try {
      await action()
    } catch (error) {
      scheduler.trace(() => `  ${told}: ${String(error)}`)
      if (!isRefusal(error) && !(error instanceof StoreError)) throw error
      if (!this.#process.faulted && !this.#shape.tight) this.#fail(`${told}: ${String(error)}`)
      failed()
      return
    }
    scheduler.trace(() => `  done: ${told}`)
    done()
  }
}
