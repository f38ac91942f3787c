/** /v1/mirrors, and /v1/volumes/:name/mirrors with what lies below it. */
import type { FastifyInstance } from 'fastify'
import type { Daemon } from '../daemon/daemon.ts'
import type { MirrorControl, MirrorInfo } from '../mirror/types.ts'
import { type ExtentQuery, extentPage } from './pages.ts'
import * as schemas from './schemas.ts'
import type {
  CopyDensityInfo,
  CopyMapPage,
  MirrorAddBody,
  MirrorChangeBody,
  MirrorForceBody,
  MirrorList,
  MirrorResolveBody,
  MirrorVerifyBody,
} from './types.ts'

interface NameParams {
  name: string
}
interface MirrorParams extends NameParams {
  mirror: string
}

const ALL = '/v1/volumes/:name/mirrors'
const ONE = `${ALL}/:mirror`

/** Schema of a route that answers with the mirror. */
function told(summary: string, body?: schemas.Schema) {
  return {
    schema: {
      summary,
      params: schemas.mirrorParams,
      response: { 200: schemas.mirrorSchema },
      ...(body === undefined ? {} : { body }),
    },
  }
}

export function mirrorRoutes(app: FastifyInstance, daemon: Daemon, mirrors: MirrorControl): void {
  app.get(
    '/v1/mirrors',
    { schema: { summary: 'All mirrors', response: { 200: schemas.mirrorListSchema } } },
    async (): Promise<MirrorList> => ({ mirrors: mirrors.list() }),
  )

  app.get<{ Params: NameParams }>(
    ALL,
    {
      schema: {
        summary: 'The mirrors of a volume',
        params: schemas.nameParams,
        response: { 200: schemas.mirrorListSchema },
      },
    },
    async (request): Promise<MirrorList> => {
      const { name } = daemon.pool.volume(request.params.name)
      return { mirrors: mirrors.list().filter(({ volume }) => volume === name) }
    },
  )

  app.post<{ Params: NameParams; Body: MirrorAddBody }>(
    ALL,
    {
      schema: {
        summary: 'Mirror a volume; copying goes on after the answer',
        params: schemas.nameParams,
        body: schemas.mirrorAddBody,
        response: { 201: schemas.mirrorSchema },
      },
    },
    async (request, reply): Promise<MirrorInfo> => {
      const info = await mirrors.add({ ...request.body, volume: request.params.name })
      const place = [info.volume, 'mirrors', info.name].map(encodeURIComponent).join('/')
      reply.code(201).header('location', `/v1/volumes/${place}`)
      return info
    },
  )

  app.get<{ Params: MirrorParams }>(ONE, told('One mirror'), async ({ params }) =>
    mirrors.show(params.name, params.mirror),
  )

  app.patch<{ Params: MirrorParams; Body: MirrorChangeBody }>(
    ONE,
    told('Change how a mirror works, while it does', schemas.mirrorChangeBody),
    async ({ params, body }) => mirrors.change(params.name, params.mirror, body),
  )

  app.delete<{ Params: MirrorParams }>(
    ONE,
    { schema: { summary: 'End a mirror; both volumes stay as they are', params: schemas.mirrorParams } },
    async ({ params }, reply): Promise<void> => {
      await mirrors.remove(params.name, params.mirror)
      reply.code(204)
    },
  )

  app.post<{ Params: MirrorParams }>(`${ONE}/pause`, told('Copy nothing for now'), async ({ params }) =>
    mirrors.pause(params.name, params.mirror),
  )

  app.post<{ Params: MirrorParams }>(`${ONE}/resume`, told('Go on'), async ({ params }) =>
    mirrors.resume(params.name, params.mirror),
  )

  app.post<{ Params: MirrorParams; Body: MirrorForceBody | null }>(
    `${ONE}/promote`,
    told('Make this side the primary', schemas.mirrorForceBody),
    async ({ params, body }) => mirrors.promote(params.name, params.mirror, body ?? {}),
  )

  app.post<{ Params: MirrorParams; Body: MirrorForceBody | null }>(
    `${ONE}/demote`,
    told('Make this side the secondary, when the other one has everything', schemas.mirrorForceBody),
    async ({ params, body }) => mirrors.demote(params.name, params.mirror, body ?? {}),
  )

  app.post<{ Params: MirrorParams; Body: MirrorResolveBody }>(
    `${ONE}/resolve`,
    told('Settle a split brain', schemas.mirrorResolveBody),
    async ({ params, body }) => mirrors.resolve(params.name, params.mirror, body.discard),
  )

  app.post<{ Params: MirrorParams; Body: MirrorVerifyBody | null }>(
    `${ONE}/verify`,
    told('Begin to compare both sides; `verify` tells how that goes', schemas.mirrorVerifyBody),
    async ({ params, body }) => mirrors.verify(params.name, params.mirror, body ?? {}),
  )

  app.get<{ Params: MirrorParams; Querystring: ExtentQuery }>(
    `${ONE}/map`,
    {
      schema: {
        summary: 'Which parts of a volume the secondary lacks',
        params: schemas.mirrorParams,
        querystring: schemas.mapQuery,
        response: { 200: schemas.copyMapSchema },
      },
    },
    async ({ params, query }): Promise<CopyMapPage> => {
      const { volume, name } = mirrors.show(params.name, params.mirror)
      const { size } = daemon.pool.volume(volume)
      const extents = (offset: number, length: number) => mirrors.copyExtents(volume, name, offset, length)
      return { volume, name, ...extentPage({ volume, size, extents }, query) }
    },
  )

  app.get<{ Params: MirrorParams; Querystring: { cells: number } }>(
    `${ONE}/density`,
    {
      schema: {
        summary: 'The copy bitmap in equal parts, for drawing',
        params: schemas.mirrorParams,
        querystring: schemas.densityQuery,
        response: { 200: schemas.copyDensitySchema },
      },
    },
    async ({ params, query }): Promise<CopyDensityInfo> => {
      const { volume, name } = mirrors.show(params.name, params.mirror)
      const { size } = daemon.pool.volume(volume)
      return { volume, name, size, cells: [...mirrors.copyDensity(volume, name, query.cells)] }
    },
  )
}
