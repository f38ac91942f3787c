import { assert } from '../base/assert.ts'
import { COMMAND_FLAG, HEADER, type ReplyMode } from '../nbd/constants.ts'
import {
  dataChunkPrefixSize,
  holeChunkSize,
  type Request,
  writeDataChunkPrefix,
  writeHoleChunk,
  writeSimpleReply,
} from '../nbd/transmission.ts'
import type { Piece } from './table-lookup.ts'

/**
 * Lays out the reply to a read: which bytes are headers, where the data of each piece goes, which pieces are only
 * announced as holes.
 *
 *   simple      header | data of the whole range, unformatted stripes as fill
 *   structured  a chunk a run: data (prefix | bytes) or hole (no bytes); the last one says DONE
 *   extended    the same with longer headers
 *
 * A run ends where data turns into a hole or back. Without holes (DF, or a fill that is not zero) everything is one
 * run of data. Where all is one hole there is no data to cut in pieces, so DF has nothing against it.
 *
 * A reply may be laid out part by part. Simple ones, and those that must not be cut into chunks (DF), have one header in front of
 * the first part, which speaks of all of them; in others each part has chunks of its own.
 */
export interface ReadLayout {
  readonly request: Request
  readonly start: number // of the part: bytes into the request
  readonly length: number // of the part, bytes
  readonly mode: ReplyMode
  readonly holes: boolean // unformatted pieces may be sent as holes
  readonly fill: number // what unformatted pieces read as, where they are sent as data
  readonly pieces: readonly Piece[] // in order, without gaps, the whole part
}

/** Bytes of the part. */
export function readReplySize(layout: ReadLayout): number {
  const { mode, start, length } = layout
  const extended = mode === 'extended'
  if (hasOneHeader(layout)) {
    const header = mode === 'simple' ? HEADER.simpleReply : dataChunkPrefixSize(extended)
    return start === 0 ? header + length : length
  }
  let size = 0
  forEachRun(layout, (hole, length) => {
    size += hole ? holeChunkSize(extended) : dataChunkPrefixSize(extended) + length
  })
  return size
}

/**
 * Writes headers and fill bytes at `at` of `target`, and calls `io` for each piece whose bytes are on members with the
 * position where they belong. Exactly `readReplySize` bytes.
 */
export function composeRead(
  layout: ReadLayout,
  target: Buffer,
  at: number,
  io: (piece: Piece, at: number) => void,
): void {
  const { request, mode, pieces, fill } = layout
  const extended = mode === 'extended'
  let position = at
  const putData = (first: number, end: number): void => {
    for (let index = first; index < end; index++) {
      const piece = pieces[index]
      assert(piece !== undefined)
      if (piece.slot === 0) target.fill(fill, position, position + piece.length)
      else io(piece, position)
      position += piece.length
    }
  }
  if (hasOneHeader(layout)) {
    if (layout.start === 0 && mode === 'simple') position = writeSimpleReply(target, at, request, 0)
    else if (layout.start === 0) {
      const { offset, length } = request
      position = writeDataChunkPrefix(target, at, request, extended, true, offset, length)
    }
    putData(0, pieces.length)
    return
  }
  forEachRun(layout, (hole, length, first, end, start) => {
    const done = layout.start + start + length === request.length
    const offset = request.offset + layout.start + start
    if (hole) {
      position = writeHoleChunk(target, position, request, extended, done, offset, length)
    } else {
      position = writeDataChunkPrefix(target, position, request, extended, done, offset, length)
      putData(first, end)
    }
  })
}

function hasOneHeader({ mode, request }: ReadLayout): boolean {
  return mode === 'simple' || (request.flags & COMMAND_FLAG.DF) !== 0
}

/** Calls back for each run of pieces [first, end) that travel in one chunk. */
function forEachRun(
  layout: ReadLayout,
  run: (hole: boolean, length: number, first: number, end: number, start: number) => void,
): void {
  const { pieces, holes } = layout
  for (let first = 0, start = 0; first < pieces.length; ) {
    const hole = holes && pieces[first]?.slot === 0
    let end = first
    let length = 0
    for (
      let piece = pieces[end];
      piece !== undefined && (holes && piece.slot === 0) === hole;
      piece = pieces[end]
    ) {
      length += piece.length
      end++
    }
    run(hole, length, first, end, start)
    start += length
    first = end
  }
}
