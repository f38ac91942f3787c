import { parentPort } from 'node:worker_threads'
import { runSeed } from './simulation.ts'

/** A thread of campaign.ts: a seed comes in, its result goes out. */
const port = parentPort
port?.on('message', (seed: number) => {
  runSeed(seed).then((result) => port.postMessage(result))
})
