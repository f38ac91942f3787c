import { UserError } from '../base/errors.ts'
import type { Datapath, StoreLayout } from './datapath.ts'
import { PortableDatapath } from './portable.ts'

export type DatapathMode = 'auto' | 'native' | 'portable'

export interface DatapathOptions {
  readonly mode: DatapathMode
  readonly threads?: number // I/O threads; the portable datapath has none
}

/** Opens a datapath over the members. @throws UserError FAILED when mode `native` is impossible here */
export function openDatapath(layout: StoreLayout, options: DatapathOptions): Datapath {
  if (options.mode === 'portable') return new PortableDatapath(layout, 'asked for with --datapath portable')
  const why = 'the native addon is not built'
  if (options.mode === 'auto') return new PortableDatapath(layout, why)
  throw new UserError('FAILED', `--datapath native is not possible: ${why}`)
}
