import { assert } from '../base/assert.ts'
import { StoreError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import type { RateLimit, Taking } from '../link/rate-limit.ts'
import type { CopyBits } from './copy-bits.ts'
import { type Remote, RemoteError } from './remote.ts'
import type { Saved, Saves } from './saves.ts'

/**
 * Sends the units of one closed cycle into the secondary's stage.
 *
 * Concurrency rule: a unit is captured (read, or known to be a hole) before anything of it changes. Whoever is about to change one
 * calls `hold` first, and waits for what it returns; the unit is then read at once, ahead of the others. A cycle that need not be a
 * point in time (`strict` false: the secondary is not consistent yet) postpones such a unit to the next one instead: nobody waits.
 */
export interface SenderHost {
  readonly bits: CopyBits
  readonly unitBytes: number
  size(): number // bytes of the volume
  isHole(offset: number, length: number): boolean
  /** @throws StoreError MEMBER_IO */
  read(offset: number, target: Buffer): Promise<void>
  readonly remote: Remote
  readonly limit: RateLimit
  readonly saves: Saves
  sent(bytes: number, units: number, holes: number): void
  saved(): void
}

interface SavedUnit {
  readonly unit: number
  readonly saved: Saved | undefined // undefined: a hole
}

/** Bytes of one read and one message where units are small; holes are only named. */
const RUN_BYTES = LIMITS.mirrorPieceBytes
/** Beside the bytes, for units that are small or holes: a channel takes so many requests at a time. */
const MESSAGES_MAX = 512

assert(MESSAGES_MAX < LIMITS.linkSendsWaitingMax)

export class Sender {
  readonly #host: SenderHost
  readonly #strict: boolean
  readonly #reading = new Map<number, Promise<void>>()
  readonly #saved: SavedUnit[] = []
  /** For runs, used again and again: garbage of this size would cost more than the copying. */
  readonly #buffers: Buffer[] = []
  #saving = 0
  #lastSave: Promise<void> | undefined
  #cursor = 0
  #inFlight = 0 // bytes, each message at least one
  #messages = 0
  #failure: Error | undefined
  #wake: (() => void) | undefined
  readonly #turns = new Set<Taking>() // that are waited for

  constructor(host: SenderHost, strict: boolean) {
    this.#host = host
    this.#strict = strict
  }

  /** The unit is about to change. @returns what to wait for first */
  hold(unit: number): Promise<void> | undefined {
    const reading = this.#strict ? this.#reading.get(unit) : undefined
    if (reading !== undefined) return reading
    const { bits } = this.#host
    if (this.#failure !== undefined || !bits.isSending(unit)) return undefined
    if (!this.#strict) {
      bits.postpone(unit)
      return undefined
    }
    const { offset, length } = this.#range(unit, 1)
    const hole = this.#host.isHole(offset, length)
    // As many as may be in memory are being read: whoever waits asks again.
    if (!hole && this.#saving * this.#host.unitBytes >= LIMITS.mirrorSavedMax) return this.#lastSave
    bits.capture(unit)
    if (hole) {
      // `run` sends it when there is room.
      this.#saved.push({ unit, saved: undefined })
      this.#wake?.()
      return undefined
    }
    const saving = this.#save(unit, offset, length)
    this.#lastSave = saving
    this.#reading.set(unit, saving)
    return saving
  }

  /**
   * Resolves when everything that was closed is staged.
   * @param pause called now and then while nothing is under way; for commits in between
   * @throws RemoteError, StoreError; what was not staged is still in `bits`
   */
  async run(
    pauseAfterBytes = Number.POSITIVE_INFINITY,
    pause: () => Promise<void> = async () => {},
  ): Promise<void> {
    const { bits } = this.#host
    let since = 0
    let last = performance.now()
    try {
      for (;;) {
        this.#throwIfFailed()
        const due =
          since >= pauseAfterBytes || (since > 0 && performance.now() - last > LIMITS.mirrorCommitMs)
        if (pauseAfterBytes !== Number.POSITIVE_INFINITY && due) {
          while (this.#messages > 0) await this.#progress()
          this.#throwIfFailed()
          await pause()
          since = 0
          last = performance.now()
        }
        if (this.#inFlight >= LIMITS.mirrorInFlightMax || this.#messages >= MESSAGES_MAX) {
          await this.#progress()
          continue
        }
        const next = this.#saved.shift()
        if (next !== undefined) {
          since += this.#sendSaved(next)
          continue
        }
        this.#cursor = bits.nextSending(this.#cursor)
        if (this.#cursor < bits.unitCount) {
          since += this.#sendRun(this.#cursor)
        } else if (this.#messages > 0 || this.#saving > 0) {
          await this.#progress()
        } else if (bits.sendingCount === 0) {
          break
        } else {
          this.#cursor = 0
        }
      }
    } catch (error) {
      this.stop(error instanceof Error ? error : new Error(String(error)))
      // A message that is still under way could overtake what the next cycle sends of the same unit.
      while (this.#messages > 0 || this.#saving > 0) await this.#progress()
      throw error
    } finally {
      for (const { saved } of this.#saved.splice(0)) saved?.forget()
    }
    assert(bits.openCount === 0, 'a cycle was sent whole')
  }

  /** Ends it: `run` throws. Who waits in `hold` goes on. */
  stop(reason: Error): void {
    this.#failure ??= reason
    // What is not sent must not use up the rate of what comes after it.
    for (const turn of this.#turns) turn.giveUp()
    this.#wake?.()
  }

  /** It was stopped: what it had saved is needed no more. */
  forget(): void {
    this.#failure ??= new Error('the cycle is broken off')
    for (const { saved } of this.#saved.splice(0)) saved?.forget()
  }

  // ---- what is due

  /** @returns bytes */
  #sendRun(unit: number): number {
    const { bits, remote } = this.#host
    const hole = this.#isHole(unit)
    const most = hole ? LIMITS.mirrorHoleUnitsMax : Math.max(1, Math.floor(RUN_BYTES / this.#host.unitBytes))
    let units = 1
    while (units < most && unit + units < bits.unitCount && bits.isSending(unit + units)) {
      if (this.#isHole(unit + units) !== hole) break
      units++
    }
    const { offset, length } = this.#range(unit, units)
    for (let at = unit; at < unit + units; at++) bits.capture(at)
    this.#cursor = unit + units
    if (hole) {
      this.#post(remote.hole(offset, length), unit, units, 0)
      return 0
    }
    const buffer = this.#buffers.pop() ?? Buffer.allocUnsafeSlow(Math.max(RUN_BYTES, this.#host.unitBytes))
    const content = buffer.subarray(0, length)
    const read = this.#host.read(offset, content)
    if (this.#strict) {
      // Whoever waits for it goes on also where it fails: the cycle ends then.
      const done = read.catch(() => {})
      for (let at = unit; at < unit + units; at++) this.#reading.set(at, done)
    }
    const put = async (): Promise<void> => {
      try {
        await read
      } finally {
        for (let at = unit; this.#strict && at < unit + units; at++) this.#reading.delete(at)
      }
      await this.#put(offset, content)
      // Answered, so the link does not look at it any more.
      this.#buffers.push(buffer)
    }
    this.#post(put(), unit, units, length)
    return length
  }

  #sendSaved({ unit, saved }: SavedUnit): number {
    const { offset, length } = this.#range(unit, 1)
    if (saved === undefined) {
      this.#post(this.#host.remote.hole(offset, length), unit, 1, 0)
      return 0
    }
    const put = async (): Promise<void> => this.#put(offset, await saved.take())
    this.#post(put(), unit, 1, length)
    return length
  }

  async #put(offset: number, content: Buffer): Promise<void> {
    const turn = this.#host.limit.take(content.length)
    this.#turns.add(turn)
    await turn.granted
    this.#turns.delete(turn)
    this.#throwIfFailed()
    await this.#host.remote.put(offset, content)
  }

  /** Never rejects: where it fails the cycle ends, and the change goes on. */
  async #save(unit: number, offset: number, length: number): Promise<void> {
    this.#saving++
    try {
      const content = Buffer.allocUnsafe(length)
      await this.#host.read(offset, content)
      if (this.#isStopped) return
      const saved = await this.#host.saves.keep(content)
      if (this.#isStopped) saved.forget()
      else this.#saved.push({ unit, saved })
      this.#host.saved()
    } catch (error) {
      if (!(error instanceof StoreError)) throw error
      this.stop(error)
    } finally {
      this.#saving--
      this.#reading.delete(unit)
      this.#wake?.()
    }
  }

  // ---- what is under way

  #post(message: Promise<void>, unit: number, units: number, bytes: number): void {
    const { bits } = this.#host
    const weight = Math.max(1, bytes)
    this.#inFlight += weight
    this.#messages++
    message.then(
      () => {
        this.#inFlight -= weight
        this.#messages--
        if (this.#failure === undefined) {
          for (let at = unit; at < unit + units; at++) bits.acknowledge(at)
          this.#host.sent(bytes, bytes > 0 ? units : 0, bytes > 0 ? 0 : units)
        }
        this.#wake?.()
      },
      (error: unknown) => {
        this.#inFlight -= weight
        this.#messages--
        this.stop(error instanceof Error ? error : new RemoteError('lost', String(error)))
      },
    )
  }

  async #progress(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#wake = resolve
    })
    this.#wake = undefined
  }

  get #isStopped(): boolean {
    return this.#failure !== undefined
  }

  #throwIfFailed(): void {
    if (this.#failure !== undefined) throw this.#failure
  }

  #isHole(unit: number): boolean {
    const { offset, length } = this.#range(unit, 1)
    return this.#host.isHole(offset, length)
  }

  #range(unit: number, units: number): { offset: number; length: number } {
    const offset = unit * this.#host.unitBytes
    return { offset, length: Math.min(units * this.#host.unitBytes, this.#host.size() - offset) }
  }
}
