import { describe, expect, it } from 'vitest'
import { BufferPool } from '../../src/datapath/buffer-pool.ts'
import type { ReplyMode } from '../../src/datapath/datapath.ts'
import { RequestStream } from '../../src/datapath/request-stream.ts'
import { pattern } from '../support/datapath-rig.ts'
import { Random } from '../support/random.ts'
import { CMD, encodeRequest, FLAG } from '../support/wire-client.ts'

/** Writes down what a stream makes of its bytes; admits only as many requests as it is told to. */
class Recorder {
  readonly events: string[] = []
  readonly stream: RequestStream
  readonly pool = new BufferPool()
  room = Number.POSITIVE_INFINITY
  expected = 0 // payload bytes announced and not arrived
  partMax = Number.POSITIVE_INFINITY // bytes of a payload at once
  partErrno: number | undefined = 0
  readonly #parts: Buffer[] = []

  constructor(mode: ReplyMode) {
    const rules = { size: 2 ** 20, readOnly: false, mode, contexts: [], payloadMax: 2 ** 25 }
    this.stream = new RequestStream(rules, this.pool, {
      admits: () => this.room-- > 0,
      grants: (left) => {
        const bytes = Math.min(left, this.partMax)
        this.expected += bytes
        return bytes
      },
      onRequest: ({ command, offset, length }) => this.events.push(`${command} ${offset} ${length}`),
      partResult: () => this.partErrno,
      onPayload: (part, answers, payload, owned) => {
        this.expected -= part.payloadLength
        this.#parts.push(Buffer.from(payload))
        if (owned !== null) this.pool.give(owned)
        if (answers === null) {
          expect(part.flags & FLAG.FUA).toBe(0)
          return
        }
        expect(part.flags).toBe(answers.flags)
        expect(part.offset + part.length).toBe(answers.offset + answers.length)
        const all = Buffer.concat(this.#parts.splice(0))
        this.events.push(`${answers.command} ${answers.offset} ${all.toString('hex')}`)
      },
      onRefused: ({ command }, errno) => this.events.push(`refused ${command} ${errno}`),
      onOutOfStep: () => {
        this.events.push('out of step')
        this.expected -= this.stream.stop()
      },
    })
  }
}

function traffic(mode: ReplyMode): Buffer {
  return Buffer.concat(
    [
      { command: CMD.READ, offset: 5, length: 10 },
      { command: CMD.WRITE, offset: 7, payload: pattern(100) },
      { command: CMD.WRITE, offset: 2 ** 20, payload: pattern(50) },
      { command: CMD.FLUSH },
      { command: CMD.WRITE, offset: 0, payload: pattern(1) },
      { command: 55, offset: 0, length: 3 },
      { command: CMD.WRITE, offset: 9000, payload: pattern(9000, 3), flags: FLAG.FUA },
      { command: CMD.TRIM, offset: 1, length: 2 },
    ].map((request) => encodeRequest(request, mode)),
  )
}

describe.each(['simple', 'extended'] as const)('request stream, %s', (mode) => {
  const whole = new Recorder(mode)
  whole.stream.feed(traffic(mode))
  const expected = whole.events

  it('makes 8 events of the traffic that the other tests cut', () => {
    expect(expected).toHaveLength(8)
    expect(expected.filter((event) => event.startsWith('refused'))).toEqual(['refused 1 28', 'refused 55 22'])
  })

  it('is the same wherever it is cut in two', () => {
    const stream = traffic(mode)
    for (let cut = 0; cut <= stream.length; cut++) {
      const recorder = new Recorder(mode)
      recorder.stream.feed(stream.subarray(0, cut))
      recorder.stream.feed(stream.subarray(cut))
      expect(recorder.events).toEqual(expected)
      expect(recorder.expected).toBe(0)
    }
  })

  it('is the same in random pieces, with stalls', () => {
    const stream = traffic(mode)
    for (let seed = 1; seed <= 300; seed++) {
      const random = new Random(seed)
      const recorder = new Recorder(mode)
      recorder.room = random.below(3)
      for (let at = 0; at < stream.length; ) {
        const count = 1 + random.below(random.below(2) === 0 ? 20 : 5000)
        recorder.stream.feed(stream.subarray(at, at + count))
        at += count
        if (random.below(2) === 0) {
          recorder.room = random.below(3)
          recorder.stream.resume()
        }
      }
      while (recorder.stream.stalled) {
        recorder.room = 1 + random.below(2)
        recorder.stream.resume()
      }
      expect(recorder.events, `seed ${seed}`).toEqual(expected)
    }
  })

  it('makes the same of payloads that have to come in parts', () => {
    const stream = traffic(mode)
    for (let seed = 1; seed <= 200; seed++) {
      const random = new Random(seed)
      const recorder = new Recorder(mode)
      recorder.partMax = 1 + random.below(4000)
      recorder.partErrno = undefined
      for (let at = 0; at < stream.length || recorder.stream.stalled; ) {
        const count = 1 + random.below(3000)
        recorder.stream.feed(stream.subarray(at, at + count))
        at += count
        // The sink is done with a part now and then.
        recorder.partErrno = random.below(2) === 0 ? 0 : undefined
        recorder.stream.resume()
      }
      expect(recorder.events, `seed ${seed}`).toEqual(expected)
      expect(recorder.expected).toBe(0)
    }
  })

  it('skips the rest of a payload when a part has failed, and refuses it', () => {
    const recorder = new Recorder(mode)
    recorder.partMax = 1000
    recorder.partErrno = 28
    recorder.stream.feed(encodeRequest({ command: CMD.WRITE, offset: 0, payload: pattern(5000) }, mode))
    recorder.stream.feed(encodeRequest({ command: CMD.FLUSH }, mode))
    expect(recorder.events).toEqual([`refused ${CMD.WRITE} 28`, `${CMD.FLUSH} 0 0`])
    expect(recorder.expected).toBe(0)
  })

  it('says at the first four bytes that the stream is out of step', () => {
    const recorder = new Recorder(mode)
    recorder.stream.feed(Buffer.from('GET'))
    expect(recorder.events).toEqual([])
    recorder.stream.feed(Buffer.from(' '))
    expect(recorder.events).toEqual(['out of step'])
    recorder.stream.feed(traffic(mode))
    expect(recorder.events).toEqual(['out of step'])
  })

  it('gives back what it held when it is stopped in mid-payload', () => {
    const recorder = new Recorder(mode)
    const write = encodeRequest({ command: CMD.WRITE, offset: 0, payload: pattern(50_000) }, mode)
    recorder.stream.feed(write.subarray(0, 20_000))
    expect(recorder.expected).toBe(50_000)
    expect(recorder.stream.stop()).toBe(50_000)
    expect(recorder.pool.idleBytes).toBeGreaterThan(50_000)
    expect(recorder.stream.stop()).toBe(0)
  })
})
