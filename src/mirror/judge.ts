import type { GenerationRecord, MirrorRecord } from '../metadata/records.ts'
import type { RemoteHello } from './remote.ts'
import type { MirrorInit } from './types.ts'

/**
 * What a primary makes of the other side's hello, by generation ids (as DRBD does). `base` is the generation that its copy bitmap counts
 * from: content that both sides had.
 *
 *   the other is primary, too                    splitbrain
 *   it was never consistent                      go on with the bitmap where that is of this very copy, else compare
 *   it is some commits behind                    compare: it was set back, to a backup for instance
 *   it is more than one commit ahead             this side was set back: compare, or, where it has later content, splitbrain
 *   its generation is our base, or ours          resume: the bitmap, and what it says of itself, is all that differs
 *   its generation is an older one of ours       compare: it missed a change of roles
 *   anything else                                splitbrain: it has content that this side knows nothing of
 */
export type Verdict =
  | { readonly kind: 'resume' }
  | { readonly kind: 'compare'; readonly init: MirrorInit; readonly reason: string }
  | { readonly kind: 'splitbrain'; readonly reason: string }

export function judge(
  record: Pick<MirrorRecord, 'clean' | 'base' | 'cycle' | 'init'>,
  own: GenerationRecord,
  hello: RemoteHello,
): Verdict {
  const { clean, base, cycle } = record
  if (hello.role === 'primary') {
    return {
      kind: 'splitbrain',
      reason: 'both sides are primary: settle it with `mirror resolve --discard local|remote`',
    }
  }
  if (!clean) return { kind: 'compare', init: record.init, reason: 'the sides were not compared yet' }
  if (hello.cycle < cycle) {
    const reason = `the peer is at cycle ${hello.cycle} and was at ${cycle}: it was set back, so both sides are compared`
    return { kind: 'compare', init: safe(record.init), reason }
  }
  const theirs = hello.generation?.current
  // A commit of which the answer was lost makes one.
  const ahead = hello.cycle > cycle + 1
  const behind = `the peer is at cycle ${hello.cycle}, and this side only knows of ${cycle}: this side was set back`
  // In one generation what it has is what was written here, and is not here any more.
  if (ahead && hello.consistent && theirs === own.current) {
    const settle = 'settle it with `mirror resolve --discard local|remote`'
    return { kind: 'splitbrain', reason: `${behind}, and the peer has what came later: ${settle}` }
  }
  // Ours where the commit that brought it was not noted here any more: what it had cleared is sent once more.
  if (!hello.consistent || theirs === base || theirs === own.current) {
    if (!ahead) return { kind: 'resume' }
    return { kind: 'compare', init: safe(record.init), reason: `${behind}, so both sides are compared` }
  }
  if (theirs !== undefined && own.history.includes(theirs)) {
    const reason = 'the peer has content of an earlier generation, so both sides are compared'
    return { kind: 'compare', init: safe(record.init), reason }
  }
  return {
    kind: 'splitbrain',
    reason: `the peer has generation ${theirs ?? 'none'}, which this side does not know: settle it with \`mirror resolve --discard local|remote\``,
  }
}

/** Where content is on both sides, what is the same need not travel again. */
function safe(init: MirrorInit): MirrorInit {
  return init === 'full' ? 'realized' : init
}
