/** Text tables for people; main.ts writes the same numbers as JSON. */
export interface Check {
  readonly title: string
  readonly value: string // with its unit
  readonly target: string
  readonly reached: boolean
}

/** Columns as wide as their widest cell; all but the first aligned to the right. */
export function textTable(rows: readonly (readonly string[])[]): string {
  const widths: number[] = []
  for (const row of rows) {
    row.forEach((cell, column) => {
      widths[column] = Math.max(widths[column] ?? 0, cell.length)
    })
  }
  const line = (row: readonly string[]) =>
    row
      .map((cell, column) =>
        column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0),
      )
      .join('  ')
  return rows.map((row) => line(row).trimEnd()).join('\n')
}

export const mark = (reached: boolean) => (reached ? 'ok' : 'MISSED')

export function checkLines(checks: readonly Check[]): string {
  const head = ['figure', 'measured', 'to reach', '']
  return textTable([
    head,
    ...checks.map(({ title, value, target, reached }) => [title, value, target, mark(reached)]),
  ])
}
