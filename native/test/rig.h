// A datapath with everything around it that TypeScript provides otherwise: tables, a policy on a thread of its own
// (which stands for the JavaScript thread: all calls of the front are made under its lock), and blocking clients.
//
// The policy: the first write of a stripe formats it, later ones go in place and set the direct bit; trims and zeroes
// write zeros; a flush syncs. One upcall a stripe at a time. hold() makes it collect upcalls until release().
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "../src/connection.h"
#include "../src/datapath.h"

namespace test {

struct RigOptions {
  uint32_t members = 1;
  uint64_t chunkSize = 4096;
  uint32_t stripes = 64;
  uint32_t threads = 1;
  nbd::EngineChoice engine = nbd::EngineChoice::Auto;
  uint8_t fill = 0;
  uint64_t payloadTotal = 256 << 20;
  uint64_t payloadPerConnection = 64 << 20;
  uint32_t requestsInFlight = 256;
};

struct Reply {
  bool ended = false;  // the connection ended instead
  uint32_t error = 0;
  std::vector<uint8_t> data;  // of a read
};

/// Blocking, one thread each. Every wait has a deadline that fails the test.
class Client {
 public:
  Client(int fd, nbd::Mode mode) : fd_(fd), mode_(mode) {}
  ~Client() { close(); }
  Client(Client&& other) : fd_(other.fd_), mode_(other.mode_), cookie_(other.cookie_) { other.fd_ = -1; }

  uint64_t send(uint16_t command, uint64_t offset, uint64_t length, uint16_t flags = 0,
                const std::vector<uint8_t>& payload = {});
  /// The reply to `cookie`, which has to be the next one. `length`: bytes of a read.
  Reply receive(uint64_t cookie, uint64_t length = 0);
  Reply read(uint64_t offset, uint64_t length);
  uint32_t write(uint64_t offset, const std::vector<uint8_t>& payload, uint16_t flags = 0);
  uint32_t simple(uint16_t command, uint64_t offset, uint64_t length, uint16_t flags = 0);
  bool sendBytes(const void* data, size_t length);
  bool receiveBytes(void* data, size_t length);
  void close();
  int fd() const { return fd_; }

 private:
  int fd_;
  nbd::Mode mode_;
  uint64_t cookie_ = 1;
};

class Rig {
 public:
  explicit Rig(const RigOptions& options);
  ~Rig();

  Client connect(nbd::Mode mode = nbd::Mode::Simple, bool tcp = false);
  void formatAll(bool direct = true);
  void hold();
  void release();
  size_t held();
  /// Runs a command with a new tag and waits for its end; false where it failed.
  bool command(const std::function<std::vector<double>(double tag)>& words);
  bool barrier() { return command([](double tag) { return std::vector<double>{6, tag}; }); }
  bool closeExport() { return command([](double tag) { return std::vector<double>{7, tag, 1}; }); }
  void grow(uint32_t stripes);
  bool waitForSessions(size_t count);
  /// Reasons of ended sessions so far, in order.
  std::vector<int> ends();
  size_t sessions();
  std::vector<double> counters();
  std::vector<double> memberTotals();
  void evict();
  /// Ends everything at once, as the end of an environment does.
  void stop();

  std::vector<uint8_t> slotBytes(uint32_t slot) const;
  void setDirect(uint64_t stripe, bool value);
  uint64_t stripeSize() const { return stripeSize_; }
  uint64_t size() const { return size_.load(); }
  bool opened() const { return datapath_ != nullptr; }

 private:
  struct Table {
    std::vector<uint32_t> slots, init, direct;
  };
  struct Held {
    uint32_t index;
    int kind;
    uint32_t flags;
    uint64_t offset, length;
  };
  using Continuation = std::function<void(bool)>;

  void run();
  void drain();
  void decide(const Held& upcall);
  void change(const Held& upcall, uint64_t stripe);
  void changeNow(const Held& upcall, uint64_t stripe);
  void finishChange(const Held& upcall, uint64_t stripe);
  void complete(const Held& upcall, uint32_t error);
  double tagFor(Continuation next);
  void submit(const std::vector<double>& words);
  std::unique_ptr<Table> makeTable(uint32_t stripes) const;
  nbd::Tables tablesOf(const Table& table) const;
  bool bit(const std::vector<uint32_t>& words, uint64_t index) const;
  void setBit(std::vector<uint32_t>& words, uint64_t index, bool value);

  RigOptions options_;
  uint64_t stripeSize_;
  std::atomic<uint64_t> size_;
  std::vector<int> fds_;
  std::recursive_mutex mutex_;  // the JavaScript thread's turn
  std::condition_variable_any changed_;
  std::unique_ptr<nbd::Datapath> datapath_;
  std::vector<std::unique_ptr<Table>> tables_;  // the last one is current
  std::unordered_map<double, Continuation> continuations_;
  double nextTag_ = 1;
  uint32_t nextSession_ = 1;
  uint32_t nextSlot_ = 1;
  size_t openSessions_ = 0;
  std::vector<int> ends_;
  bool holding_ = false;
  std::vector<Held> held_;
  std::unordered_map<uint64_t, std::vector<std::function<void()>>> busy_;  // stripe -> waiting
  std::mutex wakeMutex_;
  std::condition_variable wake_;
  bool woken_ = false;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace test
