import { availableParallelism } from 'node:os'
import { getSystemErrorName } from 'node:util'
import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { checkAdopted } from './adopted-request.ts'
import type {
  AdoptedRequest,
  Datapath,
  DatapathDescription,
  ExportCounters,
  ExportHandler,
  ExportId,
  ExportSpec,
  ExportTables,
  FormatUnit,
  MemberCounters,
  ReplyMode,
  SessionEnd,
  SessionId,
  SessionSpec,
  StatusResult,
  StoreLayout,
  Upcall,
  UpcallKind,
} from './datapath.ts'
import {
  type Binding,
  COMMAND_WORD,
  EVENT_WORD,
  EXPORT_COUNTERS,
  loadNative,
  MEMBER_COUNTERS,
  type NativeHandle,
  RECORD_WORDS,
  UPCALL_FLAG,
} from './native-binding.ts'
import { NativeLanes } from './native-lanes.ts'
import { descriptorOf } from './socket-descriptor.ts'

export { loadNative } from './native-binding.ts'

/**
 * The datapath in C++ (native/): this class turns calls into numbers and events back into calls. It holds what the
 * addon points to: tables until their export is closed or they are replaced, buffers until their access is over, payloads
 * that were adopted until they are completed.
 *
 * Commands of one turn are collected in `#words` and cross together, at the end of a batch of upcalls or on the next
 * tick. Events come in batches too: #onWake drains them all, settles promises, tells ended sessions, and hands each
 * export its upcalls in one call.
 *
 * An upcall's id is `serial * 2^20 + index`: the index is its place in the addon's table and is used again, the serial
 * is not. So a completion that comes twice or too late is told from the one that is due, here, before anything crosses.
 */
export interface NativeOpenOptions {
  /** I/O threads; default: half the processors, 1 to 4. */
  readonly threads?: number
  /** What reads wait in that are not in the page cache. */
  readonly engine?: 'auto' | 'io_uring' | 'threads'
}

const upcallIndexes = 2 ** 20
const kindOf: readonly UpcallKind[] = ['write', 'write', 'sync', 'trim', 'zero', 'status'] // by number, from 1
const numberOf = { write: 1, trim: 3, zero: 4 } as const
const endOf: readonly SessionEnd[] = ['disconnect', 'hangup', 'protocol', 'error', 'closed']
const modeNumber: Record<ReplyMode, number> = { simple: 0, structured: 1, extended: 2 }
const engineNumber = { auto: 0, io_uring: 1, threads: 2 } as const
const noContexts: readonly number[] = []
const wordsAtStart = 16 * 1024
const recordsPerDrain = 1024
const NO_EXPORT = 0

export class NativeDatapath implements Datapath {
  readonly description: DatapathDescription
  readonly lanes: NativeLanes

  readonly #binding: Binding
  readonly #handle: NativeHandle
  readonly #layout: StoreLayout
  readonly #stripeSize: number
  readonly #exports = new Map<ExportId, NativeExport>()
  readonly #sessions = new Map<SessionId, NativeSession>()
  #nextExport = 1
  #nextSession = 1

  readonly #upcalls: (OutstandingUpcall | undefined)[] = [] // by index
  #upcallSerial = 0
  #batches: NativeExport[] = [] // exports with upcalls that their handlers have not been told

  readonly #records = new Float64Array(recordsPerDrain * RECORD_WORDS)
  #words = new Float64Array(wordsAtStart)
  #wordCount = 0
  #flushPlanned = false
  readonly #barriers = new Map<ExportId, Promise<void>>() // those that have not crossed yet

  readonly #pending: (PendingCommand | undefined)[] = [] // by tag
  readonly #freeTags: number[] = []
  #pendingCount = 0
  #onIdle: (() => void) | null = null
  #closing: Promise<void> | null = null
  #closed = false

  /** @throws Error where the addon is not built or the engine that was asked for is not available */
  static open(layout: StoreLayout, options: NativeOpenOptions = {}): NativeDatapath {
    const native = loadNative()
    if (!native.ok) throw new Error(native.reason)
    return new NativeDatapath(native.binding, layout, options)
  }

  private constructor(binding: Binding, layout: StoreLayout, options: NativeOpenOptions) {
    this.#binding = binding
    this.#layout = layout
    this.#stripeSize = layout.dataMembers * layout.chunkSize
    const engine = options.engine ?? 'auto'
    this.#handle = binding.open(
      {
        memberFds: layout.memberFds,
        dataMembers: layout.dataMembers,
        parityMembers: layout.parityMembers,
        chunkSize: layout.chunkSize,
        dataOffset: layout.dataOffset,
        threads: options.threads ?? Math.max(1, Math.min(4, Math.floor(availableParallelism() / 2))),
        engine: engineNumber[engine],
        payloadMax: LIMITS.requestPayloadMax,
        requestsInFlight: LIMITS.requestsInFlightPerConnection,
        payloadPerConnection: LIMITS.payloadInFlightPerConnection,
        payloadTotal: LIMITS.payloadInFlightTotal,
        replyBytesQueued: LIMITS.replyBytesQueuedPerConnection,
        statusExtentsMax: LIMITS.blockStatusExtentsMax,
      },
      () => {
        try {
          this.#onWake()
        } catch (error) {
          // An error that leaves this callback is only warned of (Node's DEP0168). Ours is to stop the process.
          process.nextTick(() => {
            throw error
          })
        }
      },
    )
    const got = binding.describe(this.#handle)
    this.lanes = new NativeLanes(binding, this.#handle, got.threads, {
      flush: () => this.#flush(),
      put: (kind, id) => this.#put(kind, id),
      end: (session) => this.#endSession(session),
    })
    const refused = engine === 'auto' && got.engine === 'threads'
    this.description = {
      kind: 'native',
      engine: got.engine,
      threads: got.threads,
      reason: refused
        ? 'the native addon is built; io_uring is refused here, so reads wait in threads'
        : 'the native addon is built',
    }
  }

  // ----------------------------------------------------------------------------------------- exports

  openExport(spec: ExportSpec, handler: ExportHandler): ExportId {
    if (this.#closing !== null) throw shuttingDown(`export ${spec.name} cannot be opened`)
    assert(spec.stripeSize === this.#stripeSize, 'the stripe size of an export is that of the store')
    assert(spec.formatUnit >= 1 && spec.fill >= 0 && spec.fill <= 255, 'export specification')
    checkTables(spec, spec.tables)
    const id = this.#nextExport++
    const { size, slots, init, direct } = spec.tables
    this.#binding.openExport(
      this.#handle,
      id,
      spec.stripeSize,
      spec.formatUnit,
      spec.fill,
      size,
      slots,
      init,
      direct,
    )
    this.#exports.set(id, new NativeExport(id, spec, handler))
    return id
  }

  async retable(id: ExportId, tables: ExportTables): Promise<void> {
    const exported = this.#export(id)
    checkTables(exported.spec, tables)
    this.#flush() // commands made before belong before the new tables
    exported.tables.add(tables)
    exported.size = tables.size
    const { size, slots, init, direct } = tables
    const done = this.#command((tag) =>
      this.#binding.retable(this.#handle, id, tag, size, slots, init, direct),
    )
    const retired = [...exported.tables].filter((each) => each !== tables)
    await done
    for (const each of retired) exported.tables.delete(each)
  }

  closeExport(id: ExportId): Promise<void> {
    const exported = this.#export(id)
    exported.closing ??= this.#drain(exported)
    return exported.closing
  }

  async #drain(exported: NativeExport): Promise<void> {
    for (const session of exported.waiting) this.#sessionEnded(session, 'closed')
    await this.#command((tag) => this.#put(COMMAND_WORD.closeExport, tag, exported.id))
    await exported.idle()
    this.#exports.delete(exported.id)
    this.lanes.forget(exported.id)
  }

  // ---------------------------------------------------------------------------------------- sessions

  serve(id: ExportId, spec: SessionSpec): SessionId {
    const exported = this.#export(id)
    if (exported.closing !== null) throw shuttingDown(`export ${exported.spec.name} is being closed`)
    const session: NativeSession = { id: this.#nextSession++, exported, spec }
    this.#sessions.set(session.id, session)
    if (spec.lane !== true) exported.sessions++
    const { socket } = spec
    socket.pause()
    if (socket.writableLength === 0) {
      this.#attach(session)
    } else {
      // The last bytes of the handshake are still in Node's queue: they go first.
      exported.waiting.add(session)
      socket.once('close', () => this.#attachWaiting(session))
      socket.write(Buffer.alloc(0), () => this.#attachWaiting(session))
    }
    return session.id
  }

  #attachWaiting(session: NativeSession): void {
    if (session.exported.waiting.delete(session)) this.#attach(session)
  }

  #attach(session: NativeSession): void {
    const { spec, exported } = session
    const { socket } = spec
    socket.on('error', () => {}) // whatever Node still finds out about its descriptor concerns nobody
    const fd = descriptorOf(socket)
    if (socket.destroyed || fd < 0) {
      socket.destroy()
      queueMicrotask(() => this.#sessionEnded(session, 'hangup'))
      return
    }
    const read: unknown = socket.read()
    const received = read instanceof Buffer ? Buffer.concat([spec.received, read]) : spec.received
    this.#flush()
    try {
      this.#binding.serve(
        this.#handle,
        exported.id,
        session.id,
        fd,
        received,
        modeNumber[spec.mode],
        Uint32Array.from(spec.contexts),
        spec.readOnly,
        spec.lane ?? false,
      )
    } catch {
      // No descriptor is left for it: the client sees its connection end, as it would have had it come a moment later.
      queueMicrotask(() => this.#sessionEnded(session, 'error'))
    }
    // Closes Node's descriptor only: the duplicate keeps the connection, which is not shut down.
    socket.destroy()
  }

  #sessionEnded(session: NativeSession, reason: SessionEnd): void {
    if (!this.#sessions.delete(session.id)) return
    session.exported.waiting.delete(session)
    if (session.spec.lane !== true) session.exported.sessions--
    session.spec.onClose(reason)
  }

  sessionCount(id: ExportId): number {
    return this.#export(id).sessions
  }

  #endSession(id: SessionId): void {
    const session = this.#sessions.get(id)
    if (session?.exported.waiting.has(session)) {
      session.spec.socket.destroy()
      this.#sessionEnded(session, 'closed')
    } else {
      this.#put(COMMAND_WORD.endSession, id)
    }
  }

  // ----------------------------------------------------------------------------------------- upcalls

  complete(upcall: number, errno: number): void {
    const taken = this.#upcall(upcall)
    assert(Number.isInteger(errno) && errno >= 0, 'an error number')
    assert(taken.kind !== 'status' || errno !== 0, 'a status upcall needs results')
    this.#release(taken)
    this.#put(COMMAND_WORD.complete, taken.index, errno)
  }

  completeStatus(upcall: number, results: readonly StatusResult[]): void {
    const taken = this.#upcall(upcall)
    assert(taken.kind === 'status', 'status results for another kind of upcall')
    assert(results.length > 0, 'status results for no context')
    const words: number[] = []
    for (const { context, extents } of results) {
      assert(extents.length > 0, 'block status without extents')
      words.push(context, extents.length)
      for (const { length, flags } of extents) {
        assert(length > 0, 'empty extent')
        words.push(length, flags)
      }
    }
    this.#release(taken)
    this.#flush()
    this.#binding.completeStatus(this.#handle, taken.index, Float64Array.from(words))
  }

  adopt(id: ExportId, request: AdoptedRequest): number {
    const exported = this.#export(id)
    if (exported.closing !== null) throw shuttingDown(`export ${exported.spec.name} is being closed`)
    checkAdopted(request, exported.size)
    const { kind, offset, length, payload = null } = request
    const index = this.#binding.adopt(this.#handle, id, numberOf[kind], offset, length, payload)
    const upcall: OutstandingUpcall = {
      id: this.#upcallId(index),
      kind,
      flags: 0,
      offset,
      length,
      contexts: noContexts,
      index,
      exported,
      payload,
      uses: 0,
    }
    this.#upcalls[index] = upcall
    return upcall.id
  }

  readPayload(id: number, offset: number, target: Buffer): void {
    const { kind, index, length } = this.#upcall(id)
    assert(kind === 'write', 'only a write has a payload')
    assert(offset >= 0 && offset + target.length <= length, 'a range within the payload')
    this.#binding.readPayload(this.#handle, index, offset, target)
  }

  /** The addon gives an index again when a completion has crossed, which is after its release here. */
  #upcallId(index: number): number {
    assert(index < upcallIndexes && this.#upcalls[index] === undefined, 'an upcall in the place of another')
    return ++this.#upcallSerial * upcallIndexes + index
  }

  #upcall(id: number): OutstandingUpcall {
    const upcall = this.#upcalls[id % upcallIndexes]
    assert(upcall !== undefined && upcall.id === id, `upcall ${id} is not outstanding`)
    return upcall
  }

  #release(upcall: OutstandingUpcall): void {
    assert(upcall.uses === 0, `upcall ${upcall.id} is completed while its payload is being written`)
    this.#upcalls[upcall.index] = undefined
  }

  /** An upcall that lies on stripes: write, trim or zero. */
  #overlay(id: number): OutstandingUpcall {
    const upcall = this.#upcall(id)
    assert(upcall.kind !== 'sync' && upcall.kind !== 'status', 'an overlay is a write, a trim or a zero')
    return upcall
  }

  // ------------------------------------------------------------------------------- commands of the policy

  async formatUnit(request: FormatUnit): Promise<void> {
    this.#checkOpen()
    const exported = this.#export(request.export)
    const { slots, stripe } = request
    const bases = request.baseSlots?.some((slot) => slot !== 0) ? request.baseSlots : []
    assert(
      slots.length > 0 && slots.length * this.#stripeSize <= LIMITS.formatUnitBytesMax,
      'slots of a full-stripe write',
    )
    assert(bases.length === 0 || bases.length <= slots.length, 'base slots of a format unit')
    const used = request.overlays.map((id) => this.#overlay(id))
    await this.#using(exported, used, (tag) => {
      this.#room(7 + 2 * slots.length + used.length)
      this.#put(COMMAND_WORD.formatUnit, tag, exported.id)
      this.#put(stripe, slots.length)
      for (const slot of slots) this.#put(slot)
      this.#put(bases.length === 0 ? 0 : slots.length)
      if (bases.length > 0) for (let index = 0; index < slots.length; index++) this.#put(bases[index] ?? 0)
      this.#put(used.length)
      for (const upcall of used) this.#put(upcall.index)
    })
  }

  async writePart(id: number, stripe: number, slot: number): Promise<void> {
    this.#checkOpen()
    const upcall = this.#overlay(id)
    const start = stripe * this.#stripeSize
    const touches = upcall.offset < start + this.#stripeSize && upcall.offset + upcall.length > start
    assert(touches, 'the upcall does not touch that stripe')
    await this.#using(upcall.exported, [upcall], (tag) => {
      this.#room(5)
      this.#put(COMMAND_WORD.writePart, tag, upcall.index)
      this.#put(stripe, slot)
    })
  }

  async readSlot(slot: number, offset: number, target: Buffer): Promise<void> {
    await this.#slotIo(false, slot, offset, target)
  }

  async writeSlot(slot: number, offset: number, source: Buffer): Promise<void> {
    await this.#slotIo(true, slot, offset, source)
  }

  async #slotIo(write: boolean, slot: number, offset: number, buffer: Buffer): Promise<void> {
    this.#checkOpen()
    assert(offset >= 0 && offset + buffer.length <= this.#stripeSize, 'a range within its slot')
    if (buffer.length === 0) return
    this.#flush()
    // The pending command keeps the buffer, which the addon reads or fills, alive.
    await this.#command((tag) => this.#binding.slotIo(this.#handle, tag, write, slot, offset, buffer), buffer)
  }

  /** It crosses at once, before commands that were collected: a barrier among them waits for it too, and may. */
  async readRange(id: ExportId, offset: number, target: Buffer): Promise<void> {
    const exported = this.#exports.get(id)
    if (exported === undefined) throw shuttingDown('the export is closed')
    assert(offset >= 0 && offset + target.length <= exported.size, 'a range within the volume')
    if (target.length === 0) return
    // The pending command keeps the buffer alive.
    await this.#command((tag) => this.#binding.readRange(this.#handle, tag, id, offset, target), target)
  }

  async sync(): Promise<void> {
    this.#checkOpen()
    await this.#command((tag) => this.#put(COMMAND_WORD.sync, tag))
  }

  async punch(slot: number, count: number): Promise<boolean> {
    this.#checkOpen()
    assert(slot >= 0 && count > 0, 'slots to punch')
    return await this.#command((tag) => {
      this.#room(4)
      this.#put(COMMAND_WORD.punch, tag, slot)
      this.#put(count)
    })
  }

  /** Barriers of one turn are one. */
  barrier(lanesOf: ExportId = NO_EXPORT): Promise<void> {
    if (this.#closed) return Promise.resolve()
    const planned = this.#barriers.get(lanesOf)
    if (planned !== undefined) return planned
    const barrier = this.#command((tag) => this.#put(COMMAND_WORD.barrier, tag, lanesOf)).then(() => {})
    this.#barriers.set(lanesOf, barrier)
    return barrier
  }

  // ---------------------------------------------------------------------------------------- counters

  exportCounters(id: ExportId): ExportCounters {
    const n = new Float64Array(EXPORT_COUNTERS)
    this.#binding.exportCounters(this.#handle, this.#export(id).id, n)
    const [reads = 0, readBytes = 0, writes = 0, writeBytes = 0, flushes = 0, trims = 0, zeroes = 0] = n
    const [errors = 0, upcalls = 0, inPlaceWrites = 0, laneWrites = 0, laneBytes = 0, fullStripeWrites = 0] =
      n.subarray(7)
    return {
      reads,
      readBytes,
      writes,
      writeBytes,
      flushes,
      trims,
      zeroes,
      errors,
      upcalls,
      inPlaceWrites,
      laneWrites,
      laneBytes,
      fullStripeWrites,
    }
  }

  memberCounters(): readonly MemberCounters[] {
    if (this.#closed) return this.#lastMemberCounters
    const count = this.#layout.memberFds.length
    const n = new Float64Array(count * MEMBER_COUNTERS)
    this.#binding.memberCounters(this.#handle, n)
    return Array.from({ length: count }, (_, member) => {
      const at = member * MEMBER_COUNTERS
      const [reads = 0, readBytes = 0, writes = 0, writeBytes = 0, syncs = 0] = n.subarray(at)
      return { reads, readBytes, writes, writeBytes, syncs }
    })
  }

  #lastMemberCounters: readonly MemberCounters[] = []

  // ------------------------------------------------------------------------------------------- close

  close(): Promise<void> {
    this.#closing ??= this.#closeAll()
    return this.#closing
  }

  async #closeAll(): Promise<void> {
    await Promise.all([...this.#exports.keys()].map((id) => this.closeExport(id)))
    // Commands of the policy that still run use the members: their end is waited for.
    if (this.#pendingCount > 0) {
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve
      })
    }
    this.#lastMemberCounters = this.memberCounters()
    this.#closed = true
    this.#binding.stop(this.#handle)
  }

  // -------------------------------------------------------------------------------- commands crossing

  /** Room for a command of `count` words, so that no command is cut in two. */
  #room(count: number): void {
    if (this.#wordCount + count <= this.#words.length) return
    this.#flush()
    if (count > this.#words.length) this.#words = new Float64Array(2 * count)
  }

  #put(a: number, b?: number, c?: number): void {
    if (this.#wordCount + 3 > this.#words.length) this.#room(3)
    this.#words[this.#wordCount++] = a
    if (b !== undefined) this.#words[this.#wordCount++] = b
    if (c !== undefined) this.#words[this.#wordCount++] = c
    if (this.#flushPlanned) return
    this.#flushPlanned = true
    process.nextTick(() => {
      this.#flushPlanned = false
      this.#flush()
    })
  }

  #flush(): void {
    if (this.#wordCount === 0) return
    const count = this.#wordCount
    this.#wordCount = 0
    this.#barriers.clear()
    this.#binding.submit(this.#handle, this.#words, count)
  }

  /** Sends a command under a new tag. Resolves with the event's value. @throws StoreError MEMBER_IO, NO_SPACE */
  #command(send: (tag: number) => void, keep: unknown = null): Promise<boolean> {
    const tag = this.#freeTags.pop() ?? this.#pending.length
    this.#pendingCount++
    return new Promise<boolean>((resolve, reject) => {
      this.#pending[tag] = { resolve, reject, keep }
      send(tag)
    })
  }

  async #using(
    exported: NativeExport,
    upcalls: readonly OutstandingUpcall[],
    send: (tag: number) => void,
  ): Promise<void> {
    for (const upcall of upcalls) upcall.uses++
    exported.uses++
    try {
      await this.#command(send)
    } finally {
      for (const upcall of upcalls) upcall.uses--
      exported.used()
    }
  }

  // ---------------------------------------------------------------------------------- events crossing

  #onWake(): void {
    let count: number
    do {
      count = this.#binding.drain(this.#handle, this.#records)
      for (let record = 0; record < count; record++) this.#onRecord(record * RECORD_WORDS)
    } while (count === recordsPerDrain)
    const batches = this.#batches
    this.#batches = []
    let failure: { error: unknown } | null = null
    for (const exported of batches) {
      const upcalls = exported.upcalls
      exported.upcalls = []
      try {
        exported.handler.onUpcalls(upcalls)
      } catch (error) {
        failure ??= { error } // the others are told before it stops the process
      }
    }
    if (!this.#closed) this.#flush()
    if (failure !== null) throw failure.error
  }

  #onRecord(at: number): void {
    const word = (index: number): number => this.#records[at + index] ?? 0
    switch (word(0)) {
      case EVENT_WORD.upcall:
        this.#onUpcall(at)
        return
      case EVENT_WORD.done: {
        const tag = word(1)
        const pending = this.#pending[tag]
        assert(pending !== undefined, 'an event for no command')
        this.#pending[tag] = undefined
        this.#freeTags.push(tag)
        this.#pendingCount--
        if (word(3) === 0) pending.resolve(word(2) === 1)
        else pending.reject(memberError(word(3), word(4), word(5), word(6) === 1))
        if (this.#pendingCount === 0) this.#onIdle?.()
        return
      }
      case EVENT_WORD.sessionEnd: {
        const session = this.#sessions.get(word(1))
        assert(session !== undefined, 'the end of no session')
        this.#sessionEnded(session, endOf[word(2)] ?? 'error')
        return
      }
      case EVENT_WORD.laneEnd:
        this.lanes.ended(word(1))
        return
      default:
        assert(false, 'an event of no kind')
    }
  }

  #onUpcall(at: number): void {
    const records = this.#records
    const index = records[at + 1] ?? 0
    const exported = this.#export(records[at + 2] ?? 0)
    const kind = kindOf[records[at + 3] ?? 0] ?? 'sync'
    let contexts = noContexts
    if (kind === 'status') {
      const session = this.#sessions.get(records[at + 7] ?? 0)
      assert(session !== undefined, 'an upcall of no session')
      contexts = chosen(session.spec.contexts, records[at + 8] ?? 0, records[at + 9] ?? 0)
    }
    const flags = records[at + 4] ?? 0
    const upcall: OutstandingUpcall = {
      id: this.#upcallId(index),
      kind,
      flags: flags & 0xffff,
      offset: records[at + 5] ?? 0,
      length: records[at + 6] ?? 0,
      contexts,
      half: (flags & UPCALL_FLAG.half) !== 0,
      lane: (flags & UPCALL_FLAG.lane) !== 0,
      index,
      exported,
      payload: null,
      uses: 0,
    }
    this.#upcalls[index] = upcall
    if (exported.upcalls.length === 0) this.#batches.push(exported)
    exported.upcalls.push(upcall)
  }

  #export(id: ExportId): NativeExport {
    const exported = this.#exports.get(id)
    assert(exported !== undefined, `export ${id} is not open`)
    return exported
  }

  #checkOpen(): void {
    if (this.#closed) throw shuttingDown('the datapath is closed')
  }
}

class NativeExport {
  readonly id: ExportId
  readonly spec: ExportSpec
  readonly handler: ExportHandler
  readonly tables: Set<ExportTables> // those that the addon may point to
  readonly waiting = new Set<NativeSession>() // served, but not with the addon yet
  size: number // bytes
  upcalls: OutstandingUpcall[] = []
  sessions = 0
  uses = 0 // commands of the policy on this export that have not ended
  closing: Promise<void> | null = null
  #onIdle: (() => void) | null = null

  constructor(id: ExportId, spec: ExportSpec, handler: ExportHandler) {
    this.id = id
    this.spec = spec
    this.handler = handler
    this.tables = new Set([spec.tables])
    this.size = spec.tables.size
  }

  used(): void {
    this.uses--
    if (this.uses === 0) this.#onIdle?.()
  }

  async idle(): Promise<void> {
    if (this.uses === 0) return
    await new Promise<void>((resolve) => {
      this.#onIdle = resolve
    })
  }
}

interface NativeSession {
  readonly id: SessionId
  readonly exported: NativeExport
  readonly spec: SessionSpec
}

interface OutstandingUpcall extends Upcall {
  readonly index: number // in the addon's table
  readonly exported: NativeExport
  readonly payload: Buffer | null // of an adopted write: the addon points to it
  uses: number // commands that use its payload now
}

interface PendingCommand {
  resolve(value: boolean): void
  reject(error: Error): void
  readonly keep: unknown // what the addon points to meanwhile
}

/** The contexts whose bits are set in a mask of 64. */
function chosen(contexts: readonly number[], low: number, high: number): readonly number[] {
  return contexts.filter((_, index) => {
    return ((index < 32 ? low >>> index : high >>> (index - 32)) & 1) === 1
  })
}

function checkTables(spec: ExportSpec, tables: ExportTables): void {
  assert(Number.isSafeInteger(tables.size) && tables.size > 0, 'export size')
  const stripes = Math.ceil(tables.size / spec.stripeSize)
  assert(tables.slots.length >= stripes, 'slots table')
  assert(tables.direct.length * 32 >= stripes, 'direct bitmap')
  assert(tables.init.length * 32 >= Math.ceil(stripes / spec.formatUnit), 'init bitmap')
}

function memberError(errno: number, member: number, offset: number, write: boolean): StoreError {
  const name = getSystemErrorName(-errno)
  if (name === 'ECANCELED') return shuttingDown('the export or the datapath is closed')
  const full = name === 'ENOSPC' || name === 'EDQUOT' || name === 'EFBIG'
  const action = write ? 'write' : 'read'
  return new StoreError(
    full ? 'NO_SPACE' : 'MEMBER_IO',
    `member ${member}: ${action} at offset ${offset}: ${name}`,
  )
}

function shuttingDown(message: string): StoreError {
  return new StoreError('SHUTTING_DOWN', message)
}
