import { Duplex } from 'node:stream'
import { LinkError } from '../../src/link/errors.ts'
import type { Wire } from '../../src/link/transport.ts'
import type { Process } from './process.ts'
import type { Scheduler } from './scheduler.ts'

/**
 * The network between machines: byte streams whose bytes arrive when the schedule says so, in pieces of any size, those of one connection
 * before or after those of another. It can be cut (whatever is on its way is lost, and both ends are told), and stand still
 * (nothing arrives, and nobody is told). A process that dies hangs up; a machine without power says nothing until it runs again.
 */
const NO_BINDING = Buffer.alloc(0)
/** How long an address that does not answer is waited for. */
const DIAL_MS = 2_000

type Item = Buffer | 'end' | 'reset'

interface Listener {
  readonly process: Process
  readonly take: (wire: Wire) => void
}

export class SimNetwork {
  readonly #scheduler: Scheduler
  readonly #listeners = new Map<string, Listener>()
  readonly #dark = new Set<string>() // machines without power
  #ends: End[] = []
  #lastWire = 0
  #still = false

  constructor(scheduler: Scheduler) {
    this.#scheduler = scheduler
  }

  get still(): boolean {
    return this.#still
  }

  get connections(): number {
    return this.#ends.length / 2
  }

  listen(machine: string, process: Process, take: (wire: Wire) => void): void {
    this.#listeners.set(machine, { process, take })
  }

  /** @throws LinkError */
  dial(process: Process, machine: string): Promise<Wire> {
    return new Promise((resolve, reject) => {
      const id = ++this.#lastWire
      process.event('dial', id, () => {
        const listener = this.#listeners.get(machine)
        if (this.#still || this.#dark.has(machine)) {
          setTimeout(() => reject(new LinkError('LATE', `${machine} does not answer`)), DIAL_MS)
          return
        }
        if (listener?.process.alive !== true) {
          reject(new LinkError('UNREACHABLE', `${machine} refuses connections`))
          return
        }
        const near = process.run(() => new End(this, process, 2 * id))
        const far = listener.process.run(() => new End(this, listener.process, 2 * id + 1))
        near.join(far)
        this.#ends.push(near, far)
        listener.process.event('accept', id, () => {
          far.taken()
          listener.take({ stream: far, binding: NO_BINDING, address: 'network' })
        })
        near.taken()
        resolve({ stream: near, binding: NO_BINDING, address: machine })
      })
    })
  }

  /** Cuts all connections, or one of them. */
  cut(which?: number): void {
    const ends = which === undefined ? this.#ends : this.#ends.slice(2 * which, 2 * which + 2)
    for (const end of [...ends]) end.reset()
  }

  /** Nothing arrives from now on. */
  stop(): void {
    this.#still = true
  }

  /** It goes on with what was on its way. */
  go(): void {
    this.#still = false
    for (const end of this.#ends) end.wake()
  }

  /** Its ends hang up; or, without power, fall silent. */
  processDied(machine: string, process: Process, power: boolean): void {
    if (this.#listeners.get(machine)?.process === process) this.#listeners.delete(machine)
    if (power) this.#dark.add(machine)
    for (const end of this.#ends.filter((each) => each.process === process)) end.died(power)
  }

  /** The machine has power again, and knows nothing of the connections that it had. */
  machineRuns(machine: string): void {
    if (!this.#dark.delete(machine)) return
    for (const end of [...this.#ends]) if (end.orphaned) end.reset()
  }

  forget(end: End): void {
    const index = this.#ends.findIndex((each) => each === end || each.isFarOf(end))
    if (index >= 0) this.#ends.splice(index - (index % 2), 2)
  }

  trace(line: () => string): void {
    this.#scheduler.trace(line)
  }
}

class End extends Duplex {
  readonly process: Process
  readonly #network: SimNetwork
  readonly #id: number
  #far: End | undefined
  #arriving: Item[] = []
  #planned = false
  #taken = false // by its process
  #hungry = false
  #gone = false // for the other end
  /** The machine on the other side has lost its power. */
  orphaned = false

  constructor(network: SimNetwork, process: Process, id: number) {
    super({ allowHalfOpen: false })
    this.#network = network
    this.process = process
    this.#id = id
  }

  join(far: End): void {
    this.#far = far
    far.#far = this
  }

  isFarOf(end: End): boolean {
    return this.#far === end
  }

  override _read(): void {
    this.#hungry = true
    this.#plan()
  }

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    // Copied when it leaves, not when it was handed over: until then the bytes have to stay what they are.
    this.process.event('send', this.#id, () => {
      if (this.destroyed) return
      this.#far?.arrive(Buffer.from(chunk))
      done()
    })
  }

  override _final(done: (error?: Error | null) => void): void {
    this.process.event('send', this.#id, () => {
      this.#far?.arrive('end')
      done()
    })
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#leave(this.process.random.below(2) === 0 ? 'end' : 'reset')
    done(error)
  }

  /** This end is told that the connection is no more; nothing else arrives. */
  reset(): void {
    this.#arriving = ['reset']
    this.#hungry = true
    this.#plan()
  }

  died(power: boolean): void {
    if (power && this.#far !== undefined) {
      this.#far.orphaned = true
      if (this.process.random.below(2) === 0) this.#far.#arriving = []
      this.#gone = true
    } else {
      this.#leave('reset')
    }
  }

  wake(): void {
    this.#plan()
  }

  /** The process has it from now on. */
  taken(): void {
    this.#taken = true
    this.#plan()
  }

  #leave(word: 'end' | 'reset'): void {
    if (this.#gone) return
    this.#gone = true
    this.#far?.arrive(word)
    if (this.#far?.left === true) this.#network.forget(this)
  }

  get left(): boolean {
    return this.#gone
  }

  arrive(item: Item): void {
    if (this.#gone || this.#arriving.includes('reset')) return
    this.#arriving.push(item)
    this.#plan()
  }

  #plan(): void {
    const first = this.#arriving[0]
    if (!this.#taken || this.#planned || this.#network.still || this.destroyed || first === undefined) return
    if (!this.#hungry && first !== 'reset') return
    this.#planned = true
    this.process.event('arrive', this.#id, () => {
      this.#planned = false
      if (this.destroyed || this.#network.still) return
      const item = this.#arriving.shift()
      if (item === 'end') this.push(null)
      else if (item === 'reset')
        this.destroy(Object.assign(new Error('reset by peer'), { code: 'ECONNRESET' }))
      else if (item !== undefined) this.#hungry = this.push(this.#piece(item))
      this.#plan()
    })
  }

  /** Pieces of any size: more than one write, or a part of one. */
  #piece(first: Buffer): Buffer {
    const { random } = this.process
    let piece = first
    while (random.below(3) === 0) {
      const next = this.#arriving[0]
      if (!(next instanceof Buffer)) break
      this.#arriving.shift()
      piece = Buffer.concat([piece, next])
    }
    if (random.below(8) > 0 || piece.length < 2) return piece
    const cut = 1 + random.below(piece.length - 1)
    this.#arriving.unshift(piece.subarray(cut))
    return piece.subarray(0, cut)
  }
}
