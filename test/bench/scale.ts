/** Sizes: huge volumes made at once and held in little memory, and a pool full of stripes opened quickly. */
import { request } from 'node:http'
import { join } from 'node:path'
import { pino } from 'pino'
import { INIT_PAGE_BITS, MAP_PAGE_ENTRIES, type MetadataPage } from '../../src/metadata/records.ts'
import { MetadataStore } from '../../src/metadata/store.ts'
import { createPool, Pool } from '../../src/volume/pool.ts'
import { residentBytes } from './processes.ts'
import type { Check } from './report.ts'
import { controlSocket, fullstripe, serve } from './servers.ts'

const KiB = 1024
const MiB = 1024 * KiB
const GiB = 1024 * MiB
const TiB = 1024 * GiB

const CREATE_SECONDS_MAX = 1
const RESIDENT_MAX = 200 * MiB
const OPEN_SECONDS_MAX = 5
const STRIPES = 16_000_000

/** Through the API: that is the creation, without the start of a command's process. */
function createVolume(pool: string, body: object): Promise<void> {
  return new Promise((resolve, reject) => {
    const headers = { 'content-type': 'application/json' }
    const options = { socketPath: controlSocket(pool), method: 'POST', path: '/v1/volumes', headers }
    const asked = request(options, (answer) => {
      let text = ''
      answer.setEncoding('utf8').on('data', (chunk: string) => {
        text += chunk
      })
      answer.on('end', () => (answer.statusCode === 201 ? resolve() : reject(new Error(text))))
    })
    asked.on('error', reject)
    asked.end(JSON.stringify(body))
  })
}

export async function hugeVolumes(directory: string, datapath: 'native' | 'portable'): Promise<Check[]> {
  const checks: Check[] = []
  for (const provision of ['thin', 'thick'] as const) {
    const pool = join(directory, `huge-${datapath}-${provision}`)
    // Four sparse files, because ext4 has none of more than 16 TiB.
    const members = [0, 1, 2, 3].flatMap((index) => [
      '--member',
      join(directory, `huge-${datapath}-${provision}-${index}`),
    ])
    await fullstripe(['pool', 'create', pool, ...members, '--capacity', '20T'])
    const daemon = serve(pool, datapath)
    try {
      await daemon.listening(controlSocket(pool))
      const from = performance.now()
      await createVolume(pool, { name: 'huge', size: 16 * TiB, provision })
      const seconds = (performance.now() - from) / 1000
      const resident = residentBytes(daemon.pid)
      checks.push(
        {
          title: `${datapath}, 16 TiB ${provision} volume created`,
          value: `${seconds.toFixed(2)} s`,
          target: `< ${CREATE_SECONDS_MAX} s`,
          reached: seconds < CREATE_SECONDS_MAX,
        },
        {
          title: `${datapath}, daemon resident with it`,
          value: `${Math.round(resident / MiB)} MiB`,
          target: `< ${RESIDENT_MAX / MiB} MiB`,
          reached: resident < RESIDENT_MAX,
        },
      )
    } finally {
      await daemon.stop()
    }
  }
  return checks
}

/**
 * A pool whose only volume has 16 million stripes, all written, by writing what the metadata would hold: the member
 * stays sparse. Neighbours in the volume lie far apart in the pool, as after years of random first writes.
 */
async function makeFullPool(pool: string): Promise<void> {
  const info = await createPool(pool, { capacity: 1.25 * TiB })
  const log = pino({ level: 'silent' })
  const open = await Pool.open(pool, { datapath: 'portable', log })
  await open.createVolume({ name: 'full', size: STRIPES * info.stripeSize })
  await open.close()
  const store = await MetadataStore.open(join(pool, 'metadata'))
  try {
    const [volume] = [...store.volumes()]
    if (volume === undefined || info.slots <= STRIPES + 1)
      throw new Error('the pool is not what was asked for')
    await store.commit({ pages: [...fullPages(volume.medium)] })
  } finally {
    await store.close()
  }
}

function* fullPages(medium: number): Generator<MetadataPage> {
  for (let first = 0, index = 0; first < STRIPES; first += MAP_PAGE_ENTRIES, index++) {
    const bytes = Buffer.alloc(MAP_PAGE_ENTRIES * 4)
    for (let stripe = first; stripe < Math.min(STRIPES, first + MAP_PAGE_ENTRIES); stripe++) {
      bytes.writeUInt32LE(scattered(stripe) + 1, (stripe - first) * 4)
    }
    yield { medium, kind: 'map', index, bytes }
  }
  for (let first = 0, index = 0; first < STRIPES; first += INIT_PAGE_BITS, index++) {
    const bytes = Buffer.alloc(INIT_PAGE_BITS / 8, 0xff)
    const bits = Math.min(INIT_PAGE_BITS, STRIPES - first)
    bytes.fill(0, Math.ceil(bits / 8))
    if (bits % 8 !== 0) bytes[bits >>> 3] = (1 << (bits % 8)) - 1
    yield { medium, kind: 'init', index, bytes }
  }
}

/** One to one on 0 .. STRIPES - 1, because the factor (a prime) does not divide STRIPES. */
const scattered = (stripe: number) => (stripe * 7_368_787) % STRIPES

export async function fullPoolOpens(directory: string, datapath: 'native' | 'portable'): Promise<Check[]> {
  const pool = join(directory, 'full')
  await makeFullPool(pool)
  const from = performance.now()
  const daemon = serve(pool, datapath)
  try {
    await daemon.listening(controlSocket(pool))
    const seconds = (performance.now() - from) / 1000
    const { json } = await fullstripe(['volume', 'show', 'full', '--pool', pool])
    const formatted: unknown = Reflect.get(Object(json), 'stripesFormatted')
    if (formatted !== STRIPES) throw new Error(`the pool has ${String(formatted)} stripes, not ${STRIPES}`)
    return [
      {
        title: `${datapath}, pool with 16 million stripes opened (${Math.round(residentBytes(daemon.pid) / MiB)} MiB resident)`,
        value: `${seconds.toFixed(2)} s`,
        target: `< ${OPEN_SECONDS_MAX} s`,
        reached: seconds < OPEN_SECONDS_MAX,
      },
    ]
  } finally {
    await daemon.stop()
  }
}
