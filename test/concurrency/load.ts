import { setTimeout as sleep } from 'node:timers/promises'
import type { NbdClient } from '../../src/nbd/client.ts'
import type { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import type { History } from './history.ts'

/**
 * Clients of one volume that do everything at once, on ranges that overlap, and note it in a history. A lane is one request
 * in flight; several lanes share a connection. A leaver comes, sends, and is gone before the answers.
 */
export interface Load {
  readonly history: History
  readonly size: number // bytes of the volume
  readonly unit: number // bytes of a format unit
  readonly connect: () => Promise<NbdClient>
  /** Whether to go on. */
  readonly running: () => boolean
  /** A request failed, and it was not the end of the server. */
  readonly onProblem: (error: unknown) => void
  readonly onAnswer?: () => void
}

export async function lane(load: Load, client: NbdClient, random: Random): Promise<void> {
  try {
    while (load.running()) {
      await operation(load, client, random)
      load.onAnswer?.()
    }
  } catch (error) {
    if (load.running()) load.onProblem(error)
  }
}

/** @param pauseMs between two visits */
export async function leaver(load: Load, random: Random, pauseMs: number): Promise<void> {
  try {
    while (load.running()) {
      const client = await load.connect()
      const requests = Array.from({ length: 1 + random.below(6) }, () => operation(load, client, random))
      const gone = Promise.allSettled(requests)
      if (random.below(2) === 0) await Promise.race(requests)
      else await new Promise((resolve) => setImmediate(resolve))
      client.destroy()
      await gone
      await sleep(random.below(pauseMs))
    }
  } catch (error) {
    if (load.running()) load.onProblem(error)
  }
}

async function operation(load: Load, client: NbdClient, random: Random): Promise<void> {
  const { history, size, unit } = load
  const offset = random.below(size / SECTOR) * SECTOR
  const most = random.pick([1, 4, 20, (3 * unit) / SECTOR, (9 * unit) / SECTOR])
  const length = Math.min(size - offset, (1 + random.below(most)) * SECTOR)
  const kind = random.below(100)
  if (kind < 38) {
    const { data, answered } = history.write(offset, length)
    await client.write(data, offset, { durable: kind < 2 })
    answered()
  } else if (kind < 68) {
    const { answered } = history.read(offset, length)
    const target = Buffer.alloc(length)
    await client.read(target, offset)
    answered(target)
  } else if (kind < 84) {
    const { answered } = history.zero(offset, length)
    if (kind < 74) await client.trim({ offset, length }, { durable: kind === 73 })
    else await client.zero({ offset, length }, { release: kind < 80 })
    answered()
  } else if (kind < 97) {
    // Whole units again and again: their slots go round.
    const at = Math.floor(offset / unit) * unit
    const whole = { offset: at, length: Math.min(unit, size - at) }
    const { answered } = history.zero(whole.offset, whole.length)
    await client.trim(whole)
    answered()
  } else if (kind < 98) {
    await client.cache({ offset, length })
  } else {
    await client.flush()
  }
}
