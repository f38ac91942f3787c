/** GET /v1/status, GET /v1/pool */
import type { FastifyInstance } from 'fastify'
import type { Daemon } from '../daemon/daemon.ts'
import { VERSION } from '../daemon/version.ts'
import type { MirrorControl } from '../mirror/types.ts'
import type { PoolInfo } from '../volume/pool.ts'
import { poolSchema, statusSchema } from './schemas.ts'
import type { StatusInfo } from './types.ts'

export function poolRoutes(app: FastifyInstance, daemon: Daemon, mirrors: MirrorControl): void {
  app.get<{ Reply: StatusInfo }>(
    '/v1/status',
    { schema: { summary: 'The daemon and all it serves', response: { 200: statusSchema } } },
    async () => statusOf(daemon, mirrors),
  )
  app.get<{ Reply: PoolInfo }>(
    '/v1/pool',
    { schema: { summary: 'The pool', response: { 200: poolSchema } } },
    async () => daemon.pool.info(),
  )
}

export function statusOf(daemon: Daemon, mirrors: MirrorControl): StatusInfo {
  const { pool } = daemon
  const volumes = pool.volumes().map((volume) => volume.info())
  return {
    state: daemon.state,
    version: VERSION,
    pid: process.pid,
    started: daemon.started.toISOString(),
    now: new Date().toISOString(),
    memory: process.memoryUsage.rss(),
    listen: daemon.listening,
    link: daemon.mirrors.listening ?? null,
    sessions: volumes.reduce((total, volume) => total + volume.sessions, 0),
    datapath: pool.datapath.description,
    pool: pool.info(),
    members: pool.datapath.memberCounters(),
    volumes,
    mirrors: mirrors.list(),
    nextEvent: daemon.events.next,
  }
}
