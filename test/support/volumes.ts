import { spawnSync } from 'node:child_process'
import { expect } from 'vitest'
import type { NbdClient } from '../../src/nbd/client.ts'
import type { DatapathChoice } from './served-pool.ts'

/** What tests of volumes share. `FULLSTRIPE_TEST_DATAPATHS=portable` leaves the native one out, where there is no compiler. */
export const DATAPATHS: readonly DatapathChoice[] =
  process.env['FULLSTRIPE_TEST_DATAPATHS'] === 'portable' ? ['portable'] : ['portable', 'native']

/** Stops at the first difference and says where. */
export function expectSame(actual: Buffer, expected: Buffer, what: string): void {
  if (actual.equals(expected)) return
  const at = actual.findIndex((byte, index) => byte !== expected[index])
  expect.fail(`${what}: byte ${at} is ${actual[at]}, expected ${expected[at]}`)
}

/** What a daemon that was killed now would leave behind: the kernel's view of every file. */
export function copyPool(from: string, to: string): void {
  const copied = spawnSync('cp', ['-r', '--sparse=always', from, to])
  expect(copied.status, copied.stderr.toString()).toBe(0)
}

export async function readAll(client: NbdClient): Promise<Buffer> {
  const target = Buffer.alloc(client.size)
  await client.read(target, 0)
  return target
}
