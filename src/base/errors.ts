/**
 * Errors have three fates (an assertion is the fourth, see assert.ts):
 *
 *   ProtocolError  a peer broke the protocol: answered on the wire, or ends that one connection
 *   StoreError     the world failed (disk, space, members): degrades a member or fails one request
 *   UserError      the operator asked for something impossible: one line, what, which object, what to do
 */
export class ProtocolError extends Error {
  override readonly name = 'ProtocolError'
}

export type StoreErrorCode =
  | 'MEMBER_IO' // a member failed a read, write or sync
  | 'NO_SPACE' // no free slot, or the file system below a member is full
  | 'READ_ONLY' // the export or the pool does not take writes
  | 'SHUTTING_DOWN' // the daemon is draining
  | 'DAMAGED' // metadata contradicts itself or fails its checksum
  | 'INVALID' // a request outside the volume, or one that the protocol forbids
  | 'NOT_SUPPORTED' // a valid request that cannot be done the way it was asked for
  | 'NO_MEMORY' // a bound on memory was reached

/** Stable code, message that names the object, `cause` that keeps the origin. */
export class StoreError extends Error {
  override readonly name = 'StoreError'
  readonly code: StoreErrorCode
  constructor(code: StoreErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }
}

export type UserErrorCode =
  | 'USAGE' // wrong arguments: exit code 2, HTTP 400
  | 'NOT_FOUND' // HTTP 404
  | 'EXISTS' // HTTP 409
  | 'BUSY' // HTTP 409: in use, or in a state that forbids it
  | 'REFUSED' // HTTP 422: understood and refused, for instance a shrink without --force
  | 'UNREACHABLE' // the daemon does not answer: exit code 3
  | 'FAILED' // anything else: exit code 1, HTTP 500

export class UserError extends Error {
  override readonly name = 'UserError'
  readonly code: UserErrorCode
  constructor(code: UserErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }
}

/** The message of anything that was thrown, for a one-line report. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

/** A name that somebody has typed, for a message. */
export function printable(name: string): string {
  return JSON.stringify(name.length > 80 ? `${name.slice(0, 80)}...` : name)
}

/** `ENOSPC`, `EIO`, ... of a failed system call; undefined for any other error, also for ours, which have codes too. */
export function systemCode(error: unknown): string | undefined {
  if (!(error instanceof Error) || !('code' in error)) return undefined
  if (error instanceof UserError || error instanceof StoreError) return undefined
  return typeof error.code === 'string' ? error.code : undefined
}
