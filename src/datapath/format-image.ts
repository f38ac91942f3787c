import { assert } from '../base/assert.ts'

/**
 * Works out what a full-stripe write of one format unit has to store, stripe by stripe, before a byte moves.
 *
 *   content of a stripe = what lies under it, then each overlay in order, each clipped to the stripe
 *
 * A stripe that the last overlay to touch it covers whole is written straight from that overlay's payload: no copy.
 * Otherwise its image is put together in a scratch buffer, from the last overlay that covers it whole, or else from
 * what lies under it; and what lies under it is read only if some of it stays visible.
 *
 * Bytes of a stripe past the end of the volume (the last stripe may be cut) count as covered by nobody: they are
 * stored as fill, so a volume that grows finds them formatted.
 */
export interface Overlay {
  readonly offset: number // bytes into the unit; may be negative, may reach past the unit's end
  readonly length: number // bytes
  readonly payload: Buffer | null // null = zeros
}

export interface StripePlan {
  /** The one overlay this stripe is written from without a copy. */
  readonly direct: Overlay | null
  /** Overlays to lay into the scratch image, in order; the first covers the stripe whole if `base` is 'covered'. */
  readonly overlays: readonly Overlay[]
  /** What the scratch image starts as. */
  readonly base: 'covered' | 'slot' | 'fill'
}

/** @param start bytes into the unit */
export function planStripe(
  overlays: readonly Overlay[],
  start: number,
  stripeSize: number,
  baseSlot: number,
): StripePlan {
  const end = start + stripeSize
  const touching = overlays.filter((each) => each.offset < end && each.offset + each.length > start)
  const whole = touching.findLastIndex((each) => each.offset <= start && each.offset + each.length >= end)
  const last = touching.at(-1)
  if (last !== undefined && whole === touching.length - 1)
    return { direct: last, overlays: [], base: 'covered' }
  if (whole >= 0) return { direct: null, overlays: touching.slice(whole), base: 'covered' }
  if (covers(touching, start, end)) return { direct: null, overlays: touching, base: 'covered' }
  return { direct: null, overlays: touching, base: baseSlot === 0 ? 'fill' : 'slot' }
}

/** Lays `overlays` over the scratch image of the stripe at `start`. */
export function overlayStripe(image: Buffer, overlays: readonly Overlay[], start: number): void {
  for (const { offset, length, payload } of overlays) {
    const from = Math.max(offset, start)
    const to = Math.min(offset + length, start + image.length)
    assert(from < to, 'an overlay that does not touch its stripe')
    if (payload === null) image.fill(0, from - start, to - start)
    else payload.copy(image, from - start, from - offset, to - offset)
  }
}

/** Whether the overlays together leave nothing of [start, end) visible. */
function covers(overlays: readonly Overlay[], start: number, end: number): boolean {
  const sorted = [...overlays].sort((a, b) => a.offset - b.offset)
  let covered = start
  for (const { offset, length } of sorted) {
    if (offset > covered) return false
    covered = Math.max(covered, offset + length)
  }
  return covered >= end
}
