import { join } from 'node:path'

/** Where the control API of a pool listens. */
export function controlPath(pool: string): string {
  return join(pool, 'control.sock')
}
