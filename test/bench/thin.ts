/**
 * First writes, by the daemon's own counters: 4 KiB random writes to a fresh thin volume read nothing from the members and
 * write every stripe that they touch once, whole; a sequential fill writes hardly more bytes than its client.
 */
import { join } from 'node:path'
import { runFio } from './fio.ts'
import type { Check } from './report.ts'
import { controlSocket, EXPORT, fullstripe, nbdUri, serve } from './servers.ts'

const KiB = 1024
const MEMBER_BYTES_MAX = 1.05

interface Counters {
  readonly memberReads: number
  readonly memberBytesWritten: number
  readonly fullStripeWrites: number
  readonly stripesFormatted: number
}

/** What of `fullstripe status --json` is needed here. */
interface StatusPart {
  readonly members: readonly { readonly reads: number; readonly writeBytes: number }[]
  readonly volumes: readonly {
    readonly name: string
    readonly stripesFormatted: number
    readonly counters: { readonly fullStripeWrites: number }
  }[]
}

async function counters(pool: string): Promise<Counters> {
  const status = (await fullstripe(['status', '--pool', pool])).json as StatusPart
  const volume = status.volumes.find(({ name }) => name === EXPORT)
  if (volume === undefined) throw new Error('the volume is missing in the status')
  const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0)
  return {
    memberReads: sum(status.members.map((member) => member.reads)),
    memberBytesWritten: sum(status.members.map((member) => member.writeBytes)),
    fullStripeWrites: volume.counters.fullStripeWrites,
    stripesFormatted: volume.stripesFormatted,
  }
}

export async function firstWrites(
  directory: string,
  datapath: 'native' | 'portable',
  bytes: number,
): Promise<Check[]> {
  const pool = join(directory, `thin-${datapath}`)
  await fullstripe(['pool', 'create', pool])
  const daemon = serve(pool, datapath)
  try {
    await daemon.listening(controlSocket(pool))
    const uri = nbdUri(join(pool, 'nbd.sock'))
    const fresh = async () => {
      await fullstripe(['volume', 'create', EXPORT, '--size', String(bytes), '--pool', pool])
      return counters(pool)
    }
    const load = { block: 4 * KiB, depth: 32, connections: 1 }

    const before = await fresh()
    await runFio(uri, { ...load, pattern: 'randwrite' }, { size: bytes })
    const after = await counters(pool)
    const reads = after.memberReads - before.memberReads
    const { fullStripeWrites, stripesFormatted } = after
    await fullstripe(['volume', 'delete', EXPORT, '--force', '--pool', pool])

    const beforeFill = await fresh()
    const fill = await runFio(uri, { ...load, pattern: 'write' }, { size: bytes })
    const afterFill = await counters(pool)
    const ratio = (afterFill.memberBytesWritten - beforeFill.memberBytesWritten) / fill.bytes
    return [
      {
        title: `${datapath}, fresh thin volume, 4K random writes: member reads`,
        value: String(reads),
        target: '0',
        reached: reads === 0,
      },
      {
        title: `${datapath}, full-stripe writes for ${stripesFormatted} stripes touched`,
        value: String(fullStripeWrites),
        target: String(stripesFormatted),
        reached: fullStripeWrites === stripesFormatted && stripesFormatted > 0,
      },
      {
        title: `${datapath}, sequential 4K fill: member bytes / client bytes`,
        value: ratio.toFixed(3),
        target: `<= ${MEMBER_BYTES_MAX}`,
        reached: ratio <= MEMBER_BYTES_MAX,
      },
    ]
  } finally {
    await daemon.stop()
  }
}
