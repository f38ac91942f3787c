/**
 * A session: what two daemons have with each other over one or more connections, from the moment when all of them stand until the first
 * of them ends. It carries channels.
 *
 * Who goes where. Connection 0 carries everything about channels, and the messages of those that are not bulk. Bulk has the other
 * connections; where there are none it shares connection 0, leaves room there, and waits behind the rest. On an ordered channel all messages of
 * a direction take one connection. Messages without an order take the connection with the least on its way; urgent ones
 * spill over to the others when connection 0 is full.
 *
 * The end. A session whose connection ends is over, for the reason that the connection had: what a lost connection carried cannot be told from
 * what arrived, so everything unacknowledged fails on every channel, and the users begin anew in the next session. Nothing is sent a second time.
 */
import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Channel, type ChannelCarrier, type ChannelOptions } from './channel.ts'
import type { Connection, ConnectionCounters } from './connection.ts'
import { LinkError, peerText } from './errors.ts'
import { type Frame, KIND, type Kind, SESSION_PHASE } from './frame.ts'
import type { Agreement, ProvenPeer } from './handshake.ts'
import { decodeReason, encodeReason, Fields } from './hello.ts'
import type { SideWires } from './side-wires.ts'

/** A channel that the peer wants to open. It is answered once, now or later; no message comes before. */
export interface ChannelOffer {
  readonly name: string
  readonly params: unknown // what the peer gave; any JSON value
  accept(options?: Pick<ChannelOptions, 'window'>): Channel
  /** The peer's `open` throws CHANNEL_REFUSED with these words. */
  refuse(message: string): void
}

/** Answers offers. @throws LinkError, ProtocolError refuses the channel with that message */
export type ChannelHandler = (offer: ChannelOffer) => void

export interface SessionCounters extends ConnectionCounters {
  readonly roundTripMs: number | undefined // of connection 0
  readonly outstanding: number // bytes sent and not acknowledged
  readonly channels: number
}

/** What a channel's receiving side has to have at least, so that its sender never waits for an acknowledgement that is not due. */
const WINDOW_MIN = 2 * LIMITS.linkPayloadMax
const ID_MAX = 2 ** 32 - 1

interface Opening {
  readonly channel: Channel
  readonly resolve: (channel: Channel) => void
  readonly reject: (error: LinkError) => void
}

export class Session implements ChannelCarrier {
  readonly id: string
  readonly peer: ProvenPeer
  readonly purpose: string
  readonly capabilities: ReadonlySet<string> // those that both sides have
  /** Of a session over plain TCP. */
  readonly sideWires: SideWires | undefined
  readonly #connections: readonly Connection[]
  readonly #own: 0 | 1 // the parity of the channels that this side opens
  readonly #channels = new Map<number, Channel>()
  readonly #openings = new Map<number, Opening>()
  readonly #offers = new Set<number>() // channels of the peer that are not answered yet
  #lastOwn: number
  #lastPeers = 0
  #granted = 0 // windows of all channels
  #onChannel: ChannelHandler | undefined
  #urgent = new Set<Channel>() // channels with messages that wait, in turn
  #bulk = new Set<Channel>()
  #pumping = false
  #endReason: LinkError | undefined
  #resolveEnded: (reason: LinkError) => void = () => undefined
  /** Resolves when the session is over. */
  readonly ended = new Promise<LinkError>((resolve) => {
    this.#resolveEnded = resolve
  })

  /** @param connections all that the session will have, in order, each paused */
  constructor(
    side: 'client' | 'server',
    connections: readonly Connection[],
    agreement: Agreement,
    sideWires?: SideWires,
  ) {
    assert(connections.length === agreement.connections, 'all connections stand')
    this.#connections = connections
    this.#own = side === 'client' ? 1 : 0
    this.#lastOwn = this.#own === 1 ? -1 : 0
    this.id = agreement.session
    this.peer = agreement.peer
    this.purpose = agreement.purpose
    this.sideWires = sideWires
    this.capabilities = agreement.capabilities
    connections.forEach((connection, index) => {
      const handler = {
        onFrame: (frame: Frame): void => this.#take(frame, index),
        onRoom: (): void => this.#pump(),
        onEnd: (reason: LinkError): void => this.#end(reason),
      }
      connection.enterSession(SESSION_PHASE, handler, agreement.window)
    })
  }

  /** Takes frames from now on: called when whoever wants the session has had the chance to ask for channels. */
  start(): void {
    for (const connection of this.#connections) connection.resume()
  }

  get endReason(): LinkError | undefined {
    return this.#endReason
  }

  /** Resolves when all of its streams are destroyed. */
  async gone(): Promise<void> {
    await Promise.all(this.#connections.map((connection) => connection.gone))
  }

  counters(): SessionCounters {
    const sum = { bytesIn: 0, bytesOut: 0, framesIn: 0, framesOut: 0, outstanding: 0 }
    for (const connection of this.#connections) {
      sum.bytesIn += connection.counters.bytesIn
      sum.bytesOut += connection.counters.bytesOut
      sum.framesIn += connection.counters.framesIn
      sum.framesOut += connection.counters.framesOut
      sum.outstanding += connection.outstanding
    }
    return { ...sum, roundTripMs: this.#connections[0]?.roundTripMs, channels: this.#channels.size }
  }

  /** Says who answers when the peer opens channels. Without, all are refused. */
  onChannel(handler: ChannelHandler): void {
    this.#onChannel = handler
  }

  /**
   * Opens a channel to the peer's handler.
   * @param params any JSON value, for the handler
   * @throws LinkError CHANNEL_REFUSED with the peer's words; why the session ended; OVERFLOW for too many channels
   */
  open(name: string, params: unknown = null, options: ChannelOptions = {}): Promise<Channel> {
    if (this.#endReason !== undefined) return Promise.reject(this.#endReason)
    assert(Buffer.byteLength(name) <= LIMITS.linkChannelNameBytesMax, 'channel name')
    const window = this.#windowFor(options.window)
    if (window === undefined) {
      return Promise.reject(
        new LinkError('OVERFLOW', `channel ${name}: too many channels, or too large ones`),
      )
    }
    this.#lastOwn += 2
    assert(this.#lastOwn <= ID_MAX, 'channel numbers')
    const channel = new Channel(this, this.#lastOwn, name, options, window)
    const { bulk, ordered } = channel
    const payload = Buffer.from(JSON.stringify({ name, params, bulk, ordered, window }), 'utf8')
    assert(payload.length <= LIMITS.linkControlPayloadMax, 'channel parameters')
    return new Promise((resolve, reject) => {
      this.#add(channel)
      this.#openings.set(channel.id, { channel, resolve, reject })
      this.control(KIND.open, channel.id, 0, [payload])
    })
  }

  /** Ends the session in order: the peer is told why. What is not acknowledged fails on both sides. */
  close(reason: string): void {
    this.#end(new LinkError('CLOSED', reason))
  }

  /** Ends the session for a reason that the peer is told, too. */
  fail(reason: LinkError): void {
    this.#end(reason)
  }

  // ---- for channels

  transmit(channel: Channel, flags: number, type: number, id: number, parts: readonly Uint8Array[]): boolean {
    let length = 0
    for (const part of parts) length += part.length
    const connection = this.#choose(channel, length)
    if (connection === undefined) return false
    connection.transmit(KIND.message, flags, channel.id, type, id, parts)
    return true
  }

  control(kind: Kind, channel: number, id: number, parts: readonly Uint8Array[] = []): void {
    this.#connections[0]?.send(kind, parts, { channel, id })
  }

  wait(channel: Channel): void {
    const waiting = channel.bulk ? this.#bulk : this.#urgent
    waiting.add(channel)
    this.#pump()
  }

  forget(channel: Channel): void {
    if (this.#channels.delete(channel.id)) this.#granted -= channel.window
    this.#urgent.delete(channel)
    this.#bulk.delete(channel)
  }

  // ---- sending

  #choose(channel: Channel, length: number): Connection | undefined {
    const connections = this.#connections
    const [first] = connections
    if (first === undefined || this.#endReason !== undefined) return undefined
    const { bulk } = channel
    if (connections.length === 1) return first.hasRoom(length, bulk) ? first : undefined
    if (!bulk && first.hasRoom(length, false)) return first
    if (!bulk && channel.ordered) return undefined
    if (channel.ordered) {
      const own = connections[1 + (channel.id % (connections.length - 1))]
      return own?.hasRoom(length, bulk) ? own : undefined
    }
    let best: Connection | undefined
    for (let index = 1; index < connections.length; index++) {
      const connection = connections[index]
      if (!connection?.hasRoom(length, true)) continue
      if (best === undefined || connection.outstanding < best.outstanding) best = connection
    }
    return best
  }

  /** Lets the channels that wait send, each one message a round; bulk when nothing urgent can go. */
  #pump(): void {
    if (this.#pumping) return
    this.#pumping = true
    for (const waiting of [this.#urgent, this.#bulk]) {
      for (let progress = waiting.size > 0; progress; ) {
        progress = false
        for (const channel of [...waiting]) {
          const result = channel.sendNext()
          if (result === 'sent') progress = true
          // A channel whose window is full comes back with its next credit.
          else if (result !== 'connections') waiting.delete(channel)
        }
      }
    }
    this.#pumping = false
  }

  // ---- receiving

  #take(frame: Frame, index: number): void {
    if (frame.kind === KIND.message) {
      this.#channelOf(frame).receive(frame)
      return
    }
    if (index !== 0)
      throw new LinkError('BAD_FRAME', `a frame of kind ${frame.kind} belongs on the first connection`)
    switch (frame.kind) {
      case KIND.credit:
        this.#answeredOf(frame).credit(frame.id)
        break
      case KIND.settle:
        this.#answeredOf(frame).settle(frame.id)
        break
      case KIND.close:
        this.#answeredOf(frame).peerClosed(frame.id, frame.payload)
        break
      case KIND.open:
        this.#takeOpen(frame)
        break
      // What they say is read first: where it makes no sense, the end of the session tells whoever waits for the channel.
      case KIND.opened: {
        const window = new Fields(frame.payload, 'opened').integer('window', WINDOW_MIN, 2 ** 31 - 1)
        const opening = this.#takeAnswer(frame)
        opening.channel.opened(window)
        opening.resolve(opening.channel)
        break
      }
      case KIND.rejected: {
        const { message } = decodeReason(frame.payload)
        const { channel, reject } = this.#takeAnswer(frame)
        const error = new LinkError(
          'CHANNEL_REFUSED',
          `the peer refuses the channel ${channel.name}: ${message}`,
        )
        this.forget(channel)
        channel.fail(error)
        reject(error)
        break
      }
      case KIND.refuse: {
        const { code, message } = decodeReason(frame.payload)
        throw new LinkError(code ?? 'NOT_WELCOME', `the peer refuses: ${message}`)
      }
      default:
        throw new LinkError('BAD_FRAME', `a frame of kind ${frame.kind} has no place in a session`)
    }
  }

  #channelOf(frame: Frame): Channel {
    const channel = this.#channels.get(frame.channel)
    if (channel === undefined) throw new LinkError('BAD_FRAME', `there is no channel ${frame.channel}`)
    return channel
  }

  /** These come on the same connection as the answer to `open`, so never before it. */
  #answeredOf(frame: Frame): Channel {
    if (this.#openings.has(frame.channel))
      throw new LinkError('BAD_FRAME', `channel ${frame.channel} is not open yet`)
    return this.#channelOf(frame)
  }

  #takeAnswer(frame: Frame): Opening {
    const opening = this.#openings.get(frame.channel)
    if (opening === undefined) throw new LinkError('BAD_FRAME', `channel ${frame.channel} was not asked for`)
    this.#openings.delete(frame.channel)
    return opening
  }

  #takeOpen(frame: Frame): void {
    const id = frame.channel
    // Numbers are not used again, so a frame that comes late cannot reach another channel.
    if (id % 2 === this.#own || id <= this.#lastPeers) {
      throw new LinkError('BAD_FRAME', `the peer cannot open a channel ${id}`)
    }
    this.#lastPeers = id
    const fields = new Fields(frame.payload, 'open')
    const name = fields.text('name', 1, LIMITS.linkChannelNameBytesMax)
    const options = { bulk: fields.value('bulk') === true, ordered: fields.value('ordered') !== false }
    const peerWindow = fields.integer('window', WINDOW_MIN, 2 ** 31 - 1)
    const handler = this.#onChannel
    if (handler === undefined) {
      this.#refuse(id, 'nobody takes channels here')
      return
    }
    if (this.#offers.size >= LIMITS.linkChannelsPerSession) {
      this.#refuse(id, 'too many channels')
      return
    }
    this.#offers.add(id)
    const answer = (): boolean => this.#offers.delete(id) && this.#endReason === undefined
    const offer: ChannelOffer = {
      name,
      params: fields.value('params'),
      accept: ({ window: wanted } = {}) => {
        const window = this.#windowFor(wanted)
        const channel = new Channel(this, id, name, options, window ?? WINDOW_MIN)
        channel.opened(peerWindow)
        if (!answer()) {
          channel.fail(this.#endReason ?? new LinkError('CHANNEL_CLOSED', 'it was answered before'))
          return channel
        }
        if (window === undefined) {
          this.#refuse(id, 'too many channels, or too large ones')
          channel.fail(new LinkError('OVERFLOW', `channel ${name}: too many channels, or too large ones`))
          return channel
        }
        this.#add(channel)
        this.control(KIND.opened, id, 0, [Buffer.from(JSON.stringify({ window }), 'utf8')])
        return channel
      },
      refuse: (message) => {
        if (answer()) this.#refuse(id, message)
      },
    }
    try {
      handler(offer)
    } catch (error) {
      if (!(error instanceof LinkError || error instanceof ProtocolError)) throw error
      offer.refuse(error.message)
    }
  }

  #refuse(id: number, message: string): void {
    this.control(KIND.rejected, id, 0, [encodeReason(new LinkError('CHANNEL_REFUSED', message))])
  }

  // ---- channels

  /** @returns what a further channel gets; undefined where there is no room for one */
  #windowFor(wanted: number = LIMITS.linkChannelWindow): number | undefined {
    assert(wanted >= WINDOW_MIN && wanted < 2 ** 31, 'channel window')
    if (this.#channels.size >= LIMITS.linkChannelsPerSession) return undefined
    const window = this.#granted + wanted <= LIMITS.linkSessionWindowAmple ? wanted : WINDOW_MIN
    return this.#granted + window <= LIMITS.linkSessionWindowMax ? window : undefined
  }

  #add(channel: Channel): void {
    this.#channels.set(channel.id, channel)
    this.#granted += channel.window
  }

  // ---- the end

  #end(reason: LinkError): void {
    if (this.#endReason !== undefined) return
    this.#endReason = reason
    for (const connection of this.#connections) connection.close(reason)
    for (const { reject } of this.#openings.values()) reject(reason)
    this.#openings.clear()
    for (const channel of this.#channels.values()) channel.fail(reason)
    this.#channels.clear()
    this.#urgent.clear()
    this.#bulk.clear()
    this.#resolveEnded(reason)
  }
}

/** For logs: the peer in a few words. */
export function describePeer(peer: ProvenPeer): string {
  return `${peerText(peer.name)} (${peer.fingerprint})`
}
