import type { StoreErrorCode } from '../base/errors.ts'

/** Error values on the wire (NBD specification, "Error values"). */
export const NBD_ERRNO = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const

/** A new StoreError code does not compile until it has a wire number. */
export const ERRNO_OF: Record<StoreErrorCode, number> = {
  MEMBER_IO: NBD_ERRNO.EIO,
  NO_SPACE: NBD_ERRNO.ENOSPC,
  READ_ONLY: NBD_ERRNO.EPERM,
  SHUTTING_DOWN: NBD_ERRNO.ESHUTDOWN,
  DAMAGED: NBD_ERRNO.EIO,
  INVALID: NBD_ERRNO.EINVAL,
  NOT_SUPPORTED: NBD_ERRNO.ENOTSUP,
  NO_MEMORY: NBD_ERRNO.ENOMEM,
}
