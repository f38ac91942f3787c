import { join } from 'node:path'
import { NbdClient } from '../../src/nbd/client.ts'
import { buildLibrary } from '../support/build-library.ts'
import { LeanDaemon } from '../support/lean-daemon.ts'
import type { DatapathChoice } from '../support/served-pool.ts'

/**
 * The ways in which a daemon reaches its members: each datapath as it runs where all data is cached, and with members that
 * behave as a disk does (test/support/slow-disk.c), which is where the native engines and the thread pool of the portable one
 * come in.
 *
 * FULLSTRIPE_TEST_DATAPATHS=portable leaves out the native ones, where there is no compiler.
 */
export interface ServerKind {
  readonly name: string
  readonly datapath: DatapathChoice
  readonly engine: 'node' | 'io_uring' | 'threads' | undefined // that has to run; undefined: whichever
  readonly slow: Readonly<Record<string, string>> | undefined // environment of slow-disk.c
}

const ALL: readonly ServerKind[] = [
  { name: 'portable', datapath: 'portable', engine: 'node', slow: undefined },
  { name: 'portable, slow members', datapath: 'portable', engine: 'node', slow: { SLOW_DISK: '12' } },
  { name: 'native', datapath: 'native', engine: undefined, slow: undefined },
  { name: 'native, io_uring', datapath: 'native', engine: 'io_uring', slow: { SLOW_DISK: '16' } },
  {
    name: 'native, threads',
    datapath: 'native',
    engine: 'threads',
    slow: { SLOW_DISK: '50', SLOW_DISK_NO_URING: '1' },
  },
]

export const SERVERS: readonly ServerKind[] =
  process.env['FULLSTRIPE_TEST_DATAPATHS'] === 'portable'
    ? ALL.filter(({ datapath }) => datapath === 'portable')
    : ALL

/** Starts loading a daemon of that kind. @param directory where the library is built, once */
export function prepare(kind: ServerKind, directory: string): LeanDaemon {
  if (kind.slow === undefined) return new LeanDaemon()
  return new LeanDaemon({ ...kind.slow, LD_PRELOAD: buildLibrary(directory, 'slow-disk.c') })
}

/** A client of a volume of a pool's daemon. */
export function connect(pool: string, volume: string): Promise<NbdClient> {
  return NbdClient.connect(`nbd+unix:///${volume}?socket=${join(pool, 'nbd.sock')}`)
}
