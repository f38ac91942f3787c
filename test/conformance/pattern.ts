/** Bytes that say where they belong: no two blocks of 16 are the same, and none is zero. */
export function patternAt(seed: number, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  for (let at = 0; at < length; at++) {
    bytes[at] = 1 + ((seed * 31 + at * 7 + (at >> 4) * 13 + (at >> 12) * 101) % 251)
  }
  return bytes
}

/** The size of small requests: aligned for every server's taste. */
export const SCRATCH = 4096
