import type { ExportHandler, ExportId, ExportSpec, ExportTables, Upcall } from './datapath.ts'
import type { PortableConnection } from './portable-connection.ts'

/** A request without a client (`adopt`); `connection` tells it from a PendingRequest. */
export interface AdoptedPending {
  readonly connection: null
  readonly export: PortableExport
  readonly request: { readonly offset: number } // bytes
  readonly length: number // bytes
  readonly payload: Buffer | null // the adopter's; exactly `length` bytes of a write
  readonly kind: 'write' | 'trim' | 'zero'
  uses: number // member accesses that use the payload now
}

/** What an export counts; the writable form of ExportCounters. */
export interface ExportCounts {
  reads: number
  readBytes: number
  writes: number
  writeBytes: number
  flushes: number
  trims: number
  zeroes: number
  errors: number
  upcalls: number
  inPlaceWrites: number
  laneWrites: number
  laneBytes: number
  fullStripeWrites: number
}

/** One open export: what the policy gave, who is connected, what waits to be told to the policy. */
export class PortableExport {
  readonly id: ExportId
  readonly spec: ExportSpec
  readonly handler: ExportHandler
  tables: ExportTables // in use from now on; those of `spec` until the first retable
  readonly counts: ExportCounts = {
    reads: 0,
    readBytes: 0,
    writes: 0,
    writeBytes: 0,
    flushes: 0,
    trims: 0,
    zeroes: 0,
    errors: 0,
    upcalls: 0,
    inPlaceWrites: 0,
    laneWrites: 0,
    laneBytes: 0,
    fullStripeWrites: 0,
  }
  readonly connections = new Set<PortableConnection>()
  upcalls: Upcall[] = [] // the next batch
  closing: Promise<void> | null = null
  onEmpty: (() => void) | null = null // set while `closing` waits for the last connection
  adopted = 0 // that are not completed
  onAdoptedEmpty: (() => void) | null = null // set while `closing` waits for the last adopted one
  drained = false // closing, and nobody is left to answer: no readRange begins any more

  constructor(id: ExportId, spec: ExportSpec, handler: ExportHandler) {
    this.id = id
    this.spec = spec
    this.handler = handler
    this.tables = spec.tables
  }
}
