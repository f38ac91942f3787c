import { statSync } from 'node:fs'
import { request } from 'node:http'
import { join } from 'node:path'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { createApi, listenControl } from '../../src/api/server.ts'
import type { DensityInfo, EventList, MapPage, StatusInfo } from '../../src/api/types.ts'
import { AssertionError } from '../../src/base/assert.ts'
import { Client, volumePath } from '../../src/cli/client.ts'
import { resolveConfig } from '../../src/daemon/config.ts'
import { Daemon } from '../../src/daemon/daemon.ts'
import type { EventRecord } from '../../src/daemon/events.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { createPool, type PoolInfo } from '../../src/volume/pool.ts'
import type { VolumeInfo } from '../../src/volume/volume.ts'
import { temporaryDirectory } from '../support/daemon.ts'
import { until, within } from '../support/poll.ts'

const MiB = 1 << 20
const directory = temporaryDirectory()
const pool = join(directory.path, 'pool')
const control = join(pool, 'control.sock')
let daemon: Daemon
let client: Client

beforeAll(async () => {
  await createPool(pool, { capacity: 256 * MiB })
  daemon = await Daemon.start(resolveConfig(pool, { datapath: 'portable' }), pino({ level: 'silent' }))
  daemon.addFrontEnd(await listenControl(daemon))
  client = new Client(pool)
})
afterAll(async () => {
  await daemon.stop()
  directory.remove()
})

/** A request with any body, as no client of ours would make it. */
function raw(
  method: string,
  path: string,
  body?: string,
  type = 'application/json',
): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    const headers =
      body === undefined ? {} : { 'content-type': type, 'content-length': Buffer.byteLength(body) }
    const outgoing = request({ socketPath: control, method, path, headers, agent: false }, (response) => {
      let text = ''
      response.setEncoding('utf8')
      response.on('data', (chunk: string) => {
        text += chunk
      })
      response.on('end', () => resolve({ status: response.statusCode ?? 0, text }))
    })
    outgoing.once('error', reject)
    outgoing.end(body)
  })
}

const create = (name: string, size: number, more: object = {}) =>
  client.post<VolumeInfo>('/v1/volumes', { name, size, ...more })

async function write(name: string, offset: number, length: number): Promise<void> {
  const nbd = await NbdClient.connect(
    `nbd+unix:///${encodeURIComponent(name)}?socket=${join(pool, 'nbd.sock')}`,
  )
  for (let at = 0; at < length; at += 65536) await nbd.write(Buffer.alloc(65536, 1), offset + at)
  await nbd.close()
}

describe('the control API', () => {
  it('listens on a socket that only its owner may use', () => {
    const { mode } = statSync(control)
    expect(mode & 0o777).toBe(0o600)
  })

  it.each([
    ['silent', 'silent'],
    ['error', 'error'],
    ['warn', 'warn'],
    ['debug', 'warn'],
  ])('logs no more than the daemon does (%s)', async (level, expected) => {
    const before = daemon.log.level
    daemon.log.level = level
    const app = createApi(daemon)
    expect(app.log.level).toBe(expected)
    await app.close()
    daemon.log.level = before
  })

  it('answers with every field the daemon has', async () => {
    await create('fields', MiB, { provision: 'thick' })
    const status = await client.get<StatusInfo>('/v1/status')
    const volume = daemon.pool.volume('fields').info()
    expect(status.volumes.find(({ name }) => name === 'fields')).toEqual(JSON.parse(JSON.stringify(volume)))
    expect(await client.get<VolumeInfo>(volumePath('fields'))).toEqual(JSON.parse(JSON.stringify(volume)))
    const { fileSystemAvailable: _, ...info } = daemon.pool.info()
    expect(await client.get<PoolInfo>('/v1/pool')).toMatchObject(info)
    expect(Object.keys(await client.get<PoolInfo>('/v1/pool')).sort()).toEqual(
      Object.keys(daemon.pool.info()).sort(),
    )
    expect(status).toMatchObject({
      state: 'serving',
      pid: process.pid,
      listen: daemon.listening,
      link: null,
      datapath: daemon.pool.datapath.description,
      members: daemon.pool.datapath.memberCounters(),
    })
    expect(Date.parse(status.now)).toBeGreaterThanOrEqual(Date.parse(status.started))
    await client.delete(volumePath('fields'))
  })

  it('creates, lists, shows, renames, resizes and deletes volumes', async () => {
    const created = await create('first', 10 * MiB, { fill: 7, formatUnit: 2 })
    expect(created).toMatchObject({
      name: 'first',
      size: 10 * MiB,
      provision: 'thin',
      fill: 7,
      formatUnit: 2,
      readOnly: false,
    })
    await expect(create('first', MiB)).rejects.toMatchObject({ code: 'EXISTS' })
    const renamed = await client.patch<VolumeInfo>(volumePath('first'), { name: 'änderung 1' })
    expect(renamed).toMatchObject({ name: 'änderung 1', uuid: created.uuid })
    const { volumes } = await client.get<{ volumes: VolumeInfo[] }>('/v1/volumes')
    expect(volumes.map(({ name }) => name)).toEqual(['änderung 1'])
    const path = volumePath('änderung 1')
    expect(await client.post<VolumeInfo>(`${path}/resize`, { size: 20 * MiB })).toMatchObject({
      size: 20 * MiB,
    })
    await expect(client.post(`${path}/resize`, { size: MiB })).rejects.toMatchObject({ code: 'REFUSED' })
    expect(await client.post<VolumeInfo>(`${path}/resize`, { size: MiB, force: true })).toMatchObject({
      size: MiB,
    })
    await client.delete(path)
    await expect(client.get(path)).rejects.toMatchObject({ code: 'NOT_FOUND' })
  })

  it('says where a created volume is', async () => {
    const body = JSON.stringify({ name: 'a b', size: MiB })
    const location = await new Promise((resolve, reject) => {
      const headers = { 'content-type': 'application/json', 'content-length': body.length }
      request(
        { socketPath: control, method: 'POST', path: '/v1/volumes', headers, agent: false },
        (response) => {
          response.resume()
          resolve(response.headers.location)
        },
      )
        .once('error', reject)
        .end(body)
    })
    expect(location).toBe('/v1/volumes/a%20b')
    expect(await client.get<VolumeInfo>(String(location))).toMatchObject({ name: 'a b' })
    await client.delete(String(location))
  })

  it('does not delete under a client, unless forced', async () => {
    await create('held', MiB)
    const nbd = await NbdClient.connect(`nbd+unix:///held?socket=${join(pool, 'nbd.sock')}`)
    await until(() => daemon.pool.volume('held').info().sessions === 1, 'a session')
    await expect(client.delete(volumePath('held'))).rejects.toMatchObject({ code: 'BUSY' })
    await client.delete(volumePath('held', '?force=true'))
    await within(nbd.gone, 'the client is disconnected')
  })

  it('maps what is formatted, in pages that join', async () => {
    await create('mapped', 4 * MiB)
    const stripe = 65536
    for (const index of [0, 1, 5, 9, 10, 63]) await write('mapped', index * stripe, stripe)
    const whole = await client.get<MapPage>(volumePath('mapped', '/map'))
    expect(whole).toMatchObject({ name: 'mapped', size: 4 * MiB, offset: 0, next: null })
    const expected = [
      [0, 2, true],
      [2, 3, false],
      [5, 1, true],
      [6, 3, false],
      [9, 2, true],
      [11, 52, false],
      [63, 1, true],
    ].map(([at, count, formatted]) => ({
      offset: Number(at) * stripe,
      length: Number(count) * stripe,
      formatted,
    }))
    expect(whole.extents).toEqual(expected)
    const paged = []
    for (let offset: number | null = 0; offset !== null; ) {
      const page: MapPage = await client.get<MapPage>(volumePath('mapped', `/map?offset=${offset}&limit=2`))
      expect(page.extents.length).toBeLessThanOrEqual(2)
      paged.push(...page.extents)
      offset = page.next
    }
    expect(paged).toEqual(expected)
    const part = await client.get<MapPage>(
      volumePath('mapped', `/map?offset=${stripe + 4096}&length=${4 * stripe}`),
    )
    expect(part.extents).toEqual([
      { offset: stripe + 4096, length: stripe - 4096, formatted: true },
      { offset: 2 * stripe, length: 3 * stripe, formatted: false },
      { offset: 5 * stripe, length: 4096, formatted: true },
    ])
    const density = await client.get<DensityInfo>(volumePath('mapped', '/density?cells=4'))
    expect(density.cells).toEqual([5 / 16, 0, 0, 1 / 16])
    await expect(client.get(volumePath('mapped', `/map?offset=${5 * MiB}`))).rejects.toMatchObject({
      code: 'USAGE',
    })
    await client.delete(volumePath('mapped'))
  })

  it('starts and pauses the formatter of a thick volume, and refuses it for a thin one', async () => {
    await create('thin', MiB)
    await expect(client.post(volumePath('thin', '/format'), {})).rejects.toMatchObject({ code: 'REFUSED' })
    await create('thick', 64 * MiB, { provision: 'thick' })
    const started = await client.post<VolumeInfo>(volumePath('thick', '/format'), { rate: 2 * MiB })
    expect(started.formatter).toMatchObject({ state: 'running', rate: 2 * MiB })
    const paused = await client.delete<VolumeInfo>(volumePath('thick', '/format'))
    expect(paused.formatter.state).toBe('paused')
    expect(paused.formatter.done).toBeLessThan(paused.formatter.total)
    await client.post<VolumeInfo>(volumePath('thick', '/format'), { rate: null })
    await until(async () => {
      const { formatter } = await client.get<VolumeInfo>(volumePath('thick'))
      return formatter.state === 'done' && formatter.done === formatter.total
    }, 'the volume is formatted')
    for (const name of ['thin', 'thick']) await client.delete(volumePath(name))
  })

  it('keeps events and streams them', async () => {
    const since = (await client.get<StatusInfo>('/v1/status')).nextEvent
    const stop = new AbortController()
    const seen: EventRecord[] = []
    const followed = (async () => {
      for await (const event of client.lines<EventRecord>(
        `/v1/events?since=${since}&follow=true`,
        stop.signal,
      )) {
        seen.push(event)
        if (seen.length === 2) stop.abort()
      }
    })()
    await create('watched', MiB)
    await client.delete(volumePath('watched'))
    await within(followed, 'both events')
    expect(seen.map(({ kind, object, sequence }) => [kind, object, sequence])).toEqual([
      ['volume.created', 'watched', since],
      ['volume.deleted', 'watched', since + 1],
    ])
    const list = await client.get<EventList>(`/v1/events?since=${since}&limit=1`)
    expect(list.events).toEqual(seen.slice(0, 1))
    expect(list.next).toBe(since + 1)
  })

  it('forgets a follower that hung up', async () => {
    // Both ends are in this process: sockets of followers would pile up.
    const connections = () => process.getActiveResourcesInfo().filter((kind) => kind === 'PipeWrap').length
    const before = connections()
    for (let round = 0; round < 20; round++) {
      const stop = new AbortController()
      const lines = client.lines<EventRecord>('/v1/events?since=1&follow=true', stop.signal)
      await lines.next()
      stop.abort()
      await lines.return(undefined)
    }
    await until(() => connections() <= before, 'connections are gone')
  })

  it('describes itself in OpenAPI 3.1', async () => {
    interface Operation {
      parameters?: { name: string; in: string }[]
      requestBody?: object
    }
    interface OpenApi {
      openapi: string
      paths: Record<string, { get?: Operation; post?: Operation }>
    }
    const document = await client.get<OpenApi>('/v1/openapi.json')
    expect(document.openapi).toBe('3.1.0')
    expect(Object.keys(document.paths).sort()).toEqual([
      '/metrics',
      '/v1/events',
      '/v1/mirrors',
      '/v1/openapi.json',
      '/v1/peers',
      '/v1/peers/{peer}',
      '/v1/pool',
      '/v1/status',
      '/v1/volumes',
      '/v1/volumes/{name}',
      '/v1/volumes/{name}/density',
      '/v1/volumes/{name}/format',
      '/v1/volumes/{name}/map',
      '/v1/volumes/{name}/mirrors',
      '/v1/volumes/{name}/mirrors/{mirror}',
      '/v1/volumes/{name}/mirrors/{mirror}/demote',
      '/v1/volumes/{name}/mirrors/{mirror}/density',
      '/v1/volumes/{name}/mirrors/{mirror}/map',
      '/v1/volumes/{name}/mirrors/{mirror}/pause',
      '/v1/volumes/{name}/mirrors/{mirror}/promote',
      '/v1/volumes/{name}/mirrors/{mirror}/resolve',
      '/v1/volumes/{name}/mirrors/{mirror}/resume',
      '/v1/volumes/{name}/mirrors/{mirror}/verify',
      '/v1/volumes/{name}/resize',
      '/v1/volumes/{name}/suspects',
    ])
    expect(Object.keys(document.paths['/v1/volumes/{name}'] ?? {}).sort()).toEqual(['delete', 'get', 'patch'])
    const map = document.paths['/v1/volumes/{name}/map']?.get
    expect(map?.parameters?.map((parameter) => `${parameter.in} ${parameter.name}`)).toEqual([
      'path name',
      'query offset',
      'query length',
      'query limit',
    ])
    expect(document.paths['/v1/volumes']?.post?.requestBody).toBeDefined()
  })

  it('has metrics that Prometheus can read', async () => {
    await create('a "quoted\\ name', MiB)
    const { status, text } = await raw('GET', '/metrics')
    expect(status).toBe(200)
    expect(text).toContain('fullstripe_volume_size_bytes{volume="a \\"quoted\\\\ name"} 1048576\n')
    const types = new Map<string, string>()
    for (const line of text.trimEnd().split('\n')) {
      const type = /^# TYPE (\S+) (gauge|counter)$/.exec(line)
      if (type !== null) types.set(String(type[1]), String(type[2]))
      if (line.startsWith('#')) continue
      const sample = /^([a-z_]+)(\{.*\})? (-?[0-9.e+]+)$/.exec(line)
      expect(sample, line).not.toBeNull()
      const name = String(sample?.[1])
      expect(types.has(name), name).toBe(true)
      expect(name.endsWith('_total'), name).toBe(types.get(name) === 'counter')
    }
    await client.delete(volumePath('a "quoted\\ name'))
  })
})

describe('bad input to the control API', () => {
  const name = 'x'
  it.each([
    ['a size of zero', { name, size: 0 }, 400, /size/],
    ['a negative size', { name, size: -512 }, 400, /size/],
    ['an unaligned size', { name, size: 513 }, 400, /512/],
    ['a fraction of a byte', { name, size: 512.5 }, 400, /integer/],
    ['a size beyond all limits', { name, size: 2 ** 60 }, 400, /size/],
    ['text for a size', { name, size: '1G' }, 400, /size must be integer/],
    ['null for a size', { name, size: null }, 400, /size must be integer/],
    ['no size', { name }, 400, /size/],
    ['no name', { size: MiB }, 400, /name/],
    ['an empty name', { name: '', size: MiB }, 400, /name/],
    ['a name with /', { name: 'a/b', size: MiB }, 400, /name/],
    ['a name with @', { name: 'a@b', size: MiB }, 400, /name/],
    ['a name with a control character', { name: 'a\u0007b', size: MiB }, 400, /name/],
    ['a name with a line break', { name: 'a\nb', size: MiB }, 400, /name/],
    ['a name of 256 bytes', { name: 'n'.repeat(256), size: MiB }, 400, /255/],
    ['a name of 255 characters and 510 bytes', { name: 'ä'.repeat(255), size: MiB }, 400, /255/],
    ['another provisioning', { name, size: MiB, provision: 'fat' }, 400, /provision/],
    ['a fill byte of 256', { name, size: MiB, fill: 256 }, 400, /fill/],
    ['a format unit of 0', { name, size: MiB, formatUnit: 0 }, 400, /unit/],
    ['an unknown property', { name, size: MiB, colour: 'red' }, 400, /additional properties|colour/],
    ['a list', [], 400, /object/],
    [
      'a thick volume larger than the pool',
      { name, size: 2 ** 40, provision: 'thick' },
      500,
      /contiguous|free/,
    ],
  ])('%s is refused', async (_, body, status, message) => {
    const answer = await raw('POST', '/v1/volumes', JSON.stringify(body))
    expect({ status: answer.status, text: answer.text }).toMatchObject({
      status,
      text: expect.stringMatching(message),
    })
    const { error } = JSON.parse(answer.text)
    expect(Object.keys(error).sort()).toEqual(['code', 'message'])
    expect(error.message).not.toContain('\n')
    expect(daemon.pool.volumes()).toEqual([])
  })

  it.each([
    ['JSON cut short', 'POST', '/v1/volumes', '{"name":', 400, 'USAGE'],
    ['no JSON at all', 'POST', '/v1/volumes', 'size=1G', 400, 'USAGE'],
    [
      'a body that is too large',
      'POST',
      '/v1/volumes',
      JSON.stringify({ name: 'x'.repeat(100_000) }),
      413,
      'USAGE',
    ],
    ['an unknown route', 'GET', '/v2/volumes', undefined, 404, 'NOT_FOUND'],
    ['an unknown method', 'PUT', '/v1/volumes', '{}', 404, 'NOT_FOUND'],
    ['an unknown volume', 'GET', '/v1/volumes/none', undefined, 404, 'NOT_FOUND'],
    ['a broken escape', 'GET', '/v1/volumes/%ZZ', undefined, 400, 'USAGE'],
    ['an unknown query', 'GET', '/v1/events?sinse=1', undefined, 400, 'USAGE'],
    ['text for a number', 'GET', '/v1/events?since=now', undefined, 400, 'USAGE'],
    ['event 0', 'GET', '/v1/events?since=0', undefined, 400, 'USAGE'],
    ['too many cells', 'GET', '/v1/volumes/none/density?cells=1000000', undefined, 400, 'USAGE'],
  ])('%s is answered with an error', async (_, method, path, body, status, code) => {
    const answer = await raw(method, path, body)
    expect(answer.status).toBe(status)
    expect(JSON.parse(answer.text)).toMatchObject({ error: { code } })
  })

  it('form data is refused', async () => {
    const answer = await raw('POST', '/v1/volumes', 'name=x', 'application/x-www-form-urlencoded')
    expect(answer.status).toBe(415)
    expect(JSON.parse(answer.text)).toMatchObject({ error: { code: 'USAGE' } })
  })
})

it('a failed assertion reaches the process', async () => {
  const original = daemon.pool.info
  const thrown = new Promise<unknown>((resolve) => {
    // The test runner listens too and would fail the run: stand in for it, once.
    const others = process.listeners('uncaughtException')
    process.removeAllListeners('uncaughtException')
    process.once('uncaughtException', (error) => {
      for (const listener of others) process.on('uncaughtException', listener)
      resolve(error)
    })
  })
  daemon.pool.info = () => {
    throw new AssertionError('a table is wrong')
  }
  const answer = await raw('GET', '/v1/pool')
  daemon.pool.info = original
  expect(answer.status).toBe(500)
  expect(await within(thrown, 'the error gets out')).toBeInstanceOf(AssertionError)
})
