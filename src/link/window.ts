/**
 * The two ends of a window: how many bytes may be on their way before the other side has said that it has them. A connection has one for the
 * frames that were received, a channel one for the messages that were consumed.
 *
 * Totals are counted whole here and travel modulo 2^32; windows are far smaller than that, so a total is told from
 * its remainder. Acknowledgements are cumulative: one that is lost or merged with the next changes nothing.
 */
import { assert } from '../base/assert.ts'
import { LinkError } from './errors.ts'

const MODULUS = 2 ** 32

export class SendWindow {
  #size = 0
  #sent = 0
  #acknowledged = 0

  constructor(size: number) {
    this.resize(size)
  }

  get size(): number {
    return this.#size
  }

  resize(size: number): void {
    assert(size > 0 && size < MODULUS / 2, 'window size')
    this.#size = size
  }

  /** Bytes on their way. */
  get outstanding(): number {
    return this.#sent - this.#acknowledged
  }

  get sent(): number {
    return this.#sent
  }

  /** Whether `length` bytes may go, leaving `reserve` to others. What is larger than the window may go alone. */
  hasRoom(length: number, reserve = 0): boolean {
    const outstanding = this.#sent - this.#acknowledged
    return outstanding === 0 || outstanding + length <= this.#size - reserve
  }

  add(length: number): void {
    this.#sent += length
  }

  /** @param total modulo 2^32 @returns whether anything was new @throws LinkError BAD_WINDOW for more than was sent */
  acknowledge(total: number): boolean {
    const fresh = (total - (this.#acknowledged % MODULUS) + MODULUS) % MODULUS
    if (fresh > this.outstanding) {
      throw new LinkError('BAD_WINDOW', `${fresh} bytes acknowledged, ${this.outstanding} are on their way`)
    }
    this.#acknowledged += fresh
    return fresh > 0
  }
}

export class ReceiveWindow {
  readonly size: number
  #received = 0
  #done = 0 // may be told to the sender
  #told = 0

  constructor(size: number) {
    assert(size > 0 && size < MODULUS / 2, 'window size')
    this.size = size
  }

  get received(): number {
    return this.#received
  }

  /** Bytes received and not done with. */
  get pending(): number {
    return this.#received - this.#done
  }

  receive(length: number): void {
    this.#received += length
  }

  /** Called before `receive` where what came is kept. @throws LinkError BAD_WINDOW where the sender went past the window */
  admit(length: number): void {
    const open = this.#received - this.#told
    if (open !== 0 && open + length > this.size) {
      throw new LinkError('BAD_WINDOW', `${open + length} bytes sent into a window of ${this.size}`)
    }
  }

  finish(length: number): void {
    this.#done += length
    assert(this.#done <= this.#received, 'no more is done with than came')
  }

  /** Whether telling the sender is worth a frame: a quarter of the window is done with. */
  get isDue(): boolean {
    return this.#done - this.#told >= this.size / 4
  }

  get done(): number {
    return this.#done
  }

  /** The total to tell, modulo 2^32. It counts as told. */
  tell(): number {
    this.#told = this.#done
    return this.#done % MODULUS
  }
}
