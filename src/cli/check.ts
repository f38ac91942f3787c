/**
 * fullstripe check POOL: verifies a pool that is not being served.
 *
 * Exit code: 0 clean, 1 damaged (or the check failed), 4 damage was found and repaired.
 */
import { resolve } from 'node:path'
import type { CheckReport } from '../volume/check.ts'
import { type Cli, poolOf, type Root } from './cli.ts'
import { plural } from './text.ts'

const EXIT: Record<CheckReport['status'], number> = { clean: 0, damaged: 1, repaired: 4 }

export function checkCommand(root: Root, cli: Cli): void {
  root.command(
    'check [pool]',
    'Verify a pool that is not being served',
    (command) =>
      command
        .positional('pool', { type: 'string', describe: 'Its directory (or --pool, FULLSTRIPE_POOL)' })
        .option('repair', { type: 'boolean', default: false, describe: 'Also repair what can be repaired' })
        .epilogue('Exit codes: 0 clean, 1 damaged, 4 damage was repaired, 2 wrong usage.')
        .example('fullstripe check ./pool', 'only look')
        .example('fullstripe check ./pool --repair', 'look and repair'),
    async (argv) => {
      const { checkPool } = await import('../volume/check.ts')
      const report = await checkPool(resolve(poolOf(argv)), { repair: argv.repair })
      cli.output.result(report, () => reportLines(report))
      cli.exitCode = EXIT[report.status]
    },
  )
}

function reportLines(report: CheckReport): string[] {
  const findings = report.findings.map(({ severity, object, message, repaired }) => {
    return `${severity}: ${object}: ${message}${repaired ? ' (repaired)' : ''}`
  })
  return [
    ...findings,
    `${report.status}: ${plural(report.volumes, 'volume')}, ${plural(report.slotsUsed, 'slot')} in use`,
  ]
}
