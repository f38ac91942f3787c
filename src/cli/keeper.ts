/**
 * What lets an attached disk outlive its daemon: nbd_keep (native/keeper), a small program that stays behind. When
 * the kernel reports a dead connection it connects again, for as long as the disk is attached; the kernel holds
 * back what it has to write until then. nbd-client's own -persist does not do: it loses the requests in flight.
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { messageOf } from '../base/errors.ts'
import type { NbdAddress } from '../nbd/uri.ts'
import type { NbdDevice } from './nbd-devices.ts'

const PROGRAM = fileURLToPath(new URL('../../native/build/Release/nbd_keep', import.meta.url))

export interface KeepOptions {
  readonly exportName: string
  readonly address: NbdAddress
  readonly connections: number
  readonly timeout: number // seconds after which an unanswered request is sent again; 0: never
  readonly giveUp: number // seconds that requests wait for a daemon that is gone
}

/** Starts nbd_keep for a connected device. Resolves to why the disk is not kept, or to undefined. */
export async function keepConnected(device: NbdDevice, options: KeepOptions): Promise<string | undefined> {
  if (!existsSync(PROGRAM)) return 'nbd_keep was not built, for want of a C++ compiler'
  const { address } = options
  const words = [
    device.name.slice('nbd'.length),
    device.pid ?? 0,
    options.connections,
    options.timeout,
    options.giveUp,
    options.exportName,
    ...(address.transport === 'unix' ? ['unix', address.path] : ['tcp', address.host, address.port]),
  ]
  return new Promise((resolve) => {
    // It goes to the background by itself, so its exit status says whether it could begin.
    const child = spawn(PROGRAM, words.map(String), { stdio: ['ignore', 'ignore', 'pipe'] })
    let text = ''
    child.stderr.on('data', (chunk: Buffer) => {
      text = (text + chunk.toString('utf8')).slice(-1024)
    })
    child.once('error', (error) => resolve(messageOf(error)))
    child.once('close', (code) =>
      resolve(code === 0 ? undefined : text.trim() || `nbd_keep ended with ${code}`),
    )
  })
}
