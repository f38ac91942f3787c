import { beforeEach, describe, expect, it } from 'vitest'
import { InlineGate } from '../../src/datapath/inline-gate.ts'

describe('inline gate', () => {
  let now: number
  let gate: InlineGate
  beforeEach(() => {
    now = 1000
    gate = new InlineGate(undefined, () => now)
  })

  function call(ms: number, bytes = 4096): void {
    const start = now
    now += ms
    gate.note(bytes, start)
  }

  it('is open for small accesses and never for large ones', () => {
    expect(gate.allows(4096)).toBe(true)
    expect(gate.allows(256 * 1024)).toBe(true)
    expect(gate.allows(256 * 1024 + 1)).toBe(false)
    expect(new InlineGate(0).allows(1)).toBe(false)
  })

  it('stays open after one slow call among fast ones', () => {
    for (let round = 0; round < 20; round++) {
      call(30)
      expect(gate.allows(4096)).toBe(true)
      for (let fast = 0; fast < 10; fast++) call(0.01)
    }
  })

  it('closes after two slow calls in a row, and opens again to try', () => {
    call(8)
    call(8)
    expect(gate.allows(4096)).toBe(false)
    now += 99
    expect(gate.allows(4096)).toBe(false)
    now += 1
    expect(gate.allows(4096)).toBe(true)
  })

  it('stays closed longer each time the trial shows that the data is still cold, and recovers', () => {
    const closedFor = (): number => {
      const start = now
      while (!gate.allows(4096)) now += 10
      return now - start
    }
    const pauses: number[] = []
    for (let trial = 0; trial < 7; trial++) {
      call(10)
      call(10)
      pauses.push(closedFor())
    }
    expect(pauses).toEqual([100, 200, 400, 800, 1600, 1600, 1600])
    for (let fast = 0; fast < 1000; fast++) {
      now += 10
      call(0.02)
    }
    call(10)
    call(10)
    expect(closedFor()).toBe(100)
  })

  it('grants large calls more time', () => {
    for (let round = 0; round < 10; round++) call(1.9, 256 * 1024)
    expect(gate.allows(4096)).toBe(true)
    for (let round = 0; round < 2; round++) call(2.1, 256 * 1024)
    expect(gate.allows(4096)).toBe(false)
  })
})
