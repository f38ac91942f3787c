/**
 * fullstripe serve POOL: runs the daemon in the foreground.
 *
 * The first SIGTERM, SIGINT or SIGHUP stops it in order (exit 0); the second one at once (exit 1), which loses
 * nothing that was flushed. Handlers are installed before anything else, because as process 1 of a container the
 * daemon gets no default ones. An error nobody handled is our own bug: it is logged and the process ends.
 */
import { realpathSync, statSync } from 'node:fs'
import { resolve } from 'node:path'
import type { pino } from 'pino'
import { listenControl } from '../api/server.ts'
import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import {
  type ConfigValues,
  DATAPATH_CHOICES,
  LOG_LEVELS,
  readConfigFile,
  resolveConfig,
} from '../daemon/config.ts'
import { Daemon } from '../daemon/daemon.ts'
import { createLog } from '../daemon/log.ts'
import { VERSION } from '../daemon/version.ts'
import { type Cli, parseCount, poolOf, type Root } from './cli.ts'

const STOP_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const

export function serveCommand(root: Root, cli: Cli): void {
  root.command(
    'serve [pool]',
    'Serve the volumes of a pool',
    (command) =>
      command
        .positional('pool', { type: 'string', describe: 'Its directory (or --pool, FULLSTRIPE_POOL)' })
        .option('listen', {
          type: 'string',
          array: true,
          requiresArg: true,
          describe: 'NBD URI to listen on: nbd://HOST:PORT or nbd+unix:///?socket=PATH; repeatable',
          defaultDescription: 'the unix socket POOL/nbd.sock',
        })
        .option('datapath', {
          choices: DATAPATH_CHOICES,
          describe: 'Which datapath',
          defaultDescription: 'auto',
        })
        .option('threads', {
          type: 'string',
          requiresArg: true,
          describe: 'I/O threads of the native datapath',
        })
        .option('config', { type: 'string', requiresArg: true, describe: 'JSON file with the same keys' })
        .option('log-level', {
          choices: LOG_LEVELS,
          describe: 'Least level that is logged',
          defaultDescription: 'info',
        })
        .example('fullstripe serve ./pool', 'on ./pool/nbd.sock')
        .example('fullstripe serve ./pool --listen nbd://127.0.0.1:10809', 'on a TCP port'),
    async (argv) => {
      const flags: ConfigValues = {
        ...(argv.listen === undefined ? {} : { listen: argv.listen }),
        ...(argv.datapath === undefined ? {} : { datapath: argv.datapath }),
        ...(argv.threads === undefined
          ? {}
          : { threads: parseCount(argv.threads, '--threads', 1, LIMITS.datapathThreadsMax) }),
        ...(argv['log-level'] === undefined ? {} : { logLevel: argv['log-level'] }),
      }
      const file = argv.config === undefined ? {} : readConfigFile(argv.config)
      await serve(resolveConfig(poolDirectory(poolOf(argv)), flags, file), cli)
    },
  )
}

function poolDirectory(path: string): string {
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory() !== true) {
    throw new UserError(
      'NOT_FOUND',
      `there is no pool at ${resolve(path)}: create it with: fullstripe pool create ${path}`,
    )
  }
  return realpathSync(path)
}

async function serve(config: ReturnType<typeof resolveConfig>, cli: Cli): Promise<void> {
  const log = createLog(config.logLevel, process.stderr.isTTY === true)
  stopOnBugs(log)
  const stopped = stopSignal(log)
  const daemon = await Daemon.start(config, log)
  daemon.addFrontEnd(await listenControl(daemon))
  announce(daemon, cli)
  log.info({ signal: await stopped }, 'stopping; a second signal stops at once')
  const deadline = setTimeout(() => {
    log.fatal(`not stopped after ${LIMITS.drainMsMax / 1000} s; giving up, what was flushed is safe`)
    process.exit(1)
  }, LIMITS.drainMsMax)
  await daemon.stop()
  clearTimeout(deadline)
  log.info('stopped')
}

/** Resolves with the first stop signal; the second one ends the process. */
function stopSignal(log: pino.Logger): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    let count = 0
    for (const name of STOP_SIGNALS) {
      process.on(name, () => {
        count++
        if (count === 1) return resolve(name)
        log.fatal({ signal: name }, 'second signal: stopping at once')
        process.exit(1)
      })
    }
  })
}

function stopOnBugs(log: pino.Logger): void {
  const stop = (what: string) => (error: unknown) => {
    log.fatal({ err: error }, `${what}: ${messageOf(error)}`)
    process.exit(1)
  }
  process.on('uncaughtException', stop('uncaught exception'))
  process.on('unhandledRejection', stop('unhandled rejection'))
}

/** What a person at a terminal wants to know now. */
function announce(daemon: Daemon, cli: Cli): void {
  if (!cli.output.terminal || cli.output.json) return
  const { pool } = daemon.config
  const { kind, engine, threads } = daemon.pool.datapath.description
  const threadText = threads > 1 ? `, ${threads} threads` : ''
  for (const line of [
    `fullstripe ${VERSION} serves ${pool} (${kind} datapath, ${engine}${threadText})`,
    ...daemon.listening.map((uri) => `  clients   ${uri}`),
    `  control   export FULLSTRIPE_POOL=${pool}`,
    '            fullstripe volume create data --size 10G',
    '            fullstripe status --watch',
    '  stop      Ctrl-C',
  ]) {
    cli.output.line(line)
  }
}
