/**
 * Fuzzing of what reads bytes that others wrote. A target says how inputs of its kind are built, and what has to hold of
 * any input; this file brings the inputs:
 *
 *   the corpus    test/fuzz/corpus/TARGET/*.hex, every file in each run: bytes as hexadecimal digits, # starts a comment
 *   built         by the target's arbitrary (fast-check), which knows the structure
 *   mutated       inputs of both kinds, bytes changed, cut, doubled, joined
 *
 * The number of inputs is fixed, so a run takes what it takes. FULLSTRIPE_FUZZ_SECONDS=N goes on with mutation for N
 * seconds a target, from another seed each time; FULLSTRIPE_FUZZ_SEED=N repeats one.
 *
 * A failure prints its input, as short as it could be made, in the form of a corpus file. An input that does not come
 * back is printed by a watchdog, which then ends the process: nothing else could.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import type fc from 'fast-check'
import { messageOf } from '../../src/base/errors.ts'
import { Random } from '../support/random.ts'

export interface Target {
  readonly name: string
  /** Inputs with the structure of the real thing, right and wrong. */
  readonly built: fc.Arbitrary<Buffer>
  /** Throws where something does not hold. Everything that is drawn at random in it comes from `random`. */
  check(input: Buffer, random: Random): void
  /** The most memory that one input may ask for, in bytes. */
  readonly allocationMax: (inputLength: number) => number
  readonly inputMax: number // bytes
}

const CORPUS = fileURLToPath(new URL('corpus', import.meta.url))
/** An input that takes longer than this does not come back. */
const HANG_MS = 30_000
const WATCHED_MAX = 1 << 20

export interface CorpusEntry {
  readonly name: string
  readonly bytes: Buffer
}

export function corpusOf(target: Target): CorpusEntry[] {
  const directory = join(CORPUS, target.name)
  return readdirSync(directory)
    .filter((name) => name.endsWith('.hex'))
    .sort()
    .map((name) => ({ name, bytes: parseHex(readFileSync(join(directory, name), 'utf8')) }))
}

function parseHex(text: string): Buffer {
  const digits = text.replace(/#.*/g, '').replace(/\s/g, '')
  if (!/^([0-9a-f]{2})*$/i.test(digits)) throw new Error('a corpus file holds hexadecimal digits')
  return Buffer.from(digits, 'hex')
}

export function toHex(bytes: Buffer): string {
  return bytes.toString('hex').replace(/(.{64})/g, '$1\n')
}

/** Holds one input against its target. @throws an error that shows how to keep the input */
export function tryInput(target: Target, input: Buffer, seed: number): void {
  const failure = failureOf(target, input, seed)
  if (failure === undefined) return
  const short = shortened(target, input, seed)
  const why = messageOf(failureOf(target, short, seed) ?? failure)
  throw new Error(
    `${target.name}, seed ${seed}: ${why}\nkeep this as test/fuzz/corpus/${target.name}/WHAT-IT-IS.hex:\n${toHex(short)}\n`,
    { cause: failure },
  )
}

function failureOf(target: Target, input: Buffer, seed: number): unknown {
  watch(target, input)
  try {
    const asked = allocations(() => target.check(Buffer.from(input), new Random(seed)))
    const most = target.allocationMax(input.length)
    if (asked > most) throw new Error(`it asked for ${asked} bytes of memory; at most ${most} are right`)
    return undefined
  } catch (error) {
    return error ?? new Error('it threw nothing')
  } finally {
    watch(null, input)
  }
}

/** A shorter input that fails as well: pieces are left out as long as that works, then bytes become 0. */
function shortened(target: Target, input: Buffer, seed: number): Buffer {
  let best = input
  let tries = 0
  const better = (candidate: Buffer): boolean => {
    if (++tries > 2000 || failureOf(target, candidate, seed) === undefined) return false
    best = candidate
    return true
  }
  for (let size = 1 << Math.ceil(Math.log2(best.length + 1)); size >= 1; size >>= 1) {
    for (let at = 0; at < best.length; ) {
      const without = Buffer.concat([best.subarray(0, at), best.subarray(at + size)])
      if (without.length === best.length || !better(without)) at += size
    }
  }
  for (let at = 0; at < best.length; at++) {
    if (best[at] === 0) continue
    const zeroed = Buffer.from(best)
    zeroed[at] = 0
    better(zeroed)
  }
  return best
}

/** Bytes of memory that `run` asks for through Buffer, in all. */
function allocations(run: () => void): number {
  const { alloc, allocUnsafe, allocUnsafeSlow } = Buffer
  let total = 0
  const counted = <Rest extends unknown[]>(
    original: (size: number, ...rest: Rest) => Buffer<ArrayBuffer>,
  ) => {
    return (size: number, ...rest: Rest) => {
      total += size
      return original.call(Buffer, size, ...rest)
    }
  }
  Object.assign(Buffer, {
    alloc: counted(alloc),
    allocUnsafe: counted(allocUnsafe),
    allocUnsafeSlow: counted(allocUnsafeSlow),
  })
  try {
    run()
  } finally {
    Object.assign(Buffer, { alloc, allocUnsafe, allocUnsafeSlow })
  }
  return total
}

// ------------------------------------------------------------------------------------------------ mutation

const TELLING = [0, 1, 2, 4, 7, 8, 0x7f, 0x80, 0xfe, 0xff]

/** A new input made of inputs that are worth something. */
export function mutated(inputs: readonly Buffer[], random: Random, inputMax: number): Buffer {
  let bytes = Buffer.from(random.pick(inputs))
  for (let changes = 1 + random.below(random.below(4) === 0 ? 16 : 3); changes > 0; changes--) {
    bytes = mutate(bytes, inputs, random)
  }
  return bytes.subarray(0, inputMax)
}

function mutate(bytes: Buffer, inputs: readonly Buffer[], random: Random): Buffer<ArrayBuffer> {
  const at = random.below(bytes.length + 1)
  const count = 1 + random.below(random.below(2) === 0 ? 4 : 64)
  const head = bytes.subarray(0, at)
  const changed = Buffer.from(bytes)
  switch (random.below(9)) {
    case 0: // a bit
      if (at < bytes.length) changed[at] = changed[at]! ^ (1 << random.below(8))
      return changed
    case 1: // a byte that is often an edge
      if (at < bytes.length) changed[at] = random.pick(TELLING)
      return changed
    case 2: // a word, big endian or little
      if (at + 4 <= bytes.length) {
        const word =
          random.below(2) === 0 ? random.next() : random.pick(TELLING) + (random.below(3) - 1) * 2 ** 8
        if (random.below(2) === 0) changed.writeUInt32BE(word >>> 0, at)
        else changed.writeUInt32LE(word >>> 0, at)
      }
      return changed
    case 3: // a little more or less
      if (at < bytes.length) changed[at] = (changed[at]! + random.below(9) - 4) & 0xff
      return changed
    case 4: // cut out
      return Buffer.concat([head, bytes.subarray(at + count)])
    case 5: // cut off
      return Buffer.from(head)
    case 6: // doubled
      return Buffer.concat([bytes.subarray(0, at + count), bytes.subarray(at)])
    case 7: // random bytes put in
      return Buffer.concat([head, random.bytes(count), bytes.subarray(at)])
    default: {
      // the end of another
      const other = random.pick(inputs)
      return Buffer.concat([head, other.subarray(random.below(other.length + 1))])
    }
  }
}

/** `bytes` in pieces, as a socket may deliver them. */
export function inPieces(bytes: Buffer, random: Random): Buffer[] {
  const pieces: Buffer[] = []
  const most = random.pick([1, 3, 16, 64, 5000])
  for (let at = 0; at < bytes.length; ) {
    const count = 1 + random.below(most)
    pieces.push(bytes.subarray(at, at + count))
    at += count
  }
  return pieces
}

/** Throws unless both are the same, and says where they part. */
export function expectSame(whole: unknown, pieces: unknown, what: string): void {
  const [a, b] = [JSON.stringify(whole), JSON.stringify(pieces)]
  if (a === b) return
  let at = 0
  while (a[at] === b[at]) at++
  throw new Error(
    `${what}: ...${a.slice(Math.max(0, at - 40), at + 80)} and ...${b.slice(Math.max(0, at - 40), at + 80)}`,
  )
}

// ------------------------------------------------------------------------------------------------ watchdog

/**
 * The watchdog is a thread of its own. It shares: [0] counts inputs begun and ended (odd: one is running), [1] its length,
 * and then the bytes of the input, after the name of its target.
 */
const WATCHDOG = `
const { workerData } = require('node:worker_threads')
const { writeSync } = require('node:fs')
const words = new Int32Array(workerData.shared, 0, 2)
let last = -1
setInterval(() => {
  const now = Atomics.load(words, 0)
  if (now === last && now % 2 === 1) {
    const text = Buffer.from(workerData.shared, 8, words[1]).toString('latin1')
    const split = text.indexOf('\\n')
    const hex = Buffer.from(text.slice(split + 1), 'latin1').toString('hex')
    writeSync(2, text.slice(0, split) + ' does not come back from this input:\\n' + hex + '\\n')
    process.kill(process.pid, 'SIGKILL')
  }
  last = now
}, ${HANG_MS})
`
let watched: { readonly words: Int32Array; readonly bytes: Uint8Array; readonly worker: Worker } | undefined

function watch(target: Target | null, input: Buffer): void {
  if (watched === undefined) {
    const shared = new SharedArrayBuffer(8 + WATCHED_MAX)
    const worker = new Worker(WATCHDOG, { eval: true, workerData: { shared } })
    worker.unref()
    watched = { words: new Int32Array(shared, 0, 2), bytes: new Uint8Array(shared, 8), worker }
  }
  const { words, bytes } = watched
  if (target !== null) {
    const named = Buffer.concat([Buffer.from(`${target.name}\n`), input]).subarray(0, WATCHED_MAX)
    bytes.set(named)
    words[1] = named.length
  }
  Atomics.add(words, 0, 1)
}
