/** Node does not publish the descriptor of a socket; this is where it has been kept since its first versions. */
interface WithHandle {
  readonly _handle?: { readonly fd?: number } | null
}

/** Negative where the socket has none any more. */
export function descriptorOf(socket: object): number {
  return (socket as WithHandle)._handle?.fd ?? -1
}
