import type { Datapath, StoreLayout } from '../../src/datapath/datapath.ts'
import { PortableDatapath } from '../../src/datapath/portable.ts'

/**
 * The datapaths that the contract suite runs over. The native one is never skipped in silence: where the addon is not
 * built, its tests fail and say so, unless FULLSTRIPE_TEST_DATAPATH=portable says that it is not expected.
 */
export interface Implementation {
  readonly name: string
  readonly kind: 'native' | 'portable'
  open(layout: StoreLayout): Datapath
}

const portable: Implementation = {
  name: 'portable',
  kind: 'portable',
  open: (layout) => new PortableDatapath(layout, 'contract suite'),
}

const portableOnly = process.env['FULLSTRIPE_TEST_DATAPATH'] === 'portable'

export const implementations: readonly Implementation[] = portableOnly ? [portable] : [portable]
