import type { Datapath, StoreLayout } from '../../src/datapath/datapath.ts'
import { loadNative, NativeDatapath } from '../../src/datapath/native.ts'
import { PortableDatapath } from '../../src/datapath/portable.ts'

/**
 * The datapaths that the contract suite runs over: the native one with either engine, and the portable one as it is and
 * with every member access in the thread pool (as where data is cold). Native is never skipped in silence: where the
 * addon is not built, or an engine is refused, its tests fail and say so.
 *
 * FULLSTRIPE_TEST_DATAPATH narrows the choice: `portable`, or `threads` (native without io_uring, for containers
 * that refuse it).
 */
export interface Implementation {
  readonly name: string
  readonly kind: 'native' | 'portable'
  open(layout: StoreLayout): Datapath
}

const portable: readonly Implementation[] = [
  {
    name: 'portable, inline',
    kind: 'portable',
    open: (layout) => new PortableDatapath(layout, 'contract suite'),
  },
  {
    name: 'portable, thread pool',
    kind: 'portable',
    open: (layout) => new PortableDatapath(layout, 'contract suite', 0),
  },
]

function native(engine: 'io_uring' | 'threads'): Implementation {
  return {
    name: `native, ${engine}`,
    kind: 'native',
    open: (layout) => {
      const addon = loadNative()
      if (!addon.ok) {
        throw new Error(
          `${addon.reason}: run scripts/setup, or set FULLSTRIPE_TEST_DATAPATH=portable to test the portable datapath alone`,
        )
      }
      return NativeDatapath.open(layout, { threads: 2, engine })
    },
  }
}

function chosen(choice: string): readonly Implementation[] {
  switch (choice) {
    case '':
      return [...portable, native('io_uring'), native('threads')]
    case 'threads':
      return [...portable, native('threads')]
    case 'portable':
      return portable
    default:
      throw new Error(`FULLSTRIPE_TEST_DATAPATH is "${choice}": portable, threads or nothing`)
  }
}

export const implementations = chosen(process.env['FULLSTRIPE_TEST_DATAPATH'] ?? '')
