import type { Socket } from 'node:net'
import { LinkError } from '../link/errors.ts'
import type { ExpectedWire } from '../link/side-wires.ts'

/** So many connections that the other side will dial; none where too many are waited for already. */
export function expectSockets(door: { expect(): ExpectedWire }, count: number): readonly ExpectedWire[] {
  const expected: ExpectedWire[] = []
  try {
    while (expected.length < count) expected.push(door.expect())
    return expected
  } catch (error) {
    if (!(error instanceof LinkError && error.code === 'OVERFLOW')) throw error
    for (const { cancel } of expected) cancel()
    return []
  }
}

/** All of them, or none: those that came are destroyed then. @throws what the first of the others failed with */
export async function allSockets(dialling: readonly Promise<Socket>[]): Promise<readonly Socket[]> {
  const results = await Promise.allSettled(dialling)
  const failed = results.find((result) => result.status === 'rejected')
  const sockets = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
  if (failed === undefined) return sockets
  for (const socket of sockets) socket.destroy()
  throw failed.reason
}
