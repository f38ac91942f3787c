/** How verdicts come about, with servers that break rules on purpose. */
import type { Socket } from 'node:net'
import { describe, expect, it } from 'vitest'
import { parseNbdUri } from '../../src/nbd/uri.ts'
import { startScripted } from '../nbd/servers.ts'
import { Breach, type Check, NotApplicable, type Result, reading, runCheck, writing } from './check.ts'
import { checksNamed } from './checks.ts'
import { Context, type Facts, probe } from './context.ts'

const FACTS: Facts = {
  exports: ['disk'],
  anyName: false,
  modes: new Map([['simple', { size: 2n ** 20n, flags: 1 }]]),
  contexts: [],
  tls: 'none',
}
const GREETING = Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), Buffer.from([0, 3])])

async function run(check: Check, serve: (socket: Socket) => void, mayWrite = true): Promise<Result> {
  const uri = parseNbdUri(await startScripted(serve))
  return await runCheck(check, new Context({ uri, mayWrite }, FACTS), 300)
}
const greets = (socket: Socket) => void socket.write(GREETING)
const named = (id: string) => checksNamed(id)[0]!

describe('a check', () => {
  it('fails where the server never speaks', async () => {
    const result = await run(named('greeting.magic'), () => {})
    expect(result).toMatchObject({
      verdict: 'fail',
      detail: expect.stringContaining('no answer within 300 ms'),
    })
  })

  it('fails where the server stops in the middle, also when its rule is only a SHOULD', async () => {
    const result = await run(named('abort.data'), (socket) => {
      socket.write(GREETING)
      socket.on('data', () => socket.write(Buffer.from('0003e889045565a900', 'hex')))
    })
    expect(result).toMatchObject({ verdict: 'fail', level: 'should' })
    expect(result.detail).toContain('no answer')
  })

  it('turns the end of the connection into a failure or advice, as its rule is', async () => {
    const hangsUp = (socket: Socket) => {
      socket.write(GREETING)
      socket.on('data', () => socket.end())
    }
    expect(await run(named('abort.ack'), hangsUp)).toMatchObject({ verdict: 'fail' })
    expect(await run(named('abort.data'), hangsUp)).toMatchObject({ verdict: 'advice' })
  })

  it('fails where a reply breaks a MUST on the way', async () => {
    const result = await run(named('abort.data'), (socket) => {
      socket.write(GREETING)
      // A reply to LIST, not to ABORT.
      socket.once('data', () => socket.write(Buffer.from('0003e889045565a9000000030000000100000000', 'hex')))
    })
    expect(result).toMatchObject({ verdict: 'fail', detail: expect.stringContaining('one to 3') })
  })

  it('passes, does not apply, or is not allowed to write', async () => {
    expect(await run(named('greeting.magic'), greets)).toMatchObject({ verdict: 'pass', detail: '' })
    expect(await run(named('structured.ack'), greets)).toMatchObject({ verdict: 'n/a' })
    const written = writing('must', 'x', 'y', 'z', () => Promise.resolve())
    expect(await run(written, greets, false)).toMatchObject({ verdict: 'n/a' })
    expect(await run(written, greets)).toMatchObject({ verdict: 'pass' })
  })

  it('says so where the server is gone afterwards, which fails whatever the rule was', async () => {
    const broken = reading('should', 'x', 'y', 'z', async (context) => {
      await (await context.open()).read(1, 'a byte')
    })
    const result = await run(broken, (socket) => socket.end())
    expect(result).toMatchObject({
      verdict: 'fail',
      detail: expect.stringContaining('no connections any more'),
    })
  })

  it('lets errors of its own through', async () => {
    const own = reading('must', 'x', 'y', 'z', () => Promise.reject(new TypeError('mine')))
    await expect(run(own, greets)).rejects.toThrow('mine')
    const breach = reading('should', 'x', 'y', 'z', () => Promise.reject(new Breach('theirs', 'must')))
    expect(await run(breach, greets)).toMatchObject({ verdict: 'fail', detail: 'theirs' })
    const none = reading('must', 'x', 'y', 'z', () => Promise.reject(new NotApplicable('nothing')))
    expect(await run(none, greets)).toMatchObject({ verdict: 'n/a', detail: 'nothing' })
  })
})

it('finds out in time that a server is none', async () => {
  const silent = parseNbdUri(await startScripted(() => {}))
  await expect(probe(silent, 200)).rejects.toThrow('waiting for its greeting')
  const other = parseNbdUri(
    await startScripted((socket) => void socket.write('HTTP/1.1 400 Bad Request\r\n\r\n')),
  )
  await expect(probe(other, 1000)).rejects.toThrow('does not greet')
})
