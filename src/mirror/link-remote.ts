import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Rounds } from '../base/rounds.ts'
import type { Channel, Message } from '../link/channel.ts'
import { LinkError, PeerError, peerText } from '../link/errors.ts'
import type { Session } from '../link/session.ts'
import { NBD_ERRNO } from '../nbd/errno.ts'
import { allSockets, expectSockets } from './lane-sockets.ts'
import {
  CHANNELS,
  encodeOperations,
  encodeRanges,
  json,
  LANES_CAPABILITY,
  type LanesMessage,
  MESSAGE,
  NO_MORE,
  type OperationHead,
  putHeader,
  readEnds,
  readLanes,
  readPage,
  readRemoteHello,
} from './protocol.ts'
import {
  type BitmapKind,
  type BitmapPage,
  type CommitInfo,
  type PrimaryHello,
  type Remote,
  RemoteError,
  type RemoteHello,
  type RemoteOperation,
} from './remote.ts'
import { SIGNATURE_BYTES } from './signatures.ts'

/**
 * A secondary behind a link. Operations of one turn travel together; they wait here, not copied, while the channel has no room.
 *
 * Whatever the peer answers, the caller gets an answer or a RemoteError. What makes no sense, and a bound of the link that this side ran
 * into, end both channels: what was asked for before may be undone over there, and nobody would say so.
 */
interface Waiting {
  readonly head: OperationHead
  readonly operation: RemoteOperation
  readonly from: number // in the operation
  readonly under: Under
}

interface Under {
  pieces: number // that have not ended, sent or not
  errno: number
  readonly resolve: () => void
  readonly reject: (error: RemoteError) => void
}

/** A write larger than this travels in pieces. */
const PIECE_BYTES = 256 * 1024
const BATCH_BYTES = 32 * 1024
const BATCH_COUNT = 512

export class LinkRemote implements Remote {
  readonly ended: Promise<RemoteError>
  readonly #session: Session
  readonly #control: Channel
  readonly #data: Channel
  readonly #waiting: Waiting[] = []
  /** Of what was sent. */
  readonly #under = new Map<number, Under>()
  readonly #flushes = new Rounds(async () => void (await this.#ask(this.#control, MESSAGE.flush, json({}))))
  #lastId = 0
  #sending = false
  #over: RemoteError | undefined
  readonly #wireBefore: number

  /** @throws RemoteError */
  static async open(session: Session, relation: string): Promise<LinkRemote> {
    const params = { relation }
    let control: Channel | undefined
    try {
      control = await session.open(CHANNELS.control, params)
      const data = await session.open(CHANNELS.data, params, {
        bulk: true,
        ordered: false,
        window: LIMITS.mirrorDataWindow,
      })
      return new LinkRemote(session, control, data)
    } catch (error) {
      control?.close('there is no channel for its data')
      // The session goes on without this mirror: somebody has to know.
      if (error instanceof LinkError && error.code === 'OVERFLOW')
        throw new RemoteError('refused', error.message, { cause: error })
      throw remoteError(error)
    }
  }

  private constructor(session: Session, control: Channel, data: Channel) {
    this.#session = session
    this.#control = control
    this.#data = data
    this.#wireBefore = session.counters().bytesOut
    control.onMessage((message) => this.#take(message))
    data.onMessage(() => {
      throw new LinkError('BAD_FRAME', 'a secondary sends replies only')
    })
    this.ended = Promise.race([control.ended, data.ended]).then((reason) => {
      const over = this.#over ?? remoteError(reason)
      this.#over = over
      control.close(reason.message)
      data.close(reason.message)
      const all = [...this.#under.values(), ...this.#waiting.map(({ under }) => under)]
      this.#under.clear()
      this.#waiting.length = 0
      for (const { reject } of all) reject(over)
      return over
    })
  }

  async hello(hello: PrimaryHello): Promise<RemoteHello> {
    return this.#read(await this.#ask(this.#control, MESSAGE.hello, json(hello)), readRemoteHello)
  }

  async *bitmap(kind: BitmapKind): AsyncGenerator<BitmapPage> {
    for (let from = 0; from !== NO_MORE; ) {
      const reply = await this.#ask(this.#data, MESSAGE.bitmap, json({ kind, from }))
      const { first, next, bytes } = this.#read(reply, (payload) => {
        const page = readPage(payload)
        if (page.next <= from) throw new LinkError('BAD_FRAME', 'a bitmap that does not end')
        return page
      })
      if (bytes.length > 0) yield { first, bytes }
      from = next
    }
  }

  async signatures(ranges: readonly { offset: number; length: number }[]): Promise<Buffer> {
    const reply = await this.#ask(this.#data, MESSAGE.signatures, encodeRanges(ranges))
    return this.#read(reply, (payload) => {
      const due = ranges.length * SIGNATURE_BYTES
      if (payload.length === due) return payload
      throw new LinkError('BAD_FRAME', `signatures of ${payload.length} bytes, ${due} are due`)
    })
  }

  async put(offset: number, payload: Buffer): Promise<void> {
    const most = LIMITS.mirrorPieceBytes
    const length = payload.length
    const pieces: Promise<unknown>[] = []
    for (let from = 0; from < length; from += most) {
      const data = payload.subarray(from, Math.min(length, from + most))
      const header = putHeader({ offset: offset + from, unit: offset, length })
      pieces.push(this.#ask(this.#data, MESSAGE.put, [header, data]))
    }
    await allOf(pieces)
  }

  async hole(offset: number, length: number): Promise<void> {
    await this.#ask(this.#data, MESSAGE.hole, encodeRanges([{ offset, length }]))
  }

  async commit(info: CommitInfo): Promise<void> {
    await this.#ask(this.#control, MESSAGE.commit, json(info))
  }

  async handOver(info: CommitInfo): Promise<void> {
    await this.#ask(this.#control, MESSAGE.handOver, json(info))
  }

  /** Shared: clients may ask for more of them at once than a channel takes requests. */
  flush(): Promise<void> {
    return this.#flushes.run()
  }

  /** Its intents tell it, too. */
  mayLose(): boolean {
    return false
  }

  async settle(): Promise<void> {}

  async lanes(count: number): Promise<readonly Socket[]> {
    const { sideWires, capabilities } = this.#session
    if (count === 0 || sideWires === undefined || !capabilities.has(LANES_CAPABILITY)) return []
    const ask = async (tokens: readonly string[]): Promise<LanesMessage> =>
      this.#read(await this.#ask(this.#control, MESSAGE.lanes, json({ count, tokens })), readLanes)
    if (sideWires.side === 'listens') {
      const expected = expectSockets(sideWires, count)
      if (expected.length === 0) return []
      try {
        const reply = await ask(expected.map(({ token }) => token))
        // They have come, or some do not.
        if (reply.count === count) return await allSockets(expected.map(({ socket }) => socket))
      } catch (error) {
        for (const { cancel } of expected) cancel()
        throw remoteError(error)
      }
      for (const { cancel } of expected) cancel()
      return []
    }
    const { tokens } = await ask([])
    try {
      return await allSockets(tokens.map((token) => sideWires.dial(token)))
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      // Whatever lets the session through and not these: it goes without, and the other side waits for none.
      await this.#ask(this.#control, MESSAGE.lanes, json({ count: 0, tokens: [] }))
      return []
    }
  }

  async fence(): Promise<void> {
    await this.#ask(this.#control, MESSAGE.fence, json({}))
  }

  tell(state: string): void {
    if (this.#over === undefined) this.#control.send(MESSAGE.state, json({ state })).catch(() => {})
  }

  wireBytes(): number {
    return this.#session.counters().bytesOut - this.#wireBefore
  }

  close(reason: string): void {
    this.#control.close(reason)
    this.#data.close(reason)
  }

  apply(operation: RemoteOperation): Promise<void> {
    if (this.#over !== undefined) return Promise.reject(this.#over)
    const { kind, offset, length, flags } = operation
    const size = kind === 'write' ? Math.min(length, PIECE_BYTES) : length
    return new Promise((resolve, reject) => {
      const under: Under = { pieces: 0, errno: 0, resolve, reject }
      for (let from = 0; from < length; from += size) {
        this.#lastId = (this.#lastId + 1) >>> 0
        const piece = Math.min(size, length - from)
        const head = { id: this.#lastId, kind, flags, offset: offset + from, length: piece }
        under.pieces++
        this.#waiting.push({ head, operation, from, under })
      }
      if (this.#sending) return
      this.#sending = true
      queueMicrotask(() => this.#send())
    })
  }

  abandon(): void {
    for (const { under } of this.#waiting.splice(0))
      under.reject(new RemoteError('lost', 'it was not sent any more'))
  }

  /** As many as there are and fit, in one message after the other. */
  async #send(): Promise<void> {
    try {
      while (this.#waiting.length > 0 && this.#over === undefined) {
        const batch: Waiting[] = []
        let bytes = 0
        for (const next of this.#waiting) {
          const own = next.head.kind === 'write' ? next.head.length : 0
          if (batch.length > 0 && (bytes + own > BATCH_BYTES || batch.length === BATCH_COUNT)) break
          batch.push(next)
          bytes += own
        }
        this.#waiting.splice(0, batch.length)
        const payload = Buffer.allocUnsafe(bytes)
        let at = 0
        for (const { head, operation, from, under } of batch) {
          assert(!this.#under.has(head.id), 'numbers of operations')
          this.#under.set(head.id, under)
          if (head.kind !== 'write') continue
          operation.payload(from, payload.subarray(at, at + head.length))
          at += head.length
        }
        const heads = encodeOperations(batch.map(({ head }) => head))
        await this.#control.send(MESSAGE.operations, [heads, payload])
      }
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      this.#fail(error.message, error) // `ended` has it, too, unless it was too much for the channel
    } finally {
      this.#sending = false
    }
  }

  #take({ type, payload }: Message): void {
    if (type !== MESSAGE.ends)
      throw new LinkError('BAD_FRAME', `a secondary does not send messages of type ${type}`)
    for (const { id, errno } of readEnds(payload)) {
      const under = this.#under.get(id)
      if (under === undefined) throw new LinkError('BAD_FRAME', `operation ${id} ends, and was not sent`)
      this.#under.delete(id)
      under.pieces--
      if (errno !== 0) under.errno = errno
      if (under.pieces > 0) continue
      if (under.errno === 0) under.resolve()
      else
        under.reject(new RemoteError('refused', `the peer's volume answers with ${errnoName(under.errno)}`))
    }
  }

  async #ask(channel: Channel, type: number, payload: Buffer | readonly Buffer[]): Promise<Message> {
    if (this.#over !== undefined) throw this.#over
    try {
      return await channel.request(type, payload)
    } catch (error) {
      if (error instanceof LinkError && error.code === 'OVERFLOW') throw this.#fail(error.message, error)
      throw remoteError(error)
    }
  }

  /** @throws RemoteError lost where the answer makes no sense; it is the end of this remote then */
  #read<T>({ payload }: Message, read: (payload: Buffer) => T): T {
    try {
      return read(payload)
    } catch (error) {
      if (!(error instanceof LinkError || error instanceof ProtocolError)) throw error
      const name = peerText(this.#session.peer.name)
      throw this.#fail(`an answer of the peer ${name} makes no sense: ${error.message}`, error)
    }
  }

  /** Ends both channels, and this remote with them. @returns why it is over, which it may have been before */
  #fail(reason: string, cause: LinkError | ProtocolError): RemoteError {
    this.#over ??= new RemoteError('lost', reason, { cause })
    this.close(reason)
    return this.#over
  }
}

function errnoName(errno: number): string {
  return Object.entries(NBD_ERRNO).find(([, value]) => value === errno)?.[0] ?? `error ${errno}`
}

/** Waits for all, also where one fails: the payload is in use until then. */
export async function allOf(promises: readonly Promise<unknown>[]): Promise<void> {
  const results = await Promise.allSettled(promises)
  for (const result of results) if (result.status === 'rejected') throw result.reason
}

/** @throws anything that is no end of a link or an answer of the peer */
export function remoteError(error: unknown): RemoteError {
  if (error instanceof RemoteError) return error
  if (error instanceof PeerError) {
    const fate = error.code === 'SPLITBRAIN' ? 'splitbrain' : 'refused'
    return new RemoteError(fate, error.message, { cause: error })
  }
  if (error instanceof LinkError) {
    const fate = error.code === 'CHANNEL_REFUSED' ? 'refused' : 'lost'
    return new RemoteError(fate, error.message, { cause: error })
  }
  throw error
}
