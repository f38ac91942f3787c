import { describe, expect, it } from 'vitest'
import { BufferPool } from '../../src/datapath/buffer-pool.ts'
import { ByteBudget } from '../../src/datapath/byte-budget.ts'

describe('buffer pool', () => {
  it('hands out at least what was asked for, and hands it out again', () => {
    const pool = new BufferPool()
    for (const size of [1, 4096, 4112, 4608, 4609, 8192, 65_536 + 32, 1_000_000, 2 ** 21]) {
      const buffer = pool.take(size)
      expect(buffer.length).toBeGreaterThanOrEqual(size)
      expect(buffer.length).toBeLessThanOrEqual(2 * size + 4608)
      pool.give(buffer)
      expect(pool.take(size)).toBe(buffer)
    }
  })

  it('keeps a bounded number of bytes, and nothing large', () => {
    const pool = new BufferPool()
    pool.give(pool.take(32 * 2 ** 20))
    expect(pool.idleBytes).toBe(0)
    const buffers = Array.from({ length: 100 }, () => pool.take(2 ** 20))
    for (const buffer of buffers) pool.give(buffer)
    expect(pool.idleBytes).toBeGreaterThan(8 * 2 ** 20)
    expect(pool.idleBytes).toBeLessThanOrEqual(16 * 2 ** 20)
  })

  it('refuses a buffer that is none of its own', () => {
    expect(() => new BufferPool().give(Buffer.alloc(5000))).toThrow('another origin')
  })
})

describe('byte budget', () => {
  it('admits up to its limit', () => {
    const budget = new ByteBudget(100)
    budget.hold(60)
    expect(budget.admits(40)).toBe(true)
    expect(budget.admits(41)).toBe(false)
    budget.release(60)
    expect(budget.held).toBe(0)
    expect(() => budget.release(1)).toThrow('more bytes released')
  })
})
