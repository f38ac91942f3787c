import { Bitmap } from '../base/bitmap.ts'
import { LIMITS } from '../base/limits.ts'
import type { Remote } from './remote.ts'
import { type Range, regionsAtOnce, sameSignature, signaturesOf } from './signatures.ts'
import type { MirrorInit } from './types.ts'

/**
 * Finds the copy units that differ (DESIGN section 5, "Initialising a remote mirror"). Clients go on writing: a unit that changes while
 * this runs is noted by the mirror's bitmap, which was watching before this began, so only what stays unchanged has to be judged right here.
 *
 *   realized here only    differs: sent unseen             realized there only    differs: reclaimed by a hole
 *   on both sides         the region's signatures decide   on neither             the same
 */
export interface Comparison {
  readonly remote: Pick<Remote, 'bitmap' | 'signatures'>
  readonly init: MirrorInit
  readonly unitBytes: number
  readonly size: number // bytes of the volume
  readonly blank: boolean // nothing is realized there
  isHole(offset: number, length: number): boolean
  /** Where the next formatted byte lies, at or after `offset`; the size where there is none. */
  nextRealized(offset: number): number
  read(offset: number, target: Buffer): Promise<void>
  onProgress(done: number, total: number): void
  onCompared(regions: number): void
  /** @throws to end it */
  check(): void
}

export async function compareSides(comparison: Comparison): Promise<Bitmap> {
  const { remote, init, unitBytes, size, blank } = comparison
  const units = Math.ceil(size / unitBytes)
  const differing = new Bitmap(units)
  const there = new Bitmap(blank ? 0 : units)
  if (!blank) for await (const { first, bytes } of remote.bitmap('realized')) take(there, first, bytes)
  const isThere = (unit: number): boolean => !blank && there.get(unit)
  const perRegion = Math.max(1, Math.floor(LIMITS.mirrorRegionBytes / unitBytes))
  const regions: number[] = [] // to be compared; their first units
  // The next unit that is realized on either side. Each is looked for again when it is passed: a long way, where little is realized.
  let here = -1
  let other = -1
  let looked = 0 // regions
  for (let region = 0; region < units; ) {
    // Stretches where nothing is realized on either side cost nothing.
    if (here < region) here = Math.floor(comparison.nextRealized(region * unitBytes) / unitBytes)
    if (other < region) other = blank ? units : there.nextSet(region, units)
    const next = Math.min(here, other)
    if (next >= units) break
    region = next - (next % perRegion)
    const end = Math.min(units, region + perRegion)
    let both = false
    for (let unit = region; unit < end; unit++) {
      const length = Math.min(unitBytes, size - unit * unitBytes)
      const realized = !comparison.isHole(unit * unitBytes, length)
      if (realized && isThere(unit)) both = true
      else if (realized !== isThere(unit) && init !== 'signature') differing.set(unit)
    }
    if (init === 'signature' || both) {
      if (init !== 'full') regions.push(region)
      else for (let unit = region; unit < end; unit++) if (isThere(unit)) differing.set(unit)
    }
    region = end
    if (++looked % 1024 === 0) await breathe()
  }
  comparison.onProgress(0, regions.length * perRegion * unitBytes)
  const atOnce = regionsAtOnce(perRegion * unitBytes)
  for (let at = 0; at < regions.length; at += atOnce) {
    comparison.check()
    const batch = regions.slice(at, at + atOnce)
    const ranges = batch.map((unit): Range => {
      const offset = unit * unitBytes
      return { offset, length: Math.min(perRegion * unitBytes, size - offset) }
    })
    const [theirs, ours] = await Promise.all([
      remote.signatures(ranges),
      signaturesOf(ranges, (offset, target) => comparison.read(offset, target)),
    ])
    batch.forEach((first, index) => {
      if (sameSignature(ours, theirs, index)) return
      for (let unit = first; unit < Math.min(units, first + perRegion); unit++) {
        const length = Math.min(unitBytes, size - unit * unitBytes)
        if (!comparison.isHole(unit * unitBytes, length) || isThere(unit)) differing.set(unit)
      }
    })
    comparison.onCompared(batch.length)
    comparison.onProgress((at + batch.length) * perRegion * unitBytes, regions.length * perRegion * unitBytes)
  }
  return differing
}

function take(bitmap: Bitmap, first: number, bytes: Buffer): void {
  for (let bit = 0; bit < bytes.length * 8; bit++) {
    if (((bytes[bit >> 3] ?? 0) >> (bit & 7)) % 2 === 1 && first + bit < bitmap.length)
      bitmap.set(first + bit)
  }
}

function breathe(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve))
}
