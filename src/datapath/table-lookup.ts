import { assert } from '../base/assert.ts'
import type { ExportSpec, ExportTables } from './datapath.ts'

/**
 * Answers from the tables of an export: where the bytes of a range are. Loads are atomic and in the order that
 * datapath.ts promises to the policy: the init bit first, the slot after it, each stripe by itself.
 */

/** A run of a range that is in one place. Runs of one slot each, except where slots follow each other on one member. */
export interface Piece {
  slot: number // 0 = unformatted
  offset: number // bytes into the slot
  start: number // bytes into the range
  length: number // bytes
}

type Geometry = Pick<ExportSpec, 'stripeSize' | 'formatUnit'>

/** Every stripe of [offset, offset + length) as the init bits and slots have it; neighbours are joined. */
export function readPieces(
  spec: Geometry,
  tables: ExportTables,
  contiguous: boolean,
  offset: number,
  length: number,
): Piece[] {
  const { stripeSize, formatUnit } = spec
  const pieces: Piece[] = []
  let last: Piece | undefined
  let stripe = Math.floor(offset / stripeSize)
  let within = offset - stripe * stripeSize
  for (let start = 0; start < length; stripe++) {
    const part = Math.min(length - start, stripeSize - within)
    const unit = formatUnit === 1 ? stripe : Math.floor(stripe / formatUnit)
    const slot = bit(tables.init, unit) ? slotOf(tables, stripe) : 0
    if (last !== undefined && joins(last, slot, stripeSize, contiguous)) last.length += part
    else {
      last = { slot, offset: within, start, length: part }
      pieces.push(last)
    }
    start += part
    within = 0
  }
  return pieces
}

/** Where an in-place write goes; undefined when any direct bit is 0 and the policy has to decide. */
export function directPieces(
  spec: Geometry,
  tables: ExportTables,
  contiguous: boolean,
  offset: number,
  length: number,
): Piece[] | undefined {
  const { stripeSize } = spec
  const pieces: Piece[] = []
  let last: Piece | undefined
  let stripe = Math.floor(offset / stripeSize)
  let within = offset - stripe * stripeSize
  for (let start = 0; start < length; stripe++) {
    if (!bit(tables.direct, stripe)) return undefined
    const part = Math.min(length - start, stripeSize - within)
    const slot = slotOf(tables, stripe)
    if (last !== undefined && joins(last, slot, stripeSize, contiguous)) last.length += part
    else {
      last = { slot, offset: within, start, length: part }
      pieces.push(last)
    }
    start += part
    within = 0
  }
  return pieces
}

/** Whether `slot` continues `last`, which reaches to the end of a stripe. */
function joins(last: Piece, slot: number, stripeSize: number, contiguous: boolean): boolean {
  if (slot === 0 || last.slot === 0) return slot === last.slot
  return contiguous && slot === last.slot + (last.offset + last.length) / stripeSize
}

function bit(words: Uint32Array, index: number): boolean {
  return ((Atomics.load(words, Math.floor(index / 32)) >>> (index & 31)) & 1) === 1
}

/** Bit first, slot second: whoever sees the bit sees the slot (datapath.ts, rule 1). */
function slotOf(tables: ExportTables, stripe: number): number {
  const slot = Atomics.load(tables.slots, stripe)
  assert(slot !== 0, `stripe ${stripe} is formatted and has no slot`)
  return slot
}
