import { randomUUID } from 'node:crypto'
import type { Socket } from 'node:net'
import { messageOf, StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Rounds } from '../base/rounds.ts'
import { formatSize } from '../base/sizes.ts'
import { NbdClient } from '../nbd/client.ts'
import { BASE_ALLOCATION, COMMAND_FLAG, TRANSMISSION_FLAG } from '../nbd/constants.ts'
import { hasOneOf, unitsOf } from './copy-units.ts'
import { allOf } from './link-remote.ts'
import {
  type BitmapKind,
  type BitmapPage,
  type PrimaryHello,
  type Remote,
  RemoteError,
  type RemoteHello,
  type RemoteOperation,
} from './remote.ts'
import { signaturesOf } from './signatures.ts'

/**
 * An NBD export as the secondary. It knows nothing of mirrors: no stage (puts are written in place, so it is a point in time only between
 * cycles), no generation (that nobody else writes there is up to the operator), no bitmap of its own.
 *
 * Crash rules:
 *  1. What the server has answered and not flushed may be lost with it. `doubtful` has what `apply` wrote since; who holds the bitmap
 *     counts that as changed when the session ends, and keeps its intents until then (`mayLose`). What was put has its bits until `commit`,
 *     which flushes.
 *  2. After a flush that failed, or a request with FUA, the server may have dropped what it could not write, and the next flush may succeed all the same: the
 *     session ends, and with it everything that counted on a flush to come.
 *  3. A server may go on with requests of a connection that is gone. `closed` waits for those of connections that still answer; a new
 *     session begins after it.
 *
 * Concurrency rule: requests that overlap come one after the other (volume/overlaps.ts). Where the server's blocks are larger than a
 * request's edges, the blocks at its edges are read, changed and written by one request at a time.
 */
export interface NbdRemoteOptions {
  readonly uri: string
  readonly size: number // bytes of the volume; the export has as many, or more
  readonly unitBytes: number // of a copy unit
  readonly fill: number // what is not formatted reads as this
  /** Where the server allows several. */
  readonly connections?: number
  /** A server that answers nothing for so long while it is asked is lost. */
  readonly silenceMs?: number
}

interface Lane {
  readonly client: NbdClient
  busy: number // requests
}

interface Range {
  readonly offset: number // bytes
  readonly length: number
}

const CONTEXT = 'base:allocation'
const PAGE_UNITS = 1 << 18
/** Bytes of one zeroing request: a server that has to write them answers in time. */
const ZERO_BYTES = 64 << 20
const PATTERN_BYTES = 1 << 20
const PARALLEL = 4

export class NbdRemote implements Remote {
  readonly uri: string
  readonly ended: Promise<RemoteError>
  /** After the end: nothing of this session is done by the server any more, as far as that can be known. */
  readonly closed: Promise<void>
  readonly #options: NbdRemoteOptions
  readonly #lanes: readonly Lane[]
  readonly #block: number // bytes; the least that the server reads and writes
  readonly #hasFua: boolean
  readonly #stage = randomUUID()
  readonly #pattern: Buffer
  readonly #zeros: Buffer
  #canZero: boolean
  #size: number
  #over: RemoteError | undefined
  #resolveEnded: (reason: RemoteError) => void = () => {}
  #resolveClosed = (): void => {}
  #answeredAt = performance.now()
  readonly #silenceMs: number
  readonly #watch: NodeJS.Timeout
  #applying = 0
  #idleWaiters: (() => void)[] = []
  readonly #edges = new Map<number, Promise<void>>() // by block
  /** Copy units in which something was applied, answered, and not flushed. */
  #dirty = new Set<number>()
  #flushing: ReadonlySet<number> = new Set()
  readonly #flushes = new Rounds(() => this.#flushOnce())
  #flushTimer: NodeJS.Timeout | undefined

  /** @throws UserError UNREACHABLE, NOT_FOUND, REFUSED; ProtocolError */
  static async open(options: NbdRemoteOptions): Promise<NbdRemote> {
    const { uri, size } = options
    const connect = (): Promise<NbdClient> =>
      NbdClient.connect(uri, { handshakeMsMax: LIMITS.mirrorTargetConnectMs })
    const first = await connect()
    const reason = unfit(first, size)
    if (reason !== undefined) {
      await first.close()
      throw new UserError('REFUSED', `${first.uri}: ${reason}`)
    }
    const clients = [first]
    const { connections = LIMITS.mirrorTargetConnections } = options
    if ((first.export.transmissionFlags & TRANSMISSION_FLAG.CAN_MULTI_CONN) !== 0) {
      const more = await Promise.allSettled(Array.from({ length: connections - 1 }, connect))
      for (const result of more) if (result.status === 'fulfilled') clients.push(result.value) // fewer will do
    }
    return new NbdRemote(options, clients)
  }

  private constructor(options: NbdRemoteOptions, clients: readonly NbdClient[]) {
    this.#options = options
    this.#lanes = clients.map((client) => ({ client, busy: 0 }))
    const { export: first, uri } = this.#lane.client
    this.uri = uri
    this.#block = first.blockSizes.minimum
    const flags = clients.reduce((common, client) => common & client.export.transmissionFlags, -1)
    this.#hasFua = (flags & TRANSMISSION_FLAG.SEND_FUA) !== 0
    this.#canZero = (flags & TRANSMISSION_FLAG.SEND_WRITE_ZEROES) !== 0
    this.#size = options.size
    this.#zeros = Buffer.alloc(PATTERN_BYTES)
    this.#pattern = options.fill === 0 ? this.#zeros : Buffer.alloc(PATTERN_BYTES, options.fill)
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve
    })
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve
    })
    for (const client of clients) client.gone.then(() => this.#lost(client))
    this.#silenceMs = options.silenceMs ?? LIMITS.mirrorTargetSilenceMs
    this.#watch = setInterval(() => this.#listen(), this.#silenceMs / 4).unref()
  }

  /** Answered by the server, and perhaps lost with it: the copy units around it. */
  doubtful(): readonly Range[] {
    const { unitBytes } = this.#options
    return [...new Set([...this.#flushing, ...this.#dirty])].map((unit) => {
      const offset = unit * unitBytes
      return { offset, length: Math.min(unitBytes, this.#size - offset) }
    })
  }

  mayLose(offset: number, length: number): boolean {
    if (this.#dirty.size === 0 && this.#flushing.size === 0) return false
    const [first, last] = unitsOf(offset, length, this.#options.unitBytes)
    for (const units of [this.#dirty, this.#flushing]) if (hasOneOf(units, first, last)) return true
    return false
  }

  async settle(): Promise<void> {
    if (this.#dirty.size > 0 || this.#flushing.size > 0) await this.flush()
  }

  async hello(hello: PrimaryHello): Promise<RemoteHello> {
    this.#throwIfOver()
    // Requests that nobody waits for any more would overtake what is put from now on.
    await this.fence()
    const reason = unfit(this.#lane.client, hello.size)
    // A size is told once in a session.
    if (reason !== undefined) this.#end(new RemoteError('refused', `${this.uri}: ${reason}`))
    this.#throwIfOver()
    this.#size = hello.size
    return {
      role: 'secondary',
      generation: { current: hello.base, history: [] },
      base: hello.base,
      consistent: hello.initialized,
      cycle: hello.cycle,
      size: this.#lane.client.size,
      stage: this.#stage,
      changed: 0,
      blank: false,
    }
  }

  /** What reads as zeros there is not realized; where nothing is said of that, everything is. */
  async *bitmap(kind: BitmapKind): AsyncGenerator<BitmapPage> {
    if (kind === 'differs') return
    const { unitBytes } = this.#options
    const units = Math.ceil(this.#size / unitBytes)
    let first = 0
    let bytes = pageOf(0, units)
    let any = false
    for await (const { offset, length } of this.#realized()) {
      const end = Math.ceil((offset + length) / unitBytes)
      for (let unit = Math.floor(offset / unitBytes); unit < end; ) {
        if (unit >= first + PAGE_UNITS) {
          if (any) yield { first, bytes }
          first = unit - (unit % PAGE_UNITS)
          bytes = pageOf(first, units)
          any = false
        }
        const stop = Math.min(end, first + PAGE_UNITS)
        setBits(bytes, unit - first, stop - first)
        any = true
        unit = stop
      }
    }
    if (any) yield { first, bytes }
  }

  async *#realized(): AsyncGenerator<Range> {
    const known = this.#lane.client.export.contexts.some(({ name }) => name === CONTEXT)
    if (!known || this.#options.fill !== 0) {
      yield { offset: 0, length: this.#size }
      return
    }
    for (let at = 0; at < this.#size; ) {
      const range = { offset: at, length: this.#size - at }
      const statuses = await this.#run((client) => client.blockStatus(range, { contexts: [CONTEXT] }))
      const before = at
      for (const { length, flags } of statuses.get(CONTEXT) ?? []) {
        const clipped = Math.min(length, this.#size - at)
        if (clipped > 0 && (flags & BASE_ALLOCATION.ZERO) === 0) yield { offset: at, length: clipped }
        at += clipped
      }
      if (at === before)
        throw this.#end(new RemoteError('lost', `${this.uri}: its block status says nothing`))
    }
  }

  signatures(ranges: readonly Range[]): Promise<Buffer> {
    return signaturesOf(ranges, (offset, target) => this.#run((client) => client.read(target, offset)))
  }

  put(offset: number, payload: Buffer): Promise<void> {
    return this.#run((client) => client.write(payload, offset))
  }

  hole(offset: number, length: number): Promise<void> {
    if (this.#options.fill === 0) return this.#zero({ offset, length }, true)
    return this.#repeat(this.#pattern, { offset, length })
  }

  async commit(): Promise<void> {
    await this.flush()
  }

  async handOver(): Promise<void> {
    throw new RemoteError('refused', `${this.uri}: an NBD export cannot be primary`)
  }

  apply(operation: RemoteOperation): Promise<void> {
    if (this.#over !== undefined) return Promise.reject(this.#over)
    const { kind, offset, length, flags, payload } = operation
    // A copy: the payload is gone when the request is answered here, and the request may still wait then.
    const content = kind === 'write' ? Buffer.allocUnsafe(length) : undefined
    if (content !== undefined) payload(0, content)
    const release = kind === 'trim' || (flags & COMMAND_FLAG.NO_HOLE) === 0
    return this.#apply({ offset, length }, content, release, (flags & COMMAND_FLAG.FUA) !== 0)
  }

  /** Every operation that was begun has its content already. */
  abandon(): void {}

  async #apply(range: Range, content: Buffer | undefined, release: boolean, durable: boolean): Promise<void> {
    this.#applying++
    try {
      const aligned = range.offset % this.#block === 0 && range.length % this.#block === 0
      // A large request may come in pieces, of which only the last is to be durable, and with it all before: while any is not, only
      // a flush does that.
      const alone = this.#dirty.size === 0 && this.#flushing.size === 0
      if (aligned && durable && this.#hasFua && alone) {
        await this.#change(range, content, release, true)
        return
      }
      if (aligned) await this.#change(range, content, release)
      else await this.#changeUnaligned(range, content, release)
      const [first, last] = unitsOf(range.offset, range.length, this.#options.unitBytes)
      for (let unit = first; unit <= last; unit++) this.#dirty.add(unit)
      if (durable) await this.flush()
      else this.#flushSoon()
    } finally {
      this.#applying--
      if (this.#applying === 0) for (const resolve of this.#idleWaiters.splice(0)) resolve()
    }
  }

  async #change(range: Range, content: Buffer | undefined, release: boolean, durable = false): Promise<void> {
    try {
      if (content === undefined) await this.#zero(range, release, durable)
      else await this.#run((client) => client.write(content, range.offset, { durable }))
    } catch (error) {
      if (durable) throw this.#end(new RemoteError('lost', messageOf(error), { cause: error })) // perhaps it was the sync
      throw error
    }
  }

  async #changeUnaligned(
    { offset, length }: Range,
    content: Buffer | undefined,
    release: boolean,
  ): Promise<void> {
    const block = this.#block
    const end = offset + length
    const first = Math.floor(offset / block)
    const last = Math.floor((end - 1) / block)
    const unlock = await this.#lock(first === last ? [first] : [first, last])
    try {
      const edge = async (index: number): Promise<void> => {
        const buffer = Buffer.allocUnsafe(block)
        await this.#run((client) => client.read(buffer, index * block))
        const from = Math.max(offset, index * block)
        const to = Math.min(end, (index + 1) * block)
        if (content === undefined) buffer.fill(0, from - index * block, to - index * block)
        else content.copy(buffer, from - index * block, from - offset, to - offset)
        await this.#run((client) => client.write(buffer, index * block))
      }
      const parts: Promise<void>[] = [edge(first)]
      if (last > first) parts.push(edge(last))
      if (last > first + 1) {
        const inner = { offset: (first + 1) * block, length: (last - first - 1) * block }
        const from = inner.offset - offset
        parts.push(this.#change(inner, content?.subarray(from, from + inner.length), release))
      }
      await allOf(parts)
    } finally {
      unlock()
    }
  }

  /** In order of arrival; who waits for several has got in line for all of them in one turn. */
  async #lock(blocks: readonly number[]): Promise<() => void> {
    const before = blocks.map((block) => this.#edges.get(block))
    let open = (): void => {}
    const own = new Promise<void>((resolve) => {
      open = resolve
    })
    for (const block of blocks) this.#edges.set(block, own)
    await Promise.all(before)
    return () => {
      for (const block of blocks) if (this.#edges.get(block) === own) this.#edges.delete(block)
      open()
    }
  }

  async #zero(range: Range, release: boolean, durable = false): Promise<void> {
    if (!this.#canZero) return this.#repeat(this.#zeros, range, durable)
    try {
      await inPieces(range, ZERO_BYTES, (piece) =>
        this.#run((client) => client.zero(piece, { release, durable }), true),
      )
    } catch (error) {
      // Some say that they can, and then they cannot.
      if (!(error instanceof StoreError && error.code === 'NOT_SUPPORTED')) throw error
      this.#canZero = false
      await this.#repeat(this.#zeros, range, durable)
    }
  }

  #repeat(pattern: Buffer, range: Range, durable = false): Promise<void> {
    return inPieces(range, PATTERN_BYTES, ({ offset, length }) =>
      this.#run((client) => client.write(pattern.subarray(0, length), offset, { durable })),
    )
  }

  /** What was answered before the call is durable there. One flush at a time, which callers share. */
  flush(): Promise<void> {
    return this.#flushes.run()
  }

  async #flushOnce(): Promise<void> {
    clearTimeout(this.#flushTimer)
    this.#flushTimer = undefined
    this.#flushing = this.#dirty
    this.#dirty = new Set()
    try {
      await this.#run((client) => client.flush())
      this.#flushing = new Set()
    } catch (error) {
      throw this.#end(new RemoteError('lost', messageOf(error), { cause: error })) // `doubtful` still has them
    }
  }

  async lanes(): Promise<readonly Socket[]> {
    return [] // its server checks no checksums
  }

  async fence(): Promise<void> {
    while (this.#applying > 0) await new Promise<void>((resolve) => this.#idleWaiters.push(resolve))
    this.#throwIfOver()
  }

  /** Intents stay for what it is about (`mayLose`), so that not too many of them are needed. */
  #flushSoon(): void {
    if (this.#over !== undefined) return
    this.#flushTimer ??= setTimeout(() => {
      this.flush().catch((error: unknown) => {
        if (!(error instanceof RemoteError)) throw error // `ended` has it
      })
    }, LIMITS.mirrorTargetFlushMs).unref()
  }

  tell(): void {}

  wireBytes(): number {
    return this.#lanes.reduce((sum, { client }) => sum + client.bytesWritten, 0)
  }

  close(reason: string): void {
    this.#end(new RemoteError('lost', reason))
  }

  // ---- connections

  get #lane(): Lane {
    return this.#lanes.reduce((least, lane) => (lane.busy < least.busy ? lane : least))
  }

  /** @throws RemoteError; with `raw`, also StoreError NOT_SUPPORTED */
  async #run<T>(request: (client: NbdClient) => Promise<T>, raw = false): Promise<T> {
    this.#throwIfOver()
    const lane = this.#lane
    if (this.#lanes.every(({ busy }) => busy === 0)) this.#answeredAt = performance.now()
    lane.busy++
    try {
      return await request(lane.client)
    } catch (error) {
      if (lane.client.failure !== undefined) throw this.#lost(lane.client)
      if (!(error instanceof StoreError)) throw error
      if (raw && error.code === 'NOT_SUPPORTED') throw error
      throw new RemoteError('refused', error.message, { cause: error })
    } finally {
      lane.busy--
      this.#answeredAt = performance.now()
    }
  }

  /** Whoever does not answer for long is gone: requests of clients wait for it. */
  #listen(): void {
    const silence = performance.now() - this.#answeredAt
    if (silence < this.#silenceMs || this.#lanes.every(({ busy }) => busy === 0)) return
    const seconds = Math.round(silence / 1000)
    this.#end(new RemoteError('lost', `${this.uri}: no answer for ${seconds} s`))
    for (const { client } of this.#lanes) client.destroy()
  }

  #lost(client: NbdClient): RemoteError {
    const { failure } = client
    const reason = failure === undefined ? `${this.uri}: the connection is lost` : messageOf(failure)
    return this.#end(new RemoteError('lost', reason, { cause: failure }))
  }

  #throwIfOver(): void {
    if (this.#over !== undefined) throw this.#over
  }

  /** @returns why it has ended, which may have been earlier */
  #end(reason: RemoteError): RemoteError {
    if (this.#over !== undefined) return this.#over
    this.#over = reason
    clearInterval(this.#watch)
    clearTimeout(this.#flushTimer)
    this.#resolveEnded(reason)
    const timer = setTimeout(() => {
      for (const { client } of this.#lanes) client.destroy()
    }, LIMITS.linkCloseMsMax)
    Promise.all(this.#lanes.map(({ client }) => client.close())).then(() => {
      clearTimeout(timer)
      this.#resolveClosed()
    })
    return reason
  }
}

/** Why an export cannot be the secondary of a volume of that size. What it has behind the volume's end stays as it is. */
function unfit(client: NbdClient, size: number): string | undefined {
  const { minimum } = client.export.blockSizes
  if (client.readOnly) return 'the export is read-only'
  if (client.size < size) return `the export has ${client.size} bytes, and the volume ${size}`
  if (size % minimum !== 0) {
    return `its blocks have ${formatSize(minimum)}, of which the volume's ${size} bytes are no multiple`
  }
  return undefined
}

function pageOf(first: number, units: number): Buffer {
  return Buffer.alloc(Math.ceil(Math.min(PAGE_UNITS, units - first) / 8))
}

/** Bits [from, to). */
function setBits(bytes: Buffer, from: number, to: number): void {
  let bit = from
  for (; bit < to && bit % 8 !== 0; bit++) bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) | (1 << (bit & 7))
  const whole = to - ((to - bit) % 8)
  bytes.fill(0xff, bit >> 3, whole >> 3)
  for (bit = whole; bit < to; bit++) bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) | (1 << (bit & 7))
}

/** A few at a time; waits for all, also where one fails. */
async function inPieces(range: Range, most: number, work: (piece: Range) => Promise<void>): Promise<void> {
  const end = range.offset + range.length
  let next = range.offset
  let failed = false
  const worker = async (): Promise<void> => {
    while (next < end && !failed) {
      const offset = next
      next = Math.min(end, offset + most)
      try {
        await work({ offset, length: next - offset })
      } catch (error) {
        failed = true
        throw error
      }
    }
  }
  await allOf(Array.from({ length: PARALLEL }, worker))
}
