// One I/O thread: an epoll loop over its connections, an eventfd for commands and finished jobs, and one for io_uring.
//
// In a turn: events mark connections, commands are carried out, finished jobs are taken in, then each marked connection
// has its turn (connection.h), upcalls are handed over in one batch, and closed connections are deleted. Member accesses
// of connections begin and end inside their turn or are counted in an epoch, so a barrier that is looked at between two
// turns only has to wait for the epochs before it. What a turn gave to lanes (lane.h) leaves together at its end.
#pragma once

#include <atomic>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "buffers.h"
#include "engine.h"
#include "lane.h"
#include "shared.h"
#include "uring.h"

namespace nbd {

/// What a connection that holds nothing may always have of the memory for payloads and replies.
constexpr uint64_t kMemoryAlways = 64 * 1024;

struct LoopCommand {
  enum class Kind : uint8_t { Add, Complete, CompleteStatus, Barrier, CloseExport, AddLane, DropLane, EndSession };
  Kind kind;
  uint32_t error = 0;                // Complete
  Connection* connection = nullptr;  // Add
  Upcall* upcall = nullptr;          // Complete, CompleteStatus
  std::vector<uint8_t>* body = nullptr;  // CompleteStatus: the reply chunks' bytes, see datapath.cc
  Barrier* barrier = nullptr;
  // CloseExport; Barrier: of that export's lanes, too, or null. It may be gone by the time, so it is compared and nothing else.
  Export* target = nullptr;
  Lane* lane = nullptr;      // AddLane
  uint32_t id = 0;           // DropLane, EndSession
};

class Loop {
 public:
  Loop(Shared& shared, uint32_t index);
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  /// errno, or 0.
  int start();
  /// From any thread.
  void post(const LoopCommand& command);
  void post(const std::vector<LoopCommand>& commands);
  void postDone(LoopJob* job);
  /// Ends the thread as soon as nothing of the kernel's is in flight; connections are cut.
  void stop();

  // The rest is for the loop's own thread, but for the counters.
  Shared& shared() { return shared_; }
  uint32_t index() const { return index_; }
  int epollFd() const { return epollFd_; }
  ChunkPool& chunks() { return chunks_; }
  MemberIo& io() { return io_; }
  Segments& segments() { return segments_; }
  const MemberCounters& memberCounters(uint32_t member) const { return memberCounters_[member]; }

  /// Gives the connection a turn before the loop sleeps.
  void touch(Connection* connection);
  void bury(Connection* connection);
  void queueUpcall(Upcall* upcall);
  Upcall* takeUpcall();
  void giveUpcall(Upcall* upcall);
  void queueEvent(const Event& event) { events_.push_back(event); }
  void read(ReadJob* job);
  void advise(AdviseJob* job);
  uint64_t beginAccess();
  void endAccess(uint64_t epoch);
  /// False where that would be more than all may hold together; but `holdsNothing` may always have kMemoryAlways.
  bool reserveMemory(uint64_t bytes, bool holdsNothing);
  /// Counts what is held already.
  void takeMemory(uint64_t bytes);
  void releaseMemory(uint64_t bytes);
  bool memoryLeft(uint64_t bytes) const;
  void linger(Connection* connection);
  /// Sends what the lane has, before the loop sleeps.
  void queueLane(Lane* lane);
  /// Writes on lanes of this loop: while there are some, it looks whether peers answer.
  void countLaneOps(int change) { laneOps_ += static_cast<uint32_t>(change); }
  /// What this turn has found comes before it.
  void passLater(Barrier* barrier) { passed_.push_back(barrier); }
  /// What the kernel is told to say when a lane has an event: connections are their own address.
  static uint64_t eventOf(const Lane* lane) { return reinterpret_cast<uintptr_t>(lane) | 1; }

  static uint64_t nowMicroseconds();

 private:
  void run();
  void carryOut(const LoopCommand& command);
  void takeCommands();
  void takeTurns();
  void settleBarriers();
  void expireLingering();
  void flushLanes();
  void expireLanes();
  void endLane(Lane* lane);
  template <typename Wanted>
  void dropLane(Wanted wanted);
  void restBriefly();
  void spin();
  void signal();
  void finishStopping();

  Shared& shared_;
  const uint32_t index_;
  int epollFd_ = -1;
  int wakeFd_ = -1;
  int ringFd_ = -1;  // eventfd of the ring
  std::thread thread_;

  std::mutex mutex_;
  std::vector<LoopCommand> commands_;  // under mutex_
  LoopJob* done_ = nullptr;            // under mutex_
  std::atomic<bool> signalled_{false};
  std::atomic<bool> stopping_{false};

  ChunkPool chunks_;
  std::unique_ptr<MemberCounters[]> memberCounters_;
  MemberIo io_;
  Segments segments_;
  Uring uring_;
  bool ringTried_ = false;
  std::vector<ReadJob*> ringDone_;

  std::vector<Connection*> connections_;
  std::vector<Connection*> touched_;
  std::vector<Connection*> turning_;
  std::vector<Connection*> dead_;
  std::vector<Connection*> lingering_;  // have a deadline
  std::vector<Lane*> lanes_;
  std::vector<Lane*> queuedLanes_;
  std::vector<Lane*> flushing_;
  uint32_t laneOps_ = 0;
  uint64_t lanesCheckedAt_ = 0;  // microseconds
  Connection* solo_ = nullptr;  // had the last turns alone
  uint32_t soloTurns_ = 0;
  uint32_t outstanding_ = 0;    // upcalls and engine jobs that will come back
  std::vector<Event> events_;
  std::vector<LoopCommand> taken_;
  Upcall* freeUpcalls_ = nullptr;
  uint32_t freeUpcallCount_ = 0;

  // Accesses in flight, by epoch; a barrier starts a new one.
  struct Waiting {
    uint64_t epoch;
    Barrier* barrier;
  };
  std::deque<uint64_t> epochs_{0};
  uint64_t epochFirst_ = 0;
  std::deque<Waiting> barriers_;
  std::vector<Barrier*> passed_;  // in this turn, by lanes
};

}  // namespace nbd
