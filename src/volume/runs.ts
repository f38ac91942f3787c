import { CHANGE, type Change } from '../metadata/journal.ts'

/** Runs of consecutive units, stripes and slots, and the records that are made of them. */

/** Cuts an ascending list into runs of consecutive numbers, none longer than `max`. */
export function* consecutive(sorted: readonly number[], max = Number.POSITIVE_INFINITY): Generator<number[]> {
  let run: number[] = []
  for (const value of sorted) {
    if (run.length > 0 && (value !== (run[run.length - 1] ?? 0) + 1 || run.length >= max)) {
      yield run
      run = []
    }
    run.push(value)
  }
  if (run.length > 0) yield run
}

/** Consecutive stripes from `first` on, in `slots`, as runs of slots that are consecutive too. */
export function* slotRunsOf(
  first: number,
  slots: readonly number[],
): Generator<{ first: number; count: number; slot: number }> {
  for (let at = 0; at < slots.length; ) {
    const slot = slots[at] ?? 0
    let count = 1
    while (at + count < slots.length && slots[at + count] === slot + count) count++
    yield { first: first + at, count, slot }
    at += count
  }
}

/** That `units` units from `unit` on are formatted now, and that their stripes, from `first` on, are in `slots`. */
export function formatChanges(
  medium: number,
  first: number,
  slots: readonly number[],
  unit: number,
  units: number,
): Change[] {
  const changes: Change[] = []
  for (const run of slotRunsOf(first, slots)) changes.push({ op: CHANGE.slots, medium, ...run })
  changes.push({ op: CHANGE.formatted, medium, first: unit, count: units, slot: 0 })
  return changes
}
