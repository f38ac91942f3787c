import { writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { checkConfig, readConfigFile, resolveConfig } from '../../src/daemon/config.ts'
import { temporaryDirectory } from '../support/daemon.ts'

const directory = temporaryDirectory()
afterAll(() => directory.remove())

describe('the configuration', () => {
  it('has defaults', () => {
    expect(resolveConfig('/srv/pool', {})).toEqual({
      pool: '/srv/pool',
      listen: ['nbd+unix:///?socket=/srv/pool/nbd.sock'],
      datapath: 'auto',
      threads: undefined,
      hotRegions: 4096,
      logLevel: 'info',
      link: { listen: undefined, name: hostname(), allowPlain: false },
    })
  })

  it('takes the command line over the file over the defaults', () => {
    const file = checkConfig({ threads: 2, datapath: 'native', listen: ['nbd://127.0.0.1:1'] }, 'file')
    const config = resolveConfig('/srv/pool', { datapath: 'portable' }, file)
    expect(config).toMatchObject({
      threads: 2,
      datapath: 'portable',
      listen: ['nbd://127.0.0.1:1'],
      logLevel: 'info',
    })
  })

  it('takes one URI without a list', () => {
    expect(checkConfig({ listen: 'nbd://localhost' }, 'file')).toEqual({ listen: ['nbd://localhost'] })
  })

  it.each([
    [
      'an unknown key',
      { treads: 2 },
      /file: unknown key "treads"; the keys are listen, .*, hot-regions, .* and link-allow-plain$/,
    ],
    ['no object', [], /must hold one JSON object/],
    ['null', null, /must hold one JSON object/],
    ['text for a number', { threads: '2' }, /threads must be a whole number from 1 to 64, not "2"/],
    ['no threads', { threads: 0 }, /threads must be a whole number from 1 to 64, not 0/],
    ['half a thread', { threads: 1.5 }, /threads must be/],
    ['another datapath', { datapath: 'fast' }, /datapath must be one of auto, native, portable, not "fast"/],
    ['another level', { 'log-level': 'loud' }, /log-level must be one of/],
    ['no URI', { listen: [] }, /listen must be a list of NBD URIs/],
    ['a number for the link', { link: 10810 }, /file: link must be a text, not 10810/],
    ['an empty path', { 'link-key': '' }, /file: link-key must be a text, not ""/],
    ['text for a flag', { 'link-allow-plain': 'no' }, /link-allow-plain must be true or false, not "no"/],
    ['numbers for URIs', { listen: [10809] }, /listen must be a list of NBD URIs/],
  ])('refuses %s', (_, value, message) => {
    expect(() => checkConfig(value, 'file')).toThrow(message)
  })

  it('says how the link is protected, with absolute paths', () => {
    const file = checkConfig(
      {
        link: '[::1]:0',
        'link-name': 'north',
        'link-key': '/etc/key',
        'link-tls-cert': 'c.pem',
        'link-tls-key': '/k.pem',
        'link-tls-ca': '/ca.pem',
        'link-allow-plain': true,
      },
      'file',
    )
    expect(resolveConfig('/srv/pool', {}, file).link).toEqual({
      listen: '[::1]:0',
      name: 'north',
      allowPlain: true,
      keyFile: '/etc/key',
      tls: { certificate: join(process.cwd(), 'c.pem'), key: '/k.pem', authority: '/ca.pem' },
    })
    const { link } = resolveConfig('/srv/pool', { linkAllowPlain: false, linkTlsCert: '/other.pem' }, file)
    expect([link.allowPlain, link.tls?.certificate, link.tls?.key]).toEqual([false, '/other.pem', '/k.pem'])
  })

  it.each([
    [{ link: 'here' }, /link "here" is not HOST:PORT/],
    [{ link: 'host:65536' }, /port from 0 to 65535/],
    [{ linkName: 'a\u0007' }, /link-name has to be 1 to 246 bytes without control characters/],
    [{ linkName: 'a\u2028' }, /link-name has to be 1 to 246 bytes without control characters/],
    [{ linkName: 'ü'.repeat(124) }, /link-name has to be 1 to 246 bytes/],
    [{ linkTlsCert: 'c', linkTlsKey: 'k' }, /go together: link-tls-ca is missing$/],
    [{ linkTlsCa: 'c' }, /go together: link-tls-cert and link-tls-key are missing$/],
  ])('refuses %j for the link', (flags, message) => {
    expect(() => resolveConfig('/srv/pool', flags)).toThrow(message)
  })

  it('reads files, and names the one that is missing or no JSON', () => {
    const good = join(directory.path, 'good.json')
    const bad = join(directory.path, 'bad.json')
    writeFileSync(good, '{"threads": 3}')
    writeFileSync(bad, '{threads: 3}')
    expect(readConfigFile(good)).toEqual({ threads: 3 })
    expect(() => readConfigFile(bad)).toThrow(`${bad} is not JSON`)
    expect(() => readConfigFile(join(directory.path, 'none'))).toThrow(
      /cannot read the configuration file .*ENOENT/,
    )
  })
})
