import { basename } from 'node:path'
import { ProtocolError, UserError } from '../base/errors.ts'
import { formatNbdUri, parseNbdUri } from '../nbd/uri.ts'
import type { Volume } from '../volume/volume.ts'
import { NbdLink } from './nbd-link.ts'
import { NbdRemote } from './nbd-remote.ts'
import type { Relation } from './relation.ts'

/** An NBD export that a volume is mirrored to, as its URI names it. */
export interface NbdTarget {
  readonly uri: string // in its one spelling
  readonly exportName: string
  /** Of the export, or else of the host or the socket. */
  readonly name: string
}

/** @throws UserError USAGE */
export function parseNbdTarget(text: string): NbdTarget {
  const parsed = parseNbdUri(text)
  const { address, exportName } = parsed
  if (address.transport === 'unix' && !/^[/\0]/.test(address.path)) {
    throw new UserError(
      'USAGE',
      `"${text}": the path of the socket has to be absolute, since the daemon has a directory of its own`,
    )
  }
  const host =
    address.transport === 'tcp' ? address.host : basename(address.path).replace(/\.sock(?:et)?$/, '')
  return { uri: formatNbdUri(parsed), exportName, name: exportName === '' ? host : exportName }
}

/** What connects the daemon's mirrors with their NBD exports. */
export class NbdTargets {
  readonly #links = new Map<number, NbdLink>() // by MirrorRecord.id

  /** A session. @throws UserError */
  async open(volume: Volume, uri: string, unitBytes: number): Promise<NbdRemote> {
    try {
      return await NbdRemote.open({ uri, size: volume.size, unitBytes, fill: volume.record.fill })
    } catch (error) {
      // UNREACHABLE would say that the operator's own daemon does not answer.
      const absent = error instanceof UserError && error.code === 'UNREACHABLE'
      if (!(absent || error instanceof ProtocolError)) throw error
      throw new UserError('FAILED', error.message, { cause: error })
    }
  }

  /** @param first a session that stands already */
  start(relation: Relation, first?: NbdRemote): void {
    const { volume, record } = relation
    const { id, address, unitBytes } = record
    if (address === null) return
    const link = new NbdLink({
      open: () => this.open(volume, address, unitBytes),
      attach: (remote) => relation.attach(remote),
      refused: (reason) => relation.primary?.refused(reason),
      missed: (offset, length) => relation.primary?.missed(offset, length),
    })
    this.#links.set(id, link)
    link.start(first)
  }

  retry(id: number): void {
    this.#links.get(id)?.retry()
  }

  async end(id: number, reason: string): Promise<void> {
    const link = this.#links.get(id)
    this.#links.delete(id)
    await link?.close(reason)
  }

  async close(reason: string): Promise<void> {
    await Promise.all([...this.#links.keys()].map((id) => this.end(id, reason)))
  }
}
