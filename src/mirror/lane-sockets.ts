import type { Socket } from 'node:net'

/** All of them, or none: those that came are destroyed then. @throws what the first of the others failed with */
export async function allSockets(dialling: readonly Promise<Socket>[]): Promise<readonly Socket[]> {
  const results = await Promise.allSettled(dialling)
  const failed = results.find((result) => result.status === 'rejected')
  const sockets = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
  if (failed === undefined) return sockets
  for (const socket of sockets) socket.destroy()
  throw failed.reason
}
