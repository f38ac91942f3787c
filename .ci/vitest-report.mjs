// Reads vitest's JSON report. First line: tests passed, failed, skipped; then what failed, with the head of each message.
//   node vitest-report.mjs REPORT
import { readFileSync } from 'node:fs'
import { relative } from 'node:path'

const MESSAGE_LINES = 12
const head = (message) => message.split('\n').slice(0, MESSAGE_LINES).join('\n    ')

const report = JSON.parse(readFileSync(process.argv[2], 'utf8'))
const failures = []
for (const file of report.testResults) {
  const name = relative('.', file.name)
  const failed = file.assertionResults.filter((test) => test.status === 'failed')
  for (const test of failed) {
    failures.push(`${name}: ${test.fullName}\n    ${head(test.failureMessages.join('\n'))}`)
  }
  // A file that could not even be loaded has no tests in it: it counts as a failure all the same.
  if (file.status === 'failed' && failed.length === 0)
    failures.push(`${name}\n    ${head(file.message ?? '')}`)
}
console.log(report.numPassedTests, failures.length, report.numPendingTests + report.numTodoTests)
for (const failure of failures) console.log(failure)
