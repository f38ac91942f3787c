/**
 * The catalog's records, as JSON in LMDB. Fields are only ever added; a reader fills in what an older
 * writer did not know. What changes the meaning of existing fields raises METADATA_VERSION.
 */
export const METADATA_VERSION = 1

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
}

/** Entries of a map page (a slot each, u32) and bits of an init page. */
export const MAP_PAGE_ENTRIES = 2048
export const INIT_PAGE_BITS = 32768

export type PageKind = 'map' | 'init'

/** One page of a medium's tables; `bytes` undefined means all zero, so it is not stored. */
export interface MetadataPage {
  readonly medium: number
  readonly kind: PageKind
  readonly index: number
  readonly bytes: Buffer | undefined
}
