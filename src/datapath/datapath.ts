import type { Socket } from 'node:net'

/**
 * The datapath runs the NBD transmission phase: framing, in-place I/O, replies. It decides nothing. It sees
 * tables (slots, init bitmap, direct bitmap) that the volume policy owns and changes, and it asks the policy
 * (an *upcall*) about everything the tables do not answer.
 *
 *   read, init bit 1          member read of the slot
 *   read, init bit 0          the export's fill byte, no I/O (a hole in structured replies where fill is 0)
 *   write, all direct bits 1  in place; then answered, or with FUA an upcall `sync` that says "it is in place"
 *   write, otherwise          upcall `write`; the payload stays here, named by the upcall's id
 *   trim, write zeroes        upcall `trim`, `zero`
 *   flush                     upcall `sync`
 *   block status              upcall `status`
 *   cache                     read-ahead of what is in slots, answered here
 *
 * Two implementations pass one contract suite (test/contract): native (native/, C++) and portable (TypeScript).
 *
 * Concurrency rules, held by both:
 *  1. A request reads the init bit before the slot, with acquire order; the policy writes the slot before the bit.
 *  2. Direct bits are looked at when the bytes are about to be written, never earlier: a client that stalls
 *     in the middle of a payload holds nothing.
 *  3. `barrier()` resolves when every member access (in-place write, read, `readRange`) that began before the call has
 *     finished. An access that begins later sees every table change made before the call.
 *  4. Commands of one policy turn are submitted together, upcalls and completions arrive in batches.
 *  5. The payload of a write upcall stays as it is until `complete`, and that is not called while a command of the policy
 *     still uses it. An adopted one's belongs to who adopted it: nobody may change it until then.
 */

/** Where slots lie on the members. Chunk c (0..k-1) of slot s is on member (s + c) mod (k + p), parity chunk q on
 * member (s + k + q) mod (k + p), each at `dataOffset + s * chunkSize`. */
export interface StoreLayout {
  /** Open file descriptors, in member order; k + p of them. They stay the caller's to close, after `close()`. */
  readonly memberFds: readonly number[]
  readonly dataMembers: number // k
  readonly parityMembers: number // p; 0 in this release
  readonly chunkSize: number // bytes
  readonly dataOffset: number // bytes
}

/** The tables of one export; owned and written by the policy, read by the datapath. */
export interface ExportTables {
  readonly size: number // bytes; a multiple of 512; the last stripe may be cut short by it
  readonly slots: Uint32Array // stripe -> slot; 0 = none
  readonly init: Uint32Array // words of the init bitmap, one bit a format unit
  readonly direct: Uint32Array // words of the direct bitmap, one bit a stripe
}

export interface ExportSpec {
  readonly name: string // for messages
  readonly stripeSize: number // bytes; k * chunkSize
  readonly formatUnit: number // stripes an init bit stands for
  readonly fill: number // byte that unformatted stripes read as
  readonly tables: ExportTables
}

export type UpcallKind = 'write' | 'sync' | 'trim' | 'zero' | 'status'

export interface Upcall {
  readonly id: number // unique among the outstanding ones of this datapath
  readonly kind: UpcallKind
  readonly flags: number // NBD command flags as received (FUA, NO_HOLE, FAST_ZERO, REQ_ONE ...)
  readonly offset: number // bytes; offset + length <= size was checked
  readonly length: number // bytes; > 0 except for `sync` of a flush
  readonly contexts: readonly number[] // `status`: the wire ids asked for; else empty
  /** A write that was made here by a lane (Lanes), and is not known to be on the other side. It is to be made again. */
  readonly half?: boolean
  /** It came over a peer's lane. */
  readonly lane?: boolean
}

/** Wanted by one `status` upcall: extents from `offset` on, in order, without gaps. */
export interface StatusResult {
  readonly context: number // wire id
  readonly extents: readonly StatusExtent[]
}
export interface StatusExtent {
  readonly length: number // bytes
  readonly flags: number
}

/** What `adopt` takes instead of a client's request. */
export interface AdoptedRequest {
  readonly kind: 'write' | 'trim' | 'zero'
  readonly offset: number // bytes; offset + length <= size
  readonly length: number // bytes; > 0
  readonly payload?: Buffer | undefined // of a write, and of nothing else: `length` bytes
}

export interface ExportHandler {
  /** Called with every batch; each upcall must in the end be answered by `complete` or `completeStatus`, once. */
  onUpcalls(upcalls: readonly Upcall[]): void
}

export type ReplyMode = 'simple' | 'structured' | 'extended'

/** What negotiation hands over. */
export interface SessionSpec {
  readonly socket: Socket // plain TCP or unix socket; the datapath owns it from here on
  readonly received: Buffer // bytes of the transmission phase that were already read off the socket
  readonly mode: ReplyMode
  readonly contexts: readonly number[] // wire ids negotiated, empty where none were
  readonly readOnly: boolean
  /** The other end is a peer's lane: checksummed writes and nothing else, which may go in place where `Lanes.restrict` keeps others out. */
  readonly lane?: boolean
  readonly onClose: (reason: SessionEnd) => void // exactly once
}
export type SessionEnd = 'disconnect' | 'hangup' | 'protocol' | 'error' | 'closed'

export type ExportId = number
export type SessionId = number

/** Counters since the export (or for members, the datapath) was opened. All counts are requests or bytes. */
export interface ExportCounters {
  readonly reads: number
  readonly readBytes: number
  readonly writes: number
  readonly writeBytes: number
  readonly flushes: number
  readonly trims: number
  readonly zeroes: number
  readonly errors: number // requests answered with an error
  readonly upcalls: number
  readonly inPlaceWrites: number // write requests (or pieces) that needed no decision
  readonly laneWrites: number // of these, written on both sides of a mirror
  readonly laneBytes: number
  readonly fullStripeWrites: number // stripes written whole by `formatUnit`
}
export interface MemberCounters {
  readonly reads: number
  readonly readBytes: number
  readonly writes: number
  readonly writeBytes: number
  readonly syncs: number
}

export interface DatapathDescription {
  readonly kind: 'native' | 'portable'
  readonly engine: 'io_uring' | 'threads' | 'node'
  readonly threads: number
  readonly reason: string // why this one runs, a sentence for `status`
}

/** A full-stripe write of one format unit, or of several that follow each other; at most LIMITS.formatUnitBytesMax. */
export interface FormatUnit {
  readonly export: ExportId
  readonly stripe: number // the first stripe
  readonly slots: readonly number[] // where each stripe goes, in order
  /** What lies under: the fill byte where absent or 0, else the content of that slot (copy-on-write), a stripe each. */
  readonly baseSlots?: readonly number[]
  /** Upcalls laid over it in this order, each clipped to these stripes: `write` by its payload, `trim` and `zero` as zeros. */
  readonly overlays: readonly number[]
}

/**
 * Writes on both sides of a mirror without a decision (native/src/lane.h). A lane is a connection to the datapath of the peer, which
 * serves it as a session (`SessionSpec.lane`).
 *
 * Where an export forwards, a write whose direct bits are all 1 is made in place and on the lane at the same time, and answered
 * when both are done; barriers of the export (`Datapath.barrier`) wait for it, and no others do. Whatever is no case for a lane is an
 * upcall, as without direct bits. What is on a lane that ends becomes an upcall that says `half`.
 */
export interface Lanes {
  /** Lanes that an export has: one for each I/O thread. */
  readonly width: number
  /**
   * Takes `width` connected sockets without anything unread. `onEnd` is called once, when the first of them has ended, in the turn in
   * which upcalls of what was on its way arrive, and before these. They may be opened again when all have ended (`dropped`).
   */
  open(id: ExportId, sockets: readonly Socket[], onEnd: () => void): void
  /** Ends them. Resolves when all have: no more upcalls say `half`. */
  drop(id: ExportId): Promise<void>
  /** Whether the export's writes go on lanes, or to the policy; never in place alone. Only while no direct bit is set, after a barrier. */
  forward(id: ExportId, on: boolean): void
  /** Whether only sessions that are a peer's lanes write in place. Only while no direct bit is set, after a barrier. */
  restrict(id: ExportId, on: boolean): void
  /**
   * Keeps lanes out of what the policy is about to change on both sides, until `release` of the same range.
   * @returns whether a lane is there already: the policy waits for a barrier of the export
   */
  hold(id: ExportId, offset: number, length: number): boolean
  release(id: ExportId, offset: number, length: number): void
  /**
   * Whether a write in the range is on its way, of those that began before a barrier that was passed; perhaps also where it is
   * somewhere else.
   */
  busy(id: ExportId, offset: number, length: number): boolean
  /** Takes no more requests of a session; its `onClose` follows when those in flight are answered. */
  end(session: SessionId): void
}

export interface Datapath {
  readonly description: DatapathDescription
  /** Absent where it has none. */
  readonly lanes?: Lanes

  openExport(spec: ExportSpec, handler: ExportHandler): ExportId
  /** Switches to other tables (resize). Resolves when nothing uses the old ones; until then the caller keeps both up to date. */
  retable(id: ExportId, tables: ExportTables): Promise<void>
  /**
   * Ends the export's sessions (no more requests are read, those in flight are answered), waits for `complete` of what was
   * adopted and for every readRange, then forgets it.
   */
  closeExport(id: ExportId): Promise<void>

  serve(id: ExportId, session: SessionSpec): SessionId
  /** Sessions of an export that are still open, without lanes. */
  sessionCount(id: ExportId): number

  /** Answers an upcall: 0, or a number of the NBD errno table. Unknown to nobody: each id exactly once. */
  complete(upcall: number, errno: number): void
  completeStatus(upcall: number, results: readonly StatusResult[]): void

  /**
   * Stands in for a client: from here to `complete` the id is an upcall's, for the overlays of formatUnit, writePart and
   * readPayload. No handler is told and nothing is counted: whoever adopts hands the upcall to the policy, and bounds how much
   * is adopted at a time. `complete` frees it and sends nothing.
   * @throws StoreError SHUTTING_DOWN once the export is being closed
   */
  adopt(id: ExportId, request: AdoptedRequest): number
  /** Copies from the payload of a write upcall, now; `offset` counts in bytes from the upcall's own. */
  readPayload(upcall: number, offset: number, target: Buffer): void

  // Member access by the policy. Each rejects with a StoreError MEMBER_IO or NO_SPACE that names member and offset.
  formatUnit(request: FormatUnit): Promise<void>
  /** Writes the part of upcall `upcall` (its payload, or zeros for trim and zero) that lies in `stripe` to `slot`, in place. */
  writePart(upcall: number, stripe: number, slot: number): Promise<void>
  readSlot(slot: number, offset: number, target: Buffer): Promise<void>
  writeSlot(slot: number, offset: number, source: Buffer): Promise<void>
  /**
   * What a client would read: slots, or the fill byte where nothing is formatted; offset + target.length <= size. Tables are
   * looked at in this call, members are read off this thread. Writes in place that go on meanwhile show or do not, as for a
   * client. It may be called until the last request in flight and the last adopted one of a closing export are answered,
   * since their policy may need it. The caller bounds how many run.
   * @throws StoreError MEMBER_IO, SHUTTING_DOWN
   */
  readRange(id: ExportId, offset: number, target: Buffer): Promise<void>
  /** All completed member writes become durable. */
  sync(): Promise<void>
  /** Gives the space of free slots [slot, slot + count) back to the file system; false where that is not possible. */
  punch(slot: number, count: number): Promise<boolean>

  /**
   * Resolves when every member access that began before is over; upcalls of what could not be done in place have arrived by then.
   * @param lanesOf an export whose writes on lanes are over then, too: for as long as its peer may take
   */
  barrier(lanesOf?: ExportId): Promise<void>

  exportCounters(id: ExportId): ExportCounters
  memberCounters(): readonly MemberCounters[]

  /** Drains and closes all exports (see closeExport), stops all threads. Member descriptors are unused after it resolves. */
  close(): Promise<void>
}
