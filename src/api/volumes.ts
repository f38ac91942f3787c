/** /v1/volumes and what lies below it. */
import type { FastifyInstance } from 'fastify'
import type { Daemon } from '../daemon/daemon.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { type ExtentQuery, extentPage } from './pages.ts'
import * as schemas from './schemas.ts'
import type {
  DensityInfo,
  FormatBody,
  MapPage,
  ResizeBody,
  VolumeChangeBody,
  VolumeCreateBody,
} from './types.ts'

interface NameParams {
  name: string
}

const ONE = { 200: schemas.volumeSchema }

export function volumeRoutes(app: FastifyInstance, daemon: Daemon): void {
  const { pool } = daemon

  app.get(
    '/v1/volumes',
    { schema: { summary: 'All volumes', response: { 200: schemas.volumeListSchema } } },
    async () => ({ volumes: pool.volumes().map((volume) => volume.info()) }),
  )

  app.post<{ Body: VolumeCreateBody }>(
    '/v1/volumes',
    {
      schema: {
        summary: 'Create a volume',
        body: schemas.volumeCreateBody,
        response: { 201: schemas.volumeSchema },
      },
    },
    async (request, reply): Promise<VolumeInfo> => {
      const volume = await pool.createVolume(request.body)
      reply.code(201).header('location', `/v1/volumes/${encodeURIComponent(volume.name)}`)
      return volume.info()
    },
  )

  app.get<{ Params: NameParams }>(
    '/v1/volumes/:name',
    { schema: { summary: 'One volume', params: schemas.nameParams, response: ONE } },
    async (request): Promise<VolumeInfo> => pool.volume(request.params.name).info(),
  )

  app.patch<{ Params: NameParams; Body: VolumeChangeBody }>(
    '/v1/volumes/:name',
    {
      schema: {
        summary: 'Rename a volume, or switch its intents on or off',
        params: schemas.nameParams,
        body: schemas.volumeChangeBody,
        response: ONE,
      },
    },
    async (request): Promise<VolumeInfo> => {
      const { name, intents, regionSize } = request.body
      const volume = pool.volume(request.params.name)
      if (intents !== undefined) await volume.keepIntents(intents, regionSize)
      if (name !== undefined) await pool.renameVolume(volume.name, name)
      return volume.info()
    },
  )

  app.delete<{ Params: NameParams; Querystring: { stops?: number } }>(
    '/v1/volumes/:name/suspects',
    {
      schema: {
        summary: 'Acknowledge which regions are suspect: from now on none is',
        params: schemas.nameParams,
        querystring: schemas.acknowledgeQuery,
        response: ONE,
      },
    },
    async (request): Promise<VolumeInfo> => {
      const volume = pool.volume(request.params.name)
      await volume.acknowledge(request.query.stops)
      return volume.info()
    },
  )

  app.delete<{ Params: NameParams; Querystring: { force?: boolean } }>(
    '/v1/volumes/:name',
    { schema: { summary: 'Delete a volume', params: schemas.nameParams, querystring: schemas.deleteQuery } },
    async (request, reply): Promise<void> => {
      await pool.deleteVolume(request.params.name, { force: request.query.force === true })
      reply.code(204)
    },
  )

  app.post<{ Params: NameParams; Body: ResizeBody }>(
    '/v1/volumes/:name/resize',
    {
      schema: {
        summary: 'Resize a volume',
        params: schemas.nameParams,
        body: schemas.resizeBody,
        response: ONE,
      },
    },
    async (request): Promise<VolumeInfo> => {
      const volume = pool.volume(request.params.name)
      await volume.resize(request.body.size, { force: request.body.force === true })
      return volume.info()
    },
  )

  app.get<{ Params: NameParams; Querystring: ExtentQuery }>(
    '/v1/volumes/:name/map',
    {
      schema: {
        summary: 'Which parts of a volume are formatted',
        params: schemas.nameParams,
        querystring: schemas.mapQuery,
        response: { 200: schemas.mapSchema },
      },
    },
    async (request): Promise<MapPage> => {
      const volume = pool.volume(request.params.name)
      const { name, size } = volume
      const extents = (offset: number, length: number) => volume.map(offset, length)
      return { name, ...extentPage({ volume: name, size, extents }, request.query) }
    },
  )

  app.get<{ Params: NameParams; Querystring: { cells: number } }>(
    '/v1/volumes/:name/density',
    {
      schema: {
        summary: 'The init bitmap in equal parts, for drawing',
        params: schemas.nameParams,
        querystring: schemas.densityQuery,
        response: { 200: schemas.densitySchema },
      },
    },
    async (request): Promise<DensityInfo> => {
      const volume = pool.volume(request.params.name)
      const cells = [...volume.density(request.query.cells)]
      return { name: volume.name, size: volume.size, cells }
    },
  )

  app.post<{ Params: NameParams; Body: FormatBody | null }>(
    '/v1/volumes/:name/format',
    {
      schema: {
        summary: 'Start the background formatter of a thick volume, or change its rate',
        params: schemas.nameParams,
        body: schemas.formatBody,
        response: ONE,
      },
    },
    async (request): Promise<VolumeInfo> => {
      const volume = pool.volume(request.params.name)
      const { rate } = request.body ?? {}
      await volume.startFormatter(rate === undefined ? {} : { rate })
      return volume.info()
    },
  )

  app.delete<{ Params: NameParams }>(
    '/v1/volumes/:name/format',
    { schema: { summary: 'Pause the background formatter', params: schemas.nameParams, response: ONE } },
    async (request): Promise<VolumeInfo> => {
      const volume = pool.volume(request.params.name)
      await volume.pauseFormatter()
      return volume.info()
    },
  )
}
