/**
 * A daemon without command line and control API, which a test starts ahead of time: everything is loaded, then it waits
 * to be told to open a pool. That makes a life cheap enough for hundreds of them.
 *
 *   standard input    one JSON object a line: { id, command, ... }
 *   standard output   { id: 0 } when it is loaded; { id, result } or { id, error } for each command
 */
import { createInterface } from 'node:readline'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { pino } from 'pino'
import { resolveConfig } from '../../dist/daemon/config.js'
import { Daemon } from '../../dist/daemon/daemon.js'

let daemon
let guests = false

const commands = {
  /** Opens the pool and listens. */
  async open({ pool, datapath, threads, link }) {
    const log = pino({ level: process.env.TEST_LOG ?? 'silent' }, pino.destination({ fd: 2, sync: true }))
    const listen = [`nbd+unix:///?socket=${pool}/nbd.sock`]
    const given = { threads, link }
    const chosen = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined))
    daemon = await Daemon.start(resolveConfig(pool, { datapath, listen, ...chosen }), log)
    return daemon.pool.datapath.description
  },
  /** Starts the background formatter of a thick volume. */
  async format({ volume, rate }) {
    await daemon.pool.volume(volume).startFormatter(rate === undefined ? {} : { rate })
  },
  /**
   * Volumes come and go from now on, as fast as they can, or so many times: each change makes a checkpoint of everything, and
   * takes or gives back slots.
   */
  async guests({ size, on, changes = Number.POSITIVE_INFINITY }) {
    guests = on
    if (on) void entertain(size, changes)
  },
  /** Connections that the datapath serves. */
  async sessions() {
    return daemon.pool.volumes().reduce((sum, volume) => sum + volume.info().sessions, 0)
  },
  /** Asks the mirrors (MirrorControl). */
  async mirror({ method, args }) {
    return daemon.mirrors[method](...args.map((arg) => arg ?? undefined))
  },
  /** HOST:PORT for peers. */
  async listening() {
    return daemon.mirrors.listening
  },
  async stop() {
    await daemon.stop()
  },
}

async function entertain(size, changes) {
  for (let n = 0; guests && n < changes; n++) {
    const old = daemon.pool.volumes().some((volume) => volume.name === 'guest')
    if (old) await daemon.pool.deleteVolume('guest', { force: true })
    else await daemon.pool.createVolume({ name: 'guest', size, provision: 'thick' }).catch(refused)
    await nextTurn() // where it is refused again and again, the others go on
  }
}

/** The others may have left no room for a guest, or none in one piece; anything else ends the daemon. */
function refused(error) {
  if (error?.code !== 'FAILED' || !error.message.includes('no contiguous')) throw error
}

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`)
const input = createInterface({ input: process.stdin })
input.on('line', async (line) => {
  const { id, command, ...rest } = JSON.parse(line)
  try {
    say({ id, result: (await commands[command](rest)) ?? null })
  } catch (error) {
    say({ id, error: String(error?.stack ?? error) })
  }
})
// Whoever started it is done with it, or is gone.
input.on('close', () => process.exit())
say({ id: 0 })
