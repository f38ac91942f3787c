import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import { NbdClient } from '../../src/nbd/client.ts'
import type { VolumeInfo } from '../../src/volume/volume.ts'
import { DaemonProcess, fullstripe, temporaryDirectory } from '../support/daemon.ts'

/** What an operator sees of intents: commands, and a daemon that is killed. */
const MiB = 2 ** 20

vi.setConfig({ testTimeout: 60_000 }) // much of it is processes and disks, on machines that do other things, too

describe('intents on the command line', () => {
  const temporary = temporaryDirectory('fullstripe-cli-intents-')
  const pool = join(temporary.path, 'pool')
  let daemon: DaemonProcess

  beforeAll(async () => {
    expect((await fullstripe(['pool', 'create', pool, '--capacity', '64M'])).code).toBe(0)
    daemon = await DaemonProcess.start(pool)
  })
  afterAll(async () => {
    await daemon.stop()
    temporary.remove()
  })

  const run = async (...args: string[]) => fullstripe([...args, '--pool', pool])
  async function lines(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await run(...args)
    expect(code, stderr).toBe(0)
    return stdout
  }
  const info = async () => JSON.parse(await lines('volume', 'show', 'v', '--json')) as VolumeInfo

  it('switches them on and off, and says so', async () => {
    await lines('volume', 'create', 'v', '--size', '16M')
    expect(await lines('volume', 'show', 'v')).not.toMatch(/intents/)
    expect(await lines('volume', 'set', 'v', '--intents', 'on')).toBe('volume v: intents are on\n')
    expect(await lines('volume', 'show', 'v')).toMatch(/^intents +0 of 4096 regions hot, 1M each/m)
    expect(await lines('volume', 'set', 'v', '--intents', 'off')).toBe('volume v: intents are off\n')
    expect((await info()).intents).toBeNull()
    const refused = await run('volume', 'acknowledge', 'v')
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringMatching(/keeps no intents/)])
    await lines('volume', 'delete', 'v')
    await lines('volume', 'create', 'v', '--size', '16M', '--region-size', '2M')
    expect((await info()).intents).toMatchObject({ regionSize: 2 * MiB, hot: 0, hotMax: 4096, suspect: 0 })
    expect((await run('volume', 'set', 'v')).code).toBe(2)
    expect((await run('volume', 'set', 'v', '--intents', 'maybe')).code).toBe(2)
    expect((await run('volume', 'create', 'w', '--size', '1M', '--region-size', '512')).stderr).toMatch(
      /region has to be 4K to 1G/,
    )
  })

  it('shows after a kill what may not have been flushed, until that is acknowledged', async () => {
    const client = await NbdClient.connect(`nbd+unix:///v?socket=${join(pool, 'nbd.sock')}`)
    await client.write(Buffer.alloc(512, 1), 5 * MiB)
    await client.close()
    await daemon.stop('SIGKILL')
    const check = await fullstripe(['check', pool])
    expect([check.code, check.stdout]).toEqual([0, expect.stringMatching(/v: 1 regions were hot/)])
    daemon = await DaemonProcess.start(pool)
    expect(await lines('volume', 'show', 'v')).toMatch(/^suspect +2M since 1 unclean stop/m)
    expect(await lines('volume', 'list')).toMatch(/ 2M suspect$/m)
    expect(await lines('events')).toMatch(/warn +volume.suspect +v: .*1 regions \(2M\)/)
    expect(await lines('volume', 'map', 'v')).toMatch(/^ +4M +1M +no +suspect\n +5M +64K +yes +suspect\n/m)
    const map = JSON.parse(await lines('volume', 'map', 'v', '--json')) as {
      extents: { offset: number; length: number; suspect?: boolean }[]
    }
    const suspect = map.extents.filter((extent) => extent.suspect === true)
    expect([suspect[0]?.offset, suspect.reduce((sum, { length }) => sum + length, 0)]).toEqual([
      4 * MiB,
      2 * MiB,
    ])
    expect((await run('volume', 'acknowledge', 'v', '--stops', '0')).stderr).toMatch(/1 times by now, not 0/)
    expect(await lines('volume', 'acknowledge', 'v', '--stops', '1')).toBe('volume v: no region is suspect\n')
    expect(await lines('volume', 'map', 'v')).not.toMatch(/suspect/)
    expect((await info()).intents).toMatchObject({ suspect: 0, stops: 0, since: null })
  })

  it('has metrics of them', async () => {
    const { request } = await import('node:http')
    const text = await new Promise<string>((resolve, reject) => {
      const asked = request({ socketPath: join(pool, 'control.sock'), path: '/metrics' }, (reply) => {
        const parts: Buffer[] = []
        reply
          .on('data', (part: Buffer) => parts.push(part))
          .on('end', () => resolve(Buffer.concat(parts).toString()))
      })
      asked.on('error', reject).end()
    })
    expect(text).toMatch(/^fullstripe_volume_hot_regions\{volume="v"\} 0$/m)
    expect(text).toMatch(/^fullstripe_volume_suspect_bytes\{volume="v"\} 0$/m)
    expect(text).toMatch(/^fullstripe_pool_read_only 0$/m)
  })
})
