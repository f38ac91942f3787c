import { describe, expect, it } from 'vitest'
import { EventLog, type EventPage } from '../../src/daemon/events.ts'
import type { PoolEvent } from '../../src/volume/pool.ts'
import { isPending, within } from '../support/poll.ts'

const event = (message: string): PoolEvent => ({
  time: '2026-01-01T00:00:00.000Z',
  level: 'info',
  kind: 'test.event',
  object: 'test',
  message,
})
const messages = (page: EventPage) => page.events.map((record) => record.message)

describe('the event log', () => {
  it('numbers events from 1 and hands out pages', () => {
    const log = new EventLog(10)
    for (const text of ['a', 'b', 'c', 'd', 'e']) log.append(event(text))
    expect(log.page(1, 2)).toMatchObject({ missed: 0, next: 3 })
    expect(messages(log.page(1, 2))).toEqual(['a', 'b'])
    expect(log.page(3, 100).events.map((record) => record.sequence)).toEqual([3, 4, 5])
    expect(log.page(6, 100)).toEqual({ events: [], missed: 0, next: 6 })
  })

  it('keeps the newest and says how many are gone', () => {
    const log = new EventLog(3)
    for (const text of ['a', 'b', 'c', 'd', 'e']) log.append(event(text))
    const page = log.page(1, 100)
    expect(messages(page)).toEqual(['c', 'd', 'e'])
    expect(page.missed).toBe(2)
    expect(log.page(2, 100).missed).toBe(1)
    expect(log.page(3, 100).missed).toBe(0)
  })

  it('takes a number that was never given for "what comes next"', () => {
    const log = new EventLog(3)
    log.append(event('a'))
    expect(log.page(500, 100)).toEqual({ events: [], missed: 0, next: 2 })
  })

  it('brings events to followers as they happen, in order, each once', async () => {
    const log = new EventLog(100)
    log.append(event('0'))
    const seen: string[] = []
    const followed = (async () => {
      for await (const page of log.follow(1, new AbortController().signal, 2)) seen.push(...messages(page))
    })()
    for (let number = 1; number < 20; number++) {
      log.append(event(String(number)))
      if (number % 3 === 0) await new Promise((resolve) => setImmediate(resolve))
    }
    log.close()
    await within(followed, 'the follower ends')
    expect(seen).toEqual(Array.from({ length: 20 }, (_, number) => String(number)))
  })

  it('tells a follower that fell behind what it missed, without keeping anything for it', async () => {
    const log = new EventLog(4)
    const pages = log.follow(1, new AbortController().signal)
    log.append(event('0'))
    expect(messages((await pages.next()).value as EventPage)).toEqual(['0'])
    for (let number = 1; number <= 10; number++) log.append(event(String(number)))
    const page = (await pages.next()).value as EventPage
    expect(page.missed).toBe(6)
    expect(messages(page)).toEqual(['7', '8', '9', '10'])
  })

  it('lets a follower go when its signal fires', async () => {
    const log = new EventLog(4)
    const controller = new AbortController()
    const next = log.follow(1, controller.signal).next()
    expect(await isPending(next)).toBe(true)
    controller.abort()
    expect((await within(next, 'the follower ends')).done).toBe(true)
  })
})
