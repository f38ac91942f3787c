/**
 * The servers that are compared. Each serves one disk of the same size from the same file system over a unix socket,
 * with every block of it written before and in the page cache: none has an advantage in what the disk has to do.
 */
import { once } from 'node:events'
import { mkdirSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { runFio } from './fio.ts'
import { Background, runProgram } from './processes.ts'

export interface Server {
  readonly name: string
  readonly ours: boolean
  readonly uri: string
  readonly pid: number
  stop(): Promise<void>
}

/** The program, from dist/bench/test/bench. */
const CLI = fileURLToPath(new URL('../../../program/fullstripe.js', import.meta.url))
export const EXPORT = 'disk'

/** Runs a command of the CLI and returns its JSON. */
export async function fullstripe(args: readonly string[]): Promise<{ json: unknown; seconds: number }> {
  const { output, seconds } = await runProgram(process.execPath, [CLI, ...args, '--json'])
  return { json: JSON.parse(output), seconds }
}

export function serve(
  pool: string,
  datapath: 'native' | 'portable',
  options: readonly string[] = [],
): Background {
  return new Background(process.execPath, [
    CLI,
    'serve',
    pool,
    '--datapath',
    datapath,
    '--log-level',
    'error',
    ...options,
  ])
}

export const controlSocket = (pool: string) => join(pool, 'control.sock')
export const nbdUri = (path: string) => `nbd+unix:///${EXPORT}?socket=${path}`

export async function startOurs(
  directory: string,
  datapath: 'native' | 'portable',
  size: number,
): Promise<Server> {
  const pool = join(directory, datapath)
  await fullstripe(['pool', 'create', pool])
  const daemon = serve(pool, datapath)
  try {
    await daemon.listening(controlSocket(pool))
    await fullstripe(['volume', 'create', EXPORT, '--size', String(size), '--pool', pool])
    return await filled(`fullstripe ${datapath}`, true, daemon, join(pool, 'nbd.sock'), size)
  } catch (error) {
    await daemon.stop()
    throw error
  }
}

type Start = (directory: string, file: string, socket: string) => Background | Promise<Background>

const PEERS: Record<string, Start> = {
  nbdkit: (_, file, socket) => new Background('nbdkit', ['-f', '-U', socket, '-e', EXPORT, 'file', file]),
  'qemu-nbd': (_, file, socket) =>
    new Background('qemu-nbd', [
      ...['--format=raw', '--cache=writeback', '--aio=threads', '--persistent', '--shared=8'],
      ...['-x', EXPORT, '-k', socket, file],
    ]),
  'nbd-server': async (directory, file, socket) => {
    // It listens on TCP as well, always; port 0 would be its standard input.
    const port = await freePort()
    const config = join(directory, 'config')
    const generic = [
      '[generic]',
      `unixsock = ${socket}`,
      'listenaddr = 127.0.0.1',
      `port = ${port}`,
      'allowlist = true',
    ]
    writeFileSync(config, [...generic, `[${EXPORT}]`, `exportname = ${file}`, ''].join('\n'))
    // In the foreground it would serve one connection and end.
    const pidFile = join(directory, 'pid')
    return new Background('nbd-server', ['-C', config, '-p', pidFile], pidFile)
  },
}
export const PEER_NAMES = Object.keys(PEERS)

export async function startPeer(directory: string, name: string, size: number): Promise<Server> {
  const start = PEERS[name]
  if (start === undefined) throw new Error(`no server ${name}`)
  const own = join(directory, name)
  mkdirSync(own)
  const file = join(own, 'disk')
  writeFileSync(file, '')
  await runProgram('truncate', ['-s', String(size), file])
  const socket = join(own, 'nbd.sock')
  const background = await start(own, file, socket)
  try {
    await background.listening(socket)
    return await filled(name, false, background, socket, size)
  } catch (error) {
    await background.stop()
    throw error
  }
}

/** A TCP port that was free a moment ago. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  server.close()
  await once(server, 'close')
  if (address === null || typeof address === 'string') throw new Error('no free port')
  return address.port
}

/** Writes the whole disk through the server and reads it back once: preallocated, cached. */
async function filled(
  name: string,
  ours: boolean,
  background: Background,
  socket: string,
  size: number,
): Promise<Server> {
  const uri = nbdUri(socket)
  for (const pattern of ['write', 'read'] as const) {
    await runFio(uri, { pattern, block: 2 ** 20, depth: 8, connections: 1 }, { size })
  }
  return { name, ours, uri, pid: background.pid, stop: () => background.stop() }
}
