/**
 * GET /v1/events. With `follow` the answer is a stream of JSON lines. The stream holds one page at a time and
 * reads the next one when the client has taken it, so a client that stops reading costs nothing but its place.
 */
import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import type { Daemon } from '../daemon/daemon.ts'
import type { EventPage, EventRecord } from '../daemon/events.ts'
import { eventListSchema, eventsQuery } from './schemas.ts'

interface Query {
  since: number
  limit: number
  follow?: boolean
}

export function eventRoutes(app: FastifyInstance, daemon: Daemon): void {
  app.get<{ Querystring: Query }>(
    '/v1/events',
    {
      schema: {
        summary: 'What happened, oldest first; with follow=true a stream of JSON lines',
        querystring: eventsQuery,
        response: { 200: { content: { 'application/json': { schema: eventListSchema } } } },
      },
    },
    async (request, reply) => {
      const { since, limit, follow } = request.query
      if (follow !== true) return daemon.events.page(since, limit)
      const gone = new AbortController()
      reply.raw.once('close', () => gone.abort())
      const lines = Readable.from(eventLines(daemon.events.follow(since, gone.signal)), { objectMode: false })
      return reply.type('application/x-ndjson').send(lines)
    },
  )
}

async function* eventLines(pages: AsyncIterable<EventPage>): AsyncGenerator<string> {
  for await (const page of pages) {
    const records: EventRecord[] = page.missed > 0 ? [missed(page)] : []
    records.push(...page.events)
    yield records.map((record) => `${JSON.stringify(record)}\n`).join('')
  }
}

function missed(page: EventPage): EventRecord {
  const first = page.events[0]
  return {
    sequence: (first?.sequence ?? page.next) - 1,
    time: first?.time ?? new Date().toISOString(),
    level: 'warn',
    kind: 'events.missed',
    object: 'events',
    message: `${page.missed} events before this one are no longer kept`,
  }
}
