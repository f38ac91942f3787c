// The parts below the connections: composition of full-stripe writes, layout of slots, the queue of replies.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "../src/buffers.h"
#include "../src/compose.h"
#include "../src/layout.h"
#include "harness.h"

using namespace nbd;

namespace {

int temporaryFile() {
  char name[] = "/tmp/node-nbd-test-XXXXXX";
  const int fd = mkostemp(name, O_CLOEXEC);
  unlink(name);
  return fd;
}

struct Files {
  Layout layout;
  Files(uint32_t data, uint32_t parity, uint64_t chunkSize) {
    layout.dataMembers = data;
    layout.parityMembers = parity;
    layout.chunkSize = chunkSize;
    layout.dataOffset = 1024;
    for (uint32_t i = 0; i < data + parity; i++) {
      Member member;
      member.fd = temporaryFile();
      layout.members.push_back(member);
    }
    probeMembers(layout);
  }
  ~Files() {
    for (const Member& member : layout.members) close(member.fd);
  }
};

}  // namespace

TEST("pieces are what painting byte by byte gives") {
  test::Random random(test::seed);
  for (int round = 0; round < 500; round++) {
    const uint64_t start = random.below(100);
    const uint64_t length = 1 + random.below(300);
    // 0 = base, 1 = zero, else the overlay's own bytes
    std::vector<std::vector<uint8_t>> payloads;
    std::vector<Overlay> overlays;
    std::vector<int> expected(length, -1);
    const size_t count = random.below(12);
    payloads.reserve(count);
    for (size_t i = 0; i < count; i++) {
      const uint64_t offset = random.below(400);
      const uint64_t size = 1 + random.below(150);
      const bool zero = random.below(3) == 0;
      payloads.emplace_back(size);
      for (auto& byte : payloads.back()) byte = static_cast<uint8_t>(1 + random.below(255));
      overlays.push_back({offset, size, zero ? nullptr : payloads.back().data()});
      for (uint64_t at = offset; at < offset + size; at++) {
        if (at < start || at >= start + length) continue;
        expected[at - start] = zero ? 0 : payloads.back()[at - offset];
      }
    }
    std::vector<Piece> pieces;
    composePieces(start, start + length, overlays, pieces);
    std::vector<int> got;
    for (const Piece& piece : pieces) {
      for (uint64_t at = piece.start; at < piece.end; at++) {
        got.push_back(piece.kind == PieceKind::Base ? -1 : piece.kind == PieceKind::Zero ? 0 : piece.data[at - piece.start]);
      }
    }
    CHECK(got == expected);
  }
}

TEST("segments lie where the formula says") {
  test::Random random(test::seed + 1);
  for (uint32_t data : {1u, 2u, 3u, 5u}) {
    for (uint32_t parity : {0u, 1u, 2u}) {
      Files files(data, parity, 512);
      const uint64_t stripeSize = files.layout.stripeSize();
      std::vector<uint8_t> memory(4 * stripeSize);
      for (int round = 0; round < 50; round++) {
        Segments segments;
        std::vector<std::pair<uint32_t, uint64_t>> expected;  // byte -> member, offset
        uint8_t* at = memory.data();
        for (int stripe = 0; stripe < 3; stripe++) {
          const uint32_t slot = static_cast<uint32_t>(1 + random.below(20));
          const uint64_t offset = random.below(stripeSize);
          const uint64_t length = 1 + random.below(stripeSize - offset);
          mapRange(files.layout, slot, offset, at, length, segments);
          for (uint64_t byte = offset; byte < offset + length; byte++) {
            const uint64_t chunk = byte / 512;
            expected.push_back({static_cast<uint32_t>((slot + chunk) % (data + parity)), 1024 + slot * 512 + byte % 512});
          }
          at += length;
        }
        size_t position = 0;
        for (const Segment& segment : segments) {
          CHECK_EQUAL(segment.data - memory.data(), static_cast<long>(position));
          for (uint64_t i = 0; i < segment.length; i++, position++) {
            CHECK_EQUAL(expected[position].first, segment.member);
            CHECK_EQUAL(expected[position].second, segment.offset + i);
          }
        }
        CHECK_EQUAL(position, expected.size());
      }
    }
  }
}

TEST("what is written in vectors is read back, and past the end there are zeros") {
  test::Random random(test::seed + 2);
  for (uint32_t data : {1u, 3u}) {
    Files files(data, 0, 4096);
    std::vector<MemberCounters> counters(data);
    MemberIo io(files.layout, counters.data());
    const uint64_t stripeSize = files.layout.stripeSize();
    std::vector<uint8_t> source(8 * stripeSize);
    for (auto& byte : source) byte = static_cast<uint8_t>(random.next());
    Segments segments;
    for (uint32_t i = 0; i < 8; i++) {
      // Slots 1 to 8 in one run; memory back to front, so that nothing merges but on the member.
      mapRange(files.layout, 1 + i, 0, source.data() + (7 - i) * stripeSize, stripeSize, segments);
    }
    IoError error;
    CHECK(io.write(segments, &error));
    uint64_t calls = 0, bytes = 0;
    for (const auto& counter : counters) {
      calls += counter.writes.get();
      bytes += counter.writeBytes.get();
    }
    CHECK_EQUAL(calls, data);  // one vectored write a member
    CHECK_EQUAL(bytes, source.size());
    std::vector<uint8_t> target(9 * stripeSize, 0xee);
    for (bool cached : {true, false}) {
      std::fill(target.begin(), target.end(), 0xee);
      Segments reads;
      for (uint32_t i = 0; i < 9; i++) mapRange(files.layout, 1 + i, 0, target.data() + i * stripeSize, stripeSize, reads);
      if (cached) {
        CHECK(io.readCached(reads, &error) == MemberIo::ReadResult::Done);
      } else {
        CHECK(io.readWaiting(reads, &error));
      }
      for (uint32_t i = 0; i < 8; i++) {
        CHECK(memcmp(target.data() + i * stripeSize, source.data() + (7 - i) * stripeSize, stripeSize) == 0);
      }
      CHECK(std::all_of(target.end() - static_cast<long>(stripeSize), target.end(), [](uint8_t b) { return b == 0; }));
    }
  }
}

TEST("a failing member is named with the place that failed") {
  Files files(2, 0, 512);
  std::vector<MemberCounters> counters(2);
  MemberIo io(files.layout, counters.data());
  close(files.layout.members[1].fd);
  files.layout.members[1].fd = open("/dev/full", O_RDWR | O_CLOEXEC);
  std::vector<uint8_t> memory(1024, 1);
  Segments segments;
  mapRange(files.layout, 4, 0, memory.data(), 1024, segments);
  IoError error;
  CHECK(!io.write(segments, &error));
  CHECK_EQUAL(error.error, ENOSPC);
  CHECK_EQUAL(error.member, 1u);
  CHECK_EQUAL(error.offset, 1024u + 4 * 512);
  CHECK_EQUAL(wireErrorOf(error.error), 28u);
  CHECK_EQUAL(wireErrorOf(EIO), 5u);
}

TEST("replies leave in order, however they are reserved, appended and sent") {
  test::Random random(test::seed + 3);
  ChunkPool pool;
  for (int round = 0; round < 200; round++) {
    OutQueue queue(pool);
    OutQueue held(pool);
    std::vector<uint8_t> expected, got;
    uint8_t next = 0;
    auto fill = [&](uint8_t* at, size_t length, std::vector<uint8_t>& into) {
      for (size_t i = 0; i < length; i++) {
        at[i] = next;
        into.push_back(next++);
      }
    };
    for (int step = 0; step < 60; step++) {
      const size_t length = random.below(4) == 0 ? random.below(9000) : random.below(60);
      switch (random.below(4)) {
        case 0: {
          uint8_t* at = queue.reserve(length + 10);
          fill(at, length, expected);
          queue.commit(length);
          break;
        }
        case 1: {
          Chunk* chunk = pool.take(length);
          fill(chunk->data(), length, expected);
          chunk->end = static_cast<uint32_t>(length);
          queue.append(chunk);
          break;
        }
        case 2: {
          fill(held.reserve(length + 1), length, expected);
          held.commit(length);
          queue.splice(held);
          CHECK(held.empty());
          break;
        }
        default: {
          iovec parts[3];
          const int count = queue.gather(parts, 3);
          size_t available = 0;
          for (int i = 0; i < count; i++) available += parts[i].iov_len;
          size_t send = available == 0 ? 0 : random.below(available + 1);
          for (int i = 0, left = static_cast<int>(send); i < count && left > 0; i++) {
            const int part = std::min<int>(left, static_cast<int>(parts[i].iov_len));
            const uint8_t* from = static_cast<const uint8_t*>(parts[i].iov_base);
            got.insert(got.end(), from, from + part);
            left -= part;
          }
          queue.drop(send);
        }
      }
      CHECK_EQUAL(queue.bytes(), expected.size() - got.size());
    }
    CHECK(std::equal(got.begin(), got.end(), expected.begin()));
  }
}
