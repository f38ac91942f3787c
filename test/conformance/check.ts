/**
 * What a conformance check is, and how one is run. A check is one rule of the NBD specification (doc/proto.md of the NBD
 * project; rules marked "extension" are from its EXTENDED_HEADERS branch), in our own words, with the section that it
 * cites. Checks share nothing: each opens connections of its own, and none depends on what another left on the disk.
 *
 * Verdicts:
 *   pass     the server keeps the rule
 *   fail     the server breaks a MUST, or does not answer within the deadline
 *   advice   the server does not do what it SHOULD; everybody is free to have reasons
 *   n/a      the rule is about something that this server does not offer; `detail` says what
 */
import type { Context } from './context.ts'
import { Ended, Late } from './wire.ts'

export type Level = 'must' | 'should'
export type Verdict = 'pass' | 'fail' | 'advice' | 'n/a'

export interface Check {
  readonly id: string
  readonly level: Level
  readonly section: string // heading in the specification
  readonly rule: string // one line
  /** Whether it writes to the export. */
  readonly writes: boolean
  run(context: Context): Promise<void>
}

export interface Result {
  readonly id: string
  readonly level: Level
  readonly section: string
  readonly rule: string
  readonly verdict: Verdict
  readonly detail: string // empty where it passed
}

/** A rule was broken; `level` where it is another than the check's own. */
export class Breach extends Error {
  override readonly name = 'Breach'
  readonly level: Level | undefined
  constructor(message: string, level?: Level) {
    super(message)
    this.level = level
  }
}

export class NotApplicable extends Error {
  override readonly name = 'NotApplicable'
}

/** The rule of the check. */
export function expect(condition: boolean, otherwise: string): asserts condition {
  if (!condition) throw new Breach(otherwise)
}

/** A MUST that the check meets on its way, whatever its own level. */
export function must(condition: boolean, otherwise: string): asserts condition {
  if (!condition) throw new Breach(otherwise, 'must')
}

export function applicable(condition: boolean, otherwise: string): asserts condition {
  if (!condition) throw new NotApplicable(otherwise)
}

/** A check that only reads. */
export function reading(level: Level, id: string, section: string, rule: string, run: Check['run']): Check {
  return { level, id, section, rule, run, writes: false }
}

/** A check that writes to the export. */
export function writing(level: Level, id: string, section: string, rule: string, run: Check['run']): Check {
  return { level, id, section, rule, run, writes: true }
}

/** Runs one check to its verdict, within `deadlineMs`. Its connections are closed afterwards. */
export async function runCheck(check: Check, context: Context, deadlineMs: number): Promise<Result> {
  const { id, level, section, rule } = check
  const result = (verdict: Verdict, detail: string): Result => ({ id, level, section, rule, verdict, detail })
  const timer = setTimeout(() => context.expire(), deadlineMs)
  try {
    if (check.writes) applicable(context.mayWrite, 'it would write, which was not allowed (--destroy)')
    await check.run(context)
    await context.finish()
    return result('pass', '')
  } catch (error) {
    if (error instanceof NotApplicable) return result('n/a', error.message)
    if (error instanceof Late) {
      return result('fail', `no answer within ${deadlineMs} ms: ${error.message}${context.story()}`)
    }
    if (error instanceof Breach || error instanceof Ended) {
      const broken = error instanceof Breach ? (error.level ?? level) : level
      const detail = `${error.message}${context.story()}`
      if (await context.isServing()) return result(broken === 'must' ? 'fail' : 'advice', detail)
      return result('fail', `${detail}; and the server takes no connections any more`)
    }
    throw error
  } finally {
    clearTimeout(timer)
    context.close()
  }
}
