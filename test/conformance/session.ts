/**
 * The transmission phase over a wire, as raw messages. A stream is cut into simple replies and chunks by the magics and
 * lengths in it, messages are put with the request whose cookie they carry, and that is all: whether chunks fit their
 * request is for the checks. What makes a stream impossible to follow is a breach at once: a magic that was not negotiated,
 * a cookie that no open request has (also: of a reply that had its DONE), an absurd length.
 */
import { type EncodableRequest, encodeRequest } from '../support/wire-client.ts'
import { Breach, expect, must } from './check.ts'
import type { BlockSize } from './handshake.ts'
import { Ended, type Wire } from './wire.ts'

export type Mode = 'simple' | 'structured' | 'extended'
export const MODES: readonly Mode[] = ['simple', 'structured', 'extended']
/** The modes whose replies have chunks. */
export const CHUNK_MODES: readonly Mode[] = ['structured', 'extended']

export const ERRNO = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const
const NAME_OF_ERRNO = new Map<number, string>(
  Object.entries(ERRNO).map(([name, value]): [number, string] => [value, name]),
)
export const errnoName = (errno: number) =>
  errno === 0 ? 'success' : (NAME_OF_ERRNO.get(errno) ?? `error ${errno}`)

export const CHUNK = {
  NONE: 0,
  DATA: 1,
  HOLE: 2,
  STATUS: 5,
  STATUS_EXT: 6,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const
export const isErrorChunk = (chunk: Chunk) => (chunk.type & 0x8000) !== 0
export const isContent = (chunk: Chunk) => chunk.type === CHUNK.DATA || chunk.type === CHUNK.HOLE

export interface Chunk {
  readonly flags: number
  readonly type: number
  readonly repeatedOffset: bigint | undefined // extended: that of the request
  readonly payload: Buffer
}

export interface Sent {
  readonly command: number
  readonly flags: number
  readonly cookie: bigint
  readonly offset: bigint
  readonly length: bigint // of the range, or of the payload
}

export interface Answer {
  readonly request: Sent
  simple: { readonly errno: number; readonly data: Buffer } | undefined
  readonly chunks: Chunk[]
}

/** Payloads that no server sends in answer to what the checks ask for. */
const PAYLOAD_MAX = 2 ** 27

export class Session {
  readonly mode: Mode
  readonly wire: Wire
  readonly size: bigint
  readonly flags: number // transmission flags of this session
  readonly blockSize: BlockSize | undefined
  /** Names of the contexts in use by their ids. */
  readonly contexts: ReadonlyMap<number, string>
  /** Set where the check itself has seen to the end of the connection. */
  over = false

  readonly #open = new Map<bigint, Answer>()
  readonly #answers = new WeakMap<Sent, Answer>()
  #nextCookie = 0xc0ffee0000000001n // needs all 64 bits

  constructor(
    wire: Wire,
    mode: Mode,
    facts: { readonly size: bigint; readonly flags: number; readonly blockSize: BlockSize | undefined },
    contexts: ReadonlyMap<number, string>,
  ) {
    this.wire = wire
    this.mode = mode
    this.size = facts.size
    this.flags = facts.flags
    this.blockSize = facts.blockSize
    this.contexts = contexts
  }

  can(flag: number): boolean {
    return (this.flags & flag) !== 0
  }

  /** The bytes of a request, not sent; its answer is expected from now on. `change` them to break rules. */
  prepare(request: EncodableRequest, change?: (bytes: Buffer) => void): { sent: Sent; bytes: Buffer } {
    const cookie = request.cookie ?? this.#nextCookie++
    const bytes = encodeRequest(request, this.mode, cookie)
    change?.(bytes)
    const sent: Sent = {
      command: bytes.readUInt16BE(6),
      flags: bytes.readUInt16BE(4),
      cookie,
      offset: bytes.readBigUInt64BE(16),
      length: this.mode === 'extended' ? bytes.readBigUInt64BE(24) : BigInt(bytes.readUInt32BE(24)),
    }
    const answer: Answer = { request: sent, simple: undefined, chunks: [] }
    this.#open.set(cookie, answer)
    this.#answers.set(sent, answer)
    return { sent, bytes }
  }

  send(request: EncodableRequest, change?: (bytes: Buffer) => void): Sent {
    const { sent, bytes } = this.prepare(request, change)
    this.wire.send(bytes)
    return sent
  }

  /** Sends a request and reads its answer. */
  async ask(request: EncodableRequest, change?: (bytes: Buffer) => void): Promise<Answer> {
    return await this.answer(this.send(request, change))
  }

  /** What has come in answer to `sent` so far. */
  soFar(sent: Sent): Answer {
    const answer = this.#answers.get(sent)
    if (answer === undefined) throw new Error('the request is not of this session')
    return answer
  }

  /** Reads messages until `sent` is answered. */
  async answer(sent: Sent): Promise<Answer> {
    const answer = this.soFar(sent)
    while (this.#open.get(sent.cookie) === answer) await this.#message()
    return answer
  }

  /** The answers to requests that are all in flight, in the order of `sents`. */
  async answers(sents: readonly Sent[]): Promise<Answer[]> {
    const answers: Answer[] = []
    for (const sent of sents) answers.push(await this.answer(sent))
    return answers
  }

  /** Says goodbye; the server has to close without another byte. */
  async disconnect(): Promise<void> {
    this.over = true
    this.wire.send(encodeRequest({ command: 2 }, this.mode))
    const rest = await this.wire.readToEnd('the end of the connection after DISC')
    must(
      rest.length === 0,
      `after the last reply came ${rest.length} bytes more: ${rest.subarray(0, 32).toString('hex')}`,
    )
  }

  /** What is still open, for the message of a check that ran out of time. */
  story(): string {
    const lines = [...this.#open.values()].map(({ request, chunks }) => {
      const types = chunks.map((chunk) => chunk.type).join(' ')
      return `command ${request.command} has ${types === '' ? 'no reply' : `chunks of type ${types} and no DONE`}`
    })
    return lines.length === 0 ? '' : ` (${this.mode}: ${lines.slice(0, 3).join('; ')})`
  }

  async #message(): Promise<void> {
    const magic = (await this.wire.read(4, 'a reply')).readUInt32BE(0)
    if (magic === 0x67446698 && this.mode !== 'extended') return await this.#simple()
    if (magic === 0x668e33ef && this.mode === 'structured') return await this.#chunk(false)
    if (magic === 0x6e8a278c && this.mode === 'extended') return await this.#chunk(true)
    throw new Breach(`a reply has the magic 0x${magic.toString(16)} in ${this.mode} mode`, 'must')
  }

  async #simple(): Promise<void> {
    const rest = await this.wire.read(12, 'the rest of a simple reply')
    const errno = rest.readUInt32BE(0)
    const answer = this.#answerFor(rest.readBigUInt64BE(4))
    must(answer.chunks.length === 0, 'a simple reply follows chunks of the same reply')
    // The one rule about content that the framing itself depends on.
    const wantsData = answer.request.command === 0 && errno === 0
    must(!(this.mode === 'structured' && answer.request.command === 0), 'a read got a simple reply')
    const data = wantsData
      ? await this.wire.read(Number(answer.request.length), 'the data of a read')
      : Buffer.alloc(0)
    answer.simple = { errno, data }
    this.#open.delete(answer.request.cookie)
  }

  async #chunk(extended: boolean): Promise<void> {
    const rest = await this.wire.read(extended ? 28 : 16, 'the rest of a chunk header')
    const flags = rest.readUInt16BE(0)
    const type = rest.readUInt16BE(2)
    const answer = this.#answerFor(rest.readBigUInt64BE(4))
    const repeatedOffset = extended ? rest.readBigUInt64BE(12) : undefined
    const length = extended ? Number(rest.readBigUInt64BE(20)) : rest.readUInt32BE(12)
    must(length <= PAYLOAD_MAX, `a chunk of type ${type} claims ${length} bytes`)
    const payload = await this.wire.read(length, `${length} bytes of a chunk of type ${type}`)
    answer.chunks.push({ flags, type, repeatedOffset, payload })
    if ((flags & 1) !== 0) this.#open.delete(answer.request.cookie)
  }

  #answerFor(cookie: bigint): Answer {
    const answer = this.#open.get(cookie)
    must(answer !== undefined, `a reply has the cookie 0x${cookie.toString(16)}, which no open request has`)
    return answer
  }

  // ------------------------------------------------------------------------- the commands, when all goes well

  async read(offset: number | bigint, length: number, flags = 0): Promise<Buffer> {
    return contentOf(await this.ask({ command: 0, offset, length, flags }))
  }

  async write(offset: number | bigint, payload: Buffer, flags = 0): Promise<void> {
    expectOk(await this.ask({ command: 1, offset, payload, flags }), 'a write')
  }

  /** Whether the connection is in step and the server goes on: a read that has to be answered. */
  async expectAlive(after: string): Promise<void> {
    const length = this.blockSize?.minimum ?? 512
    const answer = await this.ask({ command: 0, offset: 0, length })
    expect(errnoOf(answer) === 0, `after ${after}, a read failed with ${errnoName(errnoOf(answer))}`)
  }
}

/** Runs what the server may also answer by ending the session. */
export async function orTheEnd(session: Session, run: () => Promise<void>): Promise<void> {
  try {
    await run()
  } catch (error) {
    if (!(error instanceof Ended)) throw error
    session.over = true
  }
}

/** The error of an answer; 0 when it succeeded. */
export function errnoOf(answer: Answer): number {
  if (answer.simple !== undefined) return answer.simple.errno
  const failed = answer.chunks.find(isErrorChunk)
  if (failed === undefined) return 0
  must(failed.payload.length >= 6, `an error chunk has ${failed.payload.length} bytes`)
  const errno = failed.payload.readUInt32BE(0)
  must(errno !== 0, 'an error chunk has the error 0')
  return errno
}

export function expectOk(answer: Answer, what: string): void {
  const errno = errnoOf(answer)
  expect(errno === 0, `${what} failed with ${errnoName(errno)}`)
}

/** @param wanted the errors that the rule allows */
export function expectErrno(answer: Answer, what: string, ...wanted: number[]): void {
  const errno = errnoOf(answer)
  const named = wanted.map(errnoName).join(' or ')
  expect(wanted.includes(errno), `${what} was answered with ${errnoName(errno)}, not ${named}`)
}

export interface Content {
  readonly kind: 'data' | 'hole'
  readonly offset: bigint
  readonly length: bigint
  readonly data: Buffer // empty for holes
}

/** The content chunks of a read, as far as they can be decoded. */
export function contentChunks(answer: Answer): Content[] {
  return answer.chunks.filter(isContent).flatMap(({ type, payload }): Content[] => {
    if (payload.length < 8) return []
    const offset = payload.readBigUInt64BE(0)
    if (type === CHUNK.DATA) {
      const data = payload.subarray(8)
      return [{ kind: 'data', offset, length: BigInt(data.length), data }]
    }
    if (payload.length < 12) return []
    const length = BigInt(payload.readUInt32BE(8))
    return [{ kind: 'hole', offset, length, data: Buffer.alloc(0) }]
  })
}

/** The bytes of a read that succeeded; a breach where it failed or does not hold all of them. */
export function contentOf(answer: Answer): Buffer {
  expectOk(answer, 'a read')
  if (answer.simple !== undefined) return answer.simple.data
  const { offset, length } = answer.request
  const target = Buffer.alloc(Number(length))
  let covered = 0n
  for (const chunk of contentChunks(answer)) {
    const at = chunk.offset - offset
    must(at >= 0n && at + chunk.length <= length, 'a content chunk lies outside of the read')
    if (chunk.kind === 'data') chunk.data.copy(target, Number(at))
    covered += chunk.length
  }
  must(covered === length, `the chunks of a read of ${length} bytes describe ${covered}`)
  return target
}

export interface Extent {
  readonly length: bigint
  readonly flags: bigint
}
export interface Status {
  readonly context: number
  readonly extents: readonly Extent[]
  readonly count: number | undefined // as an extended chunk says
}

/** The status chunks of an answer; a breach where one cannot be decoded. */
export function statusOf(answer: Answer): Status[] {
  const chunks = answer.chunks.filter(({ type }) => type === CHUNK.STATUS || type === CHUNK.STATUS_EXT)
  return chunks.map(({ type, payload }) => {
    const extended = type === CHUNK.STATUS_EXT
    const fixed = extended ? 8 : 4
    const each = extended ? 16 : 8
    const whole = payload.length > fixed && (payload.length - fixed) % each === 0
    must(whole, `a block status chunk has ${payload.length} bytes`)
    const extents: Extent[] = []
    for (let at = fixed; at < payload.length; at += each) {
      extents.push(
        extended
          ? { length: payload.readBigUInt64BE(at), flags: payload.readBigUInt64BE(at + 8) }
          : { length: BigInt(payload.readUInt32BE(at)), flags: BigInt(payload.readUInt32BE(at + 4)) },
      )
    }
    return {
      context: payload.readUInt32BE(0),
      extents,
      count: extended ? payload.readUInt32BE(4) : undefined,
    }
  })
}
