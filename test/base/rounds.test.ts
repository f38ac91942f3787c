import { describe, expect, it } from 'vitest'
import { Rounds } from '../../src/base/rounds.ts'

function gated() {
  const begun: { end: () => void; fail: (error: Error) => void }[] = []
  const rounds = new Rounds(() => new Promise((end, fail) => begun.push({ end, fail })))
  return { begun, rounds }
}
const turn = () => new Promise((resolve) => setImmediate(resolve))

describe('rounds', () => {
  it('gives all who come during a run the next one, and only that', async () => {
    const { begun, rounds } = gated()
    const done: string[] = []
    const note = (name: string) => rounds.run().then(() => done.push(name))
    const all = [note('first'), note('second'), note('third')]
    await turn()
    expect(begun).toHaveLength(1)
    begun[0]?.end()
    await turn()
    expect(done).toEqual(['first'])
    expect(begun).toHaveLength(2)
    all.push(note('fourth')) // the second run has begun
    begun[1]?.end()
    await turn()
    expect(done).toEqual(['first', 'second', 'third'])
    begun[2]?.end()
    await Promise.all(all)
    expect(begun).toHaveLength(3)
  })

  it('tells a failure to those whose run it was', async () => {
    const { begun, rounds } = gated()
    const outcomes = [rounds.run(), rounds.run()].map((run) => run.catch((error: Error) => error.message))
    begun[0]?.fail(new Error('no such luck'))
    await turn()
    begun[1]?.end()
    expect(await Promise.all(outcomes)).toEqual(['no such luck', undefined])
  })

  it('knows when it is idle', async () => {
    const { begun, rounds } = gated()
    void rounds.run()
    void rounds.run()
    let idle = false
    const waited = rounds.idle().then(() => {
      idle = true
    })
    begun[0]?.end()
    await turn()
    expect(idle).toBe(false)
    begun[1]?.end()
    await waited
  })
})
