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
  /** A connection that holds nothing may always have this much, whatever the others hold: nobody is shut out. */
  payloadAlwaysPerConnection: 64 * KiB,
  /** Extents in one block-status reply. */
  blockStatusExtentsMax: 64 * KiB,
  replyBytesQueuedPerConnection: 64 * MiB,

  /** The last 1/n of a pool's slots is for clients: nothing that can be done without takes one of them. */
  poolReserveShare: 16,
  /** One journal file; there are two. A full journal makes first writes wait for the checkpoint. */
  journalFileBytes: 8 * MiB,
  /** Metadata not yet in LMDB is committed at least this often. */
  checkpointMsMax: 5_000,
  /** Intents: the part of a volume that is announced as a whole before it is changed; whole format units, so more where those are. */
  intentRegionBytes: 1 * MiB,
  intentRegionBytesMin: 4 * KiB,
  intentRegionBytesMax: 1024 * MiB,
  /** Intents: regions of a pool that may be announced at a time. Twice the regions: half the announcements, twice the suspects. */
  hotRegionsMax: 4096,
  hotRegionsLimit: 2 ** 20,
  /** Intents: a region that nobody writes to for once to twice this long is no longer announced. */
  hotRegionCoolMs: 10_000,
  /** How long a first write may wait for its neighbours, so that a sequential fill writes each stripe once. */
  mergeHoldMs: 2,
  drainMsMax: 30_000,
  /** A session that is being closed and takes none of its replies for this long is cut off. */
  closeLingerMsMax: 2_000,

  /** Link: the payload of one frame between two daemons; whoever has more cuts it. Some room beyond 1 MiB of data for what describes it. */
  linkPayloadMax: 1 * MiB + 16 * KiB,
  /** Link: the payload of a frame of the handshake, from a peer that has proved nothing yet. */
  linkHandshakePayloadMax: 8 * KiB,
  /** Link: the payload of a frame that opens or closes something. */
  linkControlPayloadMax: 64 * KiB,
  /** Link: bytes on their way in one connection that the peer has not acknowledged. More pays on long fat lines only. */
  linkConnectionWindow: 8 * MiB,
  linkConnectionWindowMax: 256 * MiB,
  /** Link: bytes sent on one channel that the peer's side of it has not consumed; what a receiver may have to keep. */
  linkChannelWindow: 4 * MiB,
  /** Link: the windows that one side gives to all channels of a session, together. */
  linkSessionWindowMax: 1536 * MiB,
  /** Link: past so much of them a further channel gets the least window that works, so that many channels find room. */
  linkSessionWindowAmple: 256 * MiB,
  linkChannelsPerSession: 576,
  linkChannelNameBytesMax: 64,
  /** Link: sends and requests of one channel that wait for its window; whoever goes on without waiting gets an error. */
  linkSendsWaitingMax: 1024,
  /** Link: requests of one channel that the peer has not replied to. */
  linkRequestsPerChannel: 4096,
  /** Link: bulk data given to a connection that the system has not taken yet; urgent frames wait behind it. */
  linkBulkQueuedMax: 1 * MiB,
  linkConnectionsPerSessionMax: 16,
  linkSessionsMax: 256,
  /** Link: connections that are still in the handshake. */
  linkHandshakesMax: 256,
  linkPeersMax: 1024,
  linkCapabilitiesMax: 64,
  /** Link: a connection on which nothing arrives for this long is lost; the peers speak at least four times as often. */
  linkSilenceMs: 6_000,
  /** Link: how long goodbyes may take. */
  linkCloseMsMax: 2_000,
  /** Link: delays between attempts to connect; the first is about the least, each is about twice the one before. */
  linkRetryMsMin: 100,
  linkRetryMsMax: 30_000,
  /** Link: a refusal that only an operator can settle is not asked again before. */
  linkRefusedRetryMs: 60_000,
  /** Link: a session that lasted this long makes the next delay the least again. */
  linkStableMs: 10_000,

  /** Mirrors: generations that a volume remembers; further back nobody is recognised. */
  generationsKept: 16,
  mirrorsPerVolumeMax: 16,
  /** Mirrors with one peer, in whichever roles: the channels of all of them find room in one session, and questions beside them. */
  mirrorsPerPeerMax: 256,
  mirrorNameBytesMax: 64,
  /** Connections of a mirror that carry writes of its clients, one for each I/O thread of the primary. */
  mirrorLanesMax: 64,
  /** Mirrors: what the secondary has received of one mirror and not written yet. */
  mirrorDataWindow: 8 * MiB,
  /** Mirrors: one message of content; a larger copy unit travels in several. */
  mirrorPieceBytes: 1 * MiB,
  /** Mirrors: copy units of one message that says that they are holes. */
  mirrorHoleUnitsMax: 2 ** 20,
  /** Mirrors: content that was read and that the secondary has not acknowledged. */
  mirrorInFlightMax: 16 * MiB,
  /** Mirrors: content in memory that was saved before it was overwritten; more of it goes to free slots of the pool. */
  mirrorSavedMax: 32 * MiB,
  /** Mirrors: the part of a volume that is compared by one signature. */
  mirrorRegionBytes: 1 * MiB,
  mirrorIntervalMsMin: 10,
  mirrorIntervalMsMax: 24 * 3600 * 1000,
  mirrorIntervalMs: 5_000,
  /** Mirrors: an initial copy is made durable over there after so much of it, or so long. */
  mirrorCommitBytes: 1024 * MiB,
  mirrorCommitMs: 5_000,
  /**
   * Mirrors: clients wait while the last of a resync is sent and committed. It is at most so much where clients do not write faster than
   * that, and they wait at most so long for each of the two; longer the next time, where that was too short.
   */
  mirrorLastStepBytes: 4 * MiB,
  mirrorLastStepMs: 2_000,
  mirrorLastStepMsMax: 32_000,
  /** Mirrors: delays after a refusal of the peer (its pool is full, for instance). */
  mirrorRetryMsMin: 1_000,
  mirrorRetryMsMax: 30_000,
  mirrorDifferencesKept: 1_000,
  /** Mirrors to NBD exports: connections, where the server allows several. */
  mirrorTargetConnections: 4,
  /** Mirrors to NBD exports: for connecting and the handshake. */
  mirrorTargetConnectMs: 4_000,
  /** Mirrors to NBD exports: a server that answers nothing for so long while it is asked is lost. */
  mirrorTargetSilenceMs: 30_000,
  /** Mirrors to NBD exports: what was written there is flushed after so long, if no client asks for it before. */
  mirrorTargetFlushMs: 1_000,

  /** Control API: requests are small; a stream of events or a big map is read in pages. */
  apiBodyBytesMax: 64 * KiB,
  apiConnectionsMax: 256,
  mapExtentsPerPage: 10_000,
  densityCellsMax: 64 * KiB,
  /** Events kept in memory; a reader that falls further behind is told how many it missed. */
  eventsKept: 1000,
  /** Failures of one kind of one volume are told once in this time. */
  troubleEventMs: 10_000,
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
assert(LIMITS.hotRegionsMax <= LIMITS.hotRegionsLimit)
// A frame has to fit while a part of the window has not been acknowledged yet (link/window.ts).
assert(LIMITS.linkConnectionWindow >= 4 * LIMITS.linkPayloadMax)
assert(LIMITS.linkChannelWindow >= 2 * LIMITS.linkPayloadMax)
assert(LIMITS.linkSessionWindowAmple >= LIMITS.linkChannelWindow)
assert(
  LIMITS.linkSessionWindowMax >=
    LIMITS.linkSessionWindowAmple + LIMITS.linkChannelsPerSession * 2 * LIMITS.linkPayloadMax,
)
assert(LIMITS.linkChannelsPerSession >= 2 * LIMITS.mirrorsPerPeerMax + 64)
assert(2 * LIMITS.mirrorTargetFlushMs < LIMITS.hotRegionCoolMs) // intents need not wait for what is not flushed there (mirror/nbd-remote.ts)
assert(LIMITS.linkConnectionWindowMax < 2 ** 31) // windows are counted modulo 2^32
