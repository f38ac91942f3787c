import { randomUUID } from 'node:crypto'
import { Bitmap } from '../base/bitmap.ts'
import { StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Mutex } from '../base/locks.ts'
import { formatSize } from '../base/sizes.ts'
import type { Channel } from '../link/channel.ts'
import { LinkError } from '../link/errors.ts'
import type { Session } from '../link/session.ts'
import type { GenerationRecord, MirrorRecord } from '../metadata/records.ts'
import type { MirrorBook, StoredMirror } from '../volume/mirror-book.ts'
import type { ExtraContext } from '../volume/status.ts'
import type { Volume } from '../volume/volume.ts'
import { ask } from './asks.ts'
import { LinkRemote } from './link-remote.ts'
import { Primary } from './primary.ts'
import { type PrimaryHello, type Remote, RemoteError } from './remote.ts'
import { Secondary } from './secondary.ts'
import { type MirrorState, MirrorStates } from './state.ts'
import type { CopyExtent, MirrorInfo, MirrorSide } from './types.ts'

/**
 * One mirror of a volume, on either side: its record, and what runs for the role that it has. Roles change here.
 *
 *   secondary --promote--> primary --demote (planned), yield (split brain)--> secondary
 *
 * Crash rule: a change of role is one transaction: role, generation, who may write, and which units count as changed.
 * Concurrency rule: changes of role, and the end of the mirror, come one at a time; each looks again at what the one before it left.
 */
type Level = 'info' | 'warn' | 'error'

export interface RelationHost {
  readonly book: MirrorBook
  /** @param who for the log: the volume, the mirror and the peer by name */
  event(level: Level, kind: string, object: string, message: string, who: object): void
  /** A session with the peer, if there is one. */
  session(relation: Relation): Session | undefined
}

/** Wire ids of the contexts `fullstripe:copy:NAME`. */
const CONTEXT_BASE = 1 << 16

const BAD_STATES: readonly MirrorState[] = ['degraded', 'splitbrain']

export class Relation {
  readonly volume: Volume
  readonly stored: StoredMirror
  readonly #host: RelationHost
  readonly #secondary: Secondary
  #primary: Primary | undefined
  #context: ExtraContext | undefined
  readonly #secondaryStates: MirrorStates
  #told: PrimaryHello | undefined
  #again: NodeJS.Timeout | undefined // after a refusal
  #committedAt: number | undefined
  readonly #roles = new Mutex()

  constructor(host: RelationHost, volume: Volume, stored: StoredMirror) {
    this.#host = host
    this.volume = volume
    this.stored = stored
    this.#secondaryStates = new MirrorStates('connecting', (state, before, reason) =>
      this.#onState(state, before, reason),
    )
    this.#secondary = new Secondary({
      volume,
      book: host.book,
      stored,
      onState: (state, hello) => {
        this.#told = hello
        this.#secondaryStates.follow(state)
      },
      onHandOver: () =>
        this.#secondaryStates.follow(
          'promoted',
          `the peer gave up being primary: promote this side to write here`,
        ),
      onSplitBrain: (hello) => this.#splitBrain(hello),
      onCommit: () => {
        this.#committedAt = performance.now()
      },
    })
  }

  get record(): MirrorRecord {
    return this.stored.record
  }
  get isPrimary(): boolean {
    return this.record.role === 'primary'
  }
  get primary(): Primary | undefined {
    return this.#primary
  }
  get state(): MirrorState {
    return this.#primary?.states.state ?? this.#secondaryStates.state
  }
  tell(level: Level, kind: string, message: string): void {
    const { name, peer } = this.record
    this.#host.event(level, kind, this.object, message, {
      volume: this.volume.name,
      mirror: name,
      peer: peer.name,
    })
  }

  get object(): string {
    return `${this.volume.name}/${this.record.name}`
  }

  /** Before the volume's first client, or while it is being added. */
  async start(): Promise<void> {
    if (this.isPrimary) await this.#startPrimary()
  }

  /** The daemon stops; what changes until the pool is closed is noted. */
  async disconnect(reason: string): Promise<void> {
    await this.#primary?.disconnect(reason)
    await this.#secondary.close(reason)
  }

  /** The mirror ends when `store` has said so on the disk: until then changes are noted, and no client may write to a secondary. */
  end(reason: string, store: () => Promise<void>): Promise<void> {
    return this.#roles.run(async () => {
      if (!this.isPrimary) await this.#secondary.close(reason)
      try {
        await store()
      } catch (error) {
        this.#secondary.reopen()
        throw error
      }
      await this.close(reason)
    })
  }

  /** What runs for the mirror ends. */
  async close(reason: string): Promise<void> {
    const primary = this.#primary
    this.#endPrimary()
    await primary?.close(reason)
    await this.#secondary.close(reason)
  }

  // ---- sessions

  /** Whether the session's peer is the other side. */
  isPeer(session: Session, address: string | undefined): boolean {
    const { peer, address: dialled, kind } = this.record
    if (kind !== 'link') return false
    if (peer.fingerprint !== null) return peer.fingerprint === session.peer.fingerprint
    return peer.name === session.peer.name || dialled === address
  }

  /** The operator says that the peer may have another identity: the next one under that name is it. */
  async forgetPeer(): Promise<void> {
    await this.#host.book.save(this.record.id, { peer: { ...this.record.peer, fingerprint: null } })
  }

  /** That is it. */
  async knowPeer({ peer: { name, fingerprint } }: Session): Promise<void> {
    if (this.record.peer.fingerprint !== null) return
    await this.#host.book.save(this.record.id, { peer: { ...this.record.peer, name, fingerprint } })
    this.tell('info', 'mirror.peer', `${name} has the identity ${fingerprint} from now on`)
  }

  /** A session stands. The primary begins. */
  async connect(session: Session): Promise<void> {
    const primary = this.#primary
    if (primary === undefined || session.endReason !== undefined) return
    clearTimeout(this.#again)
    const again = (): void => {
      if (this.#primary === primary && !primary.connected) void this.#reconnect()
    }
    try {
      const remote = await LinkRemote.open(session, this.record.relation)
      if (this.#primary !== primary) {
        remote.close('the role changed')
        return
      }
      primary.attach(remote)
      remote.ended.then(() => {
        setTimeout(again, LIMITS.mirrorRetryMsMin).unref()
      })
    } catch (error) {
      if (!(error instanceof RemoteError)) throw error
      if (error.fate === 'lost') return
      primary.refused(error.message)
      // There may be room for its channels by then.
      this.#again = setTimeout(again, LIMITS.mirrorRetryMsMax).unref()
    }
  }

  attach(remote: Remote): void {
    this.#primary?.attach(remote)
  }

  serve(control: Channel, session: Session): void {
    this.#secondary.serve(control, session.sideWires)
    control.ended.then((reason) => {
      if (this.isPrimary || this.#secondary.connected || this.#secondaryStates.state === 'promoted') return
      this.#secondaryStates.follow(this.record.initialized ? 'degraded' : 'connecting', reason.message)
    })
  }

  serveData(data: Channel): void {
    this.#secondary.serveData(data)
  }

  // ---- roles

  /** @throws UserError BUSY, REFUSED */
  async promote(force: boolean): Promise<void> {
    await this.#roles.run(() => this.#promote(force))
    const session = this.#host.session(this)
    if (session !== undefined) await this.connect(session)
  }

  /** @throws UserError BUSY, REFUSED */
  demote(force: boolean): Promise<void> {
    return this.#roles.run(() => this.#demote(force))
  }

  /** The peer's operator discards this side. @throws UserError REFUSED */
  yield(): Promise<void> {
    return this.#roles.run(() => this.#yield())
  }

  /** The operator discards this side. @throws UserError REFUSED */
  discard(): Promise<void> {
    return this.#roles.run(() => {
      this.checkSplit()
      return this.#yield()
    })
  }

  /**
   * The peer's content is discarded, and it is no primary that could give that up: it is a generation that this side does not know, since
   * one of the two was set back. So both sides are compared, from what the peer has.
   */
  overrule(): Promise<void> {
    return this.#roles.run(async () => {
      const hello = this.#primary?.hello
      if (hello?.role !== 'secondary' || hello.generation === null) return
      const { generation, cycle } = hello
      await this.#host.book.save(this.record.id, { clean: false, base: generation.current, cycle })
    })
  }

  /** @throws UserError REFUSED */
  checkSplit(): void {
    if (this.isPrimary && this.state === 'splitbrain') return
    throw new UserError(
      'REFUSED',
      `mirror ${this.object} is ${this.state}: there is no split brain to settle`,
    )
  }

  async #promote(force: boolean): Promise<void> {
    const { record } = this
    if (this.isPrimary) throw new UserError('BUSY', `mirror ${this.object}: this side is primary already`)
    if (this.#secondary.connected && this.state !== 'promoted' && !force) {
      throw new UserError(
        'BUSY',
        `mirror ${this.object}: the primary is connected: demote it first (mirror demote, over there), or use --force, which splits the two`,
      )
    }
    if (!record.initialized && !force) {
      throw new UserError(
        'REFUSED',
        `mirror ${this.object}: the content here is not consistent yet (the initial copy has not ended): use --force to take it as it is`,
      )
    }
    // A primary that comes back meanwhile is answered when this side is one, too.
    const current = await this.#secondary.apart('this side was promoted', () => this.#becomePrimary())
    this.tell('info', 'mirror.promoted', `this side is primary, generation ${current}`)
  }

  /** @returns the new generation. @throws StoreError */
  async #becomePrimary(): Promise<string> {
    const { record, volume } = this
    const bits = this.#secondary.differing()
    const before = volume.record.generation
    const { initialized } = record
    const current = randomUUID()
    // What was never consistent is no older generation: this one is where the bits begin to count.
    const older = initialized ? [before?.current ?? record.base, ...(before?.history ?? [])] : []
    const generation: GenerationRecord = { current, history: older.slice(0, LIMITS.generationsKept) }
    await volume.quiesce(async () => {
      // Nobody may write before it is watched: clients are let in by the transaction below.
      await this.#host.book.save(
        record.id,
        { role: 'primary', clean: initialized, paused: false, ...(initialized ? {} : { base: current }) },
        { bits, volume: { generation, secondaryOf: undefined } },
      )
      this.#beginPrimary()
    })
    return current
  }

  async #demote(force: boolean): Promise<void> {
    const primary = this.#primary
    if (primary === undefined)
      throw new UserError('BUSY', `mirror ${this.object}: this side is secondary already`)
    this.#checkOnlyMirror()
    const sessions = this.volume.info().sessions
    if (sessions > 0 && !force) {
      throw new UserError(
        'BUSY',
        `volume ${this.volume.name} has ${sessions} connected client${sessions > 1 ? 's' : ''}: detach them first, or use --force: their writes will fail`,
      )
    }
    if (this.record.kind === 'nbd')
      throw new UserError('REFUSED', `mirror ${this.object}: an NBD export cannot be primary`)
    await this.volume.becomeThin()
    // The other side has everything: nothing differs.
    const store = (): Promise<void> =>
      this.#host.book.save(
        this.record.id,
        { role: 'secondary' },
        { bits: new Bitmap(this.stored.map.unitCount), volume: { secondaryOf: this.record.id } },
      )
    const discards = force && !primary.connected
    const reason = 'this side was demoted'
    if (discards) await this.#giveUp(primary, reason)
    else await primary.handOver(store)
    this.#endPrimary()
    await primary.close(reason, discards ? thrownAway(reason) : undefined)
    this.#secondaryStates.follow('promoted', 'this side gave up being primary: promote the other one')
    const { changed } = this.side()
    if (changed === 0) this.tell('info', 'mirror.demoted', 'this side is secondary: promote the other one')
    else {
      const lacked = `the other side lacks ${formatSize(changed)} of what was changed here, which is thrown away when that one is promoted`
      this.tell('warn', 'mirror.demoted', `this side is secondary; ${lacked}`)
    }
  }

  /** This side's changes since the common generation are thrown away by what the other side sends. */
  async #yield(): Promise<void> {
    const primary = this.#primary
    if (primary === undefined) return
    this.#checkOnlyMirror()
    await this.volume.becomeThin()
    const reason = 'this side is discarded'
    await this.#giveUp(primary, reason)
    this.#endPrimary()
    await primary.close(reason, thrownAway(reason))
    this.#secondaryStates.follow('connecting')
    this.tell('warn', 'mirror.discarded', 'this side is secondary: what it had changed is replaced')
  }

  /** The changed units stay noted: the next primary asks for them, and sends them. */
  async #giveUp(primary: Primary, reason: string): Promise<void> {
    await primary.stop(reason)
    let stored = false
    try {
      await this.#storeGiven(primary, reason)
      stored = true
    } finally {
      if (!stored) primary.proceed(`not stored: ${reason}`)
    }
  }

  async #storeGiven(primary: Primary, reason: string): Promise<void> {
    const { base, clean, id, initialized } = this.record
    const before = this.volume.record.generation
    const history = [before?.current ?? base, ...(before?.history ?? [])].filter((known) => known !== base)
    await this.volume.quiesce(async () => {
      // Before it is stored: from then on the other side may replace what they wrote.
      primary.failBlocked(thrownAway(reason))
      await this.#host.book.save(
        id,
        { role: 'secondary' },
        {
          bits: clean ? primary.bits.union() : allUnits(primary.bits.unitCount), // not compared: anything may differ
          volume: {
            secondaryOf: id,
            generation: initialized
              ? { current: base, history: history.slice(0, LIMITS.generationsKept) }
              : undefined,
          },
        },
      )
    })
  }

  #checkOnlyMirror(): void {
    const others = this.#host.book
      .of(this.volume.record.id)
      .filter(({ record }) => record.id !== this.record.id)
    if (others.length === 0) return
    const names = others.map(({ record }) => record.name).join(', ')
    throw new UserError(
      'REFUSED',
      `volume ${this.volume.name} has other mirrors (${names}): remove them first; added again over there, they get only what differs`,
    )
  }

  /** Something was settled by the operator. */
  retry(): void {
    const primary = this.#primary
    primary?.retry()
    if (primary?.connected === false) void this.#reconnect()
  }

  /** The link's session may stand where the mirror's channels have ended. */
  async #reconnect(): Promise<void> {
    const session = this.#host.session(this)
    if (session !== undefined) await this.connect(session)
  }

  /** The other side, by its session. @throws UserError FAILED, and the peer's words */
  async ask(kind: 'remove' | 'yield' | 'retry'): Promise<void> {
    const session = this.#host.session(this)
    if (session === undefined) {
      throw new UserError(
        'FAILED',
        `mirror ${this.object}: there is no connection with ${this.record.peer.name}`,
      )
    }
    try {
      await ask(session, kind, { relation: this.record.relation })
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      throw new UserError('FAILED', `mirror ${this.object}: ${error.message}`, { cause: error })
    }
  }

  #splitBrain(hello: PrimaryHello): void {
    this.#told = hello
    this.#primary?.refused('both sides are primary', true)
  }

  async #startPrimary(): Promise<void> {
    await this.volume.quiesce(() => this.#beginPrimary())
  }

  /** While the volume is quiet. */
  #beginPrimary(): void {
    const primary = new Primary({
      volume: this.volume,
      book: this.#host.book,
      stored: this.stored,
      onState: (state, before, reason) => this.#onState(state, before, reason),
      onTrouble: (kind, message) => this.tell('warn', kind, message),
    })
    this.#primary = primary
    this.volume.watch(primary)
    const { id, name } = this.record
    this.#context = {
      id: CONTEXT_BASE + id,
      name: `fullstripe:copy:${name}`,
      extents: (offset, length) => this.#statusExtents(offset, length),
    }
    this.volume.addContext(this.#context)
  }

  #endPrimary(): void {
    if (this.#context !== undefined) this.volume.removeContext(this.#context)
    this.#context = undefined
    this.#primary = undefined
  }

  #onState(state: MirrorState, before: MirrorState, reason: string | null): void {
    const level = BAD_STATES.includes(state) ? 'warn' : 'info'
    const why = reason === null ? '' : `: ${reason}`
    this.tell(level, `mirror.${state}`, `${before} -> ${state}${why}`)
  }

  // ---- what is where

  /** Bit 0 of the flags: the secondary lacks it. */
  *#statusExtents(offset: number, length: number): Generator<{ length: number; flags: number }> {
    for (const extent of this.copyExtents(offset, length)) {
      yield { length: extent.length, flags: extent.copied ? 0 : 1 }
    }
  }

  *copyExtents(offset: number, length: number): Generator<CopyExtent> {
    const { unitBytes } = this.record
    const end = Math.min(offset + length, this.volume.size)
    for (let at = offset; at < end; ) {
      const unit = Math.floor(at / unitBytes)
      const lacking = this.#lacks(unit)
      const next = lacking ? this.#nextPresent(unit) : this.#nextLacking(unit)
      const stop = Math.min(end, next * unitBytes)
      yield { offset: at, length: stop - at, copied: !lacking }
      at = stop
    }
  }

  copyDensity(cells: number): Float64Array {
    const units = this.stored.map.unitCount
    const shares = new Float64Array(Math.min(cells, units))
    for (let cell = 0; cell < shares.length; cell++) {
      const from = Math.floor((cell * units) / shares.length)
      const to = Math.max(from + 1, Math.floor(((cell + 1) * units) / shares.length))
      const lacking = this.#primary?.bits.lackingIn(from, to) ?? this.stored.map.bits.count(from, to)
      shares[cell] = lacking / (to - from)
    }
    return shares
  }

  #lacks(unit: number): boolean {
    return this.#primary?.bits.lacks(unit) ?? this.stored.map.get(unit)
  }
  #nextLacking(unit: number): number {
    return this.#primary?.bits.nextLacking(unit) ?? this.stored.map.nextSet(unit)
  }
  #nextPresent(unit: number): number {
    return this.#primary?.bits.nextPresent(unit) ?? this.stored.map.nextClear(unit)
  }

  // ---- telling

  info(): MirrorInfo {
    const { record, volume } = this
    const primary = this.#primary
    const states = primary?.states ?? this.#secondaryStates
    const since = states.since.toISOString()
    const counters = primary?.counters
    return {
      volume: volume.name,
      name: record.name,
      relation: record.relation,
      role: record.role,
      kind: record.kind,
      peer: record.peer.name,
      address: record.address,
      target: record.peer.volume,
      mode: record.mode,
      init: record.init,
      intervalMs: record.intervalMs,
      onLoss: record.onLoss,
      rate: record.rate,
      state: states.state,
      reason: states.reason,
      since,
      connected: primary?.connected ?? this.#secondary.connected,
      consistent: record.initialized,
      pointInTime: record.kind === 'link' || record.mode === 'sync',
      unitBytes: record.unitBytes,
      lag: primary?.lag() ?? this.#secondaryLag(),
      cycle: record.cycle,
      progress: primary?.progress() ?? null,
      counters: {
        sentBytes: counters?.sentBytes ?? 0,
        wireBytes: primary?.wireBytes() ?? 0,
        units: counters?.units ?? 0,
        holes: counters?.holes ?? 0,
        signatures: counters?.signatures ?? 0,
        cycles: counters?.cycles ?? 0,
        saves: counters?.saves ?? 0,
        forwarded: primary?.forwardedCount() ?? 0,
        laneWrites: primary?.laneWrites() ?? 0,
      },
      local: this.side(),
      remote: this.#remoteSide(),
      verify: primary?.verification() ?? null,
    }
  }

  side(): MirrorSide {
    const { record, volume } = this
    const changed = this.#primary === undefined ? this.stored.map.count : this.#primary.bits.total
    return {
      role: record.role,
      generation: volume.record.generation?.current ?? '',
      history: volume.record.generation?.history ?? [],
      changed: Math.min(volume.size, changed * record.unitBytes),
      consistent: record.initialized,
      size: volume.size,
    }
  }

  #remoteSide(): MirrorSide | null {
    const hello = this.#primary?.hello
    if (hello !== undefined) {
      const { role, generation, changed, consistent, size } = hello
      const { current = '', history = [] } = generation ?? {}
      return { role, generation: current, history, changed, consistent, size }
    }
    const told = this.#told
    if (told === undefined) return null
    const { generation, changed, size } = told
    return {
      role: 'primary',
      generation: generation.current,
      history: generation.history,
      changed,
      consistent: true,
      size,
    }
  }

  #secondaryLag(): MirrorInfo['lag'] {
    const at = this.#committedAt
    const follows = this.#secondaryStates.state === 'insync'
    return { bytes: 0, seconds: follows ? 0 : at === undefined ? null : (performance.now() - at) / 1000 }
  }
}

/** Of writes that wait for a secondary that will not have them. */
function thrownAway(reason: string): StoreError {
  return new StoreError('SHUTTING_DOWN', `the other side does not have it: ${reason}`)
}

function allUnits(count: number): Bitmap {
  const bits = new Bitmap(count)
  bits.setRange(0, count)
  return bits
}
