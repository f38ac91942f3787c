import { readFileSync } from 'node:fs'

/** The version in package.json, which lies two folders up from here in `src` and in `dist` alike. */
export const VERSION: string = readVersion()

function readVersion(): string {
  const value: unknown = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8'))
  if (typeof value === 'object' && value !== null && 'version' in value) return String(value.version)
  throw new Error('package.json has no version')
}
