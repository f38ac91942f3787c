import { assert } from '../base/assert.ts'
import type { AdoptedRequest } from './datapath.ts'

/** What both datapaths assert of a request that is adopted. */
export function checkAdopted(request: AdoptedRequest, size: number): void {
  const { kind, offset, length, payload } = request
  assert(offset >= 0 && length > 0 && offset + length <= size, 'an adopted range within the volume')
  assert((kind === 'write') === (payload !== undefined), 'a write has a payload, and nothing else has')
  assert(payload === undefined || payload.length === length, 'a payload of the length of its write')
}
