import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { checkAdopted } from './adopted-request.ts'
import { BufferPool } from './buffer-pool.ts'
import { ByteBudget } from './byte-budget.ts'
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
  SessionId,
  SessionSpec,
  StatusResult,
  StoreLayout,
  Upcall,
  UpcallKind,
} from './datapath.ts'
import { type Overlay, overlayStripe, planStripe } from './format-image.ts'
import { type ConnectionHost, type PendingRequest, PortableConnection } from './portable-connection.ts'
import { type AdoptedPending, PortableExport } from './portable-export.ts'
import { type MemberCalls, PortableMembers } from './portable-members.ts'
import { readPieces } from './table-lookup.ts'

/**
 * The datapath in TypeScript, on node:net and node:fs: the reference for the native one, and what runs where no
 * compiler exists. Everything happens on the event loop; member access runs inline while the page cache answers.
 *
 *   portable.ts             exports, upcalls, commands of the policy
 *   portable-connection.ts  one client: receive, parse, backpressure, run, endings
 *   table-lookup.ts         a range to slots           read-reply.ts   layout of the reply to a read
 *   reply-queue.ts          replies to the socket      format-image.ts what a full-stripe write stores
 *   portable-members.ts     slots to system calls      inline-gate.ts  inline or thread pool
 *   access-epochs.ts        barrier                    byte-budget.ts, buffer-pool.ts  memory
 *
 * Upcalls are collected for a turn and told to the policy in one batch each export, in a turn of their own: never
 * from inside `serve` or `complete`. While the policy writes from a payload (`uses`), its upcall cannot be completed.
 */
export class PortableDatapath implements Datapath, ConnectionHost {
  readonly description: DatapathDescription
  readonly members: PortableMembers
  readonly pool = new BufferPool()
  readonly budget = new ByteBudget(LIMITS.payloadInFlightTotal)

  readonly #exports = new Map<ExportId, PortableExport>()
  readonly #upcalls = new Map<number, PendingRequest | AdoptedPending>()
  #nextExport = 1
  #nextSession = 1
  #nextUpcall = 1
  #dispatchPlanned = false
  #closing: Promise<void> | null = null
  #closed = false
  #zeros: Buffer | null = null

  /**
   * @param reason why this one runs, a sentence for `status`
   * @param inlineBytesMax largest member access that may run on this thread; 0 sends all to the thread pool
   * @param calls what member access is made of, where not of system calls
   */
  constructor(layout: StoreLayout, reason: string, inlineBytesMax?: number, calls?: MemberCalls) {
    this.members = new PortableMembers(layout, inlineBytesMax, calls)
    this.description = { kind: 'portable', engine: 'node', threads: 1, reason }
  }

  // ----------------------------------------------------------------------------------------- exports

  openExport(spec: ExportSpec, handler: ExportHandler): ExportId {
    if (this.#closing !== null) throw shuttingDown(`export ${spec.name} cannot be opened`)
    assert(spec.stripeSize === this.members.stripeSize, 'the stripe size of an export is that of the store')
    assert(spec.formatUnit >= 1 && spec.fill >= 0 && spec.fill <= 255, 'export specification')
    checkTables(spec, spec.tables)
    const id = this.#nextExport++
    this.#exports.set(id, new PortableExport(id, spec, handler))
    return id
  }

  retable(id: ExportId, tables: ExportTables): Promise<void> {
    const exported = this.#export(id)
    checkTables(exported.spec, tables)
    exported.tables = tables
    // Tables are looked up in the turn in which an access begins, so only accesses under way know the old ones.
    return this.barrier()
  }

  closeExport(id: ExportId): Promise<void> {
    const exported = this.#export(id)
    exported.closing ??= this.#drain(exported)
    return exported.closing
  }

  serve(id: ExportId, session: SessionSpec): SessionId {
    const exported = this.#export(id)
    if (exported.closing !== null) throw shuttingDown(`export ${exported.spec.name} is being closed`)
    const connection = new PortableConnection(this, exported, this.#nextSession++, session)
    exported.connections.add(connection)
    return connection.id
  }

  sessionCount(id: ExportId): number {
    return this.#export(id).connections.size
  }

  connectionClosed(connection: PortableConnection): void {
    const exported = connection.export
    assert(exported.connections.delete(connection), 'a connection closed twice')
    if (exported.connections.size === 0) exported.onEmpty?.()
  }

  // ----------------------------------------------------------------------------------------- upcalls

  upcall(pending: PendingRequest, kind: UpcallKind): void {
    const { request, length, contexts } = pending
    const id = this.#nextUpcall++
    pending.kind = kind
    pending.upcall = id
    this.#upcalls.set(id, pending)
    const upcall: Upcall = { id, kind, flags: request.flags, offset: request.offset, length, contexts }
    pending.connection.export.upcalls.push(upcall)
    if (this.#dispatchPlanned) return
    this.#dispatchPlanned = true
    setImmediate(() => this.#dispatch())
  }

  complete(upcall: number, errno: number): void {
    assert(this.#pending(upcall).kind !== 'status' || errno !== 0, 'a status upcall needs results')
    const pending = this.#take(upcall)
    if (pending.connection !== null) {
      pending.connection.completed(pending, errno)
      return
    }
    const exported = pending.export
    exported.adopted--
    if (exported.adopted === 0) exported.onAdoptedEmpty?.()
  }

  completeStatus(upcall: number, results: readonly StatusResult[]): void {
    assert(this.#pending(upcall).kind === 'status', 'status results for another kind of upcall')
    assert(results.length > 0, 'status results for no context')
    const pending = this.#take(upcall)
    assert(pending.connection !== null, 'a status upcall is never adopted')
    pending.connection.completedStatus(pending, results)
  }

  adopt(id: ExportId, request: AdoptedRequest): number {
    const exported = this.#export(id)
    if (exported.closing !== null) throw shuttingDown(`export ${exported.spec.name} is being closed`)
    checkAdopted(request, exported.tables.size)
    const { kind, offset, length, payload = null } = request
    const upcall = this.#nextUpcall++
    this.#upcalls.set(upcall, {
      connection: null,
      export: exported,
      request: { offset },
      length,
      payload,
      kind,
      uses: 0,
    })
    exported.adopted++
    return upcall
  }

  readPayload(upcall: number, offset: number, target: Buffer): void {
    const { kind, payload, length } = this.#pending(upcall)
    assert(kind === 'write' && payload !== null, 'only a write has a payload')
    assert(offset >= 0 && offset + target.length <= length, 'a range within the payload')
    payload.copy(target, 0, offset, offset + target.length)
  }

  // ------------------------------------------------------------------------------- commands of the policy

  async formatUnit(request: FormatUnit): Promise<void> {
    this.#checkOpen()
    const { spec, counts } = this.#export(request.export)
    const { stripeSize } = spec
    const { slots, baseSlots, stripe } = request
    const unitOffset = stripe * stripeSize
    assert(
      slots.length > 0 && slots.length * stripeSize <= LIMITS.formatUnitBytesMax,
      'slots of a full-stripe write',
    )
    const used = request.overlays.map((id) => this.#pending(id))
    const overlays: Overlay[] = used.map((pending) => {
      assert(pending.kind !== 'sync' && pending.kind !== 'status', 'an overlay is a write, a trim or a zero')
      const offset = pending.request.offset - unitOffset
      return { offset, length: pending.length, payload: pending.payload }
    })
    const plans = slots.map((_, index) => {
      return planStripe(overlays, index * stripeSize, stripeSize, baseSlots?.[index] ?? 0)
    })
    const copies = plans.some((plan) => plan.direct === null)
    const scratch = copies ? this.pool.take(slots.length * stripeSize) : null
    const epoch = this.members.epochs.begin()
    for (const pending of used) pending.uses++
    try {
      if (scratch !== null) {
        await settled(
          plans.map((plan, index) => {
            const image = scratch.subarray(index * stripeSize, (index + 1) * stripeSize)
            if (plan.base === 'fill') image.fill(spec.fill)
            return plan.base === 'slot' ? this.members.read(baseSlots?.[index] ?? 0, 0, image) : undefined
          }),
        )
      }
      const writes: StripeWrite[] = []
      plans.forEach((plan, index) => {
        const start = index * stripeSize
        const slot = slots[index] ?? 0
        if (plan.direct === null) {
          assert(scratch !== null)
          overlayStripe(scratch.subarray(start, start + stripeSize), plan.overlays, start)
          this.#joinWrite(writes, { slot, source: scratch, start, length: stripeSize })
        } else if (plan.direct.payload === null) {
          this.#joinWrite(writes, { slot, source: this.#zeroStripe(), start: 0, length: stripeSize })
        } else {
          const { payload, offset } = plan.direct
          this.#joinWrite(writes, { slot, source: payload, start: start - offset, length: stripeSize })
        }
      })
      await settled(
        writes.map(({ slot, source, start, length }) => {
          return this.members.write(slot, 0, source.subarray(start, start + length))
        }),
      )
      counts.fullStripeWrites += slots.length
    } finally {
      for (const pending of used) pending.uses--
      if (scratch !== null) this.pool.give(scratch)
      this.members.epochs.end(epoch)
    }
  }

  async writePart(upcall: number, stripe: number, slot: number): Promise<void> {
    this.#checkOpen()
    const pending = this.#pending(upcall)
    const { kind, payload, length, request } = pending
    assert(kind !== 'sync' && kind !== 'status', 'a part of a write, a trim or a zero')
    const { stripeSize } = this.members
    const stripeOffset = stripe * stripeSize
    const from = Math.max(request.offset, stripeOffset)
    const to = Math.min(request.offset + length, stripeOffset + stripeSize)
    assert(from < to, 'the upcall does not touch that stripe')
    const source =
      payload === null
        ? this.#zeroStripe().subarray(0, to - from)
        : payload.subarray(from - request.offset, to - request.offset)
    pending.uses++
    try {
      await this.members.write(slot, from - stripeOffset, source)
    } finally {
      pending.uses--
    }
  }

  async readSlot(slot: number, offset: number, target: Buffer): Promise<void> {
    this.#checkOpen()
    assert(offset + target.length <= this.members.stripeSize, 'a range within its slot')
    if (target.length > 0) await this.members.read(slot, offset, target)
  }

  async writeSlot(slot: number, offset: number, source: Buffer): Promise<void> {
    this.#checkOpen()
    assert(offset + source.length <= this.members.stripeSize, 'a range within its slot')
    if (source.length > 0) await this.members.write(slot, offset, source)
  }

  /** Every piece begins in this turn, so a barrier from the next line on waits for all of them. */
  async readRange(id: ExportId, offset: number, target: Buffer): Promise<void> {
    const exported = this.#exports.get(id)
    if (exported === undefined || exported.drained) throw shuttingDown('the export is closed')
    const { spec, tables } = exported
    assert(offset >= 0 && offset + target.length <= tables.size, 'a range within the volume')
    const pieces = readPieces(spec, tables, this.members.contiguous, offset, target.length)
    await settled(
      pieces.map((piece) => {
        const { slot, start, length } = piece
        if (slot !== 0) {
          // Not inline, whatever the gate says: who copies a volume should leave this thread to its clients.
          return this.members.readInPool(slot, piece.offset, target.subarray(start, start + length))
        }
        target.fill(spec.fill, start, start + length)
        return undefined
      }),
    )
  }

  async sync(): Promise<void> {
    this.#checkOpen()
    await this.members.sync()
  }

  /** Node has no call that punches holes. */
  async punch(_slot: number, _count: number): Promise<boolean> {
    return false
  }

  barrier(): Promise<void> {
    return this.members.epochs.barrier()
  }

  // ------------------------------------------------------------------------------------------- others

  exportCounters(id: ExportId): ExportCounters {
    return { ...this.#export(id).counts }
  }

  memberCounters(): readonly MemberCounters[] {
    return this.members.counters()
  }

  close(): Promise<void> {
    this.#closing ??= this.#closeAll()
    return this.#closing
  }

  async #closeAll(): Promise<void> {
    await Promise.all([...this.#exports.keys()].map((id) => this.closeExport(id)))
    this.#closed = true
    await this.barrier()
  }

  async #drain(exported: PortableExport): Promise<void> {
    if (exported.connections.size > 0) {
      await new Promise<void>((resolve) => {
        exported.onEmpty = resolve
        for (const connection of exported.connections) connection.end('closed')
      })
    }
    if (exported.adopted > 0) {
      await new Promise<void>((resolve) => {
        exported.onAdoptedEmpty = resolve
      })
    }
    exported.drained = true
    await this.barrier()
    this.#exports.delete(exported.id)
  }

  #dispatch(): void {
    this.#dispatchPlanned = false
    for (const exported of this.#exports.values()) {
      if (exported.upcalls.length === 0) continue
      const batch = exported.upcalls
      exported.upcalls = []
      exported.handler.onUpcalls(batch)
    }
  }

  /** Joins stripes that follow each other both in the source and on the member into one write. */
  #joinWrite(writes: StripeWrite[], next: StripeWrite): void {
    const last = writes.at(-1)
    const follows =
      last !== undefined &&
      this.members.contiguous &&
      last.source === next.source &&
      last.start + last.length === next.start &&
      last.slot + last.length / this.members.stripeSize === next.slot
    if (follows) last.length += next.length
    else writes.push(next)
  }

  #export(id: ExportId): PortableExport {
    const exported = this.#exports.get(id)
    assert(exported !== undefined, `export ${id} is not open`)
    return exported
  }

  #pending(upcall: number): PendingRequest | AdoptedPending {
    const pending = this.#upcalls.get(upcall)
    assert(pending !== undefined, `upcall ${upcall} is not outstanding`)
    return pending
  }

  #take(upcall: number): PendingRequest | AdoptedPending {
    const pending = this.#pending(upcall)
    assert(pending.uses === 0, `upcall ${upcall} is completed while its payload is being written`)
    this.#upcalls.delete(upcall)
    return pending
  }

  #zeroStripe(): Buffer {
    this.#zeros ??= Buffer.alloc(this.members.stripeSize)
    return this.#zeros
  }

  #checkOpen(): void {
    if (this.#closed) throw shuttingDown('the datapath is closed')
  }
}

interface StripeWrite {
  readonly slot: number
  readonly source: Buffer
  readonly start: number // bytes into the source
  length: number
}

/** Waits for all, then fails with the first failure: nothing still uses a buffer when this is over. */
async function settled(all: readonly (Promise<void> | undefined)[]): Promise<void> {
  const results = await Promise.allSettled(all)
  for (const result of results) if (result.status === 'rejected') throw result.reason
}

function checkTables(spec: ExportSpec, tables: ExportTables): void {
  assert(Number.isSafeInteger(tables.size) && tables.size > 0, 'export size')
  const stripes = Math.ceil(tables.size / spec.stripeSize)
  assert(tables.slots.length >= stripes, 'slots table')
  assert(tables.direct.length * 32 >= stripes, 'direct bitmap')
  assert(tables.init.length * 32 >= Math.ceil(stripes / spec.formatUnit), 'init bitmap')
}

function shuttingDown(message: string): StoreError {
  return new StoreError('SHUTTING_DOWN', message)
}
