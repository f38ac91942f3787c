/** Every fuzz target, on every run: its corpus, inputs built at random, inputs mutated. fuzz.ts says how to run it longer. */
import { describe, expect, it } from 'vitest'
import { fc } from '../nbd/property.ts'
import { Random } from '../support/random.ts'
import { corpusOf, mutated, tryInput } from './fuzz.ts'
import { RECORD_TARGETS } from './records.ts'
import { STREAM_TARGETS } from './streams.ts'

const BUILT = 500
const MUTATED = 10_000
const SECONDS = Number(process.env['FULLSTRIPE_FUZZ_SECONDS'] ?? 0)
const SEED = Number(process.env['FULLSTRIPE_FUZZ_SEED'] ?? Math.floor(Math.random() * 2 ** 31))

describe.each([...STREAM_TARGETS, ...RECORD_TARGETS].map((target) => [target.name, target] as const))(
  'fuzz: %s',
  (_name, target) => {
    const corpus = corpusOf(target)

    it('has a corpus, and all of it holds', () => {
      expect(corpus.length).toBeGreaterThan(0)
      for (const { bytes } of corpus) for (const seed of [1, 2, 3]) tryInput(target, bytes, seed)
    })

    it('holds for what is built', () => {
      fc.assert(
        fc.property(target.built, (input) => tryInput(target, input, SEED)),
        { numRuns: BUILT, seed: SEED },
      )
    })

    it('holds for what is mutated', { timeout: 60_000 + 2000 * SECONDS }, () => {
      const built = fc.sample(target.built, { numRuns: 100, seed: SEED })
      const inputs = [...corpus.map(({ bytes }) => bytes), ...built]
      const until = performance.now() + 1000 * SECONDS
      for (let round = 0; round < MUTATED || performance.now() < until; round++) {
        const seed = SEED + round
        tryInput(target, mutated(inputs, new Random(seed), target.inputMax), seed)
      }
    })
  },
)
