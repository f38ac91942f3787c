import { loadAddon } from '../base/addon.ts'
import { messageOf } from '../base/errors.ts'

/**
 * The native addon (native/, package node-nbd) as TypeScript sees it. Commands and events cross as numbers in typed
 * arrays, many a crossing; their layout is written down in native/src/datapath.h and repeated by the constants here.
 *
 * The addon keeps raw pointers to tables and buffers: whoever passes one keeps the object alive until the event that
 * says it is no longer used. native.ts is the only user.
 */
export interface NativeHandle {
  readonly brand: unique symbol
}

export interface NativeOptions {
  readonly memberFds: readonly number[]
  readonly dataMembers: number
  readonly parityMembers: number
  readonly chunkSize: number
  readonly dataOffset: number
  readonly threads: number
  readonly engine: number // 0 auto, 1 io_uring, 2 threads
  readonly payloadMax: number
  readonly requestsInFlight: number
  readonly payloadPerConnection: number
  readonly payloadTotal: number
  readonly replyBytesQueued: number
  readonly statusExtentsMax: number
}

type Words = Uint32Array
type Numbers = Float64Array

/** Everything the addon exports. Adding a line here is a design decision. */
export interface Binding {
  readonly version: number
  /** `onWake` is called, on a turn of its own, when there are events to drain. */
  open(options: NativeOptions, onWake: () => void): NativeHandle
  describe(handle: NativeHandle): { engine: 'io_uring' | 'threads'; threads: number }
  openExport(
    handle: NativeHandle,
    id: number,
    stripeSize: number,
    formatUnit: number,
    fill: number,
    size: number,
    slots: Words,
    init: Words,
    direct: Words,
  ): void
  retable(
    handle: NativeHandle,
    id: number,
    tag: number,
    size: number,
    slots: Words,
    init: Words,
    direct: Words,
  ): void
  /** Duplicates `fd`; the caller's stays the caller's. */
  serve(
    handle: NativeHandle,
    exportId: number,
    session: number,
    fd: number,
    received: Buffer,
    mode: number,
    contexts: Words,
    readOnly: boolean,
    lane: boolean,
  ): void
  /** Duplicates `fd`. `thread` has no lane for that export. */
  openLane(handle: NativeHandle, exportId: number, lane: number, thread: number, fd: number): void
  setLanes(handle: NativeHandle, exportId: number, forwards: boolean, lanesOnly: boolean): void
  holdBlocks(handle: NativeHandle, exportId: number, offset: number, length: number): boolean
  releaseBlocks(handle: NativeHandle, exportId: number, offset: number, length: number): void
  blocksBusy(handle: NativeHandle, exportId: number, offset: number, length: number): boolean
  submit(handle: NativeHandle, words: Numbers, count: number): void
  completeStatus(handle: NativeHandle, upcallIndex: number, words: Numbers): void
  /** Returns the upcall's index. `kind` as in upcall events; the addon reads `payload` until the upcall is completed. */
  adopt(
    handle: NativeHandle,
    exportId: number,
    kind: number,
    offset: number,
    length: number,
    payload: Buffer | null,
  ): number
  readPayload(handle: NativeHandle, upcallIndex: number, offset: number, target: Buffer): void
  /** Fills `target` until the tag's event comes; its errno is ECANCELED where the export is closed. */
  readRange(handle: NativeHandle, tag: number, exportId: number, offset: number, target: Buffer): void
  slotIo(
    handle: NativeHandle,
    tag: number,
    write: boolean,
    slot: number,
    offset: number,
    buffer: Buffer,
  ): void
  /** Fills records; fewer than fit means that nothing is left. */
  drain(handle: NativeHandle, records: Numbers): number
  exportCounters(handle: NativeHandle, id: number, counters: Numbers): void
  memberCounters(handle: NativeHandle, counters: Numbers): void
  stop(handle: NativeHandle): void
}

export const COMMAND_WORD = {
  complete: 1,
  formatUnit: 2,
  writePart: 3,
  sync: 4,
  punch: 5,
  barrier: 6,
  closeExport: 7,
  dropLane: 8,
  endSession: 9,
} as const

export const EVENT_WORD = { upcall: 1, done: 2, sessionEnd: 3, laneEnd: 4 } as const
/** Above the flags of the request. */
export const UPCALL_FLAG = { half: 1 << 16, lane: 1 << 17 } as const
export const RECORD_WORDS = 10
export const EXPORT_COUNTERS = 13
export const MEMBER_COUNTERS = 5

const bindingVersion = 4

export type NativeLoad =
  | { readonly ok: true; readonly binding: Binding }
  | { readonly ok: false; readonly reason: string }

let loaded: NativeLoad | undefined

/** Loads the addon once; says why where it cannot. */
export function loadNative(path?: string): NativeLoad {
  if (path !== undefined) return load(path)
  loaded ??= load()
  return loaded
}

function load(path?: string): NativeLoad {
  try {
    const binding = loadAddon(path) as Binding
    if (binding.version !== bindingVersion) {
      const reason = `the native addon has version ${binding.version}, this program needs ${bindingVersion}: run scripts/setup`
      return { ok: false, reason }
    }
    return { ok: true, binding }
  } catch (error) {
    const message = messageOf(error).split('\n', 1)[0] ?? ''
    const missing = message.includes('Cannot find module')
    return {
      ok: false,
      reason: missing ? 'the native addon is not built' : `the native addon does not load: ${message}`,
    }
  }
}
