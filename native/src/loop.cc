#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "assert.h"
#include "connection.h"

namespace nbd {

namespace {

constexpr int kEventsMax = 128;
constexpr int kLingerCheckMilliseconds = 100;
constexpr int kLaneCheckMilliseconds = 1000;
constexpr uint64_t kLaneStallMicroseconds = 20'000'000;
constexpr uint64_t kSpinMicroseconds = 50;
constexpr uint32_t kSoloTurns = 16;            // turns that a connection has had alone, before its pattern counts
constexpr uint64_t kPauseMicrosecondsMin = 20;
constexpr uint64_t kPauseMicrosecondsMax = 100;
constexpr int kSpinTurnsMax = 16;  // turns of polling before the other descriptors are looked at
constexpr uint32_t kFreeUpcallsMax = 1024;

void drainEventFd(int fd) {
  uint64_t count;
  while (::read(fd, &count, sizeof count) < 0 && errno == EINTR) {
  }
}

}  // namespace

void LoopJob::cancel() {
  error.error = ECANCELED;
  loop->postDone(this);
}

void ReadJob::run(WorkerContext& context) {
  context.io.readWaiting(segments, &error);
  loop->postDone(this);
}

void ReadJob::finished() {
  connection->readFinished(this);
  loop->endAccess(epoch);
  delete this;
}

void AdviseJob::run(WorkerContext&) {
  for (const Segment& segment : segments) {
    posix_fadvise(loop->shared().layout.members[segment.member].fd, static_cast<off_t>(segment.offset),
                  static_cast<off_t>(segment.length), POSIX_FADV_WILLNEED);
  }
  loop->postDone(this);
}

void AdviseJob::finished() {
  connection->adviseFinished(this);
  loop->endAccess(epoch);
  delete this;
}

Loop::Loop(Shared& shared, uint32_t index)
    : shared_(shared),
      index_(index),
      memberCounters_(new MemberCounters[shared.layout.members.size()]),
      io_(shared.layout, memberCounters_.get()) {}

Loop::~Loop() {
  stop();
  while (freeUpcalls_ != nullptr) {
    Upcall* upcall = freeUpcalls_;
    freeUpcalls_ = upcall->next;
    delete upcall;
  }
  for (int fd : {epollFd_, wakeFd_, ringFd_}) {
    if (fd >= 0) ::close(fd);
  }
}

int Loop::start() {
  epollFd_ = epoll_create1(EPOLL_CLOEXEC);
  wakeFd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  ringFd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epollFd_ < 0 || wakeFd_ < 0 || ringFd_ < 0) return errno;
  for (int* fd : {&wakeFd_, &ringFd_}) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = fd;
    if (epoll_ctl(epollFd_, EPOLL_CTL_ADD, *fd, &event) != 0) return errno;
  }
  // Signals are for the thread that runs JavaScript.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return 0;
}

void Loop::stop() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  signal();
  thread_.join();
}

// --- from other threads --------------------------------------------------------------------------------------------

void Loop::signal() {
  if (signalled_.exchange(true, std::memory_order_acq_rel)) return;
  const uint64_t one = 1;
  while (::write(wakeFd_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void Loop::post(const LoopCommand& command) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    commands_.push_back(command);
  }
  signal();
}

void Loop::post(const std::vector<LoopCommand>& commands) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    commands_.insert(commands_.end(), commands.begin(), commands.end());
  }
  signal();
}

void Loop::postDone(LoopJob* job) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job->nextDone = done_;
    done_ = job;
  }
  signal();
}

// --- the thread ----------------------------------------------------------------------------------------------------

uint64_t Loop::nowMicroseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000 + static_cast<uint64_t>(now.tv_nsec) / 1'000;
}

void Loop::run() {
  pthread_setname_np(pthread_self(), "nbd-io");
  prctl(PR_SET_TIMERSLACK, 1);  // nanosecond: pauses are meant as they are
  epoll_event events[kEventsMax];
  int spinTurns = 0;
  while (!stopping_.load(std::memory_order_acquire)) {
    if (touched_.empty() || ++spinTurns >= kSpinTurnsMax) {
      spinTurns = 0;
      int timeout = laneOps_ == 0 ? -1 : kLaneCheckMilliseconds;
      if (!lingering_.empty()) timeout = kLingerCheckMilliseconds;
      if (!touched_.empty()) timeout = 0;
      const int count = epoll_wait(epollFd_, events, kEventsMax, timeout);
      NBD_ASSERT(count >= 0 || errno == EINTR);
      for (int i = 0; i < count; i++) {
        void* who = events[i].data.ptr;
        if (who == &wakeFd_) {
          drainEventFd(wakeFd_);
        } else if (who == &ringFd_) {
          drainEventFd(ringFd_);
          uring_.reap(ringDone_);
        } else if ((events[i].data.u64 & 1) != 0) {
          Lane* const lane = reinterpret_cast<Lane*>(events[i].data.u64 & ~uint64_t{1});
          if (!lane->onEvent(events[i].events)) endLane(lane);
        } else {
          static_cast<Connection*>(who)->onEvent(events[i].events);
        }
      }
    }
    if (signalled_.load(std::memory_order_acquire)) takeCommands();
    for (ReadJob* job : ringDone_) job->finished();
    ringDone_.clear();
    takeTurns();
    if (!queuedLanes_.empty()) flushLanes();
    if (laneOps_ > 0) expireLanes();
    if (uring_.isOpen()) uring_.kick();
    // In this order: an access that ended as an upcall is known before a barrier that waited for it.
    if (!events_.empty()) shared_.events.push(events_);
    settleBarriers();
    if (!lingering_.empty()) expireLingering();
    for (Connection* connection : dead_) delete connection;
    dead_.clear();
    if (touched_.empty()) restBriefly();
  }
  finishStopping();
}

void Loop::takeTurns() {
  std::swap(touched_, turning_);
  Connection* const solo = turning_.size() == 1 ? turning_[0] : nullptr;
  if (solo == nullptr || solo != solo_) soloTurns_ = 0;
  if (!turning_.empty()) solo_ = solo;
  for (Connection* connection : turning_) {
    connection->touched = false;
    connection->turn();
  }
  turning_.clear();
  soloTurns_++;
}

/// Sleeping until the next request and being woken for it costs more, on both sides, than anything else about a small
/// request. Where one connection has been alone for a while, its pattern tells how to do better:
///
///   requests come one by one, each after the last reply   poll for the next one, for a short time
///   the client is behind with reading its replies         leave it alone until it has caught up half of them, and
///                                                         find several requests then
void Loop::restBriefly() {
  if (solo_ == nullptr || soloTurns_ < kSoloTurns || outstanding_ > 0) return;
  if (solo_->spinnable()) {
    spin();
    return;
  }
  const uint64_t pause = std::min(solo_->backlog(nowMicroseconds()) / 2, kPauseMicrosecondsMax);
  if (pause < kPauseMicrosecondsMin) return;
  timespec time{0, static_cast<long>(pause) * 1000};
  clock_nanosleep(CLOCK_MONOTONIC, 0, &time, nullptr);
}

/// Bounded, and given up for a while whenever it was in vain.
void Loop::spin() {
  Connection* connection = solo_;
  const uint64_t deadline = nowMicroseconds() + kSpinMicroseconds;
  do {
    if (connection->poll()) {
      connection->spinEnded(true);
      touch(connection);
      return;
    }
    if (signalled_.load(std::memory_order_relaxed)) return;
  } while (nowMicroseconds() < deadline);
  connection->spinEnded(false);
}

void Loop::takeCommands() {
  LoopJob* done;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // Under the lock: what is posted from here on signals again.
    signalled_.store(false, std::memory_order_release);
    std::swap(commands_, taken_);
    done = done_;
    done_ = nullptr;
  }
  for (const LoopCommand& command : taken_) carryOut(command);
  taken_.clear();
  while (done != nullptr) {
    LoopJob* next = done->nextDone;
    done->finished();
    done = next;
  }
}

template <typename Wanted>
void Loop::dropLane(Wanted wanted) {
  const auto found = std::find_if(lanes_.begin(), lanes_.end(), [&](Lane* lane) { return wanted(*lane); });
  if (found != lanes_.end()) endLane(*found);
}

void Loop::carryOut(const LoopCommand& command) {
  switch (command.kind) {
    case LoopCommand::Kind::Add:
      command.connection->place = connections_.size();
      connections_.push_back(command.connection);
      command.connection->attach();
      return;
    case LoopCommand::Kind::Complete:
      command.upcall->connection->complete(command.upcall, command.error);
      giveUpcall(command.upcall);
      return;
    case LoopCommand::Kind::CompleteStatus:
      command.upcall->connection->completeStatus(command.upcall, *command.body);
      delete command.body;
      giveUpcall(command.upcall);
      return;
    case LoopCommand::Kind::Barrier:
      for (Lane* lane : lanes_) {
        if (&lane->target() == command.target) lane->fence(command.barrier);
      }
      // What is in flight now belongs to epochs up to this one.
      barriers_.push_back({epochFirst_ + epochs_.size() - 1, command.barrier});
      epochs_.push_back(0);
      return;
    case LoopCommand::Kind::CloseExport:
      for (Connection* connection : connections_) {
        if (&connection->target() == command.target) connection->end(SessionEnd::Closed);
      }
      dropLane([&](Lane& lane) { return &lane.target() == command.target; });
      return;
    case LoopCommand::Kind::AddLane:
      lanes_.push_back(command.lane);
      NBD_ASSERT(command.lane->target().lanes[index_] == nullptr);
      command.lane->target().lanes[index_] = command.lane;
      if (!command.lane->attach()) endLane(command.lane);
      return;
    case LoopCommand::Kind::DropLane:
      dropLane([&](Lane& lane) { return lane.id() == command.id; });
      return;
    case LoopCommand::Kind::EndSession:
      for (Connection* connection : connections_) {
        if (connection->id() == command.id) connection->end(SessionEnd::Closed);
      }
      return;
  }
}

void Loop::touch(Connection* connection) {
  if (connection->touched) return;
  connection->touched = true;
  touched_.push_back(connection);
}

void Loop::bury(Connection* connection) {
  connections_[connection->place] = connections_.back();
  connections_[connection->place]->place = connection->place;
  connections_.pop_back();
  for (std::vector<Connection*>* list : {&touched_, &lingering_}) {
    list->erase(std::remove(list->begin(), list->end(), connection), list->end());
  }
  if (solo_ == connection) solo_ = nullptr;
  dead_.push_back(connection);
}

void Loop::linger(Connection* connection) { lingering_.push_back(connection); }

void Loop::expireLingering() {
  const uint64_t now = nowMicroseconds();
  for (Connection* connection : lingering_) {
    if (connection->deadline() != 0 && connection->deadline() <= now) connection->cut(SessionEnd::Closed);
  }
}

// --- lanes ---------------------------------------------------------------------------------------------------------

void Loop::queueLane(Lane* lane) {
  if (lane->queued) return;
  lane->queued = true;
  queuedLanes_.push_back(lane);
}

void Loop::flushLanes() {
  // One that ends takes itself off the list of lanes, not off this one.
  std::swap(queuedLanes_, flushing_);
  for (Lane* lane : flushing_) {
    lane->queued = false;
    if (!lane->flush()) endLane(lane);
  }
  flushing_.clear();
}

void Loop::endLane(Lane* lane) {
  lane->end();
  lane->target().lanes[index_] = nullptr;
  lanes_.erase(std::remove(lanes_.begin(), lanes_.end(), lane), lanes_.end());
  queuedLanes_.erase(std::remove(queuedLanes_.begin(), queuedLanes_.end(), lane), queuedLanes_.end());
  delete lane;
}

/// A peer that is alive and does not answer holds clients up: they go on without it.
void Loop::expireLanes() {
  const uint64_t now = nowMicroseconds();
  if (now - lanesCheckedAt_ < kLaneCheckMilliseconds * 1000) return;
  lanesCheckedAt_ = now;
  Lane* stalled = nullptr;
  for (Lane* lane : lanes_) {
    const uint64_t since = lane->stalledSince();
    if (since != 0 && since + kLaneStallMicroseconds < now) stalled = lane;
  }
  if (stalled != nullptr) endLane(stalled);
}

// --- upcalls -------------------------------------------------------------------------------------------------------

Upcall* Loop::takeUpcall() {
  outstanding_++;
  if (freeUpcalls_ == nullptr) return new Upcall;
  Upcall* upcall = freeUpcalls_;
  freeUpcalls_ = upcall->next;
  freeUpcallCount_--;
  *upcall = Upcall{};
  return upcall;
}

void Loop::giveUpcall(Upcall* upcall) {
  outstanding_--;
  if (upcall->payload != nullptr) upcall->payload->release();
  upcall->payload = nullptr;
  if (freeUpcallCount_ >= kFreeUpcallsMax) {
    delete upcall;
    return;
  }
  upcall->next = freeUpcalls_;
  freeUpcalls_ = upcall;
  freeUpcallCount_++;
}

void Loop::queueUpcall(Upcall* upcall) {
  Event event{};
  event.kind = EventKind::Upcall;
  event.upcall = upcall;
  events_.push_back(event);
}

// --- accesses and barriers -----------------------------------------------------------------------------------------

uint64_t Loop::beginAccess() {
  outstanding_++;
  epochs_.back()++;
  return epochFirst_ + epochs_.size() - 1;
}

void Loop::endAccess(uint64_t epoch) {
  outstanding_--;
  NBD_ASSERT(epoch >= epochFirst_ && epochs_[epoch - epochFirst_] > 0);
  epochs_[epoch - epochFirst_]--;
}

void Loop::settleBarriers() {
  for (Barrier* barrier : passed_) shared_.pass(barrier);
  passed_.clear();
  if (barriers_.empty()) return;
  while (epochs_.size() > 1 && epochs_.front() == 0) {
    epochs_.pop_front();
    epochFirst_++;
  }
  while (!barriers_.empty() && barriers_.front().epoch < epochFirst_) {
    shared_.pass(barriers_.front().barrier);
    barriers_.pop_front();
  }
}

void Loop::read(ReadJob* job) {
  job->loop = this;
  if (job->segments.empty()) {
    postDone(job);
    return;
  }
  if (!ringTried_ && shared_.engine == EngineKind::IoUring) {
    ringTried_ = true;
    uring_.open(shared_.layout, memberCounters_.get(), ringFd_);
  }
  if (uring_.isOpen()) {
    uring_.submit(job);
  } else {
    shared_.waiting->submit(job);
  }
}

void Loop::advise(AdviseJob* job) {
  job->loop = this;
  shared_.waiting->submit(job);
}

// --- memory --------------------------------------------------------------------------------------------------------

bool Loop::reserveMemory(uint64_t bytes, bool holdsNothing) {
  const uint64_t before = shared_.payloadInFlight.fetch_add(bytes, std::memory_order_relaxed);
  if (before + bytes <= shared_.limits.payloadTotal || (holdsNothing && bytes <= kMemoryAlways)) return true;
  shared_.payloadInFlight.fetch_sub(bytes, std::memory_order_relaxed);
  return false;
}

void Loop::takeMemory(uint64_t bytes) { shared_.payloadInFlight.fetch_add(bytes, std::memory_order_relaxed); }

void Loop::releaseMemory(uint64_t bytes) {
  const uint64_t before = shared_.payloadInFlight.fetch_sub(bytes, std::memory_order_relaxed);
  NBD_ASSERT(before >= bytes);
}

bool Loop::memoryLeft(uint64_t bytes) const {
  return shared_.payloadInFlight.load(std::memory_order_relaxed) + bytes <= shared_.limits.payloadTotal;
}

// --- stop ----------------------------------------------------------------------------------------------------------

/// The process or this environment goes away: connections are cut, upcalls will not be answered. Only what the kernel
/// still writes into our memory is waited for; the pools have been stopped before.
void Loop::finishStopping() {
  while (uring_.inFlight() > 0) {
    epoll_event event;
    epoll_wait(epollFd_, &event, 1, 10);
    uring_.reap(ringDone_);
  }
  takeCommands();
  for (ReadJob* job : ringDone_) job->finished();
  ringDone_.clear();
  for (Lane* lane : lanes_) {
    lane->abandon();
    delete lane;
  }
  lanes_.clear();
  for (Connection* connection : connections_) connection->abandon();
  for (Connection* connection : connections_) delete connection;
  for (Connection* connection : dead_) delete connection;
  connections_.clear();
  dead_.clear();
  if (!events_.empty()) shared_.events.push(events_);
  for (Barrier* barrier : passed_) shared_.pass(barrier);
  passed_.clear();
  while (!barriers_.empty()) {
    shared_.pass(barriers_.front().barrier);
    barriers_.pop_front();
  }
}

}  // namespace nbd
