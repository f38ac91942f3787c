import { ProtocolError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import {
  BLOCK_SIZE,
  CLIENT_FLAG,
  HANDSHAKE_FLAG,
  HEADER,
  INFO,
  isOptionError,
  MAGIC,
  OPTION,
  OPTION_REPLY,
  type ReplyMode,
} from './constants.ts'
import {
  type BlockSizes,
  decodeExportSize,
  decodeInfo,
  decodeListedExport,
  decodeMetaContext,
  decodeOptionReplyHeader,
  encodeClientFlags,
  encodeExportRequest,
  encodeMetaContextRequest,
  encodeOption,
  type ListedExport,
  type MetaContext,
  startsWithMagic,
} from './handshake.ts'

/**
 * The client's side of the handshake, without I/O. Each function is a generator that yields what it needs done: bytes
 * to send, or a number of bytes to receive, which come back as the value of the `yield`. Written that way the order of
 * messages reads from top to bottom, and a test drives it from an array.
 *
 * Errors: ProtocolError where the server breaks the protocol, UserError where it refuses what was asked for.
 */
export type HandshakeStep = { readonly send: Buffer } | { readonly need: number }
type Handshake<Result> = Generator<HandshakeStep, Result, Buffer>

export interface HandshakeOptions {
  /** The best framing to ask for; a server that lacks it gets asked for the next. */
  readonly mode: ReplyMode
  /** Names of metadata contexts to select; those the server lacks are left out. */
  readonly contexts: readonly string[]
}

/** What the server said about an export. */
export interface NegotiatedExport {
  readonly size: number // bytes
  readonly transmissionFlags: number
  readonly name: string // canonical, or as asked for where the server does not say
  readonly description: string // empty where the server has none
  readonly blockSizes: BlockSizes
  readonly mode: ReplyMode
  readonly contexts: readonly MetaContext[]
}

/** The sizes of a server that does not say (specification, "Size constraints"). */
const DEFAULT_BLOCK_SIZES: BlockSizes = { minimum: 1, preferred: 4096, maximum: BLOCK_SIZE.maximum }

/** No option reply is longer than its fixed part and two strings. */
const OPTION_REPLY_DATA_MAX = 64 + 2 * LIMITS.nbdStringMax

/** Replies to one option; more exports than this in one list is not believable. */
const REPLIES_MAX = 64 * 1024

/** Enters the transmission phase of an export. */
export function* openExport(name: string, options: HandshakeOptions): Handshake<NegotiatedExport> {
  const greeting = yield* greet()
  if (!greeting.fixedNewstyle) return yield* exportName(name, 'simple', [], greeting.noZeroes)
  const mode = yield* chooseMode(options.mode)
  const contexts = mode === 'simple' ? [] : yield* setContexts(name, options.contexts)
  const answer = yield* infoOrGo(OPTION.GO, name, mode, contexts)
  if (answer !== undefined) return answer
  if (mode === 'extended') throw new ProtocolError('server agreed on extended headers and does not know GO')
  return yield* exportName(name, mode, contexts, greeting.noZeroes)
}

/** Asks for the names of all exports, then says goodbye. */
export function* listExports(): Handshake<ListedExport[]> {
  yield* greetFixed()
  const exports: ListedExport[] = []
  yield* send(OPTION.LIST)
  for (;;) {
    const reply = yield* receiveReply(OPTION.LIST)
    if (reply.type === OPTION_REPLY.ACK) break
    if (reply.type !== OPTION_REPLY.SERVER) throw refusal(reply, 'the server does not list its exports')
    exports.push(decodeListedExport(reply.data))
    if (exports.length > REPLIES_MAX) throw new ProtocolError(`server lists more than ${REPLIES_MAX} exports`)
  }
  yield* abort()
  return exports
}

/** Asks about one export and for all the metadata contexts that it offers (ids are 0), then says goodbye. */
export function* describeExport(name: string, options: HandshakeOptions): Handshake<NegotiatedExport> {
  yield* greetFixed()
  const mode = yield* chooseMode(options.mode)
  const contexts = mode === 'simple' ? [] : yield* contextOption(OPTION.LIST_META_CONTEXT, name, [])
  const answer = yield* infoOrGo(OPTION.INFO, name, mode, contexts)
  if (answer === undefined)
    throw new UserError('FAILED', 'the server cannot describe an export without opening it')
  yield* abort()
  return answer
}

// ------------------------------------------------------------------------------------------ greeting

interface Greeting {
  readonly fixedNewstyle: boolean
  readonly noZeroes: boolean
}

function* greet(): Handshake<Greeting> {
  const bytes = yield { need: HEADER.greeting }
  if (!startsWithMagic(bytes, 0, MAGIC.init)) throw new ProtocolError('this is no NBD server')
  if (startsWithMagic(bytes, 8, MAGIC.oldstyle))
    throw new ProtocolError('server speaks oldstyle negotiation only')
  if (!startsWithMagic(bytes, 8, MAGIC.option)) throw new ProtocolError('this is no NBD server')
  const flags = bytes.readUInt16BE(16)
  const fixedNewstyle = (flags & HANDSHAKE_FLAG.FIXED_NEWSTYLE) !== 0
  const noZeroes = (flags & HANDSHAKE_FLAG.NO_ZEROES) !== 0
  const clientFlags =
    (fixedNewstyle ? CLIENT_FLAG.FIXED_NEWSTYLE : 0) | (noZeroes ? CLIENT_FLAG.NO_ZEROES : 0)
  yield { send: encodeClientFlags(clientFlags) }
  return { fixedNewstyle, noZeroes }
}

function* greetFixed(): Handshake<void> {
  const greeting = yield* greet()
  if (!greeting.fixedNewstyle)
    throw new UserError('FAILED', 'the server is too old to be asked about its exports')
}

function* chooseMode(best: ReplyMode): Handshake<ReplyMode> {
  if (best === 'extended' && (yield* askFor(OPTION.EXTENDED_HEADERS))) return 'extended'
  if (best !== 'simple' && (yield* askFor(OPTION.STRUCTURED_REPLY))) return 'structured'
  return 'simple'
}

/** An option without data that the server either acknowledges or does not have. */
function* askFor(option: number): Handshake<boolean> {
  yield* send(option)
  const reply = yield* receiveReply(option)
  if (reply.type === OPTION_REPLY.ACK) return true
  if (reply.type === OPTION_REPLY.ERR_TLS_REQD || reply.type === OPTION_REPLY.ERR_SHUTDOWN) {
    throw refusal(reply, 'the server refuses to negotiate')
  }
  if (isOptionError(reply.type)) return false
  throw new ProtocolError(`reply type ${reply.type} to option ${option}`)
}

// ------------------------------------------------------------------------------------------- contexts

/** Selecting is optional: a server that refuses serves the export all the same. */
function* setContexts(name: string, contexts: readonly string[]): Handshake<MetaContext[]> {
  if (contexts.length === 0) return []
  return yield* contextOption(OPTION.SET_META_CONTEXT, name, contexts)
}

function* contextOption(option: number, name: string, queries: readonly string[]): Handshake<MetaContext[]> {
  yield* send(option, encodeMetaContextRequest({ name, queries }))
  const contexts: MetaContext[] = []
  for (;;) {
    const reply = yield* receiveReply(option)
    if (reply.type === OPTION_REPLY.ACK) return contexts
    if (isOptionError(reply.type)) return [] // "the client MUST disregard any context replies"
    if (reply.type !== OPTION_REPLY.META_CONTEXT)
      throw new ProtocolError(`reply type ${reply.type} for contexts`)
    contexts.push(decodeMetaContext(reply.data))
    if (contexts.length > REPLIES_MAX) throw new ProtocolError(`server has more than ${REPLIES_MAX} contexts`)
  }
}

// -------------------------------------------------------------------------------------- choosing an export

/** INFO or GO; undefined when the server knows neither. */
function* infoOrGo(
  option: typeof OPTION.INFO | typeof OPTION.GO,
  name: string,
  mode: ReplyMode,
  contexts: readonly MetaContext[],
): Handshake<NegotiatedExport | undefined> {
  const infos = [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]
  yield* send(option, encodeExportRequest({ name, infos }))
  let size: number | undefined
  let transmissionFlags = 0
  let canonical = name
  let description = ''
  let blockSizes = DEFAULT_BLOCK_SIZES
  for (let count = 0; count < REPLIES_MAX; count++) {
    const reply = yield* receiveReply(option)
    if (reply.type === OPTION_REPLY.ACK) {
      if (size === undefined) throw new ProtocolError('server did not say how large the export is')
      return { size, transmissionFlags, name: canonical, description, blockSizes, mode, contexts }
    }
    if (reply.type === OPTION_REPLY.ERR_UNSUP) return undefined
    if (reply.type !== OPTION_REPLY.INFO) throw refusal(reply, `export "${name}" is refused`)
    const info = decodeInfo(reply.data)
    if (info.type === 'export') {
      size = info.size
      transmissionFlags = info.transmissionFlags
    } else if (info.type === 'name') canonical = info.text
    else if (info.type === 'description') description = info.text
    else if (info.type === 'blockSize') blockSizes = info.sizes
  }
  throw new ProtocolError('server does not stop to describe the export')
}

/** The old way in: no errors, the server just hangs up. */
function* exportName(
  name: string,
  mode: ReplyMode,
  contexts: readonly MetaContext[],
  noZeroes: boolean,
): Handshake<NegotiatedExport> {
  yield* send(OPTION.EXPORT_NAME, Buffer.from(name))
  const bytes = yield { need: 10 + (noZeroes ? 0 : HEADER.exportNamePadding) }
  return {
    size: decodeExportSize(bytes, 0),
    transmissionFlags: bytes.readUInt16BE(8),
    name,
    description: '',
    blockSizes: DEFAULT_BLOCK_SIZES,
    mode,
    contexts,
  }
}

/** A soft disconnect. Old servers close without an answer, so none is waited for. */
function* abort(): Handshake<void> {
  yield* send(OPTION.ABORT)
}

// ---------------------------------------------------------------------------------------------- messages

interface OptionReply {
  readonly type: number
  readonly data: Buffer
}

function* send(option: number, data?: Buffer): Handshake<void> {
  yield { send: encodeOption(option, data) }
}

function* receiveReply(option: number): Handshake<OptionReply> {
  const header = decodeOptionReplyHeader(yield { need: HEADER.optionReply })
  if (header.option !== option)
    throw new ProtocolError(`reply to option ${header.option} instead of ${option}`)
  if (header.length > OPTION_REPLY_DATA_MAX) throw new ProtocolError(`option reply of ${header.length} bytes`)
  const data = header.length === 0 ? Buffer.alloc(0) : yield { need: header.length }
  return { type: header.type, data }
}

/** The error for a reply that ends what the client wanted. */
function refusal(reply: OptionReply, what: string): ProtocolError | UserError {
  if (!isOptionError(reply.type)) return new ProtocolError(`unexpected option reply of type ${reply.type}`)
  // The server's words are for people; nothing in them is trusted, so a bad string is simply left out.
  const words = reply.data
    .toString('utf8')
    .replace(/[^\P{C}]/gu, ' ')
    .trim()
  const because = words === '' ? '' : `: ${words}`
  switch (reply.type) {
    case OPTION_REPLY.ERR_UNKNOWN:
      return new UserError('NOT_FOUND', `${what}, it does not exist there${because}`)
    case OPTION_REPLY.ERR_TLS_REQD:
      return new UserError('REFUSED', `${what}, the server requires TLS${because}`)
    case OPTION_REPLY.ERR_SHUTDOWN:
      return new UserError('BUSY', `${what}, the server is shutting down${because}`)
    case OPTION_REPLY.ERR_POLICY:
      return new UserError('REFUSED', `${what} by its policy${because}`)
    default:
      return new UserError('FAILED', `${what} (reply 2^31 + ${reply.type - 2 ** 31})${because}`)
  }
}

/** Runs a handshake over chunks of bytes as they come. */
export class HandshakeRun<Result> {
  readonly #handshake: Handshake<Result>
  readonly #send: (bytes: Buffer) => void
  #wanted: Buffer = Buffer.alloc(0)
  #filled = 0
  #result: { readonly value: Result } | undefined

  /** @param send called with bytes for the server, at once and later from `receive` */
  constructor(handshake: Handshake<Result>, send: (bytes: Buffer) => void) {
    this.#handshake = handshake
    this.#send = send
    this.#advance(handshake.next())
  }

  /**
   * @returns the result once there is one, and the bytes that came after the handshake
   * @throws ProtocolError, UserError
   */
  receive(chunk: Buffer): { readonly value: Result; readonly leftover: Buffer } | undefined {
    let at = 0
    while (this.#result === undefined) {
      const copied = chunk.copy(this.#wanted, this.#filled, at)
      at += copied
      this.#filled += copied
      if (this.#filled < this.#wanted.length) return undefined
      this.#advance(this.#handshake.next(this.#wanted))
    }
    return { value: this.#result.value, leftover: chunk.subarray(at) }
  }

  #advance(first: IteratorResult<HandshakeStep, Result>): void {
    let step = first
    while (step.done !== true && 'send' in step.value) {
      this.#send(step.value.send)
      step = this.#handshake.next(Buffer.alloc(0))
    }
    if (step.done === true) {
      this.#result = { value: step.value }
    } else if ('need' in step.value) {
      this.#wanted = Buffer.allocUnsafe(step.value.need)
      this.#filled = 0
    }
  }
}
