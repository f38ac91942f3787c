/** The table: every check, in the order in which a connection meets what it is about. */
import type { Check } from './check.ts'
import { contextChecks } from './checks/contexts.ts'
import { exportChecks } from './checks/exports.ts'
import { greetingChecks } from './checks/greeting.ts'
import { readingChecks } from './checks/reads.ts'
import { requestChecks } from './checks/requests.ts'
import { statusChecks } from './checks/status.ts'
import { writingChecks } from './checks/writes.ts'

export const CHECKS: readonly Check[] = [
  ...greetingChecks,
  ...exportChecks,
  ...contextChecks,
  ...requestChecks,
  ...readingChecks,
  ...writingChecks,
  ...statusChecks,
]

/** The checks whose id is `pattern`, begins with `pattern.`, or is in its mode (`pattern@...`). */
export function checksNamed(pattern: string): readonly Check[] {
  return CHECKS.filter(
    ({ id }) => id === pattern || id.startsWith(`${pattern}.`) || id.startsWith(`${pattern}@`),
  )
}
