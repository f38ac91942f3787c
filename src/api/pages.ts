/** Extents of a volume, page by page. */
import { UserError } from '../base/errors.ts'

export interface ExtentSource<E> {
  readonly volume: string
  readonly size: number
  /** In order, no gaps. */
  extents(offset: number, length: number): Iterable<E>
}

export interface ExtentQuery {
  readonly offset: number
  readonly length?: number
  readonly limit: number
}

export interface ExtentPage<E> {
  readonly size: number
  readonly offset: number
  readonly extents: readonly E[]
  readonly next: number | null
}

/** At most `limit` extents from `offset` on. A page ends where an extent ends, so pages join without a seam. */
export function extentPage<E extends { readonly offset: number; readonly length: number }>(
  source: ExtentSource<E>,
  { offset, length, limit }: ExtentQuery,
): ExtentPage<E> {
  const { volume, size } = source
  if (offset > size) {
    throw new UserError('USAGE', `offset ${offset} is past the end of volume ${volume} (${size} bytes)`)
  }
  const end = Math.min(size, offset + (length ?? size))
  const extents: E[] = []
  let at = offset
  if (end > offset) {
    for (const extent of source.extents(offset, end - offset)) {
      extents.push(extent)
      at = extent.offset + extent.length
      if (extents.length === limit) break
    }
  }
  return { size, offset, extents, next: at < end ? at : null }
}
