import { execFile } from 'node:child_process'
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { TlsOptions } from '../../src/link/security.ts'

const run = promisify(execFile)

/** An authority of its own, made by openssl(1), that issues certificates for tests. */
export class Authority {
  readonly directory: string
  readonly certificate: string
  readonly #key: string

  static async make(): Promise<Authority> {
    const directory = await mkdtemp(join(tmpdir(), 'link-tls-'))
    const authority = new Authority(directory)
    const subject = ['-subj', '/CN=test authority', '-days', '2']
    await run('openssl', [
      'req',
      '-x509',
      ...newKey(authority.#key),
      ...subject,
      '-out',
      authority.certificate,
    ])
    return authority
  }

  private constructor(directory: string) {
    this.directory = directory
    this.certificate = join(directory, 'authority.pem')
    this.#key = join(directory, 'authority.key')
  }

  /** @param name of a host, or an IP address with the prefix `IP:` */
  async issue(name: string, days = 2): Promise<TlsOptions> {
    const base = join(this.directory, name.replace(/[^a-z0-9]/gi, '-'))
    const [key, request, certificate, extensions] = ['key', 'csr', 'pem', 'ext'].map(
      (end) => `${base}.${end}`,
    ) as [string, string, string, string]
    await run('openssl', ['req', ...newKey(key), '-subj', `/CN=${name.replace('IP:', '')}`, '-out', request])
    await chmod(key, 0o600)
    await writeFile(extensions, `subjectAltName=${name.startsWith('IP:') ? name : `DNS:${name}`}\n`)
    const by = ['-CA', this.certificate, '-CAkey', this.#key, '-CAcreateserial']
    await run('openssl', [
      'x509',
      '-req',
      '-in',
      request,
      ...by,
      '-days',
      String(days),
      '-extfile',
      extensions,
      '-out',
      certificate,
    ])
    return { certificate, key, authority: this.certificate }
  }

  async remove(): Promise<void> {
    await rm(this.directory, { recursive: true })
  }
}

function newKey(path: string): string[] {
  return ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', path]
}
