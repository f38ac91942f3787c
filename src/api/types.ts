/** What the control API answers, as TypeScript sees it; schemas.ts says the same to validators and to OpenAPI. */
import type { DaemonState } from '../daemon/daemon.ts'
import type { EventRecord } from '../daemon/events.ts'
import type { DatapathDescription, MemberCounters } from '../datapath/datapath.ts'
import type { CopyExtent, MirrorAddOptions, MirrorChange, MirrorInfo, PeerInfo } from '../mirror/types.ts'
import type { PoolInfo } from '../volume/pool.ts'
import type { MapExtent, VolumeInfo } from '../volume/volume.ts'

export interface StatusInfo {
  readonly state: DaemonState
  readonly version: string
  readonly pid: number
  readonly started: string // ISO
  readonly now: string // ISO; with the counters, what rates are computed from
  readonly memory: number // bytes resident
  readonly listen: readonly string[] // NBD URIs, ports as bound
  readonly link: string | null // HOST:PORT for other daemons, the port as bound; null: none can connect
  readonly sessions: number
  readonly datapath: DatapathDescription
  readonly pool: PoolInfo
  readonly members: readonly MemberCounters[]
  readonly volumes: readonly VolumeInfo[]
  readonly mirrors: readonly MirrorInfo[]
  readonly nextEvent: number
}

export interface MapPage {
  readonly name: string
  readonly size: number
  readonly offset: number // of the first extent
  readonly extents: readonly MapExtent[]
  readonly next: number | null // where the next page starts; null after the last
}

export interface DensityInfo {
  readonly name: string
  readonly size: number
  readonly cells: readonly number[] // formatted share, 0..1, of equal parts
}

export interface MirrorList {
  readonly mirrors: readonly MirrorInfo[]
}

export interface PeerList {
  readonly peers: readonly PeerInfo[]
}

export interface CopyMapPage {
  readonly volume: string
  readonly name: string // of the mirror
  readonly size: number // of the volume
  readonly offset: number // of the first extent
  readonly extents: readonly CopyExtent[]
  readonly next: number | null // where the next page starts; null after the last
}

export interface CopyDensityInfo {
  readonly volume: string
  readonly name: string
  readonly size: number
  readonly cells: readonly number[] // share that the secondary lacks, 0..1, of equal parts
}

export interface EventList {
  readonly events: readonly EventRecord[]
  readonly missed: number
  readonly next: number
}

export interface ErrorBody {
  readonly error: { readonly code: string; readonly message: string }
}

export interface VolumeCreateBody {
  readonly name: string
  readonly size: number // bytes
  readonly provision?: 'thin' | 'thick'
  readonly formatUnit?: number // stripes
  readonly fill?: number // 0..255
  readonly readOnly?: boolean
  readonly intents?: boolean
  readonly regionSize?: number // bytes
}
/** What is absent stays as it is. */
export interface VolumeChangeBody {
  readonly name?: string
  readonly intents?: boolean
  readonly regionSize?: number // bytes; where intents are switched on
}
export interface ResizeBody {
  readonly size: number
  readonly force?: boolean
}
export interface FormatBody {
  readonly rate?: number | null // bytes per second; null: no limit
}

export type MirrorAddBody = Omit<MirrorAddOptions, 'volume'>
/** What is absent stays as it is. */
export type MirrorChangeBody = MirrorChange
export interface MirrorForceBody {
  readonly force?: boolean
}
export interface MirrorVerifyBody {
  readonly repair?: boolean
}
export interface MirrorResolveBody {
  readonly discard: 'local' | 'remote'
}
