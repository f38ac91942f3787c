import { expect } from 'vitest'
import { CLIENT_FLAG, HEADER, OPTION_REPLY } from '../../src/nbd/constants.ts'
import {
  decodeInfo,
  decodeOptionReplyHeader,
  encodeClientFlags,
  encodeExportRequest,
  encodeMetaContextRequest,
  encodeOption,
} from '../../src/nbd/handshake.ts'
import {
  type ExportCatalog,
  type ExportDescription,
  type ExportRefusal,
  Negotiation,
  type NegotiationOutcome,
} from '../../src/nbd/negotiation.ts'

/** A catalog with two exports, and a client that talks to the negotiation one option at a time. */
export const CONTEXTS = [
  { id: 1, name: 'base:allocation' },
  { id: 2, name: 'fullstripe:init' },
]

export function description(name: string, changes: Partial<ExportDescription> = {}): ExportDescription {
  return {
    name,
    description: `volume ${name}`,
    size: 2 ** 40 + 512,
    readOnly: false,
    canMultiConn: true,
    contexts: CONTEXTS,
    ...changes,
  }
}

export function catalogOf(
  ...found: (ExportDescription | (ExportRefusal & { readonly name: string }))[]
): ExportCatalog {
  return {
    list: () => found.map((e) => ({ name: e.name, description: 'refused' in e ? '' : e.description })),
    find: (name) => found.find((e) => e.name === name),
  }
}

export const TWO = catalogOf(
  description('disk'),
  description('größer', { readOnly: true, canMultiConn: false }),
)
export const FIXED = CLIENT_FLAG.FIXED_NEWSTYLE | CLIENT_FLAG.NO_ZEROES

/** A client that has greeted and speaks one option at a time. */
export class Talk {
  readonly negotiation: Negotiation
  outcome: NegotiationOutcome | undefined

  constructor(catalog: ExportCatalog = TWO, flags: number = FIXED) {
    this.negotiation = new Negotiation(catalog)
    this.negotiation.takeOutput()
    this.outcome = this.negotiation.receive(encodeClientFlags(flags))
  }

  send(bytes: Buffer): Buffer {
    this.outcome = this.negotiation.receive(bytes)
    return this.negotiation.takeOutput()
  }

  /** The replies to one option; each must name that option. */
  option(option: number, data?: Buffer): { type: number; data: Buffer }[] {
    return repliesIn(this.send(encodeOption(option, data)), option)
  }

  /** The type of the only reply to one option. */
  only(option: number, data?: Buffer): number {
    const replies = this.option(option, data)
    expect(replies).toHaveLength(1)
    return replies[0]?.type ?? -1
  }
}

function repliesIn(bytes: Buffer, option: number): { type: number; data: Buffer }[] {
  const replies: { type: number; data: Buffer }[] = []
  for (let at = 0; at < bytes.length; ) {
    const header = decodeOptionReplyHeader(bytes.subarray(at, at + HEADER.optionReply))
    expect(header.option).toBe(option)
    at += HEADER.optionReply
    replies.push({ type: header.type, data: bytes.subarray(at, at + header.length) })
    at += header.length
    expect(at).toBeLessThanOrEqual(bytes.length)
  }
  return replies
}

export const go = (name: string, infos: readonly number[] = []) => encodeExportRequest({ name, infos })
export const meta = (name: string, ...queries: string[]) => encodeMetaContextRequest({ name, queries })

export function flagsOf(replies: { type: number; data: Buffer }[]): number {
  for (const reply of replies) {
    const info = reply.type === OPTION_REPLY.INFO ? decodeInfo(reply.data) : undefined
    if (info?.type === 'export') return info.transmissionFlags
  }
  throw new Error('no INFO_EXPORT')
}
