import { assert } from '../base/assert.ts'
import { messageOf, StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatSize } from '../base/sizes.ts'
import type { Upcall } from '../datapath/datapath.ts'
import { RateLimit } from '../link/rate-limit.ts'
import type { GenerationRecord, MirrorRecord } from '../metadata/records.ts'
import type { MirrorBook, StoredMirror } from '../volume/mirror-book.ts'
import type { Volume } from '../volume/volume.ts'
import type { ChangeWatcher, Forwarding } from '../volume/watchers.ts'
import { ChangeNotes } from './change-notes.ts'
import { compareSides } from './compare.ts'
import type { CopyBits } from './copy-bits.ts'
import { Counters } from './counters.ts'
import { Forwarder } from './forwarder.ts'
import { judge } from './judge.ts'
import { LaneUse } from './lane-use.ts'
import { Progress } from './progress.ts'
import { type CommitInfo, type PrimaryHello, type Remote, RemoteError, type RemoteHello } from './remote.ts'
import { Saves } from './saves.ts'
import { Sender } from './sender.ts'
import { type Range, signaturesOf } from './signatures.ts'
import { type MirrorState, MirrorStates } from './state.ts'
import type { MirrorLag, MirrorProgress, VerifyResult } from './types.ts'
import { Verification } from './verify.ts'

/**
 * The primary's side of a mirror: notes every change of the volume, and brings it to the secondary.
 *
 * A session (`attach`) runs: hello, comparison where the bitmap says nothing, initial copy in passes, then cycles (async), or
 * cycles until little is left and after that every request to both sides (sync). Whatever ends it, changes are noted from the same turn on.
 *
 * Crash rules:
 *  1. A unit that the secondary may lack has its bit on the disk, or lies in a region whose intent is (intents.ts): the bit is recorded with
 *     the change, and the region cools later than that.
 *  2. A bit is cleared on the disk after the secondary has committed durably.
 *  3. Requests that were forwarded and not answered when the session ended count as changed on this side, in the turn of its end.
 */
export interface PrimaryHost {
  readonly volume: Volume
  readonly book: MirrorBook
  readonly stored: StoredMirror
  onState(state: MirrorState, before: MirrorState, reason: string | null): void
  onTrouble(kind: string, message: string): void
}

/** Signatures of both sides that somebody wants of one point in time. */
interface PointWanted {
  readonly ranges: readonly Range[]
  readonly resolve: (signatures: { ours: Buffer; theirs: Buffer }) => void
  readonly reject: (error: unknown) => void
}

/** Why a session's run is interrupted from this side. */
class Interrupted extends Error {
  override readonly name = 'Interrupted'
}

/** Passes over what changed meanwhile, before the last step of an initial copy and of a resync. */
const PASSES_MAX = 6
/** A pass that leaves less than this is the last. */
const LITTLE_UNITS_BYTES = 16 << 20
const TOO_SLOW =
  'the other side took too long for the last commit before the sides are equal, and clients waited'
/** For what is sent while clients wait. */
const NO_LIMIT = new RateLimit()

export class Primary implements ChangeWatcher {
  readonly #host: PrimaryHost
  readonly states: MirrorStates
  readonly counters = new Counters()
  readonly #notes: ChangeNotes
  readonly #progress = new Progress()
  readonly #limit: RateLimit
  readonly #saves: Saves
  readonly #forwarder: Forwarder
  readonly #laneUse: LaneUse
  #sender: Sender | undefined
  #remote: Remote | undefined
  #hello: RemoteHello | undefined
  #wireBytes = 0 // of earlier sessions
  #run: Promise<void> = Promise.resolve()
  #wake: (() => void) | undefined
  #interrupt: string | undefined
  #retryMs: number = LIMITS.mirrorRetryMsMin
  #patienceMs: number = LIMITS.mirrorLastStepMs // of clients, for the next last step; more after each that took longer
  #stageToken = ''
  #closed = false
  #suspended = 0 // those who want nothing to be done with the session for now
  #parked = true
  #parkWaiters: (() => void)[] = []
  #size: number // bytes of the volume
  #agreedSize: number | undefined // that the secondary had when it was last met
  #refusal: RemoteError | undefined // of a request that went to both sides

  #verification: Verification | undefined
  #points: PointWanted[] = []

  constructor(host: PrimaryHost) {
    this.#host = host
    const { record } = host.stored
    this.#notes = new ChangeNotes(host.book, host.stored)
    this.#size = host.volume.size
    this.states = new MirrorStates(record.paused ? 'paused' : 'connecting', (state, before, reason) => {
      host.onState(state, before, reason)
      this.#remote?.tell(state)
    })
    this.#limit = new RateLimit(record.rate ?? undefined)
    this.#saves = new Saves(host.volume.scratch())
    this.#laneUse = new LaneUse(host.volume)
    this.#forwarder = new Forwarder(host.volume, {
      changed: (offset, length) => this.#notes.changeRange(offset, length),
      refused: (reason) => this.#remoteRefused(reason),
    })
  }

  get bits(): CopyBits {
    return this.#notes.bits
  }

  get record(): MirrorRecord {
    return this.#host.stored.record
  }
  get connected(): boolean {
    return this.#remote !== undefined
  }
  get remote(): Remote | undefined {
    return this.#remote
  }
  get hello(): RemoteHello | undefined {
    return this.#hello
  }

  // ---- what the volume asks (ChangeWatcher)

  prepare(unit: number): Promise<void> | undefined {
    const copyUnit = this.#unitOf(unit)
    const wait = this.#sender?.hold(copyUnit)
    if (wait !== undefined) return wait
    // In step with the secondary nothing is lacking: the request itself travels.
    if (!this.#forwarder.following) this.#notes.change(copyUnit)
    return undefined
  }

  mayOpen(unit: number): boolean {
    if (this.forwards) return this.#laneUse.open
    const copyUnit = this.#unitOf(unit)
    return this.bits.isCurrent(copyUnit) && (this.#sender === undefined || !this.bits.isSending(copyUnit))
  }

  get forwards(): boolean {
    return this.#forwarder.following || this.#blocks
  }

  forward(upcall: Upcall, offset: number, length: number): Forwarding | undefined {
    return this.#forwarder.following || this.#blocks
      ? this.#forwarder.forward(upcall, offset, length)
      : undefined
  }

  failedHere({ offset, length }: Upcall): void {
    this.#notes.changeRange(offset, length)
    if (this.#forwarder.following)
      this.#remoteRefused('a request failed on this side: the sides may differ there')
  }

  flush(): Promise<void> | undefined {
    return this.#forwarder.following || this.#blocks ? this.#forwarder.flush() : undefined
  }

  needsIntent(offset: number, length: number): boolean {
    return this.#notes.needsIntent(offset, length) || this.#remote?.mayLose(offset, length) === true
  }

  async settle(): Promise<void> {
    // Where it fails the session ends, and what the secondary may have lost is noted.
    await this.#remote?.settle().catch((error: unknown) => {
      if (!(error instanceof RemoteError)) throw error
    })
    await this.#notes.settle()
  }

  /** What went in place until now is asked about from now on. */
  async #nowBlocks(before: boolean): Promise<void> {
    if (this.#blocks && !before) await this.#host.volume.quiesce(() => {})
  }

  /** Answers wait for the secondary also while it is away. */
  get #blocks(): boolean {
    const { mode, onLoss, initialized, paused } = this.record
    return mode === 'sync' && onLoss === 'block' && initialized && !paused && !this.#closed
  }

  // ---- sessions

  /** A session with the secondary; an earlier one is over. */
  attach(remote: Remote): void {
    const old = this.#remote
    if (old !== undefined) {
      // Here, not when it tells of its end: by then it is not the mirror's any more.
      this.#lost(old, new RemoteError('lost', 'another session takes its place'))
      old.close('another session takes its place')
    }
    const before = this.#run
    this.#remote = remote
    this.#interrupt = 'another session takes its place' // for the run of the one before; each begins without
    this.#retryMs = LIMITS.mirrorRetryMsMin
    const run = async (): Promise<void> => {
      await before
      if (this.#remote !== remote) return
      this.#parked = false
      await this.#session(remote)
    }
    this.#run = run()
    remote.ended.then((reason) => this.#lost(remote, reason))
  }

  /** Goes on with the session in another way (mode, pause, role): what is under way is broken off, and noted. */
  #again(reason: string): void {
    this.#interrupt = reason
    this.#sender?.stop(new Interrupted(reason))
    this.#wake?.()
  }

  async pause(): Promise<void> {
    await this.#save({ paused: true })
    await this.#halt('paused')
    this.#enter('paused')
    this.#forwarder.unblock()
  }

  async resume(): Promise<void> {
    const before = this.#blocks
    await this.#save({ paused: false })
    await this.#nowBlocks(before)
    if (this.states.state !== 'paused') return
    this.#enter(this.#idleState())
    this.#again('resumed')
  }

  async change(
    change: Partial<Pick<MirrorRecord, 'mode' | 'intervalMs' | 'onLoss' | 'rate'>>,
  ): Promise<void> {
    const { mode, onLoss } = this.record
    const before = this.#blocks
    await this.#save(change)
    await this.#nowBlocks(before)
    if (change.rate !== undefined) this.#limit.set(change.rate ?? undefined)
    if (!this.#blocks) this.#forwarder.unblock()
    if ((change.mode ?? mode) !== mode || (change.onLoss ?? onLoss) !== onLoss) {
      this.#stopFollowing()
      this.#again('the mirror was changed')
    } else {
      this.#wake?.()
    }
  }

  /** The other side does not take part, for the reason given. */
  refused(reason: string, split = false): void {
    if (this.#remote !== undefined) {
      this.#refusal = new RemoteError(split ? 'splitbrain' : 'refused', reason)
      this.#sender?.stop(this.#refusal)
      this.#wake?.()
    } else if (this.states.state !== 'paused') {
      this.#enter(split ? 'splitbrain' : this.#idleState(), reason)
    }
  }

  /** There is no session, and this is why. */
  unreachable(reason: string): void {
    const { state } = this.states
    if (this.#remote === undefined && (state === 'connecting' || state === 'degraded'))
      this.#enter(state, reason)
  }

  /** The secondary answered to it, and may have lost it since. */
  missed(offset: number, length: number): void {
    this.#notes.changeRange(offset, length)
  }

  /** Something was settled: goes on at once. */
  retry(): void {
    this.#retryMs = LIMITS.mirrorRetryMsMin
    if (this.states.state === 'splitbrain') this.#enter(this.#idleState())
    this.#again('another attempt was asked for')
  }

  /** The session's run does nothing from here on. */
  async stop(reason: string): Promise<void> {
    this.#suspended++
    await this.#halt(reason)
  }

  /** After `stop`, where nothing came of it. */
  proceed(reason: string): void {
    this.#suspended--
    this.#again(reason)
  }

  /** No session any more; changes are still noted, until the pool is closed. */
  async disconnect(reason: string): Promise<void> {
    // In this order: whoever waits for the secondary did not get what it was promised.
    this.#closed = true
    this.#forwarder.stop(this.record.onLoss === 'block')
    this.#forwarder.unblock(new StoreError('SHUTTING_DOWN', `the secondary does not have it: ${reason}`))
    this.#again(reason)
    this.#remote?.close(reason)
    await this.#run
    this.#notes.stop()
  }

  /** Whoever waits for the secondary fails: what it has written is about to be thrown away. While the run does nothing. */
  failBlocked(error: StoreError): void {
    this.#forwarder.unblock(error)
  }

  /** The end of the mirror: changes are noted no longer. @param error of those who wait for the secondary still; none: this side's copy will do */
  async close(reason: string, error?: StoreError): Promise<void> {
    this.#host.volume.unwatch(this)
    this.#closed = true
    this.#stopFollowing()
    this.#forwarder.unblock(error)
    this.#again(reason)
    this.#remote?.close(reason)
    await this.#run
    this.#notes.stop()
  }

  #lost(remote: Remote, reason: RemoteError): void {
    if (this.#remote !== remote) return
    this.#wireBytes += remote.wireBytes()
    this.#remote = undefined
    this.#hello = undefined
    this.#stopFollowing()
    this.#sender?.stop(reason)
    this.#wake?.()
    if (this.states.state !== 'paused' && this.states.state !== 'splitbrain' && !this.#closed) {
      this.#enter(this.#idleState(), reason.message)
    }
  }

  #idleState(): 'degraded' | 'connecting' {
    return this.record.initialized ? 'degraded' : 'connecting'
  }

  async #session(remote: Remote): Promise<void> {
    while (this.#remote === remote && !this.#closed) {
      this.#interrupt = undefined
      try {
        if (this.record.paused || this.#suspended > 0) await this.#rest()
        else await this.#work(remote)
      } catch (error) {
        if (error instanceof Interrupted) continue
        const reason = messageOf(error)
        this.#refusePoints(reason)
        if (error instanceof RemoteError) {
          if (error.fate === 'lost') {
            remote.close(reason) // where it is not over yet
            break
          }
          if (error.fate === 'splitbrain') this.#enter('splitbrain', reason)
          else this.#enter(this.#idleState(), reason)
        } else if (error instanceof UserError && error.code === 'NOT_FOUND') {
          // The mirror is being removed.
        } else if (error instanceof StoreError || error instanceof UserError) {
          this.#enter(this.#idleState(), reason)
          this.#host.onTrouble('mirror.failed', reason)
        } else {
          throw error
        }
        await this.#idle(this.states.state === 'splitbrain' ? undefined : this.#nextRetry())
      } finally {
        this.#stopFollowing()
        this.#breakCycle(true)
      }
    }
    this.#refusePoints('the session is over')
    this.#park()
  }

  #nextRetry(): number {
    const ms = this.#retryMs
    this.#retryMs = Math.min(2 * ms, LIMITS.mirrorRetryMsMax)
    return ms
  }

  /** Until somebody calls `#wake`, or so long. */
  async #idle(ms?: number): Promise<void> {
    if (
      this.#remote === undefined ||
      this.#closed ||
      this.#interrupt !== undefined ||
      this.#refusal !== undefined
    )
      return
    await new Promise<void>((resolve) => {
      const timer = ms === undefined ? undefined : setTimeout(resolve, ms)
      this.#wake = () => {
        clearTimeout(timer)
        resolve()
      }
    })
    this.#wake = undefined
  }

  #park(): void {
    this.#parked = true
    for (const resolve of this.#parkWaiters.splice(0)) resolve()
  }

  async #rest(): Promise<void> {
    this.#refusePoints(this.record.paused ? 'the mirror is paused' : 'the mirror is changed')
    this.#park()
    this.#refusal = undefined // nothing is asked for that could be refused; and `#idle` would not wait
    await this.#idle()
    this.#parked = false
  }

  /** Resolves when the session's run does nothing, until `#suspended` or `paused` ends. */
  async #halt(reason: string): Promise<void> {
    this.#stopFollowing()
    this.#again(reason)
    while (!this.#parked) await new Promise<void>((resolve) => this.#parkWaiters.push(resolve))
  }

  async sizeChanges(): Promise<void> {
    this.#suspended++
    await this.#halt('the volume gets another size')
    await this.#host.volume.lanes.closed() // what comes back from them lies in the old size
  }

  sizeChanged(): void {
    const { size } = this.#host.volume
    const before = this.#size
    const { unitCount } = this.bits
    this.#size = size
    if (size !== before) {
      this.#breakCycle(false)
      const units = Math.ceil(size / this.record.unitBytes)
      this.bits.resize(units)
      // As in MirrorBook.resize, unless the secondary had the size before: then it cut off the same, or follows.
      if (before !== this.#agreedSize || size < before)
        this.bits.changeRange(Math.min(unitCount, units) - 1, units)
    }
    this.#suspended--
    this.#again('the volume has another size')
  }

  // ---- one session's work

  async #work(remote: Remote): Promise<void> {
    this.#enter('negotiating')
    const { volume, book } = this.#host
    const hello = await remote.hello(this.#introduce())
    this.#hello = hello
    this.#throwIfInterrupted()
    this.#agreedSize = hello.size
    const verdict = judge(this.record, this.#generation(), hello)
    if (verdict.kind === 'splitbrain') throw new RemoteError('splitbrain', verdict.reason)
    if (this.record.kind === 'link' && hello.size > volume.size)
      throw new RemoteError('splitbrain', keepsItsEnd(hello.size))
    if (hello.stage !== this.#stageToken) this.#newStage(hello.stage)
    if (verdict.kind === 'compare') {
      if (this.record.clean) this.#host.onTrouble('mirror.compare', verdict.reason)
      this.#enter('comparing', verdict.reason)
      await this.#save({ clean: false })
      const differing = await compareSides({
        remote,
        init: verdict.init,
        unitBytes: this.record.unitBytes,
        size: volume.size,
        blank: hello.blank,
        isHole: (offset, length) => volume.isHole(offset, length),
        nextRealized: (offset) => volume.nextFormatted(offset),
        read: (offset, target) => volume.read(offset, target),
        onProgress: (done, total) => this.#progress.show('comparing', done, total),
        onCompared: (regions) => {
          this.counters.signatures += regions
        },
        check: () => this.#throwIfInterrupted(),
      })
      this.bits.changeAll(differing)
    } else {
      for await (const { first, bytes } of remote.bitmap('differs')) this.#differs(first, bytes)
    }
    this.#throwIfInterrupted()
    // With the bits, the base that they count from: what the secondary has.
    const base = hello.generation?.current ?? this.#generation().current
    const cycle = Math.max(this.record.cycle, hello.cycle) // settled, where it was ahead
    await book.save(
      this.record.id,
      { clean: true, base, cycle, initialized: hello.consistent },
      { bits: this.bits.union() },
    )
    this.#throwIfInterrupted()
    this.#notes.noteBehind()
    if (!this.record.initialized) await this.#copy(remote)
    if (this.record.mode === 'sync') await this.#sync(remote)
    else await this.#async(remote)
  }

  #introduce(): PrimaryHello {
    const { base, cycle, initialized, mode, intervalMs, onLoss, unitBytes } = this.record
    const { size } = this.#host.volume
    const changed = this.#notes.behind
    const settings = { mode, intervalMs, onLoss, unitBytes }
    return { generation: this.#generation(), base, cycle, size, initialized, changed, ...settings }
  }

  /** The secondary has lost what was staged. */
  #newStage(token: string): void {
    this.bits.break(false)
    this.#stageToken = token
  }

  #differs(first: number, bytes: Buffer): void {
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      if (((bytes[bit >> 3] ?? 0) >> (bit & 7)) % 2 === 1 && first + bit < this.bits.unitCount) {
        this.bits.change(first + bit)
      }
    }
  }

  /** The initial copy: passes without a point in time while there is much to send, then a cycle, which is one. */
  async #copy(remote: Remote): Promise<void> {
    this.#enter('copying')
    const isMuch = (): boolean => this.bits.currentCount * this.record.unitBytes > LITTLE_UNITS_BYTES
    for (let pass = 0; pass < PASSES_MAX && isMuch(); pass++) {
      await this.#close(false)
      this.#progress.show('copying', 0, this.#notes.open)
      await this.#sender?.run(LIMITS.mirrorCommitBytes, () => this.#commit(remote, { consistent: false }))
      this.#sender = undefined
      // What is staged by now goes with the cycle's commit, where that comes next.
      if (isMuch()) await this.#commit(remote, { consistent: false })
    }
    const before = this.#blocks
    await this.#cycle(remote, 'copying')
    await this.#nowBlocks(before)
    await this.#save({ initialized: true })
    this.#throwIfInterrupted()
  }

  async #async(remote: Remote): Promise<void> {
    this.#enter('cycling')
    for (;;) {
      const due = this.#notes.closedAt + this.record.intervalMs
      const now = performance.now()
      if (now < due && this.#points.length === 0) {
        await this.#idle(due - now)
        this.#throwIfInterrupted()
        continue
      }
      if (this.bits.total === 0 && this.#points.length === 0) {
        this.#notes.nothingToSend()
      } else {
        await this.#cycle(remote, 'cycle')
      }
    }
  }

  async #sync(remote: Remote): Promise<void> {
    if (this.states.state === 'negotiating') this.#enter('copying')
    try {
      for (let pass = 0; ; pass++) {
        if (pass < PASSES_MAX && this.#notes.behind > LIMITS.mirrorLastStepBytes) {
          await this.#cycle(remote, 'copying')
          continue
        }
        await this.#laneUse.prepare(remote)
        const patience = this.#patienceMs
        this.#patienceMs = Math.min(2 * patience, LIMITS.mirrorLastStepMsMax)
        if (await this.#lastStep(remote, patience)) break
      }
    } finally {
      this.#laneUse.forget()
    }
    this.#progress.end()
    this.#patienceMs = LIMITS.mirrorLastStepMs
    this.#throwIfInterrupted()
    this.#enter('insync')
    while (this.#forwarder.following) {
      for (const point of this.#points.splice(0)) await this.#answerPoint(remote, point)
      if (this.#points.length === 0) await this.#idle()
      this.#throwIfInterrupted()
    }
    throw new Interrupted('the session is over')
  }

  /**
   * Clients wait while what is left is sent and committed, each for `patienceMs` at most, and from then on every request goes to both.
   * @returns false where the sending took too long
   */
  async #lastStep(remote: Remote, patienceMs: number): Promise<boolean> {
    let late = false
    await this.#host.volume.quiesce(async () => {
      this.#throwIfInterrupted()
      this.#notes.close()
      const sender = this.#newSender(remote, true, NO_LIMIT)
      let timer = setTimeout(() => {
        late = true
        sender.stop(new Interrupted('clients waited long enough'))
      }, patienceMs)
      try {
        await sender.run()
        clearTimeout(timer)
        late = false
        // What is asked for cannot be taken back: where its answer takes too long the session ends.
        timer = setTimeout(() => remote.close(TOO_SLOW), patienceMs)
        await this.#commit(remote, { consistent: true, follow: true })
        assert(this.bits.total === 0, 'both sides are equal')
        this.#forwarder.follow(remote)
        this.#laneUse.begin(() => this.#laneLost(remote))
      } catch (error) {
        if (!late) throw error
        this.#breakCycle(true)
      } finally {
        clearTimeout(timer)
        this.#sender = undefined
      }
    })
    return !late
  }

  /** One cycle: a point in time of this volume becomes the secondary's content. */
  async #cycle(remote: Remote, what: 'copying' | 'cycle'): Promise<void> {
    const points = this.#points.splice(0)
    try {
      const ours = await this.#close(true, points)
      this.#progress.show(what, 0, this.#notes.open)
      await this.#sender?.run()
      await this.#commit(remote, { consistent: true })
      this.#sender = undefined
      this.#progress.end()
      for (const [index, { ranges, resolve }] of points.entries()) {
        const own = ours[index]
        assert(own !== undefined, 'signatures of a point in time')
        resolve({ ours: own, theirs: await remote.signatures(ranges) })
      }
    } catch (error) {
      for (const { reject } of points) reject(error)
      throw error
    }
  }

  /** @returns this side's signatures of each of `points`, as of the close */
  async #close(strict: boolean, points: readonly PointWanted[] = []): Promise<Buffer[]> {
    this.#throwIfInterrupted()
    const remote = this.#remote
    if (remote === undefined) throw new Interrupted('the session is over')
    const { volume } = this.#host
    const signatures: Buffer[] = []
    await volume.quiesce(async () => {
      for (const { ranges } of points) {
        signatures.push(await signaturesOf(ranges, (offset, target) => volume.read(offset, target)))
      }
      this.#throwIfInterrupted()
      this.#notes.close()
      this.#newSender(remote, strict)
    })
    this.#throwIfInterrupted()
    return signatures
  }

  #newSender(remote: Remote, strict: boolean, limit = this.#limit): Sender {
    const { volume } = this.#host
    this.#sender = new Sender(
      {
        bits: this.bits,
        unitBytes: this.record.unitBytes,
        size: () => volume.size,
        isHole: (offset, length) => volume.isHole(offset, length),
        read: (offset, target) => volume.read(offset, target),
        remote,
        limit,
        saves: this.#saves,
        sent: (bytes, units, holes) => {
          this.counters.sentBytes += bytes
          this.counters.units += units
          this.counters.holes += holes
          this.#progress.moved(units * this.record.unitBytes)
        },
        saved: () => {
          this.counters.saves++
        },
      },
      strict,
    )
    return this.#sender
  }

  async #commit(
    remote: Remote,
    { consistent, follow = false }: { consistent: boolean; follow?: boolean },
  ): Promise<void> {
    const cycle = this.record.cycle + 1
    await remote.commit(this.#commitInfo(cycle, consistent, follow))
    this.#retryMs = LIMITS.mirrorRetryMsMin
    this.counters.cycles++
    if (consistent) {
      if (this.#hello !== undefined) {
        this.#hello = { ...this.#hello, generation: this.#generation(), consistent, changed: 0, cycle }
      }
    }
    const cleared = this.#notes.committed(consistent)
    const agreed = { initialized: true, base: this.#generation().current }
    // Both are waited for at once: where the pool has failed, both reject.
    await Promise.all([this.#save({ cycle, ...(consistent ? agreed : {}) }), cleared])
  }

  #commitInfo(cycle: number, consistent: boolean, follow: boolean): CommitInfo {
    return { cycle, consistent, follow, generation: this.#generation(), size: this.#host.volume.size }
  }

  /**
   * The secondary gets the rest and is told that it may be promoted; then `store` makes this side the secondary. No request is
   * under way meanwhile, and none is done after it.
   */
  async handOver(store: () => Promise<void>): Promise<void> {
    const remote = this.#remote
    const { state } = this.states
    if (remote === undefined || (state !== 'insync' && state !== 'cycling')) {
      throw new UserError(
        'BUSY',
        `the mirror is ${state}: it has to be insync or cycling for a planned change of roles`,
      )
    }
    this.#suspended++
    try {
      await this.#halt('a change of roles')
      await this.#handOver(remote, store)
    } catch (error) {
      if (!(error instanceof RemoteError || error instanceof Interrupted)) throw error
      const text = `the secondary was lost before it had everything: ${error.message}; this side is still primary`
      throw new UserError('FAILED', text, { cause: error })
    } finally {
      this.#suspended--
      this.#again('a change of roles')
    }
  }

  async #handOver(remote: Remote, store: () => Promise<void>): Promise<void> {
    const hello = await remote.hello(this.#introduce())
    if (hello.stage !== this.#stageToken) this.#newStage(hello.stage)
    await this.#host.volume.quiesce(async () => {
      this.#notes.close()
      await this.#newSender(remote, true, NO_LIMIT).run()
      this.#sender = undefined
      const cycle = this.record.cycle + 1
      await remote.handOver(this.#commitInfo(cycle, true, false))
      this.bits.committed()
      assert(this.bits.total === 0, 'both sides are equal')
      await this.#save({ cycle, base: this.#generation().current })
      await store()
    })
  }

  // ---- noting

  #unitOf(formatUnit: number): number {
    return Math.floor((formatUnit * this.#host.volume.unitBytes) / this.record.unitBytes)
  }

  #breakCycle(keepStaged: boolean): void {
    this.#sender?.forget()
    this.#sender = undefined
    this.#progress.end()
    this.bits.break(keepStaged)
    if (!keepStaged) this.#stageToken = ''
  }

  /** In the turn in which it is noticed, before what was on its way comes back: from here on that is noted. */
  #laneLost(remote: Remote): void {
    this.#lost(remote, new RemoteError('lost', 'a connection that carries writes is lost'))
    remote.close('a connection that carries writes is lost')
  }

  #stopFollowing(): void {
    if (!this.#forwarder.following) return
    this.#forwarder.stop(this.#blocks)
    this.#laneUse.end()
    this.counters.forwarded = this.forwardedCount()
  }

  #remoteRefused(reason: string): void {
    this.#host.onTrouble('mirror.refused', reason)
    this.#stopFollowing()
    this.#refusal = new RemoteError('refused', reason)
    this.#wake?.()
  }

  // ---- telling

  verification(): VerifyResult | null {
    return this.#verification?.result() ?? null
  }

  /** Begins a comparison with the secondary, beside everything else. @throws UserError BUSY */
  verify(repair: boolean): void {
    const { volume } = this.#host
    const remote = this.#remote
    const { state } = this.states
    if (remote === undefined || (state !== 'insync' && state !== 'cycling')) {
      throw new UserError('BUSY', `the mirror is ${state}: a comparison wants it insync or cycling`)
    }
    if (this.#verification?.running === true) throw new UserError('BUSY', 'a comparison is running already')
    this.#verification = new Verification(
      {
        unitBytes: this.record.unitBytes,
        size: () => volume.size,
        nextRealized: (offset) => volume.nextFormatted(offset),
        realizedThere: () => remote.bitmap('realized'),
        read: (offset, target) => volume.read(offset, target),
        signaturesThere: (ranges) => remote.signatures(ranges),
        atPoint: (ranges) => this.#atPoint(remote, ranges),
        repair: (differences) => this.#repair(differences),
        progress: (done, total) => this.#progress.verified(done, total),
        compared: (regions) => {
          this.counters.signatures += regions
        },
      },
      repair,
    )
    this.#verification.run().then(() => {
      this.#progress.endVerifying()
      const { differing = 0, failure = null } = this.#verification?.result() ?? {}
      if (failure !== null) this.#host.onTrouble('mirror.verify', `the comparison did not end: ${failure}`)
      else if (differing > 0)
        this.#host.onTrouble('mirror.differs', `${differing} bytes differ between the sides`)
    })
  }

  /** Signatures of both sides while they are at one point in time: the session's run computes them, when it comes to one. */
  #atPoint(remote: Remote, ranges: readonly Range[]): Promise<{ ours: Buffer; theirs: Buffer }> {
    return new Promise((resolve, reject) => {
      if (this.#remote !== remote) throw new Interrupted('the session is over')
      this.#points.push({ ranges, resolve, reject })
      this.#wake?.()
    })
  }

  /** While every request goes to both sides; requests wait while this side's are computed. */
  async #answerPoint(remote: Remote, point: PointWanted): Promise<void> {
    const { volume } = this.#host
    const read = (offset: number, target: Buffer): Promise<void> => volume.read(offset, target)
    try {
      await volume.quiesce(async () => {
        // The sides may have gone on alone while this waited for the requests: the next point in time will do.
        if (!this.#forwarder.following) {
          this.#points.push(point)
          return
        }
        await remote.fence()
        const { ranges } = point
        const [ours, theirs] = await Promise.all([signaturesOf(ranges, read), remote.signatures(ranges)])
        point.resolve({ ours, theirs })
      })
    } catch (error) {
      point.reject(error)
    }
  }

  #refusePoints(reason: string): void {
    for (const { reject } of this.#points.splice(0)) reject(new Interrupted(reason))
  }

  /** Sent again, as if they had changed. */
  #repair(differences: readonly Range[]): void {
    for (const { offset, length } of differences) this.#notes.changeRange(offset, length)
    if (!this.#forwarder.following) return
    this.#stopFollowing()
    this.#again('differences are repaired')
  }

  lag(): MirrorLag {
    return this.#notes.lag(this.#host.volume.size, this.#forwarder.following)
  }

  progress(): MirrorProgress | null {
    return this.#progress.now(this.#notes.open)
  }

  wireBytes(): number {
    return this.#wireBytes + (this.#remote?.wireBytes() ?? 0) + this.#laneUse.wireBytes()
  }

  laneWrites(): number {
    return this.#laneUse.writes()
  }

  forwardedCount(): number {
    return this.#forwarder.count + this.#laneUse.writes()
  }

  #generation(): GenerationRecord {
    const { generation } = this.#host.volume.record
    assert(generation !== undefined, 'a mirrored volume has a generation')
    return generation
  }

  #enter(state: Parameters<MirrorStates['enter']>[0], reason: string | null = null): void {
    this.states.enter(state, reason)
  }

  #throwIfInterrupted(): void {
    const refusal = this.#refusal
    this.#refusal = undefined
    if (refusal !== undefined) throw refusal
    if (this.#interrupt !== undefined) throw new Interrupted(this.#interrupt)
    if (this.#remote === undefined) throw new Interrupted('the session is over')
  }

  #save(change: Partial<MirrorRecord>): Promise<void> {
    return this.#host.book.save(this.record.id, change)
  }
}

/** Where nothing was compared yet, the verdict does not come of generations; the other side's does. */
function keepsItsEnd(size: number): string {
  return `the peer has ${formatSize(size)}, of a generation that this side does not know: settle it with \`mirror resolve --discard local|remote\``
}
