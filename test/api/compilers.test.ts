import { SerializerSelector } from '@fastify/fast-json-stringify-compiler'
import { fastify } from 'fastify'
import { pino } from 'pino'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { compilersFactory } from '../../src/api/compilers.ts'
import { createApi } from '../../src/api/server.ts'
import { resolveConfig } from '../../src/daemon/config.ts'
import { Daemon } from '../../src/daemon/daemon.ts'
import { createPool } from '../../src/volume/pool.ts'
import { temporaryDirectory } from '../support/daemon.ts'

describe('code for a route', () => {
  it('is made for its first request, and checks and writes as the schema says', async () => {
    const made: string[] = []
    const named = (name: string, schema: object) =>
      Object.defineProperty({ ...schema }, 'properties', {
        enumerable: true,
        get: () => {
          made.push(name)
          return { value: { type: 'integer' } }
        },
      })
    const object = { type: 'object', required: ['value'], additionalProperties: false }
    const app = fastify({
      ajv: { customOptions: { coerceTypes: false } },
      schemaController: { compilersFactory },
    })
    for (const path of ['/one', '/other']) {
      const schema = { body: named(`${path} asks`, object), response: { 200: named(`${path} says`, object) } }
      app.post(path, { schema }, async ({ body }) => Object.assign({ secret: true }, body))
    }
    await app.ready()
    made.length = 0 // what Fastify itself looked at
    const post = async (payload: object) => app.inject({ method: 'POST', url: '/one', payload })
    const refused = await post({ value: 'text' })
    expect([refused.statusCode, refused.json()['message']]).toEqual([400, 'body/value must be integer'])
    expect(new Set(made)).toEqual(new Set(['/one asks']))
    const taken = await post({ value: 7 })
    expect([taken.statusCode, taken.body]).toEqual([200, '{"value":7}'])
    expect(new Set(made)).toEqual(new Set(['/one asks', '/one says']))
    expect((await post({ value: true })).json()['message']).toBe('body/value must be integer')
    expect((await post({ value: 8 })).body).toBe('{"value":8}')
    await app.close()
  })
})

describe('of every route of the API', () => {
  const directory = temporaryDirectory()
  let daemon: Daemon
  beforeAll(async () => {
    await createPool(`${directory.path}/pool`, { capacity: 16 << 20 })
    daemon = await Daemon.start(
      resolveConfig(`${directory.path}/pool`, { datapath: 'portable' }),
      pino({ level: 'silent' }),
    )
  })
  afterAll(async () => {
    await daemon.stop()
    directory.remove()
  })

  interface Operation {
    requestBody?: object
    responses: Record<string, { content?: Record<string, { schema: object }> }>
  }
  it('the schemas are good: requests are judged, answers could be written', async () => {
    const app = createApi(daemon)
    const { paths } = (await app.inject('/v1/openapi.json')).json<{
      paths: Record<string, Record<string, Operation>>
    }>()
    const serializer = SerializerSelector()()
    let answers = 0
    for (const [path, operations] of Object.entries(paths)) {
      const url = path.replaceAll(/\{\w+\}/g, 'nothing')
      for (const [method, { requestBody, responses }] of Object.entries(operations)) {
        const { statusCode, body } = await app.inject({
          method: method.toUpperCase() as 'GET',
          url,
          ...(requestBody === undefined ? {} : { payload: { no: 'such' } }),
        })
        expect(statusCode, `${method} ${url}: ${body}`).toBeLessThan(500)
        for (const [httpStatus, { content }] of Object.entries(responses)) {
          const schema = content?.['application/json']?.schema
          if (schema === undefined || httpStatus === 'default') continue
          expect(serializer({ method, url, httpStatus, schema }), url).toBeTypeOf('function')
          answers++
        }
      }
    }
    expect(answers).toBeGreaterThan(20)
    await app.close()
  })
})
