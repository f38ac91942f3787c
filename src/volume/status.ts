import { LIMITS } from '../base/limits.ts'
import type { StatusExtent, StatusResult, Upcall } from '../datapath/datapath.ts'
import type { IntentMap } from '../metadata/intents.ts'
import type { PolicyVolume } from './policy.ts'
import type { VolumeTables } from './tables.ts'

/**
 * Block status of a volume (NBD specification, "Metadata querying").
 *
 *   base:allocation   formatted: 0 (data)
 *                     not formatted, fill 0: ZERO, and for a thin volume HOLE too
 *                     not formatted, other fill: 0; it is neither zero nor safe to skip
 *   fullstripe:init   bit 0: formatted
 */
export const CONTEXTS = [
  { id: 1, name: 'base:allocation' },
  { id: 2, name: 'fullstripe:init' },
] as const

const STATE_HOLE = 1
const STATE_ZERO = 2
const INIT_FORMATTED = 1
const FLAG_REQ_ONE = 1 << 3

export interface MapExtent {
  readonly offset: number // bytes
  readonly length: number // bytes
  readonly formatted: boolean
  /** Hot when the daemon was stopped out of order, and not acknowledged since. Absent: no. */
  readonly suspect?: true
}

/** Extents of [offset, offset + length): in order, no gaps, neighbours differ. */
export function* mapExtents(
  tables: VolumeTables,
  offset: number,
  length: number,
  intents?: IntentMap,
): Generator<MapExtent> {
  const { unitBytes } = tables
  const end = Math.min(offset + length, tables.size)
  for (let at = offset; at < end; ) {
    const unit = Math.floor(at / unitBytes)
    const formatted = tables.init.get(unit)
    const next = formatted ? tables.init.nextClear(unit) : tables.init.nextSet(unit)
    let stop = Math.min(end, next * unitBytes)
    let suspect = false
    if (intents !== undefined) {
      const region = intents.regionOf(unit)
      suspect = intents.isSuspect(region)
      const other = suspect ? intents.nextTrusted(region) : intents.nextSuspect(region)
      stop = Math.min(stop, other * intents.regionUnits * unitBytes)
    }
    yield { offset: at, length: stop - at, formatted, ...(suspect ? { suspect } : {}) }
    at = stop
  }
}

/** A context that somebody else answers for: of a mirror, for instance. */
export interface ExtraContext {
  readonly id: number // on the wire; unique in the volume
  readonly name: string
  extents(offset: number, length: number): Iterable<StatusExtent>
}

export function statusOf(
  tables: VolumeTables,
  volume: PolicyVolume,
  upcall: Upcall,
  extra: readonly ExtraContext[],
): StatusResult[] {
  return upcall.contexts.map((context) => {
    const extents: StatusExtent[] = []
    const most = (upcall.flags & FLAG_REQ_ONE) !== 0 ? 1 : LIMITS.blockStatusExtentsMax
    let last: { length: number; flags: number } | undefined
    const other = extra.find(({ id }) => id === context)
    for (const extent of other?.extents(upcall.offset, upcall.length) ??
      ownExtents(tables, volume, upcall, context)) {
      const { flags } = extent
      if (last !== undefined && last.flags === flags) {
        last.length += extent.length
      } else {
        if (extents.length === most) break
        last = { length: extent.length, flags }
        extents.push(last)
      }
    }
    return { context, extents }
  })
}

function* ownExtents(
  tables: VolumeTables,
  volume: PolicyVolume,
  { offset, length }: Upcall,
  context: number,
): Generator<StatusExtent> {
  for (const extent of mapExtents(tables, offset, length)) {
    const flags =
      context === CONTEXTS[1].id ? (extent.formatted ? INIT_FORMATTED : 0) : allocation(extent, volume)
    yield { length: extent.length, flags }
  }
}

function allocation(extent: MapExtent, volume: PolicyVolume): number {
  if (extent.formatted || volume.fill !== 0) return 0
  return volume.provision === 'thin' ? STATE_HOLE | STATE_ZERO : STATE_ZERO
}
