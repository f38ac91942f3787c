import { chmodSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest'
import { Authority } from '../link/certificates.ts'
import { Pair } from '../support/mirror-pair.ts'
import { until } from '../support/poll.ts'
import { Random } from '../support/random.ts'

const MIB = 1 << 20

let authority: Authority
let pair: Pair | undefined
beforeAll(async () => {
  authority = await Authority.make()
})
afterAll(() => authority.remove())
afterEach(async () => {
  await pair?.close()
  pair = undefined
})

describe('a mirror over TLS with a shared key', () => {
  it('copies, follows, and comes back after both sides were started again', async () => {
    const keyFile = join(authority.directory, 'shared')
    writeFileSync(keyFile, 'a shared secret of some length\n')
    chmodSync(keyFile, 0o600)
    const one = {
      datapath: 'native' as const,
      security: { keyFile, tls: await authority.issue('IP:127.0.0.1') },
    }
    pair = await Pair.open(one)
    const { one: here, two: there } = pair
    await here.pool.createVolume({ name: 'data', size: 16 * MIB })
    const random = new Random(4)
    let client = await here.connect('data', ['base:allocation'])
    for (let at = 0; at < 8 * MIB; at += MIB) await client.write(random.bytes(MIB), at)
    await here.mirrors.add({ volume: 'data', peer: pair.address, mode: 'sync' })
    await here.reach('data', 'insync')
    await client.write(random.bytes(300_000), 5_000_192)
    expect((await there.content('data')).equals(await here.content('data'))).toBe(true)
    await there.restart()
    await here.restart()
    client = await here.connect('data', ['base:allocation'])
    await client.write(random.bytes(MIB), 10 * MIB)
    await here.reach('data', 'insync')
    await until(() => here.show('data').lag.bytes === 0, 'nothing lacking')
    expect((await there.content('data')).equals(await here.content('data'))).toBe(true)
  })

  it('is refused by a peer without TLS, by name', async () => {
    const tls = await authority.issue('IP:127.0.0.1')
    pair = await Pair.open({ datapath: 'portable', security: { tls } }, { datapath: 'portable' })
    const { one, two } = pair
    await one.pool.createVolume({ name: 'data', size: MIB })
    await expect(one.mirrors.add({ volume: 'data', peer: pair.address })).rejects.toThrow(
      /cannot reach the peer .*TLS/,
    )
    expect(one.mirrors.list()).toEqual([])
    expect(two.pool.volumes()).toEqual([])
  })
})
