// The front of the datapath: what the JavaScript thread calls. It keeps the exports and the table of upcalls that wait
// for an answer, cuts a batch of commands into messages for the I/O threads and pools, and turns their events into
// records of numbers.
//
// Commands (doubles; the first is the kind):           Events (kRecordWords doubles each):
//   1 complete      index, errno                          1 upcall       index, export, kind, flags, offset, length,
//   2 format unit   tag, export, stripe, n, slot * n,                    session, contexts 0..31, contexts 32..63
//                   b (0 or n), base slot * b,            2 done         tag, value, errno, member, offset, write
//                   m, upcall index * m                   3 session end  session, reason
//   3 write part    tag, index, stripe, slot
//   4 sync          tag
//   5 punch         tag, slot, count
//   6 barrier       tag, export or 0: of its lanes    4 lane end     lane
//   7 close export  tag, export
//   8 drop lane     lane
//   9 end session   session
//
// The flags of an upcall: bit 16 half done (lane.h), bit 17 from a peer's lane.
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>

#include "shared.h"

namespace nbd {

constexpr size_t kRecordWords = 10;
constexpr uint32_t kLoopsMax = 64;
constexpr uint32_t kContextsMax = 64;

enum class EngineChoice : uint8_t { Auto, IoUring, Threads };

struct LoopCommand;
struct SessionOptions;

class Datapath {
 public:
  /// Null and a reason where threads or descriptors cannot be had.
  static std::unique_ptr<Datapath> open(Layout layout, const Limits& limits, uint32_t threads, EngineChoice engine,
                                        EventQueue::Wake wake, void* context, std::string* reason);
  ~Datapath();
  Datapath(const Datapath&) = delete;
  Datapath& operator=(const Datapath&) = delete;

  EngineKind engine() const { return shared_.engine; }
  uint32_t threads() const { return static_cast<uint32_t>(shared_.loops.size()); }
  const Layout& layout() const { return shared_.layout; }
  uint32_t payloadMax() const { return shared_.limits.payloadMax; }

  void openExport(uint32_t id, uint64_t stripeSize, uint32_t formatUnit, uint8_t fill, const Tables& tables);
  void retable(uint32_t id, double tag, const Tables& tables);
  void serve(uint32_t exportId, SessionOptions options);
  void submit(const double* words, size_t count);
  /// A lane of I/O thread `loop`, which has none for that export. It says when it ends. `fd` is the lane's from here on.
  void openLane(uint32_t exportId, uint32_t laneId, uint32_t loop, int fd);
  /// See Export; while nothing of the export is under way.
  void setForwards(uint32_t exportId, bool on);
  void setLanesOnly(uint32_t exportId, bool on);
  /// See Claims.
  bool holdBlocks(uint32_t exportId, uint64_t offset, uint64_t length);
  void releaseBlocks(uint32_t exportId, uint64_t offset, uint64_t length);
  bool blocksBusy(uint32_t exportId, uint64_t offset, uint64_t length);
  /// Answers a status upcall: context, n, then length and flags n times; for each context.
  void completeStatus(uint32_t index, const double* words, size_t count);
  /// An upcall without a connection; returns its index. `data` (null for trim and zero) is read until it is completed.
  uint32_t adopt(uint32_t exportId, UpcallKind kind, uint64_t offset, uint64_t length, uint8_t* data);
  /// Copies from the payload of a write upcall; false where the range is not inside it.
  bool readPayload(uint32_t index, uint64_t offset, uint8_t* target, uint64_t length);
  /// What a client would read, from the tables as they are now; waited for by barriers that come later. Done with ECANCELED
  /// once the export is closed, or is being closed and nobody is left to answer.
  void readRange(double tag, uint32_t exportId, uint64_t offset, uint8_t* data, uint64_t length);
  void slotIo(double tag, bool write, uint32_t slot, uint64_t offset, uint8_t* data, uint64_t length);
  /// Fills at most `records` records and returns how many; fewer than that: nothing is left.
  size_t drain(double* out, size_t records);
  /// 13 numbers, in the order of ExportCounters in datapath.ts.
  void exportCounters(uint32_t id, double* out);
  /// 5 numbers a member.
  void memberCounters(double* out);
  /// Ends all threads. Before, all exports should have been closed; after a sudden end nothing is answered.
  void stop();

 private:
  explicit Datapath(Layout layout, const Limits& limits);

  Upcall* outstanding(double index);
  Upcall* release(double index);
  const double* submitOne(const double* at, const double* end, TaskList& parts);
  /// @param lanesOf whose writes on lanes are waited for, too; or null
  void barrier(double tag, const Tables* retired, Export* lanesOf);
  void post(uint32_t loop, const LoopCommand& command);
  void sendBatches();
  /// Forgets an export that is being closed as soon as nothing is left of it.
  void settleClose(Export& target);
  void rangeReadDone(Export& target, uint64_t epoch);
  uint32_t hold(Upcall* upcall);
  void fillRecord(const Event& event, double* out);

  Shared shared_;
  bool stopped_ = false;
  std::unordered_map<uint32_t, std::shared_ptr<Export>> exports_;  // tasks hold on to theirs
  std::vector<Upcall*> upcalls_;                 // by index; null = free
  std::vector<uint32_t> freeIndexes_;
  std::vector<uint32_t> sessionLoops_;  // sessions an I/O thread has
  std::unordered_map<uint32_t, uint32_t> loopOfSession_;
  std::vector<std::vector<LoopCommand>> batches_;
  std::vector<Event> pending_;
  size_t pendingAt_ = 0;

  // Range reads that have not been reported, by epoch: as in Loop, a barrier closes the current one (the last).
  struct RangeWaiting {
    uint64_t epoch;
    Barrier* barrier;
  };
  std::deque<uint64_t> rangeEpochs_{0};
  uint64_t rangeEpochFirst_ = 0;
  std::deque<RangeWaiting> rangeBarriers_;
};

}  // namespace nbd
