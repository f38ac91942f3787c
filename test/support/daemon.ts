import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { StatusInfo } from '../../src/api/types.ts'
import { Client } from '../../src/cli/client.ts'
import { until } from './poll.ts'

/** The program as users run it: commands and daemons as processes of their own, from dist/. */
const MAIN = fileURLToPath(new URL('../../dist/program/fullstripe.js', import.meta.url))

export interface CommandResult {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

export interface CommandOptions {
  readonly env?: Readonly<Record<string, string>>
  readonly cwd?: string
}

/** Runs one command to its end. FULLSTRIPE_POOL is unset unless `env` sets it. */
export function fullstripe(args: readonly string[], options: CommandOptions = {}): Promise<CommandResult> {
  const { child, output } = start(args, options)
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve({ code, ...output() }))
  })
}

/** A daemon in a process of its own. */
export class DaemonProcess {
  readonly pool: string
  readonly client: Client
  readonly #child: ChildProcess
  readonly #output: () => { stdout: string; stderr: string }
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>

  private constructor(pool: string, args: readonly string[], options: CommandOptions) {
    const { child, output } = start(['serve', pool, ...args], options)
    this.pool = pool
    this.client = new Client(pool)
    this.#child = child
    this.#output = output
    this.exited = new Promise((resolve) => child.once('close', (code, signal) => resolve({ code, signal })))
  }

  /** Starts a daemon on an existing pool and waits until it answers. */
  static async start(
    pool: string,
    args: readonly string[] = [],
    options: CommandOptions = {},
  ): Promise<DaemonProcess> {
    const daemon = new DaemonProcess(pool, args, options)
    let ended = false
    daemon.exited.then(() => {
      ended = true
    })
    await until(async () => ended || (await daemon.#answers()), 'the daemon answers', 60_000)
    if (ended) throw new Error(`the daemon ended at once: ${daemon.stderr}`)
    return daemon
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error('the daemon was not started')
    return this.#child.pid
  }
  get stdout(): string {
    return this.#output().stdout
  }
  get stderr(): string {
    return this.#output().stderr
  }

  status(): Promise<StatusInfo> {
    return this.client.get<StatusInfo>('/v1/status')
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal)
  }

  /** Ends it in order, or, with SIGKILL, not. @returns how it ended */
  async stop(
    signal: NodeJS.Signals = 'SIGTERM',
  ): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
    this.#child.kill(signal)
    return this.exited
  }

  async #answers(): Promise<boolean> {
    try {
      return (await this.status()).pid === this.#child.pid
    } catch {
      return false
    }
  }
}

/** A directory that `remove` deletes. */
export function temporaryDirectory(
  prefix = 'fullstripe-test-',
  parent = tmpdir(),
): { path: string; remove: () => void } {
  const path = mkdtempSync(join(parent, prefix))
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) }
}

function start(args: readonly string[], options: CommandOptions) {
  const { FULLSTRIPE_POOL: _, ...inherited } = process.env
  const child = spawn(process.execPath, [MAIN, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...inherited, ...options.env },
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
  })
  const stdout: Buffer[] = []
  const stderr: Buffer[] = []
  child.stdout.on('data', (chunk: Buffer) => stdout.push(chunk))
  child.stderr.on('data', (chunk: Buffer) => stderr.push(chunk))
  const text = (chunks: Buffer[]) => Buffer.concat(chunks).toString('utf8')
  return { child, output: () => ({ stdout: text(stdout), stderr: text(stderr) }) }
}
