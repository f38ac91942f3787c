/** GET /v1/openapi.json: OpenAPI 3.1, made of the schemas that the routes validate with. */
import type { FastifyInstance, RouteOptions } from 'fastify'
import { VERSION } from '../daemon/version.ts'
import { errorSchema, type Schema } from './schemas.ts'

declare module 'fastify' {
  interface FastifySchema {
    summary?: string
  }
}

/** Call it before the routes are added. */
export function describeRoutes(app: FastifyInstance): void {
  const routes: RouteOptions[] = []
  app.addHook('onRoute', (route) => {
    routes.push(route)
  })
  app.get('/v1/openapi.json', { schema: { summary: 'This document' } }, async () => openApiDocument(routes))
}

type Json = Readonly<Record<string, unknown>>

export function openApiDocument(routes: readonly RouteOptions[]): Json {
  const paths: Record<string, Record<string, Json>> = {}
  for (const route of routes) {
    const path = route.url.replaceAll(/:(\w+)/g, '{$1}')
    const operations = paths[path] ?? {}
    paths[path] = operations
    for (const method of [route.method].flat()) operations[method.toLowerCase()] = operation(route)
  }
  return {
    openapi: '3.1.0',
    info: {
      title: 'Fullstripe control API',
      version: VERSION,
      description: 'HTTP over the unix socket POOL/control.sock. Sizes and offsets are bytes.',
    },
    paths,
    components: { schemas: { Error: errorSchema } },
  }
}

function operation(route: RouteOptions): Json {
  const { schema } = route
  const parameters = [...parametersOf('path', schema?.params), ...parametersOf('query', schema?.querystring)]
  return {
    ...(schema?.summary === undefined ? {} : { summary: schema.summary }),
    ...(parameters.length === 0 ? {} : { parameters }),
    ...(schema?.body === undefined ? {} : { requestBody: requestBody(schema.body) }),
    responses: { ...responsesOf(schema?.response), default: errorResponse },
  }
}

function requestBody(schema: unknown): Json {
  const optional = isObjectSchema(schema) && [schema.type].flat().includes('null')
  return { required: !optional, content: jsonOf(schema) }
}

const errorResponse = {
  description: 'An error',
  content: jsonOf({ $ref: '#/components/schemas/Error' }),
}

function parametersOf(place: 'path' | 'query', schema: unknown): Json[] {
  if (!isObjectSchema(schema)) return []
  return Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const { description, ...rest } = property
    return { name, in: place, required: schema.required?.includes(name) === true, description, schema: rest }
  })
}

function responsesOf(response: unknown): Json {
  if (typeof response !== 'object' || response === null) return { '2XX': { description: 'Done' } }
  return Object.fromEntries(
    Object.entries(response).map(([status, schema]) => {
      const content = isContent(schema) ? schema.content : jsonOf(schema)
      return [
        status,
        { description: isObjectSchema(schema) ? (schema.description ?? 'Done') : 'Done', content },
      ]
    }),
  )
}

function jsonOf(schema: unknown): Json {
  return { 'application/json': { schema } }
}

function isObjectSchema(value: unknown): value is Schema {
  return typeof value === 'object' && value !== null && 'properties' in value
}

function isContent(value: unknown): value is { content: Json } {
  return typeof value === 'object' && value !== null && 'content' in value
}
