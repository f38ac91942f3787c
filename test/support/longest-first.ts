import { BaseSequencer, type TestSpecification } from 'vitest/node'

/**
 * Files that run for a minute or so begin first, so that none of them is what everybody waits for in the end. Others follow in
 * the order that vitest has for them.
 */
const LONG = [
  'mirror/faults',
  'concurrency/concurrency',
  'simulation/simulation',
  'volume/crash',
  'overload/memory',
  'mirror/nbd-target',
  'mirror/peers',
  'simulation/pair',
]

export class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const place = ({ moduleId }: TestSpecification): number => {
      const index = LONG.findIndex((name) => moduleId.endsWith(`/test/${name}.test.ts`))
      return index < 0 ? LONG.length : index
    }
    return (await super.sort(files)).sort((a, b) => place(a) - place(b))
  }
}
