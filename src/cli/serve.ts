/** fullstripe serve POOL: what the daemon is told. run-daemon.ts runs it. */
import { realpathSync, statSync } from 'node:fs'
import { resolve } from 'node:path'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import {
  type ConfigValues,
  DATAPATH_CHOICES,
  LOG_LEVELS,
  readConfigFile,
  resolveConfig,
} from '../daemon/config.ts'
import { type Cli, parseCount, poolOf, type Root } from './cli.ts'

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
        .option('hot-regions', {
          type: 'string',
          requiresArg: true,
          describe: 'Most regions, of volumes that keep intents, that may hold changes not yet durable',
          defaultDescription: String(LIMITS.hotRegionsMax),
        })
        .option('link', {
          type: 'string',
          requiresArg: true,
          describe: 'HOST:PORT where other daemons reach this one, to mirror volumes to it',
          defaultDescription: 'nowhere',
        })
        .option('link-name', {
          type: 'string',
          requiresArg: true,
          describe: 'What this daemon calls itself to others',
          defaultDescription: 'host name',
        })
        .option('link-key', {
          type: 'string',
          requiresArg: true,
          describe: 'File with the secret that the daemons share',
        })
        .option('link-tls-cert', {
          type: 'string',
          requiresArg: true,
          describe: 'PEM file: certificate of this daemon',
        })
        .option('link-tls-key', { type: 'string', requiresArg: true, describe: 'PEM file: its private key' })
        .option('link-tls-ca', {
          type: 'string',
          requiresArg: true,
          describe: 'PEM file: who signs the certificates of the other daemons',
        })
        .option('link-allow-plain', {
          type: 'boolean',
          describe: 'Also without TLS to other machines: everybody on the network between sees the data',
        })
        .option('config', { type: 'string', requiresArg: true, describe: 'JSON file with the same keys' })
        .option('log-level', {
          choices: LOG_LEVELS,
          describe: 'Least level that is logged',
          defaultDescription: 'info',
        })
        .example('fullstripe serve ./pool', 'on ./pool/nbd.sock')
        .example('fullstripe serve ./pool --listen nbd://127.0.0.1:10809', 'on a TCP port')
        .example('fullstripe serve ./pool --link 127.0.0.1:10810', 'takes mirrors from other daemons'),
    async (argv) => {
      const flags: ConfigValues = {
        ...(argv.listen === undefined ? {} : { listen: argv.listen }),
        ...(argv.datapath === undefined ? {} : { datapath: argv.datapath }),
        ...(argv.threads === undefined
          ? {}
          : { threads: parseCount(argv.threads, '--threads', 1, LIMITS.datapathThreadsMax) }),
        ...(argv['hot-regions'] === undefined
          ? {}
          : { hotRegions: parseCount(argv['hot-regions'], '--hot-regions', 1, LIMITS.hotRegionsLimit) }),
        ...(argv['log-level'] === undefined ? {} : { logLevel: argv['log-level'] }),
        ...linkFlags(argv),
      }
      const file = argv.config === undefined ? {} : readConfigFile(argv.config)
      // Only here: other commands start faster without everything that a daemon is made of.
      const { runDaemon } = await import('./run-daemon.ts')
      await runDaemon(resolveConfig(poolDirectory(poolOf(argv)), flags, file), cli)
    },
  )
}

interface LinkArguments {
  readonly link: string | undefined
  readonly 'link-name': string | undefined
  readonly 'link-key': string | undefined
  readonly 'link-tls-cert': string | undefined
  readonly 'link-tls-key': string | undefined
  readonly 'link-tls-ca': string | undefined
  readonly 'link-allow-plain': boolean | undefined
}

function linkFlags(argv: LinkArguments): ConfigValues {
  return {
    ...(argv.link === undefined ? {} : { link: argv.link }),
    ...(argv['link-name'] === undefined ? {} : { linkName: argv['link-name'] }),
    ...(argv['link-key'] === undefined ? {} : { linkKey: argv['link-key'] }),
    ...(argv['link-tls-cert'] === undefined ? {} : { linkTlsCert: argv['link-tls-cert'] }),
    ...(argv['link-tls-key'] === undefined ? {} : { linkTlsKey: argv['link-tls-key'] }),
    ...(argv['link-tls-ca'] === undefined ? {} : { linkTlsCa: argv['link-tls-ca'] }),
    ...(argv['link-allow-plain'] === undefined ? {} : { linkAllowPlain: argv['link-allow-plain'] }),
  }
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
