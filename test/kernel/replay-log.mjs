/**
 * Reads what dm-log-writes noted on its log device, and builds from it what a disk holds after so many entries.
 *
 *   replay-log.mjs list LOG                    entries, then `mark INDEX TEXT` for each mark
 *   replay-log.mjs apply LOG IMAGE FROM TO     entries [FROM, TO) into IMAGE
 *
 * Layout, in sectors of the size that the first one names, numbers little-endian:
 *
 *   0     | magic u64 | version u64 | entries u64 | sector size u32 |
 *   then  | sector u64 | sectors u64 | flags u64 | data length u64 | the text of a mark |, and the data in sectors of its own
 *
 * The driver notes a write when it has completed and a flush follows, so every prefix of the log is something that a disk
 * without power may be found with.
 */
import { closeSync, openSync, readSync, writeSync } from 'node:fs'

const MAGIC = 0x6a736677736872n
const VERSION = 1n
const FLAG_DISCARD = 4
const FLAG_MARK = 8
const STEP = 1 << 20 // bytes copied at a time

const [action, path, image, from, to] = process.argv.slice(2)
const log = openSync(path, 'r')
const start = read(0, 512)
if (start.readBigUInt64LE(0) !== MAGIC || start.readBigUInt64LE(8) !== VERSION) {
  throw new Error(`${path} holds no log of dm-log-writes`)
}
const count = Number(start.readBigUInt64LE(16))
const sectorSize = start.readUInt32LE(24)

if (action === 'list') {
  console.log(count)
  for (const { index, flags, text } of entries())
    if ((flags & FLAG_MARK) !== 0) console.log(`mark ${index} ${text}`)
} else if (action === 'apply') {
  const target = openSync(image, 'r+')
  for (const entry of entries()) {
    if (entry.index >= Number(to)) break
    if (entry.index >= Number(from)) apply(entry, target)
  }
  closeSync(target)
} else {
  throw new Error('usage: replay-log.mjs list LOG | apply LOG IMAGE FROM TO')
}

function* entries() {
  let at = sectorSize
  for (let index = 0; index < count; index++) {
    const header = read(at, sectorSize)
    const sector = Number(header.readBigUInt64LE(0))
    const sectors = Number(header.readBigUInt64LE(8))
    const flags = Number(header.readBigUInt64LE(16))
    const textLength = Number(header.readBigUInt64LE(24))
    const text = header.toString('latin1', 32, 32 + textLength)
    const data = at + sectorSize
    yield { index, offset: sector * sectorSize, length: sectors * sectorSize, flags, text, data }
    at = data + ((flags & (FLAG_DISCARD | FLAG_MARK)) === 0 ? sectors * sectorSize : 0)
  }
}

function apply({ offset, length, flags, data }, target) {
  if ((flags & FLAG_MARK) !== 0) return
  for (let done = 0; done < length; done += STEP) {
    const part = Math.min(STEP, length - done)
    const bytes = (flags & FLAG_DISCARD) === 0 ? read(data + done, part) : Buffer.alloc(part)
    writeSync(target, bytes, 0, part, offset + done)
  }
}

function read(at, length) {
  const bytes = Buffer.alloc(length)
  for (let got = 0; got < length; ) {
    const more = readSync(log, bytes, got, length - got, at + got)
    if (more === 0) throw new Error(`${path} ends at ${at + got}`)
    got += more
  }
  return bytes
}
