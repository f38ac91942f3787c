// Composition against a byte model: each byte says which overlay it comes from.
#include <vector>

#include "compose.h"
#include "harness.h"

namespace nbd::test {
namespace {

void compare(uint64_t start, uint64_t end, const std::vector<Overlay>& overlays) {
  constexpr uint8_t kBase = 0xba;
  std::vector<uint8_t> model(end - start, kBase);
  for (const Overlay& overlay : overlays) {
    for (uint64_t i = 0; i < overlay.length; i++) {
      const uint64_t at = overlay.offset + i;
      if (at >= start && at < end) model[at - start] = overlay.data == nullptr ? 0 : overlay.data[i];
    }
  }
  std::vector<Piece> pieces;
  composePieces(start, end, overlays, pieces);
  std::vector<uint8_t> painted;
  for (const Piece& piece : pieces) {
    CHECK_EQUAL(piece.start, start + painted.size());
    CHECK(piece.end > piece.start);
    for (uint64_t at = piece.start; at < piece.end; at++) {
      painted.push_back(piece.kind == PieceKind::Base   ? kBase
                        : piece.kind == PieceKind::Zero ? uint8_t{0}
                                                        : piece.data[at - piece.start]);
    }
  }
  CHECK(painted == model);
}

const Register empty("compose: nothing over the base is the base", [] { compare(4096, 8192, {}); });

const Register random("compose: random overlays against a byte model", [] {
  for (uint64_t seed = 1; seed <= 3000; seed++) {
    Random random(seed);
    const uint64_t start = random.below(4) * 512;
    const uint64_t end = start + 1 + random.below(512);
    std::vector<std::vector<uint8_t>> payloads;
    std::vector<Overlay> overlays;
    for (uint64_t left = random.below(10); left > 0; left--) {
      const uint64_t offset = random.below(end + 100);
      const uint64_t length = random.chance(30) ? random.below(8) : random.below(600);
      if (random.chance(25)) {
        overlays.push_back({offset, length, nullptr});
        continue;
      }
      // 1..0x7f: neither the base nor a zero.
      std::vector<uint8_t> payload(length);
      for (uint8_t& byte : payload) byte = static_cast<uint8_t>(1 + random.below(0x7f));
      payloads.push_back(std::move(payload));
      overlays.push_back({offset, length, payloads.back().data()});
    }
    compare(start, end, overlays);
  }
});

}  // namespace
}  // namespace nbd::test
