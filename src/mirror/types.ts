/** What people see of mirrors and say to them; the control API and the command line use nothing else of this directory's insides. */
import type { MirrorState } from './state.ts'

export type MirrorMode = 'sync' | 'async'
export type MirrorInit = 'realized' | 'signature' | 'full'
export type OnLoss = 'continue' | 'block'

export interface MirrorAddOptions {
  readonly volume: string
  /** HOST:PORT of a daemon's link, or the URI of an NBD export. */
  readonly peer: string
  /** Unique in its volume; default: the peer's name. */
  readonly name?: string
  /** The volume's name there; default: the same. Not for an NBD export. */
  readonly target?: string
  readonly mode?: MirrorMode // default: async
  readonly init?: MirrorInit // default: realized
  readonly intervalMs?: number // async: from the close of one cycle to that of the next, at least; default 5000
  readonly onLoss?: OnLoss // sync; default: continue
  readonly rate?: number | null // bytes a second that copying may take; null: no limit
}

export interface MirrorChange {
  readonly mode?: MirrorMode
  readonly intervalMs?: number
  readonly onLoss?: OnLoss
  readonly rate?: number | null
}

/** Work that ends: an initial copy, a resync, a cycle, a comparison. */
export interface MirrorProgress {
  readonly what: 'comparing' | 'copying' | 'cycle' | 'verifying'
  readonly done: number // bytes
  readonly total: number // bytes
  readonly speed: number // bytes a second, now
  readonly remainingMs: number | null // null: not known
}

export interface MirrorLag {
  readonly bytes: number // that the secondary lacks
  readonly seconds: number | null // how old its image is; 0 in sync, null where it has none
}

/** What either side of a relation knows of itself, for `show` and for whoever settles a split brain. */
export interface MirrorSide {
  readonly role: 'primary' | 'secondary'
  readonly generation: string
  readonly history: readonly string[]
  readonly changed: number // bytes changed since the generation that both had
  readonly consistent: boolean
  readonly size: number // bytes of the volume
}

export interface VerifyDifference {
  readonly offset: number // bytes
  readonly length: number // bytes
}

export interface VerifyResult {
  readonly started: string // ISO 8601
  readonly ended: string | null // null: it is running
  readonly compared: number // bytes
  readonly differences: readonly VerifyDifference[]
  readonly differing: number // bytes; more than `differences` shows where there are very many
  readonly repaired: boolean
  readonly failure: string | null
}

export interface MirrorCounters {
  readonly sentBytes: number // of content, on the wire
  readonly wireBytes: number // all bytes written to the link for this mirror's session
  readonly units: number // copy units sent with content
  readonly holes: number // copy units sent as holes
  readonly signatures: number // regions compared
  readonly cycles: number // committed
  readonly saves: number // units saved for the sender before they were overwritten
  readonly forwarded: number // requests that went to both sides at once
  readonly laneWrites: number // of these, without a decision on either side
}

export interface MirrorInfo {
  readonly volume: string
  readonly name: string
  readonly relation: string // uuid
  readonly role: 'primary' | 'secondary'
  readonly kind: 'link' | 'nbd'
  readonly peer: string // name of the peer, or its URI
  readonly address: string | null // that this side dials
  readonly target: string // name of the volume on the other side
  readonly mode: MirrorMode
  readonly init: MirrorInit
  readonly intervalMs: number
  readonly onLoss: OnLoss
  readonly rate: number | null
  readonly state: MirrorState
  readonly reason: string | null // why it is in that state, where that is not plain
  readonly since: string // ISO 8601, of the state
  readonly connected: boolean
  readonly consistent: boolean // the secondary is a point in time of the primary
  readonly pointInTime: boolean // false for an async mirror to an NBD export
  readonly unitBytes: number // of a copy unit
  readonly lag: MirrorLag
  readonly cycle: number
  readonly progress: MirrorProgress | null
  readonly counters: MirrorCounters
  readonly local: MirrorSide
  readonly remote: MirrorSide | null // as far as it was told
  readonly verify: VerifyResult | null
}

/** Where the copy bitmap of a mirror is 1; extents in order, the last may be cut by the end of what was asked for. */
export interface CopyExtent {
  readonly offset: number // bytes
  readonly length: number // bytes
  readonly copied: boolean // false: the secondary still lacks it
}

/** All mirrors of a daemon. Every method @throws UserError */
/** Another daemon that this one has met. */
export interface PeerInfo {
  readonly name: string // HOST:PORT where this side dials
  readonly fingerprint: string // of the identity that is pinned
  readonly connected: boolean
  readonly mirrors: readonly string[] // VOLUME/MIRROR whose other side it has
}

export interface PeerControl {
  /** By name. @throws UserError */
  list(): Promise<readonly PeerInfo[]>
  /**
   * Whoever comes next under that name is taken for it, by its mirrors, too.
   * @returns what was known @throws UserError NOT_FOUND, BUSY while it is connected
   */
  forget(name: string): Promise<PeerInfo>
}

export interface MirrorControl {
  readonly peers: PeerControl
  list(): readonly MirrorInfo[]
  /** @param name where the volume has only one mirror, it may be absent */
  show(volume: string, name?: string): MirrorInfo
  /** Connects, agrees with the peer, makes the volume there; resolves when the mirror is stored on both sides. Copying goes on by itself. */
  add(options: MirrorAddOptions): Promise<MirrorInfo>
  change(volume: string, name: string | undefined, change: MirrorChange): Promise<MirrorInfo>
  pause(volume: string, name?: string): Promise<MirrorInfo>
  resume(volume: string, name?: string): Promise<MirrorInfo>
  /** Ends the relation, on the other side too where it can be reached; contents stay as they are. */
  remove(volume: string, name?: string): Promise<void>
  /** This side becomes the primary: refused while the other one is, or while it has no consistent content, unless forced. */
  promote(volume: string, name?: string, options?: { force?: boolean }): Promise<MirrorInfo>
  /** This side becomes the secondary, after the other one has everything. Refused while clients are connected, or without a connection. */
  demote(volume: string, name?: string, options?: { force?: boolean }): Promise<MirrorInfo>
  /** Settles a split brain: that side's changes since the common generation are thrown away. */
  resolve(volume: string, name: string | undefined, discard: 'local' | 'remote'): Promise<MirrorInfo>
  /** Begins a comparison; `show` tells how it goes. */
  verify(volume: string, name: string | undefined, options?: { repair?: boolean }): Promise<MirrorInfo>
  copyExtents(volume: string, name: string, offset: number, length: number): Iterable<CopyExtent>
  /** The share (0..1) of each of `cells` equal parts that the secondary lacks, for a picture. */
  copyDensity(volume: string, name: string, cells: number): Float64Array
}
