import { assert } from '../base/assert.ts'

/** A run of slots, and whose they were: a thin volume's become free, a thick one's reservation ends. */
export interface FreedRun {
  readonly slot: number
  readonly count: number
  readonly owner: 'thin' | 'thick'
}

const ROOM_MIN = 64

/**
 * A queue of freed runs, with the sequence since which they are: 17 bytes each, because a cycle of a mirror or the end of a large volume
 * may free millions that lie scattered.
 */
export class FreedRuns {
  #pairs = new Uint32Array(2 * ROOM_MIN) // count, slot: sorted as one number of 64 bits (little endian), by slot
  #thick = new Uint8Array(ROOM_MIN)
  #sequences = new Float64Array(ROOM_MIN) // never falling
  #head = 0
  #tail = 0

  get length(): number {
    return this.#tail - this.#head
  }

  /** Runs of one sequence, not below any before. @returns how many slots they are */
  add(runs: Iterable<FreedRun>, sequence: number): number {
    assert(this.length === 0 || sequence >= (this.#sequences[this.#tail - 1] ?? 0), 'sequence of freed runs')
    let slots = 0
    for (const { slot, count, owner } of runs) {
      if (this.#tail === this.#sequences.length) this.#makeRoom()
      const at = this.#tail++
      this.#pairs[2 * at] = count
      this.#pairs[2 * at + 1] = slot
      this.#thick[at] = owner === 'thick' ? 1 : 0
      this.#sequences[at] = sequence
      slots += count
    }
    return slots
  }

  /** How many of the first ones are of `sequence` at most. */
  until(sequence: number): number {
    let low = this.#head
    let high = this.#tail
    while (low < high) {
      const middle = Math.floor((low + high) / 2)
      if ((this.#sequences[middle] ?? 0) <= sequence) low = middle + 1
      else high = middle
    }
    return low - this.#head
  }

  /** Takes the first ones out. @returns neighbours as one, so that a large trim is given back in few calls */
  take(count: number): Iterable<FreedRun> {
    assert(count <= this.length, 'freed runs to take')
    const end = this.#head + count
    let thick = 0
    for (let at = this.#head; at < end; at++) thick += this.#thick[at] ?? 0
    const parts: Record<FreedRun['owner'], Uint32Array> = {
      thin: new Uint32Array(2 * (count - thick)),
      thick: new Uint32Array(2 * thick),
    }
    const filled = { thin: 0, thick: 0 }
    for (let at = this.#head; at < end; at++) {
      const owner = this.#thick[at] === 1 ? 'thick' : 'thin'
      parts[owner][filled[owner]++] = this.#pairs[2 * at] ?? 0
      parts[owner][filled[owner]++] = this.#pairs[2 * at + 1] ?? 0
    }
    this.#head = end
    if (this.#head === this.#tail) this.#resize(ROOM_MIN)
    return joined(parts)
  }

  #makeRoom(): void {
    this.#resize(Math.max(ROOM_MIN, 2 * this.length))
  }

  #resize(room: number): void {
    const { length } = this
    const pairs = new Uint32Array(2 * room)
    const thick = new Uint8Array(room)
    const sequences = new Float64Array(room)
    pairs.set(this.#pairs.subarray(2 * this.#head, 2 * this.#tail))
    thick.set(this.#thick.subarray(this.#head, this.#tail))
    sequences.set(this.#sequences.subarray(this.#head, this.#tail))
    this.#pairs = pairs
    this.#thick = thick
    this.#sequences = sequences
    this.#head = 0
    this.#tail = length
  }
}

function* joined(parts: Readonly<Record<FreedRun['owner'], Uint32Array>>): Generator<FreedRun> {
  for (const owner of ['thin', 'thick'] as const) {
    const pairs = parts[owner]
    new BigUint64Array(pairs.buffer).sort()
    for (let at = 0; at < pairs.length; ) {
      const slot = pairs[at + 1] ?? 0
      let count = 0
      for (; at < pairs.length && pairs[at + 1] === slot + count; at += 2) count += pairs[at] ?? 0
      yield { slot, count, owner }
    }
  }
}
