// libFuzzer: where the bytes of a range lie, against the rule written down in layout.h. Input: members, parity members,
// chunk size, slot, and where the range is in its stripe.
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "layout.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace nbd;
  if (size < 15) return 0;
  auto number = [&](size_t at, size_t bytes) {
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) value = value * 256 + data[at + i];
    return value;
  };
  Layout layout;
  layout.dataMembers = 1 + data[0] % 30;
  layout.parityMembers = data[1] % 3;
  layout.members.resize(layout.dataMembers + layout.parityMembers);
  layout.chunkSize = uint64_t{512} << (data[2] % 8);
  layout.dataOffset = uint64_t{1} << (9 + data[3] % 20);
  const uint32_t slot = static_cast<uint32_t>(number(4, 4));
  const uint64_t stripeSize = layout.stripeSize();
  const uint64_t offset = number(8, 3) % stripeSize;
  const uint64_t length = number(11, 4) % (stripeSize - offset + 1);

  std::vector<uint8_t> memory(length);
  Segments segments;
  mapRange(layout, slot, offset, memory.data(), length, segments);
  const uint64_t width = layout.dataMembers + layout.parityMembers;
  uint64_t at = 0;
  for (const Segment& segment : segments) {
    if (segment.length == 0 || segment.data != memory.data() + at || segment.member >= width) abort();
    // The first and last byte of each chunk that the segment touches: what lies between them follows.
    for (uint64_t done = 0; done < segment.length;) {
      const uint64_t inStripe = offset + at + done;
      const uint64_t chunk = inStripe / layout.chunkSize;
      if (segment.member != (slot + chunk) % width) abort();
      const uint64_t place = layout.dataOffset + uint64_t{slot} * layout.chunkSize + inStripe % layout.chunkSize;
      if (segment.offset + done != place) abort();
      done += std::min(segment.length - done, layout.chunkSize - inStripe % layout.chunkSize);
    }
    at += segment.length;
    if (at > length) abort();
  }
  if (at != length) abort();
  return 0;
}
