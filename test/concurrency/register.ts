/**
 * Whether the accesses to one register (a sector) can have happened one after another: each at some moment between its
 * begin and its end, every read returning what the last write before it wrote. This is linearizability; a register at a time
 * is enough, because a history is linearizable where it is for each register by itself.
 *
 * The search takes accesses in order of their moments. One may come next if it began before the first end among those that
 * are left. Wrong turns are taken back; a state that was in vain once (which accesses are taken, what the register holds) is
 * not tried again. Where few accesses overlap, wrong turns are short and the time is close to linear.
 *
 * An access whose answer never came, because its client or the server died, may have happened or not.
 */
export interface Access {
  readonly kind: 'read' | 'write'
  readonly value: number
  readonly begin: number // logical time; all times of a history differ
  readonly end: number
  readonly lost: boolean // unanswered: `end` is the moment from which on it cannot happen any more
  readonly label: string // for messages
}

export type Verdict = 'possible' | 'impossible' | 'undecided'

/** States that one search may remember. Far more than any real history takes. */
const STATES_MAX = 2_000_000

export function judge(initial: number, accesses: readonly Access[]): Verdict {
  const count = accesses.length
  if (count === 0) return 'possible'
  // Entry 2i + 1 is the begin of access i, 2i + 2 its end, 0 the head of a list of what is left, in order of time.
  const times = accesses.flatMap((access, i) => [
    { entry: 2 * i + 1, time: access.begin },
    { entry: 2 * i + 2, time: access.end },
  ])
  times.sort((a, b) => a.time - b.time)
  const next = new Int32Array(2 * count + 1).fill(-1)
  const previous = new Int32Array(2 * count + 1).fill(-1)
  let tail = 0
  for (const { entry } of times) {
    next[tail] = entry
    previous[entry] = tail
    tail = entry
  }
  const take = (entry: number): void => {
    const before = previous[entry] ?? 0
    const after = next[entry] ?? -1
    next[before] = after
    if (after >= 0) previous[after] = before
  }
  const putBack = (entry: number): void => {
    next[previous[entry] ?? 0] = entry
    const after = next[entry] ?? -1
    if (after >= 0) previous[after] = entry
  }

  const failed = new Set<number>()
  const taken: { entry: number; before: number }[] = [] // moves so far, and what the register held before each
  let low = 0
  let high = 0 // together a hash of the set of accesses that were taken
  const flip = (access: number): void => {
    low ^= mix(access * 2 + 1)
    high ^= mix(access * 2 + 0x40000001)
  }
  let value = initial
  let entry = next[0] ?? -1
  while (entry >= 0) {
    const index = (entry - 1) >> 1
    const access = accesses[index]
    if (access === undefined) throw new Error('no such access')
    const isBegin = entry % 2 === 1
    const fits = isBegin ? access.kind === 'write' || access.value === value : access.lost
    if (fits) {
      const before = value
      if (isBegin && access.kind === 'write') value = access.value
      flip(index)
      const state = ((high ^ mix(value | 0) ^ Math.floor(value / 2 ** 32)) & 0x1fffff) * 2 ** 32 + (low >>> 0)
      if (!failed.has(state)) {
        if (failed.size >= STATES_MAX) return 'undecided'
        failed.add(state)
        taken.push({ entry, before })
        take(2 * index + 1)
        take(2 * index + 2)
        entry = next[0] ?? -1
        continue
      }
      flip(index)
      value = before
    }
    if (isBegin) {
      entry = next[entry] ?? -1
      continue
    }
    // Nothing later may come before this end: the last move was wrong, and what follows it in the list is next to try.
    for (;;) {
      const move = taken.pop()
      if (move === undefined) return 'impossible'
      const moved = (move.entry - 1) >> 1
      putBack(2 * moved + 2)
      putBack(2 * moved + 1)
      flip(moved)
      value = move.before
      if (move.entry % 2 === 0) continue // leaving an unanswered access out was the last thing to try there
      entry = next[move.entry] ?? -1
      break
    }
  }
  return 'possible'
}

/**
 * The smallest part of an impossible history that is impossible too, in order of time: cut off behind the first moment at
 * which it cannot be saved, then without every read, and without every write nobody reads, that makes no difference.
 */
export function smallestWindow(initial: number, accesses: readonly Access[]): readonly Access[] {
  let short = accesses
  const ends = accesses.map(({ end }) => end).sort((a, b) => a - b)
  let from = 0
  let to = ends.length - 1
  while (from < to) {
    const middle = (from + to) >> 1
    if (judge(initial, until(accesses, ends[middle] ?? 0)) === 'impossible') to = middle
    else from = middle + 1
  }
  const cut = until(accesses, ends[from] ?? 0)
  if (judge(initial, cut) === 'impossible') short = cut
  for (let step = short.length >> 1; step >= 1; step >>= 1) {
    for (let at = 0; at < short.length; ) {
      const gone = short.slice(at, at + step)
      const rest = [...short.slice(0, at), ...short.slice(at + step)]
      const read = new Set(rest.filter(({ kind }) => kind === 'read').map(({ value }) => value))
      // A write that is read cannot be left out: its readers would be impossible for want of it.
      const harmless = gone.every(({ kind, value }) => kind === 'read' || !read.has(value))
      if (harmless && judge(initial, rest) === 'impossible') short = rest
      else at += step
    }
  }
  return [...short].sort((a, b) => a.begin - b.begin)
}

/** What was known at a moment: reads under way are left out, writes under way may have happened. */
function until(accesses: readonly Access[], moment: number): readonly Access[] {
  return accesses
    .filter(({ begin, end, kind }) => begin < moment && (end <= moment || kind === 'write'))
    .map((access) => (access.end <= moment ? access : { ...access, lost: true }))
}

/** A hash of 32 bits (the finisher of MurmurHash3). */
function mix(value: number): number {
  let x = value | 0
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b)
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35)
  return x ^ (x >>> 16)
}
