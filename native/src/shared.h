// What all threads of one datapath share: layout, limits, the pools, and the queue of events for JavaScript.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "layout.h"
#include "parser.h"
#include "tables.h"
#include "work.h"

namespace nbd {

class Connection;
class Loop;

struct Limits {
  uint32_t payloadMax = 0;            // bytes of one read or write
  uint32_t requestsInFlight = 0;      // a connection
  uint64_t payloadPerConnection = 0;  // bytes
  uint64_t payloadTotal = 0;          // bytes
  uint64_t replyBytesQueued = 0;      // bytes a connection
  uint32_t statusExtentsMax = 0;
};

enum class EngineKind : uint8_t { IoUring, Threads };

/// The bytes of a write that waits for a decision: behind this header, or in the memory of whoever adopted the write, which
/// outlives all references. A format task holds a reference while it uses them.
struct Payload {
  std::atomic<uint32_t> references{1};
  uint64_t size = 0;
  uint8_t* borrowed = nullptr;

  uint8_t* data() { return borrowed != nullptr ? borrowed : reinterpret_cast<uint8_t*>(this + 1); }
  static Payload* create(uint64_t size);
  static Payload* borrow(uint8_t* data, uint64_t size);
  void retain() { references.fetch_add(1, std::memory_order_relaxed); }
  void release();
};

enum class UpcallKind : uint8_t { Write = 1, Sync = 2, Trim = 3, Zero = 4, Status = 5 };

/// A request that waits for the policy. Belongs to the I/O thread of its connection; between the upcall and its
/// completion the JavaScript thread may read it. An adopted one has no connection and belongs to the JavaScript thread.
struct Upcall {
  Connection* connection = nullptr;
  Export* target = nullptr;
  Request request;
  UpcallKind kind = UpcallKind::Sync;
  uint64_t offset = 0;  // of what the policy has to do; the rest of the request was done in place
  uint64_t length = 0;
  Payload* payload = nullptr;
  uint64_t contextMask = 0;
  uint64_t charged = 0;  // payload bytes counted against the limits
  bool piece = false;    // of a write whose payload is still being received: not answered
  bool half = false;     // made here; whether the other side of a mirror has it is not known (lane.h)
  bool counted = false;  // in the claims of its export, until it is answered
  bool lane = false;     // came over a peer's lane
  uint32_t session = 0;
  Upcall* next = nullptr;
};

enum class EventKind : uint8_t { Upcall = 1, Done = 2, SessionEnd = 3, LaneEnd = 4 };
enum class SessionEnd : uint8_t { Disconnect = 0, Hangup = 1, Protocol = 2, Error = 3, Closed = 4 };

struct Event {
  EventKind kind;
  Upcall* upcall = nullptr;  // Upcall
  double tag = 0;            // Done: which command; SessionEnd, LaneEnd: which one
  double value = 0;          // Done: 1 or 0, SessionEnd: the reason
  IoError error;             // Done
  bool write = false;        // Done: what failed was a write
  Export* target = nullptr;  // SessionEnd, LaneEnd; Done: of a range read, else null
  uint64_t epoch = 0;        // Done of a range read
};

/// Many threads in, the JavaScript thread out, one wake a batch.
class EventQueue {
 public:
  using Wake = void (*)(void* context);

  void onWake(Wake wake, void* context) {
    wake_ = wake;
    context_ = context;
  }
  void push(const Event& event);
  void push(std::vector<Event>& batch);  // leaves it empty
  /// Wakes the JavaScript thread for an event that it queued itself.
  void nudge();
  /// JavaScript thread: takes everything.
  void take(std::vector<Event>& into);

 private:
  void wake();

  std::mutex mutex_;
  std::vector<Event> events_;
  bool woken_ = false;
  Wake wake_ = nullptr;
  void* context_ = nullptr;
};

/// One barrier over all I/O threads; the last to pass it reports.
struct Barrier {
  std::atomic<uint32_t> remaining{0};
  double tag = 0;
  const Tables* retired = nullptr;  // tables that nothing uses once the barrier has been passed
};

struct Shared {
  Layout layout;
  Limits limits;
  EngineKind engine = EngineKind::Threads;
  EventQueue events;
  std::vector<std::unique_ptr<Loop>> loops;
  std::unique_ptr<WorkPool> waiting;  // reads, syncs, punches: may wait for a disk
  std::unique_ptr<WorkPool> writing;  // full-stripe writes and parts: bound by the page cache
  /// Bytes of payloads that wait for the policy, of replies that wait for a disk, and of replies that wait for their
  /// client. Above limits.payloadTotal by at most the little that each connection may always have.
  std::atomic<uint64_t> payloadInFlight{0};
  std::atomic<uint32_t> wideSockets{0};    // connections whose socket has a large buffer

  void pass(Barrier* barrier);
};

}  // namespace nbd
