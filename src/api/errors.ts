/**
 * Errors as the control API answers them: `{error: {code, message}}` with the HTTP status of the code. A failed
 * assertion is our own bug: it is answered nowhere and stops the process.
 */
import type { FastifyReply, FastifyRequest } from 'fastify'
import { AssertionError } from '../base/assert.ts'
import { messageOf, StoreError, type StoreErrorCode, UserError, type UserErrorCode } from '../base/errors.ts'
import type { ErrorBody } from './types.ts'

const USER_STATUS: Record<UserErrorCode, number> = {
  USAGE: 400,
  NOT_FOUND: 404,
  EXISTS: 409,
  BUSY: 409,
  REFUSED: 422,
  UNREACHABLE: 503,
  FAILED: 500,
}

const STORE_STATUS: Record<StoreErrorCode, number> = {
  MEMBER_IO: 500,
  NO_SPACE: 507,
  READ_ONLY: 409,
  SHUTTING_DOWN: 503,
  DAMAGED: 500,
  INVALID: 400,
  NOT_SUPPORTED: 422,
  NO_MEMORY: 503,
}

export function errorBody(code: string, message: string): ErrorBody {
  return { error: { code, message: message.replaceAll(/\s*\n\s*/g, ' ') } }
}

export function answerError(error: unknown, request: FastifyRequest, reply: FastifyReply): void {
  if (error instanceof AssertionError) {
    // Not thrown here, where fastify would turn it into an answer: it has to reach the process.
    setImmediate(() => {
      throw error
    })
    reply
      .code(500)
      .send(errorBody('INTERNAL', 'the daemon found a bug in itself and stops; its log says more'))
  } else if (error instanceof UserError) {
    reply.code(USER_STATUS[error.code]).send(errorBody(error.code, error.message))
  } else if (error instanceof StoreError) {
    reply.code(STORE_STATUS[error.code]).send(errorBody(error.code, error.message))
  } else {
    const status = httpStatus(error)
    if (status >= 500) {
      request.log.error({ err: error }, `${request.method} ${request.url} failed`)
      reply.code(status).send(errorBody('INTERNAL', `${messageOf(error)}; the daemon's log says more`))
    } else {
      // Fastify's own: malformed JSON, a failed validation, a body that is too large.
      reply.code(status).send(errorBody('USAGE', messageOf(error)))
    }
  }
}

function httpStatus(error: unknown): number {
  if (
    typeof error === 'object' &&
    error !== null &&
    'statusCode' in error &&
    typeof error.statusCode === 'number'
  ) {
    return error.statusCode
  }
  return 500
}
