/**
 * The daemon in the foreground, as one process.
 *
 * The first SIGTERM, SIGINT or SIGHUP stops it in order (exit 0); the second one at once (exit 1), which loses
 * nothing that was flushed. One that is repeated immediately is still the first: a terminal sends it to all programs in the
 * foreground, and npm, one of them, passes it on. Handlers are installed before anything else, because as process 1 of a container the
 * daemon gets no default ones. An error nobody handled is our own bug: it is logged and the process ends.
 */
import type { pino } from 'pino'
import { messageOf } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { DaemonConfig } from '../daemon/config.ts'
import { Daemon } from '../daemon/daemon.ts'
import { createLog } from '../daemon/log.ts'
import { VERSION } from '../daemon/version.ts'
import type { Cli } from './cli.ts'

const STOP_SIGNALS = ['SIGTERM', 'SIGINT', 'SIGHUP'] as const
/** A stopped daemon has nothing left to wait for; this is for a leak nobody knows of. */
const EXIT_MS_MAX = 5_000
/** A person is slower than this. */
const REPEATED_MS = 300

/** Resolves when the daemon was told to stop and has stopped. */
export async function runDaemon(config: DaemonConfig, cli: Cli): Promise<void> {
  const log = createLog(config.logLevel, process.stderr.isTTY === true)
  stopOnBugs(log)
  const stopped = stopSignal(log)
  const daemon = await Daemon.start(config, log)
  try {
    // Loaded last: disks that wait for a restarted daemon are served by now.
    const { listenControl } = await import('../api/server.ts')
    daemon.addFrontEnd(await listenControl(daemon))
  } catch (error) {
    await daemon.stop()
    throw error
  }
  announce(daemon, cli)
  log.info({ signal: await stopped }, 'stopping; a second signal stops at once')
  await stop(daemon, log)
}

/** Whatever happens here, the process ends soon, with a code that says how. */
async function stop(daemon: Daemon, log: pino.Logger): Promise<void> {
  const deadline = setTimeout(() => {
    log.fatal(`not stopped after ${LIMITS.drainMsMax / 1000} s; giving up, what was flushed is safe`)
    process.exit(1)
  }, LIMITS.drainMsMax)
  try {
    await daemon.stop()
  } catch (error) {
    log.fatal({ err: error }, `not stopped in order: ${messageOf(error)}`)
    process.exit(1)
  }
  clearTimeout(deadline)
  log.info('stopped')
  // Ends here, where signals are still taken: one that comes while Node.js takes itself apart would make this look like a crash.
  process.once('beforeExit', () => process.exit())
  setTimeout(() => {
    log.error({ open: process.getActiveResourcesInfo() }, 'stopped, but something is still open: exiting')
    process.exit(1)
  }, EXIT_MS_MAX).unref()
}

/** Resolves with the first stop signal; the second one ends the process. */
function stopSignal(log: pino.Logger): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    let first: { readonly name: NodeJS.Signals; readonly at: number } | undefined
    for (const name of STOP_SIGNALS) {
      process.on(name, () => {
        const at = performance.now()
        if (first === undefined) {
          first = { name, at }
          resolve(name)
          return
        }
        if (name === first.name && at - first.at < REPEATED_MS) return
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
  const link = daemon.mirrors.listening
  const threadText = threads > 1 ? `, ${threads} threads` : ''
  for (const line of [
    `fullstripe ${VERSION} serves ${pool} (${kind} datapath, ${engine}${threadText})`,
    ...daemon.listening.map((uri) => `  clients   ${uri}`),
    ...(link === undefined ? [] : [`  peers     ${link}`]),
    `  control   export FULLSTRIPE_POOL=${pool}`,
    '            fullstripe volume create data --size 10G',
    '            fullstripe status --watch',
    '  stop      Ctrl-C',
  ]) {
    cli.output.line(line)
  }
}
