/**
 * Draws the init bitmap as a block picture: shares (0..1), cell after cell, row after row; and into the same cells what a mirror lacks.
 *
 *   colour   half blocks: two rows of cells in a line of text, the share is the colour: grey, then greens
 *   unicode  one row a line: · nothing, ░ ▒ ▓ in between, █ all
 *   ASCII    one row a line: . - + * #
 *
 * A cell with anything that the secondary lacks is one of these instead, whatever its share, so that a copy is seen to end:
 *
 *   colour  unicode  ASCII
 *   yellow     ○       o     the secondary lacks a part of what is formatted there
 *   red        ●       O     it lacks all of it
 *   violet     ×       x     nothing is formatted; the secondary has yet to give back what it has there
 *
 * A cell that holds anything is never drawn as empty, one that lacks anything never as full, one that is not copied never as copied.
 */
export interface PictureStyle {
  readonly width: number // columns
  readonly linesMax: number
  readonly colour: boolean
  readonly unicode: boolean
}

/** Five shades from empty to full, then what the secondary lacks: a part, all, only a trim. */
const UNICODE_SIGNS = ['·', '░', '▒', '▓', '█', '○', '●', '×'] as const
const ASCII_SIGNS = ['.', '-', '+', '*', '#', 'o', 'O', 'x'] as const
/** The same in the 256-colour palette. */
const COLOURS = [236, 22, 28, 34, 46, 220, 160, 91] as const
type Sign = 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7

/** How many cells fill a picture of this style: ask for that many shares. */
export function cellsOf(style: PictureStyle): number {
  return style.width * style.linesMax * (halfBlocks(style) ? 2 : 1)
}

/**
 * Lines of the picture; `shares` may be fewer than `cellsOf(style)`, a small volume has no more units.
 * @param lacking for each mirror the shares that it lacks, in cells of its own number; the one that lacks most is drawn
 */
export function picture(
  shares: readonly number[],
  style: PictureStyle,
  lacking: readonly (readonly number[])[] = [],
): string[] {
  const { width } = style
  const signs = shares.map((share, cell) =>
    signOf(share, Math.max(0, ...lacking.map((mirror) => mostOf(mirror, cell, shares.length)))),
  )
  const rows: (readonly Sign[])[] = []
  for (let at = 0; at < signs.length; at += width) rows.push(signs.slice(at, at + width))
  if (!halfBlocks(style)) return rows.map((row) => row.map((sign) => plain(style)[sign]).join(''))
  const lines: string[] = []
  for (let row = 0; row < rows.length; row += 2)
    lines.push(halfBlockLine(rows[row] ?? [], rows[row + 1] ?? []))
  return lines
}

/** The most that is lacking anywhere in one of `cells` cells. */
function mostOf(mirror: readonly number[], cell: number, cells: number): number {
  const from = Math.floor((cell * mirror.length) / cells)
  const to = Math.ceil(((cell + 1) * mirror.length) / cells)
  return Math.max(0, ...mirror.slice(from, to))
}

/** What the signs mean, in one line. */
export function legend(style: PictureStyle): string {
  const sign = signsOf(style)
  return `${sign(0)} unformatted  ${sign(1)}${sign(2)}${sign(3)} partly  ${sign(4)} formatted`
}

/** What the signs of mirrors mean, in one line. */
export function mirrorLegend(style: PictureStyle, mirrors = 1): string {
  const sign = signsOf(style)
  const who = mirrors === 1 ? 'the mirror lacks' : 'some mirror lacks'
  return `${who}: ${sign(5)} a part  ${sign(6)} all of it  ${sign(7)} only a trim`
}

function signsOf(style: PictureStyle): (sign: Sign) => string {
  if (halfBlocks(style)) return (sign) => `\x1b[38;5;${COLOURS[sign]}m█\x1b[0m`
  return (sign) => plain(style)[sign]
}

function plain(style: PictureStyle): typeof UNICODE_SIGNS | typeof ASCII_SIGNS {
  return style.unicode ? UNICODE_SIGNS : ASCII_SIGNS
}

function halfBlocks(style: PictureStyle): boolean {
  return style.colour && style.unicode
}

function signOf(share: number, lacking: number): Sign {
  if (lacking > 0) {
    if (share <= 0) return 7
    return lacking >= share ? 6 : 5
  }
  if (share <= 0) return 0
  if (share >= 1) return 4
  return share < 1 / 3 ? 1 : share < 2 / 3 ? 2 : 3
}

/** `▀` shows its foreground above its background; a sequence is only written where a colour changes. */
function halfBlockLine(upper: readonly Sign[], lower: readonly Sign[]): string {
  let line = ''
  let foreground = -1
  let background: number | undefined = -1
  upper.forEach((sign, column) => {
    const above = COLOURS[sign]
    const sign2 = lower[column]
    const below = sign2 === undefined ? undefined : COLOURS[sign2]
    if (above !== foreground) line += `\x1b[38;5;${above}m`
    if (below !== background) line += below === undefined ? '\x1b[49m' : `\x1b[48;5;${below}m`
    foreground = above
    background = below
    line += '▀'
  })
  return `${line}\x1b[0m`
}
