/**
 * Redraws a few lines in place, without an alternate screen: what was last drawn stays when the command ends.
 * Each line is cut to the terminal, so that what is drawn takes as many rows as it has lines.
 */
import type { Output } from './output.ts'
import { truncate } from './text.ts'

export class Screen {
  readonly #output: Output
  #drawn = 0 // lines above the cursor that are ours

  constructor(output: Output) {
    this.#output = output
  }

  draw(lines: readonly string[]): void {
    const shown = lines
      .slice(0, Math.max(1, this.#output.rows - 1))
      .map((line) => truncate(line, this.#output.columns))
    const back = this.#drawn > 0 ? `\x1b[${this.#drawn}A` : ''
    process.stdout.write(`${back}\r${shown.map((line) => `${line}\x1b[K\n`).join('')}\x1b[J`)
    this.#drawn = shown.length
  }
}
