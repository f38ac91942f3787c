import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pino } from 'pino'
import { Listener } from '../../src/daemon/listener.ts'
import { NbdClient, type NbdClientOptions } from '../../src/nbd/client.ts'
import { Pool, type PoolEvent, type PoolOptions } from '../../src/volume/pool.ts'

/** A pool with its NBD listener on a unix socket, in this process. Restart it, copy its directory, look inside. */
export type DatapathChoice = 'native' | 'portable'

export class ServedPool {
  readonly pool: Pool
  readonly #listener: Listener
  readonly #socket: string
  readonly #clients: NbdClient[] = []
  readonly events: PoolEvent[]

  private constructor(pool: Pool, listener: Listener, socket: string, events: PoolEvent[]) {
    this.pool = pool
    this.#listener = listener
    this.#socket = socket
    this.events = events
  }

  static async open(
    directory: string,
    datapath: DatapathChoice,
    options: Pick<PoolOptions, 'hotSet' | 'threads'> = {},
  ): Promise<ServedPool> {
    const log = pino({ level: process.env['TEST_LOG'] ?? 'silent' })
    const events: PoolEvent[] = []
    const onEvent = (event: PoolEvent): unknown => events.push(event)
    const pool = await Pool.open(directory, { datapath, log, onEvent, ...options })
    const socket = join(mkdtempSync(join(tmpdir(), 'fullstripe-nbd-')), 'nbd.sock')
    const listener = await Listener.open({
      uris: [`nbd+unix:///?socket=${socket}`],
      log,
      exports: {
        list: () => pool.volumes().map(({ name }) => ({ name, description: '' })),
        find: (name) => {
          const volume = pool.volumes().find((candidate) => candidate.name === name)
          if (volume === undefined) return undefined
          const { size, readOnly, contexts } = volume
          return { name, description: '', size, readOnly, canMultiConn: true, contexts }
        },
        serve: (name, session) => pool.datapath.serve(pool.volume(name).exportId, session),
      },
    })
    return new ServedPool(pool, listener, socket, events)
  }

  uri(volume: string): string {
    return `nbd+unix:///${encodeURIComponent(volume)}?socket=${this.#socket}`
  }

  async connect(volume: string, options: NbdClientOptions = {}): Promise<NbdClient> {
    const client = await NbdClient.connect(this.uri(volume), {
      contexts: ['base:allocation', 'fullstripe:init'],
      ...options,
    })
    this.#clients.push(client)
    return client
  }

  async close(): Promise<void> {
    await Promise.all(this.#clients.map((client) => client.close()))
    await this.#listener.close()
    await this.pool.close()
    rmSync(join(this.#socket, '..'), { recursive: true, force: true })
  }
}
