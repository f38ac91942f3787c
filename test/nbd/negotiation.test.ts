import { describe, expect, it } from 'vitest'
import { ProtocolError } from '../../src/base/errors.ts'
import { LIMITS } from '../../src/base/limits.ts'
import { CLIENT_FLAG, INFO, OPTION, OPTION_REPLY, TRANSMISSION_FLAG } from '../../src/nbd/constants.ts'
import { decodeInfo, decodeListedExport, encodeOption } from '../../src/nbd/handshake.ts'
import { Negotiation } from '../../src/nbd/negotiation.ts'
import { catalogOf, description, flagsOf, go, meta, Talk, TWO } from './talk.ts'

describe('the start', () => {
  it('greets as fixed newstyle with NO_ZEROES', () => {
    const greeting = new Negotiation(TWO).takeOutput()
    expect(greeting.toString('hex')).toBe(`${'4e42444d41474943'}${'49484156454f5054'}${'0003'}`)
  })

  for (const flags of [4, 8, 0x80000000, 0xffffffff]) {
    it(`hangs up over client flags 0x${flags.toString(16)}`, () => {
      expect(() => new Talk(TWO, flags)).toThrow(ProtocolError)
    })
  }

  it('lets a client without fixed newstyle choose an export, and nothing else', () => {
    const old = new Talk(TWO, 0)
    expect(old.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))).toHaveLength(134)
    expect(old.outcome).toMatchObject({ kind: 'transmission', exportName: 'disk', mode: 'simple' })
    for (const option of [OPTION.LIST, OPTION.GO, OPTION.ABORT, 77]) {
      expect(() => new Talk(TWO, 0).send(encodeOption(option)), String(option)).toThrow(ProtocolError)
    }
  })

  it('hangs up over anything that is no option', () => {
    expect(() => new Talk().send(Buffer.from('GET / HTTP/1.1\r\n'))).toThrow(ProtocolError)
  })

  it('takes nothing more after a protocol error', () => {
    const talk = new Talk()
    expect(() => talk.send(Buffer.alloc(16))).toThrow(ProtocolError)
    expect(() => talk.send(Buffer.alloc(16))).toThrow(/negotiation is over/)
  })
})

describe('EXPORT_NAME', () => {
  it('answers with size, flags and 124 zeroes', () => {
    const talk = new Talk(TWO, CLIENT_FLAG.FIXED_NEWSTYLE)
    const answer = talk.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))
    expect(answer).toHaveLength(134)
    expect(answer.readBigUInt64BE(0)).toBe(2n ** 40n + 512n)
    expect(answer.subarray(10).equals(Buffer.alloc(124))).toBe(true)
    expect(talk.outcome).toMatchObject({
      kind: 'transmission',
      exportName: 'disk',
      readOnly: false,
      contexts: [],
    })
  })

  it('leaves the zeroes out where that was agreed on', () => {
    expect(new Talk().send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))).toHaveLength(10)
  })

  it('cannot answer with an error, so it hangs up', () => {
    for (const name of ['nobody', '']) {
      const talk = new Talk()
      expect(talk.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from(name)))).toHaveLength(0)
      expect(talk.outcome).toMatchObject({ kind: 'refused' })
    }
    expect(() => new Talk().send(encodeOption(OPTION.EXPORT_NAME, Buffer.alloc(5000, 97)))).toThrow(
      ProtocolError,
    )
    expect(() => new Talk().send(encodeOption(OPTION.EXPORT_NAME, Buffer.alloc(100_000, 97)))).toThrow(
      ProtocolError,
    )
    expect(() => new Talk().send(encodeOption(OPTION.EXPORT_NAME, Buffer.from([0xff])))).toThrow(
      ProtocolError,
    )
  })

  it('takes structured replies and contexts along', () => {
    const talk = new Talk()
    talk.option(OPTION.STRUCTURED_REPLY)
    talk.option(OPTION.SET_META_CONTEXT, meta('disk', 'base:allocation'))
    const answer = talk.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))
    expect(answer.readUInt16BE(8) & TRANSMISSION_FLAG.SEND_DF).not.toBe(0)
    expect(talk.outcome).toMatchObject({ kind: 'transmission', mode: 'structured', contexts: [1] })
  })

  it('may not follow extended headers', () => {
    const talk = new Talk()
    talk.option(OPTION.EXTENDED_HEADERS)
    expect(() => talk.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))).toThrow(ProtocolError)
  })
})

describe('ABORT', () => {
  it('is acknowledged, whatever data it carries', () => {
    for (const data of [Buffer.alloc(0), Buffer.from('so long'), Buffer.alloc(100_000)]) {
      const talk = new Talk()
      expect(talk.only(OPTION.ABORT, data)).toBe(OPTION_REPLY.ACK)
      expect(talk.outcome).toEqual({ kind: 'aborted' })
    }
  })
})

describe('LIST', () => {
  it('names every export with its description', () => {
    const replies = new Talk().option(OPTION.LIST)
    expect(replies.map((reply) => reply.type)).toEqual([
      OPTION_REPLY.SERVER,
      OPTION_REPLY.SERVER,
      OPTION_REPLY.ACK,
    ])
    expect(replies.slice(0, 2).map((reply) => decodeListedExport(reply.data))).toEqual([
      { name: 'disk', description: 'volume disk' },
      { name: 'größer', description: 'volume größer' },
    ])
  })

  it('acknowledges that there is none', () => {
    expect(new Talk(catalogOf()).only(OPTION.LIST)).toBe(OPTION_REPLY.ACK)
  })

  it('takes no data', () => {
    const talk = new Talk()
    expect(talk.only(OPTION.LIST, Buffer.from('x'))).toBe(OPTION_REPLY.ERR_INVALID)
    expect(talk.option(OPTION.LIST)).toHaveLength(3)
  })
})

describe('options that are not supported', () => {
  for (const option of [0, OPTION.PEEK_EXPORT, OPTION.STARTTLS, 12, 0x80000000, 0xffffffff]) {
    it(`${option}: its data is skipped, it gets ERR_UNSUP, the next option works`, () => {
      for (const length of [0, 1, 1000, LIMITS.nbdOptionDataMax + 1]) {
        const talk = new Talk()
        expect(talk.only(option, Buffer.alloc(length, 0x49))).toBe(OPTION_REPLY.ERR_UNSUP)
        expect(talk.option(OPTION.LIST)).toHaveLength(3)
      }
    })
  }
})

describe('INFO and GO', () => {
  for (const option of [OPTION.INFO, OPTION.GO]) {
    describe(option === OPTION.GO ? 'GO' : 'INFO', () => {
      it('describes the export as asked', () => {
        const infos = [INFO.BLOCK_SIZE, INFO.NAME, 4711, INFO.DESCRIPTION, INFO.EXPORT, INFO.NAME]
        const replies = new Talk().option(option, go('größer', infos))
        expect(replies.at(-1)?.type).toBe(OPTION_REPLY.ACK)
        const answers = replies.slice(0, -1).map((reply) => {
          expect(reply.type).toBe(OPTION_REPLY.INFO)
          return decodeInfo(reply.data)
        })
        expect(answers).toHaveLength(4)
        expect(answers).toContainEqual({ type: 'name', text: 'größer' })
        expect(answers).toContainEqual({ type: 'description', text: 'volume größer' })
        const sizes = { minimum: 1, preferred: 4096, maximum: 32 * 1024 * 1024 }
        expect(answers).toContainEqual({ type: 'blockSize', sizes })
        expect(answers).toContainEqual(expect.objectContaining({ type: 'export', size: 2 ** 40 + 512 }))
      })

      it('sends what is mandatory when nothing is asked', () => {
        const replies = new Talk().option(option, go('disk'))
        expect(replies.map((reply) => reply.type)).toEqual([OPTION_REPLY.INFO, OPTION_REPLY.ACK])
      })

      it('does not know every name', () => {
        const talk = new Talk()
        expect(talk.only(option, go('nobody'))).toBe(OPTION_REPLY.ERR_UNKNOWN)
        expect(talk.only(option, go(''))).toBe(OPTION_REPLY.ERR_UNKNOWN) // two exports: none is the default
        expect(new Talk(catalogOf()).only(option, go(''))).toBe(OPTION_REPLY.ERR_UNKNOWN)
      })

      it('takes the only export as the default, and says its name', () => {
        const talk = new Talk(catalogOf(description('alone')))
        const replies = talk.option(option, go('', [INFO.NAME]))
        expect(replies.map((reply) => reply.type)).toEqual([
          OPTION_REPLY.INFO,
          OPTION_REPLY.INFO,
          OPTION_REPLY.ACK,
        ])
        expect(decodeInfo(replies[0]?.data ?? Buffer.alloc(0))).toEqual({ type: 'name', text: 'alone' })
        if (option === OPTION.GO) expect(talk.outcome).toMatchObject({ exportName: 'alone' })
      })

      it('leaves an empty description out', () => {
        const talk = new Talk(catalogOf(description('alone', { description: '' })))
        expect(talk.option(option, go('', [INFO.DESCRIPTION]))).toHaveLength(2)
      })

      for (const [what, data] of [
        ['no data', Buffer.alloc(0)],
        ['5 bytes', Buffer.alloc(5)],
        ['a name longer than the option', Buffer.from('00000002610000', 'hex')],
        ['a name of 2^32 - 1 bytes', Buffer.from('ffffffff00000000', 'hex')],
        ['fewer infos than announced', Buffer.from(`${'00000004'}6469736b${'0002'}${'0001'}`, 'hex')],
        ['more infos than announced', Buffer.from(`${'00000004'}6469736b${'0000'}${'0001'}`, 'hex')],
        ['an odd byte', Buffer.from(`${'00000004'}6469736b${'0000'}${'00'}`, 'hex')],
        ['a name with NUL', go('di\0sk')],
        ['a name that is not UTF-8', Buffer.from('00000001ff0000', 'hex')],
        ['a name of 4097 bytes', go('x'.repeat(4097))],
      ] as const) {
        it(`finds ${what} invalid`, () => {
          const talk = new Talk()
          expect(talk.only(option, data)).toBe(OPTION_REPLY.ERR_INVALID)
          expect(talk.option(OPTION.LIST)).toHaveLength(3)
        })
      }

      it('finds 64 KiB of data too big', () => {
        const talk = new Talk()
        const data = Buffer.alloc(LIMITS.nbdOptionDataMax + 1)
        expect(talk.only(option, data)).toBe(OPTION_REPLY.ERR_TOO_BIG)
        expect(talk.option(OPTION.LIST)).toHaveLength(3)
      })

      for (const [refused, type] of [
        ['policy', OPTION_REPLY.ERR_POLICY],
        ['platform', OPTION_REPLY.ERR_PLATFORM],
        ['tls', OPTION_REPLY.ERR_TLS_REQD],
        ['shutdown', OPTION_REPLY.ERR_SHUTDOWN],
      ] as const) {
        it(`passes a refusal on: ${refused}`, () => {
          const replies = new Talk(catalogOf({ name: 'kept', refused, message: 'not for you' })).option(
            option,
            go('kept'),
          )
          expect(replies).toEqual([{ type, data: Buffer.from('not for you') }])
        })
      }
    })
  }

  it('INFO does not end the handshake, GO does', () => {
    const talk = new Talk()
    talk.option(OPTION.INFO, go('disk'))
    expect(talk.outcome).toBeUndefined()
    talk.option(OPTION.GO, go('disk'))
    expect(talk.outcome).toMatchObject({
      kind: 'transmission',
      exportName: 'disk',
      readOnly: false,
      mode: 'simple',
    })
  })

  it('says the same to INFO and to a GO that follows', () => {
    for (const prepare of [[], [OPTION.STRUCTURED_REPLY], [OPTION.EXTENDED_HEADERS]]) {
      const talk = new Talk()
      for (const option of prepare) talk.option(option)
      if (prepare.length > 0) talk.option(OPTION.SET_META_CONTEXT, meta('disk', 'base:allocation'))
      const all = go('disk', [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE])
      expect(talk.option(OPTION.INFO, all)).toEqual(talk.option(OPTION.GO, all))
    }
  })

  it('hands on what follows the last option', () => {
    const talk = new Talk()
    talk.send(Buffer.concat([encodeOption(OPTION.GO, go('disk')), Buffer.from('first request')]))
    expect(talk.outcome).toMatchObject({ kind: 'transmission', leftover: Buffer.from('first request') })
  })
})

describe('transmission flags', () => {
  const always = [
    'HAS_FLAGS',
    'SEND_FLUSH',
    'SEND_FUA',
    'SEND_TRIM',
    'SEND_WRITE_ZEROES',
    'SEND_FAST_ZERO',
    'SEND_CACHE',
  ]
  const names = (flags: number) =>
    Object.entries(TRANSMISSION_FLAG)
      .filter(([, bit]) => (flags & bit) !== 0)
      .map(([name]) => name)
      .sort()

  it('depend on the export', () => {
    expect(names(flagsOf(new Talk().option(OPTION.GO, go('disk'))))).toEqual(
      [...always, 'CAN_MULTI_CONN'].sort(),
    )
    expect(names(flagsOf(new Talk().option(OPTION.GO, go('größer'))))).toEqual(
      [...always, 'READ_ONLY'].sort(),
    )
  })

  it('depend on what was negotiated', () => {
    const talk = new Talk()
    const info = () => names(flagsOf(talk.option(OPTION.INFO, go('disk'))))
    expect(info()).not.toContain('SEND_DF')
    talk.option(OPTION.STRUCTURED_REPLY)
    expect(info()).toContain('SEND_DF')
    talk.option(OPTION.SET_META_CONTEXT, meta('disk', 'base:allocation'))
    expect(info()).not.toContain('BLOCK_STATUS_PAYLOAD')
    talk.option(OPTION.EXTENDED_HEADERS)
    expect(info()).toEqual([...always, 'CAN_MULTI_CONN', 'SEND_DF', 'BLOCK_STATUS_PAYLOAD'].sort())
    talk.option(OPTION.SET_META_CONTEXT, meta('disk'))
    expect(info()).not.toContain('BLOCK_STATUS_PAYLOAD')
  })
})

describe('STRUCTURED_REPLY and EXTENDED_HEADERS', () => {
  const modeAfter = (...options: number[]) => {
    const talk = new Talk()
    const types = options.map((option) => talk.only(option))
    talk.option(OPTION.GO, go('disk'))
    return { types, mode: talk.outcome?.kind === 'transmission' ? talk.outcome.mode : undefined }
  }
  const { ACK, ERR_EXT_HEADER_REQD } = OPTION_REPLY
  const { STRUCTURED_REPLY, EXTENDED_HEADERS } = OPTION

  it('choose the framing; extended headers take precedence and stay', () => {
    expect(modeAfter()).toEqual({ types: [], mode: 'simple' })
    expect(modeAfter(STRUCTURED_REPLY)).toEqual({ types: [ACK], mode: 'structured' })
    expect(modeAfter(STRUCTURED_REPLY, STRUCTURED_REPLY)).toEqual({ types: [ACK, ACK], mode: 'structured' })
    expect(modeAfter(EXTENDED_HEADERS)).toEqual({ types: [ACK], mode: 'extended' })
    expect(modeAfter(EXTENDED_HEADERS, EXTENDED_HEADERS)).toEqual({ types: [ACK, ACK], mode: 'extended' })
    expect(modeAfter(STRUCTURED_REPLY, EXTENDED_HEADERS)).toEqual({ types: [ACK, ACK], mode: 'extended' })
    expect(modeAfter(EXTENDED_HEADERS, STRUCTURED_REPLY)).toEqual({
      types: [ACK, ERR_EXT_HEADER_REQD],
      mode: 'extended',
    })
  })

  it('take no data', () => {
    for (const option of [STRUCTURED_REPLY, EXTENDED_HEADERS]) {
      const talk = new Talk()
      expect(talk.only(option, Buffer.alloc(1))).toBe(OPTION_REPLY.ERR_INVALID)
      talk.option(OPTION.GO, go('disk'))
      expect(talk.outcome).toMatchObject({ mode: 'simple' })
    }
  })
})

describe('shutting down', () => {
  it('refuses every option but ABORT', () => {
    const talk = new Talk()
    talk.negotiation.shutDown()
    const set = meta('disk', 'base:allocation')
    for (const [option, data] of [
      [OPTION.LIST, undefined],
      [OPTION.INFO, go('disk')],
      [OPTION.GO, go('disk')],
      [OPTION.STRUCTURED_REPLY, undefined],
      [OPTION.EXTENDED_HEADERS, undefined],
      [OPTION.LIST_META_CONTEXT, set],
      [OPTION.SET_META_CONTEXT, set],
      [OPTION.STARTTLS, undefined],
      [99, Buffer.alloc(10)],
      [OPTION.GO, Buffer.alloc(LIMITS.nbdOptionDataMax + 1)],
    ] as const) {
      expect(talk.only(option, data), String(option)).toBe(OPTION_REPLY.ERR_SHUTDOWN)
    }
    expect(talk.only(OPTION.ABORT)).toBe(OPTION_REPLY.ACK)
  })

  it('hangs up on EXPORT_NAME', () => {
    const talk = new Talk()
    talk.negotiation.shutDown()
    expect(talk.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from('disk')))).toHaveLength(0)
    expect(talk.outcome).toMatchObject({ kind: 'refused' })
  })
})

describe('bounds', () => {
  it('hangs up over an absurd length, before its data', () => {
    const header = encodeOption(99)
    header.writeUInt32BE(LIMITS.nbdOptionDiscardMax + 1, 12)
    expect(() => new Talk().send(header)).toThrow(ProtocolError)
  })

  it('hangs up over too many options', () => {
    const talk = new Talk()
    for (let count = 0; count < LIMITS.nbdOptionsPerHandshakeMax; count++) talk.only(99)
    expect(() => talk.option(99)).toThrow(ProtocolError)
  })

  it('hangs up over options sent without waiting for their replies', () => {
    const many = Array.from({ length: 2000 }, (_, i) =>
      description(`volume-${i}`, { description: 'x'.repeat(1000) }),
    )
    const talk = new Talk(catalogOf(...many))
    const flood = Buffer.concat(Array.from({ length: 50 }, () => encodeOption(OPTION.LIST)))
    expect(() => talk.send(flood)).toThrow(ProtocolError)
    // What it said before is still there, and is the reply to one option only.
    expect(talk.negotiation.takeOutput().length).toBeLessThan(2 * 2000 * 1100)
    const patient = new Talk(catalogOf(...many))
    for (let count = 0; count < 3; count++) expect(patient.option(OPTION.LIST)).toHaveLength(2001)
  })
})
