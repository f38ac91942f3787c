/**
 * JSON schemas of the control API, once: fastify validates requests and writes answers with them, and the
 * OpenAPI document is made of the same objects.
 */
import { LIMITS } from '../base/limits.ts'
import { MIRROR_STATES } from '../mirror/state.ts'

export interface Schema {
  readonly type?: string | readonly string[]
  readonly description?: string
  readonly properties?: Readonly<Record<string, Schema>>
  readonly required?: readonly string[]
  readonly minProperties?: number
  readonly additionalProperties?: boolean
  readonly items?: Schema
  readonly enum?: readonly (string | number | null)[]
  readonly minimum?: number
  readonly maximum?: number
  readonly minLength?: number
  readonly maxLength?: number
  readonly default?: string | number | boolean
  readonly format?: string
}

const bytes = (description: string): Schema => ({
  type: 'integer',
  minimum: 0,
  description: `${description}, in bytes`,
})
const count = (description: string): Schema => ({ type: 'integer', minimum: 0, description })
const text = (description: string): Schema => ({ type: 'string', description })
const flag = (description: string): Schema => ({ type: 'boolean', description })
const list = (items: Schema, description: string): Schema => ({ type: 'array', items, description })
const choice = (values: readonly string[], description: string): Schema => ({
  type: 'string',
  enum: values,
  description,
})

/** Every property is required unless it is named in `optional`; nothing else is accepted. */
function object(
  description: string,
  properties: Record<string, Schema>,
  optional: readonly string[] = [],
): Schema {
  const required = Object.keys(properties).filter((name) => !optional.includes(name))
  return { type: 'object', description, properties, required, additionalProperties: false }
}

// Which names, sizes, units and fill bytes are allowed is the pool's to judge: its messages say what is wrong.
const volumeName: Schema = {
  type: 'string',
  description: `1 to ${LIMITS.volumeNameBytesMax} bytes of UTF-8 without /, @ and control characters`,
}
const volumeSize: Schema = { type: 'integer', description: 'a multiple of 512, in bytes' }

const formatter = object(
  'The background formatter of a thick volume',
  {
    state: choice(['idle', 'running', 'paused', 'done', 'failed'], 'what it is doing'),
    rate: {
      type: ['integer', 'null'],
      description: 'the limit set, in bytes per second; null without a limit',
    },
    done: count('format units formatted'),
    total: count('format units of the volume'),
    speed: { type: 'number', minimum: 0, description: 'bytes per second now' },
    message: text('why it failed or waits'),
  },
  ['message'],
)

const intents = object('Which regions may hold changes that are not durable', {
  regionSize: bytes('size of a region'),
  hot: count('regions announced on disk now'),
  hotMax: count('the most that may be, of all volumes together'),
  announced: count('regions announced since the volume was opened'),
  suspect: bytes('part of the volume that was hot when the daemon was stopped out of order'),
  stops: count('such stops since the last acknowledgement'),
  since: { type: ['string', 'null'], description: 'when the first of them was noticed' },
})

const exportCounters = object('Since the volume was opened', {
  reads: count('read requests'),
  readBytes: bytes('read'),
  writes: count('write requests'),
  writeBytes: bytes('written'),
  flushes: count('flush requests'),
  trims: count('trim requests'),
  zeroes: count('write-zeroes requests'),
  errors: count('requests answered with an error'),
  upcalls: count('requests that needed a decision'),
  inPlaceWrites: count('writes that needed no decision'),
  laneWrites: count('of these, made on both sides of a mirror'),
  laneBytes: count('bytes of these'),
  fullStripeWrites: count('stripes written whole, by their first write'),
})

const memberCounters = object('Since the daemon was started', {
  reads: count('reads'),
  readBytes: bytes('read'),
  writes: count('writes'),
  writeBytes: bytes('written'),
  syncs: count('syncs'),
})

export const volumeSchema = object('A volume', {
  name: volumeName,
  uuid: text('stays the same through renames'),
  size: bytes('size'),
  provision: choice(['thin', 'thick'], 'thick: space for all of it is reserved'),
  formatUnit: count('stripes that are formatted together'),
  stripeSize: bytes('size of a stripe'),
  fill: { type: 'integer', minimum: 0, maximum: 255, description: 'byte that unformatted stripes read as' },
  readOnly: flag('clients cannot write'),
  failure: { type: ['string', 'null'], description: 'why nothing is written any more, and what to do' },
  intents: { ...intents, type: ['object', 'null'], description: 'null where nobody needs intents' },
  created: { type: 'string', format: 'date-time', description: 'time of creation' },
  stripes: count('stripes of the volume'),
  stripesFormatted: count('stripes that hold data'),
  used: bytes('space taken on the members'),
  sessions: count('connections of clients'),
  formatter,
  counters: exportCounters,
})

export const poolSchema = object('A pool', {
  directory: text('its directory'),
  uuid: text('written in the superblock of every member'),
  version: count('version of the on-disk format'),
  members: list(
    object('A member', {
      index: count('its place'),
      path: text('file or device'),
      kind: choice(['file', 'device'], 'what it is'),
      size: bytes('size'),
      state: choice(['online', 'failed'], 'whether it answers'),
    }),
    'in order',
  ),
  chunkSize: bytes('part of a stripe on one member'),
  dataMembers: count('members that hold data'),
  parityMembers: count('members that hold parity'),
  stripeSize: bytes('data of one stripe'),
  slots: count('stripes the pool can hold'),
  slotsUsed: count('stripes it holds'),
  slotsReserved: count('stripes promised to thick volumes, written or not'),
  capacity: bytes('what it can hold'),
  used: bytes('what it holds'),
  reserved: bytes('promised to thick volumes'),
  fileSystemAvailable: {
    type: ['integer', 'null'],
    description: 'bytes free on the file system below file members; null for devices',
  },
  state: choice(['online', 'read-only'], 'read-only after a failed sync: writes and flushes fail'),
  failure: { type: ['string', 'null'], description: 'why it is read-only, and what to do' },
})

const MODES = ['sync', 'async']
const INITS = ['realized', 'signature', 'full']
const LOSSES = ['continue', 'block']
const ROLES = ['primary', 'secondary']
const orNull = (schema: Schema): Schema => ({ ...schema, type: [schema.type ?? 'object', 'null'].flat() })
const instant = (description: string): Schema => ({ type: 'string', format: 'date-time', description })
const rate = (description: string): Schema => ({
  type: ['integer', 'null'],
  minimum: 1,
  description: `${description}, in bytes a second; null: no limit`,
})

const mirrorSide = object('What a side knows of itself', {
  role: choice(ROLES, 'whether clients may write there'),
  generation: text('id of the content; a new one begins where a side becomes the primary'),
  history: list(text('id'), 'generations before, newest first'),
  changed: bytes('changed since the generation that both had'),
  consistent: flag('its content is one point in time'),
  size: bytes('size of the volume'),
})

const mirrorVerify = object('The last comparison', {
  started: instant('when it began'),
  ended: orNull(instant('when it ended; null while it runs')),
  compared: bytes('compared so far'),
  differences: list(
    object('A range that differs', { offset: bytes('start'), length: bytes('length') }),
    'the first ones, in order',
  ),
  differing: bytes('that differ; more than the ranges where there are very many'),
  repaired: flag('the secondary has the content of the primary there now'),
  failure: orNull(text('why it came to no end')),
})

const MIRROR_COUNTERS: Record<string, Schema> = {
  sentBytes: bytes('content sent'),
  wireBytes: bytes('all that was written to the link'),
  units: count('copy units sent with content'),
  holes: count('copy units sent as holes'),
  signatures: count('regions compared'),
  cycles: count('cycles that the secondary has committed'),
  saves: count('copy units saved for the sender before they were overwritten'),
  forwarded: count('requests that went to both sides at once'),
  laneWrites: count('of these, writes that needed no decision on either side'),
}

export const mirrorSchema = object('A mirror: one volume here, one elsewhere', {
  volume: volumeName,
  name: text('unique in its volume'),
  relation: text('uuid, the same on both sides'),
  role: choice(ROLES, 'of this side'),
  kind: choice(['link', 'nbd'], 'a daemon, or an NBD export'),
  peer: text('name of the peer, or URI of the export'),
  address: orNull(text('HOST:PORT or URI that this side connects to; null: the peer connects')),
  target: text('name of the volume there'),
  mode: choice(MODES, 'sync: a write is answered when both sides have it'),
  init: choice(INITS, 'how the secondary was, or is, made equal'),
  intervalMs: count('async: least time from one cycle to the next, in milliseconds'),
  onLoss: choice(LOSSES, 'sync: what writes do while the peer is away'),
  rate: rate('limit for copying'),
  state: choice(MIRROR_STATES, 'what it is doing'),
  reason: orNull(text('why, where that is not plain')),
  since: instant('when it came into this state'),
  connected: flag('there is a connection to the peer'),
  consistent: flag('the secondary is a point in time of the primary'),
  pointInTime: flag('it will be at any moment; false for an async mirror to an NBD export'),
  unitBytes: bytes('size of a copy unit'),
  lag: object('How far the secondary is behind', {
    bytes: bytes('that it lacks'),
    seconds: {
      type: ['number', 'null'],
      description: 'age of its content; 0 in sync, null where it has none',
    },
  }),
  cycle: count('the last one that both sides agreed on'),
  progress: {
    ...object('Work that ends', {
      what: choice(['comparing', 'copying', 'cycle', 'verifying'], 'which'),
      done: bytes('done'),
      total: bytes('to do in all'),
      speed: { type: 'number', minimum: 0, description: 'bytes a second now' },
      remainingMs: { type: ['number', 'null'], description: 'milliseconds left; null: not known' },
    }),
    type: ['object', 'null'],
  },
  counters: object('Since the daemon was started', MIRROR_COUNTERS),
  local: mirrorSide,
  remote: orNull(mirrorSide),
  verify: orNull(mirrorVerify),
})

export const mirrorListSchema = object('Mirrors', { mirrors: list(mirrorSchema, 'by volume and name') })

export const peerSchema = object('Another daemon that this one has met', {
  name: text('as it calls itself, or HOST:PORT where this side dials'),
  fingerprint: text('of the identity that is pinned'),
  connected: flag('whether there is a session with it'),
  mirrors: list(text('VOLUME/MIRROR'), 'mirrors whose other side it has'),
})

export const peerListSchema = object('Peers', { peers: list(peerSchema, 'by name') })

export const statusSchema = object('The daemon and all it serves', {
  state: choice(['starting', 'serving', 'draining', 'stopped', 'failed'], 'what the daemon is doing'),
  version: text('of the program'),
  pid: count('process id'),
  started: { type: 'string', format: 'date-time', description: 'when the daemon was started' },
  now: { type: 'string', format: 'date-time', description: 'when this was written' },
  memory: bytes('resident memory'),
  listen: list(text('NBD URI'), 'where clients connect'),
  link: orNull(text('HOST:PORT where other daemons connect; null: nowhere')),
  sessions: count('connections of clients to all volumes'),
  datapath: object('What runs the transmission phase', {
    kind: choice(['native', 'portable'], 'implementation'),
    engine: choice(['io_uring', 'threads', 'node'], 'how it reaches the members'),
    threads: count('I/O threads'),
    reason: text('why this one'),
  }),
  pool: poolSchema,
  members: list(memberCounters, 'in the order of the members'),
  volumes: list(volumeSchema, 'by name'),
  mirrors: list(mirrorSchema, 'by volume and name'),
  nextEvent: count('number of the next event'),
})

export const volumeListSchema = object('All volumes', { volumes: list(volumeSchema, 'by name') })

export const mapSchema = object('Extents of a volume, in order, without gaps', {
  name: volumeName,
  size: bytes('size of the volume'),
  offset: bytes('start of the first extent'),
  extents: list(
    object(
      'A range with one state',
      {
        offset: bytes('start'),
        length: bytes('length'),
        formatted: flag('holds data; otherwise it reads as formatting data'),
        suspect: flag('hot when the daemon was stopped out of order; absent where not'),
      },
      ['suspect'],
    ),
    'neighbours differ',
  ),
  next: { type: ['integer', 'null'], description: 'offset of the next page; null at the end' },
})

export const densitySchema = object('The init bitmap in equal parts, for drawing', {
  name: volumeName,
  size: bytes('size of the volume'),
  cells: list({ type: 'number', minimum: 0, maximum: 1 }, 'formatted share of each part'),
})

export const copyMapSchema = object('Extents of a volume, in order, without gaps', {
  volume: volumeName,
  name: text('of the mirror'),
  size: bytes('size of the volume'),
  offset: bytes('start of the first extent'),
  extents: list(
    object('A range with one state', {
      offset: bytes('start'),
      length: bytes('length'),
      copied: flag('the secondary has it; otherwise it lacks what is here now'),
    }),
    'neighbours differ',
  ),
  next: { type: ['integer', 'null'], description: 'offset of the next page; null at the end' },
})

export const copyDensitySchema = object('The copy bitmap in equal parts, for drawing', {
  volume: volumeName,
  name: text('of the mirror'),
  size: bytes('size of the volume'),
  cells: list({ type: 'number', minimum: 0, maximum: 1 }, 'share of each part that the secondary lacks'),
})

export const eventSchema = object('An event', {
  sequence: count('number, from 1 since the daemon was started'),
  time: { type: 'string', format: 'date-time', description: 'when' },
  level: choice(['info', 'warn', 'error'], 'how bad'),
  kind: text('what kind, for instance volume.created'),
  object: text('what it is about'),
  message: text('a sentence'),
})

export const eventListSchema = object('Events, oldest first', {
  events: list(eventSchema, 'in order'),
  missed: count('events that are no longer kept, before the first one here'),
  next: count('pass it as `since` to read on'),
})

export const errorSchema = object('What went wrong', {
  error: object('one error', {
    code: text('stable; for programs'),
    message: text('one line; for people'),
  }),
})

export const volumeCreateBody = object(
  'A new volume',
  {
    name: volumeName,
    size: volumeSize,
    provision: choice(['thin', 'thick'], 'thin (default) takes space when it is first written'),
    formatUnit: { type: 'integer', description: 'stripes that are formatted together (default 1)' },
    fill: { type: 'integer', description: 'byte, 0 to 255, that unformatted stripes read as (default 0)' },
    readOnly: flag('clients cannot write (default false)'),
    intents: flag('announce changes on disk, region by region, before they are made (default false)'),
    regionSize: { type: 'integer', description: 'of those regions, in bytes (default 1 MiB)' },
  },
  ['provision', 'formatUnit', 'fill', 'readOnly', 'intents', 'regionSize'],
)
export const volumeChangeBody = object(
  'What to change',
  {
    name: volumeName,
    intents: flag('announce changes on disk, region by region, before they are made'),
    regionSize: { type: 'integer', description: 'of those regions, in bytes, when this is switched on' },
  },
  ['name', 'intents', 'regionSize'],
)
export const resizeBody = object(
  'A new size',
  { size: volumeSize, force: flag('also shrink: what lies behind the new end is lost') },
  ['force'],
)
export const formatBody = object(
  'How to format',
  {
    rate: { type: ['integer', 'null'], minimum: 1, description: 'limit in bytes per second; null: no limit' },
  },
  ['rate'],
)

// Which intervals, names and addresses are possible is the mirrors' to judge, too.
const mirrorSettings: Record<string, Schema> = {
  mode: choice(MODES, 'async (default): in cycles; sync: a write is answered when both sides have it'),
  intervalMs: count('async: least time from one cycle to the next, in milliseconds (default 5000)'),
  onLoss: choice(LOSSES, 'sync: while the peer is away, writes go on (default) or wait'),
  rate: rate('limit for copying (default: none)'),
}
export const mirrorAddBody = object(
  'A new mirror',
  {
    peer: { type: 'string', minLength: 1, description: 'HOST:PORT of the link of a daemon, or an NBD URI' },
    name: { type: 'string', minLength: 1, description: 'unique in its volume (default: name of the peer)' },
    target: { ...volumeName, minLength: 1, description: 'name of the volume there (default: the same)' },
    init: choice(INITS, 'how the secondary is made equal (default: realized)'),
    ...mirrorSettings,
  },
  ['name', 'target', 'init', ...Object.keys(mirrorSettings)],
)
export const mirrorChangeBody: Schema = {
  ...object('What to change', mirrorSettings, Object.keys(mirrorSettings)),
  minProperties: 1,
}
export const mirrorForceBody = orNull(
  object('How', { force: flag('also where that may lose changes') }, ['force']),
)
export const mirrorVerifyBody = orNull(
  object('How', { repair: flag('also send what differs (default false)') }, ['repair']),
)
export const mirrorResolveBody = object('Which side gives way', {
  discard: choice(['local', 'remote'], 'whose changes since the common generation are thrown away'),
})
export const mirrorParams = object('Path', {
  name: { type: 'string', minLength: 1, description: 'volume, URL-encoded' },
  mirror: { type: 'string', minLength: 1, description: 'mirror, URL-encoded' },
})

export const peerParams = object('Path', {
  peer: { type: 'string', minLength: 1, description: 'name of the peer, URL-encoded' },
})

export const nameParams = object('Path', {
  name: { type: 'string', minLength: 1, description: 'volume, URL-encoded' },
})
export const deleteQuery = object(
  'Query',
  { force: flag('also while clients are connected or mirrors go on; they end') },
  ['force'],
)
export const acknowledgeQuery = object(
  'Query',
  { stops: { ...count('unclean stops that were known; refused where there were more since') } },
  ['stops'],
)
export const mapQuery = object(
  'Query',
  {
    offset: { ...bytes('start'), default: 0 },
    length: bytes('length (default: up to the end)'),
    limit: {
      type: 'integer',
      minimum: 1,
      maximum: LIMITS.mapExtentsPerPage,
      default: 1000,
      description: 'extents in one page',
    },
  },
  ['offset', 'length', 'limit'],
)
export const densityQuery = object(
  'Query',
  {
    cells: {
      type: 'integer',
      minimum: 1,
      maximum: LIMITS.densityCellsMax,
      default: 64,
      description: 'parts',
    },
  },
  ['cells'],
)
export const eventsQuery = object(
  'Query',
  {
    since: { type: 'integer', minimum: 1, default: 1, description: 'number of the first event wanted' },
    limit: {
      type: 'integer',
      minimum: 1,
      maximum: LIMITS.eventsKept,
      default: LIMITS.eventsKept,
      description: 'at most',
    },
    follow: flag('stay connected: one JSON object a line (NDJSON), as events happen'),
  },
  ['since', 'limit', 'follow'],
)
