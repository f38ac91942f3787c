import { describe, expect, it } from 'vitest'
import { StoreError } from '../../src/base/errors.ts'
import { Saves } from '../../src/mirror/saves.ts'
import { Random } from '../support/random.ts'

/** Slots in memory; as many as there are. */
function slots(count: number) {
  const stripeSize = 4096
  const content = new Map<number, Buffer>()
  const free = Array.from({ length: count }, (_, index) => index + 1)
  return {
    free,
    stripeSize,
    allocate: async (wanted: number) => {
      if (free.length < wanted) throw new StoreError('NO_SPACE', 'full')
      return free.splice(0, wanted)
    },
    write: async (slot: number, source: Buffer) => {
      content.set(slot, Buffer.from(source))
    },
    read: async (slot: number, target: Buffer) => {
      content.get(slot)?.copy(target)
    },
    give: (back: readonly number[]) => free.push(...back),
  }
}

const host = (store: ReturnType<typeof slots>) => ({
  ...store,
  free: (back: readonly number[]) => void store.give(back),
})

describe('content that is saved before it is overwritten', () => {
  it('stays in memory up to the bound, and goes to free slots beyond it', async () => {
    const random = new Random(1)
    const store = slots(100)
    const saves = new Saves(host(store), 3 * 8192)
    const contents = Array.from({ length: 8 }, () => random.bytes(8192))
    const kept = []
    for (const content of contents) kept.push(await saves.keep(Buffer.from(content)))
    expect(store.free.length).toBe(100 - 5 * 2)
    for (const [index, saved] of kept.entries())
      expect((await saved.take()).equals(contents[index] ?? Buffer.alloc(0))).toBe(true)
    expect(store.free.length).toBe(100)
    // The memory is free again, too.
    for (let n = 0; n < 3; n++) (await saves.keep(Buffer.alloc(8192))).forget()
    await saves.keep(Buffer.alloc(3 * 8192))
    expect(store.free.length).toBe(100)
  })

  it('gives slots back where they are forgotten, or cannot be written', async () => {
    const store = slots(4)
    const saves = new Saves(host(store), 0)
    const saved = await saves.keep(Buffer.alloc(4096 * 3 + 512))
    expect(store.free.length).toBe(0)
    await expect(saves.keep(Buffer.alloc(4096))).rejects.toThrow('full')
    saved.forget()
    saved.forget()
    expect(store.free.length).toBe(4)
    const failing = new Saves(
      { ...host(store), write: () => Promise.reject(new StoreError('MEMBER_IO', 'no')) },
      0,
    )
    await expect(failing.keep(Buffer.alloc(8192))).rejects.toThrow('no')
    expect(store.free.length).toBe(4)
  })

  it('reads back a last piece that is no whole stripe', async () => {
    const saves = new Saves(host(slots(4)), 0)
    const content = new Random(5).bytes(4096 + 512)
    const saved = await saves.keep(Buffer.from(content))
    expect((await saved.take()).equals(content)).toBe(true)
  })
})
