import { assert } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { CHUNK, HEADER, isErrorChunk, type ReplyMode } from './constants.ts'
import {
  type ContextExtents,
  type DecodedError,
  decodeErrorPayload,
  decodeHolePayload,
  decodeReply,
  decodeStatusPayload,
  type ReplyChunk,
  replyHeaderSize,
} from './replies.ts'
import { readUInt64 } from './transmission.ts'

/**
 * Cuts a server's transmission stream into replies, without I/O: chunks of any size go into `receive`, calls of the
 * sink come out. The data of reads goes straight to where the sink wants it; everything else is small, is collected
 * whole and is bounded before memory is taken for it.
 */
export interface ReplySink {
  /** A simple reply. Returns where the data of a successful read goes; nothing for requests without data. */
  onSimple(cookie: number, errno: number): Buffer | undefined
  /** Where `length` bytes of the export from `offset` on go. @throws ProtocolError when nobody asked for them */
  onData(cookie: number, offset: number, length: number): Buffer
  onHole(cookie: number, offset: number, length: number): void
  onError(cookie: number, error: DecodedError): void
  onStatus(cookie: number, status: ContextExtents): void
  /** The reply is complete: after the simple reply and its data, or after the chunk flagged DONE. */
  onDone(cookie: number): void
}

/** Extents in one status chunk that a client believes ("Servers SHOULD NOT send more than 2^20"). */
const STATUS_PAYLOAD_MAX = 8 + 16 * 2 ** 20
/** Error chunks hold a string and at most a few words. */
const ERROR_PAYLOAD_MAX = 2 ** 16

type ReaderState = 'header' | 'payload' | 'data'

export class ReplyReader {
  readonly #mode: ReplyMode
  readonly #sink: ReplySink
  #state: ReaderState = 'header'
  /** Filled up to `#filled`. In state `data` it is the sink's own buffer. */
  #wanted: Buffer
  #filled = 0
  #sizeKnown = false // header: whether `#wanted` is as long as the header, or only as its magic
  #chunk: ReplyChunk | undefined // payload and data: the chunk they belong to; none for a simple reply
  #cookie = 0
  readonly #header = Buffer.alloc(HEADER.extendedReply)

  constructor(mode: ReplyMode, sink: ReplySink) {
    this.#mode = mode
    this.#sink = sink
    this.#wanted = this.#header
    this.#nextHeader()
  }

  /** Whether the stream stands between two replies' chunks, so that its end is not in the middle of something. */
  get idle(): boolean {
    return this.#state === 'header' && this.#filled === 0
  }

  /** @throws ProtocolError when the stream cannot be followed any further */
  receive(bytes: Buffer): void {
    let at = 0
    while (at < bytes.length) {
      const copied = bytes.copy(this.#wanted, this.#filled, at)
      at += copied
      this.#filled += copied
      // A payload may have no bytes; it is complete as soon as it begins.
      while (this.#filled === this.#wanted.length) this.#finish()
    }
  }

  #nextHeader(): void {
    this.#state = 'header'
    this.#sizeKnown = false
    this.#wanted = this.#header.subarray(0, 4)
    this.#filled = 0
  }

  #collect(state: 'payload' | 'data', target: Buffer): void {
    this.#state = state
    this.#wanted = target
    this.#filled = 0
  }

  #finish(): void {
    if (this.#state === 'payload') {
      this.#finishPayload(this.#wanted)
    } else if (this.#state === 'data') {
      const done = this.#chunk === undefined || this.#chunk.done
      this.#nextHeader()
      if (done) this.#sink.onDone(this.#cookie)
    } else if (!this.#sizeKnown) {
      const size = replyHeaderSize(this.#wanted, 0, this.#mode)
      assert(size !== undefined, 'reply magic is whole')
      this.#wanted = this.#header.subarray(0, size)
      this.#sizeKnown = true
    } else {
      this.#finishHeader()
    }
  }

  #finishHeader(): void {
    const reply = decodeReply(this.#wanted, 0)
    this.#cookie = reply.cookie
    if (reply.kind === 'simple') {
      this.#chunk = undefined
      const target = this.#sink.onSimple(reply.cookie, reply.errno)
      if (target !== undefined) {
        this.#collect('data', target)
      } else {
        this.#nextHeader()
        this.#sink.onDone(reply.cookie)
      }
      return
    }
    this.#chunk = reply
    if (reply.type === CHUNK.OFFSET_DATA) {
      if (reply.payloadLength < 9) throw new ProtocolError(`data chunk of ${reply.payloadLength} bytes`)
      this.#collect('payload', Buffer.alloc(8))
      return
    }
    if (reply.payloadLength > this.#payloadMax(reply.type)) {
      throw new ProtocolError(`reply chunk of type ${reply.type} with ${reply.payloadLength} bytes`)
    }
    this.#collect('payload', Buffer.alloc(reply.payloadLength))
  }

  #payloadMax(type: number): number {
    if (isErrorChunk(type)) return ERROR_PAYLOAD_MAX
    switch (type) {
      case CHUNK.NONE:
        return 0
      case CHUNK.OFFSET_HOLE:
        return 12
      case CHUNK.BLOCK_STATUS:
      case CHUNK.BLOCK_STATUS_EXT:
        if ((type === CHUNK.BLOCK_STATUS_EXT) !== (this.#mode === 'extended')) {
          throw new ProtocolError(`block status of type ${type} in ${this.#mode} mode`)
        }
        return STATUS_PAYLOAD_MAX
      default:
        throw new ProtocolError(`reply chunk of unknown type ${type}`)
    }
  }

  #finishPayload(payload: Buffer): void {
    const chunk = this.#chunk
    assert(chunk !== undefined, 'a payload has a chunk')
    const { cookie, type } = chunk
    if (type === CHUNK.OFFSET_DATA) {
      const length = chunk.payloadLength - 8
      const target = this.#sink.onData(cookie, readUInt64(payload, 0), length)
      assert(target.length === length, 'target of a data chunk')
      this.#collect('data', target)
      return
    }
    this.#nextHeader()
    if (type === CHUNK.NONE) {
      if (!chunk.done) throw new ProtocolError('chunk of type NONE that is not the last')
    } else if (isErrorChunk(type)) {
      this.#sink.onError(cookie, decodeErrorPayload(type, payload))
    } else if (type === CHUNK.OFFSET_HOLE) {
      const hole = decodeHolePayload(payload)
      this.#sink.onHole(cookie, hole.offset, hole.length)
    } else {
      this.#sink.onStatus(cookie, decodeStatusPayload(type, payload))
    }
    if (chunk.done) this.#sink.onDone(cookie)
  }
}
