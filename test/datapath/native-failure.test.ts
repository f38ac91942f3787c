import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { describe, expect, it } from 'vitest'
import { loadNative } from '../../src/datapath/native.ts'

/** What happens to the process when the policy breaks one of its own assertions, in a process of its own. */
const built = new URL('../../dist/', import.meta.url)

const PROGRAM = `
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
const { NativeDatapath } = await import(process.argv.at(-1) + 'datapath/native.js')
const directory = mkdtempSync(join(tmpdir(), 'fullstripe-native-failure-'))
process.on('exit', () => rmSync(directory, { recursive: true }))
const fd = openSync(join(directory, 'member'), 'w+')
ftruncateSync(fd, 1 << 20)
const datapath = NativeDatapath.open({ memberFds: [fd], dataMembers: 1, parityMembers: 0, chunkSize: 4096, dataOffset: 0 })
const tables = { size: 65536, slots: new Uint32Array(16), init: new Uint32Array(1), direct: new Uint32Array(1) }
const id = datapath.openExport({ name: 'v', stripeSize: 4096, formatUnit: 1, fill: 0, tables }, {
  onUpcalls() {
    throw new Error('an assertion of the policy')
  },
})
const server = createServer({ pauseOnConnect: true }, (socket) => {
  datapath.serve(id, { socket, received: Buffer.alloc(0), mode: 'simple', contexts: [], readOnly: false, onClose() {} })
})
server.listen(join(directory, 'socket'), () => {
  const client = connect(join(directory, 'socket'), () => {
    const trim = Buffer.alloc(28)
    trim.writeUInt32BE(0x25609513, 0)
    trim.writeUInt16BE(4, 6)
    trim.writeUInt32BE(4096, 24)
    client.write(trim)
  })
})
setTimeout(() => process.exit(7), 10_000) // still alive
`

describe.runIf(loadNative().ok)('native datapath', () => {
  it('lets a failed assertion of the policy end the process', () => {
    const { status, stderr } = spawnSync(
      process.execPath,
      ['--input-type=module', '-e', PROGRAM, '--', fileURLToPath(built)],
      { encoding: 'utf8', timeout: 20_000 },
    )
    expect(stderr).toMatch(/an assertion of the policy/)
    expect(status, stderr).toBe(1)
  })
})
