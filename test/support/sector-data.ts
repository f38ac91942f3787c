/**
 * Sectors that tell who wrote them and where: token and sector number in turn, 8 bytes each, so that a sector that was
 * swapped, torn, or brought from elsewhere shows. Token 0 stands for zeros.
 */
export const SECTOR = 512

let tokens = 0n

/** Different from all others in this process, of whatever volume. */
export function newToken(): bigint {
  tokens += 1n
  return tokens
}

/** Whole sectors as the writer of `token` fills them; token 0: zeros. */
export function sectorData(token: bigint, offset: number, length: number): Buffer {
  const data = Buffer.alloc(length)
  if (token === 0n) return data
  for (let at = 0; at < length; at += SECTOR) {
    data.writeBigUInt64LE(token, at)
    data.writeBigUInt64LE(BigInt((offset + at) / SECTOR), at + 8)
    for (let done = 16; done < SECTOR; done *= 2) data.copyWithin(at + done, at, at + done)
  }
  return data
}
