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

interface Batch {
  readonly model: Buffer // before it
  readonly next: Buffer // after it
  readonly taken: [start: number, end: number][] // what changes in it
}

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
    const changes: Batch = { model, next, taken: [] }
    const work = Array.from({ length: 1 + random.below(40) }, () => one(rig, random, clients, changes))
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
      await within(rig.policy.discard(unit), `discard after batch ${batch}`, 20_000)
      if (!rig.init.get(unit))
        model.fill(rig.fill, unit * unitSize, Math.min((unit + 1) * unitSize, rig.size))
    }
    if (batch % 20 === 19) {
      await within(grow(rig, rig.stripeSize * (1 + random.below(5))), `growth after batch ${batch}`, 20_000)
      model = Buffer.concat([model, Buffer.alloc(rig.size - model.length, rig.fill)])
    }
  }
  for (const client of clients) {
    expect((await within(client.read(0, rig.size), 'the last read', 20_000)).equals(model)).toBe(true)
  }
  const counters = rig.datapath.exportCounters(rig.exportId)
  expect(counters.errors).toBe(0)
  expect(counters.inPlaceWrites).toBeGreaterThan(0)
  expect(counters.fullStripeWrites).toBeGreaterThan(0)
}

/** Whole stripes more. Those that join a unit which is formatted already get slots that hold fill. */
async function grow(rig: Rig, bytes: number): Promise<void> {
  const from = Math.ceil(rig.size / rig.stripeSize)
  const grown = rig.tablesOfSize(rig.size + bytes)
  for (let stripe = from; stripe < grown.tables.slots.length; stripe++) {
    if (!grown.init.get(Math.floor(stripe / rig.formatUnit))) continue
    const slot = rig.policy.takeSlot()
    await rig.datapath.writeSlot(slot, 0, Buffer.alloc(rig.stripeSize, rig.fill))
    grown.tables.slots[stripe] = slot
  }
  const retabled = rig.datapath.retable(rig.exportId, grown.tables)
  rig.use(grown)
  await retabled
}

/** One request of a batch: a change goes to `next`, if its place is not taken; a read is compared with both. */
function one(rig: Rig, random: Random, clients: readonly RigClient[], batch: Batch): Promise<void> {
  const client = random.pick(clients)
  const length =
    1 + Math.min(random.below(2) === 0 ? random.below(3000) : random.below(200_000), rig.size - 1)
  const offset = random.below(rig.size - length + 1)
  const kind = random.pick(['read', 'read', 'write', 'write', 'write', 'trim', 'zero', 'flush'] as const)
  const flags = random.below(8) === 0 ? FLAG.FUA : 0
  const { model, next, taken } = batch
  if (kind === 'read') return client.read(offset, length).then((data) => check(data, offset, model, next))
  if (kind === 'flush' || taken.some(([start, end]) => start < offset + length && offset < end)) {
    return client.flush()
  }
  taken.push([offset, offset + length])
  if (kind === 'write') {
    const payload = pattern(length, random.next())
    payload.copy(next, offset)
    return client.write(offset, payload, flags)
  }
  next.fill(0, offset, offset + length)
  const command = kind === 'trim' ? CMD.TRIM : CMD.ZERO
  return client.request({ command, offset, length, flags }).then(({ errno }) => expect(errno).toBe(0))
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
