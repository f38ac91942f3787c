/**
 * The control API as commands see it: HTTP over POOL/control.sock. What the daemon answers is typed by
 * src/api/types.ts, which both sides are built from.
 */
import { existsSync } from 'node:fs'
import { type IncomingMessage, request } from 'node:http'
import { resolve } from 'node:path'
import { controlPath } from '../api/control-path.ts'
import type { ErrorBody } from '../api/types.ts'
import { messageOf, systemCode, UserError } from '../base/errors.ts'
import { socketAddress } from '../daemon/socket-path.ts'

/** An error that the daemon answered; `code` is the daemon's. */
export class ApiError extends Error {
  override readonly name = 'ApiError'
  readonly code: string
  constructor(code: string, message: string) {
    super(message)
    this.code = code
  }
}

const ANSWER_MS_MAX = 120_000

export class Client {
  readonly pool: string
  readonly #socket: string

  constructor(pool: string) {
    this.pool = resolve(pool)
    this.#socket = controlPath(this.pool)
  }

  get<T>(path: string): Promise<T> {
    return this.#json<T>('GET', path)
  }

  /** @param timeout milliseconds of silence after which the daemon is given up; 0: it may take as long as it takes */
  post<T>(path: string, body: object, timeout = ANSWER_MS_MAX): Promise<T> {
    return this.#json<T>('POST', path, body, timeout)
  }

  patch<T>(path: string, body: object): Promise<T> {
    return this.#json<T>('PATCH', path, body)
  }

  delete<T>(path: string): Promise<T> {
    return this.#json<T>('DELETE', path)
  }

  /** The objects of a stream of JSON lines, until the daemon ends it or the signal fires. */
  async *lines<T>(path: string, signal: AbortSignal): AsyncGenerator<T> {
    let response: IncomingMessage
    try {
      response = await this.#send('GET', path, undefined, 0, signal)
      if ((response.statusCode ?? 500) >= 400) await this.#parse<T>(response)
    } catch (error) {
      if (signal.aborted) return
      throw error
    }
    let rest = ''
    response.setEncoding('utf8')
    try {
      for await (const chunk of response) {
        const lines = `${rest}${chunk}`.split('\n')
        rest = lines.pop() ?? ''
        for (const line of lines) {
          const value: T = JSON.parse(line)
          yield value
        }
      }
    } catch (error) {
      // A stream that breaks off ends like one that is over: the caller knows whether it wanted that.
      if (systemCode(error) !== 'ECONNRESET' && !signal.aborted) throw error
    } finally {
      response.destroy()
    }
  }

  async #json<T>(method: string, path: string, body?: object, timeout = ANSWER_MS_MAX): Promise<T> {
    return this.#parse<T>(await this.#send(method, path, body, timeout))
  }

  async #parse<T>(response: IncomingMessage): Promise<T> {
    const chunks: Buffer[] = []
    try {
      for await (const chunk of response) chunks.push(chunk)
    } catch (error) {
      throw this.#unreachable(error)
    }
    const text = Buffer.concat(chunks).toString('utf8')
    const status = response.statusCode ?? 500
    if (status >= 400) throw apiError(status, text)
    const value: T = text === '' ? null : JSON.parse(text)
    return value
  }

  #send(
    method: string,
    path: string,
    body: object | undefined,
    timeout: number,
    signal?: AbortSignal,
  ): Promise<IncomingMessage> {
    return new Promise((resolve, reject) => {
      const fail = (error: unknown) => reject(this.#unreachable(error))
      if (!existsSync(this.pool)) return fail(undefined)
      const address = socketAddress(this.#socket)
      const payload = body === undefined ? undefined : JSON.stringify(body)
      const headers =
        payload === undefined
          ? {}
          : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) }
      const outgoing = request({
        socketPath: address.path,
        method,
        path,
        headers,
        timeout,
        agent: false,
        ...(signal === undefined ? {} : { signal }),
      })
      outgoing.once('socket', (socket) => {
        socket.once('connect', () => address.release())
        socket.once('error', () => address.release())
      })
      outgoing.once('timeout', () => outgoing.destroy(new Error(`no answer in ${timeout / 1000} s`)))
      outgoing.once('response', resolve)
      outgoing.once('error', fail)
      outgoing.end(payload)
    })
  }

  #unreachable(error: unknown): UserError {
    const start = `start it with: fullstripe serve ${this.pool}`
    const cause = error === undefined ? {} : { cause: error }
    const text = (): string => {
      if (!existsSync(this.pool)) {
        return `there is no pool at ${this.pool}: create it with: fullstripe pool create ${this.pool}`
      }
      switch (systemCode(error)) {
        case 'ENOENT':
        case 'ECONNREFUSED':
          return `no daemon serves the pool ${this.pool}: ${start}`
        case 'EACCES':
        case 'EPERM':
          return `not allowed to open ${this.#socket}: run this as the user who runs the daemon`
        case 'ENOTSOCK':
          return `${this.#socket} is no socket: is ${this.pool} a pool?`
        default:
          return `the daemon of ${this.pool} broke the connection (${messageOf(error)}): see its log; ${start}`
      }
    }
    return new UserError('UNREACHABLE', text(), cause)
  }
}

function apiError(status: number, text: string): ApiError {
  try {
    const body: Partial<ErrorBody> = JSON.parse(text)
    if (body.error !== undefined) return new ApiError(body.error.code, body.error.message)
  } catch {
    // Not from our API; the status has to do.
  }
  return new ApiError('FAILED', `the daemon answered with HTTP status ${status}`)
}

/** `/v1/volumes/NAME/...` */
export function volumePath(name: string, tail = ''): string {
  if (name === '' || name === '.' || name === '..')
    throw new UserError('USAGE', `"${name}" is not a volume name`)
  return `/v1/volumes/${encodeURIComponent(name)}${tail}`
}

/** `/v1/volumes/NAME/mirrors/MIRROR...` */
export function mirrorPath(volume: string, name: string, tail = ''): string {
  if (name === '' || name === '.' || name === '..')
    throw new UserError('USAGE', `"${name}" is not a mirror's name`)
  return volumePath(volume, `/mirrors/${encodeURIComponent(name)}${tail}`)
}
