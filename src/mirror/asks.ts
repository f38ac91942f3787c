import { StoreError, UserError, type UserErrorCode } from '../base/errors.ts'
import { LinkError, PeerError, peerText } from '../link/errors.ts'
import { Fields } from '../link/hello.ts'
import type { ChannelOffer, Session } from '../link/session.ts'
import { CHANNELS, json } from './protocol.ts'

/**
 * Single questions between the daemons of a mirror: one channel, one request, one answer.
 *
 *   create   makes the volume of a mirror there, or takes the one that is there
 *   remove   the mirror is gone here
 *   yield    give up being primary: the changes made there since the common generation are thrown away
 *   retry    something was settled here: try again now
 */
export const ASKS = ['create', 'remove', 'yield', 'retry'] as const
export type AskKind = (typeof ASKS)[number]

const USER_CODES: readonly UserErrorCode[] = ['USAGE', 'NOT_FOUND', 'EXISTS', 'BUSY', 'REFUSED', 'FAILED']

/** @throws UserError with the peer's words, or that they make no sense; LinkError the session is over */
export async function ask(session: Session, kind: AskKind, body: Record<string, unknown>): Promise<Fields> {
  const channel = await session.open(CHANNELS.ask, { kind })
  try {
    const reply = await channel.request(1, json({ kind, ...body }))
    return readAnswer(session, () => new Fields(reply.payload, `answer to ${kind}`))
  } catch (error) {
    if (!(error instanceof PeerError)) throw error
    const code = USER_CODES.find((known) => known === error.code) ?? 'FAILED'
    throw new UserError(code, `the peer says: ${error.message}`, { cause: error })
  } finally {
    channel.close()
  }
}

/** What `read` finds in an answer. @throws UserError which peer says something that makes no sense */
export function readAnswer<T>({ peer }: Session, read: () => T): T {
  try {
    return read()
  } catch (error) {
    if (!(error instanceof LinkError)) throw error
    const text = `an answer of the peer ${peerText(peer.name)} makes no sense: ${error.message}`
    throw new UserError('FAILED', text, { cause: error })
  }
}

/**
 * Answers one question.
 * @param answer gets what resolves when the peer has the answer, or the session is over; @throws UserError, StoreError: the peer is told
 */
export function answerAsk(
  offer: ChannelOffer,
  answer: (kind: AskKind, body: Fields, over: Promise<unknown>) => Promise<Record<string, unknown>>,
): void {
  const channel = offer.accept()
  channel.onMessage(async (message) => {
    const body = new Fields(message.payload, 'question')
    const asked = body.text('kind', 1, 32)
    const kind = ASKS.find((known) => known === asked)
    if (message.id === 0) throw new LinkError('BAD_FRAME', 'a question wants an answer')
    let reply: Promise<void>
    try {
      if (kind === undefined)
        throw new UserError('REFUSED', `this daemon does not know the question ${asked}`)
      reply = channel.reply(message, 1, json(await answer(kind, body, channel.ended)))
    } catch (error) {
      if (error instanceof UserError) reply = channel.replyError(message, error.code, error.message)
      else if (error instanceof StoreError) reply = channel.replyError(message, 'FAILED', error.message)
      else throw error
    }
    await reply.catch((error: unknown) => {
      if (!(error instanceof LinkError)) throw error
    })
  })
}
