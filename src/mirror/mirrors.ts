import { randomUUID } from 'node:crypto'
import { StoreError, UserError } from '../base/errors.ts'
import { LIMITS } from '../base/limits.ts'
import { formatSize } from '../base/sizes.ts'
import { parseLinkAddress } from '../link/address.ts'
import { LinkError } from '../link/errors.ts'
import { Fields } from '../link/hello.ts'
import type { LinkLog } from '../link/options.ts'
import type { SecurityOptions } from '../link/security.ts'
import type { ChannelOffer, Session } from '../link/session.ts'
import type { MirrorRecord } from '../metadata/records.ts'
import type { Pool } from '../volume/pool.ts'
import type { Volume } from '../volume/volume.ts'
import { type AskKind, answerAsk, ask, readAnswer } from './asks.ts'
import { Links, type LinkWorld } from './links.ts'
import { NbdTargets, parseNbdTarget } from './nbd-targets.ts'
import { Peers } from './peers.ts'
import { CHANNELS, LANES_CAPABILITY } from './protocol.ts'
import { Relation, type RelationHost } from './relation.ts'
import type {
  CopyExtent,
  MirrorAddOptions,
  MirrorChange,
  MirrorControl,
  MirrorInfo,
  MirrorInit,
  MirrorMode,
} from './types.ts'

/**
 * All mirrors of a daemon: which there are, who of them talks over which session, and what the operator asks for.
 *
 * Start: relations begin to watch their volumes before the first client comes; then peers are let in and dialled.
 */
export interface MirrorsOptions {
  readonly pool: Pool
  readonly log: LinkLog
  readonly link: SecurityOptions & { readonly listen: string | undefined; readonly name: string }
  readonly software: string
  readonly connections?: number
  /** @param who for the log: the volume, the mirror and the peer by name */
  event(level: 'info' | 'warn' | 'error', kind: string, object: string, message: string, who: object): void
  /** In the place of files and sockets: a simulation's. */
  readonly world?: LinkWorld
}

interface KnownSession {
  readonly session: Session
  readonly address: string | undefined // that this side dialled
}

export class Mirrors implements MirrorControl {
  readonly peers: Peers
  readonly #options: MirrorsOptions
  readonly #pool: Pool
  readonly #relations = new Map<number, Relation>()
  readonly #sessions = new Set<KnownSession>()
  readonly #targets = new NbdTargets()
  readonly #host: RelationHost
  /** Opened when they are needed: a daemon without mirrors has no identity. */
  #opening: Promise<Links> | undefined
  #links: Links | undefined

  /** @throws UserError */
  static async open(options: MirrorsOptions): Promise<Mirrors> {
    const mirrors = new Mirrors(options)
    const { pool } = options
    for (const stored of pool.mirrors.all()) {
      const volume = pool.volumes().find(({ record }) => record.id === stored.record.volume)
      if (volume === undefined) continue // `check` tells of it
      const relation = new Relation(mirrors.#host, volume, stored)
      mirrors.#relations.set(stored.record.id, relation)
      await relation.start()
      await mirrors.#acknowledge(relation)
    }
    pool.onDelete({
      leaves: (volume) => mirrors.#leave(volume),
      stays: (volume) => mirrors.#stay(volume),
    })
    return mirrors
  }

  /**
   * What was hot at an unclean stop is in the copy bitmaps now (recovery.ts). Where only mirrors wanted to know, it need not be said again
   * at the next opening; a secondary's is what its primary still has to ask for.
   */
  async #acknowledge({ isPrimary, volume }: Relation): Promise<void> {
    const { intents } = volume.record
    if (!isPrimary || intents === undefined || intents.stops === 0) return
    if (intents.needs.every((need) => need.startsWith(NEED))) await volume.acknowledge()
  }

  private constructor(options: MirrorsOptions) {
    this.#options = options
    this.#pool = options.pool
    this.peers = new Peers({
      links: () => this.#link(),
      sessions: () => [...this.#sessions].map(({ session }) => session),
      relations: () => [...this.#relations.values()],
      event: (kind, name, message) => options.event('info', kind, name, message, { peer: name }),
    })
    this.#host = {
      book: options.pool.mirrors,
      event: (level, kind, object, message, who) => options.event(level, kind, object, message, who),
      session: (relation) => this.#sessionOf(relation),
    }
  }

  /** Peers are let in, and dialled. @throws UserError */
  async listen(): Promise<void> {
    for (const relation of this.#relations.values())
      if (relation.record.kind === 'nbd') this.#targets.start(relation)
    const linked = [...this.#relations.values()].filter(({ record }) => record.kind === 'link')
    if (this.#options.link.listen === undefined && linked.length === 0) return
    const links = await this.#link()
    await links.listen()
    for (const { record } of linked) if (record.address !== null) links.dial(record.address)
  }

  get listening(): string | undefined {
    return this.#links?.listening
  }

  async close(): Promise<void> {
    await Promise.all(
      [...this.#relations.values()].map((relation) => relation.disconnect('the daemon stops')),
    )
    await this.#targets.close('the daemon stops')
    await this.#links?.close()
  }

  // ---- what the operator asks for

  list(): readonly MirrorInfo[] {
    return [...this.#relations.values()]
      .map((relation) => relation.info())
      .sort((a, b) => (a.volume === b.volume ? compare(a.name, b.name) : compare(a.volume, b.volume)))
  }

  show(volume: string, name?: string): MirrorInfo {
    return this.#find(volume, name).info()
  }

  async add(options: MirrorAddOptions): Promise<MirrorInfo> {
    const volume = this.#pool.volume(options.volume)
    const settings = this.#checkAdd(volume, options)
    if (settings.kind === 'nbd') return this.#addNbd(volume, options, settings)
    const { address } = settings
    const links = await this.#link()
    links.dial(address)
    try {
      const session = await links.session(address)
      if (session.peer.fingerprint === links.fingerprint) {
        throw new UserError(
          'REFUSED',
          `${address} is this daemon itself (or one with a copy of its pool): a mirror is with another daemon`,
        )
      }
      this.#checkPeer(session)
      const name = options.name ?? uniqueName(session.peer.name)
      this.#checkName(volume, name)
      const relation = randomUUID()
      const target = options.target ?? volume.name
      const answer = await this.#ask(session, 'create', {
        relation,
        name: this.#options.link.name,
        from: volume.name,
        volume: target,
        size: volume.size,
        unitBytes: volume.unitBytes,
        fill: volume.record.fill,
        mode: settings.mode,
        init: settings.init,
        intervalMs: settings.intervalMs,
        onLoss: settings.onLoss,
      })
      try {
        const added = await this.#store(volume, {
          relation,
          name,
          peer: { name: session.peer.name, fingerprint: session.peer.fingerprint, volume: target },
          unitBytes: readAnswer(session, () => readUnitBytes(answer, volume)),
          ...settings,
        })
        await added.connect(session)
        return added.info()
      } catch (error) {
        await this.#ask(session, 'remove', { relation }).catch(() => {}) // the error to report is the first one
        throw error
      }
    } catch (error) {
      await links.release(address)
      throw asUserError(error, `volume ${volume.name} was not mirrored to ${address}`)
    }
  }

  async change(volume: string, name: string | undefined, change: MirrorChange): Promise<MirrorInfo> {
    const relation = this.#primaryOf(volume, name)
    checkTimes(change, relation.object)
    await relation.primary?.change(change)
    return relation.info()
  }

  async pause(volume: string, name?: string): Promise<MirrorInfo> {
    const relation = this.#primaryOf(volume, name)
    await relation.primary?.pause()
    return relation.info()
  }

  async resume(volume: string, name?: string): Promise<MirrorInfo> {
    const relation = this.#primaryOf(volume, name)
    await relation.primary?.resume()
    this.#targets.retry(relation.record.id)
    if (relation.record.address !== null && relation.record.kind === 'link')
      this.#links?.retry(relation.record.address)
    return relation.info()
  }

  async remove(volume: string, name?: string): Promise<void> {
    const relation = this.#find(volume, name)
    const { address, kind } = relation.record
    // The other side cannot be asked, or not now: it has to be told there.
    const told = kind === 'nbd' ? undefined : await relation.ask('remove').then(() => true, userFailure)
    await this.#drop(relation)
    if (kind === 'link' && address !== null) await this.#links?.release(address)
    const left = told === false ? '; the other side could not be told: remove the mirror there, too' : ''
    relation.tell('info', 'mirror.removed', `the mirror is removed${left}`)
  }

  async promote(volume: string, name?: string, options: { force?: boolean } = {}): Promise<MirrorInfo> {
    const relation = this.#find(volume, name)
    await relation.promote(options.force === true)
    return relation.info()
  }

  async demote(volume: string, name?: string, options: { force?: boolean } = {}): Promise<MirrorInfo> {
    const relation = this.#find(volume, name)
    await relation.demote(options.force === true)
    return relation.info()
  }

  async resolve(volume: string, name: string | undefined, discard: 'local' | 'remote'): Promise<MirrorInfo> {
    const relation = this.#find(volume, name)
    if (discard === 'local') {
      await relation.discard()
      await relation.ask('retry').catch(userFailure) // it comes by itself when it connects again
    } else {
      relation.checkSplit()
      await relation.ask('yield')
      await relation.overrule()
      relation.retry()
    }
    return relation.info()
  }

  async verify(
    volume: string,
    name: string | undefined,
    options: { repair?: boolean } = {},
  ): Promise<MirrorInfo> {
    const relation = this.#primaryOf(volume, name)
    relation.primary?.verify(options.repair === true)
    return relation.info()
  }

  copyExtents(volume: string, name: string, offset: number, length: number): Iterable<CopyExtent> {
    return this.#find(volume, name).copyExtents(offset, length)
  }

  copyDensity(volume: string, name: string, cells: number): Float64Array {
    return this.#find(volume, name).copyDensity(cells)
  }

  // ---- sessions

  #onSession(session: Session, address: string | undefined): void {
    const known: KnownSession = { session, address }
    this.#sessions.add(known)
    session.ended.then(() => this.#sessions.delete(known))
    session.onChannel((offer) => this.#onOffer(session, offer))
    // In a turn of its own: the session has to start first.
    setImmediate(() => {
      for (const relation of this.#relations.values()) {
        if (!relation.isPeer(session, address)) continue
        relation.knowPeer(session).catch((error: unknown) => {
          // The mirror is gone, or the pool takes no changes and says so: the next session comes here again.
          if (!(error instanceof StoreError || error instanceof UserError)) throw error
        })
        // One that its own address leads to stays there.
        if (relation.isPrimary && this.#sessionOf(relation, session) === session)
          this.#connect(relation, session)
      }
    })
  }

  #connect(relation: Relation, session: Session): void {
    relation.connect(session).catch((error: unknown) => {
      if (!(error instanceof LinkError)) throw error // the session is over
    })
  }

  #onOffer(session: Session, offer: ChannelOffer): void {
    if (offer.name === CHANNELS.ask) {
      answerAsk(offer, (kind, body, over) => this.#answer(session, kind, body, over))
      return
    }
    const id = new Fields(offer.params, 'mirror').text('relation', 1, 64)
    const relation = [...this.#relations.values()].find(({ record }) => record.relation === id)
    // To a stranger a mirror of others does not exist.
    if (relation === undefined || !relation.isPeer(session, undefined)) {
      offer.refuse('there is no such mirror here any more: remove it there, too, and add it again')
      return
    }
    if (offer.name === CHANNELS.control) relation.serve(offer.accept(), session)
    else if (offer.name === CHANNELS.data)
      relation.serveData(offer.accept({ window: LIMITS.mirrorDataWindow }))
    else offer.refuse(`this daemon knows no channel ${offer.name}`)
  }

  /** The one with the mirror's own address; or else `other`, or any: a peer may be there under several addresses, and dial us, too. */
  #sessionOf(relation: Relation, other?: Session): Session | undefined {
    let found = other
    for (const { session, address } of this.#sessions) {
      if (!relation.isPeer(session, address)) continue
      if (address !== undefined && address === relation.record.address) return session
      found ??= session
    }
    return found
  }

  // ---- what the other side asks for

  async #answer(
    session: Session,
    kind: AskKind,
    body: Fields,
    over: Promise<unknown>,
  ): Promise<Record<string, unknown>> {
    if (kind === 'create') return this.#create(session, body)
    const id = body.text('relation', 1, 64)
    const relation = [...this.#relations.values()].find(({ record }) => record.relation === id)
    if (relation === undefined || !relation.isPeer(session, undefined)) {
      if (kind === 'remove') return {}
      throw new UserError('NOT_FOUND', 'there is no such mirror here')
    }
    if (kind === 'remove') {
      const { address } = relation.record
      await this.#drop(relation)
      // The answer goes over that session, perhaps.
      if (address !== null) over.then(() => this.#links?.release(address))
      relation.tell('info', 'mirror.removed', `${session.peer.name} removed the mirror`)
    } else if (kind === 'yield') {
      await relation.yield()
    } else {
      relation.retry()
      this.#connect(relation, session)
    }
    return {}
  }

  async #create(session: Session, body: Fields): Promise<Record<string, unknown>> {
    this.#checkPeer(session)
    const name = body.text('volume', 1, LIMITS.volumeNameBytesMax)
    const size = body.integer('size', 1, Number.MAX_SAFE_INTEGER)
    const theirs = body.integer('unitBytes', LIMITS.chunkSizeMin, LIMITS.formatUnitBytesMax)
    const fill = body.integer('fill', 0, 255)
    const { stripeSize } = this.#pool.info()
    let volume = this.#pool.volumes().find((known) => known.name === name)
    const made = volume === undefined
    if (volume === undefined) {
      const formatUnit = theirs % stripeSize === 0 ? theirs / stripeSize : 1
      volume = await this.#pool.createVolume({ name, size, provision: 'thin', formatUnit, fill })
    }
    try {
      const unitBytes = Math.max(theirs, volume.unitBytes)
      if (!made) this.#checkPresent(volume, size, fill)
      if (unitBytes % theirs !== 0 || unitBytes % volume.unitBytes !== 0) {
        throw new UserError(
          'REFUSED',
          `volume ${name} has format units of ${formatSize(volume.unitBytes)} here and ${formatSize(theirs)} there: one has to be a multiple of the other`,
        )
      }
      await volume.becomeThin()
      const mode: MirrorMode = body.text('mode', 4, 5) === 'sync' ? 'sync' : 'async'
      const asked = body.text('init', 1, 16)
      const init: MirrorInit = asked === 'full' || asked === 'signature' ? asked : 'realized'
      const record = {
        relation: body.text('relation', 1, 64),
        name: uniqueName(session.peer.name),
        role: 'secondary' as const,
        peer: {
          name: session.peer.name,
          fingerprint: session.peer.fingerprint,
          volume: body.text('from', 1, LIMITS.volumeNameBytesMax),
        },
        address: null,
        kind: 'link' as const,
        mode,
        init,
        intervalMs: body.integer('intervalMs', LIMITS.mirrorIntervalMsMin, LIMITS.mirrorIntervalMsMax),
        onLoss: body.text('onLoss', 1, 16) === 'block' ? ('block' as const) : ('continue' as const),
        rate: null,
        unitBytes,
      }
      await this.#store(volume, record)
      return { unitBytes }
    } catch (error) {
      if (made) await this.#pool.deleteVolume(name, { force: true })
      throw error
    }
  }

  /** A volume that is there already becomes the secondary. */
  #checkPresent(volume: Volume, size: number, fill: number): void {
    const { name, record } = volume
    const refuse = (why: string): never => {
      throw new UserError('REFUSED', `volume ${name} cannot be the secondary: ${why}`)
    }
    if (volume.isSecondary) {
      const [other] = this.#pool.mirrors.of(record.id)
      const { name: mirror = '', peer } = other?.record ?? {}
      refuse(
        `it is the secondary of another mirror, ${name}/${mirror} of volume ${peer?.volume} of ${peer?.name}; ` +
          `where nobody needs that one any more, end it at ${this.#options.link.name} with: ` +
          `fullstripe mirror remove ${name} ${mirror} (or mirror promote)`,
      )
    }
    if (this.#pool.mirrors.of(record.id).length > 0) refuse('it has mirrors of its own')
    if (volume.size !== size) refuse(`it has ${formatSize(volume.size)} here and ${formatSize(size)} there`)
    if (record.fill !== fill) refuse(`its fill byte is ${record.fill} here and ${fill} there`)
    const { sessions } = volume.info()
    if (sessions > 0)
      refuse(`it has ${sessions} connected client${sessions > 1 ? 's' : ''}: detach them first`)
  }

  // ---- the book

  async #store(
    volume: Volume,
    record: Pick<MirrorRecord, 'relation' | 'name' | 'peer' | 'role' | 'address' | 'kind' | 'mode'> &
      Pick<MirrorRecord, 'init' | 'intervalMs' | 'onLoss' | 'rate' | 'unitBytes'>,
  ): Promise<Relation> {
    const need = needOf(record.relation)
    const primary = record.role === 'primary'
    await volume.needIntents(need)
    try {
      const generation = volume.record.generation ?? { current: randomUUID(), history: [] }
      const stored = await this.#pool.mirrors.add(
        (id) => ({
          ...record,
          id,
          volume: volume.record.id,
          created: new Date().toISOString(),
          paused: false,
          initialized: false,
          base: primary ? generation.current : '',
          cycle: 0,
          clean: false,
        }),
        (id) => (primary ? { generation } : { secondaryOf: id, generation: undefined }),
      )
      const relation = new Relation(this.#host, volume, stored)
      this.#relations.set(stored.record.id, relation)
      await relation.start()
      const text = primary
        ? `mirrored to ${record.peer.name}`
        : `mirror of ${record.peer.volume} of ${record.peer.name}`
      relation.tell('info', 'mirror.added', text)
      return relation
    } catch (error) {
      await volume.releaseIntents(need)
      throw error
    }
  }

  /** The volume is deleted by force, and its mirrors with it: the other sides are not told. */
  async #leave(volume: Volume): Promise<void> {
    for (const relation of [...this.#relations.values()].filter((known) => known.volume === volume)) {
      const { id, kind, address } = relation.record
      await relation.close('the volume is deleted')
      await this.#targets.end(id, 'the volume is deleted')
      this.#relations.delete(id)
      if (kind === 'link' && address !== null) await this.#links?.release(address)
    }
  }

  async #stay(volume: Volume): Promise<void> {
    for (const stored of this.#pool.mirrors.of(volume.record.id)) {
      const relation = new Relation(this.#host, volume, stored)
      this.#relations.set(stored.record.id, relation)
      await relation.start()
      const { kind, address } = stored.record
      if (kind === 'nbd') this.#targets.start(relation)
      else if (address !== null) this.#links?.dial(address)
      relation.retry()
    }
  }

  async #drop(relation: Relation): Promise<void> {
    const { id, relation: uuid } = relation.record
    const reason = 'the mirror is removed'
    await relation.end(reason, () =>
      this.#pool.mirrors.remove(id, relation.isPrimary ? {} : { secondaryOf: undefined }),
    )
    await this.#targets.end(id, reason)
    this.#relations.delete(id)
    await relation.volume.releaseIntents(needOf(uuid))
  }

  // ---- finding and checking

  /** @throws UserError what is wrong with keys or certificates */
  #link(): Promise<Links> {
    const { pool, link, software, log, connections, world } = this.#options
    this.#opening ??= Links.open({
      directory: pool.directory,
      name: link.name,
      listen: link.listen,
      security: link,
      software,
      log,
      capabilities: (pool.datapath.lanes?.width ?? 0) > 0 ? [LANES_CAPABILITY] : [],
      ...(connections === undefined ? {} : { connections }),
      ...(world === undefined ? {} : { world }),
      onSession: (session, address) => this.#onSession(session, address),
      onRefused: (address, { message }) => {
        for (const { record, primary } of this.#relations.values()) {
          if (record.address === address) primary?.unreachable(`no session with ${address}: ${message}`)
        }
      },
    }).then(
      (links) => {
        this.#links = links
        return links
      },
      (error: unknown) => {
        this.#opening = undefined // it may be mended by the next time
        throw error
      },
    )
    return this.#opening
  }

  #find(volumeName: string, name: string | undefined): Relation {
    const volume = this.#pool.volume(volumeName)
    const own = [...this.#relations.values()].filter((relation) => relation.volume === volume)
    const found = own.filter(({ record }) => name === undefined || record.name === name)
    const [only] = found
    if (only === undefined) {
      const what = name === undefined ? 'no mirror' : `no mirror ${name}`
      throw new UserError(
        'NOT_FOUND',
        `volume ${volumeName} has ${what}: see them with: fullstripe mirror list`,
      )
    }
    if (found.length > 1) {
      const names = found.map(({ record }) => record.name).join(', ')
      throw new UserError('USAGE', `volume ${volumeName} has ${found.length} mirrors: name one of ${names}`)
    }
    return only
  }

  #primaryOf(volume: string, name: string | undefined): Relation {
    const relation = this.#find(volume, name)
    if (!relation.isPrimary) {
      throw new UserError(
        'REFUSED',
        `mirror ${relation.object}: this side is the secondary: ask the primary, ${relation.record.peer.name}`,
      )
    }
    return relation
  }

  #checkAdd(volume: Volume, options: MirrorAddOptions) {
    const what = `volume ${volume.name}`
    if (volume.isSecondary)
      throw new UserError('REFUSED', `${what} is a secondary: mirror it from its primary`)
    const count = this.#pool.mirrors.of(volume.record.id).length
    if (count >= LIMITS.mirrorsPerVolumeMax) {
      throw new UserError(
        'REFUSED',
        `${what} has ${count} mirrors, which is the most it can have: remove one first`,
      )
    }
    checkTimes(options, what)
    const name = options.name
    if (name !== undefined && !NAME.test(name)) {
      throw new UserError(
        'USAGE',
        `${what}: a mirror's name has 1 to 64 letters, digits, and . _ - in between`,
      )
    }
    const nbd = /^nbds?(\+unix)?:/i.test(options.peer)
    if (!nbd) parseLinkAddress(options.peer, 'the peer')
    return {
      role: 'primary' as const,
      kind: nbd ? ('nbd' as const) : ('link' as const),
      address: options.peer,
      mode: options.mode ?? 'async',
      init: options.init ?? 'realized',
      intervalMs: options.intervalMs ?? LIMITS.mirrorIntervalMs,
      onLoss: options.onLoss ?? 'continue',
      rate: options.rate ?? null,
    }
  }

  /** Whether there may be a further mirror with it. @throws UserError */
  #checkPeer(session: Session): void {
    const known = [...this.#relations.values()].filter((relation) => relation.isPeer(session, undefined))
    if (known.length < LIMITS.mirrorsPerPeerMax) return
    const { name } = session.peer
    throw new UserError(
      'REFUSED',
      `there are ${known.length} mirrors with ${name}, which is the most that one peer can have: remove one first`,
    )
  }

  #checkName(volume: Volume, name: string): void {
    if (this.#pool.mirrors.of(volume.record.id).every(({ record }) => record.name !== name)) return
    throw new UserError(
      'EXISTS',
      `volume ${volume.name} has a mirror ${name} already: choose another name with --name`,
    )
  }

  /** The export has the volume's size or more; what lies behind the volume's end stays as it is. */
  async #addNbd(
    volume: Volume,
    options: MirrorAddOptions,
    settings: Pick<MirrorRecord, 'role' | 'kind' | 'mode' | 'init' | 'intervalMs' | 'onLoss' | 'rate'>,
  ): Promise<MirrorInfo> {
    const { uri, exportName, name: common } = parseNbdTarget(options.peer)
    if (options.target !== undefined)
      throw new UserError('USAGE', `${uri}: the URI names the export, --target is for volumes of daemons`)
    const name = options.name ?? uniqueName(common)
    this.#checkName(volume, name)
    for (const { record, object } of this.#relations.values()) {
      if (record.address === uri)
        throw new UserError('EXISTS', `${uri} is the target of mirror ${object} already`)
    }
    const { unitBytes } = volume
    const remote = await this.#targets.open(volume, uri, unitBytes)
    try {
      const peer = { name: uri, fingerprint: null, volume: exportName }
      const added = await this.#store(volume, {
        relation: randomUUID(),
        name,
        peer,
        unitBytes,
        ...settings,
        address: uri,
      })
      this.#targets.start(added, remote)
      return added.info()
    } catch (error) {
      remote.close('the mirror was not added')
      throw error
    }
  }

  #ask(session: Session, kind: AskKind, body: Record<string, unknown>): Promise<Fields> {
    return ask(session, kind, body)
  }
}

const NEED = 'mirror '
const NAME = /^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$/

/** Of a peer's name, for the mirror's. */
function uniqueName(peer: string): string {
  const name = peer
    .replace(/[^A-Za-z0-9._-]+/g, '-')
    .slice(0, 64)
    .replace(/^[^A-Za-z0-9]+|[^A-Za-z0-9]+$/g, '')
  return name === '' ? 'mirror' : name
}

function needOf(relation: string): string {
  return `${NEED}${relation}`
}

/** The mirror's unit, of the answer to `create`. @throws LinkError */
function readUnitBytes(answer: Fields, { unitBytes }: Volume): number {
  const agreed = answer.integer('unitBytes', unitBytes, LIMITS.formatUnitBytesMax)
  if (agreed % unitBytes === 0) return agreed
  throw new LinkError('BAD_FRAME', `${answer.what}: unitBytes is no multiple of ${unitBytes}`)
}

function checkTimes({ intervalMs, rate }: MirrorChange, what: string): void {
  const { mirrorIntervalMsMin: min, mirrorIntervalMsMax: max } = LIMITS
  if (
    intervalMs !== undefined &&
    !(Number.isSafeInteger(intervalMs) && intervalMs >= min && intervalMs <= max)
  ) {
    throw new UserError('USAGE', `${what}: the interval has to be ${min} ms to 24 h`)
  }
  if (rate !== undefined && rate !== null && !(Number.isSafeInteger(rate) && rate > 0)) {
    throw new UserError('USAGE', `${what}: the rate has to be a positive number of bytes a second`)
  }
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0
}

function asUserError(error: unknown, what: string): unknown {
  return error instanceof LinkError
    ? new UserError('FAILED', `${what}: ${error.message}`, { cause: error })
    : error
}

/** For what may fail without harm, because the other side cannot be asked. */
function userFailure(error: unknown): false {
  if (error instanceof UserError || error instanceof LinkError) return false
  throw error
}
