import { describe, expect, it } from 'vitest'
import { readable } from '../../src/daemon/log.ts'

describe('a log line for people', () => {
  it('has time, level, message and what else there is', () => {
    const line = readable('{"level":40,"time":1767225600000,"pid":1,"msg":"slow","member":2,"path":"/x"}')
    expect(line).toMatch(/^\d\d:\d\d:\d\d warn {2}slow \(member=2, path=\/x\)\n$/)
  })

  it('shows the stack of an error below', () => {
    const line = readable(
      JSON.stringify({ level: 60, time: 0, msg: 'bad', err: { type: 'Error', stack: 'Error: x\n    at y' } }),
    )
    expect(line).toMatch(/fatal bad\n {2}Error: x\n {6}at y\n$/)
  })
})
