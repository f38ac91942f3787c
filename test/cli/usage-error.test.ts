import { describe, expect, it } from 'vitest'
import { run } from '../../src/cli/run.ts'

/** What a command line that yargs refuses is answered with, up to the hint and after it. */
async function refusal(...args: string[]): Promise<{ code: number; text: string }> {
  const written: string[] = []
  const write = process.stderr.write
  process.stderr.write = (text: string | Uint8Array) => {
    written.push(String(text))
    return true
  }
  try {
    return { code: await run(args), text: written.join('') }
  } finally {
    process.stderr.write = write
  }
}

describe('wrong usage', () => {
  it.each([
    [[], 'which command? see: fullstripe --help'],
    [['pool'], 'which pool command? see: fullstripe pool --help'],
    [['volme'], 'there is no command "volme": did you mean volume? see: fullstripe --help'],
    [
      ['volume', 'crate', 'x'],
      'there is no command "crate": did you mean create? see: fullstripe volume --help',
    ],
    [['--pool', '/x', 'volume', 'xyzzy'], 'there is no command "xyzzy"; see: fullstripe volume --help'],
    [['volume', 'xyzzy'], 'there is no command "xyzzy"; see: fullstripe volume --help'],
    [['volume', 'create'], '1 argument needed, not 0; see: fullstripe volume create --help'],
    [['volume', 'rename', 'a'], '2 arguments needed, not 1; see: fullstripe volume rename --help'],
    [['volume', 'create', 'x'], '--size must be given; see: fullstripe volume create --help'],
    [['volume', 'create', 'x', '--size'], '--size needs a value; see: fullstripe volume create --help'],
    [
      ['volume', 'create', 'x', 'y', '--size', '1G'],
      'one argument too many: y; see: fullstripe volume create --help',
    ],
    [
      ['volume', 'create', 'x', '--size', '1G', '--sise=2'],
      'there is no option --sise; see: fullstripe volume create --help',
    ],
    [['status', '-z'], 'there is no option -z; see: fullstripe status --help'],
    [
      ['volume', 'create', 'x', '--size', '1G', '--provision', 'fat'],
      '--provision is one of "thin", "thick", not "fat"; see: fullstripe volume create --help',
    ],
    [
      ['volume', 'format', 'x', '--pause', '--wait'],
      '--pause and --wait exclude each other; see: fullstripe volume format --help',
    ],
    [['volume', 'create', 'x', '--size', '1G', '--size', '2G'], '--size is given more than once'],
    [['serve', 'p', '--threads', '0'], '--threads must be a whole number from 1 to 64, not "0"'],
    [
      ['volume', 'create', 'x', '--size', 'big'],
      '--size "big" is not a size: write bytes or use K, M, G, T, P (for example 64K or 10G)',
    ],
    [
      ['volume', 'create', 'x', '--size', '-5'],
      '--size "-5" is not a size: write bytes or use K, M, G, T, P (for example 64K or 10G)',
    ],
    [
      ['volume', 'create', 'x', '--size', '1G', '--fill', '256'],
      '--fill must be a whole number from 0 to 255, not "256"',
    ],
    [['volume', 'show', '..', '--pool', '/tmp'], '".." is not a volume name'],
    [['mirror'], 'which mirror command? see: fullstripe mirror --help'],
    [['mirror', 'add', 'x'], '2 arguments needed, not 1; see: fullstripe mirror add --help'],
    [
      ['mirror', 'add', 'x', 'b:1', '--interval', '5', '--pool', '/tmp'],
      '--interval "5" is not a duration: use ms, s, m, h, d (for example 500ms, 5s or 2m)',
    ],
    [
      ['mirror', 'add', 'x', 'b:1', '--on-loss', 'block', '--pool', '/tmp'],
      '--on-loss is for --mode sync: writes never wait for an async mirror',
    ],
    [
      ['mirror', 'add', 'x', 'b:1', '--mode', 'sync', '--interval', '1s', '--pool', '/tmp'],
      '--interval is for --mode async: a sync mirror has no cycles',
    ],
    [
      ['mirror', 'add', 'x', 'b:1', '--init', 'seed'],
      '--init is one of "realized", "signature", "full", not "seed"; see: fullstripe mirror add --help',
    ],
    [
      ['mirror', 'set', 'x', '--pool', '/tmp'],
      'what is to change? give --mode, --interval, --on-loss or --rate',
    ],
    [['mirror', 'resolve', 'x'], '--discard must be given; see: fullstripe mirror resolve --help'],
    [
      ['mirror', 'wait', 'x', 'y', '--timeout', 'soon', '--pool', '/tmp'],
      '--timeout "soon" is not a duration: use ms, s, m, h, d (for example 500ms, 5s or 2m)',
    ],
    [['mirror', 'show', 'x', '..', '--pool', '/tmp'], '".." is not a mirror\'s name'],
    [
      ['volume', 'map', 'x', '--watch', '--extents', '--pool', '/tmp'],
      '--watch draws the whole volume: without --offset, --length and --extents',
    ],
    [
      ['volume', 'map', 'x', '--watch', '--length', '1M', '--pool', '/tmp'],
      '--watch draws the whole volume: without --offset, --length and --extents',
    ],
    [['bench', 'x', '--block', '1000'], '--block must be a multiple of 512 up to 32M, not 1000'],
  ])('%j', async (args, message) => {
    expect(await refusal(...args)).toEqual({ code: 2, text: `fullstripe: ${message}\n` })
  })

  it('is a JSON object with --json', async () => {
    const { code, text } = await refusal('volume', 'list', '--json', '--bar')
    expect(code).toBe(2)
    expect(JSON.parse(text)).toEqual({
      error: { code: 'USAGE', message: 'there is no option --bar; see: fullstripe volume list --help' },
    })
  })
})
