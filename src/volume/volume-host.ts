import type { SlotRun, VolumeRecord } from '../metadata/records.ts'
import type { Commit } from '../metadata/store.ts'
import type { HotSet } from './hot-set.ts'
import type { PolicyHost } from './policy.ts'
import type { VolumeTables } from './tables.ts'

/** What a volume shares with the others of its pool (slots, journal, catalog); the pool implements it. */
export interface VolumeHost extends PolicyHost {
  readonly stripeSize: number
  readonly hotSet: HotSet
  /** Stores the changed record durably. */
  save(record: VolumeRecord): Promise<void>
  /** Slots for what can be done without: some are left to clients. @throws StoreError NO_SPACE */
  allocateSpare(count: number): Promise<number[]>
  /** `giveBack` is called when somebody lacks slots. @returns ends that */
  whenWanted(giveBack: () => void): () => void
  /** A contiguous run for a thick volume. @throws StoreError NO_SPACE */
  reserveRun(count: number): Promise<number>
  unreserveRun(slot: number, count: number): void
  /** The copy maps of the volume's mirrors, in the turn of `checkpointWith`'s `prepare`. @returns takes that back */
  resizeMaps(size: number): () => void
  /** What `runs` reserved is reserved no more; what the tables name of it is a thin volume's from now on. */
  unreserveUnused(runs: readonly SlotRun[], tables: VolumeTables): void
  /** Stores dirty pages and what `prepare` returns in one transaction; durable when it resolves (ledger.ts). */
  checkpointWith(prepare: () => Commit, undo: () => void): Promise<void>
  event(level: 'info' | 'warn' | 'error', kind: string, object: string, message: string): void
}
