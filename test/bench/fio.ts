/** fio as the client: its nbd engine over libnbd, one process a job, and what its report says. */
import { runProgram } from './processes.ts'

export interface Load {
  readonly pattern: 'randread' | 'randwrite' | 'read' | 'write'
  readonly block: number // bytes
  readonly depth: number // requests in flight a connection
  readonly connections: number
}

export interface Extent {
  readonly size: number // bytes of the volume that requests fall into, from its start
  readonly seconds?: number // for so long, over and over; absent: `size` bytes in all
}

export interface Measured {
  readonly requests: number
  readonly bytes: number
  readonly seconds: number
}

export async function runFio(uri: string, load: Load, extent: Extent): Promise<Measured> {
  const args = [
    '--name=bench',
    '--ioengine=nbd',
    `--uri=${uri}`,
    `--rw=${load.pattern}`,
    `--bs=${load.block}`,
    `--iodepth=${load.depth}`,
    `--numjobs=${load.connections}`,
    `--size=${extent.size}`,
    '--randrepeat=0',
    '--group_reporting',
    '--output-format=json',
    ...(extent.seconds === undefined ? [] : ['--time_based', `--runtime=${extent.seconds}`, '--norandommap']),
  ]
  const { output } = await runProgram('fio', args)
  return parseReport(output)
}

/** fio writes notes before the JSON when it has some. */
export function parseReport(text: string): Measured {
  const start = text.indexOf('{')
  const report: unknown = JSON.parse(text.slice(Math.max(0, start)))
  const job = field(field(report, 'jobs'), '0')
  let requests = 0
  let bytes = 0
  let milliseconds = 0
  for (const direction of ['read', 'write']) {
    const part = field(job, direction)
    requests += number(part, 'total_ios')
    bytes += number(part, 'io_bytes')
    milliseconds = Math.max(milliseconds, number(part, 'runtime'))
  }
  if (requests === 0 || milliseconds === 0) throw new Error('fio reports no requests')
  return { requests, bytes, seconds: milliseconds / 1000 }
}

function field(value: unknown, key: string): unknown {
  if (typeof value !== 'object' || value === null) throw new Error(`fio's report has no ${key}`)
  return Reflect.get(value, key)
}

function number(value: unknown, key: string): number {
  const found = field(value, key)
  if (typeof found !== 'number') throw new Error(`fio's report has no number ${key}`)
  return found
}
