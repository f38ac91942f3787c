/** fullstripe volume create|list|show|resize|delete|rename|set|acknowledge|map|format */
import type { VolumeChangeBody, VolumeCreateBody } from '../api/types.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize, formatSize, parseSize } from '../base/sizes.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { type Cli, clientOf, parseCount, type Root } from './cli.ts'
import { volumePath } from './client.ts'
import { formatCommand } from './format.ts'
import { mapCommand } from './map.ts'
import { pairs, percent, plural, table } from './text.ts'

export function volumeCommands(root: Root, cli: Cli): void {
  root.command('volume', 'Create and manage volumes', (group) => {
    createCommand(group, cli)
    listCommand(group, cli)
    showCommand(group, cli)
    resizeCommand(group, cli)
    deleteCommand(group, cli)
    renameCommand(group, cli)
    setCommand(group, cli)
    acknowledgeCommand(group, cli)
    mapCommand(group, cli)
    formatCommand(group, cli)
    return group.demandCommand(1, 'which volume command?')
  })
}

function createCommand(group: Root, cli: Cli): void {
  group.command(
    'create <name>',
    'Make a volume; it is usable at once, whatever its size',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .option('size', {
          type: 'string',
          requiresArg: true,
          demandOption: true,
          describe: 'Its size: 512, 64K, 10G, 1T',
        })
        .option('provision', {
          choices: ['thin', 'thick'] as const,
          default: 'thin' as const,
          describe: 'thin: takes space when first written; thick: all space is reserved now',
        })
        .option('format-unit', {
          type: 'string',
          requiresArg: true,
          describe: 'Stripes that are formatted together',
          defaultDescription: '1',
        })
        .option('fill', {
          type: 'string',
          requiresArg: true,
          describe: 'Byte (0 to 255, 0x00 to 0xff) that what was never written reads as',
          defaultDescription: '0',
        })
        .option('read-only', { type: 'boolean', default: false, describe: 'Clients cannot write' })
        .option('intents', {
          type: 'boolean',
          default: false,
          describe: 'Know after a crash which regions may hold writes that were not flushed',
        })
        .option('region-size', {
          type: 'string',
          requiresArg: true,
          describe: 'Size of such a region; implies --intents',
          defaultDescription: '1M',
        })
        .example('fullstripe volume create data --size 10G', 'thin: takes no space yet')
        .example('fullstripe volume create log --size 1T --provision thick', 'cannot run out of space'),
    async (argv) => {
      const body: VolumeCreateBody = {
        name: argv.name,
        size: parseSize(argv.size, '--size'),
        provision: argv.provision,
        ...(argv['format-unit'] === undefined
          ? {}
          : { formatUnit: parseCount(argv['format-unit'], '--format-unit', 1, LIMITS.stripesPerVolumeMax) }),
        ...(argv.fill === undefined ? {} : { fill: parseCount(argv.fill, '--fill', 0, 255) }),
        ...(argv['read-only'] ? { readOnly: true } : {}),
        ...(argv.intents || argv['region-size'] !== undefined ? { intents: true } : {}),
        ...(argv['region-size'] === undefined
          ? {}
          : { regionSize: parseSize(argv['region-size'], '--region-size') }),
      }
      const info = await clientOf(argv).post<VolumeInfo>('/v1/volumes', body)
      cli.output.result(info, () => [`volume ${info.name} created: ${sizeText(info)}, ${info.provision}`])
    },
  )
}

function listCommand(group: Root, cli: Cli): void {
  group.command(
    ['list', 'ls'],
    'List the volumes',
    (command) => command,
    async (argv) => {
      const { volumes } = await clientOf(argv).get<{ volumes: VolumeInfo[] }>('/v1/volumes')
      cli.output.result(volumes, () => {
        if (volumes.length > 0) return volumeTable(volumes)
        return ['no volumes; create one with: fullstripe volume create NAME --size 10G']
      })
    },
  )
}

function showCommand(group: Root, cli: Cli): void {
  group.command(
    'show <name>',
    'Show a volume',
    (command) => command.positional('name', { type: 'string', demandOption: true, describe: 'Its name' }),
    async (argv) => {
      const info = await clientOf(argv).get<VolumeInfo>(volumePath(argv.name))
      cli.output.result(info, () => volumeLines(info))
    },
  )
}

function resizeCommand(group: Root, cli: Cli): void {
  group.command(
    'resize <name>',
    'Grow a volume while it is in use, or shrink it',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .option('size', { type: 'string', requiresArg: true, demandOption: true, describe: 'The new size' })
        .option('force', {
          type: 'boolean',
          default: false,
          describe: 'Also shrink: what lies behind the new end is lost',
        })
        .example('fullstripe volume resize data --size 20G', ''),
    async (argv) => {
      const body = { size: parseSize(argv.size, '--size'), force: argv.force }
      const info = await clientOf(argv).post<VolumeInfo>(volumePath(argv.name, '/resize'), body)
      cli.output.result(info, () => [`volume ${info.name} is ${sizeText(info)} now`])
      if (info.sessions > 0) cli.output.note('clients see the new size when they connect again')
    },
  )
}

function deleteCommand(group: Root, cli: Cli): void {
  group.command(
    'delete <name>',
    'Delete a volume and all it holds',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .option('force', {
          type: 'boolean',
          default: false,
          describe: 'Also while clients are connected or mirrors go on; they end',
        }),
    async (argv) => {
      await clientOf(argv).delete<null>(volumePath(argv.name, argv.force ? '?force=true' : ''))
      cli.output.result({ deleted: argv.name }, () => [`volume ${argv.name} deleted`])
    },
  )
}

function renameCommand(group: Root, cli: Cli): void {
  group.command(
    'rename <name> <new-name>',
    'Give a volume another name; connected clients notice nothing',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .positional('new-name', { type: 'string', demandOption: true, describe: 'Its new name' }),
    async (argv) => {
      const info = await clientOf(argv).patch<VolumeInfo>(volumePath(argv.name), { name: argv['new-name'] })
      cli.output.result(info, () => [`volume ${argv.name} is called ${info.name} now`])
    },
  )
}

function setCommand(group: Root, cli: Cli): void {
  group.command(
    'set <name>',
    'Change how a volume is kept',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .option('intents', {
          choices: ['on', 'off'] as const,
          demandOption: true,
          describe:
            'Know after a crash which regions may hold writes that were not flushed; off forgets them',
        })
        .option('region-size', {
          type: 'string',
          requiresArg: true,
          describe: 'Size of such a region, when they are switched on',
          defaultDescription: '1M',
        })
        .example(
          'fullstripe volume set data --intents on',
          'for replication and backup of what a crash left',
        ),
    async (argv) => {
      const body: VolumeChangeBody = {
        intents: argv.intents === 'on',
        ...(argv['region-size'] === undefined
          ? {}
          : { regionSize: parseSize(argv['region-size'], '--region-size') }),
      }
      const info = await clientOf(argv).patch<VolumeInfo>(volumePath(argv.name), body)
      cli.output.result(info, () => [`volume ${info.name}: intents are ${argv.intents}`])
    },
  )
}

function acknowledgeCommand(group: Root, cli: Cli): void {
  group.command(
    'acknowledge <name>',
    'Say that the suspect regions of a volume were dealt with; from now on none is suspect',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'Its name' })
        .option('stops', {
          type: 'string',
          requiresArg: true,
          describe: 'How many unclean stops were known; refused where there were more since',
        }),
    async (argv) => {
      const query = argv.stops === undefined ? '' : `?stops=${parseCount(argv.stops, '--stops', 0, 2 ** 31)}`
      const info = await clientOf(argv).delete<VolumeInfo>(volumePath(argv.name, `/suspects${query}`))
      cli.output.result(info, () => [`volume ${info.name}: no region is suspect`])
    },
  )
}

/** `10G`, or with the exact number where that says less. */
export function sizeText(info: VolumeInfo): string {
  const exact = formatSize(info.size)
  const rounded = approximateSize(info.size)
  return exact === rounded ? exact : `${rounded} (${info.size} bytes)`
}

export function volumeTable(volumes: readonly VolumeInfo[]): string[] {
  const columns = [
    { title: 'name' },
    { title: 'size', right: true },
    { title: 'used', right: true },
    { title: 'formatted', right: true },
    { title: 'provision' },
    { title: 'clients', right: true },
    { title: 'state' },
  ]
  return table(
    columns,
    volumes.map((info) => [
      info.name,
      approximateSize(info.size),
      approximateSize(info.used),
      percent(info.stripesFormatted, info.stripes),
      info.provision,
      String(info.sessions),
      stateText(info),
    ]),
  )
}

/** What is out of the ordinary, in a few words. */
export function stateText(info: VolumeInfo): string {
  const { formatter } = info
  const words: string[] = []
  if (info.failure !== null) words.push('FAILED: read-only')
  else if (info.readOnly) words.push('read-only')
  if (info.intents !== null && info.intents.suspect > 0)
    words.push(`${approximateSize(info.intents.suspect)} suspect`)
  if (formatter.state === 'running') words.push(`formatting ${percent(formatter.done, formatter.total)}`)
  if (formatter.state === 'paused')
    words.push(`formatting paused at ${percent(formatter.done, formatter.total)}`)
  if (formatter.state === 'failed') words.push('formatting failed')
  return words.join(', ')
}

function volumeLines(info: VolumeInfo): string[] {
  const { counters, formatter } = info
  const entries: [string, string][] = [
    ['name', info.name],
    ['uuid', info.uuid],
    ['size', sizeText(info)],
    [
      'used',
      `${approximateSize(info.used)} (${percent(info.stripesFormatted, info.stripes)} of ${plural(info.stripes, 'stripe')} formatted)`,
    ],
    ['provision', info.provision],
    ['format unit', `${plural(info.formatUnit, 'stripe')} of ${formatSize(info.stripeSize)}`],
    ['fill', `0x${info.fill.toString(16).padStart(2, '0')}`],
    ['read-only', info.readOnly ? 'yes' : 'no'],
    ['created', info.created],
    ['clients', plural(info.sessions, 'connection')],
    ['reads', `${counters.reads} (${approximateSize(counters.readBytes)})`],
    [
      'writes',
      `${counters.writes} (${approximateSize(counters.writeBytes)}); stripes formatted: ${counters.fullStripeWrites}`,
    ],
    [
      'other',
      `flushes ${counters.flushes}, trims ${counters.trims}, write-zeroes ${counters.zeroes}, errors ${counters.errors}`,
    ],
  ]
  if (info.provision === 'thick') {
    const limit = formatter.rate === null ? '' : `, limit ${approximateSize(formatter.rate)}/s`
    const why = formatter.message === undefined ? '' : `: ${formatter.message}`
    entries.push([
      'formatter',
      `${formatter.state}, ${percent(formatter.done, formatter.total)}${limit}${why}`,
    ])
  }
  const { intents } = info
  if (intents !== null) {
    entries.push([
      'intents',
      `${intents.hot} of ${plural(intents.hotMax, 'region')} hot, ${approximateSize(intents.regionSize)} each; announced: ${intents.announced}`,
    ])
    if (intents.stops > 0) {
      entries.push([
        'suspect',
        `${approximateSize(intents.suspect)} since ${plural(intents.stops, 'unclean stop')}, the first noticed ${intents.since}: volume map, volume acknowledge`,
      ])
    }
  }
  if (info.failure !== null) entries.push(['FAILED', info.failure])
  return pairs(entries)
}
