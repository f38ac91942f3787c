import { describe, expect, it } from 'vitest'
import { type Checksum, crc32c, crc32cNative, crc32cPortable } from '../../src/link/crc32c.ts'
import { Random } from '../support/random.ts'

const implementations: [string, Checksum | undefined][] = [
  ['portable', crc32cPortable],
  ['native', crc32cNative],
  ['chosen', crc32c],
]

it.skipIf(process.env['FULLSTRIPE_TEST_DATAPATH'] === 'portable')(
  'crc32c: the addon has it (else run scripts/setup)',
  () => {
    expect(crc32cNative).toBeDefined()
  },
)

describe.each(implementations)('crc32c, %s', (_name, checksum) => {
  it.runIf(checksum !== undefined)('has the published values', () => {
    const sum = checksum as Checksum
    expect(sum(Buffer.from('123456789'))).toBe(0xe3069283)
    // RFC 3720, appendix B.4
    expect(sum(Buffer.alloc(32))).toBe(0x8a9136aa)
    expect(sum(Buffer.alloc(32, 0xff))).toBe(0x62a8ab43)
    expect(sum(Buffer.from(Array.from({ length: 32 }, (_, index) => index)))).toBe(0x46dd794e)
    expect(sum(Buffer.alloc(0), 0x12345678)).toBe(0x12345678)
  })

  it.runIf(checksum !== undefined)('gives the same for bytes in pieces', () => {
    const sum = checksum as Checksum
    const random = new Random(1)
    for (let round = 0; round < 200; round++) {
      const bytes = random.bytes(random.below(3000))
      const cut = random.below(bytes.length + 1)
      expect(sum(bytes.subarray(cut), sum(bytes.subarray(0, cut)))).toBe(sum(bytes))
    }
  })
})

it.runIf(crc32cNative !== undefined)(
  'crc32c: native and portable agree at every length and alignment',
  () => {
    const native = crc32cNative as Checksum
    const random = new Random(2)
    const bytes = random.bytes(70_000)
    for (let length = 0; length < 1200; length++) {
      const view = bytes.subarray(random.below(64)).subarray(0, length)
      const before = random.next()
      expect(native(view, before)).toBe(crc32cPortable(view, before))
    }
    for (let round = 0; round < 100; round++) {
      const view = bytes.subarray(random.below(1000), 20_000 + random.below(50_000))
      expect(native(view)).toBe(crc32cPortable(view))
    }
  },
)
