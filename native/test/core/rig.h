// A datapath over temporary member files, with a small volume policy on a thread of its own, as JavaScript would be, and
// clients that speak the transmission phase over socket pairs.
//
// The policy handles one upcall at a time, in order of arrival: first writes get slots and one formatting command a format
// unit, then slot, init bit and direct bit are set in this order; other writes go to their slots in parts; trims clear the
// direct bits, pass a barrier, and clear the init bits. With `shuffled` it takes upcalls in any order, and answers in any other.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "connection.h"
#include "datapath.h"
#include "harness.h"

namespace nbd::test {

using Bytes = std::vector<uint8_t>;

struct RigOptions {
  EngineChoice engine = EngineChoice::Threads;
  bool uncached = false;  // every read of a client goes through the engine
  uint32_t members = 2;
  uint32_t threads = 2;
  uint64_t chunkSize = 16 * 1024;
  uint32_t formatUnit = 1;
  uint8_t fill = 0;
  uint64_t size = 8 << 20;
  uint32_t payloadMax = 8 << 20;
  uint64_t payloadPerConnection = 16 << 20;
  uint64_t payloadTotal = 64 << 20;
  uint64_t shuffled = 0;  // seed
  bool slowReads = false;  // reads of the threads engine and of the policy take a while, now and then
};

/// From now on reads of members that are `size` bytes long wait, until another size is given; 0: none.
void holdReads(size_t size);

class Client;

class Rig {
 public:
  static constexpr uint32_t kExport = 7;

  explicit Rig(const RigOptions& options);
  ~Rig();

  /// Runs `body` on the policy's thread and waits for it.
  void call(const std::function<void(Datapath&)>& body);
  /// Submits a command whose second word is its tag, and returns that tag.
  double submit(std::vector<double> words);
  /// Waits for a Done event; false after a while.
  bool done(double tag, int seconds = 20);
  /// Waits for a Done event and takes it; its errno.
  int result(double tag);
  /// Begins a range read; `into` is its own until it is done. Returns its tag.
  double readRange(uint64_t offset, Bytes& into);
  /// The reason a session ended with, or -1 while it goes on.
  int endOf(uint32_t session);
  size_t endCount();
  /// While held, upcalls wait in the policy's queue.
  void hold(bool held);
  size_t upcallsWaiting();
  std::unique_ptr<Client> connect(Mode mode, bool readOnly = false);
  Bytes readSlot(uint32_t slot);
  uint32_t slotOf(uint64_t stripe) const { return __atomic_load_n(&slots[stripe], __ATOMIC_ACQUIRE); }
  void setBit(std::vector<uint32_t>& bits, uint64_t index, bool value);

  const RigOptions options;
  const uint64_t stripeSize;
  std::vector<uint32_t> slots, init, direct;

 private:
  struct Call {
    uint32_t index;
    uint32_t kind, flags;
    uint64_t offset, length, mask;
  };

  void policy();
  Call next();
  void answer(const Call& call, uint32_t error);
  void sendAnswers(size_t most);
  void drain();
  bool await(double tag);
  void handle(const Call& call);
  bool fill(const Call& call);
  uint32_t takeSlot();
  void trim(const Call& call);

  std::vector<int> members_;
  std::unique_ptr<Datapath> datapath_;
  uint32_t nextSlot_ = 1;
  std::vector<uint32_t> freeSlots_;  // handed out again before new ones: whoever still reads them shows
  std::deque<Call> queue_;  // policy's thread
  Random random_;
  std::vector<std::pair<uint32_t, uint32_t>> answers_;  // upcall and error, not sent yet

  std::mutex mutex_;
  std::condition_variable policyWake_, changed_;
  bool woken_ = false, stopping_ = false, held_ = false;
  std::deque<std::function<void()>> calls_;
  std::map<double, int> done_;  // tag -> errno
  std::map<uint32_t, int> ended_;
  size_t waiting_ = 0;
  double tag_ = 0;
  std::atomic<uint32_t> session_{0};
  std::thread thread_;
};

/// One session. A call that gets no answer for 20 seconds, or one that the specification does not allow, is a failure.
class Client {
 public:
  Client(int fd, uint32_t session, Mode mode) : fd(fd), session(session), mode(mode) {}
  ~Client() { close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  struct Reply {
    uint64_t cookie = 0;
    uint32_t error = 0;
    bool ended = false;  // the server closed instead
    Bytes data;          // a read's, holes filled with zeros; BLOCK_STATUS: the payload of the last chunk
    size_t chunks = 0;
  };

  uint64_t send(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, const Bytes& payload = {});
  void sendBytes(const void* data, size_t size);
  /// The next finished reply; chunks of several requests may be mixed.
  Reply receive();
  Reply exchange(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, const Bytes& payload = {});
  Bytes read(uint64_t offset, uint64_t length, uint16_t flags = 0);
  uint32_t write(uint64_t offset, const Bytes& data, uint16_t flags = 0);
  Bytes header(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, uint64_t cookie) const;
  void close();

  int fd;
  const uint32_t session;
  const Mode mode;

 private:
  struct Pending {
    uint16_t command;
    uint64_t offset;
    Reply reply;
    uint64_t covered = 0;
    uint64_t length;
  };
  bool take(void* into, size_t size);

  uint64_t cookie_ = 0;
  std::map<uint64_t, Pending> pending_;
};

size_t openDescriptors();
/// Whether this process has a descriptor whose link contains `part`.
bool hasDescriptor(const char* part);

}  // namespace nbd::test
