import { afterEach, describe, expect, it, vi } from 'vitest'
import { LinkError } from '../../src/link/errors.ts'
import { Session } from '../../src/link/session.ts'
import { Pair } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { SMALL_POOL } from './versions.ts'

/** As many mirrors with one peer as there may be, and one more. That the channels of all of them find room: test/link/session.test.ts. */
vi.mock('../../src/base/limits.ts', async (importOriginal) => {
  const { LIMITS } = await importOriginal<typeof import('../../src/base/limits.ts')>()
  return { LIMITS: { ...LIMITS, mirrorsPerPeerMax: 2, mirrorRetryMsMax: 300 } }
})

let pair: Pair | undefined
afterEach(async () => {
  vi.restoreAllMocks()
  await pair?.close()
  pair = undefined
})

async function opened(...volumes: string[]): Promise<Pair> {
  pair = await Pair.open({ datapath: 'portable', pool: SMALL_POOL })
  for (const name of volumes) await pair.one.pool.createVolume({ name, size: 1 << 20 })
  return pair
}

describe('many mirrors with one peer', () => {
  it('past the bound one more is refused, whichever side asks, and there is room again when one is removed', async () => {
    const { one, two, address } = await opened('a', 'b', 'c')
    const add = (volume: string): Promise<unknown> => one.mirrors.add({ volume, peer: address, mode: 'sync' })
    await add('a')
    await add('b')
    await expect(add('c')).rejects.toMatchObject({
      code: 'REFUSED',
      message: expect.stringMatching(/^there are 2 mirrors with two-\w+, which is the most/),
    })
    await two.pool.createVolume({ name: 'back', size: 1 << 20 })
    const back = two.mirrors.add({ volume: 'back', peer: `127.0.0.1:${one.port}` })
    await expect(back).rejects.toThrow(/there are 2 mirrors with one-/)
    expect(two.pool.volumes().map(({ name }) => name)).toEqual(['a', 'b', 'back'])
    // Deleted by force: the other side does not know.
    await one.pool.deleteVolume('a', { force: true })
    await expect(add('c')).rejects.toThrow(/the peer says: there are 2 mirrors with one-/)
    await two.mirrors.remove('a')
    await add('c')
    for (const volume of ['b', 'c']) await one.reach(volume, 'insync')
  })

  it('one whose channels find no room says why, and begins when there is some', async () => {
    const { one, address } = await opened('a')
    const open = Session.prototype.open
    const opening = vi.spyOn(Session.prototype, 'open').mockImplementation(function (
      this: Session,
      name,
      ...rest
    ) {
      if (name === 'mirror-data') return Promise.reject(new LinkError('OVERFLOW', 'too many channels'))
      return open.call(this, name, ...rest)
    })
    await one.mirrors.add({ volume: 'a', peer: address, mode: 'sync' })
    expect(one.show('a')).toMatchObject({ state: 'connecting', reason: 'too many channels' })
    const before = opening.mock.calls.length
    await until(() => opening.mock.calls.length > before, 'it tries again')
    expect(one.show('a')).toMatchObject({ state: 'connecting', reason: 'too many channels' })
    opening.mockRestore()
    await one.reach('a', 'insync')
  })
})
