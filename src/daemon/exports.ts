/**
 * The volumes of a pool as NBD exports. A client may name a volume by its name or by its uuid, which outlives
 * renames; the default export (an empty name) is the only volume, where there is only one.
 */
import { UserError } from '../base/errors.ts'
import type { SessionSpec } from '../datapath/datapath.ts'
import type { ListedExport } from '../nbd/handshake.ts'
import type { ExportDescription } from '../nbd/negotiation.ts'
import type { Pool } from '../volume/pool.ts'
import type { Volume } from '../volume/volume.ts'
import type { ExportSource } from './listener.ts'

export class PoolExports implements ExportSource {
  readonly #pool: Pool

  constructor(pool: Pool) {
    this.#pool = pool
  }

  list(): readonly ListedExport[] {
    return this.#pool.volumes().map((volume) => ({ name: volume.name, description: describe(volume) }))
  }

  find(name: string): ExportDescription | undefined {
    const volume = this.#volume(name)
    if (volume === undefined) return undefined
    return {
      name: volume.name,
      description: describe(volume),
      size: volume.size,
      readOnly: volume.readOnly,
      // All connections share one datapath: a flush on any of them covers writes answered on every other.
      canMultiConn: true,
      contexts: volume.contexts,
    }
  }

  /** @throws UserError NOT_FOUND when the volume was deleted since the client found it */
  serve(exportName: string, session: SessionSpec): void {
    const volume = this.#volume(exportName)
    if (volume === undefined) throw new UserError('NOT_FOUND', `volume ${exportName} is gone`)
    this.#pool.datapath.serve(volume.exportId, session)
  }

  #volume(name: string): Volume | undefined {
    const volumes = this.#pool.volumes()
    if (name === '') return volumes.length === 1 ? volumes[0] : undefined
    return (
      volumes.find((volume) => volume.name === name) ?? volumes.find((volume) => volume.record.uuid === name)
    )
  }
}

function describe(volume: Volume): string {
  const { provision } = volume.record
  return volume.readOnly ? `${provision} volume, read-only` : `${provision} volume`
}
