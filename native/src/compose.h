// Composition of a full-stripe write without copying: overlays are painted over a base, and the result is a list of
// pieces that point into the overlays' payloads, into a block of zeros, or say "base".
#pragma once

#include <cstdint>
#include <vector>

namespace nbd {

/// One request laid over a format unit, in export bytes. `data` is null for zeros.
struct Overlay {
  uint64_t offset;
  uint64_t length;
  const uint8_t* data;
};

enum class PieceKind : uint8_t { Base, Zero, Data };

struct Piece {
  uint64_t start;  // export bytes
  uint64_t end;
  PieceKind kind;
  const uint8_t* data;  // Data: the byte at `start`
};

/// Fills `pieces` with what [start, end) consists of, in order, without gaps; later overlays lie over earlier ones.
void composePieces(uint64_t start, uint64_t end, const std::vector<Overlay>& overlays, std::vector<Piece>& pieces);

}  // namespace nbd
