import { assert } from '../base/assert.ts'

/**
 * The states of a mirror, on either side (DESIGN section 5). On the secondary's side they are what the primary says.
 *
 *   connecting   there is no session with the peer, or it has no say yet        negotiating  roles, sizes and generations are compared
 *   comparing    signatures of both sides are compared                          copying      the secondary is not consistent yet
 *   insync       sync: both have every answered write                           cycling      async: the secondary is a point in time
 *   degraded     it was in use and the peer is lost, or cannot go on: changes are noted, and follow as a cycle
 *   paused       by the operator                                                promoted     planned change of roles: neither writes
 *   splitbrain   both sides were primary since they last agreed: nothing moves until `resolve`
 */
export const MIRROR_STATES = [
  'connecting',
  'negotiating',
  'comparing',
  'copying',
  'insync',
  'cycling',
  'degraded',
  'paused',
  'promoted',
  'splitbrain',
] as const
export type MirrorState = (typeof MIRROR_STATES)[number]

const NEXT: Record<MirrorState, readonly MirrorState[]> = {
  connecting: ['negotiating', 'paused', 'degraded', 'promoted', 'splitbrain'],
  negotiating: [
    'comparing',
    'copying',
    'cycling',
    'insync',
    'degraded',
    'connecting',
    'paused',
    'promoted',
    'splitbrain',
  ],
  comparing: [
    'negotiating',
    'copying',
    'cycling',
    'insync',
    'degraded',
    'connecting',
    'paused',
    'promoted',
    'splitbrain',
  ],
  copying: ['negotiating', 'insync', 'cycling', 'degraded', 'connecting', 'paused', 'promoted', 'splitbrain'],
  insync: ['degraded', 'paused', 'promoted', 'cycling', 'copying', 'negotiating', 'splitbrain'],
  cycling: ['degraded', 'paused', 'promoted', 'insync', 'copying', 'negotiating', 'splitbrain'],
  degraded: ['negotiating', 'paused', 'promoted', 'connecting', 'splitbrain'],
  paused: ['connecting', 'degraded', 'negotiating', 'promoted', 'splitbrain'],
  promoted: ['connecting', 'degraded', 'negotiating', 'paused', 'splitbrain'],
  splitbrain: ['connecting', 'negotiating', 'degraded', 'paused', 'promoted'],
}

export class MirrorStates {
  #state: MirrorState
  #since = new Date()
  #reason: string | null = null
  readonly #onChange: (state: MirrorState, before: MirrorState, reason: string | null) => void

  constructor(
    state: MirrorState,
    onChange: (state: MirrorState, before: MirrorState, reason: string | null) => void,
  ) {
    this.#state = state
    this.#onChange = onChange
  }

  get state(): MirrorState {
    return this.#state
  }
  get since(): Date {
    return this.#since
  }
  get reason(): string | null {
    return this.#reason
  }

  /** The one way to change the state. The same state with another reason is no change, only news. */
  enter(next: MirrorState, reason: string | null = null): void {
    const before = this.#state
    if (next === before) {
      this.#reason = reason
      return
    }
    assert(NEXT[before].includes(next), `mirror: ${before} -> ${next}`)
    this.#move(next, reason)
  }

  /** The state that the other side says it has: some may have been missed on the way. */
  follow(next: MirrorState, reason: string | null = null): void {
    if (next === this.#state) this.#reason = reason
    else this.#move(next, reason)
  }

  #move(next: MirrorState, reason: string | null): void {
    const before = this.#state
    this.#state = next
    this.#since = new Date()
    this.#reason = reason
    this.#onChange(next, before, reason)
  }
}
