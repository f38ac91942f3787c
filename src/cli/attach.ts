/**
 * fullstripe attach NAME [DEVICE] and detach NAME|DEVICE: a volume as a disk of this machine. nbd-client connects
 * the kernel's nbd driver to the daemon's socket; from then on the kernel speaks to the daemon by itself.
 */
import { spawn } from 'node:child_process'
import { closeSync, existsSync, fsyncSync, openSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { resolve } from 'node:path'
import type { StatusInfo } from '../api/types.ts'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize } from '../base/sizes.ts'
import type { NbdAddress } from '../nbd/uri.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { localAddress } from './addresses.ts'
import { type Cli, clientOf, parseCount, pause, type Root } from './cli.ts'
import { keepConnected } from './keeper.ts'
import { deviceName, type NbdDevice, NbdDevices } from './nbd-devices.ts'
import { plural } from './text.ts'

/** How long the kernel may take to show what nbd-client asked it for. */
const APPEAR_MS_MAX = 10_000

export function attachCommands(root: Root, cli: Cli): void {
  root.command(
    'attach <name> [device]',
    'Make a volume a disk of this machine (/dev/nbdX)',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'The volume' })
        .positional('device', { type: 'string', describe: 'Such as /dev/nbd0 (default: the first free one)' })
        .option('connections', {
          alias: 'C',
          type: 'string',
          requiresArg: true,
          describe: 'Connections to the daemon',
          defaultDescription: 'one a CPU, at most 4',
        })
        .option('timeout', {
          type: 'string',
          requiresArg: true,
          default: '30',
          describe: 'Seconds until the kernel sends an unanswered request again; 0: never',
        })
        .option('give-up', {
          type: 'string',
          requiresArg: true,
          default: '86400',
          describe: 'Seconds that reads and writes wait for a daemon that is gone, before they fail',
        })
        .example('fullstripe attach data', 'prints the device')
        .example('mkfs.ext4 "$(fullstripe attach data)"', ''),
    async (argv) => {
      const connections =
        argv.connections === undefined
          ? Math.min(4, availableParallelism())
          : parseCount(argv.connections, '--connections', 1, LIMITS.nbdClientConnectionsMax)
      const timeout = parseCount(argv.timeout, '--timeout', 0, 86_400)
      const giveUp = parseCount(argv['give-up'], '--give-up', 0, 31_536_000)
      const devices = new NbdDevices()
      const client = clientOf(argv)
      const status = await client.get<StatusInfo>('/v1/status')
      const volume = status.volumes.find((candidate) => candidate.name === argv.name)
      if (volume === undefined) {
        throw new UserError(
          'NOT_FOUND',
          `there is no volume ${argv.name}; fullstripe volume list shows those there are`,
        )
      }
      requireRoot('attach')
      requireDriver(devices)
      refuseTwice(devices, volume)
      const wanted = argv.device === undefined ? undefined : freeDevice(devices, argv.device)
      const address = localAddress(status.listen)
      const device = await connect(devices, wanted, volume, { connections, timeout, address })
      devices.writeNote(device, {
        volume: volume.name,
        uuid: volume.uuid,
        pool: client.pool,
        pid: device.pid ?? 0,
        connections,
      })
      const keeping = { exportName: volume.name, address, connections, timeout, giveUp }
      const unkept = await keepConnected(device, keeping)
      const kept = unkept === undefined
      const result = { device: device.path, volume: volume.name, size: device.size, connections, kept }
      cli.output.result(result, () => [device.path])
      if (!kept) cli.output.note(`${device.path} will not survive a restart of the daemon: ${unkept}`)
      if (cli.output.terminal) {
        cli.output.note(
          `volume ${volume.name}, ${approximateSize(device.size)}, ${plural(connections, 'connection')}`,
        )
      }
      if (!existsSync(device.path)) {
        cli.output.note(
          `${device.path} has no node here: in a container, run it with --privileged and -v /dev:/dev`,
        )
      }
    },
  )
  root.command(
    'detach <name>',
    'Disconnect a disk that attach made',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'The volume or the device' })
        .example('fullstripe detach data', '')
        .example('fullstripe detach /dev/nbd0', ''),
    async (argv) => {
      const devices = new NbdDevices()
      requireDriver(devices)
      const device = attachedDevice(devices, argv.name, argv.pool)
      const use = devices.use(device)
      if (use !== undefined) throw new UserError('BUSY', `${device.path} ${use}: end that first`)
      requireRoot('detach')
      flushDevice(device)
      await nbdClient(['-d', device.path])
      await until(() => devices.find(device.name)?.pid === undefined, `${device.path} is still connected`)
      devices.removeNote(device)
      cli.output.result({ device: device.path, detached: true }, () => [`${device.path} detached`])
    },
  )
}

interface Connection {
  readonly connections: number
  readonly timeout: number // seconds; 0: none
  readonly address: NbdAddress
}

function requireRoot(command: string): void {
  if (process.geteuid?.() !== 0)
    throw new UserError('FAILED', `${command} changes devices of the kernel: run it as root`)
}

function requireDriver(devices: NbdDevices): void {
  if (devices.list().length === 0) {
    throw new UserError(
      'FAILED',
      "the kernel's nbd driver is missing (no /sys/block/nbd0): load it with: modprobe nbd (without it, user-space clients still work: nbdinfo, qemu, nbdfuse)",
    )
  }
}

/** Two devices of one volume would each cache it on its own; file systems on them would destroy each other. */
function refuseTwice(devices: NbdDevices, volume: VolumeInfo): void {
  const other = devices.list().find((device) => devices.note(device)?.uuid === volume.uuid)
  if (other !== undefined && !volume.readOnly) {
    throw new UserError('BUSY', `volume ${volume.name} is attached already, as ${other.path}`)
  }
}

function freeDevice(devices: NbdDevices, text: string): NbdDevice {
  const name = deviceName(text)
  if (name === undefined)
    throw new UserError('USAGE', `${text} is not an nbd device: name one such as /dev/nbd0, or none`)
  const device = devices.find(name)
  if (device === undefined) {
    throw new UserError('NOT_FOUND', `there is no device ${name}: modprobe nbd nbds_max=N makes more of them`)
  }
  if (!isFree(device)) throw new UserError('BUSY', `${device.path} is in use: name another one, or none`)
  return device
}

function isFree(device: NbdDevice): boolean {
  return device.pid === undefined && device.size === 0
}

/** Connects the wanted device, or the first free one; another command may be faster, then the next free one. */
async function connect(
  devices: NbdDevices,
  wanted: NbdDevice | undefined,
  volume: VolumeInfo,
  options: Connection,
): Promise<NbdDevice> {
  const candidates = wanted === undefined ? devices.list().filter(isFree) : [wanted]
  if (candidates.length === 0) {
    throw new UserError(
      'BUSY',
      'all nbd devices are in use: detach one, or load the driver with more (modprobe nbd nbds_max=N)',
    )
  }
  for (const [index, device] of candidates.entries()) {
    try {
      await nbdClient(clientArguments(device, volume, options))
    } catch (error) {
      const taken = devices.find(device.name)?.pid !== undefined
      if (taken && index + 1 < candidates.length) continue
      throw error
    }
    await until(() => (devices.find(device.name)?.size ?? 0) > 0, `${device.path} got no size`)
    const connected = devices.find(device.name)
    if (connected?.pid !== undefined) return connected
    throw new UserError('FAILED', `${device.path} was disconnected at once: see the kernel log (dmesg)`)
  }
  throw new UserError('BUSY', 'all nbd devices were taken while trying')
}

function clientArguments(device: NbdDevice, volume: VolumeInfo, options: Connection): string[] {
  const { address, connections, timeout } = options
  const where = address.transport === 'unix' ? ['-unix', address.path] : [address.host, String(address.port)]
  return [
    ...where,
    device.path,
    '-N',
    volume.name,
    '-C',
    String(connections),
    ...(timeout === 0 ? [] : ['-timeout', String(timeout)]),
    ...(volume.readOnly ? ['-R'] : []),
  ]
}

/** Runs nbd-client. @throws UserError FAILED with its last line, which says why */
function nbdClient(args: readonly string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const { PATH = '' } = process.env
    const child = spawn('nbd-client', args, {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, PATH: `${PATH}:/usr/sbin:/sbin` },
    })
    let text = ''
    const collect = (chunk: Buffer) => {
      text = (text + chunk.toString('utf8')).slice(-4096)
    }
    child.stdout.on('data', collect)
    child.stderr.on('data', collect)
    child.once('error', (error) => {
      const missing = systemCode(error) === 'ENOENT'
      const why = missing
        ? 'nbd-client is not installed: install the package nbd-client'
        : `nbd-client: ${messageOf(error)}`
      reject(new UserError('FAILED', why, { cause: error }))
    })
    child.once('close', (code) => {
      if (code === 0) return resolve()
      const last =
        text
          .trim()
          .split('\n')
          .at(-1)
          ?.replace(/^Error: /, '') ?? ''
      reject(new UserError('FAILED', `nbd-client failed: ${last === '' ? `exit code ${code}` : last}`))
    })
  })
}

function attachedDevice(devices: NbdDevices, text: string, pool: string | undefined): NbdDevice {
  const { FULLSTRIPE_POOL } = process.env
  const directory = pool ?? FULLSTRIPE_POOL
  const ours = devices.list().filter((device) => {
    const note = devices.note(device)
    return note?.volume === text && (directory === undefined || note.pool === resolve(directory))
  })
  const [first, second] = ours
  if (first !== undefined && second !== undefined) {
    const names = ours.map((device) => device.path).join(' and ')
    throw new UserError('USAGE', `${text} is attached as ${names}: name the device`)
  }
  if (first !== undefined) return first
  const name = deviceName(text)
  if (name === undefined) throw new UserError('NOT_FOUND', `volume ${text} is not attached on this machine`)
  const device = devices.find(name)
  if (device === undefined) throw new UserError('NOT_FOUND', `there is no device ${name}`)
  if (device.pid === undefined) throw new UserError('NOT_FOUND', `${device.path} is not attached`)
  if (devices.note(device) === undefined) {
    throw new UserError(
      'REFUSED',
      `${device.path} was not attached by fullstripe; to disconnect it: nbd-client -d ${device.path}`,
    )
  }
  return device
}

/** What was written to the device and is still in the page cache must reach the daemon before the connection ends. */
function flushDevice(device: NbdDevice): void {
  if (!existsSync(device.path)) return
  try {
    const fd = openSync(device.path, 'r')
    try {
      fsyncSync(fd)
    } finally {
      closeSync(fd)
    }
  } catch (error) {
    throw new UserError('FAILED', `cannot flush ${device.path}: ${messageOf(error)}`, { cause: error })
  }
}

async function until(condition: () => boolean, otherwise: string): Promise<void> {
  const deadline = Date.now() + APPEAR_MS_MAX
  while (!condition()) {
    if (Date.now() > deadline)
      throw new UserError(
        'FAILED',
        `${otherwise} after ${APPEAR_MS_MAX / 1000} s: see the kernel log (dmesg)`,
      )
    await pause(20)
  }
}
