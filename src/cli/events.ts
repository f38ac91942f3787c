/** fullstripe events [--follow] */
import type { EventList } from '../api/types.ts'
import { UserError } from '../base/errors.ts'
import type { EventRecord } from '../daemon/events.ts'
import { type Cli, clientOf, interruption, parseCount, type Root } from './cli.ts'
import { padEnd } from './text.ts'

export function eventsCommand(root: Root, cli: Cli): void {
  root.command(
    'events',
    'What happened, oldest first',
    (command) =>
      command
        .option('follow', { alias: 'f', type: 'boolean', default: false, describe: 'Go on as things happen' })
        .option('since', {
          type: 'string',
          requiresArg: true,
          default: '1',
          describe: 'Number of the first event',
        })
        .example('fullstripe events --follow', 'until interrupted')
        .example('fullstripe events --follow --json', 'one JSON object a line'),
    async (argv) => {
      const since = parseCount(argv.since, '--since', 1, Number.MAX_SAFE_INTEGER)
      const client = clientOf(argv)
      if (!argv.follow) {
        const list = await client.get<EventList>(`/v1/events?since=${since}`)
        cli.output.result(list, () => list.events.map(eventLine))
        return
      }
      const stop = interruption()
      const lines = client.lines<EventRecord>(`/v1/events?since=${since}&follow=true`, stop.signal)
      for await (const event of lines) {
        if (cli.output.json) cli.output.object(event)
        else cli.output.line(eventLine(event))
        await cli.output.drained()
      }
      stop.restore()
      if (!stop.signal.aborted) throw new UserError('UNREACHABLE', `the daemon of ${client.pool} has stopped`)
    },
  )
}

function eventLine(event: EventRecord): string {
  const time = new Date(event.time)
  const local = new Date(time.getTime() - time.getTimezoneOffset() * 60_000).toISOString()
  const when = `${local.slice(0, 10)} ${local.slice(11, 19)}`
  return `${when}  ${padEnd(event.level, 5)}  ${padEnd(event.kind, 18)}  ${event.object}: ${event.message}`
}
