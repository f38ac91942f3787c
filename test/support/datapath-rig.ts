import { closeSync, ftruncateSync, mkdtempSync, openSync, readSync, rmSync, writeSync } from 'node:fs'
import { createServer, connect as netConnect, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Bitmap } from '../../src/base/bitmap.ts'
import type {
  Datapath,
  ExportId,
  ExportTables,
  ReplyMode,
  SessionEnd,
  StoreLayout,
} from '../../src/datapath/datapath.ts'
import type { Implementation } from './implementations.ts'
import { TestPolicy } from './test-policy.ts'
import { WireClient } from './wire-client.ts'

/**
 * Everything a contract test needs around a datapath: member files in a temporary directory, one export with tables, a
 * policy that the test can hold (test-policy.ts), and a server whose accepted sockets are handed to `serve`.
 */
export interface RigOptions {
  readonly members?: number // k; default 1
  readonly chunkSize?: number // bytes; default 4096
  readonly dataOffset?: number // bytes; default 8192
  readonly stripes?: number // of the export; default 64
  readonly size?: number // bytes; default: all stripes whole
  readonly formatUnit?: number // stripes; default 1
  readonly fill?: number
  /** How members are opened; default: a new file for reading and writing. */
  readonly openMember?: (path: string) => number
}

export interface ConnectOptions {
  readonly transport?: 'unix' | 'tcp'
  readonly readOnly?: boolean
  readonly contexts?: readonly number[]
  /** Bytes that negotiation "has read already". */
  readonly received?: Buffer
  readonly exportId?: ExportId
  /** Runs before the socket is handed over. */
  readonly beforeServe?: (serverSide: Socket, clientSide: Socket) => Promise<void>
}

/** A client, and what the server's side of its session came to. */
export class RigClient extends WireClient {
  /** Every call of onClose; never more than one, if the datapath is right. */
  readonly ends: SessionEnd[] = []
}

const open = new Set<Rig>()

/** Closes every rig that a test left open; for afterEach. */
export async function closeRigs(): Promise<void> {
  for (const rig of [...open]) await rig.close()
}

export class Rig {
  readonly directory: string
  readonly layout: StoreLayout
  readonly stripeSize: number
  readonly formatUnit: number
  readonly fill: number
  readonly stripes: number
  readonly datapath: Datapath
  readonly policy: TestPolicy
  readonly exportId: ExportId
  tables: ExportTables
  init: Bitmap
  direct: Bitmap

  readonly #servers: Record<'unix' | 'tcp', Server>
  readonly #accepted: Socket[] = []
  readonly #accepting: ((socket: Socket) => void)[] = []
  readonly #clients = new Set<RigClient>()
  #closing: Promise<void> | null = null

  static async open(implementation: Implementation, options: RigOptions = {}): Promise<Rig> {
    const rig = new Rig(implementation, options)
    await rig.#listen()
    open.add(rig)
    return rig
  }

  private constructor(implementation: Implementation, options: RigOptions) {
    const members = options.members ?? 1
    const chunkSize = options.chunkSize ?? 4096
    this.directory = mkdtempSync(join(tmpdir(), 'fullstripe-contract-'))
    const openMember = options.openMember ?? ((path: string) => openSync(path, 'w+'))
    const memberFds = Array.from({ length: members }, (_, index) => {
      return openMember(join(this.directory, `member-${index}`))
    })
    const dataOffset = options.dataOffset ?? 8192
    this.layout = { memberFds, dataMembers: members, parityMembers: 0, chunkSize, dataOffset }
    this.stripeSize = members * chunkSize
    this.formatUnit = options.formatUnit ?? 1
    this.fill = options.fill ?? 0
    this.stripes = options.stripes ?? 64
    const made = makeTables(options.size ?? this.stripes * this.stripeSize, this.stripeSize, this.formatUnit)
    this.tables = made.tables
    this.init = made.init
    this.direct = made.direct
    try {
      this.datapath = implementation.open(this.layout)
    } catch (error) {
      for (const fd of memberFds) closeSync(fd)
      rmSync(this.directory, { recursive: true, force: true })
      throw error
    }
    this.policy = new TestPolicy(this)
    this.exportId = this.openExport('contract', this.tables)
    const accept = (socket: Socket): void => {
      const waiting = this.#accepting.shift()
      if (waiting === undefined) this.#accepted.push(socket)
      else waiting(socket)
    }
    this.#servers = {
      unix: createServer({ pauseOnConnect: true }, accept),
      tcp: createServer({ pauseOnConnect: true }, accept),
    }
  }

  get size(): number {
    return this.tables.size
  }

  openExport(name: string, tables: ExportTables, policy = this.policy): ExportId {
    const { stripeSize, formatUnit, fill } = this
    return this.datapath.openExport({ name, stripeSize, formatUnit, fill, tables }, policy)
  }

  /** Other tables for this export: the bits and slots of the old ones, as far as they fit. */
  tablesOfSize(size: number): { tables: ExportTables; init: Bitmap; direct: Bitmap } {
    const made = makeTables(size, this.stripeSize, this.formatUnit)
    made.tables.slots.set(this.tables.slots.subarray(0, made.tables.slots.length))
    made.tables.init.set(this.tables.init.subarray(0, made.tables.init.length))
    made.tables.direct.set(this.tables.direct.subarray(0, made.tables.direct.length))
    return made
  }

  use(made: { tables: ExportTables; init: Bitmap; direct: Bitmap }): void {
    this.tables = made.tables
    this.init = made.init
    this.direct = made.direct
  }

  async connect(mode: ReplyMode = 'structured', options: ConnectOptions = {}): Promise<RigClient> {
    const transport = options.transport ?? 'unix'
    const address = this.#servers[transport].address()
    if (address === null) throw new Error('the rig does not listen')
    const accepted = new Promise<Socket>((resolve) => {
      const ready = this.#accepted.shift()
      if (ready === undefined) this.#accepting.push(resolve)
      else resolve(ready)
    })
    const clientSide =
      typeof address === 'string' ? netConnect(address) : netConnect(address.port, '127.0.0.1')
    await new Promise<void>((resolve, reject) => {
      clientSide.once('connect', resolve)
      clientSide.once('error', reject)
    })
    const client = new RigClient(clientSide, mode)
    this.#clients.add(client)
    clientSide.on('close', () => this.#clients.delete(client))
    const serverSide = await accepted
    await options.beforeServe?.(serverSide, clientSide)
    this.datapath.serve(options.exportId ?? this.exportId, {
      socket: serverSide,
      received: options.received ?? Buffer.alloc(0),
      mode,
      contexts: options.contexts ?? [],
      readOnly: options.readOnly ?? false,
      onClose: (reason) => client.ends.push(reason),
    })
    return client
  }

  // --------------------------------------------------------------- members, found without the datapath's help

  /** The bytes of a slot as they lie on the member files; past the end of a file zeros. */
  slotBytes(slot: number, offset = 0, length = this.stripeSize): Buffer {
    const bytes = Buffer.alloc(length)
    this.#eachPart(slot, offset, length, (fd, position, start, part) => {
      readSync(fd, bytes, start, part, position)
    })
    return bytes
  }

  putSlotBytes(slot: number, bytes: Buffer, offset = 0): void {
    this.#eachPart(slot, offset, bytes.length, (fd, position, start, part) => {
      writeSync(fd, bytes, start, part, position)
    })
  }

  truncateMembers(length: number): void {
    for (const fd of this.layout.memberFds) ftruncateSync(fd, length)
  }

  /** Makes a stripe (and so its format unit) formatted: slot first, bits after it. */
  setStripe(stripe: number, slot: number, direct: boolean): void {
    Atomics.store(this.tables.slots, stripe, slot)
    this.init.set(Math.floor(stripe / this.formatUnit))
    if (direct) this.direct.set(stripe)
  }

  /** All stripes formatted, stripe i in slot i + 1. */
  formatAll(direct = true): void {
    for (let stripe = 0; stripe < Math.ceil(this.size / this.stripeSize); stripe++) {
      this.setStripe(stripe, stripe + 1, direct)
    }
  }

  memberTotals(): { reads: number; readBytes: number; writes: number; writeBytes: number; syncs: number } {
    const totals = { reads: 0, readBytes: 0, writes: 0, writeBytes: 0, syncs: 0 }
    for (const counters of this.datapath.memberCounters()) {
      totals.reads += counters.reads
      totals.readBytes += counters.readBytes
      totals.writes += counters.writes
      totals.writeBytes += counters.writeBytes
      totals.syncs += counters.syncs
    }
    return totals
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    open.delete(this)
    this.policy.letGo()
    for (const client of this.#clients) client.destroy()
    await this.datapath.close()
    for (const server of Object.values(this.#servers)) {
      await new Promise<void>((resolve) => server.close(() => resolve()))
    }
    for (const fd of this.layout.memberFds) closeSync(fd)
    rmSync(this.directory, { recursive: true, force: true })
  }

  async #listen(): Promise<void> {
    const { unix, tcp } = this.#servers
    await new Promise<void>((resolve) => unix.listen(join(this.directory, 'socket'), 512, resolve))
    await new Promise<void>((resolve) => tcp.listen(0, '127.0.0.1', resolve))
  }

  /** The formula of StoreLayout, written down a second time. */
  #eachPart(
    slot: number,
    offset: number,
    length: number,
    each: (fd: number, position: number, start: number, part: number) => void,
  ): void {
    const { memberFds, chunkSize, dataOffset } = this.layout
    for (let done = 0; done < length; ) {
      const at = offset + done
      const chunk = Math.floor(at / chunkSize)
      const within = at % chunkSize
      const part = Math.min(length - done, chunkSize - within)
      const fd = memberFds[(slot + chunk) % memberFds.length]
      if (fd === undefined) throw new Error('no such member')
      each(fd, dataOffset + slot * chunkSize + within, done, part)
      done += part
    }
  }
}

function makeTables(
  size: number,
  stripeSize: number,
  formatUnit: number,
): { tables: ExportTables; init: Bitmap; direct: Bitmap } {
  const stripes = Math.ceil(size / stripeSize)
  const init = new Bitmap(Math.ceil(stripes / formatUnit))
  const direct = new Bitmap(stripes)
  return {
    tables: { size, slots: new Uint32Array(stripes), init: init.words, direct: direct.words },
    init,
    direct,
  }
}

/** Bytes that differ at every place: a stripe read from the wrong place never looks right. */
export function pattern(length: number, seed = 1): Buffer {
  const bytes = Buffer.alloc(length)
  let state = (seed * 0x9e3779b1) >>> 0 || 1
  for (let at = 0; at + 4 <= length; at += 4) {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    bytes.writeUInt32LE(state >>> 0, at)
  }
  for (let at = length - (length % 4); at < length; at++) bytes[at] = (seed * 31 + at) & 0xff
  return bytes
}
