import type { ExportHandler, ExportId, ExportSpec, ExportTables, Upcall } from './datapath.ts'
import type { PortableConnection } from './portable-connection.ts'

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
    fullStripeWrites: 0,
  }
  readonly connections = new Set<PortableConnection>()
  upcalls: Upcall[] = [] // the next batch
  closing: Promise<void> | null = null
  onEmpty: (() => void) | null = null // set while `closing` waits for the last connection

  constructor(id: ExportId, spec: ExportSpec, handler: ExportHandler) {
    this.id = id
    this.spec = spec
    this.handler = handler
    this.tables = spec.tables
  }
}
