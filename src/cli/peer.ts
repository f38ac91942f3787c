/** fullstripe peer list | forget */
import type { PeerList } from '../api/types.ts'
import type { PeerInfo } from '../mirror/types.ts'
import { type Cli, clientOf, type Root } from './cli.ts'
import { table } from './text.ts'

export function peerCommands(root: Root, cli: Cli): void {
  root.command('peer', 'Other daemons, and the identities they are known by', (group) => {
    group
      .command(
        'list',
        'Daemons that this one has met',
        (command) => command,
        async (argv) => {
          const { peers } = await clientOf(argv).get<PeerList>('/v1/peers')
          cli.output.result(peers, () =>
            peers.length === 0
              ? ['no peers: the first mirror with another daemon makes it known']
              : peerTable(peers),
          )
        },
      )
      .command(
        'forget <name>',
        'Take whoever comes next under that name for it: its identity was lost, or replaced',
        (command) =>
          command
            .positional('name', { type: 'string', demandOption: true, describe: 'As peer list shows it' })
            .example('fullstripe peer forget site-b', 'the pool there was made anew'),
        async (argv) => {
          const path = `/v1/peers/${encodeURIComponent(argv.name)}`
          const forgotten = await clientOf(argv).delete<PeerInfo>(path)
          cli.output.result(forgotten, () => [forgottenLine(forgotten)])
        },
      )
      .demandCommand(1, 1, 'which peer command?', 'which peer command?')
  })
}

function peerTable(peers: readonly PeerInfo[]): string[] {
  return table(
    [{ title: 'peer' }, { title: 'connected' }, { title: 'mirrors' }, { title: 'fingerprint' }],
    peers.map(({ name, fingerprint, connected, mirrors }) => [
      name,
      connected ? 'yes' : 'no',
      mirrors.length === 0 ? '-' : mirrors.join(' '),
      fingerprint,
    ]),
  )
}

function forgottenLine({ name, fingerprint, mirrors }: PeerInfo): string {
  const also = mirrors.length === 0 ? '' : `, also by ${mirrors.join(' ')}`
  return `peer ${name} forgotten (${fingerprint}): the next one that comes under that name is taken for it${also}`
}
