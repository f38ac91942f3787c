/**
 * Programs that the benchmark starts: waiting for their sockets, their processor time, and their end.
 *
 * Processor time is that of the program and of every process it started, alive or gone (nbd-server makes one a
 * connection): /proc/PID/stat has user and system time of a process with all its threads, and of the children that
 * it has waited for. The kernel counts in ticks of 1/100 s.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { setTimeout as pause } from 'node:timers/promises'

const TICKS_PER_SECOND = 100

export interface ProcessTimes {
  readonly pid: number
  readonly parent: number
  readonly seconds: number // user and system, own and of ended children
}

/** One line of /proc/PID/stat. The name in parentheses may hold anything, so fields are counted from its end. */
export function parseStat(text: string): ProcessTimes {
  const pid = Number.parseInt(text, 10)
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ')
  const number = (field: number) => Number(fields[field - 3]) // proc(5) numbers them from 1; the third comes first here
  const ticks = number(14) + number(15) + number(16) + number(17)
  if (!Number.isInteger(pid) || !Number.isFinite(ticks))
    throw new Error(`not a line of /proc/PID/stat: ${text}`)
  return { pid, parent: number(4), seconds: ticks / TICKS_PER_SECOND }
}

function allProcesses(): ProcessTimes[] {
  const found: ProcessTimes[] = []
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue
    try {
      found.push(parseStat(readFileSync(`/proc/${name}/stat`, 'utf8')))
    } catch {
      // It ended between the two looks.
    }
  }
  return found
}

/** Seconds of processor time of a process and everything below it. */
export function cpuSeconds(root: number, processes: readonly ProcessTimes[] = allProcesses()): number {
  let total = processes.find((process) => process.pid === root)?.seconds ?? 0
  const waiting = [root]
  for (let pid = waiting.pop(); pid !== undefined; pid = waiting.pop()) {
    for (const child of processes.filter(({ parent }) => parent === pid)) {
      total += child.seconds
      waiting.push(child.pid)
    }
  }
  return total
}

/** Bytes resident, from /proc/PID/status. */
export function residentBytes(pid: number): number {
  const match = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))
  return Number(match?.[1] ?? Number.NaN) * 1024
}

export interface Finished {
  readonly output: string
  readonly seconds: number
}

/** Runs a program to its end. @throws Error with what it wrote when it fails */
export async function runProgram(program: string, args: readonly string[]): Promise<Finished> {
  const from = performance.now()
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  let errors = ''
  child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
    output += chunk
  })
  child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
    errors = (errors + chunk).slice(-4096)
  })
  const [code] = await once(child, 'close')
  if (code !== 0)
    throw new Error(
      `${program} ${args.join(' ')} ended with ${code}: ${errors.trim()} ${output.slice(-1024)}`,
    )
  return { output, seconds: (performance.now() - from) / 1000 }
}

/** A server that runs while the benchmark does. */
export class Background {
  readonly #child: ChildProcess
  readonly #name: string
  readonly #pidFile: string | undefined
  #errors = ''

  /** @param pidFile where a program that goes to the background by itself says who it is then */
  constructor(program: string, args: readonly string[], pidFile?: string) {
    this.#name = program
    this.#pidFile = pidFile
    this.#child = spawn(program, args, { stdio: ['ignore', 'ignore', 'pipe'] })
    this.#child.stderr?.setEncoding('utf8').on('data', (chunk: string) => {
      this.#errors = (this.#errors + chunk).slice(-4096)
    })
  }

  get pid(): number {
    return this.#pidFile === undefined ? (this.#child.pid ?? 0) : Number(readFileSync(this.#pidFile, 'utf8'))
  }

  /** Resolves when a unix socket accepts connections. @throws Error when the program ends before, or is too slow */
  async listening(path: string, secondsMax = 60): Promise<void> {
    const deadline = performance.now() + secondsMax * 1000
    while (!(await accepts(path))) {
      const { exitCode } = this.#child
      if (exitCode !== null && (exitCode !== 0 || this.#pidFile === undefined)) {
        throw new Error(`${this.#name} ended with ${exitCode}: ${this.#errors}`)
      }
      if (performance.now() > deadline) {
        throw new Error(`${this.#name} does not listen on ${path}: ${this.#errors}`)
      }
      await pause(10)
    }
  }

  async stop(): Promise<void> {
    const { pid } = this
    try {
      process.kill(pid, 'SIGTERM')
      while (true) {
        process.kill(pid, 0)
        await pause(10)
      }
    } catch (error) {
      // It is gone.
      if (!(error instanceof Error && 'code' in error && error.code === 'ESRCH')) throw error
    }
  }
}

function accepts(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(path)
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}
