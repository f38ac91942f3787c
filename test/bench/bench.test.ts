/** The arithmetic of the benchmark: a wrong ratio there would prove anything. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { expect, it } from 'vitest'
import { parseReport } from './fio.ts'
import { cpuSeconds, parseStat } from './processes.ts'
import { textTable } from './report.ts'
import { median, medianSample, ROWS, type Row, type Sample, sampleOf, verdictOf } from './rows.ts'

const sample = (requestsPerSecond: number, cpuMicroseconds: number): Sample => ({
  requestsPerSecond,
  bytesPerSecond: requestsPerSecond * 4096,
  cpuMicroseconds,
})
const row: Row = {
  title: 'test',
  pattern: 'randread',
  block: 4096,
  depth: 1,
  connections: 1,
  portable: true,
  throughputMin: 1.5,
  cpuMax: 0.7,
}

it('takes the middle of the rounds', () => {
  expect(median([3, 1, 2])).toBe(2)
  expect(median([4, 1, 3, 2])).toBe(2.5)
  expect(median([7])).toBe(7)
  expect(() => median([])).toThrow('median of nothing')
  expect(medianSample([sample(10, 5), sample(30, 1), sample(20, 9)])).toEqual(sample(20, 5))
})

it('compares with the fastest peer, in throughput and in CPU', () => {
  const results = new Map([
    ['ours', sample(160, 6)],
    ['slow', sample(50, 2)],
    ['fast', sample(100, 10)],
  ])
  const verdict = verdictOf(row, 'ours', false, results, ['slow', 'fast'])
  expect(verdict).toMatchObject({ peer: 'fast', throughputRatio: 1.6, cpuRatio: 0.6, reached: true })
  results.set('ours', sample(149, 6))
  expect(verdictOf(row, 'ours', false, results, ['slow', 'fast']).reached).toBe(false)
  results.set('ours', sample(160, 7.1))
  expect(verdictOf(row, 'ours', false, results, ['slow', 'fast']).reached).toBe(false)
  results.set('ours', sample(40, 100))
  expect(verdictOf(row, 'ours', true, results, ['slow', 'fast']).reached).toBe(true)
  results.set('ours', sample(39, 1))
  expect(verdictOf(row, 'ours', true, results, ['slow', 'fast']).reached).toBe(false)
})

it('has the rows and targets of the release', () => {
  expect(ROWS.map(({ throughputMin, cpuMax }) => [throughputMin, cpuMax])).toEqual([
    [1.5, null],
    [1.5, null],
    [1, 0.7],
    [1, 0.7],
    [1, 0.7],
    [1, 0.7],
    [1.1, 0.7],
    [1.1, 0.7],
  ])
})

it("reads fio's report", () => {
  const direction = (total_ios: number, io_bytes: number, runtime: number) => ({
    total_ios,
    io_bytes,
    runtime,
  })
  const report = { jobs: [{ read: direction(0, 0, 0), write: direction(500, 2_048_000, 2000) }] }
  expect(parseReport(`note: something\n${JSON.stringify(report)}`)).toEqual({
    requests: 500,
    bytes: 2_048_000,
    seconds: 2,
  })
  expect(sampleOf({ requests: 500, bytes: 2_048_000, seconds: 2 }, 0.01)).toEqual({
    requestsPerSecond: 250,
    bytesPerSecond: 1_024_000,
    cpuMicroseconds: 20,
  })
  expect(() =>
    parseReport(JSON.stringify({ jobs: [{ read: direction(0, 0, 0), write: direction(0, 0, 0) }] })),
  ).toThrow('no requests')
})

it('counts the processor time of a process and all below it', () => {
  const line = '7 (a) b (c) S 3 7 7 0 -1 4194560 5 0 0 0 100 50 25 25 20 0 4 0 1 1 1'
  expect(parseStat(line)).toEqual({ pid: 7, parent: 3, seconds: 2 })
  const processes = [
    { pid: 1, parent: 0, seconds: 100 },
    { pid: 10, parent: 1, seconds: 1 },
    { pid: 11, parent: 10, seconds: 2 },
    { pid: 12, parent: 11, seconds: 4 },
    { pid: 13, parent: 1, seconds: 8 },
  ]
  expect(cpuSeconds(10, processes)).toBe(7)
})

it('sees the time that a real process spends', async () => {
  const child = spawn(process.execPath, ['-e', 'for (;;);'], { stdio: 'ignore' })
  try {
    const pid = child.pid ?? 0
    const deadline = Date.now() + 20_000
    while (cpuSeconds(pid) < 0.2 && Date.now() < deadline)
      await new Promise((resolve) => setTimeout(resolve, 20))
    expect(cpuSeconds(pid)).toBeGreaterThanOrEqual(0.2)
    expect(parseStat(readFileSync(`/proc/${pid}/stat`, 'utf8')).parent).toBe(process.pid)
  } finally {
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
})

it('lines columns up', () => {
  expect(textTable([['a', 'bb'], ['ccc', 'd'], ['e']])).toBe('a    bb\nccc   d\ne')
})
