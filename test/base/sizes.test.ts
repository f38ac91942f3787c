import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { approximateSize, formatSize, parseSize } from '../../src/base/sizes.ts'

describe('parseSize', () => {
  it.each([
    ['0', 0],
    ['4096', 4096],
    ['4096B', 4096],
    ['64K', 65_536],
    ['64k', 65_536],
    ['64KB', 65_536],
    ['64KiB', 65_536],
    [' 10 G ', 10 * 2 ** 30],
    ['1.5T', 1.5 * 2 ** 40],
    ['16T', 2 ** 44],
    ['7P', 7 * 2 ** 50],
    ['9007199254740991', Number.MAX_SAFE_INTEGER],
  ])('%j is %d bytes', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes)
  })

  it.each([
    ['', 'is not a size'],
    ['-1', 'is not a size'],
    ['-4K', 'is not a size'],
    ['+4K', 'is not a size'],
    ['K', 'is not a size'],
    ['4X', 'is not a size'],
    ['4iB', 'is not a size'],
    ['4Ki', 'is not a size'],
    ['0x10', 'is not a size'],
    ['1e3', 'is not a size'],
    ['1,5G', 'is not a size'],
    ['.5G', 'is not a size'],
    ['NaN', 'is not a size'],
    ['Infinity', 'is not a size'],
    ['constructor', 'is not a size'],
    ['1.5', 'is not a whole number of bytes'],
    ['0.3K', 'is not a whole number of bytes'],
    ['9007199254740993', 'is larger than this program can count'],
    ['9P', 'is larger than this program can count'],
    ['99999999999999999999999999', 'is larger than this program can count'],
  ])('%j is refused, naming it and the option', (text, problem) => {
    expect(() => parseSize(text, '--size')).toThrow(
      expect.objectContaining({
        name: 'UserError',
        code: 'USAGE',
        message: expect.stringContaining(problem),
      }),
    )
    expect(() => parseSize(text, '--size')).toThrow(`--size "${text}"`)
  })
})

describe('formatSize', () => {
  it.each([
    [0, '0'],
    [511, '511'],
    [1024, '1K'],
    [1536, '1536'],
    [65_536, '64K'],
    [2 ** 44, '16T'],
  ])('%d is written %s', (bytes, text) => {
    expect(formatSize(bytes)).toBe(text)
  })

  it('reads back to the same number', () => {
    fc.assert(fc.property(fc.maxSafeNat(), (bytes) => parseSize(formatSize(bytes)) === bytes))
  })
})

describe('approximateSize', () => {
  it.each([
    [0, '0'],
    [1023, '1023'],
    [1024, '1K'],
    [1_234_567, '1.2M'],
    [99.94 * 1024, '99.9K'],
    [99.96 * 1024, '100K'],
    [2 ** 20 - 1, '1.0M'], // not 1024K
    [2 ** 30 - 1, '1.0G'],
    [31 * 2 ** 40, '31T'],
    [2 ** 53 - 1, '8.0P'],
  ])('%d is about %s', (bytes, text) => {
    expect(approximateSize(bytes)).toBe(text)
  })
})
