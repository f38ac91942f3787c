// libFuzzer: any bytes, cut anywhere, give the same requests as when they come at once, and no verdict breaks its own
// promises. The first byte chooses the mode, the second where to cut.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../src/parser.h"

using namespace nbd;

namespace {

constexpr uint64_t kSize = uint64_t{1} << 33;

struct Outcome {
  std::vector<uint64_t> words;
  bool ended = false;
};

void require(bool condition) {
  if (!condition) abort();
}

Outcome parse(const SessionRules& rules, const uint8_t* data, size_t size, size_t step) {
  RequestParser parser(rules);
  Outcome outcome;
  size_t at = 0;         // consumed
  size_t available = 0;  // arrived
  while (!outcome.ended) {
    const uint64_t payload = parser.payloadLeft();
    if (payload > 0) {
      const uint64_t part = std::min<uint64_t>(payload, available - at);
      parser.consumed(part);
      at += part;
    }
    if (parser.payloadLeft() == 0) {
      const RequestParser::Step step = parser.next(data + at, available - at, kSize);
      if (step == RequestParser::Step::Ended) {
        outcome.ended = true;
        break;
      }
      if (step == RequestParser::Step::Request) {
        const Request& request = parser.request();
        const Verdict& verdict = parser.verdict();
        require(!verdict.fatal);
        require(verdict.payload <= 2 * uint64_t{rules.payloadMax});
        if (verdict.error == kOk && request.command <= kWriteZeroes && request.command != kDisconnect) {
          require(request.offset <= kSize && request.length <= kSize - request.offset);
          if (request.command == kRead || request.command == kWrite) require(request.length <= rules.payloadMax);
        }
        for (uint64_t word : {uint64_t{request.command}, uint64_t{request.flags}, request.cookie, request.offset,
                              request.length, uint64_t{verdict.error}, verdict.payload}) {
          outcome.words.push_back(word);
        }
        at += parser.headerSize();
        continue;
      }
    }
    if (available == size) break;
    available = std::min(size, available + step);
  }
  return outcome;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  SessionRules rules;
  rules.mode = static_cast<Mode>(data[0] % 3);
  rules.readOnly = (data[0] & 0x80) != 0;
  rules.contexts = (data[0] & 0x40) != 0;
  rules.contextCount = rules.contexts ? 3 : 0;
  rules.payloadMax = 1 << 16;
  const size_t step = 1 + data[1];
  const Outcome whole = parse(rules, data + 2, size - 2, size);
  const Outcome cut = parse(rules, data + 2, size - 2, step);
  require(whole.words == cut.words && whole.ended == cut.ended);

  const uint32_t contexts[] = {0, 1, 0x01020304};
  uint64_t length, mask;
  if (decodeStatusPayload(data, size, contexts, 3, &length, &mask)) require(mask > 0 && mask < 8);
  return 0;
}
