// Requests of the transmission phase, sans I/O: bytes in, requests and verdicts out. Three steps in three
// functions: decodeRequest (layout), validateRequest (every rule of the protocol), and whoever calls executes.
//
//   header ──request without payload──> header
//     │ └────request with payload─────> payload ──all consumed──> header
//     └──bad magic, absurd payload────> ended
#pragma once

#include <cstddef>
#include <cstdint>

#include "wire.h"

namespace nbd {

struct Request {
  uint16_t flags = 0;
  uint16_t command = 0;
  uint64_t cookie = 0;
  uint64_t offset = 0;
  uint64_t length = 0;  // as in the header; with an extended payload other than a write's, the payload's length
};

/// What a session may ask for.
struct SessionRules {
  Mode mode = Mode::Simple;
  bool readOnly = false;
  bool contexts = false;       // meta contexts were negotiated
  uint32_t contextCount = 0;
  uint32_t payloadMax = 0;     // bytes of one read or write
};

struct Verdict {
  uint32_t error = kOk;   // to be answered after `payload` has been consumed
  uint64_t payload = 0;   // bytes that follow the header
  bool fatal = false;     // the connection ends here: what follows cannot be framed, or is too much to swallow
};

/// Layout only. `at` holds requestSize(mode) bytes.
Request decodeRequest(const uint8_t* at, Mode mode);
bool requestMagicMatches(const uint8_t* at, Mode mode);

/// Every rule of the specification about one request, in one place. `exportSize` in bytes.
Verdict validateRequest(const Request& request, const SessionRules& rules, uint64_t exportSize);

/// The payload of an extended BLOCK_STATUS: effect length, then the context ids asked for. Returns false where it is
/// malformed, names a context twice or one that was not negotiated. `mask` gets one bit an index into `contexts`.
bool decodeStatusPayload(const uint8_t* at, uint64_t length, const uint32_t* contexts, uint32_t contextCount,
                         uint64_t* effectLength, uint64_t* mask);

/// Cuts a stream into requests. The caller owns the bytes and tells how much payload it has taken.
class RequestParser {
 public:
  enum class Step { NeedMore, Request, Ended };

  explicit RequestParser(const SessionRules& rules) : rules_(rules) {}

  /// Looks at the bytes at hand; in the payload of a request it must not be called. On `Request` the caller drops
  /// headerSize() bytes, reads request() and verdict(), and then consumes payloadLeft() bytes through consumed().
  Step next(const uint8_t* at, size_t available, uint64_t exportSize);

  size_t headerSize() const { return requestSize(rules_.mode); }
  const Request& request() const { return request_; }
  const Verdict& verdict() const { return verdict_; }
  uint64_t payloadLeft() const { return payloadLeft_; }
  void consumed(uint64_t bytes);
  const SessionRules& rules() const { return rules_; }

 private:
  SessionRules rules_;
  Request request_;
  Verdict verdict_;
  uint64_t payloadLeft_ = 0;
  bool ended_ = false;
};

}  // namespace nbd
