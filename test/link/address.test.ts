import { describe, expect, it } from 'vitest'
import { formatLinkAddress, parseLinkAddress } from '../../src/link/address.ts'

describe('addresses of a link', () => {
  it.each([
    ['site-b:10810', { host: 'site-b', port: 10810 }],
    ['10.0.0.2:1', { host: '10.0.0.2', port: 1 }],
    ['[::1]:65535', { host: '::1', port: 65535 }],
    ['[fe80::1%eth0]:9', { host: 'fe80::1%eth0', port: 9 }],
  ])('%s', (text, address) => {
    expect(parseLinkAddress(text, 'peer')).toEqual(address)
    expect(formatLinkAddress(address)).toBe(text)
  })

  it('take port 0 only to listen on', () => {
    expect(parseLinkAddress('localhost:0', 'link', 0)).toEqual({ host: 'localhost', port: 0 })
    expect(() => parseLinkAddress('localhost:0', 'peer')).toThrow(/port from 1 to 65535/)
  })

  it.each([
    '',
    'host',
    ':1',
    'host:',
    'host:65536',
    'host:1x',
    '::1:5',
    '[host]:1',
    'a b:1',
    'user@host:1',
    'x/y:1',
    'h:1\n',
  ])('%j is refused', (text) => {
    expect(() => parseLinkAddress(text, 'peer')).toThrow(`peer "${text}" is not HOST:PORT`)
  })
})
