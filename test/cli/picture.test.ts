import { stripVTControlCharacters } from 'node:util'
import { describe, expect, it } from 'vitest'
import { cellsOf, legend, mirrorLegend, type PictureStyle, picture } from '../../src/cli/picture.ts'

const style = (colour: boolean, unicode: boolean): PictureStyle => ({
  width: 4,
  linesMax: 2,
  colour,
  unicode,
})

describe('the picture of an init bitmap', () => {
  it('has one row a line without colour', () => {
    expect(cellsOf(style(false, true))).toBe(8)
    expect(picture([0, 0.1, 0.5, 0.9, 1, 0, 1], style(false, true))).toEqual(['·░▒▓', '█·█'])
    expect(picture([0, 0.1, 0.5, 0.9, 1, 0, 1], style(false, false))).toEqual(['.-+*', '#.#'])
  })

  it('shows that there is something, and that something lacks', () => {
    expect(picture([1e-9, 1 - 1e-9], style(false, true))).toEqual(['░▓'])
  })

  it('has two rows a line in colour, and resets the colour at the end of each', () => {
    expect(cellsOf(style(true, true))).toBe(16)
    const lines = picture([1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 1], style(true, true))
    expect(lines.map((line) => stripVTControlCharacters(line))).toEqual(['▀▀▀▀', '▀▀▀▀'])
    expect(lines[0]).toBe(
      '\x1b[38;5;46m\x1b[48;5;46m▀\x1b[48;5;236m▀\x1b[38;5;236m\x1b[48;5;46m▀\x1b[48;5;236m▀\x1b[0m',
    )
    // The last line has no lower row: its background is the terminal's.
    expect(lines[1]).toBe('\x1b[38;5;46m\x1b[49m▀▀▀▀\x1b[0m')
  })

  it('uses no colour where there are no half blocks', () => {
    expect(picture([1, 0], style(true, false))).toEqual(['#.'])
    expect(legend(style(true, false))).toBe('. unformatted  -+* partly  # formatted')
  })
})

describe('the picture of an init bitmap and of what mirrors lack', () => {
  const ascii = style(false, false)

  it('says of each cell whether a part, all or only a trim is lacking', () => {
    const shares = [0, 0, 0.5, 0.5, 0.5, 1, 1, 1]
    const lacking = [0, 0.1, 0, 0.1, 0.5, 0, 0.5, 1]
    expect(picture(shares, ascii, [lacking])).toEqual(['.x+o', 'O#oO'])
    expect(picture(shares, style(false, true), [lacking])).toEqual(['·×▒○', '●█○●'])
    expect(mirrorLegend(ascii)).toBe('the mirror lacks: o a part  O all of it  x only a trim')
  })

  it('never shows as copied what is not', () => {
    expect(picture([1, 1, 1], ascii, [[1e-9, 0, 0]])).toEqual(['o##'])
    // Copy units are larger than format units: three cells of two.
    expect(picture([1, 1, 1], ascii, [[0, 1]])).toEqual(['#OO'])
    // And the other way round: a cell shows the worst of what lies in it.
    expect(picture([1, 1], ascii, [[0, 0, 0.5, 0, 1, 0]])).toEqual(['oO'])
  })

  it('shows of several mirrors the one that lacks most', () => {
    const two = [
      [0, 0.5, 0],
      [0, 1, 0.1],
    ]
    expect(picture([1, 1, 1], ascii, two)).toEqual(['#Oo'])
    expect(mirrorLegend(ascii, 2)).toMatch(/^some mirror lacks: /)
  })

  it('uses other colours, not other signs, in colour', () => {
    const [line = ''] = picture([1, 1, 1, 0], style(true, true), [[0, 0.5, 1, 1]])
    expect(line).toBe('\x1b[38;5;46m\x1b[49m▀\x1b[38;5;220m▀\x1b[38;5;160m▀\x1b[38;5;91m▀\x1b[0m')
  })
})
