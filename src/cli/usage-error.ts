/**
 * What yargs finds wrong, in our words: one line that names the option as it is typed, and where to look. Sentences
 * that are not in the table are passed on as they are.
 */
import { UserError } from '../base/errors.ts'
import { plural } from './text.ts'

/** Commands that have commands below them. */
const GROUPS = new Set(['pool', 'volume', 'mirror', 'peer'])

type Rule = readonly [
  pattern: RegExp,
  sentence: (match: RegExpExecArray, words: readonly string[], args: readonly string[]) => string,
]

const RULES: readonly Rule[] = [
  [
    /^Did you mean (.+)\?$/,
    ([, command], words) =>
      `there is no command "${words[commandDepth(words) - 1]}": did you mean ${command}?`,
  ],
  [/^Unknown command: (.+)$/, ([, command]) => `there is no command "${command}"`],
  [/^Unknown arguments?: (.+)$/, ([, names = ''], words, args) => unknown(names.split(', '), words, args)],
  [
    /^Missing required arguments?: (.+)$/,
    ([, names = '']) => `${names.split(', ').map(dashed).join(' and ')} must be given`,
  ],
  [/^Not enough arguments following: (.+)$/, ([, name = '']) => `${dashed(name)} needs a value`],
  [
    /^Not enough non-option arguments: got (\d+), need at least (\d+)$/,
    ([, got, need]) => `${plural(Number(need), 'argument')} needed, not ${got}`,
  ],
  [
    /^Invalid values: Argument: (\S+), Given: (.+), Choices: (.+)$/,
    ([, name = '', given, choices]) => `${dashed(name)} is one of ${choices}, not ${given}`,
  ],
  [
    /^Arguments (\S+) and (\S+) are mutually exclusive$/,
    ([, a = '', b = '']) => `${dashed(a)} and ${dashed(b)} exclude each other`,
  ],
]

/**
 * @param sentence of yargs
 * @param args the command line
 */
export function usageError(sentence: string, args: readonly string[]): UserError {
  const words = args.filter((arg, index) => !arg.startsWith('-') && args[index - 1] !== '--pool')
  const line = sentence.trim().replaceAll(/\s*\n\s*/g, ' ')
  const text = reword(line, words, args)
  const depth = commandDepth(words)
  const known = /^(there is no command|which)/.test(text) ? depth - 1 : depth
  const see = `see: ${['fullstripe', ...words.slice(0, known), '--help'].join(' ')}`
  return new UserError('USAGE', text.endsWith('?') ? `${text} ${see}` : `${text}; ${see}`)
}

/** How many of the words name the command. */
function commandDepth(words: readonly string[]): 1 | 2 {
  return GROUPS.has(words[0] ?? '') ? 2 : 1
}

function reword(line: string, words: readonly string[], args: readonly string[]): string {
  for (const [pattern, sentence] of RULES) {
    const match = pattern.exec(line)
    if (match !== null) return sentence(match, words, args)
  }
  return line.replace(/^./, (first) => first.toLowerCase()).replace(/\.$/, '')
}

function dashed(name: string): string {
  return name.length === 1 ? `-${name}` : `--${name}`
}

/** yargs names options and surplus words alike, without dashes. */
function unknown(names: readonly string[], words: readonly string[], args: readonly string[]): string {
  const command = words[commandDepth(words) - 1]
  if (command !== undefined && names.includes(command)) return `there is no command "${command}"`
  const asTyped = names.map(
    (name) => args.find((arg) => arg.replace(/^--?/, '').replace(/=.*$/, '') === name) ?? name,
  )
  const options = asTyped.filter((text) => text.startsWith('-')).map((text) => text.replace(/=.*$/, ''))
  if (options.length > 0) return `there is no option ${options.join(', ')}`
  return `one argument too many: ${asTyped.join(', ')}`
}
