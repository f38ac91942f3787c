/**
 * fullstripe volume map NAME: the init bitmap, as a picture for a terminal and as extents for everything else.
 * Extents are read in pages and written as they come, so a volume with millions of them needs no memory here.
 */
import type { DensityInfo, MapPage } from '../api/types.ts'
import { approximateSize, formatSize, parseSize } from '../base/sizes.ts'
import type { MapExtent, VolumeInfo } from '../volume/volume.ts'
import { type Cli, clientOf, type Root } from './cli.ts'
import { type Client, volumePath } from './client.ts'
import type { Output } from './output.ts'
import { cellsOf, legend, type PictureStyle, picture } from './picture.ts'
import { padEnd, padStart, percent } from './text.ts'

/** With a picture above them, only this many extents are listed unasked. */
const EXTENTS_BELOW_PICTURE = 16
const PICTURE_LINES_MAX = 16

export function mapCommand(group: Root, cli: Cli): void {
  group.command(
    'map <name>',
    'Show which parts of a volume are formatted (hold data)',
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
        .example('fullstripe volume map data', 'a picture, on a terminal')
        .example('fullstripe volume map data --json', 'all extents'),
    async (argv) => {
      const client = clientOf(argv)
      const offset = parseSize(argv.offset, '--offset')
      const range: Range =
        argv.length === undefined ? { offset } : { offset, length: parseSize(argv.length, '--length') }
      const { output } = cli
      if (output.json) return printJson(client, argv.name, range, output)
      const whole = argv.offset === '0' && argv.length === undefined
      const drawn = argv.draw ?? (output.terminal && whole)
      if (drawn) await draw(client, argv.name, output)
      await printExtents(
        client,
        argv.name,
        range,
        output,
        drawn && !argv.extents ? EXTENTS_BELOW_PICTURE : undefined,
      )
    },
  )
}

interface Range {
  readonly offset: number
  readonly length?: number
}

async function* pagesOf(client: Client, name: string, range: Range, limit: number): AsyncGenerator<MapPage> {
  const end = range.length === undefined ? undefined : range.offset + range.length
  for (let offset: number | null = range.offset; offset !== null; ) {
    const length: string = end === undefined ? '' : `&length=${end - offset}`
    const page: MapPage = await client.get<MapPage>(
      volumePath(name, `/map?offset=${offset}${length}&limit=${limit}`),
    )
    yield page
    offset = page.next
  }
}

async function printJson(client: Client, name: string, range: Range, output: Output): Promise<void> {
  let first = true
  for await (const page of pagesOf(client, name, range, 5000)) {
    if (first) process.stdout.write(`{"name":${JSON.stringify(page.name)},"size":${page.size},"extents":[`)
    const texts = page.extents.map((extent) => JSON.stringify(extent))
    if (texts.length > 0) process.stdout.write(`${first ? '' : ','}\n${texts.join(',\n')}`)
    first = false
    await output.drained()
  }
  process.stdout.write('\n]}\n')
}

/** All extents, or, with `most`, all or none: a remark says how to see the rest. */
async function printExtents(
  client: Client,
  name: string,
  range: Range,
  output: Output,
  most?: number,
): Promise<void> {
  let header = false
  for await (const page of pagesOf(client, name, range, most === undefined ? 5000 : most + 1)) {
    if (most !== undefined && page.extents.length > most) {
      output.line('many extents; list them with: --extents')
      return
    }
    if (!header) output.line(extentLine('OFFSET', 'LENGTH', 'FORMATTED', ''))
    header = true
    for (const extent of page.extents) output.line(extentText(extent))
    await output.drained()
  }
}

/** Columns of a fixed width, because the rows are not all known when the first one is written. */
function extentLine(offset: string, length: string, formatted: string, remark: string): string {
  return `${padStart(offset, 16)}  ${padStart(length, 16)}  ${padEnd(formatted, 9)}  ${remark}`.trimEnd()
}

function extentText({ offset, length, formatted, suspect }: MapExtent): string {
  const remark = suspect === true ? 'suspect' : ''
  return extentLine(formatSize(offset), formatSize(length), formatted ? 'yes' : 'no', remark)
}

async function draw(client: Client, name: string, output: Output): Promise<void> {
  const style: PictureStyle = {
    width: Math.min(output.columns, 128),
    linesMax: Math.max(1, Math.min(PICTURE_LINES_MAX, output.rows - 8)),
    colour: output.colour,
    unicode: output.unicode,
  }
  const density = await client.get<DensityInfo>(volumePath(name, `/density?cells=${cellsOf(style)}`))
  const info = await client.get<VolumeInfo>(volumePath(name))
  for (const line of picture(density.cells, style)) output.line(line)
  const share = percent(info.stripesFormatted, info.stripes)
  output.line(
    `${legend(style)}   one cell = ${approximateSize(info.size / Math.max(1, density.cells.length))}`,
  )
  const suspect = info.intents?.suspect ?? 0
  const suspectText = suspect > 0 ? `, ${approximateSize(suspect)} suspect since an unclean stop` : ''
  output.line(
    `${info.name}: ${share} of ${approximateSize(info.size)} formatted, ${approximateSize(info.used)} used${suspectText}`,
  )
  output.line()
}
