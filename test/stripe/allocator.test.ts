import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { SlotAllocator } from '../../src/stripe/allocator.ts'

const range = (first: number, count: number): number[] => Array.from({ length: count }, (_, i) => first + i)

describe('allocate', () => {
  it('never hands out slot 0, gives ascending slots to a sequential fill, and undefined when full', () => {
    const allocator = new SlotAllocator(101)
    const got = range(0, 100).map(() => allocator.allocate(1)?.[0])
    expect(got).toEqual(range(1, 100))
    expect(allocator.allocate(1)).toBeUndefined()
    expect(allocator).toMatchObject({ usedCount: 100, freeCount: 0, reservedCount: 0 })
    allocator.free(50, 1)
    expect(allocator.allocate(2)).toBeUndefined()
    expect(allocator.usedCount).toBe(99) // nothing was taken
    expect(allocator.allocate(1)).toEqual([50])
    allocator.checkInvariants()
  })

  it('gives contiguous slots to a format unit, skipping holes that are too small', () => {
    const allocator = new SlotAllocator(101)
    allocator.allocate(10)
    allocator.free(2, 3)
    allocator.free(7, 1)
    expect(allocator.allocate(4)).toEqual(range(11, 4))
    expect(allocator.allocate(2)).toEqual(range(2, 2)) // more than an eighth is free: holes first
    allocator.checkInvariants()
  })

  it('gives scattered slots when no run is left', () => {
    const allocator = new SlotAllocator(101)
    allocator.allocate(100)
    for (let slot = 10; slot <= 90; slot += 20) allocator.free(slot, 1)
    expect(allocator.allocate(3)).toHaveLength(3)
    expect(allocator.allocate(3)).toBeUndefined()
    expect(allocator.allocate(2)).toHaveLength(2)
    expect(allocator.freeCount).toBe(0)
    allocator.checkInvariants()
  })

  it('goes on above what is in use while less than an eighth is free below, else below', () => {
    const allocator = new SlotAllocator(10_000)
    allocator.allocate(1000)
    allocator.free(1, 100)
    expect(allocator.allocate(1)).toEqual([1001])
    allocator.free(101, 50)
    expect(allocator.allocate(1)).toEqual([1])
    expect(allocator.allocate(1)).toEqual([2])
    allocator.checkInvariants()
  })

  it('keeps within a seventh more than the content under endless trims and writes', () => {
    const allocator = new SlotAllocator(100_000)
    const used: number[] = []
    let random = 12345
    let highest = 0
    for (let step = 0; step < 40_000; step++) {
      for (const slot of allocator.allocate(1) ?? []) {
        highest = Math.max(highest, slot)
        used.push(slot)
      }
      if (used.length <= 1000) continue
      random = (random * 1_103_515_245 + 12_345) % 2 ** 31
      const [slot] = used.splice(random % used.length, 1)
      if (slot !== undefined) allocator.free(slot, 1)
    }
    expect(highest).toBeLessThan(1001 * (8 / 7) + 10)
    allocator.checkInvariants()
  })

  it('goes on above the content of a pool that was just opened', () => {
    const allocator = new SlotAllocator(1000)
    expect(allocator.markUsed(1, 100, 'thin')).toBe(true)
    expect(allocator.markUsed(102, 99, 'thin')).toBe(true)
    expect(allocator.allocate(1)).toEqual([201])
    allocator.checkInvariants()
  })
})

describe('reserveRun', () => {
  it('cuts runs from the top, and allocate stays clear of them', () => {
    const allocator = new SlotAllocator(101)
    expect(allocator.reserveRun(30)).toBe(71)
    expect(allocator.reserveRun(30)).toBe(41)
    expect(allocator).toMatchObject({ usedCount: 0, reservedCount: 60, freeCount: 40 })
    expect(allocator.allocate(41)).toBeUndefined()
    expect(allocator.allocate(40)).toEqual(range(1, 40))
    expect(allocator.allocate(1)).toBeUndefined()
    expect(allocator.reserveRun(1)).toBeUndefined()
    allocator.unreserve(41, 30)
    expect(allocator.allocate(1)).toEqual([41])
    expect(allocator.reserveRun(30)).toBeUndefined() // 29 are left in a row
    expect(allocator.reserveRun(29)).toBe(42)
    allocator.checkInvariants()
  })

  it.each([1, 2, 20])('allocation passes over a run of %d in its way, and counts right', (count) => {
    const allocator = new SlotAllocator(101)
    expect(allocator.reserve(50, count)).toBe(true)
    expect(allocator.allocate(48)).toEqual(range(1, 48))
    expect(allocator.allocate(1)).toEqual([49])
    allocator.checkInvariants()
    expect(allocator.allocate(3)).toEqual(range(50 + count, 3))
    allocator.checkInvariants()
    allocator.unreserve(50, count)
    allocator.checkInvariants()
    expect(allocator.allocate(allocator.freeCount)).toBeDefined()
    expect(allocator.freeCount).toBe(0)
    allocator.checkInvariants()
  })

  it('uses a gap between other runs', () => {
    const allocator = new SlotAllocator(101)
    const first = allocator.reserveRun(20)
    const second = allocator.reserveRun(20)
    allocator.reserveRun(60)
    expect([first, second, allocator.freeCount]).toEqual([81, 61, 0])
    allocator.unreserve(61, 20)
    expect(allocator.reserveRun(21)).toBeUndefined()
    expect(allocator.reserveRun(20)).toBe(61)
    allocator.checkInvariants()
  })

  it('finds a run below the content when nothing above is left', () => {
    const allocator = new SlotAllocator(1001)
    allocator.allocate(1000)
    allocator.free(100, 50)
    allocator.free(300, 70)
    allocator.free(500, 69)
    expect(allocator.reserveRun(70)).toBe(300)
    expect(allocator.reserveRun(70)).toBeUndefined()
    expect(allocator.reserveRun(50)).toBe(519)
    allocator.checkInvariants()
  })

  it('part of a run can be given back, but not while it is used', () => {
    const allocator = new SlotAllocator(101)
    expect(allocator.reserveRun(40)).toBe(61)
    expect(allocator.markUsed(61, 10, 'thick')).toBe(true)
    expect(() => allocator.unreserve(70, 31)).toThrow('still used')
    allocator.unreserve(71, 30)
    expect(allocator).toMatchObject({ usedCount: 10, reservedCount: 10, freeCount: 90 })
    allocator.free(61, 10) // trimmed: stays reserved
    expect(allocator).toMatchObject({ usedCount: 0, reservedCount: 10, freeCount: 90 })
    expect(allocator.isReserved(61)).toBe(true)
    allocator.unreserve(61, 10)
    expect(() => allocator.unreserve(61, 10)).toThrow('not reserved')
    allocator.checkInvariants()
  })
})

describe('loading', () => {
  it.each([
    [0, 1],
    [101, 1],
    [100, 2],
    [-1, 1],
    [1.5, 1],
    [5, 0],
    [2 ** 32, 1],
  ])('refuses slots %d+%d, which do not exist', (first, count) => {
    const allocator = new SlotAllocator(101)
    expect(allocator.markUsed(first, count, 'thin')).toBe(false)
    expect(allocator.markUsed(first, count, 'thick')).toBe(false)
    expect(allocator.reserve(first, count)).toBe(false)
    allocator.checkInvariants()
  })

  it('refuses double use in every combination, and changes nothing then', () => {
    const allocator = new SlotAllocator(101)
    expect(allocator.reserve(50, 20)).toBe(true)
    expect(allocator.markUsed(10, 5, 'thin')).toBe(true)
    expect(allocator.markUsed(55, 5, 'thick')).toBe(true)
    expect(allocator.markUsed(14, 1, 'thin')).toBe(false)
    expect(allocator.markUsed(8, 5, 'thin')).toBe(false)
    expect(allocator.markUsed(59, 1, 'thick')).toBe(false)
    expect(allocator.markUsed(50, 7, 'thick')).toBe(false)
    expect(allocator.markUsed(50, 1, 'thin')).toBe(false) // a thick volume's
    expect(allocator.markUsed(45, 10, 'thin')).toBe(false)
    expect(allocator.markUsed(20, 1, 'thick')).toBe(false) // not reserved
    expect(allocator.markUsed(68, 3, 'thick')).toBe(false) // reaches out of the run
    expect(allocator.reserve(69, 5)).toBe(false)
    expect(allocator.reserve(5, 10)).toBe(false)
    expect(allocator).toMatchObject({ usedCount: 10, reservedCount: 20, freeCount: 75 })
    allocator.checkInvariants()
  })

  it('marks a table and names the entry that another one has already', () => {
    const allocator = new SlotAllocator(101)
    expect(allocator.markTable(Uint32Array.of(0, 7, 0, 8, 3), 'thin')).toBe(-1)
    expect(allocator.usedCount).toBe(3)
    expect(allocator.markTable(Uint32Array.of(0, 9, 3, 10), 'thin')).toBe(2)
    expect(allocator.markTable(Uint32Array.of(0, 200), 'thin')).toBe(1)
    allocator.checkInvariants()
  })

  it('asserts against freeing twice', () => {
    const allocator = new SlotAllocator(101)
    allocator.allocate(3)
    allocator.free(2, 1)
    expect(() => allocator.free(2, 1)).toThrow('freed twice')
    expect(() => allocator.free(1, 3)).toThrow('freed twice')
    expect(() => allocator.free(0, 1)).toThrow('slots to free')
    expect(() => allocator.free(101, 1)).toThrow('slots to free')
    expect(() => allocator.isUsed(0)).toThrow('slot number')
    expect(() => allocator.allocate(0)).toThrow('slots to allocate')
    expect(() => new SlotAllocator(1)).toThrow('at least one slot')
  })
})

describe('any sequence of operations', () => {
  const operation = fc.oneof(
    fc.record({ what: fc.constant('allocate' as const), count: fc.integer({ min: 1, max: 20 }) }),
    fc.record({ what: fc.constant('free' as const), count: fc.nat(1000) }),
    fc.record({ what: fc.constant('reserve' as const), count: fc.integer({ min: 1, max: 60 }) }),
    fc.record({ what: fc.constant('format' as const), count: fc.nat(1000) }),
    fc.record({ what: fc.constant('unreserve' as const), count: fc.nat(1000) }),
    fc.record({ what: fc.constant('markUsed' as const), count: fc.integer({ min: 1, max: 299 }) }),
  )

  it('hands every slot to one owner at a time, all of them in the end', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 300 }),
        fc.array(operation, { maxLength: 150 }),
        (slots, operations) => {
          const allocator = new SlotAllocator(slots)
          const thin = new Set<number>()
          const runs: { first: number; count: number; used: Set<number> }[] = []
          const owned = (slot: number): boolean =>
            thin.has(slot) || runs.some((run) => slot >= run.first && slot < run.first + run.count)
          const free = (): number => range(1, slots - 1).filter((slot) => !owned(slot)).length
          const give = (given: readonly number[]): void => {
            for (const slot of given) {
              expect(slot > 0 && slot < slots && !owned(slot)).toBe(true)
              thin.add(slot)
            }
          }
          for (const { what, count } of operations) {
            if (what === 'allocate') {
              const got = allocator.allocate(count)
              expect(got === undefined).toBe(free() < count)
              if (got !== undefined) give(got)
            } else if (what === 'markUsed') {
              const possible = count < slots && !owned(count)
              expect(allocator.markUsed(count, 1, 'thin')).toBe(possible)
              if (possible) thin.add(count)
            } else if (what === 'free') {
              const slot = [...thin][count % Math.max(1, thin.size)]
              if (slot === undefined) continue
              allocator.free(slot, 1)
              thin.delete(slot)
            } else if (what === 'reserve') {
              const first = allocator.reserveRun(count)
              const possible = range(1, slots - 1).some(
                (at) => at + count <= slots && range(at, count).every((slot) => !owned(slot)),
              )
              expect(first !== undefined).toBe(possible)
              if (first === undefined) continue
              expect(range(first, count).some(owned) || first < 1 || first + count > slots).toBe(false)
              runs.push({ first, count, used: new Set() })
            } else {
              const run = runs[count % Math.max(1, runs.length)]
              if (run === undefined) continue
              if (what === 'format') {
                const slot = run.first + (count % run.count)
                expect(allocator.markUsed(slot, 1, 'thick')).toBe(!run.used.has(slot))
                run.used.add(slot)
              } else {
                for (const slot of run.used) allocator.free(slot, 1)
                allocator.unreserve(run.first, run.count)
                runs.splice(runs.indexOf(run), 1)
              }
            }
            allocator.checkInvariants()
            const reserved = runs.reduce((sum, run) => sum + run.count, 0)
            const used = thin.size + runs.reduce((sum, run) => sum + run.used.size, 0)
            expect(allocator).toMatchObject({ usedCount: used, reservedCount: reserved, freeCount: free() })
          }
          const rest = free()
          if (rest > 0) give(allocator.allocate(rest) ?? [])
          expect(free()).toBe(0)
          expect(allocator.allocate(1)).toBeUndefined()
        },
      ),
      { numRuns: 150 },
    )
  })
})

describe('large pools', () => {
  // Scans where there should be none would take minutes here: the deadline of a test is what notices them.

  it('reserves 268 million slots (16 TiB) at once, costing no memory', () => {
    const before = process.memoryUsage.rss()
    const allocator = new SlotAllocator(2 ** 32 - 1)
    expect(allocator.reserveRun(2 ** 28)).toBe(2 ** 32 - 1 - 2 ** 28)
    expect(allocator.reserveRun(2 ** 31)).toBeDefined()
    expect(allocator.allocate(16)).toEqual(range(1, 16))
    allocator.unreserve(2 ** 32 - 1 - 2 ** 28, 2 ** 28)
    expect(process.memoryUsage.rss() - before).toBeLessThan(48 * 2 ** 20)
  })

  it('finds a long run in a map of 268 million slots that is full of small holes', () => {
    const slots = 2 ** 28
    const allocator = new SlotAllocator(slots)
    expect(allocator.markUsed(1, slots - 1, 'thin')).toBe(true)
    for (let slot = 1000; slot + 500 < slots; slot += 997) {
      if (slot + 500 <= 20_000_000 || slot >= 20_100_000) allocator.free(slot, 500)
    }
    allocator.free(20_000_000, 100_000)
    expect(allocator.reserveRun(100_000)).toBeDefined()
    expect(allocator.reserveRun(100_000)).toBeUndefined()
  })

  it('allocates at once from a map of 268 million slots that is nearly full', () => {
    const slots = 2 ** 28
    const allocator = new SlotAllocator(slots)
    allocator.markUsed(1, slots - 1, 'thin')
    for (let i = 0; i < 20_000; i++) {
      const slot = 1 + ((i * 7_919_777) % (slots - 1))
      allocator.free(slot, 1)
      expect(allocator.allocate(1)).toEqual([slot])
    }
  })

  it('marks 16 million slots of a table at load', () => {
    const allocator = new SlotAllocator(2 ** 29)
    const table = new Uint32Array(2 ** 24)
    for (let i = 0; i < table.length; i++) table[i] = 1 + ((i * 13) % 2 ** 24)
    expect(allocator.markTable(table, 'thin')).toBe(-1)
    expect(allocator.usedCount).toBe(2 ** 24)
  })
})
