import { randomUUID } from 'node:crypto'
import type { Socket } from 'node:net'
import { assert } from '../base/assert.ts'
import { Bitmap } from '../base/bitmap.ts'
import { StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Mutex } from '../base/locks.ts'
import type { Channel, Message } from '../link/channel.ts'
import { LinkError } from '../link/errors.ts'
import { Fields } from '../link/hello.ts'
import type { SideWires } from '../link/side-wires.ts'
import type { MirrorRecord } from '../metadata/records.ts'
import { NBD_ERRNO } from '../nbd/errno.ts'
import type { MirrorBook, StoredMirror } from '../volume/mirror-book.ts'
import type { Stage } from '../volume/stage.ts'
import type { Volume } from '../volume/volume.ts'
import { judge } from './judge.ts'
import { allSockets, expectSockets } from './lane-sockets.ts'
import {
  encodeEnds,
  encodePage,
  json,
  type LanesMessage,
  MESSAGE,
  NO_MORE,
  readCommit,
  readLanes,
  readOperations,
  readPrimaryHello,
  readPut,
  readRanges,
} from './protocol.ts'
import type { BitmapKind, CommitInfo, PrimaryHello, RemoteHello } from './remote.ts'
import { SIGNATURE_BYTES, signaturesOf } from './signatures.ts'
import type { MirrorState } from './state.ts'

/**
 * The secondary's side of a mirror. Two ways lead into its volume, never at the same time:
 *
 *   staged     units are put into fresh slots; a commit switches to all of them in one transaction, together with the record of
 *              how far this side is. So the content is that of one commit at every moment and after every crash
 *   following  after a commit that says so, every request of the primary is done here as a client's would be, answered when done
 *
 * Which of them it is, and whether any, is the phase of the session:
 *
 *   apart      there is none, or no hello was answered in it: nothing changes
 *   changing   a hello or a commit is under way: nothing else may touch the stage or the volume
 *   staging    units are put; a commit ends it
 *   following  operations are done
 *
 * A request that has no place in its phase is a broken protocol: the session ends. Changes of several sessions (the last one's commit may
 * still be under way when the next one says hello) are made one after the other.
 *
 * What this side cannot vouch for it calls `differs`: regions that were hot when the daemon stopped out of order while following, and what
 * it had changed itself before it gave up being primary. The primary adds that to what it sends, and the commit that brings it clears it.
 */
export interface SecondaryHost {
  readonly volume: Volume
  readonly book: MirrorBook
  readonly stored: StoredMirror
  /** A session began, or its primary's state changed. */
  onState(state: MirrorState, hello: PrimaryHello): void
  onHandOver(): void
  /** Both sides are primary. */
  onSplitBrain(hello: PrimaryHello): void
  onCommit(info: CommitInfo, bytes: number): void
}

type Phase = 'apart' | 'changing' | 'staging' | 'following'

const NEXT: Record<Phase, readonly Phase[]> = {
  apart: ['apart', 'changing'],
  changing: ['staging', 'following', 'apart'],
  staging: ['changing', 'apart'],
  following: ['changing', 'apart'],
}

interface Assembly {
  readonly content: Buffer
  readonly blocks: Bitmap // received ones
  received: number // bytes
}

const NOTHING = Buffer.alloc(0)
const PAGE_UNITS = 1 << 19
const ASSEMBLY_BYTES_MAX = 4 * LIMITS.formatUnitBytesMax
/** Pieces of a unit are whole blocks; its end may cut the last one short. */
const ASSEMBLY_BLOCK = 4096

export class Secondary {
  readonly #host: SecondaryHost
  #stage: Stage | undefined
  #stageToken = ''
  #phase: Phase = 'apart'
  #control: Channel | undefined
  #hello: PrimaryHello | undefined
  #ends: { id: number; errno: number }[] = []
  readonly #assemblies = new Map<number, Assembly>()
  #assemblyBytes = 0
  #stagedBytes = 0
  #operations = 0 // under way
  #idle: (() => void)[] = []
  #puts = 0
  #putsDone: (() => void)[] = []
  /** Hellos, commits, and what `apart` does. */
  readonly #changes = new Mutex()
  readonly #signing = new Mutex()
  #closed: string | undefined // why no session begins any more
  #sideWires: SideWires | undefined
  /** Connections for lanes, before they are served. */
  #lanes: Promise<readonly Socket[]> | undefined

  constructor(host: SecondaryHost) {
    this.#host = host
  }

  get hello(): PrimaryHello | undefined {
    return this.#control === undefined ? undefined : this.#hello
  }
  get connected(): boolean {
    return this.#control !== undefined
  }
  get stagedUnits(): number {
    return this.#stage?.units ?? 0
  }

  /** A session of the primary; an earlier one has ended, or is over now. */
  serve(control: Channel, sideWires?: SideWires): void {
    if (this.#closed !== undefined) {
      control.close(this.#closed)
      return
    }
    this.#control?.close('the primary came back in another session')
    this.#endLanes()
    this.#control = control
    this.#sideWires = sideWires
    this.#enter('apart')
    this.#forgetPieces()
    control.onMessage((message) => this.#onControl(control, message))
    control.ended.then(() => {
      if (this.#control !== control) return
      this.#control = undefined
      this.#enter('apart')
      this.#endLanes()
    })
  }

  /** It ends with the control channel, which comes first. */
  serveData(data: Channel): void {
    const control = this.#control
    const end = (): void => data.close("the mirror's other channel is over")
    if (control === undefined) {
      end()
      return
    }
    data.onMessage((message) => (this.#control === control ? this.#onData(data, message) : end()))
    control.ended.then(end)
  }

  /** Ends sessions, for good; resolves when nothing is under way and the stage is given back. */
  async close(reason: string): Promise<void> {
    this.#closed = reason
    await this.apart(reason, async () => {})
  }

  /** What it was closed for did not happen. */
  reopen(): void {
    this.#closed = undefined
  }

  /** Ends sessions. `action` runs when nothing is under way and the stage is given back; a hello that comes meanwhile waits for its end. */
  apart<T>(reason: string, action: () => Promise<T>): Promise<T> {
    this.#control?.close(reason)
    this.#control = undefined
    this.#enter('apart')
    this.#endLanes()
    return this.#changes.run(async () => {
      await this.#quiet()
      this.#dropStage()
      return action()
    })
  }

  // ---- requests of the primary

  #onControl(control: Channel, message: Message): void | Promise<void> {
    switch (message.type) {
      case MESSAGE.hello:
        return this.#answer(control, message, async () =>
          json(await this.#meet(control, readPrimaryHello(message.payload))),
        )
      case MESSAGE.commit:
        return this.#confirm(control, message, () => this.#commit(control, readCommit(message.payload)))
      case MESSAGE.handOver:
        return this.#confirm(control, message, async () => {
          await this.#commit(control, { ...readCommit(message.payload), follow: false })
          this.#endLanes()
          await this.#host.volume.lanes.closed()
          this.#host.onHandOver()
        })
      case MESSAGE.flush:
        return this.#confirm(control, message, () => this.#host.volume.flush())
      case MESSAGE.lanes:
        return this.#answer(control, message, async () =>
          json(await this.#prepareLanes(readLanes(message.payload))),
        )
      case MESSAGE.fence:
        return this.#confirm(control, message, () => this.#operationsIdle())
      case MESSAGE.state: {
        const state = new Fields(message.payload, 'state').text('state', 1, 32)
        const known = STATES.find((name) => name === state)
        if (known !== undefined && this.#hello !== undefined) this.#host.onState(known, this.#hello)
        return
      }
      case MESSAGE.operations:
        return this.#operate(control, message.payload)
      default:
        throw new LinkError('BAD_FRAME', `a primary does not send messages of type ${message.type}`)
    }
  }

  #onData(data: Channel, message: Message): Promise<void> {
    switch (message.type) {
      case MESSAGE.put:
        return this.#confirm(data, message, async () => {
          await this.#put(message.payload)
          message.release?.() // not where it failed: somebody may still be at it
        })
      case MESSAGE.hole:
        return this.#confirm(data, message, async () => this.#hole(message.payload))
      case MESSAGE.signatures:
        return this.#answer(data, message, () => this.#sign(message.payload))
      case MESSAGE.bitmap:
        return this.#answer(data, message, async () => this.#page(new Fields(message.payload, 'bitmap')))
      default:
        throw new LinkError('BAD_FRAME', `a primary does not send messages of type ${message.type} for data`)
    }
  }

  #confirm(channel: Channel, message: Message, action: () => Promise<void>): Promise<void> {
    return this.#answer(channel, message, async () => {
      await action()
      return NOTHING
    })
  }

  async #answer(
    channel: Channel,
    message: Message,
    action: () => Promise<Buffer | readonly Buffer[]>,
  ): Promise<void> {
    if (message.id === 0) throw new LinkError('BAD_FRAME', `a message of type ${message.type} wants a reply`)
    let reply: Promise<void>
    try {
      const result = await action()
      reply = channel.reply(message, message.type, result)
    } catch (error) {
      if (error instanceof StoreError) reply = channel.replyError(message, error.code, error.message)
      else if (error instanceof UserError) reply = channel.replyError(message, error.code, error.message)
      else throw error
    }
    await reply.catch((error: unknown) => {
      if (!(error instanceof LinkError)) throw error // the session is over, and knows why
    })
  }

  #enter(next: Phase): void {
    assert(NEXT[this.#phase].includes(next), `secondary: ${this.#phase} -> ${next}`)
    this.#phase = next
  }

  /** A hello or a commit of the session has ended; its first outcome counts. */
  #changed(control: Channel, next: Phase): void {
    if (this.#control === control && this.#phase === 'changing') this.#enter(next)
  }

  // ---- hello

  async #meet(control: Channel, hello: PrimaryHello): Promise<RemoteHello> {
    if (this.#phase === 'changing') throw new LinkError('BAD_FRAME', 'a hello while a request is under way')
    this.#enter('changing')
    this.#hello = hello
    try {
      return await this.#changes.run(() => this.#meetAlone(control, hello))
    } finally {
      this.#changed(control, 'apart')
    }
  }

  /** Concurrency rule: it is answered when nothing of the time before is under way, or can begin. */
  async #meetAlone(control: Channel, hello: PrimaryHello): Promise<RemoteHello> {
    const { volume, stored } = this.#host
    this.#endLanes()
    await this.#quiet()
    this.#throwIfOver(control)
    this.#forgetPieces()
    if (stored.record.role === 'primary') {
      this.#host.onSplitBrain(hello)
      return this.#introduce()
    }
    if (hello.unitBytes !== stored.record.unitBytes) {
      throw new UserError(
        'REFUSED',
        `volume ${volume.name}: the mirror's unit is ${stored.record.unitBytes} bytes here`,
      )
    }
    const { mode, intervalMs, onLoss } = hello
    const { record } = stored
    if (record.mode !== mode || record.intervalMs !== intervalMs || record.onLoss !== onLoss) {
      await this.#host.book.save(record.id, { mode, intervalMs, onLoss })
    }
    if (hello.size > volume.size || (hello.size < volume.size && this.#mayCut(hello))) {
      this.#dropStage()
      await volume.resize(hello.size, { force: true, byPrimary: true })
    }
    if (this.#stage === undefined) {
      this.#stage = volume.openStage()
      this.#stageToken = randomUUID()
      this.#stagedBytes = 0
    }
    this.#changed(control, 'staging')
    this.#host.onState('negotiating', hello)
    return this.#introduce()
  }

  /** Where the primary is going to find a split brain (it was set back, say), nothing is lost before that is settled: not even the end. */
  #mayCut({ base, cycle, generation }: PrimaryHello): boolean {
    const { init } = this.#host.stored.record
    return judge({ clean: true, base, cycle, init }, generation, this.#introduce()).kind !== 'splitbrain'
  }

  /** A request that waited while its session ended. Nobody hears the answer. @throws UserError */
  #throwIfOver(control: Channel): void {
    if (this.#control !== control) throw new UserError('BUSY', 'the session of this request is over')
  }

  #introduce(): RemoteHello {
    const { volume, stored } = this.#host
    const { record } = stored
    return {
      role: record.role,
      generation: volume.record.generation ?? null,
      base: record.base,
      consistent: record.initialized,
      cycle: record.cycle,
      size: volume.size,
      stage: this.#stageToken,
      changed: stored.map.count * record.unitBytes,
      blank: volume.tables.formattedUnits === 0,
    }
  }

  // ---- staged

  /** @throws LinkError BAD_FRAME where nothing may be staged at present */
  #openStage(): Stage {
    const stage = this.#phase === 'staging' ? this.#stage : undefined
    if (stage === undefined) throw new LinkError('BAD_FRAME', `something is staged while ${this.#phase}`)
    return stage
  }

  #dropStage(): void {
    this.#stage?.drop()
    this.#stage = undefined
    this.#stageToken = ''
  }

  #checkUnits(offset: number, length: number): void {
    const { size } = this.#host.volume
    const { unitBytes } = this.#host.stored.record
    const end = offset + length
    const whole = offset % unitBytes === 0 && (end % unitBytes === 0 || end === size)
    if (!(length > 0 && end <= size && whole))
      throw new LinkError('BAD_FRAME', `no whole copy units: ${offset}+${length}`)
  }

  #hole(payload: Buffer): void {
    const stage = this.#openStage()
    const ranges = readRanges(payload)
    let bytes = 0
    for (const { offset, length } of ranges) {
      this.#checkUnits(offset, length)
      bytes += length
    }
    if (bytes > LIMITS.mirrorHoleUnitsMax * this.#host.stored.record.unitBytes)
      throw new LinkError('BAD_FRAME', `holes of ${bytes} bytes at once`)
    for (const { offset, length } of ranges) stage.hole(offset, length)
  }

  async #put(payload: Buffer): Promise<void> {
    const stage = this.#openStage()
    const { offset, unit, length, data } = readPut(payload)
    this.#checkUnits(unit, length)
    if (length > Math.max(LIMITS.mirrorPieceBytes, this.#host.stored.record.unitBytes)) {
      throw new LinkError('BAD_FRAME', `a put of ${length} bytes`)
    }
    const whole = offset === unit && data.length === length
    const content = whole ? data : this.#assemble(offset - unit, unit, length, data)
    if (content === undefined) return
    this.#puts++
    try {
      await stage.put(unit, content)
      this.#stagedBytes += length
    } finally {
      if (!whole) this.#assemblyBytes -= length
      this.#puts--
      if (this.#puts === 0) for (const resolve of this.#putsDone.splice(0)) resolve()
    }
  }

  /** @param at where the piece lies in its unit. @returns the unit when all of it is there */
  #assemble(at: number, unit: number, length: number, data: Buffer): Buffer | undefined {
    const end = at + data.length
    let assembly = this.#assemblies.get(unit)
    if (!(at >= 0 && end <= length && length === (assembly?.content.length ?? length)))
      throw new LinkError('BAD_FRAME', 'a piece of a copy unit lies outside it')
    if (at % ASSEMBLY_BLOCK !== 0 || (end % ASSEMBLY_BLOCK !== 0 && end !== length))
      throw new LinkError('BAD_FRAME', 'a piece of a copy unit is not whole blocks')
    const first = at / ASSEMBLY_BLOCK
    const last = Math.ceil(end / ASSEMBLY_BLOCK)
    if (assembly !== undefined && assembly.blocks.nextSet(first, last) < last)
      throw new LinkError('BAD_FRAME', 'a piece of a copy unit comes twice')
    if (assembly === undefined) {
      if (this.#assemblyBytes + length > ASSEMBLY_BYTES_MAX) {
        throw new StoreError('NO_MEMORY', 'too many copy units arrive in pieces at a time')
      }
      const blocks = new Bitmap(Math.ceil(length / ASSEMBLY_BLOCK))
      assembly = { content: Buffer.allocUnsafe(length), blocks, received: 0 }
      this.#assemblies.set(unit, assembly)
      this.#assemblyBytes += length
    }
    data.copy(assembly.content, at)
    assembly.blocks.setRange(first, last)
    assembly.received += data.length
    if (assembly.received < length) return undefined
    this.#assemblies.delete(unit)
    return assembly.content
  }

  /** Units of which not all has come. Others are still being put: their bytes count until they are. */
  #forgetPieces(): void {
    for (const { content } of this.#assemblies.values()) this.#assemblyBytes -= content.length
    this.#assemblies.clear()
  }

  /** Nothing of any session is under way: no request, no put, no write that came on a lane. For one of `#changes`. */
  async #quiet(): Promise<void> {
    const { lanes } = this.#host.volume
    while (this.#operations > 0 || this.#puts > 0 || lanes.closing) {
      await this.#operationsIdle()
      await lanes.closed()
      while (this.#puts > 0) await new Promise<void>((resolve) => this.#putsDone.push(resolve))
    }
  }

  async #commit(control: Channel, info: CommitInfo): Promise<void> {
    if (this.#phase !== 'staging') throw new LinkError('BAD_FRAME', `a commit while ${this.#phase}`)
    if (this.#puts > 0 || this.#assemblies.size > 0)
      throw new LinkError('BAD_FRAME', 'a commit while something is put')
    this.#enter('changing')
    try {
      await this.#changes.run(() => this.#commitAlone(control, info))
    } finally {
      this.#changed(control, 'staging')
    }
  }

  /** Crash rule: content, generation, `cycle` and what is no longer different become durable in one transaction. */
  async #commitAlone(control: Channel, info: CommitInfo): Promise<void> {
    const { volume, book, stored } = this.#host
    this.#throwIfOver(control)
    if (info.size !== volume.size) throw new LinkError('BAD_FRAME', 'a commit of another size')
    const stage = this.#stage
    const bytes = this.#stagedBytes
    const change: Partial<MirrorRecord> = {
      cycle: info.cycle,
      initialized: info.consistent,
      ...(info.consistent ? { base: info.generation.current } : {}),
    }
    await this.#operationsIdle()
    await volume.quiesce(() =>
      book.save(stored.record.id, change, {
        ...(info.consistent ? { bits: new Bitmap(stored.map.unitCount) } : {}),
        ...(info.consistent ? { volume: { generation: info.generation } } : {}),
        prepare: () => stage?.switch() ?? (() => {}),
      }),
    )
    stage?.switched()
    this.#stagedBytes = 0
    // What was suspect has come again with this commit, or follows from now on.
    if (info.consistent && (volume.info().intents?.suspect ?? 0) > 0) await volume.acknowledge()
    if (info.follow) {
      this.#dropStage()
      this.#changed(control, 'following')
      if (this.#control === control) await this.#serveLanes(control)
    }
    this.#host.onCommit(info, bytes)
  }

  // ---- following

  /** The primary wants lanes. What it gets carries nothing before a commit says that the sides are equal. */
  async #prepareLanes({ count, tokens }: LanesMessage): Promise<LanesMessage> {
    const none = { count: 0, tokens: [] }
    const sideWires = this.#sideWires
    this.#endLanes()
    if (this.#host.volume.lanes.width === 0 || sideWires === undefined || count === 0) return none
    const control = this.#control
    if (sideWires.side === 'listens') {
      const expected = expectSockets(sideWires, count)
      if (expected.length === 0) return none
      this.#lanes = allSockets(expected.map(({ socket }) => socket))
      this.#lanes.catch(() => {}) // told by who waits for it
      return { count, tokens: expected.map(({ token }) => token) }
    }
    let sockets: readonly Socket[] = []
    try {
      sockets = await allSockets(tokens.slice(0, count).map((token) => sideWires.dial(token)))
    } catch (error) {
      if (!(error instanceof LinkError)) throw error
      return none // it goes without
    }
    if (this.#control !== control) {
      for (const socket of sockets) socket.destroy()
      return none
    }
    this.#lanes = Promise.resolve(sockets)
    return { count: sockets.length, tokens: [] }
  }

  async #serveLanes(control: Channel): Promise<void> {
    const lanes = this.#lanes
    this.#lanes = undefined
    if (lanes === undefined) return
    const { volume } = this.#host
    // The primary does without, and learns so from their end, where they did not come.
    const sockets = await lanes.catch(() => [])
    await volume.lanes.settle()
    const wanted = this.#control === control && this.#phase === 'following' && volume.lanes.none
    if (wanted && sockets.length > 0) volume.lanes.serve(sockets)
    else for (const socket of sockets) socket.destroy()
  }

  /** In the turn in which the sides part. `lanes.closed()` resolves when nothing comes from them any more. */
  #endLanes(): void {
    const lanes = this.#lanes
    this.#lanes = undefined
    lanes?.then(
      (sockets) => {
        for (const socket of sockets) socket.destroy()
      },
      () => {},
    )
    // Others that there are belong to a mirror of which this side is primary.
    const { lanes: served } = this.#host.volume
    if (served.serving) void served.close()
  }

  #operate(control: Channel, payload: Buffer): Promise<void> {
    if (this.#phase !== 'following')
      throw new LinkError('BAD_FRAME', `an operation comes while ${this.#phase}`)
    const { volume } = this.#host
    const done: Promise<void>[] = []
    for (const { id, kind, flags, offset, length, payload: data } of readOperations(payload)) {
      if (offset + length > volume.size) {
        this.#end(control, id, NBD_ERRNO.EINVAL)
        continue
      }
      this.#operations++
      done.push(
        volume.submit(kind, offset, length, flags, data).then((errno) => {
          this.#operations--
          if (this.#operations === 0) for (const resolve of this.#idle.splice(0)) resolve()
          this.#end(control, id, errno)
        }),
      )
    }
    return Promise.all(done).then(() => {})
  }

  /** Ends of one turn travel together. */
  #end(control: Channel, id: number, errno: number): void {
    if (this.#control !== control || this.#ends.push({ id, errno }) > 1) return
    // After the microtasks in which the others of this turn end.
    process.nextTick(() => {
      const ends = this.#ends
      this.#ends = []
      if (this.#control !== control) return
      for (let at = 0; at < ends.length; at += ENDS_MAX) {
        control.send(MESSAGE.ends, encodeEnds(ends.slice(at, at + ENDS_MAX))).catch((error: unknown) => {
          if (!(error instanceof LinkError)) throw error // the session is over
        })
      }
    })
  }

  async #operationsIdle(): Promise<void> {
    while (this.#operations > 0) await new Promise<void>((resolve) => this.#idle.push(resolve))
  }

  // ---- comparing

  /** Copy units that this side cannot vouch for. */
  differing(): Bitmap {
    const units = this.#host.stored.map.unitCount
    const bits = new Bitmap(units)
    for (let unit = this.#nextUnit('differs', 0, units); unit < units; ) {
      bits.set(unit)
      unit = this.#nextUnit('differs', unit + 1, units)
    }
    return bits
  }

  async #sign(payload: Buffer): Promise<Buffer> {
    const { volume } = this.#host
    const ranges = readRanges(payload)
    let bytes = 0
    for (const { offset, length } of ranges) {
      bytes += length
      if (!(length > 0 && length <= LIMITS.formatUnitBytesMax && offset + length <= volume.size)) {
        throw new LinkError('BAD_FRAME', `a signature of ${offset}+${length}`)
      }
    }
    if (bytes > SIGN_BYTES_MAX || ranges.length > SIGN_RANGES_MAX)
      throw new LinkError('BAD_FRAME', 'too many signatures at once')
    // One request at a time: each has buffers of the size that the peer asked for.
    return this.#signing.run(() => signaturesOf(ranges, (offset, target) => volume.read(offset, target)))
  }

  #page(fields: Fields): readonly Buffer[] {
    const kind = fields.text('kind', 1, 16)
    if (kind !== 'realized' && kind !== 'differs') throw new LinkError('BAD_FRAME', `a bitmap ${kind}`)
    const from = fields.integer('from', 0, NO_MORE)
    const units = Math.ceil(this.#host.volume.size / this.#host.stored.record.unitBytes)
    const begin = this.#nextUnit(kind, from, units)
    if (begin >= units) return encodePage(0, NO_MORE, Buffer.alloc(0))
    const first = begin - (begin % 8)
    const end = Math.min(units, first + PAGE_UNITS)
    const bits = Buffer.alloc(Math.ceil((end - first) / 8))
    for (let unit = begin; unit < end; unit = this.#nextUnit(kind, unit + 1, units)) {
      bits[(unit - first) >> 3] = (bits[(unit - first) >> 3] ?? 0) | (1 << ((unit - first) & 7))
    }
    return encodePage(first, end < units ? end : NO_MORE, bits)
  }

  /** The first copy unit at or after `unit` that is realized, or may differ. */
  #nextUnit(kind: BitmapKind, unit: number, units: number): number {
    if (unit >= units) return units
    const { volume, stored } = this.#host
    const { unitBytes } = stored.record
    const perUnit = unitBytes / volume.unitBytes // format units
    const at = unit * perUnit
    if (kind === 'realized') {
      const { init, unitCount } = volume.tables
      return at < unitCount ? Math.floor(init.nextSet(at) / perUnit) : units
    }
    const own = stored.map.nextSet(unit)
    const intents = volume.intentMap
    if (intents === undefined) return Math.min(own, units)
    const region = intents.nextSuspect(intents.regionOf(at))
    const suspect = Math.max(unit, Math.floor((region * intents.regionUnits) / perUnit))
    return Math.min(own, region >= intents.regionCount ? units : suspect, units)
  }
}

const STATES: readonly MirrorState[] = [
  'comparing',
  'copying',
  'insync',
  'cycling',
  'degraded',
  'paused',
  'negotiating',
]
const ENDS_MAX = 4096
const SIGN_BYTES_MAX = 256 << 20
const SIGN_RANGES_MAX = Math.floor(LIMITS.linkPayloadMax / SIGNATURE_BYTES) // of which the answer fits

assert(LIMITS.mirrorPieceBytes + 1024 <= LIMITS.linkPayloadMax)
