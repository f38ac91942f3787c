import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { Backoff } from '../../src/link/backoff.ts'
import { LinkError } from '../../src/link/errors.ts'
import { RateLimit } from '../../src/link/rate-limit.ts'
import { ReceiveWindow, SendWindow } from '../../src/link/window.ts'
import { isPending } from '../support/poll.ts'
import { FakeClock } from './fake-clock.ts'

describe('a window', () => {
  it('bounds what is on its way, and never stops for good, whatever the sizes', () => {
    const size = 1000
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 1, max: size / 2 }), { minLength: 1, maxLength: 60 }),
        (lengths) => {
          const sender = new SendWindow(size)
          const receiver = new ReceiveWindow(size)
          for (const length of lengths) {
            // What was received is told only when it is worth it; there is still always room in the end.
            if (!sender.hasRoom(length)) {
              expect(receiver.isDue).toBe(true)
              sender.acknowledge(receiver.tell())
            }
            expect(sender.hasRoom(length)).toBe(true)
            sender.add(length)
            expect(sender.outstanding).toBeLessThanOrEqual(size)
            receiver.admit(length)
            receiver.receive(length)
            receiver.finish(length)
          }
        },
      ),
    )
  })

  it('counts on past 2^32', () => {
    const sender = new SendWindow(2 ** 30)
    const receiver = new ReceiveWindow(2 ** 30)
    for (let round = 0; round < 20; round++) {
      const length = 2 ** 29 + 1
      sender.add(length)
      receiver.receive(length)
      receiver.finish(length)
      expect(sender.acknowledge(receiver.tell())).toBe(true)
      expect(sender.outstanding).toBe(0)
    }
    expect(sender.sent).toBeGreaterThan(2 ** 33)
  })

  it('does not believe in more than was sent, and takes no more than was allowed', () => {
    const sender = new SendWindow(100)
    sender.add(10)
    expect(() => sender.acknowledge(11)).toThrow(LinkError)
    expect(sender.acknowledge(10)).toBe(true)
    expect(sender.acknowledge(10)).toBe(false)
    expect(() => sender.acknowledge(9)).toThrow(LinkError)
    const receiver = new ReceiveWindow(100)
    receiver.admit(150) // alone, whatever its size
    receiver.receive(150)
    expect(() => receiver.admit(1)).toThrow(LinkError)
  })

  it('keeps a reserve for others', () => {
    const sender = new SendWindow(100)
    sender.add(60)
    expect(sender.hasRoom(40)).toBe(true)
    expect(sender.hasRoom(20, 25)).toBe(false)
    expect(sender.hasRoom(15, 25)).toBe(true)
  })
})

describe('a rate limit', () => {
  /** How many bytes pass in `ms`, asked for in pieces of `piece`. */
  async function passed(limit: RateLimit, clock: FakeClock, ms: number, piece: number): Promise<number> {
    let bytes = 0
    let stop = false
    const taking = (async () => {
      while (!stop) {
        await limit.take(piece).granted
        bytes += piece
      }
    })()
    for (let step = 0; step < ms; step += 5) {
      clock.advance(5)
      for (let turn = 0; turn < 50; turn++) await null
    }
    stop = true
    limit.set(undefined)
    await taking
    return bytes - piece
  }

  it.each([1, 1000, 500_000])('holds over time, in pieces of %d bytes', async (piece) => {
    const clock = new FakeClock()
    const rate = piece === 1 ? 500 : 1_000_000
    const bytes = await passed(new RateLimit(rate, clock), clock, 10_000, piece)
    expect(bytes).toBeGreaterThan(rate * 10 * 0.95)
    expect(bytes).toBeLessThan(rate * 10 * 1.05 + piece + rate * 0.1)
  })

  it('can be changed while somebody waits', async () => {
    const clock = new FakeClock()
    const limit = new RateLimit(1000, clock)
    clock.advance(1000)
    await limit.take(1_000_000).granted
    const waiting = limit.take(1).granted
    clock.advance(500)
    expect(await isPending(waiting)).toBe(true)
    // At the old rate the debt would last for a quarter of an hour.
    limit.set(1_000_000)
    clock.advance(150)
    await waiting
    const next = limit.take(10_000_000).granted
    limit.set(undefined)
    await next
    await limit.take(1e12).granted
    expect(limit.rate).toBeUndefined()
    expect(clock.timers).toBe(0)
  })

  it('is not used up by those who give up', async () => {
    const clock = new FakeClock()
    const limit = new RateLimit(1000, clock)
    clock.advance(1000)
    await limit.take(1000).granted // and owes 900
    const given = [1, 2, 3].map(() => limit.take(1_000_000))
    const last = limit.take(10)
    for (const turn of given) turn.giveUp()
    await Promise.all(given.map(({ granted }) => granted))
    expect(await isPending(last.granted)).toBe(true)
    clock.advance(1000)
    await last.granted
    last.giveUp() // too late: it counts
    expect(clock.timers).toBe(0)
  })

  it('serves in the order of the calls', async () => {
    const clock = new FakeClock()
    const limit = new RateLimit(100, clock)
    const order: number[] = []
    const all = Promise.all([1, 2, 3, 4].map((index) => limit.take(50).granted.then(() => order.push(index))))
    for (let step = 0; step < 100; step++) {
      clock.advance(50)
      await null
    }
    await all
    expect(order).toEqual([1, 2, 3, 4])
  })
})

it('delays between attempts grow to a limit, differ, and begin anew', () => {
  let random = 0
  const backoff = new Backoff(100, 1000, () => random)
  expect([1, 2, 3, 4, 5, 6].map(() => backoff.next())).toEqual([50, 100, 200, 400, 500, 500])
  random = 0.999
  expect(backoff.next()).toBeGreaterThan(990)
  backoff.reset()
  expect(backoff.next()).toBeCloseTo(100, 0)
})
