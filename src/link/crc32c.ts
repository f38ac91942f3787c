/**
 * CRC-32C (Castagnoli): reflected polynomial 0x82f63b78, initial value and final xor 0xffffffff. It finds every burst of up to 32
 * damaged bits, and any three of them in a frame of any size that the link has.
 *
 * Two implementations with the same results: the addon's, which uses the processor's instruction (about 20 GB/s), and sixteen tables
 * here (about 1 GB/s). Calling the addon costs about 80 ns, so headers are summed here in any case.
 *
 * What is on disk is guarded by the CRC-32 of zlib instead, another polynomial: formats do not change for this.
 */
import { loadAddon } from '../base/addon.ts'

/** @param before the checksum of what came before these bytes; 0 for nothing */
export type Checksum = (bytes: Uint8Array, before?: number) => number

const POLYNOMIAL = 0x82f63b78
/** From this length on the call into the addon pays. */
const NATIVE_BYTES_MIN = 96

// TABLES[256 * k + b]: the state after byte b and then k zero bytes.
const TABLES = new Int32Array(16 * 256)
for (let byte = 0; byte < 256; byte++) {
  let state = byte
  for (let bit = 0; bit < 8; bit++) state = (state & 1) === 1 ? (state >>> 1) ^ POLYNOMIAL : state >>> 1
  TABLES[byte] = state
}
for (let entry = 256; entry < TABLES.length; entry++) {
  const state = TABLES[entry - 256] as number
  TABLES[entry] = (state >>> 8) ^ (TABLES[state & 255] as number)
}

export const crc32cPortable: Checksum = (bytes, before = 0) => {
  // All indexes are in range: the casts spare a check for each of the lookups.
  const t = TABLES
  const b = bytes as unknown as Readonly<Record<number, number>> & { readonly length: number }
  const whole = b.length & ~15
  let state = ~before
  let at = 0
  for (; at < whole; at += 16) {
    const first =
      state ^
      ((b[at] as number) |
        ((b[at + 1] as number) << 8) |
        ((b[at + 2] as number) << 16) |
        ((b[at + 3] as number) << 24))
    state =
      (t[3840 + (first & 255)] as number) ^
      (t[3584 + ((first >>> 8) & 255)] as number) ^
      (t[3328 + ((first >>> 16) & 255)] as number) ^
      (t[3072 + (first >>> 24)] as number) ^
      (t[2816 + (b[at + 4] as number)] as number) ^
      (t[2560 + (b[at + 5] as number)] as number) ^
      (t[2304 + (b[at + 6] as number)] as number) ^
      (t[2048 + (b[at + 7] as number)] as number) ^
      (t[1792 + (b[at + 8] as number)] as number) ^
      (t[1536 + (b[at + 9] as number)] as number) ^
      (t[1280 + (b[at + 10] as number)] as number) ^
      (t[1024 + (b[at + 11] as number)] as number) ^
      (t[768 + (b[at + 12] as number)] as number) ^
      (t[512 + (b[at + 13] as number)] as number) ^
      (t[256 + (b[at + 14] as number)] as number) ^
      (t[b[at + 15] as number] as number)
  }
  for (; at < b.length; at++) state = (t[(state ^ (b[at] as number)) & 255] as number) ^ (state >>> 8)
  return ~state >>> 0
}

/** The addon's; undefined where it is not built or older than this function. */
export const crc32cNative: Checksum | undefined = nativeChecksum()

export const crc32c: Checksum =
  crc32cNative === undefined
    ? crc32cPortable
    : (
        (native: Checksum): Checksum =>
        (bytes, before = 0) =>
          bytes.length < NATIVE_BYTES_MIN ? crc32cPortable(bytes, before) : native(bytes, before)
      )(crc32cNative)

function nativeChecksum(): Checksum | undefined {
  let addon: unknown
  try {
    addon = loadAddon()
  } catch {
    return undefined // the datapath tells why, where it matters
  }
  if (typeof addon !== 'object' || addon === null || !('crc32c' in addon)) return undefined
  const { crc32c } = addon
  if (typeof crc32c !== 'function') return undefined
  return (bytes, before = 0) => crc32c(bytes, before) as number
}
