import { UserError } from '../../src/base/errors.ts'
import type { Pool, VolumeCreateOptions } from '../../src/volume/pool.ts'
import type { Random } from '../support/random.ts'
import { SECTOR } from '../support/sector-data.ts'
import { History } from './history.ts'

/**
 * What the simulation knows of a volume: what it was asked to be, what it may be while that is under way, and the history of
 * its sectors.
 */
export interface SimVolume {
  readonly options: VolumeCreateOptions
  readonly history: History
  name: string
  /** Bytes that clients may use; the last size that was answered. */
  size: number
  /** What it may turn out to have after a crash, beside that. */
  nextSizes: number[]
  state: 'creating' | 'there' | 'deleting' | 'deleted'
  /** Counts resizes: a request that met one may be refused. */
  resizes: number
}

/** No volume grows larger. */
export const STRIPES_MAX = 40

export class SimVolumes {
  readonly #stripeSize: number
  readonly #all: SimVolume[] = []
  #names = 0
  #token = 0n

  constructor(stripeSize: number) {
    this.#stripeSize = stripeSize
  }

  get there(): readonly SimVolume[] {
    return this.#all.filter(({ state }) => state === 'there')
  }

  newToken(): bigint {
    this.#token += 1n
    return this.#token
  }

  newName(): string {
    this.#names++
    return `volume-${this.#names}`
  }

  /** A volume that is about to be created. */
  add(
    options: VolumeCreateOptions,
    history = new History(STRIPES_MAX * this.#stripeSize, options.fill ?? 0),
  ): SimVolume {
    const volume: SimVolume = {
      options,
      name: options.name,
      history,
      size: options.size,
      nextSizes: [],
      state: 'creating',
      resizes: 0,
    }
    this.#all.push(volume)
    return volume
  }

  /** Compares what exists after a restart, and takes over what was left open. @returns what is wrong */
  settle(pool: Pool): string | undefined {
    const found = new Map(pool.volumes().map((volume) => [volume.name, volume.size]))
    for (const volume of this.#all) {
      const size = found.get(volume.name)
      found.delete(volume.name)
      if (size === undefined) {
        if (volume.state === 'there') return `volume ${volume.name} is gone`
        volume.state = 'deleted'
        continue
      }
      if (volume.state === 'deleted') return `volume ${volume.name} is there again`
      if (size !== volume.size && !volume.nextSizes.includes(size))
        return `volume ${volume.name} has ${size} bytes, not ${[volume.size, ...volume.nextSizes].join(' or ')}`
      volume.state = 'there'
      volume.size = size
      volume.nextSizes = []
    }
    for (const name of found.keys()) return `volume ${name} comes from nowhere`
    return undefined
  }
}

/** Bytes; a volume need not end where a stripe does. */
export function sizeOf(stripes: number, stripeSize: number, sectorsLess: number): number {
  return stripes * stripeSize - sectorsLess * SECTOR
}

/** Regions of one to four format units, for some volumes. */
export function intentsOf(
  random: Random,
  unitBytes: number,
): Pick<VolumeCreateOptions, 'intents' | 'regionSize'> {
  return random.below(3) > 0 ? {} : { intents: true, regionSize: unitBytes * random.pick([1, 2, 4]) }
}

/** Refusals and failures of the store; anything else is a bug. */
export function isRefusal(error: unknown): error is UserError {
  return error instanceof UserError
}
