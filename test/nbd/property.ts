/**
 * `test.prop`: a property as a vitest test. fast-check prints the seed and the shrunk input when one fails.
 */
import fc from 'fast-check'
import { it } from 'vitest'

export { fc }

export const test = {
  prop:
    <Input extends Record<string, unknown>>(
      arbitraries: { [Key in keyof Input]: fc.Arbitrary<Input[Key]> },
      options: fc.Parameters<[Input]> = {},
    ) =>
    (name: string, check: (input: Input) => void | Promise<void>): void => {
      it(name, async () => {
        const input = fc.record(arbitraries)
        await fc.assert(
          fc.asyncProperty(input, async (value) => {
            await check(value)
          }),
          options,
        )
      })
    },
}
