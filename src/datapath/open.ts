import { messageOf, UserError } from '../base/errors.ts'
import type { Datapath, StoreLayout } from './datapath.ts'
import { loadNative, NativeDatapath } from './native.ts'
import { PortableDatapath } from './portable.ts'

/**
 * Chooses the datapath: the native one wherever it can run, the portable one where it cannot or where it was asked for.
 * What was chosen, and why, is in its `description`.
 */
export type DatapathMode = 'auto' | 'native' | 'portable'

export interface DatapathOptions {
  readonly mode: DatapathMode
  readonly threads?: number // I/O threads of the native datapath; the portable one has none of its own
}

/** Opens a datapath over the members. @throws UserError FAILED where mode `native` is impossible */
export function openDatapath(layout: StoreLayout, options: DatapathOptions): Datapath {
  if (options.mode === 'portable') return new PortableDatapath(layout, 'asked for with --datapath portable')
  const native = loadNative()
  let reason = native.ok ? '' : native.reason
  if (native.ok) {
    try {
      return NativeDatapath.open(layout, options.threads === undefined ? {} : { threads: options.threads })
    } catch (error) {
      // For instance a container that refuses the descriptors that its threads need.
      reason = `the native datapath does not start: ${messageOf(error)}`
      if (options.mode === 'native') throw impossible(reason, error)
    }
  }
  if (options.mode === 'native') throw impossible(reason)
  return new PortableDatapath(layout, reason)
}

function impossible(reason: string, cause?: unknown): UserError {
  return new UserError('FAILED', `--datapath native is not possible: ${reason}; use auto or portable`, {
    cause,
  })
}
