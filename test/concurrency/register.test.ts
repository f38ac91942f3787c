import { describe, expect, it } from 'vitest'
import { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import { History } from './history.ts'
import { type Access, judge, smallestWindow } from './register.ts'

/** The judge is judged: against all orders tried one by one, and on histories that one can follow by hand. */
describe('judging the accesses to one register', () => {
  it.each([
    ['reads of the initial value', 0, [read(0, 1, 2), read(0, 3, 4)], 'possible'],
    ['a read of what nobody wrote', 0, [read(7, 1, 2)], 'impossible'],
    ['a read from before a write that ended', 0, [write(1, 1, 2), read(0, 3, 4)], 'impossible'],
    ['either value next to a write', 0, [write(1, 1, 6), read(0, 2, 3), read(1, 4, 5)], 'possible'],
    ['a step back next to a write', 0, [write(1, 1, 6), read(1, 2, 3), read(0, 4, 5)], 'impossible'],
    ['either order of two writes', 0, [write(1, 1, 4), write(2, 2, 3), read(1, 5, 6)], 'possible'],
    [
      'one order, then the other',
      0,
      [write(1, 1, 4), write(2, 2, 3), read(1, 5, 6), read(2, 7, 8)],
      'impossible',
    ],
    ['forth, back and forth', 0, [write(1, 1, 9), write(2, 2, 10), ...[1, 2, 1].map(during)], 'impossible'],
    [
      'zeros twice over',
      5,
      [write(0, 1, 9), write(1, 2, 10), write(0, 3, 11), ...[0, 1, 0].map(during)],
      'possible',
    ],
    ['an unanswered write that happened', 0, [lost(1, 1, 3), read(1, 4, 5)], 'possible'],
    ['an unanswered write that did not', 0, [lost(1, 1, 3), read(0, 4, 5)], 'possible'],
    ['one that happened, and did not', 0, [lost(1, 1, 3), read(1, 4, 5), read(0, 6, 7)], 'impossible'],
    ['one that came too late', 0, [lost(1, 1, 3), read(0, 4, 5), read(1, 6, 7)], 'impossible'],
  ] as const)('%s', (_, initial, accesses, verdict) => {
    expect(judge(initial, accesses)).toBe(verdict)
  })

  it('agrees with trying every order', () => {
    const verdicts = { possible: 0, impossible: 0, undecided: 0 }
    for (let seed = 1; seed <= 3000; seed++) {
      const accesses = randomHistory(new Random(seed))
      const verdict = judge(0, accesses)
      expect(verdict, `seed ${seed}`).toBe(bruteForce(0, accesses) ? 'possible' : 'impossible')
      verdicts[verdict]++
    }
    expect(Math.min(verdicts.possible, verdicts.impossible)).toBeGreaterThan(500)
  })

  it('cuts an impossible history down to what contradicts itself', () => {
    const before = Array.from({ length: 200 }, (_, i) => [
      write(i + 10, 4 * i, 4 * i + 1),
      read(i + 10, 4 * i + 2, 4 * i + 3),
    ])
    const wrong = [write(1, 1000, 1001), write(2, 1002, 1003), read(1, 1004, 1005), read(2, 1006, 1007)]
    const window = smallestWindow(0, [...before.flat(), ...wrong])
    expect(window.map(({ kind, value }) => `${kind} ${value}`)).toEqual(['write 1', 'write 2', 'read 1'])
  })

  it('takes time in proportion to the length of a history', () => {
    const random = new Random(3)
    const accesses: Access[] = []
    for (let at = 0; at < 20_000; at += 20) {
      // Ten writes at once, of which the last to end is read.
      for (let k = 0; k < 10; k++)
        accesses.push(write(random.below(2 ** 30) + 1, at + k / 20, at + 10 + k / 20))
      accesses.push(read(accesses[accesses.length - 1]?.value ?? 0, at + 11, at + 12))
    }
    expect(judge(0, accesses)).toBe('possible')
  })
})

describe('the history of a volume', () => {
  it('finds a lost write, says where, and names the requests', () => {
    const history = new History(8 * SECTOR, 'disk')
    const first = history.write(0, 4 * SECTOR)
    first.answered()
    const second = history.write(2 * SECTOR, 2 * SECTOR)
    second.answered()
    history.read(0, 4 * SECTOR).answered(first.data)
    expect(history.check()).toMatch(/^disk: sector 2 .*\n.*write \d+\n.*write \d+\n.*read returned \d+$/)
  })

  it('finds what belongs to another sector, or another volume', () => {
    const history = new History(8 * SECTOR, 'disk')
    const write = history.write(0, 2 * SECTOR)
    write.answered()
    history.read(0, SECTOR).answered(write.data.subarray(SECTOR))
    expect(history.check()).toMatch(/sector 0 holds what was written to sector 1/)
    const other = new History(8 * SECTOR, 'other')
    other.read(0, SECTOR).answered(write.data.subarray(0, SECTOR))
    expect(other.check()).toMatch(/sector 0 .*\n.*read returned \d+$/)
  })

  it('permits a mixture of what is written at that moment, and of nothing else', () => {
    for (const late of [false, true]) {
      const history = new History(SECTOR, 'disk', 0xaa)
      const write = history.write(0, SECTOR)
      if (late) write.answered()
      const read = history.read(0, SECTOR)
      read.answered(Buffer.concat([write.data.subarray(0, 264), Buffer.alloc(248, 0xaa)]))
      if (!late) write.answered()
      expect(history.check() === undefined).toBe(!late)
    }
  })

  it('goes on over a death: what was unanswered may have happened by then, not later', () => {
    const history = new History(SECTOR, 'disk')
    const before = history.write(0, SECTOR)
    before.answered()
    const lostOne = history.write(0, SECTOR)
    history.cutOff()
    history.read(0, SECTOR).answered(before.data)
    expect(history.check()).toBeUndefined()
    history.read(0, SECTOR).answered(lostOne.data)
    expect(history.check()).toMatch(/unanswered/)
  })

  it('starts again from what it settled on', () => {
    const history = new History(2 * SECTOR, 'disk')
    const write = history.write(0, 2 * SECTOR)
    write.answered()
    expect(history.settle(write.data)).toBeUndefined()
    expect(history.settle(write.data)).toBeUndefined()
    expect(history.settle(Buffer.alloc(2 * SECTOR))).toMatch(/which held \d+/)
  })
})

function write(value: number, begin: number, end: number): Access {
  return { kind: 'write', value, begin, end, lost: false, label: `write ${value}` }
}
function lost(value: number, begin: number, end: number): Access {
  return { ...write(value, begin, end), lost: true }
}
function read(value: number, begin: number, end: number): Access {
  return { kind: 'read', value, begin, end, lost: false, label: 'read' }
}
/** Reads one after the other, between the moments 5 and 9. */
function during(value: number, index: number): Access {
  return read(value, 5 + index, 5.5 + index)
}

/** Up to seven accesses of few values, some of them unanswered. */
function randomHistory(random: Random): Access[] {
  const count = 2 + random.below(6)
  const times = Array.from({ length: 2 * count }, (_, i) => i)
  for (let i = times.length - 1; i > 0; i--) {
    // Begins and ends are mixed, but mostly near each other.
    const j = Math.max(0, i - random.below(6))
    const [a, b] = [times[i] ?? 0, times[j] ?? 0]
    times[i] = b
    times[j] = a
  }
  return Array.from({ length: count }, (_, i) => {
    const [a, b] = [times[2 * i] ?? 0, times[2 * i + 1] ?? 0]
    const value = random.below(4)
    const make = random.below(2) === 0 ? read : random.below(4) === 0 ? lost : write
    return make(value, Math.min(a, b), Math.max(a, b))
  })
}

function bruteForce(value: number, left: readonly Access[]): boolean {
  if (left.length === 0) return true
  const firstEnd = Math.min(...left.map(({ end }) => end))
  return left.some((access) => {
    const rest = left.filter((other) => other !== access)
    if (access.lost && bruteForce(value, rest)) return true
    if (access.begin > firstEnd) return false
    if (access.kind === 'read') return access.value === value && bruteForce(value, rest)
    return bruteForce(access.value, rest)
  })
}
