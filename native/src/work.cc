#include "work.h"

#include <pthread.h>
#include <signal.h>

#include "assert.h"

namespace nbd {

WorkPool::WorkPool(const Layout& layout, uint32_t threadsMax)
    : layout_(layout), threadsMax_(threadsMax), counters_(new std::unique_ptr<MemberCounters[]>[threadsMax]) {
  for (uint32_t i = 0; i < threadsMax; i++) counters_[i].reset(new MemberCounters[layout.members.size()]);
}

WorkPool::~WorkPool() { stop(); }

void TaskList::push(Task* task) {
  task->next_ = nullptr;
  (tail_ == nullptr ? head_ : tail_->next_) = task;
  tail_ = task;
  count_++;
}

void WorkPool::submit(Task* task) {
  TaskList one;
  one.push(task);
  submitAll(one);
}

void WorkPool::submitAll(TaskList& tasks) {
  if (tasks.empty()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  if (stopping_) {
    lock.unlock();
    for (Task* task = tasks.head_; task != nullptr;) {
      Task* next = task->next_;
      task->cancel();
      task = next;
    }
    tasks = TaskList();
    return;
  }
  (tail_ == nullptr ? head_ : tail_->next_) = tasks.head_;
  tail_ = tasks.tail_;
  queued_ += tasks.count_;
  tasks = TaskList();
  if (idle_ == 0) {
    if (threads_.size() < threadsMax_) startThread();
    return; // whoever is at work comes back for it
  }
  lock.unlock();
  wake_.notify_one();
}

/// With the lock held.
void WorkPool::startThread() {
  const uint32_t index = static_cast<uint32_t>(threads_.size());
  // Signals are for the thread that runs JavaScript.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  threads_.emplace_back([this, index] { work(index); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void WorkPool::work(uint32_t index) {
  pthread_setname_np(pthread_self(), "nbd-work");
  WorkerContext context(layout_, counters_[index].get());
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (head_ == nullptr && !stopping_) {
      idle_++;
      wake_.wait(lock);
      idle_--;
    }
    if (head_ == nullptr) return;
    Task* task = head_;
    head_ = task->next_;
    if (head_ == nullptr) tail_ = nullptr;
    queued_--;
    // What is behind it must not wait for a disk that this one may have to wait for.
    const bool more = queued_ > 0;
    const bool wake = more && idle_ > 0;
    if (more && !wake && !stopping_ && threads_.size() < threadsMax_) startThread();
    lock.unlock();
    if (wake) wake_.notify_one();
    task->run(context);
    lock.lock();
  }
}

void WorkPool::stop() {
  Task* cancelled;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    cancelled = head_;
    head_ = tail_ = nullptr;
    queued_ = 0;
  }
  while (cancelled != nullptr) {
    Task* next = cancelled->next_;
    cancelled->cancel();
    cancelled = next;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void WorkPool::addCounters(uint32_t member, uint64_t sums[5]) const {
  for (uint32_t i = 0; i < threadsMax_; i++) {
    const MemberCounters& from = counters_[i][member];
    sums[0] += from.reads.get();
    sums[1] += from.readBytes.get();
    sums[2] += from.writes.get();
    sums[3] += from.writeBytes.get();
    sums[4] += from.syncs.get();
  }
}

}  // namespace nbd
