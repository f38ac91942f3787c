/**
 * An assertion states what this program promises itself. A failure is our own bug: the error is never
 * caught on purpose, so the process stops before a wrong table reaches the disk. Input from outside is
 * checked with errors (errors.ts), never with assertions.
 */
export class AssertionError extends Error {
  override readonly name = 'AssertionError'
}

export function assert(condition: boolean, message = 'assertion failed'): asserts condition {
  if (!condition) throw new AssertionError(message)
}

/** For the default branch of a switch over a closed union: a new member does not compile until handled. */
export function unreachable(value: never): never {
  throw new AssertionError(`unreachable: ${String(value)}`)
}
