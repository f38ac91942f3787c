// The whole datapath below the glue, over real sockets, files and threads.
#include <dirent.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "harness.h"
#include "rig.h"

using namespace nbd;
using test::Client;
using test::Random;
using test::Rig;
using test::RigOptions;

namespace {

constexpr Mode kModes[] = {Mode::Simple, Mode::Structured, Mode::Extended};
constexpr EngineChoice kEngines[] = {EngineChoice::Auto, EngineChoice::Threads};

std::vector<uint8_t> randomBytes(Random& random, size_t length) {
  std::vector<uint8_t> bytes(length);
  for (auto& byte : bytes) byte = static_cast<uint8_t>(random.next() >> 11);
  return bytes;
}

size_t entries(const char* directory) {
  size_t count = 0;
  DIR* open = opendir(directory);
  if (open == nullptr) return 0;
  while (readdir(open) != nullptr) count++;
  closedir(open);
  return count;
}

/// Random reads, writes, trims and flushes in [base, base + length), compared with memory.
void traffic(Client& client, Random& random, uint64_t base, uint64_t length, int requests) {
  std::vector<uint8_t> model(length, 0);
  for (int i = 0; i < requests; i++) {
    const uint64_t offset = random.below(length);
    const uint64_t most = std::min<uint64_t>(length - offset, random.below(8) == 0 ? 300'000 : 9000);
    const uint64_t part = 1 + random.below(most);
    switch (random.below(8)) {
      case 0:
      case 1:
      case 2: {
        const auto bytes = randomBytes(random, part);
        CHECK_EQUAL(client.write(base + offset, bytes, random.below(4) == 0 ? kFlagFua : 0), 0u);
        std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<long>(offset));
        break;
      }
      case 3:
        CHECK_EQUAL(client.simple(random.below(2) == 0 ? kTrim : kWriteZeroes, base + offset, part), 0u);
        std::fill_n(model.begin() + static_cast<long>(offset), part, 0);
        break;
      case 4:
        CHECK_EQUAL(client.simple(kFlush, 0, 0), 0u);
        break;
      default: {
        const auto reply = client.read(base + offset, part);
        CHECK(!reply.ended && reply.error == 0);
        CHECK(reply.data.size() == part &&
              std::equal(reply.data.begin(), reply.data.end(), model.begin() + static_cast<long>(offset)));
      }
    }
  }
}

}  // namespace

TEST("random traffic on several connections reads back what was written") {
  for (EngineChoice engine : kEngines) {
    for (uint32_t members : {1u, 3u}) {
      RigOptions options;
      options.members = members;
      options.stripes = 3 * 128;
      options.threads = 2;
      options.engine = engine;
      Rig rig(options);
      const uint64_t region = rig.size() / 3;
      std::vector<std::thread> threads;
      for (int i = 0; i < 3; i++) {
        threads.emplace_back([&rig, region, i, members] {
          Random random(test::seed + static_cast<uint64_t>(i) + 10 * members);
          Client client = rig.connect(kModes[i], i == 1);
          traffic(client, random, static_cast<uint64_t>(i) * region, region, 150);
        });
      }
      for (std::thread& thread : threads) thread.join();
      CHECK(rig.waitForSessions(0));
      CHECK_EQUAL(rig.counters()[7], 0.0);  // errors
    }
  }
}

TEST("pipelined requests are all answered, in place and through the policy") {
  RigOptions options;
  options.stripes = 256;
  Rig rig(options);
  Random random(test::seed);
  for (int round = 0; round < 3; round++) {
    Client client = rig.connect();
    std::vector<uint8_t> stream;
    const int count = 2000;
    for (int i = 0; i < count; i++) {
      uint8_t header[kRequestSize];
      uint8_t* at = put32(header, kRequestMagic);
      at = put16(at, 0);
      at = put16(at, kWrite);
      at = put64(at, static_cast<uint64_t>(i));
      at = put64(at, random.below(rig.size() - 600));
      const uint32_t length = static_cast<uint32_t>(1 + random.below(600));
      put32(at, length);
      stream.insert(stream.end(), header, header + sizeof header);
      stream.resize(stream.size() + length, static_cast<uint8_t>(i));
    }
    std::thread sender([&] { client.sendBytes(stream.data(), stream.size()); });
    std::vector<bool> answered(count);
    for (int i = 0; i < count; i++) {
      uint8_t reply[kSimpleReplySize];
      if (!client.receiveBytes(reply, sizeof reply)) {
        CHECK(false);
        break;
      }
      CHECK_EQUAL(load32(reply + 4), 0u);
      const uint64_t cookie = load64(reply + 8);
      CHECK(cookie < count && !answered[cookie]);
      if (cookie < count) answered[cookie] = true;
    }
    sender.join();
  }
}

TEST("a long reply goes on whenever the client makes room") {
  for (Mode mode : kModes) {
    RigOptions options;
    options.stripes = 4096;
    Rig rig(options);
    rig.formatAll();
    Random random(test::seed);
    const auto bytes = randomBytes(random, 64 * 1024);
    Client writer = rig.connect(mode);
    for (uint64_t at = 0; at < rig.size(); at += bytes.size()) CHECK_EQUAL(writer.write(at, bytes), 0u);
    for (int round = 0; round < 8; round++) {
      Client client = rig.connect(mode);
      const int small = 4096;
      setsockopt(client.fd(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
      const uint64_t length = 14 << 20;
      const uint64_t cookie = client.send(kRead, 0, length, mode == Mode::Structured && round % 2 == 0 ? kFlagDontFragment : 0);
      if (round % 3 == 0) std::this_thread::yield();
      const auto reply = client.receive(cookie, length);
      CHECK(!reply.ended && reply.error == 0);
      bool same = reply.data.size() == length;
      for (uint64_t at = 0; same && at < length; at += bytes.size()) {
        same = memcmp(reply.data.data() + at, bytes.data(), bytes.size()) == 0;
      }
      CHECK(same);
      // And small replies behind large ones, which stop the parser in the middle of a batch.
      std::vector<uint64_t> cookies;
      for (int i = 0; i < 64; i++) cookies.push_back(client.send(kRead, 0, 64 * 1024));
      for (uint64_t each : cookies) CHECK(client.receive(each, 64 * 1024).data == bytes);
    }
  }
}

TEST("reads that are not cached come through the engine") {
  for (EngineChoice engine : kEngines) {
    for (Mode mode : kModes) {
      RigOptions options;
      options.members = 2;
      options.chunkSize = 64 * 1024;
      options.stripes = 64;
      options.engine = engine;
      Rig rig(options);
      Random random(test::seed);
      const auto bytes = randomBytes(random, rig.size());
      Client client = rig.connect(mode);
      CHECK_EQUAL(client.write(0, bytes), 0u);
      rig.evict();
      const auto all = client.read(0, rig.size());  // streamed
      CHECK(all.data == bytes);
      rig.evict();
      std::vector<std::pair<uint64_t, uint64_t>> sent;
      for (int i = 0; i < 60; i++) {
        const uint64_t offset = random.below(rig.size() - 200'000);
        const uint64_t length = 1 + random.below(200'000);
        const auto reply = client.read(offset, length);
        CHECK(reply.data.size() == length && memcmp(reply.data.data(), bytes.data() + offset, length) == 0);
        if (i % 10 == 0) rig.evict();
      }
      CHECK_EQUAL(client.simple(kCache, 0, rig.size()), 0u);
    }
  }
}

TEST("after a barrier nothing writes where a direct bit was cleared before it") {
  RigOptions options;
  options.stripes = 8;
  options.threads = 2;
  Rig rig(options);
  rig.formatAll();
  std::atomic<bool> ending{false};
  std::vector<std::thread> writers;
  for (int i = 0; i < 2; i++) {
    writers.emplace_back([&, i] {
      Client client = rig.connect();
      std::vector<uint8_t> bytes(4096);
      for (uint8_t value = 1; !ending.load(); value++) {
        std::fill(bytes.begin(), bytes.end(), value);
        CHECK_EQUAL(client.write(static_cast<uint64_t>(i) * 4096, bytes), 0u);
      }
    });
  }
  for (int round = 0; round < 100; round++) {
    const uint32_t stripe = static_cast<uint32_t>(round % 2);
    rig.hold();
    rig.setDirect(stripe, false);
    CHECK(rig.barrier());
    const auto before = rig.slotBytes(1 + stripe);
    CHECK(std::all_of(before.begin(), before.end(), [&](uint8_t byte) { return byte == before[0]; }));
    for (int look = 0; look < 3; look++) {
      std::this_thread::yield();
      CHECK(rig.slotBytes(1 + stripe) == before);
    }
    rig.release();
  }
  ending.store(true);
  for (std::thread& writer : writers) writer.join();
  CHECK(rig.counters()[9] > 0);  // in-place writes
}

TEST("a barrier waits for reads, and not for clients") {
  for (EngineChoice engine : kEngines) {
    RigOptions options;
    options.chunkSize = 64 * 1024;
    options.stripes = 512;
    options.engine = engine;
    Rig rig(options);
    rig.formatAll();
    Client stalled = rig.connect();
    stalled.send(kRead, 0, 32 << 20);  // and never reads
    Client half = rig.connect();
    half.send(kWrite, 0, 1 << 20, 0, std::vector<uint8_t>(300'000, 1));  // and never sends the rest
    Client busy = rig.connect();
    for (int i = 0; i < 50; i++) {
      if (i % 10 == 0) rig.evict();
      const uint64_t cookie = busy.send(kRead, static_cast<uint64_t>(i) * 100'000, 100'000);
      CHECK(rig.barrier());
      CHECK(busy.receive(cookie, 100'000).error == 0);
    }
  }
}

TEST("tables are switched under load, and the old ones are not used any more") {
  RigOptions options;
  options.stripes = 16;
  options.threads = 2;
  Rig rig(options);
  std::atomic<bool> ending{false};
  std::vector<std::thread> clients;
  for (int i = 0; i < 2; i++) {
    clients.emplace_back([&, i] {
      Client client = rig.connect(kModes[i]);
      Random random(test::seed + static_cast<uint64_t>(i));
      while (!ending.load()) {
        const uint64_t offset = random.below(rig.size() - 8192);
        if (random.below(2) == 0) {
          CHECK_EQUAL(client.write(offset, std::vector<uint8_t>(8192, 7)), 0u);
        } else {
          CHECK_EQUAL(client.read(offset, 8192).error, 0u);
        }
      }
    });
  }
  for (uint32_t stripes = 20; stripes < 400; stripes += 4) rig.grow(stripes);
  ending.store(true);
  for (std::thread& client : clients) client.join();
}

TEST("memory is bounded, and everybody gets his turn") {
  RigOptions options;
  options.stripes = 256;
  options.threads = 2;
  options.payloadTotal = 300'000;
  options.payloadPerConnection = 150'000;
  options.requestsInFlight = 8;
  Rig rig(options);
  std::vector<std::thread> clients;
  for (int i = 0; i < 6; i++) {
    clients.emplace_back([&, i] {
      Random random(test::seed + static_cast<uint64_t>(i));
      Client client = rig.connect(kModes[i % 3]);
      std::vector<uint64_t> cookies;
      for (int k = 0; k < 40; k++) {
        const uint64_t length = 1 + random.below(120'000);
        const uint64_t offset = random.below(rig.size() - length);
        if (k % 5 == 0) rig.setDirect(offset / rig.stripeSize(), false);
        CHECK_EQUAL(client.write(offset, std::vector<uint8_t>(length, 3)), 0u);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  CHECK(rig.waitForSessions(0));
}

TEST("sessions end once, for their own reason") {
  Rig rig(RigOptions{});
  rig.formatAll();
  {
    Client client = rig.connect();
    client.send(kDisconnect, 0, 0);
    uint8_t byte;
    CHECK(!client.receiveBytes(&byte, 1));
    CHECK(rig.waitForSessions(0));
  }
  {
    Client client = rig.connect();
    CHECK_EQUAL(client.simple(kFlush, 0, 0), 0u);
    client.close();
    CHECK(rig.waitForSessions(0));
  }
  {
    Client client = rig.connect();
    client.sendBytes("GET / HTTP/1.1\r\n\r\n", 18);
    uint8_t byte;
    CHECK(!client.receiveBytes(&byte, 1));
    CHECK(rig.waitForSessions(0));
  }
  {
    // What is in flight is answered after a disconnect, too.
    rig.hold();
    Client client = rig.connect();
    const uint64_t flush = client.send(kFlush, 0, 0);
    const uint64_t read = client.send(kRead, 0, 100);
    client.send(kDisconnect, 0, 0);
    CHECK(client.receive(read, 100).error == 0);
    CHECK_EQUAL(rig.sessions(), 1u);
    while (rig.held() == 0) std::this_thread::yield();
    rig.release();
    CHECK(!client.receive(flush).ended);
    uint8_t byte;
    CHECK(!client.receiveBytes(&byte, 1));
    CHECK(rig.waitForSessions(0));
  }
  {
    Client client = rig.connect();
    CHECK_EQUAL(client.simple(kFlush, 0, 0), 0u);
    CHECK(rig.closeExport());
    CHECK_EQUAL(rig.sessions(), 0u);
  }
  const std::vector<int> expected{0, 1, 2, 0, 4};
  CHECK(rig.ends() == expected);
}

TEST("a client that never reads delays the end of its export by a moment only") {
  RigOptions options;
  options.chunkSize = 64 * 1024;
  options.stripes = 512;
  Rig rig(options);
  rig.formatAll();
  std::vector<Client> clients;
  for (int i = 0; i < 4; i++) {
    clients.push_back(rig.connect(kModes[i % 3], i == 3));
    for (int k = 0; k < 40; k++) clients.back().send(kRead, 0, k % 2 == 0 ? 1 << 20 : 5 << 20);
  }
  const auto start = std::chrono::steady_clock::now();
  CHECK(rig.closeExport());
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  CHECK_EQUAL(rig.ends().size(), 4u);
}

TEST("garbage and torn streams of any kind end their own session only") {
  RigOptions options;
  options.threads = 2;
  Rig rig(options);
  Client witness = rig.connect();
  Random random(test::seed);
  for (int round = 0; round < 300; round++) {
    Client client = rig.connect(kModes[round % 3]);
    std::vector<uint8_t> bytes = randomBytes(random, 1 + random.below(5000));
    // Mostly plausible headers, so that it gets past the first four bytes.
    for (size_t at = 0; at + 32 < bytes.size() && random.below(10) > 0; at += 28 + random.below(40)) {
      put32(bytes.data() + at, round % 3 == 2 ? kExtendedRequestMagic : kRequestMagic);
      put16(bytes.data() + at + 4, static_cast<uint16_t>(random.below(64)));
      put16(bytes.data() + at + 6, static_cast<uint16_t>(random.below(10)));
      put64(bytes.data() + at + 16, random.below(2 * rig.size()));
      if (round % 3 == 2) {
        put64(bytes.data() + at + 24, random.below(9000));
      } else {
        put32(bytes.data() + at + 24, static_cast<uint32_t>(random.below(9000)));
      }
    }
    client.sendBytes(bytes.data(), bytes.size());
    if (round % 2 == 0) shutdown(client.fd(), SHUT_WR);
  }
  CHECK_EQUAL(witness.read(0, 4096).error, 0u);
  CHECK(rig.waitForSessions(1));
}

TEST("thousands of sessions leave nothing behind") {
  RigOptions options;
  options.threads = 2;
  Rig rig(options);
  { Client first = rig.connect(); CHECK_EQUAL(first.write(0, std::vector<uint8_t>(4096, 1)), 0u); }
  CHECK(rig.waitForSessions(0));
  const size_t descriptors = entries("/proc/self/fd");
  const size_t threads = entries("/proc/self/task");
  for (int round = 0; round < 20; round++) {
    std::vector<Client> clients;
    for (int i = 0; i < 100; i++) clients.push_back(rig.connect(kModes[i % 3]));
    for (int i = 0; i < 100; i++) {
      if (i % 3 == 0) clients[static_cast<size_t>(i)].write(static_cast<uint64_t>(i) * 100, std::vector<uint8_t>(100, 1));
      if (i % 3 == 1) clients[static_cast<size_t>(i)].send(kWrite, 0, 100'000, 0, std::vector<uint8_t>(50'000, 1));
    }
  }
  CHECK(rig.waitForSessions(0));
  CHECK_EQUAL(entries("/proc/self/fd"), descriptors);
  CHECK(entries("/proc/self/task") <= threads + 4);  // workers may have started
  CHECK_EQUAL(rig.ends().size(), 2001u);
}

TEST("the end of the environment under load leaves nothing running") {
  for (EngineChoice engine : kEngines) {
    for (int round = 0; round < 5; round++) {
      RigOptions options;
      options.chunkSize = 64 * 1024;
      options.stripes = 128;
      options.threads = 2;
      options.engine = engine;
      Rig rig(options);
      if (round % 2 == 0) rig.formatAll();
      if (round == 3) rig.hold();
      std::vector<std::thread> clients;
      for (int i = 0; i < 3; i++) {
        clients.emplace_back([&rig, i] {
          Client client = rig.connect(kModes[i]);
          Random random(test::seed + static_cast<uint64_t>(i));
          for (;;) {
            const uint64_t offset = random.below(rig.size() - 70'000);
            const bool read = random.below(2) == 0;
            const std::vector<uint8_t> payload(read ? 0 : 70'000, 5);
            const uint64_t cookie = client.send(read ? kRead : kWrite, offset, 70'000, 0, payload);
            if (client.receive(cookie, read ? 70'000 : 0).ended) return;
          }
        });
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20 + 10 * round));
      if (round % 2 == 0) rig.evict();
      rig.stop();
      for (std::thread& client : clients) client.join();
    }
  }
}
