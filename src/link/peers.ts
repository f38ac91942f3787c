/**
 * Which identity each peer has: pinned when a peer of that name (of that address, where this side dials) first proves one, and never
 * changed by the link. A pin is durable before the peer is trusted, so the first contact is the only one that takes an identity as it comes.
 */
import { randomUUID } from 'node:crypto'
import { open, readFile, rename, unlink } from 'node:fs/promises'
import { dirname } from 'node:path'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { Mutex } from '../base/locks.ts'
import { LinkError } from './errors.ts'
import { syncDirectory } from './identity.ts'

export interface PeerStore {
  /** The fingerprint that was pinned under the name. */
  pinned(name: string): string | undefined
  /** Resolves when the pin is durable. @throws LinkError IDENTITY where another fingerprint is pinned under the name by now */
  pin(name: string, fingerprint: string): Promise<void>
}

export interface KnownPeers extends PeerStore {
  /** For an operator who knows why a peer has changed. @returns whether there was a pin; that there is none is durable then */
  forget(name: string): Promise<boolean>
  /** Names, each with the fingerprint that is pinned. */
  entries(): [string, string][]
}

/** Trusts the peer of that name if its fingerprint is the pinned one, or the first. @throws LinkError IDENTITY, NOT_WELCOME */
export async function checkPin(
  store: PeerStore,
  name: string,
  fingerprint: string,
): Promise<'known' | 'new'> {
  const pinned = store.pinned(name)
  if (pinned === undefined) {
    await store.pin(name, fingerprint)
    return 'new'
  }
  if (pinned !== fingerprint) throw changed(name, pinned, fingerprint)
  return 'known'
}

/** Pins in memory: of tests, and of a store that keeps them elsewhere. */
export class MemoryPeers implements KnownPeers {
  readonly #pins: Map<string, string>

  constructor(pins: Iterable<readonly [string, string]> = []) {
    this.#pins = new Map(pins)
  }

  pinned(name: string): string | undefined {
    return this.#pins.get(name)
  }

  async pin(name: string, fingerprint: string): Promise<void> {
    if (this.mayPin(name, fingerprint)) this.#pins.set(name, fingerprint)
  }

  /** @returns whether it is not pinned yet @throws LinkError as `pin` does */
  mayPin(name: string, fingerprint: string): boolean {
    const known = this.#pins.get(name)
    if (known === fingerprint) return false
    if (known !== undefined) throw changed(name, known, fingerprint)
    if (this.#pins.size < LIMITS.linkPeersMax) return true
    throw new LinkError(
      'NOT_WELCOME',
      `${LIMITS.linkPeersMax} peers are known, and that is the most: forget one with: fullstripe peer forget NAME`,
    )
  }

  async forget(name: string): Promise<boolean> {
    return this.#pins.delete(name)
  }

  entries(): [string, string][] {
    return [...this.#pins]
  }
}

/** Pins in a JSON file, rewritten whole: the new file is synced before it takes the name of the old one. */
export class FilePeers implements KnownPeers {
  readonly #path: string
  readonly #memory: MemoryPeers
  readonly #changes = new Mutex()

  /** @throws UserError FAILED where the file cannot be read or is damaged */
  static async open(path: string): Promise<FilePeers> {
    let text = '{}'
    try {
      text = await readFile(path, 'utf8')
    } catch (error) {
      if (systemCode(error) !== 'ENOENT') throw failed(path, error)
    }
    let pins: unknown
    try {
      pins = JSON.parse(text)
    } catch (error) {
      throw failed(path, error)
    }
    if (typeof pins !== 'object' || pins === null || Array.isArray(pins))
      throw failed(path, 'no object of pins')
    const entries = Object.entries(pins)
    if (!entries.every((entry): entry is [string, string] => typeof entry[1] === 'string')) {
      throw failed(path, 'a fingerprint is no string')
    }
    return new FilePeers(path, entries)
  }

  private constructor(path: string, entries: readonly (readonly [string, string])[]) {
    this.#path = path
    this.#memory = new MemoryPeers(entries)
  }

  pinned(name: string): string | undefined {
    return this.#memory.pinned(name)
  }

  pin(name: string, fingerprint: string): Promise<void> {
    return this.#changes.run(async () => {
      if (!this.#memory.mayPin(name, fingerprint)) return
      await this.#write([...this.#memory.entries(), [name, fingerprint]])
      await this.#memory.pin(name, fingerprint)
    })
  }

  forget(name: string): Promise<boolean> {
    return this.#changes.run(async () => {
      if (this.#memory.pinned(name) === undefined) return false
      await this.#write(this.#memory.entries().filter(([other]) => other !== name))
      return await this.#memory.forget(name)
    })
  }

  entries(): [string, string][] {
    return this.#memory.entries()
  }

  async #write(pins: [string, string][]): Promise<void> {
    const made = `${this.#path}.${randomUUID()}`
    try {
      const file = await open(made, 'wx', 0o600)
      try {
        await file.writeFile(`${JSON.stringify(Object.fromEntries(pins), null, 2)}\n`)
        await file.sync()
      } finally {
        await file.close()
      }
      await rename(made, this.#path)
      await syncDirectory(dirname(this.#path))
    } catch (error) {
      await unlink(made).catch(() => undefined)
      throw failed(this.#path, error)
    }
  }
}

function changed(name: string, pinned: string, fingerprint: string): LinkError {
  return new LinkError(
    'IDENTITY',
    `the peer ${name} has the identity ${fingerprint}, and ${pinned} is pinned: ` +
      `if that is right, say so with: fullstripe peer forget ${name}`,
  )
}

function failed(path: string, error: unknown): UserError {
  const what = typeof error === 'string' ? error : messageOf(error)
  return new UserError('FAILED', `the peers in ${path} cannot be read or written: ${what}`, { cause: error })
}
