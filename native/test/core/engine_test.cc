// The whole core between a client's socket and member files, once for each engine. The uncached variants send every read
// through the engine. rig.h describes the policy that answers.
#include <sys/socket.h>

#include <algorithm>

#include "rig.h"

namespace nbd::test {
namespace {

constexpr Mode kModes[] = {Mode::Simple, Mode::Structured, Mode::Extended};

Bytes noise(uint64_t size, uint64_t seed) {
  Random random(seed);
  Bytes bytes(size);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t word = random.next() | 0x0101010101010101;
    memcpy(bytes.data() + i, &word, std::min<size_t>(8, size - i));
  }
  return bytes;
}

void paint(Bytes& model, uint64_t offset, const Bytes& data) {
  std::copy(data.begin(), data.end(), model.begin() + static_cast<long>(offset));
}

Bytes cut(const Bytes& model, uint64_t offset, uint64_t length) {
  return Bytes(model.begin() + static_cast<long>(offset), model.begin() + static_cast<long>(offset + length));
}

/// Reads of formatted and unformatted stripes, small, across stripes, whole and streamed, in all modes.
void reads(RigOptions options) {
  for (const uint8_t fill : {0x00, 0xa5}) {
    options.fill = fill;
    options.formatUnit = fill == 0 ? 1 : 2;
    Rig rig(options);
    Bytes model(options.size, fill);
    {
      auto writer = rig.connect(Mode::Extended);
      for (const uint64_t stripe : {1, 2, 5, 60, 61, 62, 63, 64, 200}) {
        const Bytes data = noise(rig.stripeSize - 700, stripe);
        const uint64_t offset = stripe * rig.stripeSize + 300;
        CHECK_EQUAL(writer->write(offset, data, stripe == 60 ? kFlagFua : 0), uint32_t{kOk});
        paint(model, offset, data);
      }
    }
    for (const Mode mode : kModes) {
      auto client = rig.connect(mode);
      for (const auto& [offset, length] : {std::pair<uint64_t, uint64_t>{0, 1}, {0, 512}, {rig.stripeSize - 1, 2},
                                           {2 * rig.stripeSize + 100, 5000}, {3 * rig.stripeSize, rig.stripeSize},
                                           {0, 1 << 20}, {rig.stripeSize + 1, 3 << 20}, {0, options.size}}) {
        CHECK(client->read(offset, length) == cut(model, offset, length));
        if (mode != Mode::Simple) CHECK(client->read(offset, length, kFlagDontFragment) == cut(model, offset, length));
      }
    }
    CHECK_EQUAL(hasDescriptor("[io_uring]"), options.uncached && options.engine == EngineChoice::IoUring);
  }
}

/// Random writes, zeroes, trims of whole units, reads, flushes and read-ahead of one client against a byte model.
void model(RigOptions options) {
  options.size = (1 << 20) - 512;
  options.members = 3;
  options.formatUnit = 2;
  options.chunkSize = 4096;
  Rig rig(options);
  Bytes model(options.size);
  const uint64_t unit = 2 * rig.stripeSize;
  for (uint64_t seed = 1; seed <= 3; seed++) {
    Random random(seed);
    auto client = rig.connect(kModes[seed % 3]);
    for (int round = 0; round < 120; round++) {
      const uint64_t offset = random.below(options.size);
      const uint64_t length = 1 + random.below(std::min<uint64_t>(options.size - offset, random.chance(20) ? 300000 : 9000));
      switch (random.below(8)) {
        case 0:
        case 1:
        case 2: {
          const Bytes data = noise(length, random.next());
          CHECK_EQUAL(client->write(offset, data, random.chance(5) ? kFlagFua : 0), uint32_t{kOk});
          paint(model, offset, data);
          break;
        }
        case 3:
          CHECK_EQUAL(client->exchange(kWriteZeroes, 0, offset, length).error, uint32_t{kOk});
          paint(model, offset, Bytes(length));
          break;
        case 4: {
          const uint64_t first = offset / unit;
          const uint64_t end = std::min(options.size / unit, first + 1 + random.below(3));
          if (first >= end) break;
          CHECK_EQUAL(client->exchange(kTrim, 0, first * unit, (end - first) * unit).error, uint32_t{kOk});
          paint(model, first * unit, Bytes((end - first) * unit));
          break;
        }
        case 5:
          CHECK_EQUAL(client->exchange(kCache, 0, offset, length).error, uint32_t{kOk});
          break;
        default:
          CHECK(client->read(offset, length) == cut(model, offset, length));
      }
    }
    CHECK_EQUAL(client->exchange(kFlush, 0, 0, 0).error, uint32_t{kOk});
    CHECK(client->read(0, options.size) == model);
  }
}

/// Many requests in flight, replies in any order, on several connections at once from several threads.
void pipeline(RigOptions options) {
  Rig rig(options);
  constexpr uint64_t kPart = 256 * 1024;
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (uint64_t who = 0; who < 3; who++) {
    threads.emplace_back([&, who] {
      try {
        auto client = rig.connect(kModes[who]);
        // Each has a part of its own, which begins and ends in the middle of a stripe of a neighbour.
        const uint64_t base = who * kPart + 5000;
        for (int round = 0; round < 3; round++) {
          const Bytes data = noise(kPart, who * 10 + static_cast<uint64_t>(round));
          for (uint64_t at = 0; at < kPart; at += 8192) client->send(kWrite, 0, base + at, 8192, cut(data, at, 8192));
          for (uint64_t at = 0; at < kPart; at += 8192) CHECK_EQUAL(client->receive().error, uint32_t{kOk});
          std::map<uint64_t, uint64_t> places;
          for (uint64_t at = 0; at < kPart; at += 8192) places[client->send(kRead, 0, base + at, 8192)] = at;
          for (uint64_t at = 0; at < kPart; at += 8192) {
            const Client::Reply reply = client->receive();
            CHECK_EQUAL(reply.error, uint32_t{kOk});
            CHECK(reply.data == cut(data, places.at(reply.cookie), 8192));
          }
        }
        good++;
      } catch (const Failure& failure) {
        fprintf(stderr, "# client %d: %s\n", static_cast<int>(who), failure.what.c_str());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(good.load(), 3);
}

/// A barrier ends while clients keep reading, and after it no in-place write that missed a cleared bit lands any more.
void barrier(RigOptions options) {
  Rig rig(options);
  auto first = rig.connect(Mode::Structured);
  CHECK_EQUAL(first->write(0, noise(4 * rig.stripeSize, 1)), uint32_t{kOk});
  std::atomic<bool> over{false};
  std::atomic<int> broken{0};
  std::vector<std::thread> threads;
  for (uint64_t who = 0; who < 2; who++) {
    threads.emplace_back([&, who] {
      try {
        auto client = rig.connect(Mode::Simple);
        for (uint64_t round = 0; !over.load(); round++) {
          for (uint64_t i = 0; i < 8; i++) {
            // Disjoint for the two, so that neither sees the other's bytes change in mid-write.
            const uint64_t at = (i % 4) * rig.stripeSize + who * 8192;
            if (i % 2 == 0) {
              client->send(kWrite, 0, at, 8192, Bytes(8192, static_cast<uint8_t>(round)));
            } else {
              client->send(kRead, 0, at, 8192);
            }
          }
          for (int i = 0; i < 8; i++) CHECK_EQUAL(client->receive().error, uint32_t{kOk});
        }
      } catch (const Failure& failure) {
        fprintf(stderr, "# %s\n", failure.what.c_str());
        broken++;
      }
    });
  }
  try {
    for (int round = 0; round < 20; round++) {
      rig.hold(true);
      for (uint64_t stripe = 0; stripe < 4; stripe++) rig.setBit(rig.direct, stripe, false);
      CHECK(rig.done(rig.submit({6, 0, 0})));
      const uint32_t slot = rig.slotOf(static_cast<uint64_t>(round % 4));
      const Bytes before = rig.readSlot(slot);
      CHECK(eventually([&] { return rig.upcallsWaiting() >= 2; }));
      CHECK(rig.readSlot(slot) == before);
      for (uint64_t stripe = 0; stripe < 4; stripe++) rig.setBit(rig.direct, stripe, true);
      rig.hold(false);
      // New tables are a barrier too; the old ones are freed behind it.
      Tables tables;
      tables.size = rig.options.size;
      tables.slots = rig.slots.data();
      tables.init = rig.init.data();
      tables.direct = rig.direct.data();
      rig.call([&](Datapath& datapath) { datapath.retable(Rig::kExport, 1e9 + round, tables); });
      CHECK(rig.done(1e9 + round));
    }
  } catch (...) {
    rig.hold(false);
    over = true;
    for (std::thread& thread : threads) thread.join();
    throw;
  }
  over = true;
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(broken.load(), 0);
}

/// Range reads of what clients wrote: whole, cut, across units that are not formatted, many at once.
void ranges(RigOptions options) {
  for (const uint8_t fill : {0x00, 0xa5}) {
    options.fill = fill;
    options.formatUnit = fill == 0 ? 1 : 2;
    options.size = (8 << 20) - 1536;
    Rig rig(options);
    Bytes model(options.size, fill);
    auto writer = rig.connect(Mode::Simple);
    for (const uint64_t stripe : {1, 2, 5, 60, 61, 62, 63, 64, 200, 255}) {
      const uint64_t offset = stripe * rig.stripeSize + 300;
      const Bytes data = noise(std::min(rig.stripeSize - 700, options.size - offset), stripe);
      CHECK_EQUAL(writer->write(offset, data), uint32_t{kOk});
      paint(model, offset, data);
    }
    Random random(fill);
    std::vector<Bytes> targets;
    std::vector<double> tags;
    std::vector<uint64_t> offsets;
    targets.reserve(80);
    for (int i = 0; i < 80; i++) {
      offsets.push_back(i == 0 ? 0 : random.below(options.size));
      const uint64_t most = options.size - offsets.back();
      targets.emplace_back(i == 0 ? most : std::min(most, 1 + random.below(random.chance(50) ? 5000 : 1 << 20)));
      tags.push_back(rig.readRange(offsets.back(), targets.back()));
    }
    for (int i = 0; i < 80; i++) {
      CHECK_EQUAL(rig.result(tags[static_cast<size_t>(i)]), 0);
      const Bytes& got = targets[static_cast<size_t>(i)];
      CHECK(got == cut(model, offsets[static_cast<size_t>(i)], got.size()));
    }
  }
}

/// A barrier waits for the range reads before it, whatever they wait for, and for none behind it; so does the change to
/// other tables, and the close of the export for all of them.
void rangeBarrier(RigOptions options) {
  struct Release {
    ~Release() { holdReads(0); }
  };
  Rig rig(options);
  const Release release;  // before the rig ends: its pools wait for their reads
  auto client = rig.connect(Mode::Simple);
  CHECK_EQUAL(client->write(0, noise(4 * rig.stripeSize, 1)), uint32_t{kOk});
  // Enough for whatever could be done to be done.
  auto settle = [&] {
    for (int i = 0; i < 3; i++) CHECK(rig.done(rig.submit({4, 0})));
  };
  Bytes first(1111), second(2222), third(3333);
  holdReads(first.size());
  const double before = rig.readRange(100, first);
  const double barrier = rig.submit({6, 0, 0});
  const double behind = rig.readRange(100, second);
  CHECK_EQUAL(rig.result(behind), 0);
  Tables tables;
  tables.size = options.size;
  tables.slots = rig.slots.data();
  tables.init = rig.init.data();
  tables.direct = rig.direct.data();
  rig.call([&](Datapath& datapath) { datapath.retable(Rig::kExport, 1e9, tables); });
  settle();
  CHECK(!rig.done(barrier, 0));
  CHECK(!rig.done(1e9, 0));
  CHECK(!rig.done(before, 0));
  holdReads(0);
  CHECK_EQUAL(rig.result(before), 0);
  CHECK(rig.done(barrier));
  CHECK(rig.done(1e9));
  holdReads(third.size());
  const double later = rig.submit({6, 0, 0});
  const double last = rig.readRange(100, third);
  CHECK(rig.done(later));
  client->close();
  CHECK(eventually([&] { return rig.endCount() == 1; }));
  const double close = rig.submit({7, 0, Rig::kExport});
  settle();
  CHECK(!rig.done(close, 0));
  CHECK_EQUAL(rig.result(rig.readRange(0, second)), ECANCELED);  // nobody is left to answer
  holdReads(0);
  CHECK_EQUAL(rig.result(last), 0);
  CHECK(rig.done(close));
  CHECK_EQUAL(rig.result(rig.readRange(0, second)), ECANCELED);
  const Bytes all = noise(4 * rig.stripeSize, 1);
  CHECK(first == cut(all, 100, first.size()) && third == cut(all, 100, third.size()));
}

/// Requests without a client: overlays and parts as theirs are, payloads not copied, and the export stays until they are done.
void adopted(RigOptions options) {
  options.fill = 0x33;
  Rig rig(options);
  auto client = rig.connect(Mode::Simple);
  rig.hold(true);
  client->send(kFlush, 0, 0, 0);  // beside an upcall of a client
  CHECK(eventually([&] { return rig.upcallsWaiting() == 1; }));
  const Bytes payload = noise(2 * rig.stripeSize, 7);
  Bytes lent = payload;
  uint32_t write = 0, zero = 0;
  rig.call([&](Datapath& datapath) {
    write = datapath.adopt(Rig::kExport, UpcallKind::Write, rig.stripeSize + 100, lent.size(), lent.data());
    zero = datapath.adopt(Rig::kExport, UpcallKind::Zero, rig.stripeSize + 500, 50, nullptr);
    CHECK(write != zero);
    Bytes part(1000);
    CHECK(datapath.readPayload(write, lent.size() - 1000, part.data(), 1000));
    CHECK(part == cut(payload, payload.size() - 1000, 1000));
    CHECK(!datapath.readPayload(write, lent.size() - 999, part.data(), 1000));
    CHECK(!datapath.readPayload(zero, 0, part.data(), 1));
  });
  CHECK_EQUAL(rig.result(rig.submit({2, 0, Rig::kExport, 1, 1, 9, 0, 2, double(write), double(zero)})), 0);
  CHECK_EQUAL(rig.result(rig.submit({3, 0, double(write), 2, 8})), 0);
  Bytes expected(rig.stripeSize, options.fill);
  std::copy(payload.begin(), payload.begin() + static_cast<long>(rig.stripeSize - 100), expected.begin() + 100);
  std::fill(expected.begin() + 500, expected.begin() + 550, uint8_t{0});
  CHECK(rig.readSlot(9) == expected);
  CHECK(rig.readSlot(8) == cut(payload, rig.stripeSize - 100, rig.stripeSize));
  rig.hold(false);
  CHECK_EQUAL(client->receive().error, uint32_t{kOk});
  const double close = rig.submit({7, 0, Rig::kExport});
  CHECK(eventually([&] { return rig.endOf(client->session) == static_cast<int>(SessionEnd::Closed); }));
  auto complete = [&](uint32_t index) {
    const double words[] = {1, static_cast<double>(index), 0};
    rig.call([&](Datapath& datapath) { datapath.submit(words, 3); });
    lent.assign(lent.size(), 0);
  };
  complete(write);
  CHECK(rig.done(rig.submit({4, 0})));
  CHECK(!rig.done(close, 0));
  Bytes target(100);
  CHECK_EQUAL(rig.result(rig.readRange(0, target)), 0);  // whoever completes the other may need it
  CHECK(target == Bytes(100, options.fill));
  complete(zero);
  CHECK(rig.done(close));
}

/// Closing: what is in flight is answered first, then sessions end, then the close is done.
void closing(RigOptions options) {
  Rig rig(options);
  auto client = rig.connect(Mode::Extended);
  auto idle = rig.connect(Mode::Simple);
  CHECK_EQUAL(client->write(0, noise(3 << 20, 1)), uint32_t{kOk});
  rig.hold(true);
  client->send(kWrite, 0, 4 << 20, 100000, noise(100000, 2));
  client->send(kFlush, 0, 0, 0);
  client->send(kTrim, 0, 0, 1 << 20);
  CHECK(eventually([&] { return rig.upcallsWaiting() == 3; }));
  // A streamed read and half of a write.
  client->send(kRead, 0, 1 << 20, 3 << 20);
  Bytes half = client->header(kWrite, kFlagPayloadLength, 0, 500000, 99);
  half.resize(half.size() + 50000);
  client->sendBytes(half.data(), half.size());
  const double close = rig.submit({7, 0, Rig::kExport});
  CHECK(eventually([&] { return rig.endOf(idle->session) == static_cast<int>(SessionEnd::Closed); }));
  CHECK_EQUAL(rig.endOf(client->session), -1);
  CHECK(!rig.done(close, 0));
  rig.hold(false);
  int answered = 0;
  for (;;) {
    const Client::Reply reply = client->receive();
    if (reply.ended) break;
    CHECK_EQUAL(reply.error, uint32_t{kOk});
    answered++;
  }
  CHECK(answered == 3 || answered == 4);
  CHECK(rig.done(close));
  CHECK_EQUAL(rig.endOf(client->session), static_cast<int>(SessionEnd::Closed));
}

/// The client goes away in the middle of a header, of an in-place payload, of a gathered one, and of one to be refused.
/// The memory such payloads were granted comes back: afterwards a write as large as all of it goes through.
void hangup(RigOptions options) {
  options.payloadTotal = options.payloadPerConnection = 2 << 20;
  options.payloadMax = 2 << 20;
  Rig rig(options);
  auto writer = rig.connect(Mode::Simple);
  CHECK_EQUAL(writer->write(0, noise(1 << 20, 1)), uint32_t{kOk});
  for (int round = 0; round < 24; round++) {
    const Mode mode = kModes[round % 3];
    auto client = rig.connect(mode);
    const uint16_t flags = mode == Mode::Extended ? kFlagPayloadLength : 0;
    const uint64_t offset = round % 4 == 1 ? 0 : round % 4 == 2 ? 4 << 20 : options.size - 1;
    Bytes bytes = client->header(kWrite, flags, offset, 1 << 20, 5);
    if (round % 4 == 0) {
      bytes.resize(17);
    } else {
      bytes.resize(bytes.size() + 300000 + static_cast<size_t>(round) * 1000);
    }
    client->sendBytes(bytes.data(), bytes.size());
    client->close();
    CHECK(eventually([&] { return rig.endOf(client->session) == static_cast<int>(SessionEnd::Hangup); }));
  }
  CHECK_EQUAL(writer->write(5 << 20, noise(2 << 20, 3)), uint32_t{kOk});
}

/// Connects and disconnects of all kinds from several threads. No descriptor stays, no session's end is forgotten.
void churn(RigOptions options) {
  Rig rig(options);
  {
    auto client = rig.connect(Mode::Simple);
    CHECK_EQUAL(client->write(0, noise(2 << 20, 9)), uint32_t{kOk});
    CHECK(client->read(0, 4096).size() == 4096);
  }
  CHECK(eventually([&] { return rig.endCount() == 1; }));
  const size_t before = openDescriptors();
  constexpr size_t kThreads = 4, kEach = 60;
  std::atomic<size_t> broken{0};
  std::vector<std::thread> threads;
  for (size_t who = 0; who < kThreads; who++) {
    threads.emplace_back([&, who] {
      Random random(who + 1);
      for (size_t i = 0; i < kEach; i++) {
        try {
          auto client = rig.connect(kModes[random.below(3)]);
          switch (random.below(6)) {
            case 0:
              break;
            case 1:
              client->send(kDisconnect, 0, 0, 0);
              CHECK(client->receive().ended);
              break;
            case 2:
              client->sendBytes("garbage", 7);
              CHECK(client->receive().ended);
              break;
            case 3:  // leaves with reads in flight
              for (uint64_t k = 0; k < 4; k++) client->send(kRead, 0, k * 4096, 1 << 20);
              break;
            case 4:  // and with writes
              for (uint64_t k = 0; k < 4; k++) client->send(kWrite, 0, random.below(7 << 20), 30000, noise(30000, k));
              break;
            default:
              CHECK_EQUAL(client->read(0, 70000).size(), size_t{70000});
          }
        } catch (const Failure& failure) {
          fprintf(stderr, "# %s\n", failure.what.c_str());
          broken++;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(broken.load(), size_t{0});
  CHECK(eventually([&] { return rig.endCount() == 1 + kThreads * kEach; }));
  // A second thread's ring may have been opened meanwhile.
  CHECK(eventually([&] { return openDescriptors() <= before + (options.uncached ? options.threads : 0); }));
  CHECK(rig.connect(Mode::Simple)->read(0, 4096).size() == 4096);
}

/// Several clients together want more memory than there is: each gets its turn.
void memory(RigOptions options) {
  options.payloadTotal = 600 * 1024;
  options.payloadPerConnection = 400 * 1024;
  options.payloadMax = 512 * 1024;
  Rig rig(options);
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (uint64_t who = 0; who < 4; who++) {
    threads.emplace_back([&, who] {
      try {
        auto client = rig.connect(Mode::Simple);
        for (uint64_t i = 0; i < 8; i++) {
          client->send(kWriteZeroes, 0, (who * 8 + i) * 200000, 1000);
          const Bytes data = noise(200000, who * 8 + i);
          client->send(kWrite, 0, (who * 8 + i) * 200000, data.size(), data);
          client->send(kRead, 0, (who * 8 + i) * 200000, data.size());
          for (int k = 0; k < 3; k++) CHECK_EQUAL(client->receive().error, uint32_t{kOk});
        }
        good++;
      } catch (const Failure& failure) {
        fprintf(stderr, "# %s\n", failure.what.c_str());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(good.load(), 4);
}

/// A stripe that is formatted and has no slot fails the reads that touch it, and no other: not even those behind it.
void contradiction(RigOptions options) {
  Rig rig(options);
  const Bytes data = noise(6 << 20, 4);
  for (const Mode mode : kModes) {
    auto client = rig.connect(mode);
    CHECK_EQUAL(client->write(0, data), uint32_t{kOk});
    const uint64_t stripe = (3 << 20) / rig.stripeSize;
    const uint32_t slot = rig.slotOf(stripe);
    __atomic_store_n(&rig.slots[stripe], kSlotNone, __ATOMIC_SEQ_CST);
    CHECK_EQUAL(client->exchange(kRead, 0, 3 << 20, 512).error, uint32_t{kEio});
    if (mode == Mode::Simple) {
      // Promised data cannot be taken back: the stream breaks off.
      uint8_t byte[4096];
      client->send(kRead, 0, 0, 6 << 20);
      while (recv(client->fd, byte, sizeof byte, 0) > 0) {
      }
      CHECK(eventually([&] { return rig.endOf(client->session) == static_cast<int>(SessionEnd::Error); }));
    } else {
      for (const uint16_t flags : {uint16_t{0}, uint16_t{kFlagDontFragment}}) {
        CHECK_EQUAL(client->exchange(kRead, flags, 0, 6 << 20).error, uint32_t{kEio});
        CHECK(client->read(0, 100000, kFlagDontFragment) == cut(data, 0, 100000));
        CHECK(client->read(0, 100000) == cut(data, 0, 100000));
      }
    }
    __atomic_store_n(&rig.slots[stripe], slot, __ATOMIC_SEQ_CST);
  }
}

/// Refusals do not end a session; what cannot be framed does.
void refusals(RigOptions options) {
  options.payloadMax = 1 << 20;
  Rig rig(options);
  for (const Mode mode : kModes) {
    auto client = rig.connect(mode);
    CHECK_EQUAL(client->write(options.size - 1, noise(2, 1)), uint32_t{kEnospc});
    CHECK_EQUAL(client->exchange(kRead, 0, options.size, 1).error, uint32_t{kEinval});
    CHECK_EQUAL(client->exchange(99, 0, 0, 1).error, uint32_t{kEinval});
    if (mode != Mode::Extended) CHECK_EQUAL(client->write(0, noise((1 << 20) + 1, 1)), uint32_t{kEinval});
    if (mode == Mode::Simple) {
      CHECK_EQUAL(client->exchange(kBlockStatus, 0, 0, 1).error, uint32_t{kEinval});
    } else {
      const Client::Reply reply = client->exchange(kBlockStatus, 0, 0, 1 << 20);
      CHECK_EQUAL(reply.error, uint32_t{kOk});
      CHECK_EQUAL(reply.chunks, size_t{2});
      CHECK_EQUAL(load32(reply.data.data()), uint32_t{101});
    }
    auto readOnly = rig.connect(mode, true);
    CHECK_EQUAL(readOnly->write(0, noise(100000, 1)), uint32_t{kEperm});
    CHECK(readOnly->read(0, 512) == Bytes(512));
    client->sendBytes("not a request at all", 20);
    CHECK(client->receive().ended);
    CHECK(eventually([&] { return rig.endOf(client->session) == static_cast<int>(SessionEnd::Protocol); }));
  }
}

/// The end of everything with upcalls unanswered, reads in the engine, and tasks in the pools.
void stop(RigOptions options) {
  const size_t before = openDescriptors();
  std::vector<Bytes> ranges(6 * 32, Bytes(65536));  // outlives what is read into it
  for (int round = 0; round < 6; round++) {
    std::vector<std::unique_ptr<Client>> clients;
    Rig rig(options);
    for (const Mode mode : kModes) clients.push_back(rig.connect(mode));
    CHECK_EQUAL(clients[0]->write(0, noise(2 << 20, 1)), uint32_t{kOk});
    rig.hold(round % 2 == 0);
    for (auto& client : clients) {
      client->send(kWrite, 0, 4 << 20, 50000, noise(50000, 2));
      client->send(kFlush, 0, 0, 0);
      client->send(kCache, 0, 0, 1 << 20);
      for (uint64_t i = 0; i < 16; i++) client->send(kRead, 0, i * 65536, 65536);
    }
    if (round % 3 == 0) CHECK(eventually([&] { return rig.upcallsWaiting() > 0 || round % 2 != 0; }));
    Bytes* const targets = ranges.data() + round * 32;
    for (uint64_t i = 0; i < 32; i++) rig.readRange(i * 65536, targets[i]);
    rig.call([&](Datapath& datapath) {
      datapath.adopt(Rig::kExport, UpcallKind::Write, 0, ranges[0].size(), ranges[0].data());
      datapath.adopt(Rig::kExport, UpcallKind::Trim, 0, 4096, nullptr);
    });
    rig.submit({4, 0});
    rig.submit({6, 0, 0});
  }
  CHECK(eventually([&] { return openDescriptors() <= before; }));
}

/// Random request streams, well-formed and damaged, cut anywhere, against the live engine; fixed seeds, bounded in time.
void fuzz(RigOptions options) {
  options.payloadMax = 256 * 1024;
  options.payloadTotal = 1 << 20;
  options.payloadPerConnection = 512 * 1024;
  Rig rig(options);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(1200);
  size_t sessions = 0;
  for (uint64_t seed = 1; std::chrono::steady_clock::now() < deadline; seed++) {
    Random random(seed);
    const Mode mode = kModes[random.below(3)];
    auto client = rig.connect(mode);
    sessions++;
    Bytes stream;
    const bool damaged = random.chance(60);
    for (uint64_t left = 1 + random.below(40); left > 0; left--) {
      const uint16_t command = static_cast<uint16_t>(random.below(random.chance(95) ? 8 : 12));
      if (command == kDisconnect && random.chance(90)) continue;
      uint16_t flags = random.chance(80) ? 0 : static_cast<uint16_t>(1u << random.below(8));
      uint64_t length = 1 + random.below(random.chance(80) ? 5000 : 200000);
      uint64_t payload = command == kWrite ? length : 0;
      if (command == kFlush) length = 0;
      if (mode == Mode::Extended) {
        if (command == kBlockStatus && random.chance(50)) {
          flags |= kFlagPayloadLength;
          payload = length = 8 + 4 * random.below(4);
        }
        if (command == kWrite) flags |= kFlagPayloadLength;
        if (payload == 0 && (flags & kFlagPayloadLength) != 0) payload = length;
      }
      const size_t start = stream.size();
      const Bytes head = client->header(command, flags, command == kFlush ? 0 : random.below(options.size), length, left);
      stream.insert(stream.end(), head.begin(), head.end());
      if (damaged && random.chance(5)) stream[start + random.below(head.size())] ^= static_cast<uint8_t>(random.next());
      stream.resize(stream.size() + payload, static_cast<uint8_t>(left));
    }
    std::atomic<bool> ended{false};
    std::thread reader([&] {
      uint8_t bytes[65536];
      while (recv(client->fd, bytes, sizeof bytes, 0) > 0) {
      }
      ended = true;
    });
    for (size_t at = 0; at < stream.size();) {
      const size_t part = std::min<size_t>(stream.size() - at, 1 + random.below(random.chance(30) ? 64 : 100000));
      if (::send(client->fd, stream.data() + at, part, MSG_NOSIGNAL) <= 0) break;
      at += part;
    }
    shutdown(client->fd, random.chance(50) ? SHUT_WR : SHUT_RDWR);
    reader.join();
    CHECK(eventually([&] { return rig.endOf(client->session) >= 0; }));
  }
  CHECK(sessions >= 3);
  auto client = rig.connect(Mode::Simple);
  CHECK_EQUAL(client->write(0, noise(256 * 1024, 1)), uint32_t{kOk});
  CHECK(client->read(0, 256 * 1024) == noise(256 * 1024, 1));
}

struct Body {
  const char* name;
  void (*run)(RigOptions);
  bool cachedToo;  // worth running with reads out of the page cache as well
};

constexpr Body kBodies[] = {
    {"reads of formatted and unformatted stripes", reads, true},
    {"random operations against a byte model", model, true},
    {"many requests in flight", pipeline, true},
    {"barrier and new tables", barrier, true},
    {"range reads", ranges, true},
    {"barriers and range reads", rangeBarrier, false},
    {"adopted requests", adopted, false},
    {"closing with requests in flight", closing, false},
    {"hang-up in mid-payload", hangup, false},
    {"connects and disconnects", churn, true},
    {"memory is shared out", memory, false},
    {"tables that contradict themselves", contradiction, true},
    {"refusals", refusals, false},
    {"stop in mid-work", stop, false},
    {"random streams", fuzz, false},
};

const bool registered = [] {
  for (const EngineChoice engine : {EngineChoice::IoUring, EngineChoice::Threads}) {
    for (const Body& body : kBodies) {
      for (const bool uncached : {true, false}) {
        // Cached reads never come to an engine: once is enough.
        if (!uncached && (!body.cachedToo || engine == EngineChoice::Threads)) continue;
        const std::string which = !uncached ? "cached" : engine == EngineChoice::IoUring ? "io_uring" : "threads";
        Register("engine " + which + ": " + body.name, [=] {
          RigOptions options;
          options.engine = uncached ? engine : EngineChoice::Auto;
          options.uncached = uncached;
          body.run(options);
        });
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace nbd::test
