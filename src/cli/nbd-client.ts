/**
 * The programs that work the kernel's nbd driver for us.
 *
 *   nbd-client   connects a device to a server, over netlink, and ends: the kernel has the sockets then. In a network
 *                namespace of its own (a container) there is no netlink; it is run again in its old way, where it
 *                stays and reconnects, but requests fail meanwhile
 *   nbd_keep     native/keeper: stays beside a device connected over netlink. When the daemon is restarted, requests
 *                wait and go on over new connections; nobody above the device sees an error
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { SOCKET_PATH_BYTES_MAX } from '../daemon/socket-path.ts'
import type { NbdAddress } from '../nbd/uri.ts'
import type { NbdDevice } from './nbd-devices.ts'

export interface ConnectOptions {
  readonly address: NbdAddress
  readonly exportName: string
  readonly connections: number
  readonly timeout: number // seconds until an unanswered request is sent again
  readonly readOnly: boolean
}

const NO_NETLINK = /resolve the nbd netlink family/
const KEEPER = fileURLToPath(new URL('../../native/build/Release/nbd_keep', import.meta.url))

/** @returns whether the device was connected over netlink, so that it can be kept */
export async function connectDevice(device: NbdDevice, options: ConnectOptions): Promise<boolean> {
  const { address, exportName, connections, timeout, readOnly } = options
  const args = [
    ...(address.transport === 'unix'
      ? ['-unix', usablePath(address.path)]
      : [address.host, String(address.port)]),
    device.path,
    '-N',
    exportName,
    '-C',
    String(connections),
    '-timeout',
    String(timeout),
    ...(readOnly ? ['-R'] : []),
  ]
  return withNetlinkOrNot((mode) => run('nbd-client', [...args, ...mode]))
}

export async function disconnectDevice(device: NbdDevice): Promise<void> {
  await withNetlinkOrNot((mode) =>
    run('nbd-client', [...mode.filter((arg) => arg !== '-persist'), '-d', device.path]),
  )
}

/**
 * Starts the keeper of a device.
 * @param exportName best the uuid, which a rename leaves as it is
 * @param giveUp seconds that requests wait for a daemon that is gone
 * @returns undefined, or why there is none
 */
export async function keepDevice(
  device: NbdDevice,
  options: ConnectOptions,
  giveUp: number,
): Promise<string | undefined> {
  if (!existsSync(KEEPER))
    return 'native/build/Release/nbd_keep is not built (run scripts/setup where a C++ compiler is)'
  const { address, exportName, connections, timeout } = options
  const where =
    address.transport === 'unix' ? ['unix', address.path] : ['tcp', address.host, String(address.port)]
  const numbers = [device.name.slice('nbd'.length), device.pid ?? 0, connections, timeout, giveUp].map(String)
  try {
    await run(KEEPER, [...numbers, exportName, ...where])
    return undefined
  } catch (error) {
    return messageOf(error)
  }
}

function usablePath(path: string): string {
  if (Buffer.byteLength(path) <= SOCKET_PATH_BYTES_MAX) return path
  const max = `${SOCKET_PATH_BYTES_MAX} bytes`
  throw new UserError(
    'FAILED',
    `the socket ${path} has a path longer than ${max}, which nbd-client cannot open: serve --listen nbd+unix:///?socket=SHORTER as well`,
  )
}

/** @returns whether it went over netlink */
async function withNetlinkOrNot(attempt: (mode: readonly string[]) => Promise<void>): Promise<boolean> {
  try {
    await attempt([])
    return true
  } catch (error) {
    if (!NO_NETLINK.test(messageOf(error))) throw error
    await attempt(['-nonetlink', '-persist'])
    return false
  }
}

/** @throws UserError FAILED with the program's last line, which says why */
function run(program: string, args: readonly string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const { PATH = '' } = process.env
    const env = { ...process.env, PATH: `${PATH}:/usr/sbin:/sbin` }
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'], env })
    let text = ''
    const collect = (chunk: Buffer) => {
      text = (text + chunk.toString('utf8')).slice(-4096)
    }
    child.stdout.on('data', collect)
    child.stderr.on('data', collect)
    child.once('error', (error) => {
      const missing = systemCode(error) === 'ENOENT'
      const why = missing
        ? `${program} is not installed: install the package ${program}`
        : `${program}: ${messageOf(error)}`
      reject(new UserError('FAILED', why, { cause: error }))
    })
    child.once('close', (code, signal) => {
      if (code === 0) return resolve()
      const why = reasonOf(text)
      const name = program === KEEPER ? 'nbd_keep' : program
      reject(new UserError('FAILED', `${name} failed: ${why === '' ? `exit code ${code ?? signal}` : why}`))
    })
  })
}

/** The last line that says something: nbd-client ends with "Exiting.", after lines about its progress. */
function reasonOf(text: string): string {
  const lines = text.split('\n').map((line) => line.trim())
  const last = lines.findLast((line) => line !== '' && line !== 'Exiting.') ?? ''
  return last.replace(/^(Error|E|nbd_keep): /, '').replace(/[.\s]+$/, '')
}
