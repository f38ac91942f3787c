import { webcrypto } from 'node:crypto'

/** SHA-256 (FIPS 180-4), computed by the thread pool of Node, off the event loop. */
export const SIGNATURE_BYTES = 32

/** Regions that are read and hashed at a time: as many as there are threads for it. */
const PARALLEL = 4

export interface Range {
  readonly offset: number // bytes
  readonly length: number
}

/**
 * The signatures of ranges, in their order. Buffers are used again: at most PARALLEL ranges are in memory.
 * @throws what `read` throws
 */
export async function signaturesOf(
  ranges: readonly Range[],
  read: (offset: number, target: Buffer) => Promise<void>,
): Promise<Buffer> {
  const signatures = Buffer.alloc(ranges.length * SIGNATURE_BYTES)
  let next = 0
  const work = async (): Promise<void> => {
    let buffer = Buffer.alloc(0)
    for (let index = next++; index < ranges.length; index = next++) {
      const range = ranges[index]
      if (range === undefined) return
      if (buffer.length < range.length) buffer = Buffer.allocUnsafe(range.length)
      const content = buffer.subarray(0, range.length)
      await read(range.offset, content)
      const hash = await webcrypto.subtle.digest('SHA-256', content)
      signatures.set(new Uint8Array(hash), index * SIGNATURE_BYTES)
    }
  }
  await Promise.all(Array.from({ length: Math.min(PARALLEL, ranges.length) }, work))
  return signatures
}

/** Bytes of one question: the other side reads them all before it answers. */
const ASKED_BYTES = 32 << 20

/** How many regions to ask about at a time. */
export function regionsAtOnce(regionBytes: number, bytes = ASKED_BYTES): number {
  return Math.max(1, Math.floor(bytes / regionBytes))
}

/** Whether entry `index` of two lists is the same. */
export function sameSignature(a: Buffer, b: Buffer, index: number): boolean {
  const at = index * SIGNATURE_BYTES
  return a.compare(b, at, at + SIGNATURE_BYTES, at, at + SIGNATURE_BYTES) === 0
}
