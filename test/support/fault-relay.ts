/**
 * A TCP relay that is a bad network: it stands between two ends and delays, slows down, cuts, stalls, damages or swallows what passes.
 *
 *   near end (who connects) -- up -->  relay  -- up -->  far end (who listens)
 *                           <-- down --       <-- down --
 *
 * Delays keep the order within a connection, as TCP does; with jitter, or with a delay of its own for each connection, what
 * goes over different connections comes in another order. The bandwidth of a direction is shared by all connections, first come,
 * first served; a connection has no more in that queue than a little more than fits on the line, as with a good router.
 */
import { once } from 'node:events'
import { createServer, type Server, type Socket, connect as tcpConnect } from 'node:net'
import { Random } from './random.ts'

const BUFFERED_MIN = 128 * 1024
const BUFFERED_MAX = 32 * 1024 * 1024
/** What a router keeps beyond what is on the line, in milliseconds of its bandwidth. */
const ROUTER_MS = 10

export type Direction = 'up' | 'down'

/** One direction of the network. Changes count from the next bytes on. */
export interface Path {
  delayMs: number
  jitterMs: number // 0 to this much more, at random
  bytesPerSecond: number // Infinity: as fast as it goes
}

export interface FaultRelayOptions {
  readonly host?: string // of the far end
  readonly port: number
  readonly seed?: number
  /** One way, both directions. */
  readonly delayMs?: number
  readonly jitterMs?: number
  readonly bytesPerSecond?: number
  /** A further delay for each connection, counted from 0. */
  readonly delayOfConnection?: (index: number) => number
}

export class FaultRelay {
  readonly up: Path
  readonly down: Path
  /** What happens to connections that come: `forward` them, `reset` them, or accept them and stay `mute`. */
  onConnect: 'forward' | 'reset' | 'mute' = 'forward'
  /** Bytes that were passed on. */
  readonly passed: Record<Direction, number> = { up: 0, down: 0 }
  accepted = 0
  readonly #options: FaultRelayOptions
  readonly #random: Random
  readonly #server: Server
  readonly #pairs = new Set<Pair>()
  readonly #mute = new Set<Socket>()
  readonly #freeAt: Record<Direction, number> = { up: 0, down: 0 }

  static async open(options: FaultRelayOptions): Promise<FaultRelay> {
    const relay = new FaultRelay(options)
    relay.#server.listen(0, '127.0.0.1')
    await once(relay.#server, 'listening')
    return relay
  }

  private constructor(options: FaultRelayOptions) {
    this.#options = options
    this.#random = new Random(options.seed ?? 1)
    const { delayMs = 0, jitterMs = 0, bytesPerSecond = Number.POSITIVE_INFINITY } = options
    this.up = { delayMs, jitterMs, bytesPerSecond }
    this.down = { delayMs, jitterMs, bytesPerSecond }
    this.#server = createServer({ allowHalfOpen: true, noDelay: true }, (near) => this.#accept(near))
  }

  get port(): number {
    const address = this.#server.address()
    if (typeof address !== 'object' || address === null) throw new Error('the relay is closed')
    return address.port
  }

  /** Connections that are being forwarded. */
  get connections(): number {
    return this.#pairs.size
  }

  /** Resets every connection, or the one with that index, on both sides. */
  cut(index?: number): void {
    for (const pair of this.#chosen(index)) pair.cut()
  }

  /** Nothing passes any more, in one direction or both; the ends see open connections that take no more after a while. */
  stall(direction?: Direction): void {
    for (const pair of this.#pairs) pair.stall(direction, true)
  }

  resume(): void {
    for (const pair of this.#pairs) pair.stall(undefined, false)
  }

  /** One end is gone and the other is not told: what it sends is swallowed. */
  halfOpen(gone: 'near' | 'far'): void {
    for (const pair of this.#pairs) pair.halfOpen(gone)
  }

  /** Changes a bit after that many further bytes of a direction of the connection with that index. */
  corrupt(direction: Direction, after = 0, index = 0): void {
    for (const pair of this.#chosen(index)) pair[direction].corruptAt = pair[direction].seen + after
  }

  /** Ends the stream after that many further bytes of a direction. */
  truncate(direction: Direction, after = 0, index = 0): void {
    for (const pair of this.#chosen(index)) pair[direction].endAt = pair[direction].seen + after
  }

  async close(): Promise<void> {
    const closed = once(this.#server, 'close')
    this.#server.close()
    for (const socket of this.#mute) socket.destroy()
    for (const pair of this.#pairs) pair.cut()
    await closed
  }

  #chosen(index: number | undefined): Pair[] {
    const pairs = [...this.#pairs]
    return index === undefined ? pairs : pairs.filter((pair) => pair.index === index)
  }

  #accept(near: Socket): void {
    const index = this.accepted++
    near.on('error', () => undefined)
    if (this.onConnect === 'reset') {
      near.resetAndDestroy()
      return
    }
    if (this.onConnect === 'mute') {
      this.#mute.add(near)
      near.once('close', () => this.#mute.delete(near))
      near.pause()
      return
    }
    const far = tcpConnect({
      host: this.#options.host ?? '127.0.0.1',
      port: this.#options.port,
      allowHalfOpen: true,
      noDelay: true,
    })
    far.on('error', () => undefined)
    const flow = (direction: Direction, from: Socket, to: Socket): Flow =>
      new Flow(
        from,
        to,
        (length) => this.#dueAt(direction, length, index),
        () => this.#bufferOf(direction),
        (length) => {
          this.passed[direction] += length
        },
      )
    const pair = new Pair(index, near, far, flow('up', near, far), flow('down', far, near))
    this.#pairs.add(pair)
    pair.onClose = () => this.#pairs.delete(pair)
  }

  #bufferOf(direction: Direction): number {
    const { delayMs, jitterMs, bytesPerSecond } = this[direction]
    const bytes = (bytesPerSecond * (delayMs + jitterMs + ROUTER_MS)) / 1000
    return Math.min(BUFFERED_MAX, Math.max(BUFFERED_MIN, bytes))
  }

  #dueAt(direction: Direction, length: number, index: number): number {
    const { delayMs, jitterMs, bytesPerSecond } = this[direction]
    const now = performance.now()
    const sentAt = Math.max(now, this.#freeAt[direction]) + (length / bytesPerSecond) * 1000
    this.#freeAt[direction] = sentAt
    const jitter = jitterMs === 0 ? 0 : (this.#random.next() / 2 ** 32) * jitterMs
    return sentAt + delayMs + jitter + (this.#options.delayOfConnection?.(index) ?? 0)
  }
}

/** One direction of one connection. */
class Flow {
  corruptAt = Number.POSITIVE_INFINITY
  endAt = Number.POSITIVE_INFINITY
  seen = 0 // bytes read
  swallow = false
  readonly #from: Socket
  readonly #to: Socket
  readonly #dueAt: (length: number) => number
  readonly #bufferSize: () => number
  readonly #onPassed: (length: number) => void
  readonly #queue: { dueAt: number; bytes: Buffer | 'end' }[] = []
  #queued = 0
  #lastDue = 0
  #planned = false
  #stalled = false

  constructor(
    from: Socket,
    to: Socket,
    dueAt: (length: number) => number,
    bufferSize: () => number,
    onPassed: (length: number) => void,
  ) {
    this.#from = from
    this.#to = to
    this.#dueAt = dueAt
    this.#bufferSize = bufferSize
    this.#onPassed = onPassed
    from.on('data', (bytes: Buffer) => this.#take(bytes))
    from.on('end', () => this.#push('end'))
    to.on('drain', () => this.#flow())
  }

  stall(stalled: boolean): void {
    this.#stalled = stalled
    if (stalled) this.#from.pause()
    this.#flow()
  }

  #take(bytes: Buffer): void {
    if (this.swallow) return
    const start = this.seen
    this.seen += bytes.length
    let passed = bytes
    if (this.corruptAt < this.seen) {
      passed = Buffer.from(passed)
      const at = this.corruptAt - start
      passed.writeUInt8((passed[at] ?? 0) ^ (1 << (at & 7)), at)
      this.corruptAt = Number.POSITIVE_INFINITY
    }
    if (this.endAt <= this.seen) {
      passed = passed.subarray(0, Math.max(0, this.endAt - start))
      this.swallow = true
    }
    if (passed.length > 0) this.#push(passed)
    if (this.swallow) this.#push('end')
  }

  #push(bytes: Buffer | 'end'): void {
    const length = bytes === 'end' ? 0 : bytes.length
    // The order within a connection stays, whatever the jitter says.
    this.#lastDue = Math.max(this.#lastDue, this.#dueAt(length))
    this.#queue.push({ dueAt: this.#lastDue, bytes })
    this.#queued += length
    if (this.#queued > this.#bufferSize()) this.#from.pause()
    this.#flow()
  }

  #flow(): void {
    while (!this.#stalled && !this.#to.writableNeedDrain) {
      const [next] = this.#queue
      if (next === undefined || next.dueAt > performance.now()) break
      this.#queue.shift()
      if (next.bytes === 'end') {
        this.#to.end()
        continue
      }
      this.#queued -= next.bytes.length
      this.#onPassed(next.bytes.length)
      this.#to.write(next.bytes)
    }
    if (!this.#stalled && this.#queued <= this.#bufferSize() / 2) this.#from.resume()
    this.#plan()
  }

  #plan(): void {
    const [next] = this.#queue
    if (this.#planned || this.#stalled || next === undefined || this.#to.writableNeedDrain) return
    this.#planned = true
    const go = (): void => {
      this.#planned = false
      this.#flow()
    }
    // Timers are good to a millisecond or two: the last stretch of a delay is waited for turn by turn.
    const ms = next.dueAt - performance.now()
    if (ms > 2) setTimeout(go, ms - 1.5)
    else setImmediate(go)
  }
}

class Pair {
  readonly index: number
  readonly up: Flow
  readonly down: Flow
  onClose: () => void = () => undefined
  readonly #near: Socket
  readonly #far: Socket
  #halfOpen = false

  constructor(index: number, near: Socket, far: Socket, up: Flow, down: Flow) {
    this.index = index
    this.#near = near
    this.#far = far
    this.up = up
    this.down = down
    near.on('close', () => this.#closed(far))
    far.on('close', () => this.#closed(near))
  }

  cut(): void {
    this.#halfOpen = false
    this.#near.resetAndDestroy()
    this.#far.resetAndDestroy()
  }

  stall(direction: Direction | undefined, stalled: boolean): void {
    if (direction !== 'down') this.up.stall(stalled)
    if (direction !== 'up') this.down.stall(stalled)
  }

  halfOpen(gone: 'near' | 'far'): void {
    this.#halfOpen = true
    this.up.swallow = true
    this.down.swallow = true
    if (gone === 'near') this.#near.destroy()
    else this.#far.destroy()
  }

  #closed(other: Socket): void {
    if (!this.#halfOpen) other.destroy()
    if (this.#near.destroyed && this.#far.destroyed) this.onClose()
  }
}
