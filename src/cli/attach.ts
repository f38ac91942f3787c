/**
 * fullstripe attach NAME [DEVICE] and detach NAME|DEVICE: a volume as a disk of this machine. nbd-client connects
 * the kernel's nbd driver to the daemon's socket; from then on the kernel speaks to the daemon by itself, and a small
 * keeper gives it new connections when the daemon was restarted.
 */
import { closeSync, existsSync, fsyncSync, openSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { resolve } from 'node:path'
import type { StatusInfo } from '../api/types.ts'
import { messageOf, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { approximateSize } from '../base/sizes.ts'
import type { VolumeInfo } from '../volume/volume.ts'
import { localAddress } from './addresses.ts'
import { type Cli, clientOf, parseCount, pause, type Root } from './cli.ts'
import { Client } from './client.ts'
import { type ConnectOptions, connectDevice, disconnectDevice, keepDevice } from './nbd-client.ts'
import { deviceName, type NbdDevice, NbdDevices } from './nbd-devices.ts'
import { plural } from './text.ts'

/** How long the kernel may take to show what it was asked for. */
const APPEAR_MS_MAX = 10_000
const SECONDS_MAX = 10 * 365 * 86_400

export function attachCommands(root: Root, cli: Cli): void {
  attachCommand(root, cli)
  detachCommand(root, cli)
}

function attachCommand(root: Root, cli: Cli): void {
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
          describe: 'Seconds until the kernel sends an unanswered request again',
        })
        .option('reconnect', {
          type: 'string',
          requiresArg: true,
          default: '86400',
          describe: 'Seconds that requests wait for a daemon that is gone before they fail',
        })
        .example('fullstripe attach data', 'prints the device')
        .example('mkfs.ext4 "$(fullstripe attach data)"', ''),
    async (argv) => {
      const connections =
        argv.connections === undefined
          ? Math.min(4, availableParallelism())
          : parseCount(argv.connections, '--connections', 1, LIMITS.nbdClientConnectionsMax)
      const timeout = parseCount(argv.timeout, '--timeout', 1, SECONDS_MAX)
      const giveUp = parseCount(argv.reconnect, '--reconnect', 1, SECONDS_MAX)
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
      const devices = new NbdDevices()
      requireDriver(devices)
      refuseTwice(devices, volume)
      const options: ConnectOptions = {
        address: localAddress(status.listen),
        exportName: volume.uuid, // which a rename leaves as it is
        connections,
        timeout,
        readOnly: volume.readOnly,
      }
      const wanted = argv.device === undefined ? undefined : freeDevice(devices, argv.device)
      const { device, overNetlink } = await connectOne(devices, wanted, options)
      const { pid = 0 } = device
      devices.writeNote(device, {
        volume: volume.name,
        uuid: volume.uuid,
        pool: client.pool,
        pid,
        connections,
      })
      const unkept = overNetlink
        ? await keepDevice(device, options, giveUp)
        : 'this network namespace has no netlink'
      const result = {
        device: device.path,
        volume: volume.name,
        size: device.size,
        connections,
        kept: unkept === undefined,
      }
      cli.output.result(result, () => [device.path])
      if (cli.output.terminal) {
        cli.output.note(
          `volume ${volume.name}, ${approximateSize(device.size)}, ${plural(connections, 'connection')}`,
        )
      }
      if (unkept !== undefined)
        cli.output.note(`${device.path} fails when the daemon is restarted: ${unkept}`)
      if (!existsSync(device.path)) {
        cli.output.note(
          `${device.path} has no node here: in a container, run it with --privileged and -v /dev:/dev`,
        )
      }
    },
  )
}

function detachCommand(root: Root, cli: Cli): void {
  root.command(
    'detach <name>',
    'Disconnect a disk that attach made',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'The volume or the device' })
        .option('force', {
          type: 'boolean',
          default: false,
          describe: 'Also without a daemon: what is not written yet is lost',
        })
        .example('fullstripe detach data', '')
        .example('fullstripe detach /dev/nbd0', ''),
    async (argv) => {
      const devices = new NbdDevices()
      requireDriver(devices)
      const { device, pool } = attachedDevice(devices, argv.name, await identify(argv))
      const use = devices.use(device)
      if (use !== undefined) throw new UserError('BUSY', `${device.path} ${use}: end that first`)
      requireRoot('detach')
      if (!argv.force) {
        await requireDaemon(device, pool)
        flushDevice(device)
      }
      await disconnectDevice(device)
      await until(() => devices.find(device.name)?.pid === undefined, `${device.path} is still connected`)
      devices.removeNote(device)
      cli.output.result({ device: device.path, detached: true }, () => [`${device.path} detached`])
    },
  )
}

function requireRoot(command: string): void {
  if (process.geteuid?.() === 0) return
  throw new UserError('FAILED', `${command} changes devices of the kernel: run it as root`)
}

function requireDriver(devices: NbdDevices): void {
  if (devices.list().length > 0) return
  throw new UserError(
    'FAILED',
    "the kernel's nbd driver is missing (no /sys/block/nbd0): load it with: modprobe nbd (user-space clients work without it: nbdcopy, nbdfuse, qemu)",
  )
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
  if (name === undefined) {
    throw new UserError('USAGE', `${text} is not an nbd device: name one such as /dev/nbd0, or none`)
  }
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
async function connectOne(
  devices: NbdDevices,
  wanted: NbdDevice | undefined,
  options: ConnectOptions,
): Promise<{ device: NbdDevice; overNetlink: boolean }> {
  const candidates = wanted === undefined ? devices.list().filter(isFree) : [wanted]
  const last = candidates.at(-1)
  for (const candidate of candidates) {
    let overNetlink: boolean
    try {
      overNetlink = await connectDevice(candidate, options)
    } catch (error) {
      const taken = devices.find(candidate.name)?.pid !== undefined
      if (taken && candidate !== last) continue
      throw error
    }
    await until(() => (devices.find(candidate.name)?.size ?? 0) > 0, `${candidate.path} has no size`)
    const device = devices.find(candidate.name)
    if (device?.pid !== undefined) return { device, overNetlink }
    throw new UserError('FAILED', `${candidate.path} was disconnected at once: see the kernel log (dmesg)`)
  }
  throw new UserError(
    'BUSY',
    'all nbd devices are in use: detach one, or load the driver with more (modprobe nbd nbds_max=N)',
  )
}

interface Identity {
  readonly pool: string | undefined // undefined: not said
  readonly uuid: string | undefined // undefined: the daemon knows no such volume, or does not answer
}

/** A volume may have been renamed since it was attached; its daemon, where it runs, knows who it is. */
async function identify(argv: { name: string; pool: string | undefined }): Promise<Identity> {
  const { FULLSTRIPE_POOL } = process.env
  const pool = argv.pool ?? FULLSTRIPE_POOL
  if (pool === undefined || pool === '') return { pool: undefined, uuid: undefined }
  try {
    const { volumes } = await new Client(pool).get<StatusInfo>('/v1/status')
    return { pool: resolve(pool), uuid: volumes.find(({ name }) => name === argv.name)?.uuid }
  } catch (error) {
    if (error instanceof UserError && error.code === 'UNREACHABLE')
      return { pool: resolve(pool), uuid: undefined }
    throw error
  }
}

/** The device that a volume's name or a device's name stands for, and the pool it belongs to. */
function attachedDevice(
  devices: NbdDevices,
  text: string,
  identity: Identity,
): { device: NbdDevice; pool: string } {
  const ours = devices.list().flatMap((device) => {
    const note = devices.note(device)
    return note === undefined ? [] : [{ device, note, pool: note.pool }]
  })
  const named = ours.filter(({ note }) =>
    identity.uuid === undefined
      ? note.volume === text && (identity.pool === undefined || note.pool === identity.pool)
      : note.uuid === identity.uuid,
  )
  const [first, second] = named
  if (first !== undefined && second !== undefined) {
    throw new UserError(
      'USAGE',
      `${text} is attached as ${named.map(({ device }) => device.path).join(' and ')}: name the device`,
    )
  }
  if (first !== undefined) return first
  const name = deviceName(text)
  if (name === undefined) throw new UserError('NOT_FOUND', `volume ${text} is not attached on this machine`)
  const found = ours.find(({ device }) => device.name === name)
  if (found !== undefined) return found
  const device = devices.find(name)
  if (device?.pid === undefined) throw new UserError('NOT_FOUND', `/dev/${name} is not attached`)
  throw new UserError(
    'REFUSED',
    `${device.path} was not attached by fullstripe; to disconnect it: nbd-client -d ${device.path}`,
  )
}

/** Without a daemon a flush would wait for one, in the kernel, where nothing can interrupt it. */
async function requireDaemon(device: NbdDevice, pool: string): Promise<void> {
  try {
    await new Client(pool).get('/v1/pool')
  } catch (error) {
    const what = `${device.path} may hold what is not written yet: with the daemon running, detach it again, or give that up with --force`
    throw new UserError('UNREACHABLE', `${messageOf(error)}; ${what}`, { cause: error })
  }
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
    throw new UserError(
      'FAILED',
      `cannot flush ${device.path}: ${messageOf(error)}; to give up what is not written yet: --force`,
      { cause: error },
    )
  }
}

async function until(condition: () => boolean, otherwise: string): Promise<void> {
  const deadline = Date.now() + APPEAR_MS_MAX
  while (!condition()) {
    if (Date.now() > deadline) {
      const seconds = APPEAR_MS_MAX / 1000
      throw new UserError('FAILED', `${otherwise} after ${seconds} s: see the kernel log (dmesg)`)
    }
    await pause(20)
  }
}
