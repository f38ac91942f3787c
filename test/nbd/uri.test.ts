import { describe, expect, it } from 'vitest'
import { UserError } from '../../src/base/errors.ts'
import { formatNbdUri, parseNbdUri } from '../../src/nbd/uri.ts'
import { fc, test } from './property.ts'

const tcp = (host: string, port = 10809) => ({ transport: 'tcp', host, port })
const unix = (path: string) => ({ transport: 'unix', path })

describe('parseNbdUri', () => {
  // [URI, address, export name]; the first rows are the examples of doc/uri.md.
  for (const [text, address, exportName] of [
    ['nbd://example.com/disk', tcp('example.com'), 'disk'],
    ['nbd+unix:///disk?socket=sock', unix('sock'), 'disk'],
    ['nbd://example.com/', tcp('example.com'), ''],
    ['nbd://example.com', tcp('example.com'), ''],
    ['nbd://example.com//disk', tcp('example.com'), '/disk'],
    ['nbd://example.com/hello%20world', tcp('example.com'), 'hello world'],
    ['nbd+unix:///?socket=%00/abstract', unix('\0/abstract'), ''],
    ['nbd://example.com:10810/a/../b/./c', tcp('example.com', 10810), 'a/../b/./c'],
    ['NBD://example.com', tcp('example.com'), ''],
    ['nbd://127.0.0.1:0', tcp('127.0.0.1', 0), ''],
    ['nbd://127.0.0.1:65535', tcp('127.0.0.1', 65535), ''],
    ['nbd://127.0.0.1:', tcp('127.0.0.1'), ''],
    ['nbd://[::1]', tcp('::1'), ''],
    ['nbd://[::1]:10810/x', tcp('::1', 10810), 'x'],
    ['nbd://[::ffff:127.0.0.1]:1', tcp('::ffff:127.0.0.1', 1), ''],
    ['nbd://[fe80::1%25eth0]:10809/', tcp('fe80::1%eth0'), ''],
    ['nbd:///disk', tcp('localhost'), 'disk'],
    ['nbd://', tcp('localhost'), ''],
    ['nbd://:10810', tcp('localhost', 10810), ''],
    ['nbd:/disk', tcp('localhost'), 'disk'],
    ['nbd://example.com/gr%C3%B6%C3%9Fer', tcp('example.com'), 'größer'],
    ['nbd://example.com/größer', tcp('example.com'), 'größer'],
    ['nbd://example.com/a+b', tcp('example.com'), 'a+b'],
    ['nbd+unix:///?socket=/run/my%20pool/nbd.sock', unix('/run/my pool/nbd.sock'), ''],
    ['nbd+unix:///?socket=/a+b=c', unix('/a+b=c'), ''],
    ['nbd+unix:///v@s?x-y=1&socket=/s', unix('/s'), 'v@s'],
  ] as const) {
    it(`reads ${text}`, () => {
      expect(parseNbdUri(text)).toMatchObject({ address, exportName, tls: false })
    })
  }

  it('reads what TLS needs', () => {
    const uri = parseNbdUri(
      'nbds://alice%40home@example.com/disk?tls-type=psk&tls-psk-file=/etc/psk&x-note=a%26b',
    )
    expect(uri).toMatchObject({
      address: tcp('example.com'),
      tls: true,
      user: 'alice@home',
      exportName: 'disk',
    })
    expect([...uri.parameters]).toEqual([
      ['tls-type', 'psk'],
      ['tls-psk-file', '/etc/psk'],
      ['x-note', 'a&b'],
    ])
    expect(parseNbdUri('nbds+unix:///?socket=s&tls-hostname=h')).toMatchObject({
      address: unix('s'),
      tls: true,
    })
  })

  for (const [text, reason] of [
    ['', /write nbd:/],
    ['disk', /write nbd:/],
    ['/run/nbd.sock', /write nbd:/],
    ['http://example.com', /scheme "http"/],
    ['nbd+tls://example.com', /scheme "nbd\+tls"/],
    ['nbd:example.com', /two slashes/],
    ['localhost:10809', /scheme "localhost"/],
    ['nbd://example.com:65536', /HOST:PORT/],
    ['nbd://example.com:port', /HOST:PORT/],
    ['nbd://example.com:1:2', /HOST:PORT/],
    ['nbd://::1', /HOST:PORT/],
    ['nbd://[::1', /HOST:PORT/],
    ['nbd://[example.com]', /HOST:PORT/],
    ['nbd://[]', /HOST:PORT/],
    ['nbd://example.com/%zz', /percent/],
    ['nbd://example.com/%ff', /percent/],
    ['nbd://example.com/a%00b', /NUL/],
    [`nbd://example.com/${'x'.repeat(4097)}`, /too long/],
    ['nbd://example.com/disk#1', /%23/],
    ['nbd://example.com/?socket=/s', /nbd\+unix/],
    ['nbd://example.com/?foo=1', /"foo" is unknown/],
    ['nbd://example.com/?tls-type=x509&tls-type=psk', /twice/],
    ['nbd+unix:///disk', /socket=PATH/],
    ['nbd+unix:///disk?socket=', /socket=PATH/],
    ['nbd+unix:///disk?socket', /socket=PATH/],
    ['nbd+unix:///disk?socket=a&socket=b', /twice/],
    ['nbd+unix:///disk?socket=a%00b', /NUL/],
    ['nbd+unix://disk?socket=/s', /no host/],
    ['nbd+unix:///disk?socket=/s&readonly=1', /"readonly" is unknown/],
  ] as const) {
    it(`refuses ${text === '' ? 'nothing' : text.slice(0, 60)}`, () => {
      expect(() => parseNbdUri(text)).toThrow(UserError)
      expect(() => parseNbdUri(text)).toThrow(reason)
      expect(() => parseNbdUri(text)).toThrow(expect.objectContaining({ code: 'USAGE' }))
    })
  }
})

describe('formatNbdUri', () => {
  it('names the port and escapes what has to be', () => {
    expect(formatNbdUri({ address: { transport: 'tcp', host: '::1', port: 10809 } })).toBe(
      'nbd://[::1]:10809',
    )
    expect(formatNbdUri({ address: { transport: 'tcp', host: 'h', port: 1 }, exportName: '/a b' })).toBe(
      'nbd://h:1//a%20b',
    )
    expect(formatNbdUri({ address: { transport: 'unix', path: '/run/a&b' } })).toBe(
      'nbd+unix:///?socket=/run/a%26b',
    )
    const secure = { address: { transport: 'unix', path: '\0x' }, exportName: 'v', tls: true } as const
    expect(formatNbdUri(secure)).toBe('nbds+unix:///v?socket=%00x')
  })

  const text = fc.string({ unit: 'grapheme' }).filter((s) => !s.includes('\0'))
  test.prop({
    address: fc.oneof(
      fc.record({
        transport: fc.constant('tcp' as const),
        host: fc.oneof(fc.domain(), fc.ipV4(), fc.ipV6(), fc.constant('fe80::1%eth0')),
        port: fc.nat(65535),
      }),
      fc.record({ transport: fc.constant('unix' as const), path: text.filter((path) => path !== '') }),
    ),
    exportName: text,
    tls: fc.boolean(),
    parameters: fc.constantFrom(
      new Map<string, string>(),
      new Map([
        ['x-a', '1&2'],
        ['tls-type', 'psk'],
      ]),
    ),
  })('is read back', (uri) => {
    expect(parseNbdUri(formatNbdUri(uri))).toEqual(uri)
  })
})
