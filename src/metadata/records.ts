/**
 * The catalog's records, as JSON in LMDB. Fields are only ever added; a reader fills in what an older
 * writer did not know. What an older program must not overlook raises METADATA_VERSION; a pool of an older version gets the
 * present one when it is opened to be served.
 *
 *   1   volumes, map and init pages
 *   2   intents: pages of hot and suspect regions, records of both in the journal
 *   3   mirrors: their records, pages of copy units, records of these in the journal
 */
export const METADATA_VERSION = 3

export interface PoolRecord {
  readonly version: number
  readonly uuid: string
  readonly created: string // ISO 8601
  readonly chunkSize: number // bytes
  readonly dataMembers: number
  readonly parityMembers: number
  readonly dataOffset: number // bytes
  readonly slots: number // slot numbers are below this; slot 0 is never handed out
  readonly generation: number // of the superblocks
  readonly members: readonly string[] // paths; relative ones lie in the pool directory
}

/** A contiguous run of slots that a thick volume owns: stripes [stripe, stripe + count) live in [slot, slot + count). */
export interface SlotRun {
  readonly stripe: number
  readonly count: number
  readonly slot: number
}

export type Provision = 'thin' | 'thick'
export type FormatterState = 'idle' | 'running' | 'paused' | 'done'

/** What a client sees; names its anchor medium, where every write lands. */
export interface VolumeRecord {
  readonly id: number
  readonly name: string
  readonly uuid: string
  readonly created: string
  readonly medium: number
  readonly size: number // bytes
  readonly provision: Provision
  readonly formatUnit: number // stripes
  readonly fill: number // byte
  readonly readOnly: boolean
  readonly runs: readonly SlotRun[] // thick only
  readonly formatter: { readonly state: FormatterState; readonly rate: number | null }
  /** Absent where nobody needs intents. */
  readonly intents?: IntentsRecord | undefined
  /** Which states its content has been through, so that two copies of it can tell who is ahead; absent where it was never mirrored. */
  readonly generation?: GenerationRecord | undefined
  /** Id of the mirror whose primary writes this volume: clients only read. */
  readonly secondaryOf?: number | undefined
}

/** Uuids; the history is newest first, at most LIMITS.generationsKept. */
export interface GenerationRecord {
  readonly current: string
  readonly history: readonly string[]
}

export type MirrorRole = 'primary' | 'secondary'

/** One side of a relation between two volumes. */
export interface MirrorRecord {
  readonly id: number // of the same numbers as volumes; the medium of its copy pages
  readonly relation: string // uuid, the same on both sides
  readonly name: string // unique in its volume
  readonly volume: number // id
  readonly created: string // ISO 8601
  readonly role: MirrorRole
  readonly peer: { readonly name: string; readonly fingerprint: string | null; readonly volume: string }
  readonly address: string | null // HOST:PORT or an NBD URI that this side dials; null: the peer dials
  readonly kind: 'link' | 'nbd'
  readonly mode: 'sync' | 'async'
  readonly init: 'realized' | 'signature' | 'full'
  readonly intervalMs: number
  readonly onLoss: 'continue' | 'block'
  readonly rate: number | null // bytes a second
  readonly unitBytes: number // of a copy unit; never changes
  readonly paused: boolean
  readonly initialized: boolean // the secondary has been consistent once
  readonly base: string // generation that the copy bitmap counts from
  readonly cycle: number // last commit or session that both sides agreed on
  readonly clean: boolean // primary: false while the copy bitmap says nothing yet
}

/** Regions that may be changed are announced on disk (intents.ts). */
export interface IntentsRecord {
  readonly regionUnits: number // format units of one region; a power of two
  readonly needs: readonly string[] // who asked for it
  /** Unclean stops whose hot regions nobody has acknowledged yet, and when the first of them was noticed (ISO 8601). */
  readonly stops: number
  readonly since: string | null
}

/** Entries of a map page (a slot each, u32), bits of an init page, bits of a page of regions or copy units. */
export const MAP_PAGE_ENTRIES = 2048
export const INIT_PAGE_BITS = 32768
export const REGION_PAGE_BITS = 32768

export type PageKind = 'map' | 'init' | 'hot' | 'suspect' | 'copy'

/** One page of a medium's tables, or of a mirror's copy units; `bytes` undefined means all zero, so it is not stored. */
export interface MetadataPage {
  readonly medium: number
  readonly kind: PageKind
  readonly index: number
  readonly bytes: Buffer | undefined
}
