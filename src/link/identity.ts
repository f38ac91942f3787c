/**
 * Who a pool is to its peers: an Ed25519 key pair, made when it is first needed and kept in the pool directory for good. The public key
 * travels; its fingerprint is what peers pin. Losing the file makes the pool a stranger to its peers, copying it makes two pools one.
 *
 * The file appears whole or not at all: written under another name (mode 0600), synced, linked to its own name, the directory synced.
 * Linking fails where the name exists, so of two makers at once one wins and both use its key.
 */
import {
  createHash,
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  randomUUID,
  sign,
  verify,
} from 'node:crypto'
import { constants } from 'node:fs'
import { link, open, readFile, stat, unlink } from 'node:fs/promises'
import { dirname } from 'node:path'
import { messageOf, systemCode, UserError } from '../base/errors.ts'

export const PUBLIC_KEY_BYTES = 32
export const SIGNATURE_BYTES = 64

export interface Identity {
  readonly publicKey: Buffer // 32 bytes
  readonly fingerprint: string
  /** @returns 64 bytes */
  sign(bytes: Buffer): Buffer
}

/** `sha256:` and the hash of a public key in base64, as people compare it. */
export function fingerprintOf(publicKey: Buffer): string {
  return `sha256:${createHash('sha256').update(publicKey).digest('base64').replace(/=+$/, '')}`
}

/** @returns whether the owner of `publicKey` (32 bytes) signed `bytes`; false for a key that is none */
export function verifySignature(publicKey: Buffer, bytes: Buffer, signature: Buffer): boolean {
  if (publicKey.length !== PUBLIC_KEY_BYTES || signature.length !== SIGNATURE_BYTES) return false
  try {
    const x = publicKey.toString('base64url')
    const key = createPublicKey({ key: { kty: 'OKP', crv: 'Ed25519', x }, format: 'jwk' })
    return verify(null, bytes, key, signature)
  } catch {
    return false // not a point of the curve
  }
}

/** A fresh one, in memory only. */
export function newIdentity(): Identity {
  return identityOf(generateKeyPairSync('ed25519').privateKey)
}

/**
 * Reads the identity, or makes it where there is none.
 * @throws UserError FAILED where the file cannot be read or written, is no key, or is open to other users
 */
export async function openIdentity(path: string): Promise<Identity> {
  try {
    return (await readIdentity(path)) ?? (await createIdentity(path))
  } catch (error) {
    if (error instanceof UserError) throw error
    throw new UserError('FAILED', `cannot use the identity ${path}: ${messageOf(error)}`, { cause: error })
  }
}

async function readIdentity(path: string): Promise<Identity | undefined> {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return undefined
    throw error
  }
  const { mode } = await stat(path)
  if ((mode & 0o077) !== 0) {
    throw new UserError('FAILED', `the identity ${path} is open to other users: chmod 600 it`)
  }
  let key: KeyObject
  try {
    key = createPrivateKey(text)
  } catch (error) {
    throw new UserError('FAILED', `the identity ${path} is damaged: bring it back from a backup`, {
      cause: error,
    })
  }
  if (key.asymmetricKeyType !== 'ed25519') {
    throw new UserError('FAILED', `the identity ${path} is not an Ed25519 key`)
  }
  return identityOf(key)
}

async function createIdentity(path: string): Promise<Identity> {
  const { privateKey } = generateKeyPairSync('ed25519')
  const made = `${path}.${randomUUID()}`
  const file = await open(made, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600)
  try {
    try {
      await file.writeFile(privateKey.export({ type: 'pkcs8', format: 'pem' }))
      await file.sync()
    } finally {
      await file.close()
    }
    await link(made, path)
  } catch (error) {
    if (systemCode(error) !== 'EEXIST') throw error
  } finally {
    await unlink(made)
  }
  await syncDirectory(dirname(path))
  const identity = await readIdentity(path)
  if (identity === undefined) throw new UserError('FAILED', `the identity ${path} vanished while it was made`)
  return identity
}

export async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, constants.O_RDONLY)
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}

function identityOf(privateKey: KeyObject): Identity {
  const { x } = createPublicKey(privateKey).export({ format: 'jwk' })
  const publicKey = Buffer.from(x ?? '', 'base64url')
  return {
    publicKey,
    fingerprint: fingerprintOf(publicKey),
    sign: (bytes) => sign(null, bytes, privateKey),
  }
}
