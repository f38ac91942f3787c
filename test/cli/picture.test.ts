import { stripVTControlCharacters } from 'node:util'
import { describe, expect, it } from 'vitest'
import { cellsOf, legend, type PictureStyle, picture } from '../../src/cli/picture.ts'

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
