import { mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { deviceName, NbdDevices } from '../../src/cli/nbd-devices.ts'
import { temporaryDirectory } from '../support/daemon.ts'

/** A sysfs and a procfs made of plain files: what attach decides, without a kernel. test/kernel has the real ones. */
let root: { path: string; remove: () => void }
let devices: NbdDevices

beforeEach(() => {
  root = temporaryDirectory()
  devices = new NbdDevices(join(root.path, 'sys'), join(root.path, 'proc'), join(root.path, 'run'))
  for (const name of ['nbd0', 'nbd1', 'nbd10', 'nbd2', 'sda']) {
    put(`sys/block/${name}/size`, '0')
    put(`sys/class/block/${name}/dev`, `43:${name.slice(3)}`)
  }
})
afterEach(() => root.remove())

function put(path: string, text: string): void {
  mkdirSync(dirname(join(root.path, path)), { recursive: true })
  writeFileSync(join(root.path, path), `${text}\n`)
}

function connect(name: string, pid: number): void {
  put(`sys/block/${name}/pid`, String(pid))
  put(`sys/block/${name}/size`, '2048')
}

const note = { volume: 'data', uuid: 'u', pool: '/pool', pid: 123, connections: 2 }
const device = (name: string) => {
  const found = devices.find(name)
  if (found === undefined) throw new Error(`no ${name}`)
  return found
}

describe('nbd devices', () => {
  it('are listed in the order of their numbers, with who connected them', () => {
    connect('nbd1', 123)
    expect(devices.list().map(({ name }) => name)).toEqual(['nbd0', 'nbd1', 'nbd2', 'nbd10'])
    expect(device('nbd1')).toEqual({ name: 'nbd1', path: '/dev/nbd1', pid: 123, size: 1 << 20 })
    expect(device('nbd0')).toEqual({ name: 'nbd0', path: '/dev/nbd0', pid: undefined, size: 0 })
  })

  it('are none where the driver is missing', () => {
    rmSync(join(root.path, 'sys'), { recursive: true })
    expect(devices.list()).toEqual([])
  })

  it('have notes, which hold as long as the connection they are about', () => {
    connect('nbd1', 123)
    expect(devices.note(device('nbd1'))).toBeUndefined()
    devices.writeNote(device('nbd1'), note)
    expect(devices.note(device('nbd1'))).toEqual(note)
    connect('nbd1', 124) // somebody else's connection
    expect(devices.note(device('nbd1'))).toBeUndefined()
    connect('nbd1', 123)
    devices.removeNote(device('nbd1'))
    expect(devices.note(device('nbd1'))).toBeUndefined()
  })

  it.each([
    '',
    '{',
    '[]',
    '{"volume":1}',
    '{"volume":"x","uuid":"u","pool":"/p","pid":"123","connections":1}',
  ])('have no note where the file holds %j', (text) => {
    connect('nbd1', 123)
    put('run/fullstripe/nbd1.json', text)
    expect(devices.note(device('nbd1'))).toBeUndefined()
  })

  it('are in use when mounted, also a partition, also below a path with a space', () => {
    expect(devices.use(device('nbd1'))).toBeUndefined()
    put('proc/self/mountinfo', '36 35 43:1 / /mnt/my\\040disk rw - ext4 /dev/nbd1 rw')
    expect(devices.use(device('nbd1'))).toBe('is mounted at /mnt/my disk')
    expect(devices.use(device('nbd10'))).toBeUndefined()
    put('sys/block/nbd2/nbd2p1/size', '1')
    put('sys/class/block/nbd2p1/dev', '43:65')
    put('proc/self/mountinfo', '36 35 43:65 / /boot rw - ext4 /dev/nbd2p1 rw')
    expect(devices.use(device('nbd2'))).toBe('is mounted at /boot')
  })

  it('are in use as swap and below a device mapping', () => {
    put(
      'proc/swaps',
      'Filename\tType\tSize\tUsed\tPriority\n/dev/nbd1                               partition\t8\t0\t-2',
    )
    expect(devices.use(device('nbd1'))).toBe('is used as swap')
    expect(devices.use(device('nbd10'))).toBeUndefined()
    put('sys/class/block/nbd10/holders/dm-3/size', '0')
    expect(devices.use(device('nbd10'))).toBe('is used by dm-3')
  })
})

describe('a device name', () => {
  it('may be a path, a bare name or a link', () => {
    expect(deviceName('/dev/nbd3')).toBe('nbd3')
    expect(deviceName('nbd3')).toBe('nbd3')
    const link = join(root.path, 'disk')
    symlinkSync('/dev/nbd7', link)
    expect(deviceName(link)).toBe(undefined) // /dev/nbd7 does not exist here
    for (const other of ['data', '/dev/sda', 'nbd', 'nbd1p1', '/dev/nbd1p1', 'xnbd1', '']) {
      expect(deviceName(other), other).toBeUndefined()
    }
  })
})
