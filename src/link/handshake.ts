/**
 * The handshake of one connection, both sides of it. It knows frames only: no sockets, no clocks, no files. A call returns the steps that follow
 * from it, in order; whoever drives it takes them.
 *
 *   connecting side                            accepting side
 *     hello    versions, name, key, nonce ->
 *                                          <-  welcome  version, name, key, nonce
 *     proof    signature, mac             ->
 *                                              identify: is this the pinned peer, is it wanted?
 *                                          <-  accept   signature, mac, session
 *     identify: is this the pinned peer?
 *
 * Either side may answer with `refuse` instead, and then both know why.
 *
 * What is proved. Each side signs, with the key that it named, a hash over both first messages as they travelled and over the
 * *binding* of the channel (TLS: keying material that only the two ends of this TLS connection can export; empty for plain TCP). Both nonces are
 * in there, so a recording proves nothing a second time; the label says which side signs, so a proof is not
 * good for the other side. Where a key is shared, each side also gives an HMAC of the same under it. The key is never tried before the
 * peer has committed itself to a nonce, all checks are made in any case, and nobody is told which one failed.
 *
 * What is not: on plain TCP without TLS, nothing after the handshake is authenticated. Somebody who can rewrite the packets of an
 * established connection is kept out by TLS, not by keys. That is why plain TCP with other machines has to be allowed.
 */
import { createHash, createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import { assert, unreachable } from '../base/assert.ts'
import { LinkError } from './errors.ts'
import { type Frame, KIND, type Kind } from './frame.ts'
import {
  type Capability,
  decodeAcceptance,
  decodeHello,
  decodeProof,
  decodeReason,
  decodeVersions,
  decodeWelcome,
  encodeAcceptance,
  encodeHello,
  encodeProof,
  encodeReason,
  encodeWelcome,
  type Hello,
  type Introduction,
  NONCE_BYTES,
  type Proof,
  type VersionRange,
  type Welcome,
} from './hello.ts'
import { fingerprintOf, type Identity, verifySignature } from './identity.ts'

/** The protocol versions that this program speaks. */
export const VERSIONS: VersionRange = { min: 1, max: 1 }

/** What a side brings to each of its handshakes. */
export interface Party {
  readonly identity: Identity
  readonly name: string
  readonly instance: string
  readonly software: string
  readonly capabilities: readonly Capability[]
  readonly window: number
  readonly key: Buffer | undefined // the shared one
  readonly versions?: VersionRange
}

/** A peer that has proved that it owns its key. */
export interface ProvenPeer {
  readonly name: string // as it calls itself
  readonly fingerprint: string
  readonly instance: string
  readonly software: string
}

export interface Agreement {
  readonly version: number
  readonly peer: ProvenPeer
  readonly capabilities: ReadonlySet<string> // those that both sides have
  readonly window: number // what the peer takes
  readonly purpose: string
  readonly session: string
  readonly connection: number
  readonly connections: number
}

/** What the accepting side has to decide about a peer that has proved itself. */
export interface Applicant {
  readonly peer: ProvenPeer
  readonly purpose: string
  readonly session: string | undefined
  readonly connection: number
  readonly connections: number
}

export type HandshakeStep =
  | { readonly step: 'send'; readonly kind: Kind; readonly payload: Buffer }
  /** Compare with the pin, then call `accept` or `refuse`. No frame is taken in between. */
  | { readonly step: 'identify'; readonly applicant: Applicant }
  | { readonly step: 'done'; readonly agreement: Agreement }
  /** The connection is over; what had to be said was sent before. */
  | { readonly step: 'fail'; readonly error: LinkError }

export type HandshakeState = 'start' | 'introducing' | 'proving' | 'identifying' | 'done' | 'failed'

const NEXT: Record<HandshakeState, readonly HandshakeState[]> = {
  start: ['introducing', 'failed'],
  introducing: ['proving', 'failed'], // the first message of the peer is due
  proving: ['identifying', 'failed'], // its proof is due
  identifying: ['done', 'failed'], // the driver compares its fingerprint
  done: [],
  failed: [],
}

/** What both sides share: the states, refusals, and how errors become steps. */
abstract class Handshake {
  #state: HandshakeState = 'start'
  protected readonly party: Party
  protected readonly binding: Buffer
  protected readonly nonce = randomBytes(NONCE_BYTES)

  constructor(party: Party, binding: Buffer) {
    this.party = party
    this.binding = binding
  }

  get state(): HandshakeState {
    return this.#state
  }

  /** Takes a frame of the peer. */
  receive(frame: Frame): HandshakeStep[] {
    assert(this.#state !== 'identifying', 'no frame is taken while the driver decides')
    if (this.#state === 'done' || this.#state === 'failed') return []
    try {
      if (frame.kind === KIND.refuse || frame.kind === KIND.bye) return this.#refused(frame)
      return this.take(frame)
    } catch (error) {
      if (error instanceof LinkError) return this.refuse(error)
      throw error
    }
  }

  /** Ends the handshake and tells the peer why. */
  refuse(error: LinkError): HandshakeStep[] {
    if (this.#state === 'done' || this.#state === 'failed') return []
    this.enter('failed')
    return [
      { step: 'send', kind: KIND.refuse, payload: encodeReason(error) },
      { step: 'fail', error },
    ]
  }

  protected abstract take(frame: Frame): HandshakeStep[]

  protected enter(next: HandshakeState): void {
    assert(NEXT[this.#state].includes(next), `handshake: ${this.#state} -> ${next}`)
    this.#state = next
  }

  protected introduction(): Introduction {
    const { identity, name, instance, software, capabilities, window } = this.party
    const { publicKey } = identity
    return { name, publicKey, nonce: this.nonce, instance, software, capabilities, window }
  }

  #refused(frame: Frame): HandshakeStep[] {
    const { code, message } = decodeReason(frame.payload)
    this.enter('failed')
    // A code that only a newer peer has is some refusal.
    return [{ step: 'fail', error: new LinkError(code ?? 'NOT_WELCOME', `the peer refuses: ${message}`) }]
  }
}

export interface Destination {
  readonly purpose: string
  readonly session: string | undefined
  readonly connection: number
  readonly connections: number
}

export class ClientHandshake extends Handshake {
  readonly #destination: Destination
  #hello: Buffer = Buffer.alloc(0)
  #agreement: Omit<Agreement, 'session' | 'connections'> | undefined
  #peerKey: Buffer = Buffer.alloc(0)
  #transcript: Buffer = Buffer.alloc(0)
  #accepted: { session: string; connections: number } | undefined

  constructor(party: Party, destination: Destination, binding: Buffer) {
    super(party, binding)
    this.#destination = destination
  }

  start(): HandshakeStep[] {
    this.enter('introducing')
    const versions = this.party.versions ?? VERSIONS
    this.#hello = encodeHello({ versions, ...this.introduction(), ...this.#destination })
    return [{ step: 'send', kind: KIND.hello, payload: this.#hello }]
  }

  /** The peer's fingerprint is the right one. */
  accept(): HandshakeStep[] {
    assert(this.#agreement !== undefined && this.#accepted !== undefined, 'the peer has been proved')
    this.enter('done')
    return [{ step: 'done', agreement: { ...this.#agreement, ...this.#accepted } }]
  }

  protected override take(frame: Frame): HandshakeStep[] {
    if (this.state === 'introducing' && frame.kind === KIND.welcome) return this.#takeWelcome(frame.payload)
    if (this.state === 'proving' && frame.kind === KIND.accept) return this.#takeAcceptance(frame.payload)
    throw outOfPlace(frame)
  }

  #takeWelcome(payload: Buffer): HandshakeStep[] {
    const welcome = decodeWelcome(payload)
    const versions = this.party.versions ?? VERSIONS
    if (welcome.version < versions.min || welcome.version > versions.max) {
      throw new LinkError('BAD_FRAME', `welcome: version ${welcome.version} was not offered`)
    }
    this.#peerKey = welcome.publicKey
    this.#agreement = {
      version: welcome.version,
      peer: peerOf(welcome),
      capabilities: commonCapabilities(this.party.capabilities, welcome.capabilities),
      window: welcome.window,
      purpose: this.#destination.purpose,
      connection: this.#destination.connection,
    }
    this.#transcript = transcriptOf(this.#hello, payload, this.binding)
    this.enter('proving')
    const proof = prove('client', this.party, this.#transcript)
    return [{ step: 'send', kind: KIND.proof, payload: encodeProof(proof) }]
  }

  #takeAcceptance(payload: Buffer): HandshakeStep[] {
    const acceptance = decodeAcceptance(payload)
    checkProof('server', acceptance, this.#peerKey, this.party.key, this.#transcript)
    const { session, connections } = this.#destination
    if (acceptance.connections > connections || (session !== undefined && acceptance.session !== session)) {
      throw new LinkError('BAD_FRAME', 'accept: another session than was asked for')
    }
    this.#accepted = { session: acceptance.session, connections: acceptance.connections }
    this.enter('identifying')
    assert(this.#agreement !== undefined, 'a welcome came first')
    return [{ step: 'identify', applicant: { peer: this.#agreement.peer, ...this.#destination } }]
  }
}

export class ServerHandshake extends Handshake {
  #hello: Hello | undefined
  #version = 0
  #capabilities: ReadonlySet<string> = new Set()
  #transcript: Buffer = Buffer.alloc(0)

  constructor(party: Party, binding: Buffer) {
    super(party, binding)
    this.enter('introducing')
  }

  /** The peer's fingerprint is the right one, and the connection belongs to this session. */
  accept(session: string, connections: number): HandshakeStep[] {
    const hello = this.#hello
    assert(hello !== undefined, 'the peer has been proved')
    assert(connections <= hello.connections, 'no more connections than were asked for')
    this.enter('done')
    const { purpose, connection, window } = hello
    const proof = prove('server', this.party, this.#transcript)
    const agreement: Agreement = {
      version: this.#version,
      peer: peerOf(hello),
      capabilities: this.#capabilities,
      window,
      purpose,
      session,
      connection,
      connections,
    }
    return [
      { step: 'send', kind: KIND.accept, payload: encodeAcceptance({ ...proof, session, connections }) },
      { step: 'done', agreement },
    ]
  }

  protected override take(frame: Frame): HandshakeStep[] {
    if (this.state === 'introducing' && frame.kind === KIND.hello) return this.#takeHello(frame.payload)
    if (this.state === 'proving' && frame.kind === KIND.proof) return this.#takeProof(frame.payload)
    throw outOfPlace(frame)
  }

  #takeHello(payload: Buffer): HandshakeStep[] {
    this.#version = chooseVersion(this.party.versions ?? VERSIONS, decodeVersions(payload))
    const hello = decodeHello(payload)
    if ((hello.connection === 0) !== (hello.session === undefined)) {
      throw new LinkError('BAD_FRAME', 'hello: the first connection begins a session, all others join one')
    }
    this.#capabilities = commonCapabilities(this.party.capabilities, hello.capabilities)
    this.#hello = hello
    const welcome: Welcome = { version: this.#version, ...this.introduction() }
    const answer = encodeWelcome(welcome)
    this.#transcript = transcriptOf(payload, answer, this.binding)
    this.enter('proving')
    return [{ step: 'send', kind: KIND.welcome, payload: answer }]
  }

  #takeProof(payload: Buffer): HandshakeStep[] {
    const hello = this.#hello
    assert(hello !== undefined, 'a hello came first')
    checkProof('client', decodeProof(payload), hello.publicKey, this.party.key, this.#transcript)
    this.enter('identifying')
    const { purpose, session, connection, connections } = hello
    return [
      { step: 'identify', applicant: { peer: peerOf(hello), purpose, session, connection, connections } },
    ]
  }
}

function peerOf({ name, publicKey, instance, software }: Introduction): ProvenPeer {
  return { name, fingerprint: fingerprintOf(publicKey), instance, software }
}

/** The newest version that both speak. @throws LinkError VERSION, in words that fit either side's log */
function chooseVersion(own: VersionRange, peer: VersionRange): number {
  const version = Math.min(own.max, peer.max)
  if (version >= own.min && version >= peer.min) return version
  const older = own.max < peer.min ? 'accepting' : 'connecting'
  throw new LinkError(
    'VERSION',
    `the connecting side speaks versions ${peer.min} to ${peer.max} of the link, the accepting side ${own.min} to ${own.max}: ` +
      `upgrade the ${older} side`,
  )
}

/** @throws LinkError CAPABILITY naming what one side requires and the other lacks */
function commonCapabilities(own: readonly Capability[], peer: readonly Capability[]): ReadonlySet<string> {
  const ownNames = new Set(own.map(({ name }) => name))
  const peerNames = new Set(peer.map(({ name }) => name))
  const lacking = (required: readonly Capability[], names: ReadonlySet<string>): string =>
    required
      .filter((capability) => capability.required && !names.has(capability.name))
      .map(({ name }) => name)
      .join(', ')
  const lackedByPeer = lacking(own, peerNames)
  const lackedHere = lacking(peer, ownNames)
  if (lackedByPeer !== '' || lackedHere !== '') {
    const what = lackedByPeer === '' ? lackedHere : lackedByPeer
    throw new LinkError(
      'CAPABILITY',
      `one side requires ${what}, which the other does not have: upgrade that side`,
    )
  }
  return new Set([...ownNames].filter((name) => peerNames.has(name)))
}

function outOfPlace(frame: Frame): LinkError {
  return new LinkError('BAD_FRAME', `a frame of kind ${frame.kind} came out of its place in the handshake`)
}

type Side = 'client' | 'server'

function transcriptOf(hello: Buffer, welcome: Buffer, binding: Buffer): Buffer {
  const hash = createHash('sha256').update('fullstripe link, handshake 1\0')
  for (const part of [hello, welcome, binding]) {
    // With their lengths, so that no two transcripts are one string of bytes.
    const length = Buffer.alloc(4)
    length.writeUInt32LE(part.length)
    hash.update(length).update(part)
  }
  return hash.digest()
}

function statementOf(side: Side, transcript: Buffer): Buffer {
  switch (side) {
    case 'client':
      return Buffer.concat([Buffer.from('fullstripe link, connecting side\0'), transcript])
    case 'server':
      return Buffer.concat([Buffer.from('fullstripe link, accepting side\0'), transcript])
    default:
      return unreachable(side)
  }
}

function prove(side: Side, party: Party, transcript: Buffer): Proof {
  const statement = statementOf(side, transcript)
  return { signature: party.identity.sign(statement), mac: macOf(party.key, statement) }
}

function macOf(key: Buffer | undefined, statement: Buffer): Buffer | undefined {
  return key === undefined ? undefined : createHmac('sha256', key).update(statement).digest()
}

/** @throws LinkError AUTHENTICATION, the same whichever part does not hold */
function checkProof(
  side: Side,
  proof: Proof,
  publicKey: Buffer,
  key: Buffer | undefined,
  transcript: Buffer,
): void {
  const statement = statementOf(side, transcript)
  const signed = verifySignature(publicKey, statement, proof.signature)
  const expected = macOf(key, statement)
  // A proof of a key that this side does not have is passed over; a missing one where it has a key is a wrong one.
  const knowsKey = expected === undefined || (proof.mac !== undefined && timingSafeEqual(expected, proof.mac))
  if (!signed || !knowsKey) {
    throw new LinkError(
      'AUTHENTICATION',
      'authentication failed: check that both sides have the same key and that nobody stands between them',
    )
  }
}
