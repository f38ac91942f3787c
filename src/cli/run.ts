/**
 * The command line: one file a command group, one place where errors become exit codes.
 *
 * Arguments are text until a command reads them: yargs converts nothing, so a volume may be called 007. A command
 * that is not known or is called wrongly exits with 2 and says where to look.
 */
import yargs from 'yargs'
import { messageOf, UserError } from '../base/errors.ts'
import { VERSION } from '../daemon/version.ts'
import { attachCommands } from './attach.ts'
import { benchCommand } from './bench.ts'
import { checkCommand } from './check.ts'
import type { Cli } from './cli.ts'
import { eventsCommand } from './events.ts'
import { mirrorCommands } from './mirror.ts'
import { exitCodeOf, Output } from './output.ts'
import { peerCommands } from './peer.ts'
import { poolCommands } from './pool.ts'
import { serveCommand } from './serve.ts'
import { statusCommand } from './status.ts'
import { usageError } from './usage-error.ts'
import { volumeCommands } from './volume.ts'

export async function run(args: readonly string[]): Promise<number> {
  const cli: Cli = { output: new Output(), exitCode: 0 }
  // An error may come before yargs has read the options.
  cli.output.json = args.includes('--json')
  try {
    await parse(protectOperands(args), cli)
    return cli.exitCode
  } catch (error) {
    cli.output.error(error)
    return exitCodeOf(error)
  }
}

/**
 * What follows `--` are operands, whatever they look like; yargs does not take those for a command's arguments.
 * So they go through it behind a sign that no argument can hold.
 */
const OPERAND = '\0'

function protectOperands(args: readonly string[]): readonly string[] {
  const end = args.indexOf('--')
  if (end < 0) return args
  return [...args.slice(0, end), ...args.slice(end + 1).map((arg) => `${OPERAND}${arg}`)]
}

function unprotectOperands(argv: Record<string, unknown>): void {
  for (const [key, value] of Object.entries(argv)) {
    if (typeof value === 'string' && value.startsWith(OPERAND)) argv[key] = value.slice(OPERAND.length)
  }
}

async function parse(args: readonly string[], cli: Cli): Promise<void> {
  const root = yargs()
    .scriptName('fullstripe')
    .usage(
      '$0 COMMAND\n\nBlock storage: volumes that are usable the moment they are created, served over NBD.',
    )
    .parserConfiguration({
      'parse-numbers': false,
      'parse-positional-numbers': false,
      'dot-notation': false,
      'boolean-negation': false,
      'greedy-arrays': false,
      'strip-aliased': true,
    })
    .locale('en')
    .option('pool', {
      type: 'string',
      describe: 'Directory of the pool (default: FULLSTRIPE_POOL)',
      requiresArg: true,
    })
    .option('json', { type: 'boolean', default: false, describe: 'Write JSON, also for errors' })
    .middleware((argv) => {
      cli.output.json = argv.json
      unprotectOperands(argv)
      refuseRepeated(argv)
    })
  serveCommand(root, cli)
  poolCommands(root, cli)
  volumeCommands(root, cli)
  mirrorCommands(root, cli)
  peerCommands(root, cli)
  attachCommands(root, cli)
  statusCommand(root, cli)
  eventsCommand(root, cli)
  checkCommand(root, cli)
  benchCommand(root, cli)
  await root
    .demandCommand(1, 1, 'which command?', 'which command?')
    .recommendCommands()
    .strict()
    .version(VERSION)
    .help()
    .alias('help', 'h')
    .wrap(Math.min(100, cli.output.columns))
    .example('fullstripe pool create ./pool', 'make a pool')
    .example('fullstripe serve ./pool', 'serve its volumes')
    .example('fullstripe volume create data --size 10G --pool ./pool', 'make a volume')
    .epilogue(
      'Sizes: 4096, 64K, 10G, 1T (powers of 1024). Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no daemon.',
    )
    .exitProcess(false)
    .fail((message, error) => {
      // What a command threw is passed on; the rest is what yargs found wrong, as a sentence.
      if (error instanceof Error && error.name !== 'YError') throw error
      throw usageError((message ?? messageOf(error)).replaceAll(OPERAND, ''), args)
    })
    .parseAsync([...args])
}

/** An option given twice would be a list; only those that are lists by nature may be. */
const LISTS = new Set(['_', '--', 'listen', 'member'])
function refuseRepeated(argv: Record<string, unknown>): void {
  for (const [key, value] of Object.entries(argv)) {
    if (Array.isArray(value) && !LISTS.has(key))
      throw new UserError('USAGE', `--${key} is given more than once`)
  }
}
