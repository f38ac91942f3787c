/**
 * A channel: a stream of messages in each direction between two users of a session, with a window of its own, so that no user can
 * starve another.
 *
 *   opening --> open --> closing --> closed       closing: this side closed it, the other's word is due
 *      |          |                    ^
 *      +----------+--------------------+
 *
 * What always holds:
 *  - A message counts against the window from when it is sent until the other side has *consumed* it: its handler has returned (or what it
 *    returned has settled), or the loop over the channel has come back for the next. So a slow user slows down its sender, and
 *    what waits on the receiving side is bounded by the window.
 *  - On an ordered channel messages are delivered in the order of the calls. Elsewhere those of several connections mix.
 *  - Replies are consumed by whoever waits for them, at once: sending requests never blocks their replies.
 *  - A channel ends once. Then everything that was not replied to, or not sent yet, fails with the reason.
 *  - `close` says how many messages came before it, because on other connections they may come after it.
 */
import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { LinkError, PeerError, peerText } from './errors.ts'
import { FLAG, FRAME_HEADER_SIZE, type Frame, KIND, type Kind } from './frame.ts'
import { encodeReason, Fields } from './hello.ts'
import { ReceiveWindow, SendWindow } from './window.ts'

export interface Message {
  readonly type: number // 0 to 65535, the channel's business
  readonly payload: Buffer
  /** Not 0: a reply is wanted; see `Channel.reply`. */
  readonly id: number
  /** Whoever looks at the payload no more may say so: large ones are received faster then (payloads.ts). */
  readonly release?: () => void
}

export type Payload = Uint8Array | readonly Uint8Array[]

/**
 * Consumes messages in their order. A handler that returns a promise is called for the next message without waiting for it; the
 * message stays in the window until the promise settles.
 * @throws ProtocolError, LinkError the message makes no sense: ends the session
 */
export type MessageHandler = (message: Message) => void | Promise<void>

export interface ChannelOptions {
  /** Bulk waits behind everything else, and keeps to connections of its own where there are several. */
  readonly bulk?: boolean
  /** In order, on one connection. Without, messages go over whichever connection has room. */
  readonly ordered?: boolean
  /** Bytes that the peer may send us before they are consumed; less where the session has many channels. */
  readonly window?: number
}

/** What a channel needs of its session. */
export interface ChannelCarrier {
  /** @returns false where no connection has room */
  transmit(channel: Channel, flags: number, type: number, id: number, parts: readonly Uint8Array[]): boolean
  control(kind: Kind, channel: number, id: number, parts?: readonly Uint8Array[]): void
  /** The channel has something to send and would like to be asked (`sendNext`). */
  wait(channel: Channel): void
  /** Both sides have closed the channel. */
  forget(channel: Channel): void
  /** The peer broke the protocol. */
  fail(error: LinkError): void
}

export type ChannelState = 'opening' | 'open' | 'closing' | 'closed'

const NEXT: Record<ChannelState, readonly ChannelState[]> = {
  opening: ['open', 'closed'],
  open: ['closing', 'closed'],
  closing: ['closed'],
  closed: [],
}

interface Waiting {
  readonly flags: number
  readonly type: number
  readonly id: number
  readonly parts: readonly Uint8Array[]
  readonly length: number
  readonly resolve: () => void
  readonly reject: (error: LinkError) => void
}

interface Request {
  readonly resolve: (reply: Message) => void
  readonly reject: (error: Error) => void
}

const SENT: Promise<void> = Promise.resolve()

export class Channel {
  readonly id: number
  readonly name: string
  readonly bulk: boolean
  readonly ordered: boolean
  readonly #carrier: ChannelCarrier
  #state: ChannelState = 'opening'
  #endReason: LinkError | undefined

  #sendWindow = new SendWindow(LIMITS.linkChannelWindow)
  #sentCount = 0
  readonly #waiting: Waiting[] = []
  readonly #requests = new Map<number, Request>()
  #lastRequest = 0
  #settlers: { resolve: () => void; reject: (error: LinkError) => void }[] = []
  #settleAsked = -1 // the total for which the peer was asked to tell when it is consumed

  readonly #receiveWindow: ReceiveWindow
  #receivedCount = 0
  #settleAt = Number.POSITIVE_INFINITY // the total at which the peer wants to be told
  #peerCount: number | undefined // messages that the peer sent before it closed, modulo 2^32
  #peerReason = ''
  #handler: MessageHandler | undefined
  readonly #queue: Frame[] = []
  #wake: (() => void) | undefined // of a loop that waits for a message
  #resolveEnded: (reason: LinkError) => void = () => undefined
  /** Resolves with the reason when the channel has ended. Messages that came before may still wait to be consumed. */
  readonly ended = new Promise<LinkError>((resolve) => {
    this.#resolveEnded = resolve
  })

  constructor(carrier: ChannelCarrier, id: number, name: string, options: ChannelOptions, window: number) {
    this.#carrier = carrier
    this.id = id
    this.name = name
    this.bulk = options.bulk ?? false
    this.ordered = options.ordered ?? true
    this.#receiveWindow = new ReceiveWindow(window)
  }

  get state(): ChannelState {
    return this.#state
  }

  /** Bytes that the peer may have sent us and that are not consumed. */
  get window(): number {
    return this.#receiveWindow.size
  }

  /** Bytes sent that the peer has not consumed, as far as this side knows. */
  get outstanding(): number {
    return this.#sendWindow.outstanding
  }

  // ---- for users

  /**
   * Sends a message that needs no reply. Resolves when it is on its way; wait for that before sending on and on. The payload stays unchanged
   * until the peer has consumed it (`settled`, or a reply that says so).
   * @throws LinkError why the channel ended; OVERFLOW where too many calls wait
   */
  send(type: number, payload: Payload): Promise<void> {
    return this.#send(0, type, 0, payload)
  }

  /**
   * Sends a message and resolves with the reply.
   * @throws PeerError where the reply is an error; LinkError why the channel ended, OVERFLOW where too many requests wait
   */
  request(type: number, payload: Payload): Promise<Message> {
    return new Promise((resolve, reject) => {
      if (this.#requests.size >= LIMITS.linkRequestsPerChannel) {
        reject(new LinkError('OVERFLOW', `channel ${this.name}: too many requests at once`))
        return
      }
      do this.#lastRequest = (this.#lastRequest + 1) >>> 0
      while (this.#lastRequest === 0 || this.#requests.has(this.#lastRequest))
      const id = this.#lastRequest
      this.#requests.set(id, { resolve, reject })
      const sent = this.#send(FLAG.request, type, id, payload)
      if (sent === SENT) return
      sent.catch((error: Error) => {
        this.#requests.delete(id)
        reject(error)
      })
    })
  }

  /** Answers a request. Resolves as `send` does. */
  reply(request: Message, type: number, payload: Payload): Promise<void> {
    assert(request.id !== 0, 'a reply was asked for')
    return this.#send(FLAG.reply, type, request.id, payload)
  }

  /** Answers a request with an error: the other side's `request` throws a PeerError. */
  replyError(request: Message, code: string, message: string): Promise<void> {
    assert(request.id !== 0, 'a reply was asked for')
    const payload = Buffer.from(JSON.stringify({ code, message }), 'utf8')
    return this.#send(FLAG.reply | FLAG.failed, 0, request.id, payload)
  }

  /** Consumes messages with a function, from those on that wait already. Instead of a loop over the channel. */
  onMessage(handler: MessageHandler): void {
    assert(this.#handler === undefined && this.#wake === undefined, 'a channel has one consumer')
    this.#handler = handler
    for (let frame = this.#queue.shift(); frame !== undefined; frame = this.#queue.shift())
      this.#deliver(frame)
  }

  /** Messages one by one, until the channel ends; then throws where that was not a close in order. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Message, void, void> {
    assert(this.#handler === undefined && this.#wake === undefined, 'a channel has one consumer')
    for (;;) {
      const frame = this.#queue.shift()
      if (frame !== undefined) {
        yield frame
        this.#consumed(frame)
        continue
      }
      if (this.#endReason !== undefined) {
        if (this.#endReason.code !== 'CHANNEL_CLOSED') throw this.#endReason
        return
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
      this.#wake = undefined
    }
  }

  /** Resolves at a moment when everything sent has been consumed by the peer. @throws LinkError why the channel ended */
  settled(): Promise<void> {
    if (this.#endReason !== undefined) return Promise.reject(this.#endReason)
    return new Promise((resolve, reject) => {
      this.#settlers.push({ resolve, reject })
      this.#checkSettled()
    })
  }

  /**
   * Closes the channel for both sides. What was sent is delivered, what still waits to be sent and requests without a reply fail; see
   * `settled` for an end that loses nothing.
   */
  close(reason = 'closed'): void {
    if (this.#state !== 'open') return
    this.#enter('closing')
    this.#sayClosed(reason)
    this.#end(new LinkError('CHANNEL_CLOSED', `channel ${this.name}: ${reason}`))
    this.#checkPeerClosed()
  }

  // ---- for the session

  /** The peer takes part, with this window. */
  opened(window: number): void {
    this.#enter('open')
    this.#sendWindow = new SendWindow(window)
  }

  /** The session or the opening failed. */
  fail(reason: LinkError): void {
    if (this.#state === 'closed') return
    this.#enter('closed')
    this.#end(reason)
  }

  /** Sends the next message that waits. @returns what is in the way, if anything */
  sendNext(): 'sent' | 'nothing waits' | 'window' | 'connections' {
    const [next] = this.#waiting
    if (next === undefined) return 'nothing waits'
    if (!this.#sendWindow.hasRoom(next.length)) return 'window'
    if (!this.#transmit(next.flags, next.type, next.id, next.parts, next.length)) return 'connections'
    this.#waiting.shift()
    next.resolve()
    if (this.#waiting.length === 0) this.#checkSettled()
    return 'sent'
  }

  /** A message of the peer. @throws LinkError */
  receive(frame: Frame): void {
    const length = FRAME_HEADER_SIZE + frame.payload.length
    this.#receiveWindow.admit(length)
    this.#receiveWindow.receive(length)
    this.#receivedCount++
    const wantsReply = (frame.flags & FLAG.request) !== 0
    const isReply = (frame.flags & FLAG.reply) !== 0
    if (wantsReply === isReply ? wantsReply || frame.id !== 0 : frame.id === 0) {
      throw new LinkError(
        'BAD_FRAME',
        `channel ${this.name}: a message with flags ${frame.flags} and id ${frame.id}`,
      )
    }
    if (this.#state === 'closing' || this.#state === 'closed') this.#consumed(frame)
    else if (isReply) this.#takeReply(frame)
    else if (this.#handler !== undefined) this.#deliver(frame)
    else {
      this.#queue.push(frame)
      this.#wake?.()
    }
    this.#checkPeerClosed()
  }

  /** The peer has consumed that many bytes. @throws LinkError */
  credit(total: number): void {
    if (!this.#sendWindow.acknowledge(total)) return
    if (this.#waiting.length > 0) this.#carrier.wait(this)
    this.#checkSettled()
  }

  /** The peer wants to be told when that many bytes are consumed. */
  settle(total: number): void {
    const { done } = this.#receiveWindow
    this.#settleAt = done + ((total - (done % 2 ** 32) + 2 ** 32) % 2 ** 32)
    if (done >= this.#settleAt) this.#tell()
  }

  /** The peer closed the channel after that many messages. @throws LinkError */
  peerClosed(count: number, payload: Buffer): void {
    if (this.#peerCount !== undefined) throw new LinkError('BAD_FRAME', `channel ${this.name}: closed twice`)
    this.#peerCount = count
    this.#peerReason = new Fields(payload, 'close').text('message', 0, 1000)
    this.#checkPeerClosed()
  }

  // ---- sending

  #send(flags: number, type: number, id: number, payload: Payload): Promise<void> {
    if (this.#endReason !== undefined) return Promise.reject(this.#endReason)
    assert(this.#state === 'open', 'an open channel sends')
    const parts: readonly Uint8Array[] = payload instanceof Uint8Array ? [payload] : payload
    let length = FRAME_HEADER_SIZE
    for (const part of parts) length += part.length
    assert(length <= FRAME_HEADER_SIZE + LIMITS.linkPayloadMax, 'a message fits into a frame')
    assert(type >= 0 && type <= 0xffff, 'message type')
    if (
      this.#waiting.length === 0 &&
      this.#sendWindow.hasRoom(length) &&
      this.#transmit(flags, type, id, parts, length)
    ) {
      return SENT
    }
    if (this.#waiting.length >= LIMITS.linkSendsWaitingMax) {
      return Promise.reject(
        new LinkError('OVERFLOW', `channel ${this.name}: too many messages wait to be sent`),
      )
    }
    return new Promise((resolve, reject) => {
      this.#waiting.push({ flags, type, id, parts, length, resolve, reject })
      this.#carrier.wait(this)
    })
  }

  #transmit(flags: number, type: number, id: number, parts: readonly Uint8Array[], length: number): boolean {
    if (!this.#carrier.transmit(this, flags, type, id, parts)) return false
    this.#sendWindow.add(length)
    this.#sentCount = (this.#sentCount + 1) >>> 0
    return true
  }

  #checkSettled(): void {
    if (this.#settlers.length === 0 || this.#waiting.length > 0) return
    if (this.#sendWindow.outstanding === 0) {
      for (const { resolve } of this.#settlers.splice(0)) resolve()
    } else if (this.#settleAsked !== this.#sendWindow.sent) {
      this.#settleAsked = this.#sendWindow.sent
      this.#carrier.control(KIND.settle, this.id, this.#settleAsked % 2 ** 32)
    }
  }

  // ---- receiving

  #takeReply(frame: Frame): void {
    const request = this.#requests.get(frame.id)
    if (request === undefined) {
      throw new LinkError('BAD_FRAME', `channel ${this.name}: a reply to a request that was not made`)
    }
    // First of all: where it makes no sense the session ends, and the request with it, as long as it is known.
    const error = (frame.flags & FLAG.failed) === 0 ? undefined : readError(frame.payload)
    this.#requests.delete(frame.id)
    this.#consumed(frame)
    if (error === undefined) request.resolve(frame)
    else request.reject(error)
  }

  #deliver(frame: Frame): void {
    assert(this.#handler !== undefined, 'a handler consumes')
    let pending: void | Promise<void>
    try {
      pending = this.#handler(frame)
    } catch (error) {
      this.#blame(error)
      return
    }
    if (pending === undefined) this.#consumed(frame)
    else
      pending.then(
        () => this.#consumed(frame),
        (error: unknown) => this.#blame(error),
      )
  }

  /** A message that makes no sense is the peer's mistake. Any other error is ours, and nobody's to swallow. */
  #blame(error: unknown): void {
    if (error instanceof LinkError) this.#carrier.fail(error)
    else if (error instanceof ProtocolError) {
      this.#carrier.fail(
        new LinkError('BAD_FRAME', `channel ${this.name}: ${error.message}`, { cause: error }),
      )
    } else throw error
  }

  #consumed(frame: Frame): void {
    this.#receiveWindow.finish(FRAME_HEADER_SIZE + frame.payload.length)
    if (this.#state !== 'open') return
    if (this.#receiveWindow.isDue || this.#receiveWindow.done >= this.#settleAt) this.#tell()
  }

  #tell(): void {
    if (this.#receiveWindow.done >= this.#settleAt) this.#settleAt = Number.POSITIVE_INFINITY
    this.#carrier.control(KIND.credit, this.id, this.#receiveWindow.tell())
  }

  // ---- the end

  #checkPeerClosed(): void {
    if (this.#peerCount === undefined || this.#state === 'closed') return
    if (this.#receivedCount % 2 ** 32 !== this.#peerCount) return // some are still on their way
    const wasOpen = this.#state !== 'closing'
    if (wasOpen) this.#sayClosed('the peer closed it')
    this.#enter('closed')
    if (wasOpen) {
      this.#end(
        new LinkError('CHANNEL_CLOSED', `channel ${this.name}: closed by the peer: ${this.#peerReason}`),
      )
    }
    this.#carrier.forget(this)
  }

  #sayClosed(reason: string): void {
    const payload = encodeReason(new LinkError('CHANNEL_CLOSED', reason))
    this.#carrier.control(KIND.close, this.id, this.#sentCount, [payload])
  }

  #end(reason: LinkError): void {
    if (this.#endReason !== undefined) return
    this.#endReason = reason
    for (const { reject } of this.#waiting.splice(0)) reject(reason)
    for (const { reject } of this.#requests.values()) reject(reason)
    this.#requests.clear()
    for (const { reject } of this.#settlers.splice(0)) reject(reason)
    this.#wake?.()
    this.#resolveEnded(reason)
  }

  #enter(next: ChannelState): void {
    assert(NEXT[this.#state].includes(next), `channel ${this.name}: ${this.#state} -> ${next}`)
    this.#state = next
  }
}

/** @throws LinkError BAD_FRAME */
function readError(payload: Buffer): PeerError {
  const fields = new Fields(payload, 'reply')
  return new PeerError(fields.text('code', 1, 64), peerText(fields.value('message')))
}
