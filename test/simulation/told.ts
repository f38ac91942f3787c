import { replayOf, shrink, type World } from './campaign.ts'
import type { SeedResult } from './simulation.ts'

/** Failures, each with the command that repeats it. */
export async function told(failures: readonly SeedResult[], world: World = 'pool'): Promise<string[]> {
  const lines: string[] = []
  for (const { seed, failure } of failures)
    lines.push(`seed ${seed}: ${failure}\n  again: ${replayOf(seed, await shrink(seed, world), world)}`)
  return lines
}
