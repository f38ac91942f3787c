// Memory that bytes pass through: chunks, recycled by size in a pool of one thread, and the queue of replies a
// connection still has to send. Recycling is last in, first out, so that one busy connection keeps using memory that is
// in the processor's cache, and idle connections hold nothing.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace nbd {

struct Chunk {
  Chunk* next;
  uint32_t capacity;
  uint32_t start;  // bytes [start, end) are in use
  uint32_t end;

  uint8_t* data() { return reinterpret_cast<uint8_t*>(this) + kHeaderSize; }
  uint8_t* begin() { return data() + start; }
  uint32_t size() const { return end - start; }
  uint32_t room() const { return capacity - end; }
  void clear() { start = end = 0; }
  /// Moves the bytes in use to the front.
  void compact();

  static constexpr size_t kHeaderSize = 64;
};

constexpr uint32_t kSmallChunk = 4096 - Chunk::kHeaderSize;
constexpr uint32_t kPieceChunk = 60 * 1024 - Chunk::kHeaderSize;
constexpr uint32_t kMediumChunk = 264 * 1024 - Chunk::kHeaderSize;
constexpr uint32_t kLargeChunk = 2112 * 1024 - Chunk::kHeaderSize;

class ChunkPool {
 public:
  ChunkPool() = default;
  ~ChunkPool();
  ChunkPool(const ChunkPool&) = delete;
  ChunkPool& operator=(const ChunkPool&) = delete;

  /// A chunk of at least `capacity` bytes; empty.
  Chunk* take(size_t capacity);
  void give(Chunk* chunk);
  /// The memory that such a chunk takes up.
  uint64_t memoryOf(size_t capacity) const;

 private:
  struct Shelf {
    uint32_t capacity;
    uint32_t keep;  // at most so many wait for reuse
    uint32_t count = 0;
    Chunk* head = nullptr;
  };
  Shelf shelves_[6] = {{kSmallChunk, 64},
                       {8192 - Chunk::kHeaderSize, 64},  // a page and its headers
                       {kPieceChunk, 16},
                       {kMediumChunk, 8},
                       {1056 * 1024 - Chunk::kHeaderSize, 2},
                       {kLargeChunk, 2}};
};

/// Replies in the order they will leave. Bytes are written in place: reserve, then commit what was used.
class OutQueue {
 public:
  explicit OutQueue(ChunkPool& pool) : pool_(pool) {}
  ~OutQueue() { clear(); }
  OutQueue(const OutQueue&) = delete;
  OutQueue& operator=(const OutQueue&) = delete;

  /// `bytes` of contiguous memory behind what is queued; valid until the next call.
  uint8_t* reserve(size_t bytes, size_t hint = kSmallChunk);
  void commit(size_t bytes);
  /// Queues a chunk as it is.
  void append(Chunk* chunk);
  /// Moves everything of `other` behind what is here.
  void splice(OutQueue& other);

  size_t bytes() const { return bytes_; }
  /// What its chunks take up.
  uint64_t memory() const { return memory_; }
  bool empty() const { return bytes_ == 0; }
  /// Fills `parts` with the first bytes to send and returns how many parts.
  int gather(iovec* parts, int partsMax);
  /// `bytes` have been sent.
  void drop(size_t bytes);
  void clear();

 private:
  ChunkPool& pool_;
  Chunk* head_ = nullptr;
  Chunk* tail_ = nullptr;
  size_t bytes_ = 0;
  uint64_t memory_ = 0;
};

}  // namespace nbd
