/**
 * The kernel's nbd devices as sysfs and procfs show them, and who of them is ours.
 *
 * A device is connected while /sys/block/nbdX/pid exists. The kernel does not say which export it serves, so
 * `attach` leaves a note in /run/fullstripe/nbdX.json, with that pid: a note whose pid is another one is stale,
 * and after a reboot /run is empty. Being a file a device, notes of concurrent commands never meet.
 */
import { mkdirSync, readdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { systemCode } from '../base/errors.ts'

export interface NbdDevice {
  readonly name: string // nbd0
  readonly path: string // /dev/nbd0
  readonly pid: number | undefined // of whoever connected it; undefined: not connected
  readonly size: number // bytes; 0 when not connected
}

export interface AttachNote {
  readonly volume: string
  readonly uuid: string
  readonly pool: string
  readonly pid: number
  readonly connections: number
}

export class NbdDevices {
  readonly #sys: string
  readonly #proc: string
  readonly #run: string

  constructor(sys = '/sys', proc = '/proc', run = '/run') {
    this.#sys = sys
    this.#proc = proc
    this.#run = join(run, 'fullstripe')
  }

  /** In the order of their numbers; empty where the driver is missing. */
  list(): NbdDevice[] {
    return listDirectory(join(this.#sys, 'block'))
      .filter((name) => /^nbd\d+$/.test(name))
      .sort((a, b) => Number(a.slice(3)) - Number(b.slice(3)))
      .map((name) => this.#device(name))
  }

  find(name: string): NbdDevice | undefined {
    return this.list().find((device) => device.name === name)
  }

  /** The note of a device, if what it says is about the present connection. */
  note(device: NbdDevice): AttachNote | undefined {
    const text = readText(this.#notePath(device))
    if (text === undefined || device.pid === undefined) return undefined
    const note = parseNote(text)
    return note?.pid === device.pid ? note : undefined
  }

  writeNote(device: NbdDevice, note: AttachNote): void {
    mkdirSync(this.#run, { recursive: true, mode: 0o755 })
    writeFileSync(this.#notePath(device), `${JSON.stringify(note)}\n`)
  }

  removeNote(device: NbdDevice): void {
    rmSync(this.#notePath(device), { force: true })
  }

  /** What keeps a device from being detached, in words: a mount, swap, a device mapping. */
  use(device: NbdDevice): string | undefined {
    const blocks = [
      device.name,
      ...listDirectory(join(this.#sys, 'block', device.name)).filter((name) =>
        name.startsWith(`${device.name}p`),
      ),
    ]
    const numbers = new Set(blocks.map((name) => readText(join(this.#sys, 'class/block', name, 'dev'))))
    for (const line of (readText(join(this.#proc, 'self/mountinfo')) ?? '').split('\n')) {
      const [, , number, , place] = line.split(' ')
      if (number !== undefined && place !== undefined && numbers.has(number))
        return `is mounted at ${unescapeMount(place)}`
    }
    for (const line of (readText(join(this.#proc, 'swaps')) ?? '').split('\n')) {
      if (blocks.some((name) => line.startsWith(`/dev/${name} `) || line.startsWith(`/dev/${name}\t`)))
        return 'is used as swap'
    }
    for (const name of blocks) {
      const holder = listDirectory(join(this.#sys, 'class/block', name, 'holders'))[0]
      if (holder !== undefined) return `is used by ${holder}`
    }
    return undefined
  }

  #device(name: string): NbdDevice {
    const directory = join(this.#sys, 'block', name)
    const pid = readText(join(directory, 'pid'))
    const sectors = Number(readText(join(directory, 'size')) ?? 0)
    return {
      name,
      path: `/dev/${name}`,
      pid: pid === undefined ? undefined : Number(pid),
      size: sectors * 512,
    }
  }

  #notePath(device: NbdDevice): string {
    return join(this.#run, `${device.name}.json`)
  }
}

/** `/dev/nbd3`, `nbd3`, or a link to it → `nbd3`. */
export function deviceName(text: string): string | undefined {
  if (/^nbd\d+$/.test(text)) return text
  if (!text.startsWith('/')) return undefined
  const direct = /^\/dev\/(nbd\d+)$/
  try {
    return direct.exec(realpathSync(text))?.[1]
  } catch {
    return direct.exec(text)?.[1]
  }
}

function parseNote(text: string): AttachNote | undefined {
  try {
    const note: Partial<AttachNote> = JSON.parse(text)
    const { volume, uuid, pool, pid, connections } = note
    if (typeof volume !== 'string' || typeof uuid !== 'string' || typeof pool !== 'string') return undefined
    if (typeof pid !== 'number' || typeof connections !== 'number') return undefined
    return { volume, uuid, pool, pid, connections }
  } catch {
    return undefined
  }
}

/** mountinfo writes space, tab, newline and backslash as octal. */
function unescapeMount(text: string): string {
  return text.replaceAll(/\\([0-7]{3})/g, (_, octal: string) =>
    String.fromCharCode(Number.parseInt(octal, 8)),
  )
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch (error) {
    // Gone between two looks, or never there: sysfs entries come and go with connections.
    if (['ENOENT', 'ENOTDIR', 'ENODEV', 'EINVAL'].includes(systemCode(error) ?? '')) return undefined
    throw error
  }
}

function listDirectory(path: string): string[] {
  try {
    return readdirSync(path)
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(systemCode(error) ?? '')) return []
    throw error
  }
}
