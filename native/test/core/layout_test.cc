// Where slots lie: each byte of a range against the rule written down in layout.h, and joining of segments.
#include <stdlib.h>
#include <unistd.h>

#include <vector>

#include "harness.h"
#include "layout.h"

namespace nbd::test {
namespace {

Layout layoutOf(uint32_t dataMembers, uint32_t parityMembers, uint64_t chunkSize) {
  Layout layout;
  layout.members.resize(dataMembers + parityMembers);
  layout.dataMembers = dataMembers;
  layout.parityMembers = parityMembers;
  layout.chunkSize = chunkSize;
  layout.dataOffset = 1 << 20;
  return layout;
}

const Register mapping("layout: chunk c of slot s is on member (s + c) mod k at dataOffset + s * chunk", [] {
  Random random(11);
  for (const uint32_t k : {1u, 2u, 3u}) {
    for (const uint64_t chunk : {uint64_t{512}, uint64_t{4096}, uint64_t{65536}}) {
      const Layout layout = layoutOf(k, 0, chunk);
      CHECK_EQUAL(layout.stripeSize(), k * chunk);
      std::vector<uint8_t> memory(layout.stripeSize());
      for (int round = 0; round < 200; round++) {
        const uint32_t slot = round < 8 ? static_cast<uint32_t>(round) : static_cast<uint32_t>(random.next());
        const uint64_t offset = round < 8 ? 0 : random.below(layout.stripeSize());
        const uint64_t length = round < 8 ? layout.stripeSize() : 1 + random.below(layout.stripeSize() - offset);
        Segments segments;
        mapRange(layout, slot, offset, memory.data(), length, segments);
        uint64_t at = offset;
        for (const Segment& segment : segments) {
          CHECK(segment.data == memory.data() + (at - offset));
          CHECK(segment.length > 0);
          auto check = [&](uint64_t i) {
            const uint64_t c = (at + i) / chunk;
            CHECK_EQUAL(segment.member, static_cast<uint32_t>((uint64_t{slot} + c) % k));
            CHECK_EQUAL(segment.offset + i, layout.dataOffset + uint64_t{slot} * chunk + (at + i) % chunk);
          };
          for (uint64_t i = 0; i < segment.length; i += 97) check(i);
          check(segment.length - 1);
          at += segment.length;
        }
        CHECK_EQUAL(at, offset + length);
        CHECK(segments.size() <= k);
      }
    }
  }
});

const Register parity("layout: parity members take part in the rotation", [] {
  const Layout layout = layoutOf(2, 1, 4096);
  uint8_t byte = 0;
  for (uint32_t slot = 0; slot < 9; slot++) {
    Segments segments;
    mapRange(layout, slot, 4096, &byte, 1, segments);
    CHECK_EQUAL(segments.at(0).member, (slot + 1) % 3);
  }
});

const Register joined("layout: neighbours on a member and in memory are one segment", [] {
  const Layout layout = layoutOf(1, 0, 4096);
  std::vector<uint8_t> memory(3 * 4096);
  Segments segments;
  for (uint32_t i = 0; i < 3; i++) mapRange(layout, 5 + i, 0, memory.data() + i * 4096, 4096, segments);
  CHECK_EQUAL(segments.size(), size_t{1});
  mapRange(layout, 8, 0, memory.data(), 4096, segments);
  CHECK_EQUAL(segments.size(), size_t{2});
});

const Register files("layout: what MemberIo writes it reads, and the end of a file gives zeros", [] {
  Layout layout = layoutOf(3, 0, 4096);
  for (Member& member : layout.members) {
    char name[] = "/tmp/fullstripe-layout-XXXXXX";
    member.fd = mkstemp(name);
    CHECK(member.fd >= 0);
    unlink(name);
  }
  probeMembers(layout);
  std::vector<MemberCounters> counters(3);
  MemberIo io(layout, counters.data());
  Random random(5);
  std::vector<uint8_t> model(6 * layout.stripeSize());
  for (int round = 0; round < 60; round++) {
    // Several runs at once: slots in a row go out in one vectored call a member.
    std::vector<uint8_t> data(4 * layout.stripeSize());
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.next());
    Segments segments;
    const uint32_t first = static_cast<uint32_t>(random.below(3));
    for (uint32_t i = 0; i < 1 + round % 3u; i++) {
      const uint64_t offset = round % 2 == 0 ? 0 : random.below(layout.stripeSize());
      const uint64_t length = layout.stripeSize() - offset;
      uint8_t* from = data.data() + i * layout.stripeSize();
      mapRange(layout, first + i, offset, from, length, segments);
      std::copy(from, from + length, model.begin() + static_cast<long>((first + i) * layout.stripeSize() + offset));
    }
    IoError error;
    CHECK(io.write(segments, &error));
  }
  std::vector<uint8_t> read(model.size(), 0xee);
  Segments segments;
  for (uint32_t slot = 0; slot < 6; slot++) {
    mapRange(layout, slot, 0, read.data() + slot * layout.stripeSize(), layout.stripeSize(), segments);
  }
  IoError error;
  CHECK(io.readWaiting(segments, &error));
  CHECK(read == model);
  for (Member& member : layout.members) close(member.fd);
});

}  // namespace
}  // namespace nbd::test
