// The NBD transmission phase as bytes: magic numbers, commands, flags, reply headers (NBD specification,
// "Transmission" and "Values"). Everything on the wire is big endian. No state, no sockets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace nbd {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the codecs below swap bytes");

constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;

/// How replies are framed; chosen in the handshake. Extended also widens the request header.
enum class Mode : uint8_t { Simple = 0, Structured = 1, Extended = 2 };

enum Command : uint16_t {
  kRead = 0,
  kWrite = 1,
  kDisconnect = 2,
  kFlush = 3,
  kTrim = 4,
  kCache = 5,
  kWriteZeroes = 6,
  kBlockStatus = 7,
};

enum CommandFlag : uint16_t {
  kFlagFua = 1 << 0,
  kFlagNoHole = 1 << 1,
  kFlagDontFragment = 1 << 2,
  kFlagRequestOne = 1 << 3,
  kFlagFastZero = 1 << 4,
  kFlagPayloadLength = 1 << 5,
};

enum ReplyType : uint16_t {
  kReplyNone = 0,
  kReplyOffsetData = 1,
  kReplyOffsetHole = 2,
  kReplyBlockStatus = 5,
  kReplyBlockStatusExtended = 6,
  kReplyError = 0x8001,
  kReplyErrorOffset = 0x8002,
};
constexpr uint16_t kReplyFlagDone = 1;

enum WireError : uint32_t {
  kOk = 0,
  kEperm = 1,
  kEio = 5,
  kEnomem = 12,
  kEinval = 22,
  kEnospc = 28,
  kEoverflow = 75,
  kEnotsup = 95,
  kEshutdown = 108,
};

constexpr size_t kRequestSize = 28;
constexpr size_t kExtendedRequestSize = 32;
constexpr size_t kSimpleReplySize = 16;
constexpr size_t kStructuredReplySize = 20;
constexpr size_t kExtendedReplySize = 32;
/// An extended ERROR_OFFSET chunk without a message is the longest reply that carries no data.
constexpr size_t kStatusReplyMax = kExtendedReplySize + 6 + 8;

inline uint16_t load16(const uint8_t* at) {
  uint16_t value;
  memcpy(&value, at, sizeof value);
  return __builtin_bswap16(value);
}
inline uint32_t load32(const uint8_t* at) {
  uint32_t value;
  memcpy(&value, at, sizeof value);
  return __builtin_bswap32(value);
}
inline uint64_t load64(const uint8_t* at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return __builtin_bswap64(value);
}
inline uint8_t* put16(uint8_t* at, uint16_t value) {
  value = __builtin_bswap16(value);
  memcpy(at, &value, sizeof value);
  return at + sizeof value;
}
inline uint8_t* put32(uint8_t* at, uint32_t value) {
  value = __builtin_bswap32(value);
  memcpy(at, &value, sizeof value);
  return at + sizeof value;
}
inline uint8_t* put64(uint8_t* at, uint64_t value) {
  value = __builtin_bswap64(value);
  memcpy(at, &value, sizeof value);
  return at + sizeof value;
}

inline size_t requestSize(Mode mode) { return mode == Mode::Extended ? kExtendedRequestSize : kRequestSize; }
inline size_t chunkHeaderSize(Mode mode) { return mode == Mode::Extended ? kExtendedReplySize : kStructuredReplySize; }

/// error, cookie; 16 bytes.
inline uint8_t* putSimpleReply(uint8_t* at, uint32_t error, uint64_t cookie) {
  at = put32(at, kSimpleReplyMagic);
  at = put32(at, error);
  return put64(at, cookie);
}

/// The header of one structured (20 bytes) or extended (32 bytes) reply chunk. `requestOffset` is the request's.
inline uint8_t* putChunkHeader(uint8_t* at, Mode mode, uint16_t flags, uint16_t type, uint64_t cookie,
                               uint64_t requestOffset, uint64_t length) {
  at = put32(at, mode == Mode::Extended ? kExtendedReplyMagic : kStructuredReplyMagic);
  at = put16(at, flags);
  at = put16(at, type);
  at = put64(at, cookie);
  if (mode != Mode::Extended) return put32(at, static_cast<uint32_t>(length));
  at = put64(at, requestOffset);
  return put64(at, length);
}

/// The whole reply of a request that returns no data: success or an error number.
inline uint8_t* putStatusReply(uint8_t* at, Mode mode, uint32_t error, uint64_t cookie, uint64_t requestOffset) {
  if (mode == Mode::Simple) return putSimpleReply(at, error, cookie);
  if (error == 0) return putChunkHeader(at, mode, kReplyFlagDone, kReplyNone, cookie, requestOffset, 0);
  at = putChunkHeader(at, mode, kReplyFlagDone, kReplyError, cookie, requestOffset, 6);
  at = put32(at, error);
  return put16(at, 0);
}

}  // namespace nbd
