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
import { signaturesOf } from './signatures.ts'
import type { MirrorState } from './state.ts'

/**
 * The secondary's side of a mirror. Two ways lead into its volume, never at the same time:
 *
 *   staged     units are put into fresh slots; a commit switches to all of them in one transaction, together with the record of
 *              how far this side is. So the content is that of one commit at every moment and after every crash
 *   following  after a commit that says so, every request of the primary is done here as a client's would be, answered when done
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

interface Assembly {
  readonly content: Buffer
  received: number
}

const NOTHING = Buffer.alloc(0)
const PAGE_UNITS = 1 << 19
const ASSEMBLY_BYTES_MAX = 4 * LIMITS.formatUnitBytesMax

export class Secondary {
  readonly #host: SecondaryHost
  #stage: Stage | undefined
  #stageToken = ''
  #following = false
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
  readonly #commits = new Mutex()
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
    this.#control?.close('the primary came back in another session')
    this.#endLanes()
    this.#control = control
    this.#sideWires = sideWires
    this.#following = false
    this.#assemblies.clear()
    this.#assemblyBytes = 0
    control.onMessage((message) => this.#onControl(control, message))
    control.ended.then(() => {
      if (this.#control !== control) return
      this.#control = undefined
      this.#following = false
      this.#endLanes()
    })
  }

  serveData(data: Channel): void {
    data.onMessage((message) => this.#onData(data, message))
    this.#control?.ended.then(() => data.close("the mirror's other channel is over"))
  }

  /** Ends sessions; resolves when nothing is under way and the stage is given back. */
  async close(reason: string): Promise<void> {
    this.#control?.close(reason)
    this.#control = undefined
    this.#following = false
    this.#endLanes()
    await this.#allIdle()
    this.#stage?.drop()
    this.#stage = undefined
    this.#stageToken = ''
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
          this.#following = false
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
        return this.#confirm(data, message, async () => {
          for (const { offset, length } of readRanges(message.payload)) {
            this.#checkUnits(offset, length)
            this.#openStage().hole(offset, length)
          }
        })
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

  // ---- hello

  /** Concurrency rule: it is answered when nothing of the time before is under way, or can begin. */
  async #meet(control: Channel, hello: PrimaryHello): Promise<RemoteHello> {
    const { volume, stored } = this.#host
    this.#hello = hello
    do {
      this.#following = false
      this.#endLanes()
      await this.#allIdle()
      if (this.#control !== control)
        throw new LinkError('CHANNEL_CLOSED', 'the session of this hello is over')
    } while (this.#following) // a commit of the time before said so
    this.#assemblies.clear()
    this.#assemblyBytes = 0
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
    if (hello.size !== volume.size) {
      this.#stage?.drop()
      this.#stage = undefined
      this.#stageToken = ''
      await volume.resize(hello.size, { force: true, byPrimary: true })
    }
    this.#openStage()
    this.#host.onState('negotiating', hello)
    return this.#introduce()
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

  #openStage(): Stage {
    if (this.#following) throw new LinkError('BAD_FRAME', 'something is staged while operations follow')
    if (this.#host.stored.record.role !== 'secondary')
      throw new LinkError('BAD_FRAME', 'this side is primary')
    if (this.#stage === undefined) {
      this.#stage = this.#host.volume.openStage()
      this.#stageToken = randomUUID()
      this.#stagedBytes = 0
    }
    return this.#stage
  }

  #checkUnits(offset: number, length: number): void {
    const { size } = this.#host.volume
    const { unitBytes } = this.#host.stored.record
    const end = offset + length
    const whole = offset % unitBytes === 0 && (end % unitBytes === 0 || end === size)
    if (!(length > 0 && end <= size && whole))
      throw new LinkError('BAD_FRAME', `no whole copy units: ${offset}+${length}`)
  }

  async #put(payload: Buffer): Promise<void> {
    const { offset, unit, length, data } = readPut(payload)
    this.#checkUnits(unit, length)
    if (length > Math.max(LIMITS.mirrorPieceBytes, this.#host.stored.record.unitBytes)) {
      throw new LinkError('BAD_FRAME', `a put of ${length} bytes`)
    }
    const stage = this.#openStage()
    this.#puts++
    try {
      if (offset === unit && data.length === length) {
        await stage.put(unit, data)
      } else {
        const whole = this.#assemble(offset, unit, length, data)
        if (whole === undefined) return
        try {
          await stage.put(unit, whole)
        } finally {
          this.#assemblyBytes -= length
        }
      }
      this.#stagedBytes += length
    } finally {
      this.#puts--
      if (this.#puts === 0) for (const resolve of this.#putsDone.splice(0)) resolve()
    }
  }

  /** @returns the unit when all of it is there */
  #assemble(offset: number, unit: number, length: number, data: Buffer): Buffer | undefined {
    let assembly = this.#assemblies.get(unit)
    if (assembly === undefined) {
      if (this.#assemblyBytes + length > ASSEMBLY_BYTES_MAX) {
        throw new StoreError('NO_MEMORY', 'too many copy units arrive in pieces at a time')
      }
      assembly = { content: Buffer.allocUnsafe(length), received: 0 }
      this.#assemblies.set(unit, assembly)
      this.#assemblyBytes += length
    }
    const at = offset - unit
    if (assembly.content.length !== length || at < 0 || at + data.length > length) {
      throw new LinkError('BAD_FRAME', 'a piece of a copy unit lies outside it')
    }
    data.copy(assembly.content, at)
    assembly.received += data.length
    if (assembly.received < length) return undefined
    this.#assemblies.delete(unit)
    return assembly.content
  }

  /** Nothing of any session is under way: no request, no put, no commit, no write that came on a lane. */
  async #allIdle(): Promise<void> {
    const { lanes } = this.#host.volume
    while (this.#operations > 0 || this.#puts > 0 || this.#commits.locked || lanes.closing) {
      await this.#operationsIdle()
      await lanes.closed()
      while (this.#puts > 0) await new Promise<void>((resolve) => this.#putsDone.push(resolve))
      await this.#commits.run(() => {})
    }
  }

  /** Crash rule: content, generation, `cycle` and what is no longer different become durable in one transaction. */
  #commit(control: Channel, info: CommitInfo): Promise<void> {
    return this.#commits.run(() => this.#commitAlone(control, info))
  }

  async #commitAlone(control: Channel, info: CommitInfo): Promise<void> {
    const { volume, book, stored } = this.#host
    if (this.#puts > 0) throw new LinkError('BAD_FRAME', 'a commit while something is put')
    if (stored.record.role !== 'secondary') throw new LinkError('BAD_FRAME', 'this side is primary')
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
      this.#stage?.drop()
      this.#stage = undefined
      this.#stageToken = ''
      if (this.#control === control) {
        this.#following = true
        await this.#serveLanes(control)
      }
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
    const wanted = this.#control === control && this.#following && volume.lanes.none
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
    if (!this.#following) throw new LinkError('BAD_FRAME', 'an operation comes before the sides are equal')
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
    if (bytes > SIGN_BYTES_MAX) throw new LinkError('BAD_FRAME', 'too many signatures at once')
    return signaturesOf(ranges, (offset, target) => volume.read(offset, target))
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

assert(LIMITS.mirrorPieceBytes + 1024 <= LIMITS.linkPayloadMax)
