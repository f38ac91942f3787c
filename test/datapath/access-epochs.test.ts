import { describe, expect, it } from 'vitest'
import { AccessEpochs } from '../../src/datapath/access-epochs.ts'
import { Random } from '../support/random.ts'

describe('access epochs', () => {
  it('a barrier waits for what began before it and for nothing later', async () => {
    const epochs = new AccessEpochs()
    const early = epochs.begin()
    let passed = false
    const barrier = epochs.barrier().then(() => {
      passed = true
    })
    const late = epochs.begin()
    await Promise.resolve()
    expect(passed).toBe(false)
    epochs.end(early)
    await barrier
    epochs.end(late)
    await epochs.barrier()
  })

  it('an access cannot end twice', () => {
    const epochs = new AccessEpochs()
    const access = epochs.begin()
    epochs.end(access)
    expect(() => epochs.end(access)).toThrow('ended twice')
  })

  it('does so in any order of beginnings, ends and barriers', async () => {
    for (let seed = 1; seed <= 30; seed++) {
      const random = new Random(seed)
      const epochs = new AccessEpochs()
      const open = new Map<number, ReturnType<AccessEpochs['begin']>>()
      const barriers: { before: Set<number>; passed: boolean }[] = []
      for (let step = 0; step < 200; step++) {
        const choice = random.below(3)
        if (choice === 0) open.set(step, epochs.begin())
        else if (choice === 1 && open.size > 0) {
          const key = random.pick([...open.keys()])
          const access = open.get(key)
          open.delete(key)
          if (access !== undefined) epochs.end(access)
        } else {
          const barrier = { before: new Set(open.keys()), passed: false }
          barriers.push(barrier)
          epochs.barrier().then(() => {
            barrier.passed = true
          })
        }
        await Promise.resolve()
        await Promise.resolve()
        const wrong = barriers.filter(
          ({ before, passed }) => passed === [...before].some((key) => open.has(key)),
        )
        expect(wrong, `seed ${seed} step ${step}`).toEqual([])
      }
    }
  })
})
