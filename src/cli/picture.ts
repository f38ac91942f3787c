/**
 * Draws shares (0..1, cell after cell, row after row) as a block picture.
 *
 *   colour   half blocks: two rows of cells in a line of text, the share is the colour
 *   unicode  one row a line: · nothing, ░ ▒ ▓ in between, █ all
 *   ASCII    one row a line: . - + * #
 *
 * A cell that holds anything is never drawn as empty, one that lacks anything never as full.
 */
export interface PictureStyle {
  readonly width: number // columns
  readonly linesMax: number
  readonly colour: boolean
  readonly unicode: boolean
}

const UNICODE_SHADES = ['·', '░', '▒', '▓', '█'] as const
const ASCII_SHADES = ['.', '-', '+', '*', '#'] as const
/** From empty to full, in the 256-colour palette: a dark grey, then greens. */
const COLOURS = [236, 22, 28, 34, 46] as const

/** How many cells fill a picture of this style: ask for that many shares. */
export function cellsOf(style: PictureStyle): number {
  return style.width * style.linesMax * (halfBlocks(style) ? 2 : 1)
}

/** Lines of the picture; `shares` may be fewer than `cellsOf(style)`, a small volume has no more units. */
export function picture(shares: readonly number[], style: PictureStyle): string[] {
  const { width } = style
  const rows: (readonly number[])[] = []
  for (let at = 0; at < shares.length; at += width) rows.push(shares.slice(at, at + width))
  if (!halfBlocks(style)) {
    const shades = style.unicode ? UNICODE_SHADES : ASCII_SHADES
    return rows.map((row) => row.map((share) => shades[level(share)]).join(''))
  }
  const lines: string[] = []
  for (let row = 0; row < rows.length; row += 2)
    lines.push(halfBlockLine(rows[row] ?? [], rows[row + 1] ?? []))
  return lines
}

/** What the signs mean, in one line. */
export function legend(style: PictureStyle): string {
  if (halfBlocks(style)) {
    const sign = (index: number) => `\x1b[38;5;${COLOURS[index] ?? 0}m█\x1b[0m`
    return `${sign(0)} unformatted  ${sign(1)}${sign(2)}${sign(3)} partly  ${sign(4)} formatted`
  }
  const [empty, a, b, c, full] = style.unicode ? UNICODE_SHADES : ASCII_SHADES
  return `${empty} unformatted  ${a}${b}${c} partly  ${full} formatted`
}

function halfBlocks(style: PictureStyle): boolean {
  return style.colour && style.unicode
}

function level(share: number): 0 | 1 | 2 | 3 | 4 {
  if (share <= 0) return 0
  if (share >= 1) return 4
  return share < 1 / 3 ? 1 : share < 2 / 3 ? 2 : 3
}

/** `▀` shows its foreground above its background; a sequence is only written where a colour changes. */
function halfBlockLine(upper: readonly number[], lower: readonly number[]): string {
  let line = ''
  let foreground = -1
  let background: number | undefined = -1
  upper.forEach((share, column) => {
    const above = COLOURS[level(share)]
    const share2 = lower[column]
    const below = share2 === undefined ? undefined : COLOURS[level(share2)]
    if (above !== foreground) line += `\x1b[38;5;${above}m`
    if (below !== background) line += below === undefined ? '\x1b[49m' : `\x1b[48;5;${below}m`
    foreground = above
    background = below
    line += '▀'
  })
  return `${line}\x1b[0m`
}
