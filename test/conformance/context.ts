/**
 * What a check has to work with: the server's address, what it was found to offer (asked once, before all checks), and
 * connections, brought as far as the check wants them. Connections live as long as the check.
 */
import { messageOf } from '../../src/base/errors.ts'
import type { NbdUri } from '../../src/nbd/uri.ts'
import { applicable, Breach, must, NotApplicable } from './check.ts'
import {
  contextRequest,
  exportRequest,
  FIXED_NO_ZEROES,
  Handshake,
  INFO,
  isError,
  namesOf,
  OPT,
  type OptionReply,
  REP,
  readExportFacts,
} from './handshake.ts'
import { MODES, type Mode, Session } from './session.ts'
import { Wire } from './wire.ts'

export interface Target {
  readonly uri: NbdUri
  /** An export that takes no writes, where there is one. */
  readonly readOnly?: NbdUri
  readonly mayWrite: boolean
}

/** What the server offers. */
export interface Facts {
  readonly exports: readonly string[] // what LIST says; empty also where it is refused
  readonly anyName: boolean // an export that nobody made up exists: every name does
  readonly modes: ReadonlyMap<Mode, { readonly size: bigint; readonly flags: number }>
  readonly contexts: readonly string[]
  readonly tls: 'none' | 'offered'
}

export interface EnterOptions {
  readonly contexts?: readonly string[] // selected before GO
  readonly readOnly?: boolean // enter the read-only export
  /** Whether GO asks for block sizes, which promises to keep them. Default: yes. */
  readonly askBlockSize?: boolean
}

/** How long a server that died may take to be there again. */
const RETURN_MS_MAX = 1000

export const UNLIKELY_NAME = 'no-such-export-6f1d2c'

export class Context {
  readonly target: Target
  readonly facts: Facts
  readonly #wires: Wire[] = []
  readonly #sessions: Session[] = []
  #expired = false

  constructor(target: Target, facts: Facts) {
    this.target = target
    this.facts = facts
  }

  get mayWrite(): boolean {
    return this.target.mayWrite
  }
  get exportName(): string {
    return this.target.uri.exportName
  }

  async open(): Promise<Wire> {
    let wire: Wire
    try {
      wire = await Wire.connect(this.target.uri.address)
    } catch (error) {
      throw new Breach(`no connection: ${messageOf(error)}`, 'must')
    }
    this.#wires.push(wire)
    if (this.#expired) wire.expire()
    return wire
  }

  /** A connection that has greeted and waits for options. */
  async greet(clientFlags = FIXED_NO_ZEROES): Promise<Handshake> {
    const handshake = new Handshake(await this.open())
    await handshake.greeting()
    handshake.clientFlags(clientFlags)
    return handshake
  }

  /** A connection in a reply mode, still in the handshake. */
  async negotiate(mode: Mode): Promise<Handshake> {
    this.needMode(mode)
    const handshake = await this.greet()
    await enterMode(handshake, mode)
    return handshake
  }

  /** A connection in the transmission phase. */
  async enter(mode: Mode, options: EnterOptions = {}): Promise<Session> {
    this.needMode(mode)
    const handshake = await this.negotiate(mode)
    const name = (options.readOnly ? this.target.readOnly : undefined)?.exportName ?? this.exportName
    const selected = new Map<number, string>()
    if (options.contexts !== undefined) {
      const replies = await handshake.option(OPT.SET_META_CONTEXT, contextRequest(name, options.contexts))
      must(replies.at(-1)?.type === REP.ACK, `SET_META_CONTEXT was answered with ${namesOf(replies)}`)
      for (const { data } of replies.slice(0, -1)) {
        must(data.length >= 4, 'a metadata context has no id')
        selected.set(data.readUInt32BE(0), data.toString('utf8', 4))
      }
    }
    return await this.go(handshake, mode, name, selected, options.askBlockSize ?? true)
  }

  /** Ends the handshake with GO. */
  async go(
    handshake: Handshake,
    mode: Mode,
    name = this.exportName,
    contexts: ReadonlyMap<number, string> = new Map(),
    askBlockSize = true,
  ): Promise<Session> {
    const infos = askBlockSize ? [INFO.BLOCK_SIZE] : []
    const replies = await handshake.option(OPT.GO, exportRequest(name, infos))
    const last = replies.at(-1)
    if (!askBlockSize && last?.type === REP.ERR_BLOCK_SIZE_REQD) {
      throw new NotApplicable('the server wants its block sizes to be asked for')
    }
    must(last?.type === REP.ACK, `GO was answered with ${namesOf(replies)}`)
    return this.session(handshake, mode, readExportFacts(replies), contexts)
  }

  /** A connection whose handshake has ended; `finish` sees it off. */
  session(
    handshake: Handshake,
    mode: Mode,
    facts: ConstructorParameters<typeof Session>[2],
    contexts: ReadonlyMap<number, string> = new Map(),
  ): Session {
    const session = new Session(handshake.wire, mode, facts, contexts)
    this.#sessions.push(session)
    return session
  }

  needMode(mode: Mode): void {
    applicable(
      this.facts.modes.has(mode),
      `the server has no ${mode} ${mode === 'extended' ? 'headers' : 'replies'}`,
    )
  }

  needContexts(): readonly string[] {
    applicable(this.facts.contexts.length > 0, 'the server has no metadata contexts')
    return this.facts.contexts
  }

  /** The server's flags in that mode must have `flag`. */
  needFlag(mode: Mode, flag: number, name: string): void {
    this.needMode(mode)
    applicable(((this.facts.modes.get(mode)?.flags ?? 0) & flag) !== 0, `the server does not set ${name}`)
  }

  needSize(bytes: number): void {
    const size = this.facts.modes.get('simple')?.size ?? 0n
    applicable(size >= BigInt(bytes), `the export is smaller than ${bytes} bytes`)
  }

  /**
   * Whether the server still greets, after a check that it did not pass. Where it does not, somebody may start it again:
   * that is waited for, so that one death fails one check.
   */
  async isServing(): Promise<boolean> {
    for (let attempt = 0; attempt < RETURN_MS_MAX / 20; attempt++) {
      if (await this.#greets()) return attempt === 0
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    return false
  }

  async #greets(): Promise<boolean> {
    let wire: Wire | undefined
    const timer = setTimeout(() => wire?.expire(), RETURN_MS_MAX)
    try {
      wire = await Wire.connect(this.target.uri.address)
      await new Handshake(wire).greeting() // a server that is dying may still have a queue of connections
      return true
    } catch {
      return false
    } finally {
      clearTimeout(timer)
      wire?.destroy()
    }
  }

  /** After a check that passed: every session still open ends in order, with nothing left over. */
  async finish(): Promise<void> {
    for (const session of this.#sessions) if (!session.over) await session.disconnect()
  }

  expire(): void {
    this.#expired = true
    for (const wire of this.#wires) wire.expire()
  }

  story(): string {
    return this.#sessions.map((session) => session.story()).join('')
  }

  close(): void {
    for (const wire of this.#wires) wire.destroy()
  }
}

/** @returns whether the server agreed */
async function enterMode(handshake: Handshake, mode: Mode): Promise<boolean> {
  if (mode === 'simple') return true
  const option = mode === 'structured' ? OPT.STRUCTURED_REPLY : OPT.EXTENDED_HEADERS
  return (await handshake.only(option)).type === REP.ACK
}

/**
 * Asks a server what it offers. @throws Breach where it breaks the rules so early that nothing can be checked, and
 * whatever the connection throws
 */
export async function probe(uri: NbdUri, deadlineMs: number): Promise<Facts> {
  const wires: Wire[] = []
  const timer = setTimeout(() => {
    for (const wire of wires) wire.expire()
  }, deadlineMs)
  const greet = async () => {
    const wire = await Wire.connect(uri.address)
    wires.push(wire)
    const handshake = new Handshake(wire)
    const { init, magic } = await handshake.greeting()
    if (init.toString('latin1') !== 'NBDMAGIC' || magic.toString('latin1') !== 'IHAVEOPT') {
      throw new Breach('it does not greet as an NBD server with newstyle negotiation does')
    }
    handshake.clientFlags(FIXED_NO_ZEROES)
    return handshake
  }
  try {
    const modes = new Map<Mode, { size: bigint; flags: number }>()
    let contexts: string[] = []
    for (const mode of MODES) {
      const handshake = await greet()
      if (!(await enterMode(handshake, mode))) continue
      if (mode !== 'simple') {
        const listed = await handshake.option(OPT.LIST_META_CONTEXT, contextRequest(uri.exportName))
        if (!isError(listed.at(-1)!)) contexts = namesIn(listed)
      }
      const replies = await handshake.option(OPT.GO, exportRequest(uri.exportName, [INFO.BLOCK_SIZE]))
      if (isError(replies.at(-1)!)) throw new Breach(`GO was answered with ${namesOf(replies)}`)
      const { size, flags } = readExportFacts(replies)
      modes.set(mode, { size, flags })
    }
    const handshake = await greet()
    const listed = await handshake.option(OPT.LIST)
    const exports = listed
      .filter(({ type, data }) => type === REP.SERVER && data.length >= 4)
      .map(({ data }) => data.toString('utf8', 4, 4 + data.readUInt32BE(0)))
    const strange = await handshake.option(OPT.INFO, exportRequest(UNLIKELY_NAME))
    const tls = await handshake.only(OPT.STARTTLS)
    return {
      exports,
      anyName: !isError(strange.at(-1)!),
      modes,
      contexts,
      tls: tls.type === REP.ACK ? 'offered' : 'none',
    }
  } finally {
    clearTimeout(timer)
    for (const wire of wires) wire.destroy()
  }
}

function namesIn(replies: readonly OptionReply[]): string[] {
  return replies
    .filter(({ type, data }) => type === REP.META_CONTEXT && data.length > 4)
    .map(({ data }) => data.toString('utf8', 4))
}
