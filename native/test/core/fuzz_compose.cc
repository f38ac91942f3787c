// libFuzzer: composition against painting byte by byte. Input: five bytes an overlay (offset, length, kind), laid over a
// range whose place the first three bytes say.
#include <stdlib.h>

#include <vector>

#include "compose.h"

namespace {

constexpr uint64_t kSpan = 1 << 12;  // small, as each byte is painted
constexpr uint64_t kFar = uint64_t{1} << 46;  // ranges lie anywhere in an export

uint64_t place(const uint8_t* at) { return (at[0] * 256u + at[1]) % kSpan; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace nbd;
  if (size < 5) return 0;
  const uint64_t base = (data[0] & 1) != 0 ? kFar : 0;
  const uint64_t start = base + place(data + 1);
  const uint64_t end = start + 1 + place(data + 3);
  data += 5;
  size -= 5;
  // Payloads of their own, so that a byte too far is seen by AddressSanitizer.
  std::vector<std::vector<uint8_t>> payloads;
  std::vector<Overlay> overlays;
  std::vector<int> painted(end - start, -1);  // -1 base, -2 zero, else which overlay
  for (; size >= 5 && overlays.size() < 64; data += 5, size -= 5) {
    const uint64_t offset = base + place(data);
    const uint64_t length = place(data + 2);
    const int index = static_cast<int>(overlays.size());
    const bool zero = (data[4] & 1) != 0;
    payloads.emplace_back(zero ? 0 : length, static_cast<uint8_t>(index));
    if (!zero && length == 0) continue;  // nobody writes nothing; its null pointer would mean zeros
    overlays.push_back({offset, length, zero ? nullptr : payloads.back().data()});
    for (uint64_t at = offset; at < offset + length; at++) {
      if (at >= start && at < end) painted[at - start] = zero ? -2 : index;
    }
  }
  std::vector<Piece> pieces;
  composePieces(start, end, overlays, pieces);
  uint64_t at = start;
  for (const Piece& piece : pieces) {
    if (piece.start != at || piece.end <= piece.start || piece.end > end) abort();
    for (; at < piece.end; at++) {
      const int wanted = painted[at - start];
      switch (piece.kind) {
        case PieceKind::Base:
          if (wanted != -1) abort();
          break;
        case PieceKind::Zero:
          if (wanted != -2) abort();
          break;
        case PieceKind::Data: {
          if (wanted < 0) abort();
          const Overlay& overlay = overlays[static_cast<size_t>(wanted)];
          const uint8_t* byte = piece.data + (at - piece.start);
          if (byte != overlay.data + (at - overlay.offset)) abort();
          if (*byte != overlay.data[0]) abort();
          break;
        }
      }
    }
  }
  if (at != end) abort();
  return 0;
}
