/**
 * How things end between two daemons. Every connection, session, channel and request that does not end well ends with a LinkError;
 * its code says which kind of end, and `fate` what to do about it:
 *
 *   damage    the stream broke the protocol: that connection ends, and its session with it; trying again may help
 *   loss      the peer or the way to it is gone for now: try again soon
 *   refusal   somebody has to change something (a key, a version, a pin): trying again at once changes nothing
 *   here      this side ended it
 */
export type LinkFate = 'damage' | 'loss' | 'refusal' | 'here'

const FATES = {
  // Damage: what a frame can have (frame.ts) or say.
  BAD_MAGIC: 'damage', // not a frame: another protocol, or the stream is out of step
  BAD_FRAMING: 'damage', // a framing version that this program does not know
  BAD_HEADER: 'damage', // the checksum of the header
  BAD_PAYLOAD: 'damage', // the checksum of the payload
  BAD_SEQUENCE: 'damage', // a frame is missing, repeated or out of order
  TOO_LONG: 'damage', // a payload past the bound of its kind and phase
  TRUNCATED: 'damage', // the stream ended inside a frame
  BAD_FRAME: 'damage', // a frame that has no place here, or whose fields contradict each other
  BAD_WINDOW: 'damage', // more sent than was allowed, or more acknowledged than was sent

  UNREACHABLE: 'loss', // nobody accepts the connection
  CUT: 'loss', // the system reports the end of the connection
  HUNG_UP: 'loss', // the peer closed without a goodbye
  SILENT: 'loss', // nothing arrived for too long: stalled, half-open, or dead
  LATE: 'loss', // the handshake, or the other connections of a session, took too long
  GOODBYE: 'loss', // the peer ended it in order, for the reason in the message
  BUSY: 'loss', // the peer has too many connections or sessions
  NO_SESSION: 'loss', // a further connection came to a session that is not there any more

  REPLACED: 'refusal', // another session of the same identity and purpose took the place of this one
  VERSION: 'refusal', // no protocol version in common
  CAPABILITY: 'refusal', // one side requires what the other does not know
  AUTHENTICATION: 'refusal', // the proofs do not hold; nobody is told which
  IDENTITY: 'refusal', // the peer proved an identity, but not the one that is pinned under its name
  NOT_WELCOME: 'refusal', // the caller does not want this peer
  TLS: 'refusal', // one side wants TLS and the other does not, or a certificate is not accepted
  PLAIN: 'refusal', // plain TCP with another machine was not allowed

  CLOSED: 'here', // the session or the connection was closed by this side
  CHANNEL_CLOSED: 'here', // the channel was closed, by either side
  CHANNEL_REFUSED: 'here', // the peer did not accept the channel; its reason is in the message
  REQUEST_FAILED: 'here', // the peer's answer to a request is an error; see PeerError
  OVERFLOW: 'here', // the caller sent on and on without waiting
} as const satisfies Record<string, LinkFate>

export type LinkErrorCode = keyof typeof FATES

export class LinkError extends Error {
  override readonly name = 'LinkError'
  readonly code: LinkErrorCode
  constructor(code: LinkErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }

  get fate(): LinkFate {
    return FATES[this.code]
  }
}

/** The peer answered a request with an error of its own: a code the two sides agree on, and a sentence. */
export class PeerError extends Error {
  override readonly name = 'PeerError'
  readonly code: string
  constructor(code: string, message: string) {
    super(message)
    this.code = code
  }
}

export function isLinkErrorCode(code: string): code is LinkErrorCode {
  return Object.hasOwn(FATES, code)
}

const TEXT_LENGTH_MAX = 500

/** A peer's words as they may stand in a log: one line, bounded, no control characters. */
export function peerText(text: unknown): string {
  if (typeof text !== 'string') return ''
  return text
    .slice(0, TEXT_LENGTH_MAX)
    .replace(/[\p{C}\p{Zl}\p{Zp}]+/gu, ' ')
    .trim()
}
