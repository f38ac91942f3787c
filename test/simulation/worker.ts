import { parentPort } from 'node:worker_threads'
import { WORLDS, type World } from './campaign.ts'

/** A thread of campaign.ts: a seed comes in, its result goes out. */
const port = parentPort
port?.on('message', ({ world, seed }: { world: World; seed: number }) => {
  WORLDS[world](seed).then((result) => port.postMessage(result))
})
