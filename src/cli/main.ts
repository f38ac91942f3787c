#!/usr/bin/env node
import { endOnClosedPipe } from './output.ts'
import { run } from './run.ts'

endOnClosedPipe()
process.exitCode = await run(process.argv.slice(2))
