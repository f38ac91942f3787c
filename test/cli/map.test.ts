import { describe, expect, it } from 'vitest'
import { drawing, styleOf, type View } from '../../src/cli/map.ts'
import { cellsOf } from '../../src/cli/picture.ts'
import { textWidth } from '../../src/cli/text.ts'
import { MIRROR } from '../support/mirror-sample.ts'

const canvas = { columns: 80, rows: 24, colour: false, unicode: false }
const alone: View = {
  info: { name: 'data', size: 2 ** 18, used: 2 ** 17, stripes: 4, stripesFormatted: 2, intents: null },
  cells: [1, 0, 1, 0],
  mirrors: [],
  lacking: [],
}

describe('the drawing of a volume', () => {
  it('says nothing of mirrors where there are none', () => {
    expect(drawing(alone, canvas)).toEqual([
      '#.#.',
      '. unformatted  -+* partly  # formatted   one cell = 64K',
      'data: 50.0 % of 256K formatted, 128K used',
    ])
  })

  it('has what mirrors lack in the same picture, and a line for each', () => {
    const paused = { ...MIRROR, name: 'c', state: 'paused' as const, reason: null, progress: null }
    const view = {
      ...alone,
      mirrors: [MIRROR, paused],
      lacking: [
        [0, 0, 1, 1],
        [0, 0, 0.5, 0],
      ],
    }
    expect(drawing(view, canvas)).toEqual([
      '#.Ox',
      '. unformatted  -+* partly  # formatted   one cell = 64K',
      'some mirror lacks: o a part  O all of it  x only a trim',
      'data: 50.0 % of 256K formatted, 128K used',
      'data/site-b copying  ########........................  25.0 %      1M/s  3s left',
      'data/c  paused',
    ])
  })

  it.each([
    [80, 24],
    [40, 14],
    [200, 100],
  ])('fits a terminal of %d x %d', (columns, rows) => {
    const mirrors = Array.from({ length: 5 }, (_, index) => ({ ...MIRROR, name: `m${index}` }))
    for (const colour of [false, true]) {
      const size = { columns, rows, colour, unicode: true }
      const cells = Array.from({ length: cellsOf(styleOf(size, 5)) }, (_, index) => (index % 7) / 6)
      const lines = drawing({ ...alone, cells, mirrors, lacking: mirrors.map(() => cells) }, size)
      expect(lines.length).toBeLessThan(rows)
      const pictured = lines.slice(0, lines.length - 3 - mirrors.length)
      expect(pictured.length).toBe(Math.min(16, Math.max(1, rows - 14)))
      for (const line of pictured) expect(textWidth(line)).toBe(Math.min(128, columns))
    }
  })
})
