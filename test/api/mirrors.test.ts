import { join } from 'node:path'
import { type FastifyInstance, fastify } from 'fastify'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { metricsText } from '../../src/api/metrics.ts'
import { extentPage } from '../../src/api/pages.ts'
import { statusOf } from '../../src/api/pool.ts'
import * as schemas from '../../src/api/schemas.ts'
import { createApi } from '../../src/api/server.ts'
import { UserError } from '../../src/base/errors.ts'
import { resolveConfig } from '../../src/daemon/config.ts'
import { Daemon } from '../../src/daemon/daemon.ts'
import { MIRROR_STATES } from '../../src/mirror/state.ts'
import type { CopyExtent, MirrorControl, MirrorInfo } from '../../src/mirror/types.ts'
import { createPool } from '../../src/volume/pool.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { MIRROR } from '../support/mirror-sample.ts'

const directory = temporaryDirectory()
let daemon: Daemon
let app: FastifyInstance

/** Refuses, and tells with what it was called: so a request that gets this far was not refused by its schema, and went the right way. */
function called(method: string) {
  return (...args: unknown[]): never => {
    throw new UserError('BUSY', `${method} ${JSON.stringify(args)}`)
  }
}
const refusing: MirrorControl = {
  peers: { list: called('peers'), forget: called('forget') },
  list: () => [],
  show: called('show'),
  add: called('add'),
  change: called('change'),
  pause: called('pause'),
  resume: called('resume'),
  remove: called('remove'),
  promote: called('promote'),
  demote: called('demote'),
  resolve: called('resolve'),
  verify: called('verify'),
  copyExtents: called('copyExtents'),
  copyDensity: called('copyDensity'),
}

beforeAll(async () => {
  const pool = join(directory.path, 'pool')
  await createPool(pool, { capacity: 2 ** 26 })
  daemon = await Daemon.start(resolveConfig(pool, { datapath: 'portable' }), pino({ level: 'silent' }))
  app = createApi(daemon, refusing)
})
afterAll(async () => {
  await app.close()
  await daemon.stop()
  directory.remove()
})

type Method = 'GET' | 'POST' | 'PATCH' | 'DELETE'

async function answer(
  method: Method,
  url: string,
  body?: unknown,
): Promise<{ status: number; message: string }> {
  const payload =
    body === undefined
      ? {}
      : { payload: JSON.stringify(body), headers: { 'content-type': 'application/json' } }
  const { statusCode, body: text } = await app.inject({ method, url, ...payload })
  const { error } = JSON.parse(text)
  return { status: statusCode, message: `${error.code}: ${error.message}` }
}

describe('requests about mirrors', () => {
  const all = '/v1/volumes/data/mirrors'
  const one = `${all}/site-b`

  const full = {
    peer: 'b:1',
    name: 'n',
    target: 't',
    mode: 'sync',
    init: 'full',
    intervalMs: 0,
    onLoss: 'block',
    rate: null,
  }
  const named = ['data', 'site-b']

  it.each([
    ['POST', all, { peer: 'b:1' }, 'add', [{ peer: 'b:1', volume: 'data' }]],
    ['POST', all, full, 'add', [{ ...full, volume: 'data' }]],
    ['GET', one, undefined, 'show', named],
    ['GET', `${all}/nbd%3A%2F%2Fx%2Fä`, undefined, 'show', ['data', 'nbd://x/ä']],
    ['PATCH', one, { rate: 1 }, 'change', [...named, { rate: 1 }]],
    ['DELETE', one, undefined, 'remove', named],
    ['POST', `${one}/pause`, undefined, 'pause', named],
    ['POST', `${one}/resume`, {}, 'resume', named],
    ['POST', `${one}/promote`, undefined, 'promote', [...named, {}]],
    ['POST', `${one}/promote`, { force: true }, 'promote', [...named, { force: true }]],
    ['POST', `${one}/demote`, { force: false }, 'demote', [...named, { force: false }]],
    ['POST', `${one}/verify`, undefined, 'verify', [...named, {}]],
    ['POST', `${one}/verify`, { repair: true }, 'verify', [...named, { repair: true }]],
    ['POST', `${one}/resolve`, { discard: 'local' }, 'resolve', [...named, 'local']],
    ['GET', `${one}/map?offset=0&length=4096&limit=1`, undefined, 'show', named],
    ['GET', `${one}/density?cells=1`, undefined, 'show', named],
    ['GET', '/v1/peers', undefined, 'peers', []],
    ['DELETE', '/v1/peers/site%20b', undefined, 'forget', ['site b']],
  ] as const)('%s %s %j is passed on', async (method, path, body, call, args) => {
    const { status, message } = await answer(method, path, body)
    expect(status).toBe(409)
    const [, name, text = ''] = /^BUSY: (\w+) (.*)$/.exec(message) ?? []
    expect([name, JSON.parse(text)]).toEqual([call, args])
  })

  it.each([
    ['no peer', 'POST', all, {}, /required property 'peer'/],
    ['an empty peer', 'POST', all, { peer: '' }, /peer must NOT have fewer than 1/],
    ['a number for the peer', 'POST', all, { peer: 10810 }, /peer must be string/],
    ['an empty name', 'POST', all, { peer: 'b:1', name: '' }, /name must NOT have fewer than 1/],
    ['another mode', 'POST', all, { peer: 'b:1', mode: 'semi' }, /mode must be equal to one of/],
    ['another way to begin', 'POST', all, { peer: 'b:1', init: 'seed' }, /init must be equal to one of/],
    ['another loss', 'POST', all, { peer: 'b:1', onLoss: 'stop' }, /onLoss must be equal to one of/],
    ['a negative interval', 'POST', all, { peer: 'b:1', intervalMs: -1 }, /intervalMs must be >= 0/],
    ['half a millisecond', 'POST', all, { peer: 'b:1', intervalMs: 0.5 }, /intervalMs must be integer/],
    ['text for the interval', 'POST', all, { peer: 'b:1', intervalMs: '5s' }, /intervalMs must be integer/],
    ['a rate of nothing', 'POST', all, { peer: 'b:1', rate: 0 }, /rate must be >= 1/],
    ['a volume in the body', 'POST', all, { peer: 'b:1', volume: 'x' }, /additional properties/],
    ['no change', 'PATCH', one, {}, /fewer than 1 properties/],
    ['a change of what cannot change', 'PATCH', one, { init: 'full' }, /additional properties/],
    ['text for a flag', 'POST', `${one}/promote`, { force: 'yes' }, /force must be boolean/],
    ['an unknown property', 'POST', `${one}/verify`, { fix: true }, /additional properties/],
    ['no side', 'POST', `${one}/resolve`, {}, /required property 'discard'/],
    ['nobody to resolve it', 'POST', `${one}/resolve`, undefined, /body must be object/],
    ['another side', 'POST', `${one}/resolve`, { discard: 'both' }, /discard must be equal to one of/],
    ['too many extents', 'GET', `${one}/map?limit=10001`, undefined, /limit must be <= 10000/],
    ['an unknown query', 'GET', `${one}/map?start=1`, undefined, /additional properties/],
    ['no cells', 'GET', `${one}/density?cells=0`, undefined, /cells must be >= 1/],
  ] as const)('%s is refused', async (_, method, path, body, message) => {
    expect(await answer(method, path, body)).toEqual({
      status: 400,
      message: expect.stringMatching(message),
    })
  })

  it('a volume that is not there has no mirrors', async () => {
    expect(await answer('GET', '/v1/volumes/none/mirrors')).toMatchObject({
      status: 404,
      message: expect.stringMatching(/^NOT_FOUND: .*none/),
    })
  })

  it('are in the OpenAPI document', async () => {
    interface Operation {
      requestBody?: { required: boolean }
    }
    const { paths } = (await app.inject('/v1/openapi.json')).json<{
      paths: Record<string, Record<string, Operation>>
    }>()
    const at = '/v1/volumes/{name}/mirrors'
    const operations = Object.entries(paths)
      .filter(([path]) => path.includes('mirrors'))
      .map(([path, methods]) => [path, Object.keys(methods).sort().join(' ')])
    expect(Object.fromEntries(operations)).toEqual({
      '/v1/mirrors': 'get',
      [at]: 'get post',
      [`${at}/{mirror}`]: 'delete get patch',
      [`${at}/{mirror}/density`]: 'get',
      [`${at}/{mirror}/demote`]: 'post',
      [`${at}/{mirror}/map`]: 'get',
      [`${at}/{mirror}/pause`]: 'post',
      [`${at}/{mirror}/promote`]: 'post',
      [`${at}/{mirror}/resolve`]: 'post',
      [`${at}/{mirror}/resume`]: 'post',
      [`${at}/{mirror}/verify`]: 'post',
    })
    expect(paths[at]?.['post']?.requestBody?.required).toBe(true)
    expect(paths[`${at}/{mirror}/promote`]?.['post']?.requestBody?.required).toBe(false)
  })
})

describe('what is told of a mirror', () => {
  const bare: MirrorInfo = {
    ...MIRROR,
    address: null,
    rate: null,
    reason: null,
    progress: null,
    remote: null,
    verify: null,
    lag: { bytes: 0, seconds: null },
  }

  /** The schema is also the serializer: what it does not name would not be answered. */
  it.each([
    ['everything', MIRROR],
    ['as little as there can be', bare],
    ['a comparison that runs', { ...MIRROR, verify: { ...MIRROR.verify, ended: null, failure: 'no' } }],
    ['work of unknown length', { ...MIRROR, progress: { ...MIRROR.progress, remainingMs: null } }],
  ])('%s', async (_, info) => {
    const teller = fastify()
    teller.get('/', { schema: { response: { 200: schemas.mirrorSchema } } }, async () => info)
    expect((await teller.inject('/')).json()).toEqual(info)
    await teller.close()
  })

  it('metrics: a state of its own for each, and nothing where nothing is known', () => {
    const status = {
      ...statusOf(daemon, refusing),
      mirrors: [MIRROR, { ...bare, name: 'c', state: 'insync' as const }],
    }
    const lines = metricsText(status, { user: 0, system: 0 }).split('\n')
    const samples = lines.filter((line) => line.startsWith('fullstripe_mirror_'))
    const labels = (name: string) => `{volume="data",mirror="${name}",role="primary"}`
    expect(samples.filter((line) => /_state\{.*\} 1$/.test(line))).toEqual([
      'fullstripe_mirror_state{volume="data",mirror="site-b",role="primary",state="copying"} 1',
      'fullstripe_mirror_state{volume="data",mirror="c",role="primary",state="insync"} 1',
    ])
    expect(samples.filter((line) => line.includes('_state{')).length).toBe(2 * MIRROR_STATES.length)
    expect(samples).toContain(`fullstripe_mirror_lag_bytes${labels('site-b')} 3145728`)
    expect(samples.filter((line) => line.includes('_lag_seconds{'))).toEqual([
      `fullstripe_mirror_lag_seconds${labels('site-b')} 2.5`,
    ])
    expect(samples).toContain(`fullstripe_mirror_progress_ratio${labels('site-b')} 0.25`)
    const counters = samples.filter((line) => line.includes('_total{volume="data",mirror="site-b"'))
    expect(counters.map((line) => Number(line.split(' ').at(-1)))).toEqual(Object.values(MIRROR.counters))
    for (const line of counters) expect(lines).toContain(`# TYPE ${line.replace(/\{.*/, '')} counter`)
    expect(metricsText(statusOf(daemon, refusing), { user: 0, system: 0 })).not.toContain('fullstripe_mirror')
  })
})

describe('pages of a copy bitmap', () => {
  const unit = 65536
  /** Of every third unit the secondary lacks the content. */
  const source = {
    volume: 'data',
    size: 10 * unit,
    *extents(offset: number, length: number): Generator<CopyExtent> {
      const end = offset + length
      for (let at = offset; at < end; ) {
        const index = Math.floor(at / unit)
        const copied = index % 3 !== 0
        const stop = Math.min(end, (copied ? index - (index % 3) + 3 : index + 1) * unit)
        yield { offset: at, length: stop - at, copied }
        at = stop
      }
    },
  }

  it('join without a seam, whatever their length', () => {
    const whole = extentPage(source, { offset: 0, limit: 100 })
    expect(whole.next).toBeNull()
    expect(whole.extents.length).toBe(7)
    for (let limit = 1; limit <= 8; limit++) {
      const joined: CopyExtent[] = []
      for (let offset: number | null = 0; offset !== null; ) {
        const page: { extents: readonly CopyExtent[]; next: number | null } = extentPage(source, {
          offset,
          limit,
        })
        expect(page.extents.length).toBeLessThanOrEqual(limit)
        joined.push(...page.extents)
        offset = page.next
      }
      expect(joined).toEqual(whole.extents)
    }
  })

  it('are cut where they were asked to end, and empty at the end', () => {
    const page = extentPage(source, { offset: 512, length: unit, limit: 100 })
    expect(page).toMatchObject({ offset: 512, next: null })
    expect(page.extents).toEqual([
      { offset: 512, length: unit - 512, copied: false },
      { offset: unit, length: 512, copied: true },
    ])
    expect(extentPage(source, { offset: 10 * unit, limit: 1 })).toMatchObject({ extents: [], next: null })
    expect(() => extentPage(source, { offset: 10 * unit + 1, limit: 1 })).toThrow(
      /past the end of volume data/,
    )
  })
})
