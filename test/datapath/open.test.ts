import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import type { Datapath, StoreLayout } from '../../src/datapath/datapath.ts'
import { loadNative } from '../../src/datapath/native.ts'
import { openDatapath } from '../../src/datapath/open.ts'

describe('choice of the datapath', () => {
  let directory: string
  let layout: StoreLayout
  let datapath: Datapath | undefined
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'fullstripe-open-'))
    const memberFds = [openSync(join(directory, 'member'), 'w+')]
    layout = { memberFds, dataMembers: 1, parityMembers: 0, chunkSize: 65_536, dataOffset: 65_536 }
  })
  afterEach(async () => {
    await datapath?.close()
    datapath = undefined
    for (const fd of layout.memberFds) closeSync(fd)
    rmSync(directory, { recursive: true, force: true })
  })

  it('takes the portable one where it is asked for, and says so', () => {
    datapath = openDatapath(layout, { mode: 'portable', threads: 3 })
    expect(datapath.description).toMatchObject({ kind: 'portable', engine: 'node', threads: 1 })
    expect(datapath.description.reason).toContain('--datapath portable')
  })

  it.runIf(loadNative().ok)('takes the native one wherever it runs', () => {
    datapath = openDatapath(layout, { mode: 'auto', threads: 2 })
    expect(datapath.description).toMatchObject({ kind: 'native', threads: 2 })
  })

  it('says why the addon does not load: not built, or not an addon', () => {
    const missing = loadNative(join(directory, 'missing.node'))
    expect(missing).toEqual({ ok: false, reason: 'the native addon is not built' })
    writeFileSync(join(directory, 'broken.node'), 'not an ELF file')
    const broken = loadNative(join(directory, 'broken.node'))
    expect(broken).toMatchObject({ ok: false, reason: expect.stringContaining('does not load') })
  })

  it('falls back, or refuses, where the native one does not start', () => {
    // A native datapath refuses that many threads (or is not there at all); the portable one has no use for them.
    const options = { threads: 1_000_000 }
    datapath = openDatapath(layout, { ...options, mode: 'auto' })
    expect(datapath.description.kind).toBe('portable')
    expect(datapath.description.reason).toMatch(/native/)
    expect(() => openDatapath(layout, { ...options, mode: 'native' })).toThrow(
      expect.objectContaining({
        name: 'UserError',
        code: 'FAILED',
        message: expect.stringContaining('not possible'),
      }),
    )
  })
})
