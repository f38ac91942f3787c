/** fullstripe pool create|show */
import { resolve } from 'node:path'
import { UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize, formatSize, parseSize } from '../base/sizes.ts'
import type { PoolInfo } from '../volume/pool.ts'
import { type Cli, clientOf, type Root } from './cli.ts'
import { pairs, percent, table } from './text.ts'

export function poolCommands(root: Root, cli: Cli): void {
  root.command('pool', 'Create and show pools', (group) =>
    group
      .command(
        'create <pool>',
        'Make a pool: a directory of metadata and one or more members',
        (command) =>
          command
            .positional('pool', { type: 'string', describe: 'Directory; made where it does not exist' })
            .option('member', {
              type: 'string',
              array: true,
              requiresArg: true,
              describe: 'File or block device that holds data; repeat it to stripe over several',
              defaultDescription: 'one sparse file in POOL',
            })
            .option('parity', { choices: ['0', '1', '2'] as const, default: '0', describe: 'Parity members' })
            .option('chunk', {
              type: 'string',
              requiresArg: true,
              describe: 'Part of a stripe on one member',
              defaultDescription: '64K',
            })
            .option('capacity', {
              type: 'string',
              requiresArg: true,
              describe: 'How much the pool may hold',
              defaultDescription: 'all that its members hold',
            })
            .example('fullstripe pool create ./pool', 'one sparse file, which grows as volumes are written')
            .example('fullstripe pool create /var/lib/pool --member /dev/sdb --member /dev/sdc', 'two disks'),
        async (argv) => {
          const directory = argv.pool
          if (directory === undefined || directory === '') throw new UserError('USAGE', 'which directory?')
          const members = argv.member?.map((path) => {
            if (path === '') throw new UserError('USAGE', '--member needs the path of a file or device')
            return resolve(path)
          })
          const parity = ([0, 1, 2] as const).find((count) => String(count) === argv.parity)
          const { createPool } = await import('../volume/create-pool.ts')
          const info = await createPool(resolve(directory), {
            ...(members === undefined ? {} : { members }),
            ...(parity === undefined ? {} : { parity }),
            ...(argv.chunk === undefined ? {} : { chunkSize: parseSize(argv.chunk, '--chunk') }),
            ...(argv.capacity === undefined ? {} : { capacity: parseSize(argv.capacity, '--capacity') }),
          })
          cli.output.result(info, () => [
            `pool ${info.directory} created: ${membersText(info)}, room for ${approximateSize(info.capacity)}`,
            `serve it with: fullstripe serve ${directory}`,
          ])
        },
      )
      .command(
        'show [pool]',
        'Show a pool that is being served',
        (command) =>
          command.positional('pool', {
            type: 'string',
            describe: 'Its directory (or --pool, FULLSTRIPE_POOL)',
          }),
        async (argv) => {
          const info = await clientOf(argv).get<PoolInfo>('/v1/pool')
          cli.output.result(info, () => poolLines(info))
        },
      )
      .demandCommand(1, 'which pool command?'),
  )
}

function membersText(info: PoolInfo): string {
  const { length } = info.members
  if (length === 1) return '1 member'
  return `${length} members of at most ${LIMITS.membersMax}`
}

export function poolLines(info: PoolInfo): string[] {
  const lines = pairs([
    ['pool', info.directory],
    ['uuid', info.uuid],
    ['format', `version ${info.version}`],
    [
      'capacity',
      `${approximateSize(info.capacity)} (${info.slots} stripes of ${formatSize(info.stripeSize)})`,
    ],
    ['used', `${approximateSize(info.used)} (${percent(info.used, info.capacity)})`],
    ['reserved', `${approximateSize(info.reserved)} for thick volumes`],
    [
      'geometry',
      `${info.dataMembers} data + ${info.parityMembers} parity, chunk ${formatSize(info.chunkSize)}`,
    ],
    ['disk free', info.fileSystemAvailable === null ? '-' : approximateSize(info.fileSystemAvailable)],
    ['state', info.failure === null ? info.state : `${info.state}: ${info.failure}`],
  ])
  const columns = [
    { title: 'member', right: true },
    { title: 'state' },
    { title: 'kind' },
    { title: 'size', right: true },
    { title: 'path' },
  ]
  const rows = info.members.map((m) => [String(m.index), m.state, m.kind, approximateSize(m.size), m.path])
  return [...lines, '', ...table(columns, rows)]
}
