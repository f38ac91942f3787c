import { assert } from './assert.ts'

const KiB = 1024
const MiB = 1024 * KiB

/** Every bound of the program, in one table. Sizes in bytes, times in milliseconds, the rest are counts. */
export const LIMITS = {
  /** Volumes are whole sectors. */
  sectorSize: 512,
  chunkSizeMin: 4 * KiB,
  chunkSizeMax: 1 * MiB,
  membersMax: 32,
  stripeSizeMax: 4 * MiB,
  /** Stripes in a volume and slots in a pool are counted in 32 bits. */
  stripesPerVolumeMax: 2 ** 32 - 1,
  slotsPerPoolMax: 2 ** 32 - 1,
  /** A format unit is written in one go, so it is bounded. */
  formatUnitBytesMax: 16 * MiB,
  volumesPerPoolMax: 4096,
  volumeNameBytesMax: 255,

  /** NBD: the largest payload of one request, read or write (specification, "Block size constraints"). */
  requestPayloadMax: 32 * MiB,
  /** NBD: strings in the handshake (specification, "Values", 4096 bytes). */
  nbdStringMax: 4096,
  /** NBD: the data of one option; enough for INFO and META_CONTEXT with long names. */
  nbdOptionDataMax: 64 * KiB,
  /** NBD: option data above nbdOptionDataMax is skipped and refused; above this the connection ends. */
  nbdOptionDiscardMax: 32 * MiB,
  nbdOptionsPerHandshakeMax: 1024,
  /** NBD: handshake replies that wait to be sent when the client already sends its next option. */
  nbdHandshakeOutputMax: 1 * MiB,
  nbdMetaContextsMax: 64,
  /** A client that has not finished the handshake by then is disconnected. */
  handshakeMsMax: 10_000,

  connectionsMax: 4096,
  /** Silence on a TCP connection after which the system asks whether the other end is still there. */
  keepAliveMs: 60_000,
  /** In flight: read off the socket and not yet answered. Past these the socket is not read. */
  requestsInFlightPerConnection: 256,
  payloadInFlightPerConnection: 64 * MiB,
  payloadInFlightTotal: 256 * MiB,
  /** Extents in one block-status reply. */
  blockStatusExtentsMax: 64 * KiB,
  replyBytesQueuedPerConnection: 64 * MiB,

  /** One journal file; there are two. A full journal makes first writes wait for the checkpoint. */
  journalFileBytes: 8 * MiB,
  /** Metadata not yet in LMDB is committed at least this often. */
  checkpointMsMax: 5_000,
  /** How long a first write may wait for its neighbours, so that a sequential fill writes each stripe once. */
  mergeHoldMs: 2,
  drainMsMax: 30_000,
  /** A session that is being closed and takes none of its replies for this long is cut off. */
  closeLingerMsMax: 2_000,

  /** Control API: requests are small; a stream of events or a big map is read in pages. */
  apiBodyBytesMax: 64 * KiB,
  apiConnectionsMax: 256,
  mapExtentsPerPage: 10_000,
  densityCellsMax: 64 * KiB,
  /** Events kept in memory; a reader that falls further behind is told how many it missed. */
  eventsKept: 1000,
  /** Members are looked after this often, whether or not somebody uses them. */
  memberProbeMs: 5_000,
  datapathThreadsMax: 64,
  nbdClientConnectionsMax: 32,
} as const

// Relations between limits, asserted once as they load.
assert(LIMITS.stripeSizeMax >= LIMITS.chunkSizeMax)
assert(LIMITS.payloadInFlightPerConnection >= 2 * LIMITS.requestPayloadMax)
assert(LIMITS.payloadInFlightTotal >= LIMITS.payloadInFlightPerConnection)
assert(LIMITS.formatUnitBytesMax >= LIMITS.stripeSizeMax)
