/**
 * What the frames of the handshake say. Their payloads are JSON objects: a field that this program does not know is passed over, so that
 * newer peers can say more; a field that is missing or has the wrong shape ends the connection. Signatures cover the bytes as they came, so
 * nothing depends on how an object is written.
 *
 * The versions in a hello keep their place and meaning for good: they are looked at first, and a peer of any version is
 * told clearly which side has to be upgraded.
 */
import { LIMITS } from '../base/limits.ts'
import { hasControlCharacters } from '../base/text.ts'
import { isLinkErrorCode, LinkError, peerText } from './errors.ts'
import { PUBLIC_KEY_BYTES, SIGNATURE_BYTES } from './identity.ts'

export const NONCE_BYTES = 32
export const MAC_BYTES = 32

/** A capability with a name; whoever requires one refuses a peer that does not list it. */
export interface Capability {
  readonly name: string
  readonly required: boolean
}

/** What both sides tell of themselves. */
export interface Introduction {
  readonly name: string // the pool or machine, for people and for the peer's pins
  readonly publicKey: Buffer
  readonly nonce: Buffer
  readonly instance: string // one run of a daemon
  readonly software: string
  readonly capabilities: readonly Capability[]
  readonly window: number // bytes that the other may have on their way to this side, in each connection
}

export interface VersionRange {
  readonly min: number
  readonly max: number
}

/** The connecting side's first words. */
export interface Hello extends Introduction {
  readonly versions: VersionRange
  readonly purpose: string // sessions of one peer with the same purpose replace each other
  readonly session: string | undefined // the one that this connection joins; undefined: the first connection of a new one
  readonly connection: number // which one, from 0
  readonly connections: number // how many the session is meant to have
}

/** The accepting side's answer. */
export interface Welcome extends Introduction {
  readonly version: number
}

export interface Proof {
  readonly signature: Buffer
  readonly mac: Buffer | undefined
}

/** The accepting side's proof, and what the connection belongs to. */
export interface Acceptance extends Proof {
  readonly session: string
  readonly connections: number // how many the session will have
}

export function encodeHello(hello: Hello): Buffer {
  return encode({
    versions: [hello.versions.min, hello.versions.max],
    ...introduction(hello),
    purpose: hello.purpose,
    session: hello.session,
    connection: hello.connection,
    connections: hello.connections,
  })
}

/** The versions alone, which every version of the protocol writes alike. @throws LinkError BAD_FRAME */
export function decodeVersions(payload: Buffer): VersionRange {
  const range = new Fields(payload, 'hello').list('versions', 2, (value) => value)
  const [min, max] = range
  if (typeof min !== 'number' || typeof max !== 'number' || !(min >= 1 && min <= max)) {
    throw new LinkError('BAD_FRAME', 'hello: versions are two numbers from 1 up')
  }
  return { min, max }
}

export function decodeHello(payload: Buffer): Hello {
  const fields = new Fields(payload, 'hello')
  const connections = fields.integer('connections', 1, LIMITS.linkConnectionsPerSessionMax)
  return {
    versions: decodeVersions(payload),
    ...readIntroduction(fields),
    purpose: fields.text('purpose', 1, 255),
    session: fields.has('session') ? fields.text('session', 1, 64) : undefined,
    connection: fields.integer('connection', 0, connections - 1),
    connections,
  }
}

export function encodeWelcome(welcome: Welcome): Buffer {
  return encode({ version: welcome.version, ...introduction(welcome) })
}

export function decodeWelcome(payload: Buffer): Welcome {
  const fields = new Fields(payload, 'welcome')
  return { version: fields.integer('version', 1, 2 ** 31), ...readIntroduction(fields) }
}

export function encodeProof(proof: Proof): Buffer {
  return encode(proofFields(proof))
}

export function decodeProof(payload: Buffer): Proof {
  return readProof(new Fields(payload, 'proof'))
}

export function encodeAcceptance(acceptance: Acceptance): Buffer {
  const { session, connections } = acceptance
  return encode({ ...proofFields(acceptance), session, connections })
}

export function decodeAcceptance(payload: Buffer): Acceptance {
  const fields = new Fields(payload, 'accept')
  return {
    ...readProof(fields),
    session: fields.text('session', 1, 64),
    connections: fields.integer('connections', 1, LIMITS.linkConnectionsPerSessionMax),
  }
}

/** The payload of `refuse` and `bye`. */
export function encodeReason(error: LinkError): Buffer {
  return encode({ code: error.code, message: peerText(error.message) })
}

/** @returns the peer's code where this program knows it, and its words */
export function decodeReason(payload: Buffer): { code: LinkError['code'] | undefined; message: string } {
  const fields = new Fields(payload, 'reason')
  const code = fields.text('code', 1, 64)
  return { code: isLinkErrorCode(code) ? code : undefined, message: peerText(fields.value('message')) }
}

function introduction(side: Introduction): Record<string, unknown> {
  return {
    name: side.name,
    key: side.publicKey.toString('base64'),
    nonce: side.nonce.toString('base64'),
    instance: side.instance,
    software: side.software,
    capabilities: side.capabilities.map(({ name, required }) => (required ? { name, required } : { name })),
    window: side.window,
  }
}

function readIntroduction(fields: Fields): Introduction {
  return {
    name: fields.text('name', 1, 255),
    publicKey: fields.bytes('key', PUBLIC_KEY_BYTES),
    nonce: fields.bytes('nonce', NONCE_BYTES),
    instance: fields.text('instance', 1, 64),
    software: fields.text('software', 0, 64),
    capabilities: fields.list('capabilities', LIMITS.linkCapabilitiesMax, (value) => {
      const capability = new Fields(value, `${fields.what}: a capability`)
      return { name: capability.text('name', 1, 64), required: capability.value('required') === true }
    }),
    window: fields.integer('window', 4 * LIMITS.linkPayloadMax, LIMITS.linkConnectionWindowMax),
  }
}

function proofFields({ signature, mac }: Proof): Record<string, unknown> {
  return { signature: signature.toString('base64'), mac: mac?.toString('base64') }
}

function readProof(fields: Fields): Proof {
  return {
    signature: fields.bytes('signature', SIGNATURE_BYTES),
    mac: fields.has('mac') ? fields.bytes('mac', MAC_BYTES) : undefined,
  }
}

function encode(fields: Record<string, unknown>): Buffer {
  return Buffer.from(JSON.stringify(fields), 'utf8')
}

/** Reads a peer's JSON object field by field. Every error is a LinkError BAD_FRAME that names the field. */
export class Fields {
  readonly what: string
  readonly #fields: Readonly<Record<string, unknown>>

  constructor(source: unknown, what: string) {
    this.what = what
    let value = source
    if (Buffer.isBuffer(source)) {
      try {
        value = JSON.parse(source.toString('utf8'))
      } catch (error) {
        throw new LinkError('BAD_FRAME', `${what}: not JSON`, { cause: error })
      }
    }
    if (typeof value !== 'object' || value === null || Array.isArray(value))
      throw this.#bad('an object is due')
    this.#fields = value as Readonly<Record<string, unknown>>
  }

  has(name: string): boolean {
    return Object.hasOwn(this.#fields, name) && this.#fields[name] !== undefined
  }

  value(name: string): unknown {
    return Object.hasOwn(this.#fields, name) ? this.#fields[name] : undefined
  }

  /** A string without control characters; its length in UTF-8 bytes. */
  text(name: string, lengthMin: number, lengthMax: number): string {
    const value = this.value(name)
    if (typeof value !== 'string') throw this.#bad(`${name} is not a string`)
    const length = Buffer.byteLength(value, 'utf8')
    if (length < lengthMin || length > lengthMax) {
      throw this.#bad(`${name} has ${length} bytes, ${lengthMin} to ${lengthMax} are allowed`)
    }
    if (hasControlCharacters(value)) throw this.#bad(`${name} has control characters`)
    return value
  }

  integer(name: string, min: number, max: number): number {
    const value = this.value(name)
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < min || value > max) {
      throw this.#bad(`${name} is not a whole number from ${min} to ${max}`)
    }
    return value
  }

  bytes(name: string, length: number): Buffer {
    const value = this.value(name)
    const bytes = typeof value === 'string' ? Buffer.from(value, 'base64') : undefined
    if (bytes?.length !== length) throw this.#bad(`${name} is not ${length} bytes in base64`)
    return bytes
  }

  list<T>(name: string, countMax: number, read: (value: unknown) => T): T[] {
    const value = this.value(name)
    if (!Array.isArray(value)) throw this.#bad(`${name} is not a list`)
    if (value.length > countMax) throw this.#bad(`${name} has more than ${countMax} entries`)
    return value.map(read)
  }

  #bad(what: string): LinkError {
    return new LinkError('BAD_FRAME', `${this.what}: ${what}`)
  }
}
