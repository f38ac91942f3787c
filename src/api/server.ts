/**
 * The control API: HTTP and JSON on the unix socket POOL/control.sock, mode 0600, so whoever may open the pool's
 * files may control it. A resource API; openapi.ts describes it at /v1/openapi.json.
 *
 * Requests are validated strictly: no value is converted (query strings excepted, which are all text), no unknown
 * property is dropped. The pool validates again, with better words.
 */
import type { Server } from 'node:http'
import {
  type FastifyBaseLogger,
  type FastifyInstance,
  type FastifyRequest,
  fastify,
  LogController,
} from 'fastify'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { Daemon, FrontEnd } from '../daemon/daemon.ts'
import { claimSocketPath } from '../daemon/socket-claim.ts'
import type { MirrorControl } from '../mirror/types.ts'
import { compilersFactory } from './compilers.ts'
import { controlPath } from './control-path.ts'
import { answerError, errorBody } from './errors.ts'
import { eventRoutes } from './events.ts'
import { metricsRoutes } from './metrics.ts'
import { mirrorRoutes } from './mirrors.ts'
import { describeRoutes } from './openapi.ts'
import { peerRoutes } from './peers.ts'
import { poolRoutes } from './pool.ts'
import type { Schema } from './schemas.ts'
import { volumeRoutes } from './volumes.ts'

/** The routes, not yet listening. */
export function createApi(daemon: Daemon, mirrors: MirrorControl = daemon.mirrors): FastifyInstance {
  // A child's level replaces its parent's, which may be less talkative.
  const level = daemon.log.isLevelEnabled('warn') ? 'warn' : daemon.log.level
  const loggerInstance: FastifyBaseLogger = daemon.log.child({ part: 'api' }, { level })
  const app = fastify({
    loggerInstance,
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: LIMITS.apiBodyBytesMax,
    exposeHeadRoutes: false,
    frameworkErrors: (error, request, reply) => answerError(error, request, reply),
    requestTimeout: 30_000,
    forceCloseConnections: true,
    routerOptions: { maxParamLength: 3 * LIMITS.volumeNameBytesMax },
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false, allowUnionTypes: true } },
    schemaController: { compilersFactory },
  })
  app.setErrorHandler((error, request, reply) => answerError(error, request, reply))
  app.setNotFoundHandler((request, reply) => {
    reply
      .code(404)
      .send(
        errorBody('NOT_FOUND', `no route ${request.method} ${request.url}; GET /v1/openapi.json lists them`),
      )
  })
  app.addHook('preValidation', async (request) => convertQuery(request))
  describeRoutes(app)
  poolRoutes(app, daemon, mirrors)
  volumeRoutes(app, daemon)
  mirrorRoutes(app, daemon, mirrors)
  peerRoutes(app, mirrors.peers)
  eventRoutes(app, daemon)
  metricsRoutes(app, daemon, mirrors)
  return app
}

/** The API on its socket. @throws UserError BUSY or EXISTS when something else is at its path, FAILED */
export async function listenControl(daemon: Daemon): Promise<FrontEnd> {
  const app = createApi(daemon)
  await app.ready()
  app.server.maxConnections = LIMITS.apiConnectionsMax
  const path = controlPath(daemon.config.pool)
  const claim = await claimSocketPath(path)
  try {
    await bind(app.server, claim.path)
  } catch (error) {
    claim.abandon()
    const reason = systemCode(error) ?? messageOf(error)
    throw new UserError('FAILED', `cannot listen on ${path}: ${reason}`, { cause: error })
  }
  return {
    close: async () => {
      await unbind(app)
      claim.release()
    },
  }
}

/** The socket is born with its mode: bind happens inside listen(), before anybody could connect. */
function bind(server: Server, path: string): Promise<void> {
  return new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    const umask = process.umask(0o177)
    try {
      server.listen({ path }, () => {
        server.off('error', reject)
        resolve()
      })
    } finally {
      process.umask(umask)
    }
  })
}

async function unbind(app: FastifyInstance): Promise<void> {
  const closed = new Promise<void>((resolve) => app.server.close(() => resolve()))
  // A request that is being answered may finish; streams end by themselves, idle connections now.
  app.server.closeIdleConnections()
  const deadline = setTimeout(() => app.server.closeAllConnections(), 1000)
  await closed
  clearTimeout(deadline)
  await app.close()
}

/** Query strings are text; a schema that wants a number or a boolean gets one, if that is what the text says. */
function convertQuery(request: FastifyRequest): void {
  const schema = request.routeOptions.schema?.querystring
  if (!isSchema(schema) || typeof request.query !== 'object' || request.query === null) return
  const converted: Record<string, unknown> = {}
  for (const [name, value] of Object.entries(request.query)) {
    const type = schema.properties?.[name]?.type
    if (type === 'integer' && typeof value === 'string' && /^-?\d{1,16}$/.test(value))
      converted[name] = Number(value)
    else if (type === 'boolean' && (value === 'true' || value === 'false')) converted[name] = value === 'true'
    else converted[name] = value
  }
  request.query = converted
}

function isSchema(value: unknown): value is Schema {
  return typeof value === 'object' && value !== null && 'properties' in value
}
