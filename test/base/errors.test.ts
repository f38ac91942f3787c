import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { messageOf, ProtocolError, StoreError, systemCode, UserError } from '../../src/base/errors.ts'

const failure = (action: () => unknown): unknown => {
  try {
    return action()
  } catch (error) {
    return error
  }
}

describe('systemCode', () => {
  it('is the code of a failed system call', () => {
    expect(systemCode(failure(() => readFileSync('/does/not/exist')))).toBe('ENOENT')
    expect(systemCode(failure(() => readFileSync('/')))).toBe('EISDIR')
  })

  it('is nothing for our own errors, whose codes are others', () => {
    expect(systemCode(new UserError('EXISTS', 'x'))).toBeUndefined()
    expect(systemCode(new StoreError('NO_SPACE', 'x'))).toBeUndefined()
    expect(systemCode(new ProtocolError('x'))).toBeUndefined()
    expect(systemCode(new Error('x'))).toBeUndefined()
    expect(systemCode({ code: 'ENOENT' })).toBeUndefined()
    expect(systemCode(undefined)).toBeUndefined()
  })
})

describe('our errors', () => {
  it('keep code and cause', () => {
    const cause = new Error('origin')
    expect(new StoreError('MEMBER_IO', 'member 1', { cause })).toMatchObject({
      name: 'StoreError',
      code: 'MEMBER_IO',
      cause,
    })
    expect(new UserError('BUSY', 'pool', { cause })).toMatchObject({ name: 'UserError', code: 'BUSY', cause })
    expect([messageOf(cause), messageOf('text'), messageOf(7)]).toEqual(['origin', 'text', '7'])
  })
})
