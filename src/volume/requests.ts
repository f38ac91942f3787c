import { assert } from '../base/assert.ts'
import type { Upcall } from '../datapath/datapath.ts'
import type { Region } from './hot-set.ts'
import type { Entry } from './overlaps.ts'

/** The requests that a policy has under way, each cut into parts, one a format unit. A request is answered when all its parts are done. */
export type PartKind = 'write' | 'zero' | 'release'

export interface Request {
  readonly upcall: Upcall
  readonly order: number // of arrival
  outstanding: number // parts, and one while parts are being made
  errno: number // of the first part that failed
  /** It waits for these, too, before it is answered. */
  readonly forwarded: Promise<void>[]
  /** Where overlapping ones keep their order. */
  readonly entry: Entry | undefined
}

export interface Part {
  readonly request: Request
  readonly unit: number
  readonly kind: PartKind
  /** Held until the part is done, where intents are needed; on the other side of a mirror, too. */
  region: Region | undefined
  /** Of whoever does it, too: resolves when the region need not be held for them. */
  known: Promise<unknown> | undefined
}

export class Requests {
  readonly #answer: (request: Request) => void
  readonly #drained = new Map<Request, () => void>()
  #order = 0
  #active = 0
  readonly #quiet: (() => void)[] = []

  constructor(answer: (request: Request) => void) {
    this.#answer = answer
  }

  begin(upcall: Upcall, entry?: Entry): Request {
    this.#active++
    return { upcall, order: this.#order++, outstanding: 1, errno: 0, forwarded: [], entry }
  }

  /** Resolves when every request that was begun has done here what it does. No other may begin before. */
  quiet(): Promise<void> {
    if (this.#active === 0) return Promise.resolve()
    return new Promise((resolve) => this.#quiet.push(resolve))
  }

  part(request: Request, unit: number, kind: PartKind): Part {
    request.outstanding++
    return { request, unit, kind, region: undefined, known: undefined }
  }

  /** All parts made so far are done. */
  drained(request: Request): Promise<void> {
    if (request.outstanding === 1) return Promise.resolve()
    return new Promise((resolve) => this.#drained.set(request, resolve))
  }

  /** There are no more parts to come. */
  made(request: Request): void {
    request.outstanding--
    if (request.outstanding === 0) this.#end(request)
  }

  done(part: Part, errno: number): void {
    const { request, region } = part
    part.region = undefined
    if (region !== undefined) {
      if (part.known === undefined) region.owner.unpin(region)
      else part.known.then(() => region.owner.unpin(region))
    }
    if (errno !== 0 && request.errno === 0) request.errno = errno
    request.outstanding--
    assert(request.outstanding >= 0)
    if (request.outstanding === 1) {
      const drained = this.#drained.get(request)
      this.#drained.delete(request)
      drained?.()
    } else if (request.outstanding === 0) {
      this.#end(request)
    }
  }

  #end(request: Request): void {
    this.#active--
    this.#answer(request)
    if (this.#active === 0) for (const resolve of this.#quiet.splice(0)) resolve()
  }
}
