/**
 * npm run conformance -- URI: holds an NBD server, whoever wrote it, against the rules of the NBD specification, and
 * prints a table. What a check is, and what its verdicts mean, is in check.ts.
 */
import { parseArgs } from 'node:util'
import { messageOf } from '../../src/base/errors.ts'
import { parseNbdUri } from '../../src/nbd/uri.ts'
import { type Check, type Result, runCheck, type Verdict } from './check.ts'
import { CHECKS, checksNamed } from './checks.ts'
import { Context, probe, type Target } from './context.ts'

const USAGE = `usage: npm run conformance -- URI [--destroy] [--read-only URI] [--only ID ...] [--failed] [--json] [--deadline MS]
       npm run conformance -- --list
  URI              nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH
  --destroy        also run the checks that write: THE CONTENT OF THE EXPORT IS LOST
  --read-only URI  an export of the same server that takes no writes, for the rules about those
  --only ID        only this check, or all whose ids begin like this (df, chunk.error, flush); may be repeated
  --failed         print only what failed, and advice
  --json           print the results as JSON
  --deadline MS    how long one check may take (default 10000)
  --list           print the rules and the sections that they are from; no server is needed
  --help           print this
Exit status: 0 no rule is broken, 1 one is, 2 wrong usage, or the server cannot be checked.
A rule of the kind MUST fails; one of the kind SHOULD becomes advice.`

class Usage extends Error {
  override readonly name = 'Usage'
}

interface Options {
  readonly target: Target | undefined // none: list the rules
  readonly checks: readonly Check[]
  readonly json: boolean
  readonly failed: boolean
  readonly deadlineMs: number
}

/** @returns nothing where help was asked for */
function readOptions(): Options | undefined {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      destroy: { type: 'boolean', default: false },
      'read-only': { type: 'string' },
      only: { type: 'string', multiple: true },
      failed: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      deadline: { type: 'string', default: '10000' },
      list: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  })
  if (values.help) return undefined
  const deadlineMs = Number(values.deadline)
  if (!Number.isInteger(deadlineMs) || deadlineMs < 1) throw new Usage('--deadline wants milliseconds')
  const checks = values.only === undefined ? CHECKS : values.only.flatMap(checksNamed)
  if (checks.length === 0) throw new Usage(`no check is called ${values.only?.join()}; --list names them`)
  const [uri, ...more] = positionals
  const common = { checks, json: values.json, failed: values.failed, deadlineMs }
  if (values.list) return { ...common, target: undefined }
  if (uri === undefined || more.length > 0) throw new Usage('one URI is needed')
  const readOnly = values['read-only']
  const target: Target = {
    uri: parseNbdUri(uri),
    mayWrite: values.destroy,
    ...(readOnly === undefined ? {} : { readOnly: parseNbdUri(readOnly) }),
  }
  return { ...common, target }
}

const say = (text: string): void => {
  process.stdout.write(`${text}\n`)
}

function printRules(checks: readonly Check[], json: boolean): void {
  if (json) {
    say(JSON.stringify(checks, ['id', 'level', 'section', 'rule', 'writes'], 2))
    return
  }
  for (const { id, level, section, rule, writes } of checks) {
    say(`${id}  ${level.toUpperCase()}${writes ? ', writes' : ''}\n    ${rule}  [${section}]`)
  }
}

function countsOf(results: readonly Result[]): Record<Verdict, number> {
  const counts = { pass: 0, fail: 0, advice: 0, 'n/a': 0 }
  for (const { verdict } of results) counts[verdict]++
  return counts
}

function printResult({ id, section, rule, verdict, detail }: Result): void {
  say(`${verdict.padEnd(6)}  ${id}`)
  if (verdict === 'pass') return
  if (verdict !== 'n/a') say(`          ${rule}  [${section}]`)
  say(`          ${detail}`)
}

async function check(target: Target, options: Options): Promise<boolean> {
  if (!target.mayWrite) {
    process.stderr.write(
      'conformance: only checks that read; --destroy runs all of them and WRITES to the export\n',
    )
  }
  const facts = await probe(target.uri, options.deadlineMs)
  const results: Result[] = []
  for (const each of options.checks) {
    const result = await runCheck(each, new Context(target, facts), options.deadlineMs)
    results.push(result)
    const wanted = !options.failed || result.verdict === 'fail' || result.verdict === 'advice'
    if (!options.json && wanted) printResult(result)
  }
  const counts = countsOf(results)
  if (options.json) say(JSON.stringify({ counts, results }, null, 2))
  else {
    const { pass, fail, advice } = counts
    say(`\n${pass} passed, ${fail} failed, ${advice} advice, ${counts['n/a']} not applicable`)
  }
  return counts.fail === 0
}

try {
  const options = readOptions()
  if (options === undefined) say(USAGE)
  else if (options.target === undefined) printRules(options.checks, options.json)
  else process.exitCode = (await check(options.target, options)) ? 0 : 1
} catch (error) {
  process.stderr.write(`conformance: ${messageOf(error)}\n`)
  const wrong =
    error instanceof Usage ||
    (error instanceof Error && 'code' in error && String(error.code).startsWith('ERR_PARSE'))
  if (wrong) process.stderr.write(`${USAGE}\n`)
  process.exitCode = 2
}
