#include "buffers.h"

#include <cstdlib>
#include <cstring>

#include "assert.h"

namespace nbd {

void Chunk::compact() {
  if (start == 0) return;
  memmove(data(), begin(), size());
  end -= start;
  start = 0;
}

ChunkPool::~ChunkPool() {
  for (Shelf& shelf : shelves_) {
    while (shelf.head != nullptr) {
      Chunk* chunk = shelf.head;
      shelf.head = chunk->next;
      free(chunk);
    }
  }
}

Chunk* ChunkPool::take(size_t capacity) {
  size_t size = capacity;
  for (Shelf& shelf : shelves_) {
    if (capacity > shelf.capacity) continue;
    if (shelf.head != nullptr) {
      Chunk* chunk = shelf.head;
      shelf.head = chunk->next;
      shelf.count--;
      chunk->next = nullptr;
      chunk->clear();
      return chunk;
    }
    size = shelf.capacity;
    break;
  }
  NBD_ASSERT(size <= UINT32_MAX);
  void* memory = aligned_alloc(64, (Chunk::kHeaderSize + size + 63) / 64 * 64);
  NBD_ASSERT(memory != nullptr);
  Chunk* chunk = static_cast<Chunk*>(memory);
  chunk->next = nullptr;
  chunk->capacity = static_cast<uint32_t>(size);
  chunk->clear();
  return chunk;
}

void ChunkPool::give(Chunk* chunk) {
  for (Shelf& shelf : shelves_) {
    if (chunk->capacity != shelf.capacity) continue;
    if (shelf.count >= shelf.keep) break;
    chunk->next = shelf.head;
    shelf.head = chunk;
    shelf.count++;
    return;
  }
  free(chunk);
}

uint64_t ChunkPool::memoryOf(size_t capacity) const {
  for (const Shelf& shelf : shelves_) {
    if (capacity <= shelf.capacity) return shelf.capacity + Chunk::kHeaderSize;
  }
  return capacity + Chunk::kHeaderSize;
}

uint8_t* OutQueue::reserve(size_t bytes, size_t hint) {
  if (tail_ == nullptr || tail_->room() < bytes) append(pool_.take(bytes > hint ? bytes : hint));
  return tail_->data() + tail_->end;
}

void OutQueue::commit(size_t bytes) {
  NBD_ASSERT(tail_ != nullptr && bytes <= tail_->room());
  tail_->end += static_cast<uint32_t>(bytes);
  bytes_ += bytes;
}

void OutQueue::append(Chunk* chunk) {
  chunk->next = nullptr;
  (tail_ == nullptr ? head_ : tail_->next) = chunk;
  tail_ = chunk;
  bytes_ += chunk->size();
  memory_ += chunk->capacity + Chunk::kHeaderSize;
}

void OutQueue::splice(OutQueue& other) {
  if (other.head_ == nullptr) return;
  (tail_ == nullptr ? head_ : tail_->next) = other.head_;
  tail_ = other.tail_;
  bytes_ += other.bytes_;
  memory_ += other.memory_;
  other.head_ = other.tail_ = nullptr;
  other.bytes_ = 0;
  other.memory_ = 0;
}

int OutQueue::gather(iovec* parts, int partsMax) {
  int count = 0;
  for (Chunk* chunk = head_; chunk != nullptr && count < partsMax; chunk = chunk->next) {
    if (chunk->size() > 0) parts[count++] = {chunk->begin(), chunk->size()};
  }
  return count;
}

void OutQueue::drop(size_t bytes) {
  NBD_ASSERT(bytes <= bytes_);
  bytes_ -= bytes;
  while (head_ != nullptr) {
    const size_t part = bytes < head_->size() ? bytes : head_->size();
    head_->start += static_cast<uint32_t>(part);
    bytes -= part;
    if (head_->size() > 0) return;
    Chunk* empty = head_;
    head_ = empty->next;
    if (head_ == nullptr) tail_ = nullptr;
    memory_ -= empty->capacity + Chunk::kHeaderSize;
    pool_.give(empty);
  }
}

void OutQueue::clear() {
  while (head_ != nullptr) {
    Chunk* chunk = head_;
    head_ = chunk->next;
    pool_.give(chunk);
  }
  tail_ = nullptr;
  bytes_ = 0;
  memory_ = 0;
}

}  // namespace nbd
