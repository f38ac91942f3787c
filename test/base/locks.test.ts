import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Mutex, UnitLocks } from '../../src/base/locks.ts'

/** Lets every continuation that is ready run. */
const settle = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

describe('UnitLocks', () => {
  it('grants shared holders together and an exclusive one alone', async () => {
    const locks = new UnitLocks()
    expect(locks.tryShared(7)).toBe(true)
    expect(locks.tryShared(7)).toBe(true)
    expect(locks.tryExclusive(7)).toBe(false)
    expect(locks.tryExclusive(8)).toBe(true) // another key
    expect(locks.tryShared(8)).toBe(false)
    locks.release(7)
    expect(locks.tryExclusive(7)).toBe(false)
    locks.release(7)
    expect(locks.tryExclusive(7)).toBe(true)
    locks.release(7)
    locks.release(8)
    expect(locks.heldCount).toBe(0)
  })

  it('grants in the order of asking, a run of shared ones together', async () => {
    const locks = new UnitLocks()
    const granted: string[] = []
    const ask = (name: string, exclusive: boolean): void => {
      const promise = exclusive ? locks.exclusive(1) : locks.shared(1)
      promise.then(() => granted.push(name))
    }
    ask('s1', false)
    ask('x1', true)
    ask('s2', false)
    ask('s3', false)
    ask('x2', true)
    ask('s4', false)
    await settle()
    expect(granted).toEqual(['s1'])
    locks.release(1)
    await settle()
    expect(granted).toEqual(['s1', 'x1'])
    locks.release(1)
    await settle()
    expect(granted).toEqual(['s1', 'x1', 's2', 's3'])
    locks.release(1)
    await settle()
    expect(granted).toHaveLength(4) // s3 still holds
    locks.release(1)
    await settle()
    expect(granted).toEqual(['s1', 'x1', 's2', 's3', 'x2'])
    locks.release(1)
    await settle()
    expect(granted.at(-1)).toBe('s4')
    locks.release(1)
    expect(locks.heldCount).toBe(0)
  })

  it('a shared holder does not overtake a waiting exclusive one', async () => {
    const locks = new UnitLocks()
    locks.tryShared(1)
    const exclusive = locks.exclusive(1)
    expect(locks.tryShared(1)).toBe(false)
    locks.release(1)
    await exclusive
    // Between release and the continuation nobody slipped in.
    expect(locks.tryShared(1)).toBe(false)
    expect(locks.tryExclusive(1)).toBe(false)
    locks.release(1)
    expect(locks.tryExclusive(1)).toBe(true)
  })

  it('asserts that what is released is held', () => {
    const locks = new UnitLocks()
    expect(() => locks.release(3)).toThrow('not held')
    locks.tryShared(3)
    locks.release(3)
    expect(() => locks.release(3)).toThrow('not held')
  })

  it('keeps readers and writers apart, starves nobody and ends idle under any interleaving', async () => {
    const task = fc.record({ key: fc.integer({ min: 0, max: 2 }), exclusive: fc.boolean(), turns: fc.nat(3) })
    await fc.assert(
      fc.asyncProperty(fc.array(task, { maxLength: 25 }), async (tasks) => {
        const locks = new UnitLocks()
        const inside = new Map<number, { shared: number; exclusive: number }>()
        let finished = 0
        await Promise.all(
          tasks.map(async ({ key, exclusive, turns }) => {
            for (let i = 0; i < turns; i++) await Promise.resolve()
            await (exclusive ? locks.exclusive(key) : locks.shared(key))
            const now = inside.get(key) ?? { shared: 0, exclusive: 0 }
            inside.set(key, now)
            if (exclusive) now.exclusive++
            else now.shared++
            for (let i = 0; i <= turns; i++) {
              expect(now.exclusive === 0 || (now.exclusive === 1 && now.shared === 0)).toBe(true)
              await Promise.resolve()
            }
            if (exclusive) now.exclusive--
            else now.shared--
            locks.release(key)
            finished++
          }),
        )
        expect(finished).toBe(tasks.length)
        expect(locks.heldCount).toBe(0)
      }),
    )
  })
})

describe('Mutex', () => {
  it('runs one at a time, in order, and goes on after an error', async () => {
    const mutex = new Mutex()
    const trace: string[] = []
    const action = (name: string, fail = false) =>
      mutex.run(async () => {
        trace.push(`${name} in`)
        await settle()
        trace.push(`${name} out`)
        if (fail) throw new Error(`${name} failed`)
        return name
      })
    const results = await Promise.allSettled([action('a'), action('b', true), action('c')])
    expect(trace).toEqual(['a in', 'a out', 'b in', 'b out', 'c in', 'c out'])
    expect(results.map((result) => result.status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
    expect(mutex.locked).toBe(false)
  })

  it('frees itself when the action throws before its first await', async () => {
    const mutex = new Mutex()
    const fail = (): never => {
      throw new Error('at once')
    }
    await expect(mutex.run(fail)).rejects.toThrow('at once')
    expect(await mutex.run(() => 5)).toBe(5)
  })
})
