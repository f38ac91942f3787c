import { afterEach, describe, expect, it } from 'vitest'
import { closeRigs, pattern, Rig, type RigClient, type RigOptions } from '../support/datapath-rig.ts'
import { implementations } from '../support/implementations.ts'
import { within } from '../support/poll.ts'
import { Random } from '../support/random.ts'
import { CMD, FLAG } from '../support/wire-client.ts'

/**
 * The same random traffic, from the same seed, to every datapath and to a model in memory. In a batch no two changes
 * overlap, so what it comes to is certain in whatever order it runs; a read that runs at the same time must see, at
 * every byte, what was there before the batch or what is there after it. Meanwhile the policy clears direct bits, moves
 * units, discards units and grows the volume.
 *
 * A failure names its seed: FULLSTRIPE_TEST_SEED=<seed> runs the same again.
 */
const seed = Number(process.env['FULLSTRIPE_TEST_SEED'] ?? Math.floor(Math.random() * 2 ** 31))

const shapes: RigOptions[] = [
  { members: 1, chunkSize: 4096, stripes: 48 },
  { members: 1, chunkSize: 65_536, stripes: 24, formatUnit: 3, fill: 0x5a },
  { members: 2, chunkSize: 4096, stripes: 40, size: 40 * 8192 - 4096 - 512, formatUnit: 4 },
  { members: 3, chunkSize: 8192, stripes: 20, fill: 0xc3 },
]

describe.each(implementations)('random traffic: $name', (implementation) => {
  afterEach(closeRigs)

  it.each(shapes)(
    'is what the model says: $members members, chunk $chunkSize, unit $formatUnit, fill $fill',
    async (shape) => {
      try {
        await run(await Rig.open(implementation, shape), new Random(seed))
      } catch (error) {
        throw new Error(`FULLSTRIPE_TEST_SEED=${seed}: ${error instanceof Error ? error.message : error}`, {
          cause: error,
        })
      }
    },
    60_000,
  )
})

async function run(rig: Rig, random: Random): Promise<void> {
  let model = Buffer.alloc(rig.size, rig.fill)
  rig.policy.moves = () => random.below(3) === 0
  const clients = await Promise.all([
    rig.connect('simple'),
    rig.connect('structured', { transport: 'tcp' }),
    rig.connect('extended'),
  ])
  for (let batch = 0; batch < 60; batch++) {
    const next = Buffer.from(model)
    const work = Array.from({ length: 1 + random.below(40) }, () => one(rig, random, clients, model, next))
    if (random.below(3) === 0) {
      const start = random.below(rig.stripes)
      rig.direct.clearRange(start, Math.min(rig.stripes, start + 1 + random.below(10)))
      work.push(rig.datapath.barrier())
    }
    await within(Promise.all(work), `batch ${batch}`, 20_000)
    model = next
    if (random.below(4) === 0) {
      const unitSize = rig.stripeSize * rig.formatUnit
      const unit = random.below(Math.ceil(rig.size / unitSize))
      await rig.policy.discard(unit)
      if (!rig.init.get(unit))
        model.fill(rig.fill, unit * unitSize, Math.min((unit + 1) * unitSize, rig.size))
    }
    if (batch % 20 === 19) {
      // Whole stripes more, so that what is formatted of the last one stays as it is.
      const grown = rig.tablesOfSize(rig.size + rig.stripeSize * (1 + random.below(5)))
      const retabled = rig.datapath.retable(rig.exportId, grown.tables)
      rig.use(grown)
      await retabled
      model = Buffer.concat([model, Buffer.alloc(rig.size - model.length, rig.fill)])
    }
  }
  for (const client of clients) expect((await client.read(0, rig.size)).equals(model)).toBe(true)
  const counters = rig.datapath.exportCounters(rig.exportId)
  expect(counters.errors).toBe(0)
  expect(counters.inPlaceWrites).toBeGreaterThan(0)
  expect(counters.fullStripeWrites).toBeGreaterThan(0)
}

/** One request of a batch: a change goes to `next`, if its place is not taken; a read is compared with both. */
function one(
  rig: Rig,
  random: Random,
  clients: readonly RigClient[],
  model: Buffer,
  next: Buffer,
): Promise<void> {
  const client = random.pick(clients)
  const length =
    1 + Math.min(random.below(2) === 0 ? random.below(3000) : random.below(200_000), rig.size - 1)
  const offset = random.below(rig.size - length + 1)
  const kind = random.pick(['read', 'read', 'write', 'write', 'write', 'trim', 'zero', 'flush'] as const)
  const flags = random.below(8) === 0 ? FLAG.FUA : 0
  if (kind === 'flush') return client.flush()
  if (kind === 'read') {
    return client.read(offset, length).then((data) => check(data, offset, model, next))
  }
  if (!model.subarray(offset, offset + length).equals(next.subarray(offset, offset + length))) {
    return client.flush() // the place is taken
  }
  if (kind === 'write') {
    const payload = changed(pattern(length, random.next()), model, offset)
    payload.copy(next, offset)
    return client.write(offset, payload, flags)
  }
  // Zeros may equal what is there, and then the place would look free: only one of them a batch and place.
  const zeros = Buffer.alloc(length)
  if (model.subarray(offset, offset + length).equals(zeros)) return client.flush()
  zeros.copy(next, offset)
  const command = kind === 'trim' ? CMD.TRIM : CMD.ZERO
  return client.request({ command, offset, length, flags }).then(({ errno }) => expect(errno).toBe(0))
}

/** The payload, made to differ from the model in every byte: so a place that is taken always shows. */
function changed(payload: Buffer, model: Buffer, offset: number): Buffer {
  for (let at = 0; at < payload.length; at++) {
    if (payload[at] === model[offset + at]) payload[at] = (payload[at]! + 1) & 0xff
  }
  return payload
}

function check(data: Buffer, offset: number, model: Buffer, next: Buffer): void {
  const before = model.subarray(offset, offset + data.length)
  const after = next.subarray(offset, offset + data.length)
  if (data.equals(before) || data.equals(after)) return
  for (let at = 0; at < data.length; at++) {
    if (data[at] !== before[at] && data[at] !== after[at]) {
      throw new Error(`byte ${offset + at} is ${data[at]}, neither ${before[at]} nor ${after[at]}`)
    }
  }
}
