import { describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import type { Upcall } from '../../src/datapath/datapath.ts'
import { Forwarder } from '../../src/mirror/forwarder.ts'
import { type Remote, RemoteError, type RemoteOperation } from '../../src/mirror/remote.ts'
import type { Volume } from '../../src/volume/volume.ts'
import { isPending } from '../support/poll.ts'

/** What goes to the other side, which answers when it is told to. */
function rig() {
  const sent: { operation: RemoteOperation; answer: (error?: RemoteError) => void }[] = []
  const changed: [number, number][] = []
  const refused: string[] = []
  const remote = {
    apply: (operation: RemoteOperation) =>
      new Promise<void>((resolve, reject) =>
        sent.push({ operation, answer: (error) => (error === undefined ? resolve() : reject(error)) }),
      ),
    abandon: () => {},
  } as unknown as Remote
  const volume = {
    readPayload: (_id: number, from: number, target: Buffer) => void target.fill(from),
  } as unknown as Volume
  const forwarder = new Forwarder(volume, {
    changed: (offset, length) => changed.push([offset, length]),
    refused: (reason) => refused.push(reason),
  })
  return { sent, changed, refused, remote, forwarder }
}

const upcall = (kind: Upcall['kind'], flags: number): Upcall => {
  return { id: 1, kind, flags, offset: 4096, length: 8192, contexts: [] }
}
const FUA = 1
const NO_HOLE = 2
const FAST_ZERO = 16

describe('requests that go to both sides', () => {
  it('keep what the other side has to honour, and not what was decided here', () => {
    const { sent, remote, forwarder } = rig()
    forwarder.follow(remote)
    forwarder.forward(upcall('zero', FUA | NO_HOLE | FAST_ZERO), 8192, 4096)
    // Over there zeros may not be fast, and the request is under way here.
    expect(sent[0]?.operation).toMatchObject({
      kind: 'zero',
      offset: 8192,
      length: 4096,
      flags: FUA | NO_HOLE,
    })
  })

  it('bring the bytes of their part', () => {
    const { sent, remote, forwarder } = rig()
    forwarder.follow(remote)
    forwarder.forward(upcall('write', 0), 4106, 100)
    const target = Buffer.alloc(1)
    sent[0]?.operation.payload(5, target)
    expect(target[0]).toBe(15)
  })

  it('count as changed in the turn in which the sides part, answered or not', async () => {
    const { sent, changed, remote, forwarder } = rig()
    forwarder.follow(remote)
    const first = forwarder.forward(upcall('write', 0), 4096, 512)
    const second = forwarder.forward(upcall('write', 0), 8192, 512)
    sent[0]?.answer()
    await first?.answered
    expect(await isPending(second?.known ?? Promise.resolve())).toBe(true)
    forwarder.stop(false)
    expect(changed).toEqual([[8192, 512]])
    await second?.known
    await second?.answered
    sent[1]?.answer() // too late, and nobody's any more
    expect(changed).toEqual([[8192, 512]])
  })

  it('wait for the other side where that was asked for, and are told when it will not come', async () => {
    const { remote, forwarder } = rig()
    forwarder.follow(remote)
    const under = forwarder.forward(upcall('write', 0), 4096, 512)
    forwarder.stop(true)
    const later = forwarder.forward(upcall('write', 0), 8192, 512)
    await under?.known
    expect(await isPending(Promise.race([under?.answered, later?.answered]))).toBe(true)
    forwarder.follow(remote)
    await Promise.all([under?.answered, later?.answered])
    forwarder.stop(true)
    const last = forwarder.forward(upcall('write', 0), 8192, 512)
    forwarder.unblock(new StoreError('SHUTTING_DOWN', 'it ends'))
    await expect(last?.answered).rejects.toMatchObject({ code: 'SHUTTING_DOWN' })
  })

  it('that the other side refuses are told of, and not answered before the sides part', async () => {
    const { sent, changed, refused, remote, forwarder } = rig()
    forwarder.follow(remote)
    const under = forwarder.forward(upcall('write', 0), 4096, 512)
    sent[0]?.answer(new RemoteError('refused', 'no space'))
    expect(await isPending(under?.answered ?? Promise.resolve())).toBe(true)
    expect(refused).toEqual(['no space'])
    forwarder.stop(false)
    await under?.answered
    expect(changed).toEqual([[4096, 512]])
  })
})
