/**
 * npm run torture: the long versions of what the tests do for seconds, in turns, for as long as is asked for.
 *
 * Each part has a command of its own, which gets a seed and a share of the time, and ends with the first thing it finds;
 * what it prints about itself is shown. The first failure ends everything: its output, and the line that repeats it.
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = fileURLToPath(new URL('../..', import.meta.url))
const SLICE_SECONDS_MIN = 30
const SLICE_SECONDS_MAX = 300
const OUTPUT_KEPT = 200_000 // characters

const vitest = (...files) => [
  'node_modules/.bin/vitest',
  'run',
  '--config',
  'test/vitest.config.ts',
  ...files,
]

/** @type {Record<string, (seconds: number, seed: number, turn: number) => { env: Record<string, string>, command: string[] }[]>} */
const PARTS = {
  // Four kinds of server, one after the other.
  crash: (seconds) => [
    { env: { FULLSTRIPE_TEST_SECONDS: share(seconds, 4) }, command: vitest('test/volume/crash.test.ts') },
  ],
  // Of a life of a few seconds some failures are looked at; of a short one, all.
  power: (seconds, _, turn) =>
    turn % 2 === 0
      ? [
          {
            env: { FULLSTRIPE_TEST_ROUNDS: share(seconds, 24), FULLSTRIPE_TEST_CUTS: '8' },
            command: vitest('test/volume/power-cut.test.ts'),
          },
        ]
      : [
          {
            env: {
              FULLSTRIPE_TEST_OPERATIONS: String(8 + Math.round(seconds / 6)),
              FULLSTRIPE_TEST_CUTS: '3',
            },
            command: vitest('test/volume/power-replay.test.ts'),
          },
        ],
  // Five kinds of server, four volumes each; then the native core under the sanitizers.
  concurrency: (seconds) => [
    { env: { FULLSTRIPE_TEST_SECONDS: share(seconds, 30) }, command: vitest('test/concurrency') },
    {
      env: { FULLSTRIPE_TEST_ROUNDS: String(60 + seconds), FULLSTRIPE_FUZZ_SECONDS: '1' },
      command: ['native/test/run', 'concurrency'],
    },
  ],
  // A soak of two servers; the rest takes what it takes.
  overload: (seconds) => [
    { env: { FULLSTRIPE_TEST_SECONDS: share(seconds, 3) }, command: vitest('test/overload') },
  ],
  simulation: (seconds, seed) => [
    { env: {}, command: ['scripts/simulate', '--minutes', String(seconds / 60), '--from', String(seed)] },
  ],
  fuzz: (seconds) => [
    { env: { FULLSTRIPE_FUZZ_SECONDS: share(seconds, 10) }, command: vitest('test/fuzz') },
    { env: { FULLSTRIPE_FUZZ_SECONDS: share(seconds, 8) }, command: ['native/test/run', 'parser'] },
  ],
}

const { values } = parseArgs({
  options: {
    minutes: { type: 'string' },
    seed: { type: 'string' },
    only: { type: 'string', multiple: true },
    help: { type: 'boolean', default: false },
  },
})
const names = values.only ?? Object.keys(PARTS)
const unknown = names.filter((name) => PARTS[name] === undefined)
const minutes = Number(values.minutes)
if (values.help || unknown.length > 0 || !(minutes > 0)) {
  for (const name of unknown) console.error(`torture: there is no part ${name}`)
  console.error(
    `usage: npm run torture -- --minutes N [--seed S] [--only ${Object.keys(PARTS).join('|')}]...`,
  )
  process.exit(values.help ? 0 : 2)
}
const firstSeed = Number(values.seed ?? Date.now() % 1e9)
const started = performance.now()
const deadline = started + minutes * 60_000
const counts = new Map(names.map((name) => [name, 0]))

process.exitCode = await torture()

async function torture() {
  const slice = Math.min(
    SLICE_SECONDS_MAX,
    Math.max(SLICE_SECONDS_MIN, Math.floor((minutes * 60) / names.length)),
  )
  console.log(
    `torture: ${names.join(', ')} in turns of ${slice} s for ${minutes} min, from seed ${firstSeed}`,
  )
  // Each part has a turn, even where the time is short; afterwards none begins that could not have half of one.
  for (let turn = 0; turn < names.length || deadline - performance.now() > slice * 500; turn++) {
    const name = names[turn % names.length]
    const seed = firstSeed + turn
    for (const { env, command } of PARTS[name](slice, seed, Math.floor(turn / names.length))) {
      if (!existsSync(`${root}/${command[0]}`)) {
        console.log(`${name}: skipped, there is no ${command[0]}`)
        continue
      }
      const all = { ...env, TEST_SEED: String(seed) }
      const replay = [...Object.entries(all).map(([key, value]) => `${key}=${value}`), ...command].join(' ')
      const begun = performance.now()
      const { code, output } = await run(command, all, slice)
      const seconds = Math.round((performance.now() - begun) / 1000)
      for (const line of told(output)) console.log(`  ${line}`)
      if (code !== 0) {
        console.log(output)
        console.log(`${name}: FAILED after ${seconds} s (${code}); to repeat it: ${replay}`)
        console.log(summary('failed'))
        return 1
      }
      console.log(`${name}: passed, seed ${seed}, ${seconds} s`)
    }
    counts.set(name, (counts.get(name) ?? 0) + 1)
  }
  console.log(summary('passed'))
  return 0
}

function summary(verdict) {
  const turns = [...counts].map(([name, count]) => `${name} ${count}`).join(', ')
  return `torture ${verdict}: ${Math.round((performance.now() - started) / 60_000)} min, turns: ${turns}`
}

/** Seconds, or rounds that take seconds, for each of several things. */
function share(seconds, things) {
  return String(Math.max(2, Math.floor(seconds / things)))
}

function run(command, env, slice) {
  return new Promise((resolve) => {
    // Four times as long as meant, and what a build takes: then it hangs.
    const child = spawn('timeout', ['-k', '10', String(slice * 4 + 900), ...command], {
      cwd: root,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env, NO_COLOR: '1' },
    })
    let output = ''
    const keep = (bytes) => {
      output = (output + bytes).slice(-OUTPUT_KEPT)
    }
    child.stdout.on('data', keep)
    child.stderr.on('data', keep)
    child.once('error', (error) => resolve({ code: String(error), output }))
    child.once('close', (code, signal) => resolve({ code: code ?? signal, output }))
  })
}

/** What tests say of themselves: how much they did, and with which seed. */
function told(output) {
  return output
    .split('\n')
    .filter((line) =>
      /\b(seed \d+,|deaths in|requests,|seeds? in|a second alone|of \d+ MiB|execs)/.test(line),
    )
}
