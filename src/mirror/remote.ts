import type { Socket } from 'node:net'
import type { GenerationRecord } from '../metadata/records.ts'

/**
 * The other side of a mirror as its primary sees it: a daemon over a link (link-remote.ts), or an NBD export (nbd-remote.ts). Each
 * stands for one session: once it has ended, every call rejects, and the next session has another.
 */
export interface RemoteHello {
  readonly role: 'primary' | 'secondary'
  readonly generation: GenerationRecord | null // null: it never had any content of a mirror
  readonly base: string
  readonly consistent: boolean
  readonly cycle: number
  readonly size: number // bytes
  /** Of its stage: what this side knows to be staged is so only while this stays the same. */
  readonly stage: string
  /** Bytes changed on that side since `base`; for people. */
  readonly changed: number
  /** Nothing there is formatted: whatever is not formatted here needs no word. */
  readonly blank: boolean
}

/** What the primary tells at the beginning of a session. */
export interface PrimaryHello {
  readonly generation: GenerationRecord
  readonly base: string
  readonly cycle: number
  readonly size: number
  readonly initialized: boolean
  readonly changed: number
  /** Settings: the other side has them, too, for when it is the primary. */
  readonly mode: 'sync' | 'async'
  readonly intervalMs: number
  readonly onLoss: 'continue' | 'block'
  readonly unitBytes: number
}

/** What follows a commit: the secondary stores it in the same transaction. */
export interface CommitInfo {
  readonly cycle: number
  /** Whether the content is a point in time of the primary from now on. */
  readonly consistent: boolean
  readonly generation: GenerationRecord
  readonly size: number
  /** From here on `apply` follows: the sides are equal, and both get every request. */
  readonly follow: boolean
}

/** A change that goes to both sides at once. */
export interface RemoteOperation {
  readonly kind: 'write' | 'trim' | 'zero'
  readonly offset: number // bytes
  readonly length: number
  readonly flags: number // of NBD
  /** Copies [from, from + target.length) of a write's payload, counted from `offset`; valid until the operation is done. */
  readonly payload: (from: number, target: Buffer) => void
}

/** One bit a copy unit; pages of the bitmap that have any. */
export type BitmapKind = 'realized' | 'differs'
export interface BitmapPage {
  readonly first: number // copy unit; a multiple of 8
  readonly bytes: Buffer
}

/** Every call @throws RemoteError */
export interface Remote {
  readonly ended: Promise<RemoteError>
  hello(hello: PrimaryHello): Promise<RemoteHello>
  bitmap(kind: BitmapKind): AsyncIterable<BitmapPage>
  /** SHA-256 of each range's content, 32 bytes each, as of its last commit. */
  signatures(ranges: readonly { offset: number; length: number }[]): Promise<Buffer>
  /** Into the stage; resolves when it is there. Whole copy units, the last one as far as the volume goes. */
  put(offset: number, payload: Buffer): Promise<void>
  hole(offset: number, length: number): Promise<void>
  /** What is staged becomes the content, durably. */
  commit(info: CommitInfo): Promise<void>
  /** Resolves when the other side has it; answered in any order. */
  apply(operation: RemoteOperation): Promise<void>
  /** Operations that were not sent yet are not sent: their payloads are about to be gone. */
  abandon(): void
  flush(): Promise<void>
  /** Whether the other side has answered an `apply` of the range that it may still lose with nobody there knowing. */
  mayLose(offset: number, length: number): boolean
  /** Resolves when that is over for what was answered before. */
  settle(): Promise<void>
  /**
   * Connections for `count` lanes, which the other side serves from the commit on that says `follow`; empty where there can be none.
   * Whoever does not use them destroys them.
   */
  lanes(count: number): Promise<readonly Socket[]>
  /** Resolves when every operation that was sent before is done there. */
  fence(): Promise<void>
  /** The mirror's state here, for people there. */
  tell(state: string): void
  /** This side is about to be the secondary: the other one has everything, and may be promoted. */
  handOver(info: CommitInfo): Promise<void>
  /** Bytes written for this mirror, all frames included. */
  wireBytes(): number
  close(reason: string): void
}

/**
 * Why a remote cannot do something:
 *
 *   lost       the session is over; another one may come
 *   refused    the other side says no, for a reason an operator has to know (no space, no volume, another role)
 *   splitbrain both sides are primary
 */
export class RemoteError extends Error {
  override readonly name = 'RemoteError'
  readonly fate: 'lost' | 'refused' | 'splitbrain'
  constructor(fate: RemoteError['fate'], message: string, options?: ErrorOptions) {
    super(message, options)
    this.fate = fate
  }
}
