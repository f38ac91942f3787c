import { type ChildProcess, spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { DatapathDescription } from '../../src/datapath/datapath.ts'
import type { DatapathChoice } from './served-pool.ts'

const PROGRAM = fileURLToPath(new URL('lean-daemon.mjs', import.meta.url))

/** A daemon in a process of its own, loaded ahead of time (lean-daemon.mjs). */
export class LeanDaemon {
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>
  readonly #child: ChildProcess
  readonly #waiting = new Map<
    number,
    { resolve: (result: unknown) => void; reject: (error: Error) => void }
  >()
  readonly #loaded: Promise<unknown>
  #nextId = 0
  #stderr = ''
  #ended = false

  constructor(env: Readonly<Record<string, string>> = {}) {
    this.#child = spawn(process.execPath, [PROGRAM], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    })
    this.exited = new Promise((resolve) => {
      this.#child.once('close', (code, signal) => {
        this.#ended = true
        for (const { reject } of this.#waiting.values())
          reject(new Error(`the daemon ended: ${this.#stderr}`))
        this.#waiting.clear()
        resolve({ code, signal })
      })
    })
    this.#child.stdin?.on('error', () => {}) // it may die while it is told something
    this.#child.stderr?.on('data', (text: Buffer) => {
      this.#stderr = (this.#stderr + text.toString()).slice(-4000)
    })
    this.#loaded = this.#answer()
    this.#loaded.catch(() => {})
    if (this.#child.stdout !== null) {
      createInterface({ input: this.#child.stdout }).on('line', (line) => this.#receive(line))
    }
  }

  get pid(): number {
    if (this.#child.pid === undefined) throw new Error('the daemon was not started')
    return this.#child.pid
  }

  /** Whether it ended by itself or was killed. */
  get ended(): boolean {
    return this.#ended
  }

  /** The end of what it wrote to standard error. */
  get stderr(): string {
    return this.#stderr
  }

  async open(pool: string, datapath: DatapathChoice): Promise<DatapathDescription> {
    await this.#loaded
    return (await this.command('open', { pool, datapath })) as DatapathDescription
  }

  /** Resolves when modules are loaded. */
  async loaded(): Promise<void> {
    await this.#loaded
  }

  command(command: string, more: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    const answer = this.#answer()
    this.#child.stdin?.write(`${JSON.stringify({ id: this.#nextId - 1, command, ...more })}\n`)
    return answer
  }

  /** Ends it in order. */
  async stop(): Promise<void> {
    await this.command('stop')
    this.#child.stdin?.end()
    await this.exited
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL')
    await this.exited
  }

  #answer(): Promise<unknown> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      if (this.#ended) reject(new Error(`the daemon ended: ${this.#stderr}`))
      else this.#waiting.set(id, { resolve, reject })
    })
  }

  #receive(line: string): void {
    const { id, result, error } = JSON.parse(line) as { id: number; result?: unknown; error?: string }
    const waiting = this.#waiting.get(id)
    this.#waiting.delete(id)
    if (error === undefined) waiting?.resolve(result)
    else waiting?.reject(new Error(error))
  }
}
