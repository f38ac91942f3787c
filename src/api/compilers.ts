/**
 * Fastify's own compilers of schemas, put off: the code that checks what a route gets and writes what it answers is made for the
 * route's first request. Made for every route at every start it was a fifth of what a start costs, and disks wait for a start.
 */
import { createRequire } from 'node:module'
import type { BuildCompilerFromPool } from '@fastify/ajv-compiler'
import type { SerializerFactory } from '@fastify/fast-json-stringify-compiler'

type Validator = ReturnType<ReturnType<BuildCompilerFromPool>>

const load = createRequire(import.meta.url)

const buildValidator: BuildCompilerFromPool = (schemas, options) => {
  const compiler = once(() => validatorFactory()(schemas, options))
  return (route) => {
    const compiled = once(() => compiler()(route))
    const validate = (data: unknown): unknown => {
      const check = compiled()
      const answer: unknown = check(data)
      validate.errors = check.errors
      return answer
    }
    validate.errors = undefined as Validator['errors']
    // Fastify calls it and reads `errors`. What else such a function of Ajv has, only Ajv uses.
    return validate as Validator
  }
}

const buildSerializer: SerializerFactory = (schemas, options) => {
  const compiler = once(() => serializerFactory()(schemas, options))
  return (route) => {
    const compiled = once(() => compiler()(route))
    return (data: unknown) => compiled()(data)
  }
}

export const compilersFactory = { buildValidator, buildSerializer } as const

const validatorFactory = once((): BuildCompilerFromPool => {
  const { AjvCompiler }: typeof import('@fastify/ajv-compiler') = load('@fastify/ajv-compiler')
  return AjvCompiler()
})
const serializerFactory = once((): SerializerFactory => {
  const { SerializerSelector }: typeof import('@fastify/fast-json-stringify-compiler') = load(
    '@fastify/fast-json-stringify-compiler',
  )
  return SerializerSelector()
})

function once<T>(make: () => T): () => T {
  let made: { readonly value: T } | undefined
  return () => {
    made ??= { value: make() }
    return made.value
  }
}
