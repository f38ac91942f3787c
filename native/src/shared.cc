#include "shared.h"

#include <cstdlib>
#include <new>

#include "assert.h"
#include "loop.h"

namespace nbd {

Payload* Payload::create(uint64_t size) {
  void* memory = malloc(sizeof(Payload) + size);
  NBD_ASSERT(memory != nullptr);
  Payload* payload = new (memory) Payload;
  payload->size = size;
  return payload;
}

Payload* Payload::borrow(uint8_t* data, uint64_t size) {
  NBD_ASSERT(data != nullptr);
  Payload* payload = create(0);
  payload->size = size;
  payload->borrowed = data;
  return payload;
}

void Payload::release() {
  if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    this->~Payload();
    free(this);
  }
}

void EventQueue::push(const Event& event) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(event);
    if (woken_) return;
    woken_ = true;
  }
  wake();
}

void EventQueue::push(std::vector<Event>& batch) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.insert(events_.end(), batch.begin(), batch.end());
    batch.clear();
    if (woken_) return;
    woken_ = true;
  }
  wake();
}

void EventQueue::nudge() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (woken_) return;
    woken_ = true;
  }
  wake();
}

void EventQueue::take(std::vector<Event>& into) {
  std::lock_guard<std::mutex> lock(mutex_);
  woken_ = false;
  into.swap(events_);
}

void EventQueue::wake() {
  if (wake_ != nullptr) wake_(context_);
}

void Shared::pass(Barrier* barrier) {
  if (barrier->remaining.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  Event event{};
  event.kind = EventKind::Done;
  event.tag = barrier->tag;
  event.value = 1;
  delete barrier->retired;
  delete barrier;
  events.push(event);
}

}  // namespace nbd
