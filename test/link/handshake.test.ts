import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { LIMITS } from '../../src/base/limits.ts'
import { LinkError } from '../../src/link/errors.ts'
import { type Frame, KIND } from '../../src/link/frame.ts'
import {
  type Agreement,
  ClientHandshake,
  type Destination,
  type HandshakeStep,
  type Party,
  ServerHandshake,
} from '../../src/link/handshake.ts'
import { Fields } from '../../src/link/hello.ts'
import { type Identity, newIdentity } from '../../src/link/identity.ts'
import { volumeNameProblem } from '../../src/volume/pool.ts'

const BINDING = Buffer.alloc(0)
const destination: Destination = { purpose: 'test', session: undefined, connection: 0, connections: 2 }

function party(fields: Partial<Party> = {}): Party {
  return {
    identity: newIdentity(),
    name: 'pool',
    instance: 'run',
    software: 'test',
    capabilities: [],
    window: LIMITS.linkConnectionWindow,
    key: undefined,
    ...fields,
  }
}

type Send = Extract<HandshakeStep, { step: 'send' }>

function frameOf({ kind, payload }: Send): Frame {
  return { kind, flags: 0, channel: 0, acknowledged: 0, type: 0, id: 0, payload }
}

interface Outcome {
  agreement?: Agreement
  error?: LinkError
  identified: string[] // fingerprints that the driver was asked about
}

interface TalkOptions {
  readonly destination?: Destination
  readonly clientBinding?: Buffer
  readonly serverBinding?: Buffer
  /** Changes what passes between the two. */
  readonly between?: (send: Send, from: 'client' | 'server') => Send
}

/** Lets two sides talk until both are silent. */
function talk(client: Party, server: Party, options: TalkOptions = {}): { client: Outcome; server: Outcome } {
  const clientSide = new ClientHandshake(
    client,
    options.destination ?? destination,
    options.clientBinding ?? BINDING,
  )
  const serverSide = new ServerHandshake(server, options.serverBinding ?? BINDING)
  const outcomes = { client: { identified: [] } as Outcome, server: { identified: [] } as Outcome }
  const wire: { from: 'client' | 'server'; send: Send }[] = []
  const take = (side: 'client' | 'server', steps: readonly HandshakeStep[]): void => {
    const outcome = outcomes[side]
    for (const step of steps) {
      if (step.step === 'send') wire.push({ from: side, send: step })
      else if (step.step === 'done') outcome.agreement = step.agreement
      else if (step.step === 'fail') outcome.error = step.error
      else {
        outcome.identified.push(step.applicant.peer.fingerprint)
        take(side, side === 'client' ? clientSide.accept() : serverSide.accept('the session', 2))
      }
    }
  }
  take('client', clientSide.start())
  for (let next = wire.shift(); next !== undefined; next = wire.shift()) {
    const frame = frameOf(options.between?.(next.send, next.from) ?? next.send)
    if (next.from === 'client') take('server', serverSide.receive(frame))
    else take('client', clientSide.receive(frame))
  }
  return outcomes
}

function edit(send: Send, change: (fields: Record<string, unknown>) => void): Send {
  const fields: Record<string, unknown> = JSON.parse(send.payload.toString())
  change(fields)
  return { ...send, payload: Buffer.from(JSON.stringify(fields)) }
}

describe('a handshake', () => {
  it('tells each side who the other is and what they agree on', () => {
    const client = party({
      name: 'one',
      capabilities: [
        { name: 'a', required: false },
        { name: 'b', required: true },
      ],
    })
    const server = party({
      name: 'two',
      capabilities: [
        { name: 'b', required: false },
        { name: 'c', required: false },
      ],
    })
    const outcome = talk(client, server)
    expect(outcome.client.agreement).toEqual({
      version: 1,
      peer: { name: 'two', fingerprint: server.identity.fingerprint, instance: 'run', software: 'test' },
      capabilities: new Set(['b']),
      window: LIMITS.linkConnectionWindow,
      purpose: 'test',
      session: 'the session',
      connection: 0,
      connections: 2,
    })
    expect(outcome.server.agreement?.peer.fingerprint).toBe(client.identity.fingerprint)
    expect(outcome.server.agreement?.capabilities).toEqual(new Set(['b']))
    expect(outcome.server.identified).toEqual([client.identity.fingerprint])
  })

  it('takes the newest version that both have', () => {
    const outcome = talk(party({ versions: { min: 1, max: 5 } }), party({ versions: { min: 2, max: 3 } }))
    expect(outcome.client.agreement?.version).toBe(3)
    expect(outcome.server.agreement?.version).toBe(3)
  })

  it.each([
    ['newer', { min: 4, max: 5 }, { min: 1, max: 3 }, 'upgrade the accepting side'],
    ['older', { min: 1, max: 1 }, { min: 2, max: 3 }, 'upgrade the connecting side'],
  ])(
    'with a peer that is %s without an overlap ends with the same words on both sides',
    (_, client, server, words) => {
      const outcome = talk(party({ versions: client }), party({ versions: server }))
      for (const { error } of [outcome.client, outcome.server]) {
        expect(error?.code).toBe('VERSION')
        expect(error?.message).toContain(words)
        expect(error?.fate).toBe('refusal')
      }
      expect(outcome.server.identified).toEqual([])
    },
  )

  it('understands the versions of a hello that it does not understand otherwise', () => {
    const between = (send: Send): Send =>
      send.kind === KIND.hello ? { ...send, payload: Buffer.from('{"versions":[7,9],"news":{}}') } : send
    const outcome = talk(party(), party(), { between })
    expect(outcome.client.error?.message).toContain('versions 7 to 9')
  })

  it.each(['client', 'server'] as const)('names a capability that only the %s requires', (side) => {
    const needy = party({ capabilities: [{ name: 'time-travel', required: true }] })
    const outcome = side === 'client' ? talk(needy, party()) : talk(party(), needy)
    for (const { error } of [outcome.client, outcome.server]) {
      expect(error?.code).toBe('CAPABILITY')
      expect(error?.message).toContain('time-travel')
    }
  })

  it('passes over capabilities and fields that only a newer peer knows', () => {
    const between = (send: Send, from: string): Send =>
      from === 'client' && send.kind === KIND.proof
        ? edit(send, (fields) => Object.assign(fields, { more: 1 }))
        : send
    const outcome = talk(party({ capabilities: [{ name: 'new', required: false }] }), party(), { between })
    expect(outcome.client.agreement?.capabilities).toEqual(new Set())
  })
})

describe('a shared key', () => {
  const key = Buffer.from('a key that both sides share')

  it('lets those in who have it', () => {
    expect(talk(party({ key }), party({ key })).client.agreement).toBeDefined()
  })

  it.each([
    ['a wrong one', Buffer.from('a key that only one side has'), key],
    ['none', undefined, key],
  ])('keeps a client out that has %s, before anybody asks who it is', (_, clientKey, serverKey) => {
    const outcome = talk(party({ key: clientKey }), party({ key: serverKey }))
    expect(outcome.server.error?.code).toBe('AUTHENTICATION')
    expect(outcome.server.identified).toEqual([])
    expect(outcome.client.error?.code).toBe('AUTHENTICATION')
  })

  it('keeps a client away from a server that has none', () => {
    const outcome = talk(party({ key }), party())
    expect(outcome.client.error?.code).toBe('AUTHENTICATION')
    expect(outcome.client.identified).toEqual([])
  })

  it('does not say which part of a proof was wrong', () => {
    const wrongKey = talk(party({ key: Buffer.from('another key, long enough') }), party({ key })).server
      .error
    const wrongSignature = talk(party({ key }), party({ key }), {
      between: (send) =>
        send.kind === KIND.proof
          ? edit(send, (fields) => Object.assign(fields, { signature: Buffer.alloc(64).toString('base64') }))
          : send,
    }).server.error
    expect(wrongKey?.message).toBe(wrongSignature?.message)
    expect(wrongKey?.code).toBe(wrongSignature?.code)
  })
})

describe('a peer that lies', () => {
  it('about its identity is found out, on either side', () => {
    const victim = newIdentity()
    const liar = (): Identity => ({
      ...newIdentity(),
      publicKey: victim.publicKey,
      fingerprint: victim.fingerprint,
    })
    const asClient = talk(party({ identity: liar() }), party())
    expect(asClient.server.error?.code).toBe('AUTHENTICATION')
    expect(asClient.server.identified).toEqual([])
    const asServer = talk(party(), party({ identity: liar() }))
    expect(asServer.client.error?.code).toBe('AUTHENTICATION')
    expect(asServer.client.identified).toEqual([])
  })

  it('by replaying what another said gets nowhere', () => {
    const [client, server] = [party(), party()]
    const recorded: Send[] = []
    talk(client, server, {
      between(send, from) {
        if (from === 'client') recorded.push(send)
        return send
      },
    })
    let turn = 0
    const replayed = talk(party(), server, {
      between: (send, from) => (from === 'client' ? (recorded[turn++] ?? send) : send),
    })
    expect(replayed.server.error?.code).toBe('AUTHENTICATION')
    expect(replayed.server.identified).toEqual([])
  })

  it('by passing on the words of two others over TLS gets nowhere', () => {
    const outcome = talk(party(), party(), {
      clientBinding: Buffer.alloc(32, 1),
      serverBinding: Buffer.alloc(32, 2),
    })
    expect(outcome.server.error?.code).toBe('AUTHENTICATION')
  })

  it('by giving our own key and proof back to us gets nowhere', () => {
    const client = party({ key: Buffer.from('a key that the liar does not have') })
    const mirror = party({ identity: { ...newIdentity(), publicKey: client.identity.publicKey } })
    let proof: Record<string, unknown> = {}
    const outcome = talk(client, mirror, {
      between(send) {
        if (send.kind === KIND.proof) proof = JSON.parse(send.payload.toString())
        return send.kind === KIND.accept ? edit(send, (fields) => Object.assign(fields, proof)) : send
      },
    })
    expect(outcome.client.error?.code).toBe('AUTHENTICATION')
    expect(outcome.client.identified).toEqual([])
  })

  it('about what the other said is found out, whatever it changes', () => {
    const change = (key: string, value: unknown) => (send: Send, from: string) =>
      from === 'client' && send.kind === KIND.hello
        ? edit(send, (fields) => Object.assign(fields, { [key]: value }))
        : send
    for (const [key, value] of [
      ['name', 'x'],
      ['purpose', 'x'],
      ['connections', 9],
      ['instance', 'x'],
      ['capabilities', []],
    ] as const) {
      const outcome = talk(party({ capabilities: [{ name: 'a', required: false }] }), party(), {
        between: change(key, value),
      })
      expect(outcome.server.error?.code).toBe('AUTHENTICATION')
    }
  })
})

describe('a message of the handshake', () => {
  it('that makes no sense ends it on both sides, whatever it says', () => {
    const junk = fc.oneof(
      fc.json(),
      fc.string(),
      fc
        .record({
          versions: fc.constantFrom([1, 1], [1], 'x', [2, 1], [Number.NaN, 1], null),
          name: fc.jsonValue(),
        })
        .map((value) => JSON.stringify(value)),
    )
    fc.assert(
      fc.property(junk, fc.constantFrom(KIND.hello, KIND.welcome, KIND.proof, KIND.accept), (text, kind) => {
        const between = (send: Send): Send =>
          send.kind === kind ? { ...send, payload: Buffer.from(text) } : send
        const outcome = talk(party(), party(), { between })
        expect(outcome.client.agreement).toBeUndefined()
        expect(outcome.client.error).toBeInstanceOf(LinkError)
      }),
      { numRuns: 150 },
    )
  })

  it('ends it when any single field is missing or of the wrong kind', () => {
    for (const kind of [KIND.hello, KIND.welcome, KIND.proof, KIND.accept]) {
      let names: string[] = []
      talk(party(), party(), {
        between(send) {
          if (send.kind === kind) names = Object.keys(JSON.parse(send.payload.toString()))
          return send
        },
      })
      expect(names.length).toBeGreaterThan(0)
      for (const name of names) {
        for (const value of [undefined, { strange: true }]) {
          const between = (send: Send): Send =>
            send.kind === kind ? edit(send, (fields) => Object.assign(fields, { [name]: value })) : send
          const outcome = talk(party(), party(), { between })
          // Only a hello may lack its session, and then it is what it was.
          if (kind === KIND.hello && name === 'session' && value === undefined) continue
          expect(outcome.client.error, `${kind} ${name}`).toBeInstanceOf(LinkError)
        }
      }
    }
  })

  it('out of its place ends it', () => {
    const server = new ServerHandshake(party(), BINDING)
    const steps = server.receive(frameOf({ step: 'send', kind: KIND.proof, payload: Buffer.from('{}') }))
    expect(steps.map(({ step }) => step)).toEqual(['send', 'fail'])
    expect(server.state).toBe('failed')
    expect(server.receive(frameOf({ step: 'send', kind: KIND.hello, payload: Buffer.from('{}') }))).toEqual(
      [],
    )
  })

  it('takes in its texts what a volume may be called, and nothing else', () => {
    const joined = ['क्\u200dष', 'می\u200cخواهم', '👩\u200d💻', '\ue000', '\u0378']
    for (const name of joined) {
      expect(volumeNameProblem(name)).toBeUndefined()
      expect(new Fields({ name }, 'it').text('name', 1, 255)).toBe(name)
      expect(talk(party({ name }), party()).server.agreement?.peer.name).toBe(name)
    }
    for (const name of ['a\nb', 'a\u2028b', 'a\u2029b', 'a\u0085b', 'a\ud800b']) {
      expect(volumeNameProblem(name)).toBe('contains control characters')
      expect(() => new Fields({ name }, 'it').text('name', 1, 255)).toThrow(/control characters/)
    }
  })

  it('cannot put control characters into a log', () => {
    const outcome = talk(party({ name: 'a\nb' }), party())
    expect(outcome.server.error?.message).toContain('control characters')
    const between = (send: Send): Send =>
      send.kind === KIND.welcome
        ? {
            step: 'send',
            kind: KIND.refuse,
            payload: Buffer.from(
              JSON.stringify({ code: 'NEWS', message: `a\u001b[2J\nb${'x'.repeat(9999)}` }),
            ),
          }
        : send
    const refused = talk(party(), party(), { between }).client.error
    expect(refused?.code).toBe('NOT_WELCOME')
    expect(refused?.message).not.toMatch(/\p{C}/u)
    expect(refused?.message.length).toBeLessThan(600)
  })
})

it('a further connection asks for its session and is given no other', () => {
  const asked: Destination = { purpose: 'test', session: 'another session', connection: 1, connections: 2 }
  expect(talk(party(), party(), { destination: asked }).client.error?.code).toBe('BAD_FRAME')
  const right: Destination = { ...asked, session: 'the session' }
  expect(talk(party(), party(), { destination: right }).client.agreement?.connection).toBe(1)
  const none: Destination = { ...asked, session: undefined }
  expect(talk(party(), party(), { destination: none }).server.error?.code).toBe('BAD_FRAME')
})
