/**
 * Servers for the tests of the client: real ones (nbdkit, qemu-nbd) on unix sockets, and one whose every byte a test
 * decides. All of them end with the test that started them.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { until } from '../support/poll.ts'

export function hasProgram(name: string): boolean {
  try {
    execFileSync('sh', ['-c', `command -v ${name}`])
    return true
  } catch {
    return false
  }
}

/** A directory that goes with the test. */
export function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), 'fullstripe-nbd-'))
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }))
  return directory
}

/** Whether somebody accepts connections there: the socket is in the file system before it listens. */
export function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ path })
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}

export interface RunningServer {
  readonly process: ChildProcess
  readonly socket: string
  /** The URI of an export of it. */
  uri(exportName?: string): string
}

async function start(program: string, args: readonly string[], socket: string): Promise<RunningServer> {
  const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let words = ''
  child.stderr?.on('data', (chunk: Buffer) => {
    words = (words + chunk.toString()).slice(-2000)
  })
  const exited = new Promise<void>((resolve) => child.once('exit', () => resolve()))
  onTestFinished(async () => {
    child.kill('SIGTERM')
    await exited
  })
  await until(async () => {
    if (child.exitCode !== null) throw new Error(`${program} ended with ${child.exitCode}: ${words}`)
    return await answers(socket)
  }, `${program} listens`)
  return {
    process: child,
    socket,
    uri: (name = '') => `nbd+unix:///${encodeURIComponent(name)}?socket=${socket}`,
  }
}

/** nbdkit in the foreground; `args` are its plugin, filters and their settings. */
export async function startNbdkit(...args: string[]): Promise<RunningServer> {
  const socket = join(temporaryDirectory(), 'nbdkit.sock')
  return await start('nbdkit', ['-f', '-U', socket, ...args], socket)
}

/** qemu-nbd, for any number of clients; `args` are its options and the image. */
export async function startQemuNbd(...args: string[]): Promise<RunningServer> {
  const socket = join(temporaryDirectory(), 'qemu.sock')
  return await start('qemu-nbd', ['--persistent', '--shared=0', '-k', socket, ...args], socket)
}

/** A server that does what `serve` does with each connection. Returns its URI. */
export async function startScripted(serve: (socket: Socket) => void): Promise<string> {
  const path = join(temporaryDirectory(), 'scripted.sock')
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    serve(socket)
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  onTestFinished(async () => {
    for (const socket of sockets) socket.destroy()
    await new Promise((resolve) => server.close(resolve))
  })
  return `nbd+unix:///disk?socket=${path}`
}
