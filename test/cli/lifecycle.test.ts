import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import type { StatusInfo } from '../../src/api/types.ts'
import { Client } from '../../src/cli/client.ts'
import { NbdClient } from '../../src/nbd/client.ts'
import { DaemonProcess, fullstripe, temporaryDirectory } from '../support/daemon.ts'
import { until, within } from '../support/poll.ts'

/** Processes start slowly on a machine that runs many tests at once. */
const SLOW = 60_000
vi.setConfig({ testTimeout: 2 * SLOW, hookTimeout: SLOW })

const main = fileURLToPath(new URL('../../dist/program/fullstripe.js', import.meta.url))
const directory = temporaryDirectory()
const pool = join(directory.path, 'pool')
const uri = `nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`
const options = ['--datapath', 'portable']
const children: ChildProcess[] = []

beforeAll(async () => {
  await fullstripe(['pool', 'create', pool])
  const daemon = await DaemonProcess.start(pool, options)
  await fullstripe(['volume', 'create', 'v', '--size', '64M', '--pool', pool])
  await daemon.stop()
})
afterAll(() => {
  for (const child of children) child.kill('SIGKILL')
  directory.remove()
})

async function readBack(offset: number): Promise<number> {
  const client = await NbdClient.connect(uri)
  const target = Buffer.alloc(512)
  await client.read(target, offset)
  await client.close()
  return target[0] ?? -1
}

describe('a daemon process', () => {
  it.each(['SIGTERM', 'SIGINT', 'SIGHUP'] as const)(
    'stops in order on %s and exits with 0',
    async (signal) => {
      const daemon = await DaemonProcess.start(pool, options)
      const client = await NbdClient.connect(uri)
      await client.write(Buffer.alloc(4096, 5), 4096)
      expect(await within(daemon.stop(signal), 'the daemon stops', SLOW)).toEqual({ code: 0, signal: null })
      await within(client.gone, 'the client is disconnected', SLOW)
      expect(existsSync(join(pool, 'control.sock'))).toBe(false)
      expect(existsSync(join(pool, 'nbd.sock'))).toBe(false)
      expect((await fullstripe(['check', pool])).code).toBe(0)
      const again = await DaemonProcess.start(pool, options)
      expect(await readBack(4096)).toBe(5)
      await again.stop()
    },
  )

  it('stops with streams and clients still connected', async () => {
    const daemon = await DaemonProcess.start(pool, options)
    const stop = new AbortController()
    const lines = daemon.client.lines('/v1/events?since=1&follow=true', stop.signal)
    await lines.next()
    const client = await NbdClient.connect(uri)
    expect(await within(daemon.stop(), 'the daemon stops', SLOW)).toEqual({ code: 0, signal: null })
    await within(client.gone, 'the client is disconnected', SLOW)
    for await (const _ of lines); // it ends
  })

  it('logs JSON lines, and nothing on stdout, where nobody sits at a terminal', async () => {
    const daemon = await DaemonProcess.start(pool, options)
    await daemon.stop()
    expect(daemon.stdout).toBe('')
    const entries = daemon.stderr
      .trimEnd()
      .split('\n')
      .map((line): { msg: string } => JSON.parse(line))
    expect(entries.map(({ msg }) => msg)).toEqual(
      expect.arrayContaining([
        expect.stringContaining('serving on nbd+unix'),
        'stopping; a second signal stops at once',
        'stopped',
      ]),
    )
  })

  it('tells a terminal where clients and peers connect, ports as bound', async () => {
    const words = [process.execPath, main, 'serve', pool, '--link', '127.0.0.1:0', ...options]
    // `exec`: else a shell that waits for it may answer Ctrl-C, too.
    const command = `exec ${words.map((word) => `'${word}'`).join(' ')}`
    const child = spawn('script', ['-qefc', command, '/dev/null'], { stdio: ['pipe', 'pipe', 'inherit'] })
    children.push(child)
    const exited = new Promise((resolve) => child.once('close', resolve))
    let text = ''
    child.stdout.on('data', (chunk: Buffer) => {
      text += chunk.toString()
    })
    await until(() => text.includes('Ctrl-C'), 'the daemon says what it does', SLOW)
    const { link, listen } = await new Client(pool).get<StatusInfo>('/v1/status')
    expect(link).toMatch(/^127\.0\.0\.1:[1-9]\d*$/)
    expect(text).toContain(`  peers     ${link}\r\n`)
    expect(text).toContain(`  clients   ${listen[0]}\r\n`)
    child.stdin.write('\x03')
    expect(await within(exited, 'it ends', SLOW)).toBe(0)
  })

  it('starts over what a killed one left: sockets, lock, answered writes', async () => {
    const killed = await DaemonProcess.start(pool, options)
    const client = await NbdClient.connect(uri)
    await client.write(Buffer.alloc(4096, 9), 1 << 20)
    expect(await killed.stop('SIGKILL')).toEqual({ code: null, signal: 'SIGKILL' })
    expect(existsSync(join(pool, 'control.sock'))).toBe(true)
    const unreachable = await fullstripe(['status', '--pool', pool])
    expect(unreachable.code).toBe(3)
    const daemon = await DaemonProcess.start(pool, options)
    expect(await readBack(1 << 20)).toBe(9)
    await daemon.stop()
    expect((await fullstripe(['check', pool])).code).toBe(0)
  })

  it('is the only one of its pool', async () => {
    const daemon = await DaemonProcess.start(pool, options)
    const second = await fullstripe(['serve', pool, ...options, '--log-level', 'silent'])
    expect(second.code).toBe(1)
    expect(second.stderr).toMatch(/^fullstripe: .* is locked by process \d+ .*\n$/)
    expect(await readBack(4096)).toBe(5) // and not harmed by the attempt
    await daemon.stop()
  })

  it('stops at once at the second signal, with a code that says so', async () => {
    const daemon = await DaemonProcess.start(pool, options)
    process.kill(daemon.pid, 'SIGSTOP') // so that both signals wait for it, in order of their numbers
    daemon.signal('SIGTERM')
    daemon.signal('SIGINT')
    process.kill(daemon.pid, 'SIGCONT')
    expect(await within(daemon.exited, 'the daemon ends', SLOW)).toEqual({ code: 1, signal: null })
    expect(daemon.stderr).toContain('second signal: stopping at once')
  })

  it('takes a signal that comes twice from one key for one', async () => {
    const daemon = await DaemonProcess.start(pool, options)
    daemon.signal('SIGINT')
    while (!daemon.stderr.includes('a second signal')) await new Promise(setImmediate)
    daemon.signal('SIGINT')
    expect(await within(daemon.exited, 'the daemon ends', SLOW)).toEqual({ code: 0, signal: null })
  })

  it('serves a pool whose path is longer than a socket address', async () => {
    const deep = join(directory.path, 'd'.repeat(60), 'e'.repeat(60), 'pool')
    await fullstripe(['pool', 'create', deep])
    const daemon = await DaemonProcess.start(deep, options)
    expect((await daemon.status()).pool.directory).toBe(deep)
    const { code } = await fullstripe(['volume', 'create', 'v', '--size', '1M', '--pool', deep])
    expect(code).toBe(0)
    expect(await daemon.stop()).toEqual({ code: 0, signal: null })
    expect(existsSync(join(deep, 'control.sock'))).toBe(false)
  })
})

describe('commands that run until interrupted', () => {
  let daemon: DaemonProcess
  beforeAll(async () => {
    daemon = await DaemonProcess.start(pool, options)
  })
  afterAll(async () => {
    await daemon.stop()
  })

  function start(...args: string[]) {
    const child = spawn(process.execPath, [main, ...args, '--pool', pool], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    children.push(child)
    let text = ''
    child.stdout.on('data', (chunk: Buffer) => {
      text += chunk.toString('utf8')
    })
    const exited = new Promise<number | null>((resolve) => child.once('close', (code) => resolve(code)))
    return { child, exited, text: () => text }
  }

  it('status --watch shows rates and exits with 0 on SIGINT', async () => {
    const watch = start('status', '--watch')
    await until(() => watch.text().includes('clients'), 'the first status', SLOW)
    expect(watch.text()).not.toContain('READS/S')
    await until(() => watch.text().includes('READS/S'), 'rates', SLOW)
    watch.child.kill('SIGINT')
    expect(await within(watch.exited, 'it ends', SLOW)).toBe(0)
    expect(watch.text()).not.toContain('\x1b') // not a terminal
  })

  it('status --watch --json writes one object a line', async () => {
    const watch = start('status', '--watch', '--json')
    await until(() => watch.text().split('\n').length > 2, 'two lines', SLOW)
    watch.child.kill('SIGINT')
    expect(await within(watch.exited, 'it ends', SLOW)).toBe(0)
    for (const line of watch.text().trimEnd().split('\n'))
      expect(JSON.parse(line)).toMatchObject({ state: 'serving' })
  })

  it('events --follow goes on as things happen and exits with 0 on SIGINT', async () => {
    const follow = start('events', '--follow', '--json')
    await until(() => follow.text().includes('daemon.started'), 'old events', SLOW)
    await fullstripe(['volume', 'create', 'later', '--size', '1M', '--pool', pool])
    await until(() => follow.text().includes('volume.created'), 'the new event', SLOW)
    follow.child.kill('SIGINT')
    expect(await within(follow.exited, 'it ends', SLOW)).toBe(0)
    const records = follow
      .text()
      .trimEnd()
      .split('\n')
      .map((line): { sequence: number } => JSON.parse(line))
    expect(records.map(({ sequence }) => sequence)).toEqual(records.map((_, index) => index + 1))
  })

  it('events --follow says with exit code 3 that the daemon has stopped', async () => {
    const second = join(directory.path, 'second')
    await fullstripe(['pool', 'create', second])
    const other = await DaemonProcess.start(second, options)
    const child = spawn(process.execPath, [main, 'events', '--follow', '--pool', second], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    children.push(child)
    let text = ''
    child.stdout.on('data', (chunk: Buffer) => {
      text += chunk.toString('utf8')
    })
    const exited = new Promise<number | null>((resolve) => child.once('close', (code) => resolve(code)))
    await until(() => text.includes('daemon.started'), 'old events', SLOW)
    await other.stop()
    expect(await within(exited, 'it ends', SLOW)).toBe(3)
    expect(text).toContain('daemon.draining')
  })

  it('ends quietly when its reader goes away', async () => {
    const watch = start('status', '--watch', '--json')
    await until(() => watch.text() !== '', 'the first status', SLOW)
    watch.child.stdout.destroy()
    expect(await within(watch.exited, 'it ends', SLOW)).toBe(0)
  })
})

it('a bug ends the daemon with exit code 1 and a fatal log line', async () => {
  const preload = join(directory.path, 'bug.mjs')
  writeFileSync(preload, "process.on('SIGUSR2', () => { Promise.reject(new Error('a bug of ours')) })\n")
  const daemon = await DaemonProcess.start(pool, options, { env: { NODE_OPTIONS: `--import ${preload}` } })
  daemon.signal('SIGUSR2')
  expect(await within(daemon.exited, 'the daemon ends', SLOW)).toEqual({ code: 1, signal: null })
  const last = daemon.stderr.trimEnd().split('\n').at(-1) ?? ''
  expect(JSON.parse(last)).toMatchObject({ level: 60, msg: 'unhandled rejection: a bug of ours' })
})
