import { chmod, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { fingerprintOf, newIdentity, openIdentity, verifySignature } from '../../src/link/identity.ts'
import { checkPin, FilePeers, MemoryPeers } from '../../src/link/peers.ts'
import { isLoopback, openSecurity, PLAIN, resolveHost } from '../../src/link/security.ts'

let directory = ''
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'link-identity-'))
})
afterEach(async () => {
  await rm(directory, { recursive: true })
})

describe('the identity of a pool', () => {
  it('is made once, for its owner only, and is the same ever after', async () => {
    const path = join(directory, 'identity')
    const made = await openIdentity(path)
    expect((await stat(path)).mode & 0o777).toBe(0o600)
    expect(await readdir(directory)).toEqual(['identity'])
    const again = await openIdentity(path)
    expect(again.fingerprint).toBe(made.fingerprint)
    expect(verifySignature(made.publicKey, Buffer.from('text'), again.sign(Buffer.from('text')))).toBe(true)
  })

  it('is one, however many make it at once', async () => {
    const path = join(directory, 'identity')
    const made = await Promise.all(Array.from({ length: 8 }, () => openIdentity(path)))
    expect(new Set(made.map(({ fingerprint }) => fingerprint)).size).toBe(1)
    expect(await readdir(directory)).toEqual(['identity'])
  })

  it('is refused where others can read it, where it is damaged, and where it is another kind of key', async () => {
    const path = join(directory, 'identity')
    await openIdentity(path)
    await chmod(path, 0o644)
    await expect(openIdentity(path)).rejects.toThrow('chmod 600')
    await chmod(path, 0o600)
    const text = await readFile(path, 'utf8')
    await writeFile(path, text.slice(0, 60))
    await expect(openIdentity(path)).rejects.toThrow('damaged')
    await expect(openIdentity(join(directory, 'no', 'identity'))).rejects.toThrow('cannot use the identity')
  })

  it('signs so that nobody else could have', () => {
    const [one, other] = [newIdentity(), newIdentity()]
    const bytes = Buffer.from('statement')
    const signature = one.sign(bytes)
    expect(verifySignature(one.publicKey, bytes, signature)).toBe(true)
    expect(verifySignature(other.publicKey, bytes, signature)).toBe(false)
    expect(verifySignature(one.publicKey, Buffer.from('Statement'), signature)).toBe(false)
    expect(verifySignature(one.publicKey.subarray(1), bytes, signature)).toBe(false)
    expect(verifySignature(Buffer.alloc(32, 0xff), bytes, signature)).toBe(false)
    expect(fingerprintOf(one.publicKey)).toMatch(/^sha256:[A-Za-z0-9+/]{43}$/)
  })
})

describe('pins', () => {
  it('are set at first contact and hold', async () => {
    const path = join(directory, 'peers.json')
    const peers = await FilePeers.open(path)
    expect(await checkPin(peers, 'one', 'sha256:a')).toBe('new')
    expect(await checkPin(peers, 'one', 'sha256:a')).toBe('known')
    await expect(checkPin(peers, 'one', 'sha256:b')).rejects.toMatchObject({ code: 'IDENTITY' })
    const again = await FilePeers.open(path)
    expect(again.pinned('one')).toBe('sha256:a')
    expect((await stat(path)).mode & 0o777).toBe(0o600)
    expect(await again.forget('one')).toBe(true)
    expect(await checkPin(again, 'one', 'sha256:b')).toBe('new')
    expect((await FilePeers.open(path)).pinned('one')).toBe('sha256:b')
    expect(await readdir(directory)).toEqual(['peers.json'])
  })

  it('of two first contacts at once keep one', async () => {
    const peers = await FilePeers.open(join(directory, 'peers.json'))
    const results = await Promise.allSettled([peers.pin('one', 'sha256:a'), peers.pin('one', 'sha256:b')])
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected'])
    expect(peers.pinned('one')).toBe('sha256:a')
  })

  it('are not believed before they are durable', async () => {
    const peers = await FilePeers.open(join(directory, 'peers.json'))
    const pinning = peers.pin('one', 'sha256:a')
    expect(peers.pinned('one')).toBeUndefined()
    await pinning
    expect(peers.pinned('one')).toBe('sha256:a')
    const lost = await FilePeers.open(join(directory, 'gone', 'peers.json'))
    await expect(lost.pin('one', 'sha256:a')).rejects.toThrow('cannot be read or written')
    expect(lost.pinned('one')).toBeUndefined()
  })

  it('have names that are only names', async () => {
    const path = join(directory, 'peers.json')
    const peers = await FilePeers.open(path)
    await peers.pin('__proto__', 'sha256:a')
    await peers.pin('constructor', 'sha256:b')
    const again = await FilePeers.open(path)
    expect(again.pinned('__proto__')).toBe('sha256:a')
    expect(again.pinned('constructor')).toBe('sha256:b')
    expect(again.pinned('toString')).toBeUndefined()
  })

  it('are bounded', async () => {
    const peers = new MemoryPeers(
      Array.from({ length: LIMITS.linkPeersMax }, (_, index) => [`${index}`, 'x'] as const),
    )
    await expect(checkPin(peers, 'one more', 'y')).rejects.toMatchObject({ code: 'NOT_WELCOME' })
    expect(await checkPin(peers, '0', 'x')).toBe('known')
  })

  it('that cannot be read are an error, not a new start', async () => {
    const path = join(directory, 'peers.json')
    for (const text of ['', '[]', '{"one":1}', 'null', '{']) {
      await writeFile(path, text)
      await expect(FilePeers.open(path)).rejects.toThrow('cannot be read')
    }
  })
})

describe('security', () => {
  it('reads a key without the newline at its end, and refuses short and open ones', async () => {
    const path = join(directory, 'key')
    await writeFile(path, '0123456789abcdef\n', { mode: 0o600 })
    expect((await openSecurity({ keyFile: path })).key?.toString()).toBe('0123456789abcdef')
    await writeFile(path, '0123456789abcde\n')
    await expect(openSecurity({ keyFile: path })).rejects.toThrow('has 15 bytes')
    await chmod(path, 0o640)
    await expect(openSecurity({ keyFile: path })).rejects.toThrow('chmod 600')
    await expect(openSecurity({ keyFile: join(directory, 'none') })).rejects.toThrow('cannot read the key')
  })

  it('refuses certificates that are none', async () => {
    const path = join(directory, 'pem')
    await writeFile(path, 'no certificate', { mode: 0o600 })
    const tls = { certificate: path, key: path, authority: path }
    await expect(openSecurity({ tls })).rejects.toThrow('holds no certificate')
  })

  it('knows which addresses are this machine', () => {
    for (const own of ['127.0.0.1', '127.255.255.254', '::1', '::ffff:127.0.0.1'])
      expect(isLoopback(own), own).toBe(true)
    for (const other of ['128.0.0.1', '10.0.0.1', '0.0.0.0', '::', '::2', '::ffff:10.0.0.1', 'localhost', ''])
      expect(isLoopback(other), other).toBe(false)
  })

  it('lets plain TCP out of this machine only where that is allowed', async () => {
    await expect(resolveHost('192.0.2.1', PLAIN)).rejects.toMatchObject({ code: 'PLAIN' })
    await expect(resolveHost('0.0.0.0', PLAIN)).rejects.toThrow('configure TLS, or allow plain TCP')
    expect(await resolveHost('192.0.2.1', { ...PLAIN, allowPlain: true })).toEqual(['192.0.2.1'])
    expect(await resolveHost('127.0.0.1', PLAIN)).toEqual(['127.0.0.1'])
    expect((await resolveHost('localhost', PLAIN)).every(isLoopback)).toBe(true)
  })
})
