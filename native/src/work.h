// A pool of threads for calls that may wait for a disk. Threads start when there is work for them and end with the
// pool. Tasks are linked into the queue themselves: queueing allocates nothing.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "layout.h"

namespace nbd {

/// What a worker has for itself.
struct WorkerContext {
  WorkerContext(const Layout& layout, MemberCounters* counters) : io(layout, counters) {}
  MemberIo io;
  Segments segments;
  std::vector<uint8_t> scratch;
};

class Task {
 public:
  virtual ~Task() = default;
  /// On a worker. The task may delete itself, or belong to somebody else from here on.
  virtual void run(WorkerContext& context) = 0;
  /// Instead of run(), where the pool stops first.
  virtual void cancel() = 0;

 private:
  friend class WorkPool;
  friend class TaskList;
  Task* next_ = nullptr;
};

/// Tasks that are queued together.
class TaskList {
 public:
  bool empty() const { return head_ == nullptr; }
  void push(Task* task);

 private:
  friend class WorkPool;
  Task* head_ = nullptr;
  Task* tail_ = nullptr;
  uint32_t count_ = 0;
};

class WorkPool {
 public:
  WorkPool(const Layout& layout, uint32_t threadsMax);
  ~WorkPool();
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;

  /// From any thread.
  void submit(Task* task);
  /// Several at once, in their order: one lock, and one thread is woken, which wakes the next where there is enough for it.
  void submitAll(TaskList& tasks);
  /// Tasks that run are waited for, queued ones are cancelled.
  void stop();

  void addCounters(uint32_t member, uint64_t sums[5]) const;

 private:
  void work(uint32_t index);
  void startThread();

  const Layout& layout_;
  const uint32_t threadsMax_;
  std::unique_ptr<std::unique_ptr<MemberCounters[]>[]> counters_;  // one set a thread
  std::mutex mutex_;
  std::condition_variable wake_;
  Task* head_ = nullptr;
  Task* tail_ = nullptr;
  uint32_t queued_ = 0;
  uint32_t idle_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace nbd
