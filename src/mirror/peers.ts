import { printable, UserError } from '../base/errors.ts'
import type { Session } from '../link/session.ts'
import type { Links } from './links.ts'
import type { Relation } from './relation.ts'
import type { PeerControl, PeerInfo } from './types.ts'

/**
 * The daemons that this one has met. Each is known by the address that this side dials, or by its name where it dials, and by the identity
 * that was pinned when they first met.
 */
export interface PeersHost {
  links(): Promise<Links>
  sessions(): readonly Session[]
  relations(): readonly Relation[]
  event(kind: string, name: string, message: string): void
}

export class Peers implements PeerControl {
  readonly #host: PeersHost

  constructor(host: PeersHost) {
    this.#host = host
  }

  async list(): Promise<readonly PeerInfo[]> {
    const links = await this.#host.links()
    const connected = new Set(this.#host.sessions().map(({ peer }) => peer.fingerprint))
    return links
      .peers()
      .map(([name, fingerprint]) => ({
        name,
        fingerprint,
        connected: connected.has(fingerprint),
        mirrors: this.#relationsWith(name).map(({ object }) => object),
      }))
      .sort((a, b) => (a.name < b.name ? -1 : 1))
  }

  async forget(name: string): Promise<PeerInfo> {
    const found = (await this.list()).find((peer) => peer.name === name)
    if (found === undefined) {
      const text = `there is no peer ${printable(name)}: see the names with: fullstripe peer list`
      throw new UserError('NOT_FOUND', text)
    }
    if (found.connected) {
      const text = `the peer ${name} is connected, and has the identity that is pinned: there is nothing to forget`
      throw new UserError('BUSY', text)
    }
    // First the mirrors: as long as the pin is there, nobody else comes under that name.
    for (const relation of this.#relationsWith(name)) await relation.forgetPeer()
    await (await this.#host.links()).forget(name)
    this.#host.event('peer.forgotten', name, `its identity ${found.fingerprint} is not pinned any more`)
    return found
  }

  #relationsWith(name: string): Relation[] {
    return this.#host
      .relations()
      .filter(
        ({ record }) => record.kind === 'link' && (record.peer.name === name || record.address === name),
      )
      .sort((a, b) => (a.object < b.object ? -1 : 1))
  }
}
