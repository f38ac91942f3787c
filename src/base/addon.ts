import { createRequire } from 'node:module'

const addonPath = '../../native/build/Release/node_nbd.node' // the same from src/base and dist/base

/**
 * Loads the native addon (native/, package node-nbd), once a process however often it is asked for. Whoever calls knows what it
 * exports, and checks it: an addon may be older or newer than this program.
 * @throws Error where it is not built or does not load
 */
export function loadAddon(path = addonPath): unknown {
  return createRequire(import.meta.url)(path)
}
