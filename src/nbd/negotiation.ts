import { assert, unreachable } from '../base/assert.ts'
import { ProtocolError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import {
  BLOCK_SIZE,
  CLIENT_FLAG,
  HANDSHAKE_FLAG,
  HEADER,
  INFO,
  MAGIC,
  OPTION,
  OPTION_REPLY,
  type ReplyMode,
  TRANSMISSION_FLAG,
} from './constants.ts'
import {
  decodeExportRequest,
  decodeMetaContextRequest,
  decodeString,
  encodeExportNameReply,
  encodeGreeting,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeListedExport,
  encodeMetaContext,
  encodeOptionReply,
  type ListedExport,
  type MetaContext,
  startsWithMagic,
} from './handshake.ts'

/**
 * The server's side of the NBD handshake (fixed newstyle), without I/O: chunks go into `receive`, bytes to send come
 * out of `takeOutput`, and at the end there is one outcome. It reads exactly up to the last byte of the handshake;
 * what a chunk holds beyond it belongs to the transmission phase and is handed on as `leftover`.
 *
 *   flags ──► header ──► data ─────► transmission
 *               ▲  │       │  └────► ended
 *               │  └──► discard        ▲
 *               └──────────┴───────────┘
 *
 * Bounds: an option's data is held only up to LIMITS.nbdOptionDataMax, longer data is counted and dropped, absurd data
 * ends the connection; the number of options is limited; and so is the output that has not been taken, because a client
 * MUST wait for the reply to an option before it sends the next.
 *
 * Nothing that a client sends makes it throw anything but a ProtocolError, which ends the connection. Output that was
 * made before the error is still there to be sent.
 */
type NegotiationState = 'flags' | 'header' | 'data' | 'discard' | 'transmission' | 'ended'

const NEXT: Record<NegotiationState, readonly NegotiationState[]> = {
  flags: ['header', 'ended'], // greeting made, the client's 4 bytes of flags are missing
  header: ['data', 'discard', 'ended'], // between options, or inside the 16 bytes that start one
  data: ['header', 'transmission', 'ended'], // collecting the data of a known option
  discard: ['header', 'ended'], // dropping data nobody will look at; the reply comes after its last byte
  transmission: [], // an export was chosen
  ended: [], // aborted, refused or broken
}

/** What the client may choose. Called in the middle of a handshake, so it answers at once, from memory. */
export interface ExportCatalog {
  list(): readonly ListedExport[]
  find(name: string): ExportDescription | ExportRefusal | undefined
}

export interface ExportDescription {
  readonly name: string // canonical
  readonly description: string // for people; may be empty
  readonly size: number // bytes
  readonly readOnly: boolean
  readonly canMultiConn: boolean
  readonly contexts: readonly MetaContext[] // that can be selected; the ids are unique within the export
}

/** The export exists, but not for this client or not now. */
export interface ExportRefusal {
  readonly refused: 'policy' | 'platform' | 'tls' | 'shutdown'
  readonly message: string
}

const REFUSAL_REPLY: Record<ExportRefusal['refused'], number> = {
  policy: OPTION_REPLY.ERR_POLICY,
  platform: OPTION_REPLY.ERR_PLATFORM,
  tls: OPTION_REPLY.ERR_TLS_REQD,
  shutdown: OPTION_REPLY.ERR_SHUTDOWN,
}

export type NegotiationOutcome =
  | {
      readonly kind: 'transmission'
      readonly exportName: string // canonical, also where the client asked for the default export
      readonly readOnly: boolean
      readonly mode: ReplyMode
      readonly contexts: readonly number[] // wire ids
      readonly leftover: Buffer // first bytes of the transmission phase
    }
  /** The client said goodbye: send the output, then close. */
  | { readonly kind: 'aborted' }
  /** An option that cannot be answered with an error asked for what it cannot have: close. */
  | { readonly kind: 'refused'; readonly reason: string }

/** Options whose data is looked at; the data of others is dropped. */
const KNOWN_OPTIONS: ReadonlySet<number> = new Set([
  OPTION.EXPORT_NAME,
  OPTION.LIST,
  OPTION.INFO,
  OPTION.GO,
  OPTION.STRUCTURED_REPLY,
  OPTION.LIST_META_CONTEXT,
  OPTION.SET_META_CONTEXT,
  OPTION.EXTENDED_HEADERS,
])

/** An option that was refused: ends its execution, becomes its reply. */
class OptionRefusal extends Error {
  override readonly name = 'OptionRefusal'
  readonly type: number
  constructor(type: number, message: string) {
    super(message)
    this.type = type
  }
}

export class Negotiation {
  readonly #catalog: ExportCatalog
  #state: NegotiationState = 'flags'
  /** Filled up to `#filled`; complete when full. Not used while discarding. */
  #wanted: Buffer = Buffer.alloc(HEADER.clientFlags)
  #filled = 0
  #discardLeft = 0
  #output: Buffer[] = []
  #outputLength = 0

  #fixedNewstyle = false
  #noZeroes = false
  #option = 0
  #optionLength = 0
  #optionCount = 0
  #mode: ReplyMode = 'simple'
  #shuttingDown = false
  /** What the last SET_META_CONTEXT selected, and for which export. */
  #selected: { readonly exportName: string; readonly contexts: readonly MetaContext[] } | undefined

  constructor(catalog: ExportCatalog) {
    this.#catalog = catalog
    this.#send(encodeGreeting(HANDSHAKE_FLAG.FIXED_NEWSTYLE | HANDSHAKE_FLAG.NO_ZEROES))
  }

  /** From now on every option but ABORT is answered with ERR_SHUTDOWN. */
  shutDown(): void {
    this.#shuttingDown = true
  }

  /** The bytes to send since the last call; empty when there are none. */
  takeOutput(): Buffer {
    const bytes = Buffer.concat(this.#output)
    this.#output = []
    this.#outputLength = 0
    return bytes
  }

  /**
   * Takes what arrived. After an outcome no more may be given.
   * @returns the outcome once there is one
   * @throws ProtocolError when the connection has to end
   */
  receive(chunk: Buffer): NegotiationOutcome | undefined {
    assert(NEXT[this.#state].length > 0, 'negotiation is over')
    try {
      return this.#consume(chunk)
    } catch (error) {
      if (error instanceof ProtocolError) this.#enter('ended')
      throw error
    }
  }

  #enter(next: NegotiationState): void {
    assert(NEXT[this.#state].includes(next), `negotiation: ${this.#state} -> ${next}`)
    this.#state = next
  }

  #consume(chunk: Buffer): NegotiationOutcome | undefined {
    let at = 0
    for (;;) {
      if (this.#state === 'discard') {
        const dropped = Math.min(this.#discardLeft, chunk.length - at)
        at += dropped
        this.#discardLeft -= dropped
        if (this.#discardLeft > 0) return undefined
        const outcome = this.#finishDiscarded()
        if (outcome !== undefined) return outcome
      } else {
        const copied = chunk.copy(this.#wanted, this.#filled, at)
        at += copied
        this.#filled += copied
        if (this.#filled < this.#wanted.length) return undefined
        const outcome = this.#finishWanted(chunk, at)
        if (outcome !== undefined) return outcome
      }
    }
  }

  #want(length: number): void {
    this.#wanted = Buffer.allocUnsafe(length)
    this.#filled = 0
  }

  #nextOption(): void {
    this.#enter('header')
    this.#want(HEADER.option)
  }

  /** `#wanted` is full: acts on it. */
  #finishWanted(chunk: Buffer, at: number): NegotiationOutcome | undefined {
    switch (this.#state) {
      case 'flags':
        this.#takeClientFlags(this.#wanted.readUInt32BE(0))
        this.#nextOption()
        return undefined
      case 'header':
        this.#takeOptionHeader(this.#wanted)
        return undefined
      case 'data': {
        const data = this.#wanted
        // The empty data of an option that is complete with its header is its own buffer, never the header's.
        assert(data.length === this.#optionLength, 'option data')
        const outcome = this.#execute(data, chunk, at)
        if (outcome === undefined) this.#nextOption()
        else this.#enter(outcome.kind === 'transmission' ? 'transmission' : 'ended')
        return outcome
      }
      case 'discard':
      case 'transmission':
      case 'ended':
        assert(false, `negotiation: input in state ${this.#state}`)
        return undefined
      default:
        return unreachable(this.#state)
    }
  }

  #takeClientFlags(flags: number): void {
    // "the server MUST drop the TCP connection if the client sets an unknown flag"
    const unknown = (flags & ~(CLIENT_FLAG.FIXED_NEWSTYLE | CLIENT_FLAG.NO_ZEROES)) >>> 0
    if (unknown !== 0) throw new ProtocolError(`unknown client flags 0x${unknown.toString(16)}`)
    this.#fixedNewstyle = (flags & CLIENT_FLAG.FIXED_NEWSTYLE) !== 0
    this.#noZeroes = (flags & CLIENT_FLAG.NO_ZEROES) !== 0
  }

  #takeOptionHeader(header: Buffer): void {
    if (!startsWithMagic(header, 0, MAGIC.option)) throw new ProtocolError('option magic')
    this.#option = header.readUInt32BE(8)
    this.#optionLength = header.readUInt32BE(12)
    this.#optionCount++
    if (this.#optionCount > LIMITS.nbdOptionsPerHandshakeMax) throw new ProtocolError('too many options')
    if (this.#outputLength > LIMITS.nbdHandshakeOutputMax) {
      throw new ProtocolError('options sent without waiting for replies')
    }
    if (!this.#fixedNewstyle && this.#option !== OPTION.EXPORT_NAME) {
      // Without fixed newstyle the client knows no option replies; there is no way to tell it.
      throw new ProtocolError(`option ${this.#option} without fixed newstyle`)
    }
    if (this.#optionLength > LIMITS.nbdOptionDiscardMax) {
      throw new ProtocolError(`option ${this.#option} with ${this.#optionLength} bytes of data`)
    }
    if (KNOWN_OPTIONS.has(this.#option) && this.#optionLength <= LIMITS.nbdOptionDataMax) {
      this.#enter('data')
      this.#want(this.#optionLength)
    } else {
      this.#enter('discard')
      this.#discardLeft = this.#optionLength
    }
  }

  /** An option whose data went unread: goodbye, unknown here, or too big. */
  #finishDiscarded(): NegotiationOutcome | undefined {
    if (this.#option === OPTION.ABORT) {
      this.#reply(OPTION_REPLY.ACK) // "a server SHOULD ignore any data sent by the client"
      this.#enter('ended')
      return { kind: 'aborted' }
    }
    if (this.#option === OPTION.EXPORT_NAME) throw new ProtocolError('export name is too long')
    // A failed SET_META_CONTEXT also replaces what was selected before.
    if (this.#option === OPTION.SET_META_CONTEXT) this.#selected = undefined
    if (this.#shuttingDown) this.#replyError(OPTION_REPLY.ERR_SHUTDOWN, 'the server is shutting down')
    else if (KNOWN_OPTIONS.has(this.#option))
      this.#replyError(OPTION_REPLY.ERR_TOO_BIG, 'too much data in one option')
    else if (this.#option === OPTION.STARTTLS)
      this.#replyError(OPTION_REPLY.ERR_UNSUP, 'TLS is not supported here')
    else this.#replyError(OPTION_REPLY.ERR_UNSUP, `option ${this.#option} is not supported`)
    this.#nextOption()
    return undefined
  }

  #execute(data: Buffer, chunk: Buffer, at: number): NegotiationOutcome | undefined {
    if (this.#option === OPTION.EXPORT_NAME) return this.#exportName(data, chunk, at)
    try {
      if (this.#option === OPTION.SET_META_CONTEXT) this.#selected = undefined // "including when this command fails"
      if (this.#shuttingDown)
        throw new OptionRefusal(OPTION_REPLY.ERR_SHUTDOWN, 'the server is shutting down')
      return this.#executeOption(data, chunk, at)
    } catch (error) {
      if (error instanceof OptionRefusal) this.#replyError(error.type, error.message)
      // Thrown by the decoders of handshake.ts: the option's data is wrong, but the stream is still in step.
      else if (error instanceof ProtocolError) this.#replyError(OPTION_REPLY.ERR_INVALID, error.message)
      else throw error
      return undefined
    }
  }

  #executeOption(data: Buffer, chunk: Buffer, at: number): NegotiationOutcome | undefined {
    switch (this.#option) {
      case OPTION.LIST:
        this.#requireNoData(data)
        for (const listed of this.#catalog.list())
          this.#reply(OPTION_REPLY.SERVER, encodeListedExport(listed))
        this.#reply(OPTION_REPLY.ACK)
        return undefined
      case OPTION.INFO:
      case OPTION.GO:
        return this.#infoOrGo(data, chunk, at)
      case OPTION.STRUCTURED_REPLY:
        this.#requireNoData(data)
        if (this.#mode === 'extended') {
          throw new OptionRefusal(OPTION_REPLY.ERR_EXT_HEADER_REQD, 'extended headers are already in use')
        }
        this.#mode = 'structured'
        this.#reply(OPTION_REPLY.ACK)
        return undefined
      case OPTION.EXTENDED_HEADERS:
        this.#requireNoData(data)
        this.#mode = 'extended' // "takes precedence over structured replies"
        this.#reply(OPTION_REPLY.ACK)
        return undefined
      case OPTION.LIST_META_CONTEXT:
        this.#listMetaContext(data)
        return undefined
      case OPTION.SET_META_CONTEXT:
        this.#setMetaContext(data)
        return undefined
      default:
        assert(false, `option ${this.#option} is known but has no branch`)
        return undefined
    }
  }

  #requireNoData(data: Buffer): void {
    if (data.length > 0) throw new OptionRefusal(OPTION_REPLY.ERR_INVALID, 'this option takes no data')
  }

  // ------------------------------------------------------------------------------- choosing an export

  /** The export of that name. An empty name is the default export: the only one, where there is only one. */
  #find(name: string): ExportDescription {
    let wanted = name
    if (name === '') {
      const [only, ...others] = this.#catalog.list()
      if (only === undefined || others.length > 0) {
        throw new OptionRefusal(OPTION_REPLY.ERR_UNKNOWN, 'there is no default export: name one')
      }
      wanted = only.name
    }
    const found = this.#catalog.find(wanted)
    if (found === undefined)
      throw new OptionRefusal(OPTION_REPLY.ERR_UNKNOWN, `no export "${wanted.slice(0, 255)}"`)
    if ('refused' in found) throw new OptionRefusal(REFUSAL_REPLY[found.refused], found.message)
    return found
  }

  #exportName(data: Buffer, chunk: Buffer, at: number): NegotiationOutcome {
    if (this.#mode === 'extended') throw new ProtocolError('EXPORT_NAME after EXTENDED_HEADERS')
    if (this.#shuttingDown) return { kind: 'refused', reason: 'the server is shutting down' }
    const name = decodeString(data, 'export name')
    try {
      const found = this.#find(name)
      this.#send(encodeExportNameReply(found.size, this.#transmissionFlags(found), this.#noZeroes))
      return this.#chosen(found, chunk, at)
    } catch (error) {
      if (error instanceof OptionRefusal) return { kind: 'refused', reason: error.message }
      throw error
    }
  }

  #infoOrGo(data: Buffer, chunk: Buffer, at: number): NegotiationOutcome | undefined {
    const request = decodeExportRequest(data)
    const found = this.#find(request.name)
    const infos = new Set(request.infos)
    if (infos.has(INFO.NAME)) this.#reply(OPTION_REPLY.INFO, encodeInfoText(INFO.NAME, found.name))
    if (infos.has(INFO.DESCRIPTION) && found.description !== '') {
      this.#reply(OPTION_REPLY.INFO, encodeInfoText(INFO.DESCRIPTION, found.description))
    }
    if (infos.has(INFO.BLOCK_SIZE)) this.#reply(OPTION_REPLY.INFO, encodeInfoBlockSize(BLOCK_SIZE))
    this.#reply(OPTION_REPLY.INFO, encodeInfoExport(found.size, this.#transmissionFlags(found)))
    this.#reply(OPTION_REPLY.ACK)
    return this.#option === OPTION.GO ? this.#chosen(found, chunk, at) : undefined
  }

  #chosen(found: ExportDescription, chunk: Buffer, at: number): NegotiationOutcome {
    return {
      kind: 'transmission',
      exportName: found.name,
      readOnly: found.readOnly,
      mode: this.#mode,
      contexts: this.#contextsFor(found).map((context) => context.id),
      leftover: chunk.subarray(at),
    }
  }

  #transmissionFlags(found: ExportDescription): number {
    const flag = TRANSMISSION_FLAG
    let flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.SEND_CACHE
    flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
    if (found.readOnly) flags |= flag.READ_ONLY
    if (found.canMultiConn) flags |= flag.CAN_MULTI_CONN
    if (this.#mode !== 'simple') flags |= flag.SEND_DF
    if (this.#mode === 'extended' && this.#contextsFor(found).length > 0) flags |= flag.BLOCK_STATUS_PAYLOAD
    return flags
  }

  // ------------------------------------------------------------------------------- metadata contexts

  /** The selected contexts, if they were selected for this export and it still has them. */
  #contextsFor(found: ExportDescription): readonly MetaContext[] {
    const selected = this.#selected
    if (selected === undefined || selected.exportName !== found.name) return []
    return found.contexts.filter((c) => selected.contexts.some((s) => s.id === c.id && s.name === c.name))
  }

  /** No query lists everything; a query that ends in a colon is a wildcard, as `base:` must be. */
  #listMetaContext(data: Buffer): void {
    const request = decodeMetaContextRequest(data)
    const found = this.#find(request.name)
    for (const context of found.contexts) {
      const matches = request.queries.some((q) =>
        q.endsWith(':') ? context.name.startsWith(q) : context.name === q,
      )
      if (request.queries.length > 0 && !matches) continue
      this.#reply(OPTION_REPLY.META_CONTEXT, encodeMetaContext({ id: 0, name: context.name }))
    }
    this.#reply(OPTION_REPLY.ACK)
  }

  /** Only exact names select; wildcards and names nobody knows are ignored. */
  #setMetaContext(data: Buffer): void {
    const request = decodeMetaContextRequest(data)
    if (this.#mode === 'simple') {
      throw new OptionRefusal(
        OPTION_REPLY.ERR_INVALID,
        'metadata contexts need structured replies or extended headers',
      )
    }
    const found = this.#find(request.name)
    const contexts = found.contexts.filter((context) => request.queries.includes(context.name))
    if (contexts.length > LIMITS.nbdMetaContextsMax) {
      throw new OptionRefusal(
        OPTION_REPLY.ERR_TOO_BIG,
        `more than ${LIMITS.nbdMetaContextsMax} metadata contexts`,
      )
    }
    for (const context of contexts) this.#reply(OPTION_REPLY.META_CONTEXT, encodeMetaContext(context))
    this.#reply(OPTION_REPLY.ACK)
    this.#selected = { exportName: found.name, contexts }
  }

  // ---------------------------------------------------------------------------------------- output

  #reply(type: number, data?: Buffer): void {
    this.#send(encodeOptionReply(this.#option, type, data))
  }

  #replyError(type: number, message: string): void {
    this.#reply(type, Buffer.from(message))
  }

  #send(bytes: Buffer): void {
    this.#output.push(bytes)
    this.#outputLength += bytes.length
  }
}
