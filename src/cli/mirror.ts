/**
 * fullstripe mirror add|list|show|wait|set|pause|resume|remove|promote|demote|verify|resolve
 *
 * A mirror is called by its volume and its name; where a volume has only one, the name may be left out.
 */
import { resolve } from 'node:path'
import type { Argv } from 'yargs'
import type { MirrorAddBody, MirrorChangeBody, MirrorList } from '../api/types.ts'
import { assert } from '../base/assert.ts'
import { parseDuration } from '../base/durations.ts'
import { UserError } from '../base/errors.ts'
import { parseSize } from '../base/sizes.ts'
import type { MirrorInfo, VerifyResult } from '../mirror/types.ts'
import { formatNbdUri, parseNbdUri } from '../nbd/uri.ts'
import { type Cli, clientOf, type Globals, type Root } from './cli.ts'
import { type Client, mirrorPath, volumePath } from './client.ts'
import { follow, GOALS, reached, verified } from './mirror-follow.ts'
import {
  differenceLines,
  mirrorLabel,
  mirrorLines,
  mirrorStateText,
  mirrorTable,
  modeText,
  roleText,
  verifyText,
} from './mirror-text.ts'

const MODES = ['sync', 'async'] as const
const INITS = ['realized', 'signature', 'full'] as const
const LOSSES = ['continue', 'block'] as const

export function mirrorCommands(root: Root, cli: Cli): void {
  root.command('mirror', 'Mirror volumes to other daemons and NBD exports', (group) => {
    addCommand(group, cli)
    listCommand(group, cli)
    showCommand(group, cli)
    waitCommand(group, cli)
    setCommand(group, cli)
    plainCommand(group, cli, 'pause', 'Copy nothing for now; changes are noted')
    plainCommand(group, cli, 'resume', 'Go on after a pause')
    removeCommand(group, cli)
    roleCommand(group, cli, 'promote')
    roleCommand(group, cli, 'demote')
    verifyCommand(group, cli)
    resolveCommand(group, cli)
    return group.demandCommand(1, 'which mirror command?')
  })
}

function addCommand(group: Root, cli: Cli): void {
  group.command(
    'add <volume> <peer>',
    'Mirror a volume to another daemon, which makes the volume where it has none, or to an NBD export',
    (command) =>
      settings(
        command
          .positional('volume', { type: 'string', demandOption: true, describe: 'The volume here' })
          .positional('peer', {
            type: 'string',
            demandOption: true,
            describe: 'HOST:PORT of its --link, or the URI of an NBD export of at least the same size',
          })
          .option('name', {
            type: 'string',
            requiresArg: true,
            describe: 'Name of the mirror',
            defaultDescription: "the peer's name",
          })
          .option('target', {
            type: 'string',
            requiresArg: true,
            describe: 'Name of the volume there',
            defaultDescription: 'the same as here',
          })
          .option('init', {
            choices: INITS,
            describe:
              'What is compared and copied first: what is realized on either side, everything, or all that is realized here',
            defaultDescription: 'realized',
          }),
        'adding',
      )
        .option('wait', {
          type: 'boolean',
          default: false,
          describe: 'Show progress until it is in operation',
        })
        .example('fullstripe mirror add data site-b:10810', 'in cycles, every 5 seconds')
        .example('fullstripe mirror add data site-b:10810 --mode sync --wait', 'every write, to both sides')
        .example('fullstripe mirror add data nbd://nas/backup', 'to any NBD server'),
    async (argv) => {
      const client = clientOf(argv)
      const body: MirrorAddBody = {
        peer: peerOf(argv.peer),
        ...(argv.name === undefined ? {} : { name: argv.name }),
        ...(argv.target === undefined ? {} : { target: argv.target }),
        ...(argv.init === undefined ? {} : { init: argv.init }),
        ...changeOf(argv),
      }
      checkMode(body)
      const added = await client.post<MirrorInfo>(volumePath(argv.volume, '/mirrors'), body, 0)
      const where = added.kind === 'nbd' ? added.peer : `volume ${added.target} of ${added.peer}`
      const line = `mirror ${mirrorLabel(added)} added: ${modeText(added)}, to ${where}`
      if (!argv.wait) return cli.output.result(added, () => [line])
      if (!cli.output.json) cli.output.line(line)
      const info = await follow(client, added, { done: (info) => reached(info, 'operation') }, cli)
      cli.output.result(info, () => [stateLine(info)])
    },
  )
}

/** Paths are those of whoever types them: the daemon runs in another directory. */
function peerOf(text: string): string {
  if (!/^nbds?(\+unix)?:/i.test(text)) return text
  const uri = parseNbdUri(text)
  const { address } = uri
  if (address.transport !== 'unix' || address.path.startsWith('\0')) return text
  return formatNbdUri({ ...uri, address: { transport: 'unix', path: resolve(address.path) } })
}

/** What may be said when a mirror is added, and changed while it works. */
function settings<T extends Globals>(command: Argv<T>, doing: 'adding' | 'changing') {
  const otherwise = (text: string) => ({ defaultDescription: doing === 'adding' ? text : 'as it is' })
  return command
    .option('mode', {
      choices: MODES,
      describe: 'async: in cycles; sync: a write is answered when both sides have it',
      ...otherwise('async'),
    })
    .option('interval', {
      type: 'string',
      requiresArg: true,
      describe: 'async: least time from one cycle to the next (500ms, 5s, 2m)',
      ...otherwise('5s'),
    })
    .option('on-loss', {
      choices: LOSSES,
      describe: 'sync: what writes do while the peer is lost',
      ...otherwise('continue'),
    })
    .option('rate', {
      type: 'string',
      requiresArg: true,
      describe: 'Copy at most so many bytes a second; 0: no limit',
      ...otherwise('no limit'),
    })
}

interface SettingArguments {
  readonly mode: (typeof MODES)[number] | undefined
  readonly interval: string | undefined
  readonly 'on-loss': (typeof LOSSES)[number] | undefined
  readonly rate: string | undefined
}

function changeOf(argv: SettingArguments): MirrorChangeBody {
  const rate = argv.rate === undefined ? undefined : parseSize(argv.rate, '--rate')
  return {
    ...(argv.mode === undefined ? {} : { mode: argv.mode }),
    ...(argv.interval === undefined ? {} : { intervalMs: parseDuration(argv.interval, '--interval') }),
    ...(argv['on-loss'] === undefined ? {} : { onLoss: argv['on-loss'] }),
    ...(rate === undefined ? {} : { rate: rate === 0 ? null : rate }),
  }
}

/** Somebody who says `--on-loss block` relies on it: refused where it would mean nothing. */
function checkMode({ mode = 'async', intervalMs, onLoss }: MirrorAddBody): void {
  if (mode === 'async' && onLoss !== undefined) {
    throw new UserError('USAGE', '--on-loss is for --mode sync: writes never wait for an async mirror')
  }
  if (mode === 'sync' && intervalMs !== undefined) {
    throw new UserError('USAGE', '--interval is for --mode async: a sync mirror has no cycles')
  }
}

function listCommand(group: Root, cli: Cli): void {
  group.command(
    ['list', 'ls'],
    'List the mirrors of all volumes',
    (command) => command,
    async (argv) => {
      const { mirrors } = await clientOf(argv).get<MirrorList>('/v1/mirrors')
      cli.output.result(mirrors, () => {
        if (mirrors.length > 0) return mirrorTable(mirrors)
        return ['no mirrors; add one with: fullstripe mirror add VOLUME HOST:PORT']
      })
    },
  )
}

function showCommand(group: Root, cli: Cli): void {
  group.command(
    'show <volume> [name]',
    'Show a mirror',
    (command) => mirrorArguments(command),
    async (argv) => {
      const client = clientOf(argv)
      const info = await client.get<MirrorInfo>(mirrorPath(argv.volume, await nameOf(client, argv)))
      cli.output.result(info, () => mirrorLines(info))
    },
  )
}

function waitCommand(group: Root, cli: Cli): void {
  group.command(
    'wait <volume> [name]',
    'Show progress until a mirror is in a state',
    (command) =>
      mirrorArguments(command)
        .option('for', {
          choices: GOALS,
          default: 'operation' as const,
          describe: 'Which state; operation is insync or cycling, as the mode has it',
        })
        .option('timeout', {
          type: 'string',
          requiresArg: true,
          describe: 'Give up after so long (30s, 5m)',
          defaultDescription: 'never',
        })
        .example('fullstripe mirror wait data --for consistent --timeout 10m', ''),
    async (argv) => {
      const client = clientOf(argv)
      const timeoutMs = argv.timeout === undefined ? undefined : parseDuration(argv.timeout, '--timeout')
      const name = await nameOf(client, argv)
      const done = (info: MirrorInfo) => reached(info, argv.for)
      const info = await follow(client, { volume: argv.volume, name }, { timeoutMs, done }, cli)
      cli.output.result(info, () => [stateLine(info)])
    },
  )
}

function setCommand(group: Root, cli: Cli): void {
  group.command(
    'set <volume> [name]',
    'Change how a mirror works, while it does',
    (command) =>
      settings(mirrorArguments(command), 'changing')
        .example('fullstripe mirror set data --mode sync', '')
        .example('fullstripe mirror set data site-b --rate 20M', ''),
    async (argv) => {
      const change = changeOf(argv)
      if (Object.keys(change).length === 0) {
        throw new UserError('USAGE', 'what is to change? give --mode, --interval, --on-loss or --rate')
      }
      const client = clientOf(argv)
      const info = await client.patch<MirrorInfo>(mirrorPath(argv.volume, await nameOf(client, argv)), change)
      cli.output.result(info, () => [`mirror ${mirrorLabel(info)}: ${modeText(info)}`])
    },
  )
}

function plainCommand(group: Root, cli: Cli, action: 'pause' | 'resume', describe: string): void {
  group.command(
    `${action} <volume> [name]`,
    describe,
    (command) => mirrorArguments(command),
    async (argv) => {
      const client = clientOf(argv)
      const path = mirrorPath(argv.volume, await nameOf(client, argv), `/${action}`)
      const info = await client.post<MirrorInfo>(path, {}, 0)
      cli.output.result(info, () => [stateLine(info)])
    },
  )
}

function removeCommand(group: Root, cli: Cli): void {
  group.command(
    'remove <volume> [name]',
    'End a mirror; both volumes keep what they hold',
    (command) => mirrorArguments(command),
    async (argv) => {
      const client = clientOf(argv)
      const name = await nameOf(client, argv)
      await client.delete<null>(mirrorPath(argv.volume, name))
      const removed = { volume: argv.volume, name }
      cli.output.result({ removed }, () => [`mirror ${mirrorLabel(removed)} removed`])
    },
  )
}

const ROLE_COMMANDS = {
  promote: {
    describe: 'Make this side the primary: clients may write here',
    force:
      'Also while the other side is primary or cannot be asked; what it has not sent is lost or a split brain',
  },
  demote: {
    describe: 'Make this side the secondary, after the other side has everything',
    force:
      'Also while clients are connected, or without the other side: what it lacks is thrown away when it is promoted',
  },
} as const

function roleCommand(group: Root, cli: Cli, action: keyof typeof ROLE_COMMANDS): void {
  const { describe, force } = ROLE_COMMANDS[action]
  group.command(
    `${action} <volume> [name]`,
    describe,
    (command) =>
      mirrorArguments(command).option('force', { type: 'boolean', default: false, describe: force }),
    async (argv) => {
      const client = clientOf(argv)
      const path = mirrorPath(argv.volume, await nameOf(client, argv), `/${action}`)
      const info = await client.post<MirrorInfo>(path, { force: argv.force }, 0)
      cli.output.result(info, () => [roleText(info)])
    },
  )
}

function verifyCommand(group: Root, cli: Cli): void {
  group.command(
    'verify <volume> [name]',
    'Compare both sides at a point in time, while they are used',
    (command) =>
      mirrorArguments(command)
        .option('repair', { type: 'boolean', default: false, describe: 'Also send what differs' })
        .epilogue('Exit codes: 0 equal or repaired, 1 different (or it failed), 2 wrong usage, 3 no daemon.')
        .example('fullstripe mirror verify data', 'lists what differs'),
    async (argv) => {
      const client = clientOf(argv)
      const name = await nameOf(client, argv)
      const { verify: last } = await client.get<MirrorInfo>(mirrorPath(argv.volume, name))
      await client.post<MirrorInfo>(mirrorPath(argv.volume, name, '/verify'), { repair: argv.repair }, 0)
      const done = (info: MirrorInfo): boolean => verified(info, last)
      const { verify } = await follow(client, { volume: argv.volume, name }, { done }, cli)
      assert(verify !== null)
      report({ volume: argv.volume, name, ...verify }, cli)
    },
  )
}

function report(result: VerifyResult & Pick<MirrorInfo, 'volume' | 'name'>, cli: Cli): void {
  const text = `mirror ${mirrorLabel(result)}: ${verifyText(result)}`
  if (result.failure !== null) throw new UserError('FAILED', text)
  cli.output.result(result, () => [...differenceLines(result), text])
  if (result.differing > 0 && !result.repaired) cli.exitCode = 1
}

function resolveCommand(group: Root, cli: Cli): void {
  group.command(
    'resolve <volume> [name]',
    'Settle a split brain: one side takes the content of the other',
    (command) =>
      mirrorArguments(command)
        .option('discard', {
          choices: ['local', 'remote'] as const,
          demandOption: true,
          describe: 'Whose changes since both were equal are thrown away',
        })
        .example('fullstripe mirror resolve data --discard remote', 'this side is right'),
    async (argv) => {
      const client = clientOf(argv)
      const path = mirrorPath(argv.volume, await nameOf(client, argv), '/resolve')
      const info = await client.post<MirrorInfo>(path, { discard: argv.discard }, 0)
      const gone = argv.discard === 'local' ? 'this side' : 'the other side'
      cli.output.result(info, () => [
        `mirror ${mirrorLabel(info)}: changes of ${gone} are thrown away; ${mirrorStateText(info)}`,
      ])
    },
  )
}

function mirrorArguments<T extends Globals>(command: Argv<T>) {
  return command
    .positional('volume', { type: 'string', demandOption: true, describe: 'The volume' })
    .positional('name', {
      type: 'string',
      describe: 'The mirror',
      defaultDescription: 'the only one of the volume',
    })
}

/** @throws UserError NOT_FOUND, or USAGE where there are several */
export async function nameOf(
  client: Client,
  { volume, name }: { readonly volume: string; readonly name: string | undefined },
): Promise<string> {
  if (name !== undefined) return name
  const { mirrors } = await client.get<MirrorList>(volumePath(volume, '/mirrors'))
  const [first, second] = mirrors
  if (first === undefined) throw new UserError('NOT_FOUND', `volume ${volume} has no mirror`)
  if (second === undefined) return first.name
  const names = mirrors.map((mirror) => mirror.name).join(', ')
  throw new UserError('USAGE', `volume ${volume} has ${mirrors.length} mirrors: say which of ${names}`)
}

function stateLine(info: MirrorInfo): string {
  return `mirror ${mirrorLabel(info)}: ${mirrorStateText(info)}`
}
