#include "compose.h"

#include <algorithm>

#include "assert.h"

namespace nbd {

void composePieces(uint64_t start, uint64_t end, const std::vector<Overlay>& overlays, std::vector<Piece>& pieces) {
  struct Gap {
    uint64_t start, end;
  };
  pieces.clear();
  // From the last overlay to the first, each takes what the later ones left open. Gaps stay sorted and disjoint.
  std::vector<Gap> gaps{{start, end}};
  for (size_t i = overlays.size(); i-- > 0 && !gaps.empty();) {
    const Overlay& overlay = overlays[i];
    const uint64_t from = std::max(start, overlay.offset);
    const uint64_t to = std::min(end, overlay.offset + overlay.length);
    if (from >= to) continue;
    auto gap = std::lower_bound(gaps.begin(), gaps.end(), from, [](const Gap& a, uint64_t at) { return a.end <= at; });
    while (gap != gaps.end() && gap->start < to) {
      const uint64_t low = std::max(gap->start, from);
      const uint64_t high = std::min(gap->end, to);
      pieces.push_back({low, high, overlay.data == nullptr ? PieceKind::Zero : PieceKind::Data,
                        overlay.data == nullptr ? nullptr : overlay.data + (low - overlay.offset)});
      const Gap rest{high, gap->end};
      const bool before = gap->start < low;
      const bool after = rest.start < rest.end;
      if (before && after) {
        gap->end = low;
        gap = gaps.insert(gap + 1, rest) + 1;
      } else if (before) {
        gap->end = low;
        ++gap;
      } else if (after) {
        gap->start = high;
        ++gap;
      } else {
        gap = gaps.erase(gap);
      }
    }
  }
  for (const Gap& gap : gaps) pieces.push_back({gap.start, gap.end, PieceKind::Base, nullptr});
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.start < b.start; });

  uint64_t at = start;
  for (const Piece& piece : pieces) {
    NBD_ASSERT(piece.start == at && piece.end > piece.start);
    at = piece.end;
  }
  NBD_ASSERT(at == end);
}

}  // namespace nbd
