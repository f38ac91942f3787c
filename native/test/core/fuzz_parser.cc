// libFuzzer: a session's rules and a stream of bytes from the input. Whatever comes, the parser moves on, ends, or waits
// for at most one header, and it never looks past the bytes at hand.
#include <stdlib.h>

#include <algorithm>
#include <vector>

#include "parser.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace nbd;
  if (size < 2) return 0;
  SessionRules rules;
  rules.mode = static_cast<Mode>(data[0] % 3);
  rules.readOnly = (data[0] & 0x10) != 0;
  rules.contexts = rules.mode != Mode::Simple && (data[0] & 0x20) != 0;
  rules.contextCount = rules.contexts ? 3 : 0;
  rules.payloadMax = 1u << (data[1] % 26);
  const uint64_t exportSize = uint64_t{1} << (data[1] % 50);
  const uint32_t contexts[3] = {1, 2, 3};
  data += 2;
  size -= 2;
  RequestParser parser(rules);
  while (size > 0) {
    // Exactly as many bytes as a header, in memory of their own.
    const std::vector<uint8_t> exact(data, data + std::min(size, parser.headerSize()));
    const RequestParser::Step step = parser.next(exact.data(), exact.size(), exportSize);
    if (step == RequestParser::Step::Ended) return 0;
    if (step == RequestParser::Step::NeedMore) {
      if (exact.size() >= parser.headerSize()) abort();
      return 0;
    }
    const Request& request = parser.request();
    data += parser.headerSize();
    size -= parser.headerSize();
    if (parser.verdict().error == kOk && (request.command == kRead || request.command == kWrite)) {
      if (request.length == 0 || request.length > rules.payloadMax) abort();
      if (request.offset > exportSize || request.length > exportSize - request.offset) abort();
    }
    const uint64_t most = rules.mode == Mode::Extended ? rules.payloadMax : uint64_t{2} * rules.payloadMax;
    if (parser.payloadLeft() > most) abort();
    const size_t part = std::min<uint64_t>(size, parser.payloadLeft());
    if (request.command == kBlockStatus && parser.payloadLeft() == part && part > 0) {
      uint64_t length, mask;
      const std::vector<uint8_t> body(data, data + part);
      if (decodeStatusPayload(body.data(), part, contexts, 3, &length, &mask) && (mask == 0 || mask > 7)) abort();
    }
    parser.consumed(part);
    data += part;
    size -= part;
    if (parser.payloadLeft() > 0) return 0;
  }
  return 0;
}
