/** /v1/peers: other daemons, and which identity each has. */
import type { FastifyInstance } from 'fastify'
import type { PeerControl, PeerInfo } from '../mirror/types.ts'
import * as schemas from './schemas.ts'
import type { PeerList } from './types.ts'

interface PeerParams {
  peer: string
}

export function peerRoutes(app: FastifyInstance, peers: PeerControl): void {
  app.get(
    '/v1/peers',
    { schema: { summary: 'Daemons that this one has met', response: { 200: schemas.peerListSchema } } },
    async (): Promise<PeerList> => ({ peers: await peers.list() }),
  )

  app.delete<{ Params: PeerParams }>(
    '/v1/peers/:peer',
    {
      schema: {
        summary: 'Take whoever comes next under that name for it; answers with what was known',
        params: schemas.peerParams,
        response: { 200: schemas.peerSchema },
      },
    },
    async ({ params }): Promise<PeerInfo> => peers.forget(params.peer),
  )
}
