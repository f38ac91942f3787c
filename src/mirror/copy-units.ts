/** Copy units, by number, that something is known of. */
export interface CopyUnits {
  readonly size: number
  has(unit: number): boolean
  keys(): Iterable<number>
}

/** The copy units that a range of bytes touches. */
export function unitsOf(offset: number, length: number, unitBytes: number): [first: number, last: number] {
  return [Math.floor(offset / unitBytes), Math.floor((offset + length - 1) / unitBytes)]
}

/** Whether one of [first, last] is among them. */
export function hasOneOf(units: CopyUnits, first: number, last: number): boolean {
  if (units.size <= last - first) {
    for (const unit of units.keys()) if (unit >= first && unit <= last) return true
    return false
  }
  for (let unit = first; unit <= last; unit++) if (units.has(unit)) return true
  return false
}
