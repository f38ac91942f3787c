/** The peers that copy a disk from one server to another over loopback TCP, and how long a round trip takes over a line. */
import { once } from 'node:events'
import { closeSync, existsSync, ftruncateSync, openSync, rmSync, writeSync } from 'node:fs'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { FaultRelay } from '../support/fault-relay.ts'
import { Background, runProgram } from './processes.ts'

const MiB = 1 << 20

/** A file with every block of it written, as the volume has them. */
function source(directory: string, size: number): string {
  const path = join(directory, 'source.raw')
  if (existsSync(path)) return path
  const fd = openSync(path, 'wx')
  const block = Buffer.alloc(MiB, 0x5a)
  for (let at = 0; at < size; at += MiB) writeSync(fd, block, 0, Math.min(MiB, size - at), at)
  closeSync(fd)
  return path
}

/** An empty one, as the volume over there is. */
function target(directory: string, size: number): string {
  const path = join(directory, 'target.raw')
  rmSync(path, { force: true })
  const fd = openSync(path, 'wx')
  ftruncateSync(fd, size)
  closeSync(fd)
  return path
}

async function nbdkit(
  directory: string,
  name: string,
  file: string,
): Promise<{ server: Background; port: number }> {
  const port = await freePort()
  const pidFile = join(directory, `${name}.pid`)
  rmSync(pidFile, { force: true })
  const server = new Background('nbdkit', [
    '-f',
    '-i',
    '127.0.0.1',
    '-p',
    String(port),
    '-P',
    pidFile,
    'file',
    file,
  ])
  while (!existsSync(pidFile)) await new Promise((resolve) => setTimeout(resolve, 5))
  return { server, port }
}

/** nbdcopy between two file servers of nbdkit. */
export async function nbdcopySeconds(directory: string, size: number): Promise<number> {
  const from = await nbdkit(directory, 'from', source(directory, size))
  const to = await nbdkit(directory, 'to', target(directory, size))
  try {
    const { seconds } = await runProgram('nbdcopy', [
      '--flush',
      `nbd://127.0.0.1:${from.port}`,
      `nbd://127.0.0.1:${to.port}`,
    ])
    return seconds
  } finally {
    await from.server.stop()
    await to.server.stop()
  }
}

/** qemu's mirror job (qemu-storage-daemon, `blockdev-mirror`) to qemu-nbd, until it says that both are the same. */
export async function mirrorSeconds(directory: string, size: number): Promise<number> {
  const port = await freePort()
  const pidFile = join(directory, 'qemu-nbd.pid')
  rmSync(pidFile, { force: true })
  const server = new Background('qemu-nbd', [
    ...['-f', 'raw', '-b', '127.0.0.1', '-p', String(port), '-t', '-x', 'disk', '--cache=writeback'],
    ...['--pid-file', pidFile, target(directory, size)],
  ])
  const monitor = join(directory, 'qmp.sock')
  rmSync(monitor, { force: true })
  while (!existsSync(pidFile)) await new Promise((resolve) => setTimeout(resolve, 5))
  const job = new Background('qemu-storage-daemon', [
    ...['--blockdev', `driver=file,node-name=from,filename=${source(directory, size)}`],
    ...[
      '--blockdev',
      `driver=nbd,node-name=to,server.type=inet,server.host=127.0.0.1,server.port=${port},export=disk`,
    ],
    ...['--chardev', `socket,path=${monitor},server=on,wait=off,id=qmp`, '--monitor', 'chardev=qmp'],
  ])
  try {
    await job.listening(monitor)
    return await mirrorJob(monitor)
  } finally {
    await job.stop()
    await server.stop()
  }
}

async function mirrorJob(monitor: string): Promise<number> {
  const socket = connect(monitor)
  const lines = createInterface({ input: socket })[Symbol.asyncIterator]()
  const say = (execute: string, args: object = {}): boolean =>
    socket.write(`${JSON.stringify({ execute, arguments: args })}\n`)
  const until = async (text: string): Promise<void> => {
    for (;;) {
      const { value, done } = await lines.next()
      if (done === true) throw new Error('the mirror job ended')
      const line = String(value)
      if (line.includes('"error"')) throw new Error(`the mirror job failed: ${line}`)
      if (line.includes(text)) return
    }
  }
  try {
    await until('QMP')
    say('qmp_capabilities')
    await until('return')
    const from = performance.now()
    say('blockdev-mirror', { 'job-id': 'copy', device: 'from', target: 'to', sync: 'full' })
    await until('"status": "ready"')
    return (performance.now() - from) / 1000
  } finally {
    socket.destroy()
  }
}

/** What a byte takes there and back over a line with that delay, in milliseconds: the median of some. */
export async function roundTripMs(delayMs: number): Promise<number> {
  const echo: Server = createServer({ noDelay: true }, (peer) => {
    peer.on('error', () => undefined) // the relay cuts it off in the end
    peer.pipe(peer)
  }).listen(0, '127.0.0.1')
  await once(echo, 'listening')
  const relay = await FaultRelay.open({ port: portOf(echo), delayMs })
  const socket: Socket = connect({ port: relay.port, host: '127.0.0.1', noDelay: true })
  await once(socket, 'connect')
  const times: number[] = []
  for (let n = 0; n < 200; n++) {
    const from = performance.now()
    socket.write('x')
    await once(socket, 'data')
    times.push(performance.now() - from)
  }
  socket.destroy()
  echo.close()
  await relay.close()
  return times.sort((a, b) => a - b)[times.length >> 1] ?? Number.NaN
}

export async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const port = portOf(server)
  server.close()
  await once(server, 'close')
  return port
}

function portOf(server: Server): number {
  const address = server.address()
  if (typeof address !== 'object' || address === null) throw new Error('no port')
  return address.port
}
