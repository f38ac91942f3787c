/** Drives the handshake of one connection: frames to and from the stream, the decision about the peer, and the time it may take. */
import type { Duplex } from 'node:stream'
import { AssertionError } from '../base/assert.ts'
import { type Clock, systemClock } from '../base/clock.ts'
import { LIMITS } from '../base/limits.ts'
import { Connection, type ConnectionOptions } from './connection.ts'
import { LinkError } from './errors.ts'
import type { Agreement, Applicant, ClientHandshake, HandshakeStep, ServerHandshake } from './handshake.ts'

/** The session that a peer is let into. */
export interface Admission {
  readonly session: string
  readonly connections: number
}

export interface GreetOptions extends ConnectionOptions {
  readonly handshakeMs?: number
}

export interface Greeted {
  readonly connection: Connection // paused: its session resumes it
  readonly agreement: Agreement
}

/**
 * Compares the peer with its pin and admits it; resolves when that is durable. On the accepting side with the session.
 * @throws LinkError refuses the peer
 */
export type Judge<T> = (applicant: Applicant, connection: Connection) => Promise<T>

export function greetServer(
  stream: Duplex,
  handshake: ClientHandshake,
  judge: Judge<void>,
  options: GreetOptions,
): Promise<Greeted> {
  return greet(stream, handshake, options, handshake.start(), async (applicant, connection) => {
    await judge(applicant, connection)
    return () => handshake.accept()
  })
}

export function greetClient(
  stream: Duplex,
  handshake: ServerHandshake,
  judge: Judge<Admission>,
  options: GreetOptions,
): Promise<Greeted> {
  return greet(stream, handshake, options, [], async (applicant, connection) => {
    const { session, connections } = await judge(applicant, connection)
    return () => handshake.accept(session, connections)
  })
}

/** @throws LinkError why there is no connection; it has ended then, or says its last words */
function greet(
  stream: Duplex,
  handshake: ClientHandshake | ServerHandshake,
  options: GreetOptions,
  first: HandshakeStep[],
  judge: Judge<() => HandshakeStep[]>,
): Promise<Greeted> {
  const clock: Clock = options.clock ?? systemClock
  const handshakeMs = options.handshakeMs ?? LIMITS.handshakeMsMax
  return new Promise((resolve, reject) => {
    const handler = {
      onFrame: (frame: Parameters<typeof handshake.receive>[0]): void => take(handshake.receive(frame)),
      onRoom: (): void => undefined,
      onEnd: (reason: LinkError): void => {
        cancelTimer()
        const silent = first.length > 0 && connection.counters.bytesIn === 0
        reject(silent && (reason.code === 'HUNG_UP' || reason.code === 'CUT') ? withAdvice(reason) : reason)
      },
    }
    const connection = new Connection(stream, handler, options)
    const cancelTimer = clock.after(handshakeMs, () =>
      connection.close(new LinkError('LATE', `the handshake was not done after ${handshakeMs} ms`)),
    )
    const take = (steps: readonly HandshakeStep[]): void => {
      for (const step of steps) {
        switch (step.step) {
          case 'send':
            connection.send(step.kind, [step.payload])
            break
          case 'identify':
            connection.pause()
            judge(step.applicant, connection).then(
              (accept) => {
                if (connection.state !== 'open') return
                take(accept())
              },
              (error: unknown) => {
                if (error instanceof AssertionError) throw error
                // Whatever else goes wrong, for instance a disk that takes no pin, costs this peer its connection and no more.
                const refusal =
                  error instanceof LinkError
                    ? error
                    : new LinkError('BUSY', 'this side cannot take peers now', { cause: error })
                take(handshake.refuse(refusal))
              },
            )
            break
          case 'done':
            cancelTimer()
            connection.pause()
            resolve({ connection, agreement: step.agreement })
            break
          case 'fail':
            connection.leave(step.error)
            break
        }
      }
    }
    take(first)
  })
}

/** A TLS server hangs up without a word on whoever does not speak TLS. */
function withAdvice(reason: LinkError): LinkError {
  const advice = 'the peer answered nothing: is it a daemon of this kind, and does it want TLS?'
  return new LinkError(reason.code, `${reason.message}; ${advice}`, { cause: reason })
}
