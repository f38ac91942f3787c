/**
 * fullstripe volume map NAME: the init bitmap, and in the same picture what its mirrors lack; as a picture for a terminal and as extents for
 * everything else. Extents are read in pages and written as they come, so a volume with millions of them needs no memory here.
 */
import type { CopyDensityInfo, CopyMapPage, DensityInfo, MapPage, MirrorList } from '../api/types.ts'
import { UserError } from '../base/errors.ts'
import { approximateSize, formatSize, parseSize } from '../base/sizes.ts'
import type { CopyExtent, MirrorInfo } from '../mirror/types.ts'
import type { MapExtent, VolumeInfo } from '../volume/volume.ts'
import { type Cli, clientOf, interruption, pause, type Root } from './cli.ts'
import { type Client, mirrorPath, volumePath } from './client.ts'
import { mirrorBar } from './mirror-text.ts'
import type { Output } from './output.ts'
import { cellsOf, legend, mirrorLegend, type PictureStyle, picture } from './picture.ts'
import { Screen } from './screen.ts'
import { padEnd, padStart, percent } from './text.ts'

/** With a picture above them, only this many extents are listed unasked. */
const EXTENTS_BELOW_PICTURE = 16
const PICTURE_LINES_MAX = 16
const WATCH_MS = 500

export function mapCommand(group: Root, cli: Cli): void {
  group.command(
    'map <name>',
    'Show which parts of a volume are formatted (hold data), and which its mirrors lack',
    (command) =>
      command
        .positional('name', { type: 'string', demandOption: true, describe: 'The volume' })
        .option('offset', { type: 'string', requiresArg: true, default: '0', describe: 'Where to start' })
        .option('length', {
          type: 'string',
          requiresArg: true,
          describe: 'How far',
          defaultDescription: 'to the end',
        })
        .option('draw', { type: 'boolean', describe: 'Draw a picture', defaultDescription: 'on a terminal' })
        .option('extents', {
          type: 'boolean',
          default: false,
          describe: 'List all extents, also below a picture',
        })
        .option('mirror', {
          type: 'string',
          requiresArg: true,
          describe: 'Only this mirror: draw it, and list what it lacks',
          defaultDescription: 'draw what any mirror lacks',
        })
        .option('watch', {
          alias: 'w',
          type: 'boolean',
          default: false,
          describe: 'Only the picture, as it changes',
        })
        .example('fullstripe volume map data', 'a picture, on a terminal')
        .example('fullstripe volume map data --watch', 'see a mirror fill')
        .example('fullstripe volume map data --json', 'all extents'),
    async (argv) => {
      const client = clientOf(argv)
      const offset = parseSize(argv.offset, '--offset')
      const range: Range =
        argv.length === undefined ? { offset } : { offset, length: parseSize(argv.length, '--length') }
      const { output } = cli
      const subject: Subject = { name: argv.name, mirror: argv.mirror }
      if (argv.watch) {
        if (offset !== 0 || argv.length !== undefined || argv.extents) {
          throw new UserError(
            'USAGE',
            '--watch draws the whole volume: without --offset, --length and --extents',
          )
        }
        return watch(client, subject, output)
      }
      if (output.json) return printJson(client, subject, range, output)
      const whole = argv.offset === '0' && argv.length === undefined
      const drawn = argv.draw ?? (output.terminal && whole)
      if (drawn) {
        for (const line of drawing(await look(client, subject, output), output)) output.line(line)
        output.line()
      }
      await printExtents(
        client,
        subject,
        range,
        output,
        drawn && !argv.extents ? EXTENTS_BELOW_PICTURE : undefined,
      )
    },
  )
}

interface Subject {
  readonly name: string
  readonly mirror: string | undefined
}

interface Range {
  readonly offset: number
  readonly length?: number
}

type Page = MapPage | CopyMapPage

async function* pagesOf(
  client: Client,
  { name, mirror }: Subject,
  range: Range,
  limit: number,
): AsyncGenerator<Page> {
  const end = range.length === undefined ? undefined : range.offset + range.length
  for (let offset: number | null = range.offset; offset !== null; ) {
    const length: string = end === undefined ? '' : `&length=${end - offset}`
    const tail: string = `/map?offset=${offset}${length}&limit=${limit}`
    const page: Page = await client.get<Page>(
      mirror === undefined ? volumePath(name, tail) : mirrorPath(name, mirror, tail),
    )
    yield page
    offset = page.next
  }
}

async function printJson(client: Client, subject: Subject, range: Range, output: Output): Promise<void> {
  let first = true
  for await (const page of pagesOf(client, subject, range, 5000)) {
    const { offset: _, extents, next: __, ...head } = page
    if (first) process.stdout.write(`${JSON.stringify(head).slice(0, -1)},"extents":[`)
    const texts = extents.map((extent) => JSON.stringify(extent))
    if (texts.length > 0) process.stdout.write(`${first ? '' : ','}\n${texts.join(',\n')}`)
    first = false
    await output.drained()
  }
  process.stdout.write('\n]}\n')
}

/** All extents, or, with `most`, all or none: a remark says how to see the rest. */
async function printExtents(
  client: Client,
  subject: Subject,
  range: Range,
  output: Output,
  most?: number,
): Promise<void> {
  let header = false
  for await (const page of pagesOf(client, subject, range, most === undefined ? 5000 : most + 1)) {
    if (most !== undefined && page.extents.length > most) {
      output.line('many extents; list them with: --extents')
      return
    }
    if (!header) {
      output.line(extentLine('OFFSET', 'LENGTH', subject.mirror === undefined ? 'FORMATTED' : 'COPIED', ''))
    }
    header = true
    for (const extent of page.extents) output.line(extentText(extent))
    await output.drained()
  }
}

/** Columns of a fixed width, because the rows are not all known when the first one is written. */
function extentLine(offset: string, length: string, state: string, remark: string): string {
  return `${padStart(offset, 16)}  ${padStart(length, 16)}  ${padEnd(state, 9)}  ${remark}`.trimEnd()
}

function extentText(extent: MapExtent | CopyExtent): string {
  const yes = 'formatted' in extent ? extent.formatted : extent.copied
  const remark = 'suspect' in extent && extent.suspect === true ? 'suspect' : ''
  return extentLine(formatSize(extent.offset), formatSize(extent.length), yes ? 'yes' : 'no', remark)
}

type Canvas = Pick<Output, 'columns' | 'rows' | 'colour' | 'unicode'>

/** Everything that is drawn, read at about the same time. */
export interface View {
  readonly info: Pick<VolumeInfo, 'name' | 'size' | 'used' | 'stripes' | 'stripesFormatted' | 'intents'>
  readonly cells: readonly number[]
  readonly mirrors: readonly MirrorInfo[]
  /** What the mirrors lack, of each its own. */
  readonly lacking: readonly (readonly number[])[]
}

async function look(client: Client, { name, mirror }: Subject, output: Output): Promise<View> {
  const { mirrors: ours } = await client.get<MirrorList>(volumePath(name, '/mirrors'))
  const mirrors = mirror === undefined ? ours : ours.filter((each) => each.name === mirror)
  if (mirror !== undefined && mirrors.length === 0)
    throw new UserError('NOT_FOUND', `volume ${name} has no mirror ${mirror}`)
  const wanted = cellsOf(styleOf(output, mirrors.length))
  const info = await client.get<VolumeInfo>(volumePath(name))
  const { cells } = await client.get<DensityInfo>(volumePath(name, `/density?cells=${wanted}`))
  const lacking: (readonly number[])[] = []
  for (const each of mirrors) {
    const path = mirrorPath(name, each.name, `/density?cells=${Math.max(1, cells.length)}`)
    lacking.push((await client.get<CopyDensityInfo>(path)).cells)
  }
  return { info, cells, mirrors, lacking }
}

export function styleOf({ columns, rows, colour, unicode }: Canvas, mirrors: number): PictureStyle {
  const below = 8 + (mirrors > 0 ? mirrors + 1 : 0)
  return {
    width: Math.min(columns, 128),
    linesMax: Math.max(1, Math.min(PICTURE_LINES_MAX, rows - below)),
    colour,
    unicode,
  }
}

/** The lines of a picture with what belongs to it. */
export function drawing({ info, cells, mirrors, lacking }: View, output: Canvas): string[] {
  const style = styleOf(output, mirrors.length)
  const suspect = info.intents?.suspect ?? 0
  const suspectText = suspect > 0 ? `, ${approximateSize(suspect)} suspect since an unclean stop` : ''
  const share = percent(info.stripesFormatted, info.stripes)
  const lines = [
    ...picture(cells, style, lacking),
    `${legend(style)}   one cell = ${approximateSize(info.size / Math.max(1, cells.length))}`,
  ]
  if (mirrors.length > 0) lines.push(mirrorLegend(style, mirrors.length))
  lines.push(
    `${info.name}: ${share} of ${approximateSize(info.size)} formatted, ${approximateSize(info.used)} used${suspectText}`,
    ...mirrors.map((mirror) => mirrorBar(mirror, output.columns, output.unicode)),
  )
  return lines
}

async function watch(client: Client, subject: Subject, output: Output): Promise<void> {
  const stop = interruption()
  const screen = output.terminal && !output.json ? new Screen(output) : undefined
  try {
    while (!stop.signal.aborted) {
      const view = await look(client, subject, output)
      if (output.json) output.object(view)
      else if (screen !== undefined) screen.draw(drawing(view, output))
      else for (const line of [...drawing(view, output), '']) output.line(line)
      await output.drained()
      await pause(WATCH_MS, stop.signal)
    }
  } finally {
    stop.restore()
  }
}
