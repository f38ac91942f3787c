/** fullstripe volume format NAME: the background formatter of a thick volume. */
import { UserError } from '../base/errors.ts'
import { approximateSize, parseSize } from '../base/sizes.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { type Cli, clientOf, interruption, pause, type Root } from './cli.ts'
import { type Client, volumePath } from './client.ts'
import { Screen } from './screen.ts'
import { percent, progressBar } from './text.ts'

export function formatCommand(group: Root, cli: Cli): void {
  group.command(
    'format <name>',
    'Format a thick volume in the background; nothing has to wait for it',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'The volume' })
        .option('rate', {
          type: 'string',
          requiresArg: true,
          describe: 'At most so many bytes a second; 0: no limit',
        })

        .option('pause', {
          type: 'boolean',
          describe: 'Stop for now; start it again to go on',
        })
        .option('wait', { type: 'boolean', describe: 'Show progress until it is done' })
        .conflicts('pause', ['rate', 'wait'])
        .example('fullstripe volume format log --rate 50M', 'in the background')
        .example('fullstripe volume format log --wait', 'and watch'),
    async (argv) => {
      const client = clientOf(argv)
      if (argv.pause === true) {
        const info = await client.delete<VolumeInfo>(volumePath(argv.name, '/format'))
        cli.output.result(info, () => [`volume ${info.name}: ${progressText(info)}`])
        return
      }
      const rate = argv.rate === undefined ? undefined : parseSize(argv.rate, '--rate')
      const body = rate === undefined ? {} : { rate: rate === 0 ? null : rate }
      const started = await client.post<VolumeInfo>(volumePath(argv.name, '/format'), body)
      const info = argv.wait === true ? await waitForIt(client, started, cli) : started
      cli.output.result(info, () => [`volume ${info.name}: ${progressText(info)}`])
      if (info.formatter.state === 'failed') {
        throw new UserError(
          'FAILED',
          `formatting volume ${info.name} failed: ${info.formatter.message ?? 'see fullstripe events'}`,
        )
      }
    },
  )
}

async function waitForIt(client: Client, started: VolumeInfo, cli: Cli): Promise<VolumeInfo> {
  const stop = interruption()
  const screen = cli.output.terminal && !cli.output.json ? new Screen(cli.output) : undefined
  let info = started
  while (info.formatter.state === 'running' && !stop.signal.aborted) {
    screen?.draw([formatterBar(info, cli.output.columns, cli.output.unicode)])
    await pause(screen === undefined ? 250 : 500, stop.signal)
    info = await client.get<VolumeInfo>(volumePath(info.name))
  }
  screen?.draw([formatterBar(info, cli.output.columns, cli.output.unicode)])
  stop.restore()
  if (stop.signal.aborted) cli.output.note('formatting goes on in the background; stop it with --pause')
  return info
}

export function progressText(info: VolumeInfo): string {
  const { formatter } = info
  const done = percent(formatter.done, formatter.total)
  if (formatter.state === 'done') return 'formatted'
  const limit = formatter.rate === null ? '' : ` at no more than ${approximateSize(formatter.rate)}/s`
  return `formatting ${formatter.state} at ${done}${formatter.state === 'running' ? limit : ''}`
}

/** `log  ████████▌         42.1 %   118M/s  3m12s left` */
export function formatterBar(info: VolumeInfo, columns: number, unicode: boolean): string {
  const { done, total, speed, state } = info.formatter
  const moves = state === 'running' && speed > 0
  const remaining = ((1 - done / total) * info.size) / speed
  return progressBar(
    info.name,
    { done, total, speed: moves ? speed : null, remaining, state },
    columns,
    unicode,
  )
}
