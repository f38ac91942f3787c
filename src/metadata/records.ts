/**
 * The catalog's records, as JSON in LMDB. Fields are only ever added; a reader fills in what an older
 * writer did not know. What an older program must not overlook raises METADATA_VERSION; a pool of an older version gets the
 * present one when it is opened to be served.
 *
 *   1   volumes, map and init pages
 *   2   intents: pages of hot and suspect regions, records of both in the journal
 */
export const METADATA_VERSION = 2

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
}

/** Regions that may be changed are announced on disk (intents.ts). */
export interface IntentsRecord {
  readonly regionUnits: number // format units of one region; a power of two
  readonly needs: readonly string[] // who asked for it
  /** Unclean stops whose hot regions nobody has acknowledged yet, and when the first of them was noticed (ISO 8601). */
  readonly stops: number
  readonly since: string | null
}

/** Entries of a map page (a slot each, u32), bits of an init page, bits of a page of regions. */
export const MAP_PAGE_ENTRIES = 2048
export const INIT_PAGE_BITS = 32768
export const REGION_PAGE_BITS = 32768

export type PageKind = 'map' | 'init' | 'hot' | 'suspect'

/** One page of a medium's tables; `bytes` undefined means all zero, so it is not stored. */
export interface MetadataPage {
  readonly medium: number
  readonly kind: PageKind
  readonly index: number
  readonly bytes: Buffer | undefined
}
