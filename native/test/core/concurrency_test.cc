// Many clients that do everything at once on the same sectors, upcalls answered in any order, clients that leave in the middle,
// and ends in the middle. What reads return is held against what the order of requests and answers permits: every sector by
// itself is a register, trims and zeroes write zeros.
//
// Each sector tells who wrote it: token and sector number in turn, 8 bytes each. A read may see words of two writers
// where one of them is at work at that moment.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "rig.h"

namespace nbd::test {
namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kWords = kSector / 8;
constexpr uint64_t kForever = std::numeric_limits<uint64_t>::max();
constexpr Mode kModes[] = {Mode::Simple, Mode::Structured, Mode::Extended};

uint16_t flagsIf(bool wanted, uint16_t flags) { return wanted ? flags : 0; }

struct Operation {
  bool read;
  uint64_t first, count;  // sectors
  uint64_t token;         // a write's; 0 = zeros
  uint64_t begin;
  uint64_t end = kForever;  // kForever: no answer came
  Bytes data;               // a read's
};

struct History {
  std::atomic<uint64_t> clock{1};
  std::atomic<uint64_t> tokens{0};
  std::mutex mutex;
  std::vector<Operation> operations;

  void add(std::vector<Operation>& more) {
    std::lock_guard<std::mutex> lock(mutex);
    operations.insert(operations.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
    more.clear();
  }
  /// Throws where a read returned what it may not.
  void check(uint64_t sectors) const;
};

/// The writes of one sector.
class SectorRegister {
 public:
  SectorRegister() { add({0, 0, 0}); }
  struct Write {
    uint64_t begin, end, token;
  };
  void add(const Write& write) {
    ends_.push_back({write.end, write.begin});
    (write.token == 0 ? zeros_ : writes_[write.token]).push_back(write);
  }
  void seal() {
    std::sort(ends_.begin(), ends_.end());
    uint64_t latest = 0;
    for (auto& [end, begin] : ends_) begin = latest = std::max(latest, begin);
  }
  /// Whether a read between `begin` and `end` may return that token: of a write that began in time, and that no other one,
  /// which began after it had ended, has replaced before the read began.
  bool permits(uint64_t token, uint64_t begin, uint64_t end) const {
    const auto after = std::lower_bound(ends_.begin(), ends_.end(), std::pair<uint64_t, uint64_t>{begin, 0});
    const uint64_t replaced = after == ends_.begin() ? 0 : std::prev(after)->second;
    const auto found = writes_.find(token);
    if (token != 0 && found == writes_.end()) return false;
    const std::vector<Write>& candidates = token == 0 ? zeros_ : found->second;
    return std::any_of(candidates.begin(), candidates.end(),
                       [&](const Write& write) { return write.begin < end && write.end >= replaced; });
  }

 private:
  std::vector<std::pair<uint64_t, uint64_t>> ends_;  // end, and the latest begin among those that ended by then
  std::unordered_map<uint64_t, std::vector<Write>> writes_;
  std::vector<Write> zeros_;
};

void History::check(uint64_t sectors) const {
  std::vector<SectorRegister> registers(sectors);
  for (const Operation& one : operations) {
    if (one.read) continue;
    for (uint64_t s = one.first; s < one.first + one.count; s++) registers[s].add({one.begin, one.end, one.token});
  }
  for (SectorRegister& one : registers) one.seal();
  for (const Operation& one : operations) {
    if (!one.read || one.end == kForever) continue;
    for (uint64_t i = 0; i < one.count; i++) {
      const uint64_t sector = one.first + i;
      uint64_t last = kForever;
      for (uint64_t w = 0; w < kWords; w++) {
        uint64_t word;
        memcpy(&word, one.data.data() + i * kSector + w * 8, 8);
        // A place says nothing about who wrote it, but zero says that zeros did, except in the first sector.
        if (w % 2 == 1 && (word != 0 || sector == 0)) {
          if (word != sector) failed("the sector's own content", __FILE__, __LINE__, std::to_string(sector) + " holds " + std::to_string(word));
          continue;
        }
        if (word == last) continue;
        last = word;
        if (registers[sector].permits(word, one.begin, one.end)) continue;
        failed("permitted", __FILE__, __LINE__,
               "sector " + std::to_string(sector) + " read " + std::to_string(word) + " at " + std::to_string(one.begin) +
                   " to " + std::to_string(one.end));
      }
    }
  }
}

Bytes sectorData(uint64_t token, uint64_t first, uint64_t count) {
  Bytes data(count * kSector);
  for (uint64_t s = 0; s < count; s++) {
    for (uint64_t w = 0; w < kWords; w++) {
      const uint64_t word = w % 2 == 0 ? token : first + s;
      memcpy(data.data() + s * kSector + w * 8, &word, 8);
    }
  }
  return data;
}

/// One client: batches of requests on ranges that overlap those of all others.
class Worker {
 public:
  Worker(Rig& rig, History& history, uint64_t seed)
      : rig_(rig),
        sectors_(rig.options.size / kSector),
        unit_(rig.options.formatUnit * rig.stripeSize / kSector),
        history_(history),
        random_(seed) {}

  /// May go on when the rig is gone.
  void batch(Client& client) {
    std::map<uint64_t, size_t> sent;
    std::vector<Operation> batch;
    // Also where a failure leaves this: others may have read what was written.
    struct Keep {
      History& history;
      std::vector<Operation>& batch;
      ~Keep() { history.add(batch); }
    } keep{history_, batch};
    uint64_t others = 0;
    for (uint64_t left = 1 + random_.below(8); left > 0; left--) {
      const uint64_t first = random_.below(sectors_);
      const uint64_t count = std::min(sectors_ - first, 1 + random_.below(random_.chance(70) ? 8 : 100));
      Operation operation{false, first, count, 0, 0, kForever, {}};
      const uint64_t kind = random_.below(100);
      uint64_t cookie = 0;
      if (kind < 40) {
        operation.token = ++history_.tokens;
        operation.begin = history_.clock++;
        cookie = client.send(kWrite, flagsIf(kind < 3, kFlagFua), first * kSector, count * kSector,
                             sectorData(operation.token, first, count));
      } else if (kind < 75) {
        operation.read = true;
        operation.begin = history_.clock++;
        cookie = client.send(kRead, flagsIf(kind < 45 && client.mode != Mode::Simple, kFlagDontFragment),
                             first * kSector, count * kSector);
      } else if (kind < 83) {
        operation.begin = history_.clock++;
        cookie = client.send(kWriteZeroes, 0, first * kSector, count * kSector);
      } else if (kind < 94) {
        // Whole format units: this policy gives back nothing else.
        operation.first = first / unit_ * unit_;
        operation.count = std::min(unit_, sectors_ - operation.first);
        if (operation.count < unit_) continue;
        operation.begin = history_.clock++;
        cookie = client.send(kTrim, 0, operation.first * kSector, operation.count * kSector);
      } else {
        others++;
        if (kind < 96) {
          client.send(kFlush, 0, 0, 0);
        } else if (kind < 98 || client.mode == Mode::Simple) {
          client.send(kCache, 0, first * kSector, count * kSector);
        } else {
          client.send(kBlockStatus, 0, first * kSector, count * kSector);
        }
        continue;
      }
      sent[cookie] = batch.size();
      batch.push_back(std::move(operation));
    }
    answered_ = true;
    for (uint64_t left = sent.size() + others; left > 0; left--) {
      Client::Reply reply = client.receive();
      if (reply.ended) {
        answered_ = false;
        break;
      }
      CHECK_EQUAL(reply.error, uint32_t{kOk});
      const auto found = sent.find(reply.cookie);
      if (found == sent.end()) continue;
      batch[found->second].end = history_.clock++;
      batch[found->second].data = std::move(reply.data);
    }
  }

  /// Comes, asks, and leaves before the answers, perhaps in the middle of a payload. What it wrote may happen or not.
  void visit() {
    auto client = rig_.connect(kModes[random_.below(3)]);
    std::vector<Operation> unanswered;
    for (uint64_t left = random_.below(5); left > 0; left--) {
      const uint64_t first = random_.below(sectors_ - 40);
      Operation operation{false, first, 1 + random_.below(40), ++history_.tokens, history_.clock++, kForever, {}};
      client->send(kWrite, 0, first * kSector, operation.count * kSector, sectorData(operation.token, first, operation.count));
      unanswered.push_back(std::move(operation));
    }
    if (random_.chance(50)) {
      const uint64_t first = random_.below(sectors_ - 200);
      Operation operation{false, first, 200, ++history_.tokens, history_.clock++, kForever, {}};
      const uint16_t flags = flagsIf(client->mode == Mode::Extended, kFlagPayloadLength);
      Bytes bytes = client->header(kWrite, flags, first * kSector, 200 * kSector, 99);
      const Bytes data = sectorData(operation.token, first, 200);
      bytes.insert(bytes.end(), data.begin(), data.begin() + static_cast<long>(random_.below(data.size())));
      client->sendBytes(bytes.data(), bytes.size());
      unanswered.push_back(std::move(operation));
    }
    history_.add(unanswered);
  }

  bool answered() const { return answered_; }

 private:
  Rig& rig_;
  const uint64_t sectors_, unit_;  // unit: sectors of a format unit
  History& history_;
  Random random_;
  bool answered_ = true;
};

/// FULLSTRIPE_TEST_ROUNDS and TEST_SEED make it longer, and another one.
uint64_t setting(const char* name, uint64_t otherwise) {
  const char* text = getenv(name);
  return text == nullptr ? otherwise : strtoull(text, nullptr, 10);
}

RigOptions small(RigOptions options) {
  options.size = (256 << 10) - kSector;
  options.chunkSize = 4096;
  options.members = 2;
  options.formatUnit = options.engine == EngineChoice::Threads ? 1 : 2;
  options.payloadMax = 256 * 1024;
  options.slowReads = true;
  options.shuffled = 1 + setting("TEST_SEED", 1);
  return options;
}

void allAtOnce(RigOptions base, uint64_t payloadTotal) {
  RigOptions options = small(base);
  options.payloadTotal = payloadTotal;
  options.payloadPerConnection = std::min<uint64_t>(options.payloadPerConnection, payloadTotal);
  Rig rig(options);
  History history;
  std::atomic<int> broken{0};
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  auto guarded = [&](const std::function<void()>& body) {
    try {
      body();
    } catch (const Failure& failure) {
      fprintf(stderr, "# %s\n", failure.what.c_str());
      broken++;
    }
  };
  for (uint64_t who = 0; who < 6; who++) {
    threads.emplace_back([&, who] {
      guarded([&] {
        Worker worker(rig, history, setting("TEST_SEED", 1) * 1000 + who);
        auto client = rig.connect(kModes[who % 3]);
        for (uint64_t round = setting("FULLSTRIPE_TEST_ROUNDS", 60); round > 0; round--) {
          worker.batch(*client);
          CHECK(worker.answered());
        }
      });
    });
  }
  std::thread leaver([&] {
    guarded([&] {
      Worker worker(rig, history, 100);
      while (!over.load()) worker.visit();
    });
  });
  std::thread ranger([&] {
    guarded([&] {
      Random random(setting("TEST_SEED", 1));
      const uint64_t sectors = options.size / kSector;
      while (!over.load()) {
        std::vector<Operation> batch;
        std::vector<double> tags;
        for (uint64_t left = 1 + random.below(4); left > 0; left--) {
          const uint64_t first = random.below(sectors);
          const uint64_t count = std::min(sectors - first, 1 + random.below(200));
          batch.push_back({true, first, count, 0, history.clock++, kForever, Bytes(count * kSector)});
          tags.push_back(rig.readRange(first * kSector, batch.back().data));
        }
        for (size_t i = 0; i < tags.size(); i++) {
          CHECK_EQUAL(rig.result(tags[i]), 0);
          batch[i].end = history.clock++;
        }
        history.add(batch);
      }
    });
  });
  std::thread disturber([&] {
    guarded([&] {
      // Barriers, new tables, and times in which the policy does nothing.
      for (int round = 0; !over.load(); round++) {
        rig.hold(true);
        CHECK(rig.done(rig.submit({6, 0, 0})));
        rig.hold(false);
        Tables tables;
        tables.size = rig.options.size;
        tables.slots = rig.slots.data();
        tables.init = rig.init.data();
        tables.direct = rig.direct.data();
        rig.call([&](Datapath& datapath) { datapath.retable(Rig::kExport, 1e9 + round, tables); });
        CHECK(rig.done(1e9 + round));
      }
    });
    rig.hold(false);
  });
  for (std::thread& thread : threads) thread.join();
  over = true;
  leaver.join();
  ranger.join();
  disturber.join();
  CHECK_EQUAL(broken.load(), 0);
  history.check(options.size / kSector);
}

/// The export is closed under load: every request that was read is answered, and what was answered is as it should be.
void closedUnderLoad(RigOptions base) {
  const RigOptions options = small(base);
  for (uint64_t round = 0; round < 4; round++) {
    Rig rig(options);
    History history;
    std::atomic<int> broken{0}, busy{0};
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<Client>> clients;
    for (uint64_t who = 0; who < 4; who++) clients.push_back(rig.connect(kModes[who % 3]));
    for (uint64_t who = 0; who < 4; who++) {
      threads.emplace_back([&, who] {
        try {
          Worker worker(rig, history, 10 * round + who);
          while (worker.answered()) {
            worker.batch(*clients[who]);
            busy++;
          }
        } catch (const Failure& failure) {
          // A request may find the connection closed already.
          if (busy.load() == 0) {
            fprintf(stderr, "# %s\n", failure.what.c_str());
            broken++;
          }
        }
      });
    }
    const bool started = eventually([&] { return busy.load() > 12; });
    const double close = rig.submit({7, 0, Rig::kExport});
    const bool closed = rig.done(close);
    for (std::thread& thread : threads) thread.join();
    CHECK(started && closed);
    CHECK_EQUAL(broken.load(), 0);
    CHECK_EQUAL(rig.endCount(), size_t{4});
    history.check(options.size / kSector);
  }
}

/// Everything ends while clients are in the middle of their requests: nothing hangs, nothing is used after it is gone.
void endUnderLoad(RigOptions base) {
  const RigOptions options = small(base);
  const size_t before = openDescriptors();
  for (uint64_t round = 0; round < 6; round++) {
    History history;
    std::atomic<int> busy{0};
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<Client>> clients;
    {
      Rig rig(options);
      for (uint64_t who = 0; who < 4; who++) clients.push_back(rig.connect(kModes[who % 3]));
      std::vector<std::unique_ptr<Worker>> workers;
      for (uint64_t who = 0; who < 4; who++) workers.push_back(std::make_unique<Worker>(rig, history, 10 * round + who));
      for (uint64_t who = 0; who < 4; who++) {
        threads.emplace_back([&, who, worker = std::shared_ptr<Worker>(std::move(workers[who]))] {
          try {
            while (worker->answered()) {
              worker->batch(*clients[who]);
              busy++;
            }
          } catch (const Failure&) {
            // Sent to a connection that is gone.
          }
        });
      }
      const bool started = eventually([&] { return busy.load() > static_cast<int>(4 + 3 * round); });
      CHECK(started);
    }
    for (std::thread& thread : threads) thread.join();
    history.check(options.size / kSector);
  }
  CHECK(eventually([&] { return openDescriptors() <= before; }));
}

const bool registered = [] {
  for (const EngineChoice engine : {EngineChoice::IoUring, EngineChoice::Threads}) {
    RigOptions options;
    options.engine = engine;
    options.uncached = true;
    const std::string which = engine == EngineChoice::IoUring ? "io_uring" : "threads";
    Register("concurrency " + which + ": everything at once", [=] { allAtOnce(options, 64 << 20); });
    Register("concurrency " + which + ": everything at once, in too little memory", [=] { allAtOnce(options, 100 * 1024); });
    Register("concurrency " + which + ": closed under load", [=] { closedUnderLoad(options); });
    Register("concurrency " + which + ": the end under load", [=] { endUnderLoad(options); });
  }
  RigOptions cached;
  Register("concurrency cached: everything at once", [=] { allAtOnce(cached, 64 << 20); });
  return true;
}();

}  // namespace
}  // namespace nbd::test
