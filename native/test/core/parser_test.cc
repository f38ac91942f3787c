// The request parser: layout, every rule with its error number, and independence of how the stream is cut.
#include <vector>

#include "harness.h"
#include "parser.h"

namespace nbd::test {
namespace {

constexpr uint64_t kSize = 1 << 20;
constexpr uint32_t kPayloadMax = 64 * 1024;

using Bytes = std::vector<uint8_t>;

SessionRules rulesOf(Mode mode) {
  SessionRules rules;
  rules.mode = mode;
  rules.payloadMax = kPayloadMax;
  rules.contexts = mode != Mode::Simple;
  rules.contextCount = mode != Mode::Simple ? 2 : 0;
  return rules;
}

void put(Bytes& out, Mode mode, uint16_t flags, uint16_t command, uint64_t cookie, uint64_t offset, uint64_t length) {
  uint8_t header[kExtendedRequestSize];
  uint8_t* p = put32(header, mode == Mode::Extended ? kExtendedRequestMagic : kRequestMagic);
  p = put16(p, flags);
  p = put16(p, command);
  p = put64(p, cookie);
  p = put64(p, offset);
  p = mode == Mode::Extended ? put64(p, length) : put32(p, static_cast<uint32_t>(length));
  out.insert(out.end(), header, p);
}

struct Seen {
  Request request;
  uint32_t error;
  Bytes payload;
  bool operator==(const Seen& other) const {
    return request.flags == other.request.flags && request.command == other.request.command &&
           request.cookie == other.request.cookie && request.offset == other.request.offset &&
           request.length == other.request.length && error == other.error && payload == other.payload;
  }
};

struct Outcome {
  std::vector<Seen> seen;
  bool ended = false;
  bool operator==(const Outcome&) const = default;
};

/// Feeds `stream` in pieces that end at `cuts` (ascending) and at its end.
Outcome feed(const Bytes& stream, const SessionRules& rules, const std::vector<size_t>& cuts) {
  RequestParser parser(rules);
  Outcome outcome;
  Bytes held;
  size_t fed = 0;
  for (size_t piece = 0; piece <= cuts.size(); piece++) {
    const size_t until = piece < cuts.size() ? cuts[piece] : stream.size();
    held.insert(held.end(), stream.begin() + static_cast<long>(fed), stream.begin() + static_cast<long>(until));
    fed = until;
    for (;;) {
      if (parser.payloadLeft() > 0) {
        const size_t part = std::min<size_t>(held.size(), parser.payloadLeft());
        if (part == 0) break;
        Bytes& payload = outcome.seen.back().payload;
        payload.insert(payload.end(), held.begin(), held.begin() + static_cast<long>(part));
        held.erase(held.begin(), held.begin() + static_cast<long>(part));
        parser.consumed(part);
        continue;
      }
      // A copy of exactly these bytes, so that a look past the end is an error of the sanitizer's.
      const Bytes exact(held);
      const RequestParser::Step step = parser.next(exact.data(), exact.size(), kSize);
      if (step == RequestParser::Step::NeedMore) break;
      if (step == RequestParser::Step::Ended) {
        outcome.ended = true;
        return outcome;
      }
      held.erase(held.begin(), held.begin() + static_cast<long>(parser.headerSize()));
      outcome.seen.push_back({parser.request(), parser.verdict().error, {}});
    }
  }
  return outcome;
}

Bytes sampleStream(Mode mode) {
  const uint16_t payloadFlag = mode == Mode::Extended ? kFlagPayloadLength : 0;
  Bytes stream;
  auto payload = [&](size_t bytes) {
    for (size_t i = 0; i < bytes; i++) stream.push_back(static_cast<uint8_t>(stream.size() * 7));
  };
  put(stream, mode, 0, kRead, 1, 4096, 512);
  put(stream, mode, static_cast<uint16_t>(kFlagFua | payloadFlag), kWrite, 0xfedcba9876543210, kSize - 5, 5);
  payload(5);
  put(stream, mode, payloadFlag, kWrite, 3, kSize - 4, 9);  // ENOSPC, the payload is swallowed
  payload(9);
  put(stream, mode, 0, kFlush, 4, 0, 0);
  put(stream, mode, 0, 77, 5, 0, 1);
  if (mode == Mode::Extended) {
    put(stream, mode, payloadFlag, kBlockStatus, 6, 0, 16);
    payload(16);
    put(stream, mode, payloadFlag, kRead, 7, 0, 3);  // not allowed, framed all the same
    payload(3);
  }
  put(stream, mode, kFlagNoHole, kWriteZeroes, 8, 0, kSize);
  put(stream, mode, 0, kDisconnect, 9, 0, 0);
  return stream;
}

void everySplit(Mode mode) {
  const Bytes stream = sampleStream(mode);
  const SessionRules rules = rulesOf(mode);
  const Outcome whole = feed(stream, rules, {});
  CHECK_EQUAL(whole.seen.size(), mode == Mode::Extended ? size_t{9} : size_t{7});
  CHECK(!whole.ended);
  CHECK_EQUAL(whole.seen[0].request.offset, uint64_t{4096});
  CHECK_EQUAL(whole.seen[0].request.length, uint64_t{512});
  CHECK_EQUAL(whole.seen[1].request.cookie, uint64_t{0xfedcba9876543210});
  CHECK_EQUAL(whole.seen[1].error, uint32_t{kOk});
  CHECK_EQUAL(whole.seen[1].payload.size(), size_t{5});
  CHECK_EQUAL(whole.seen[2].error, uint32_t{kEnospc});
  CHECK_EQUAL(whole.seen[2].payload.size(), size_t{9});
  CHECK_EQUAL(whole.seen[4].error, uint32_t{kEinval});
  CHECK_EQUAL(whole.seen.back().request.command, uint16_t{kDisconnect});

  std::vector<size_t> bytewise;
  for (size_t at = 0; at < stream.size(); at++) {
    CHECK(feed(stream, rules, {at}) == whole);
    bytewise.push_back(at);
  }
  CHECK(feed(stream, rules, bytewise) == whole);
  for (size_t first = 0; first < stream.size(); first += 3) {
    for (size_t second = first; second < stream.size(); second += 5) CHECK(feed(stream, rules, {first, second}) == whole);
  }
}

Verdict judge(Mode mode, uint16_t flags, uint16_t command, uint64_t offset, uint64_t length, bool readOnly = false) {
  SessionRules rules = rulesOf(mode);
  rules.readOnly = readOnly;
  Bytes header;
  put(header, mode, flags, command, 1, offset, length);
  return validateRequest(decodeRequest(header.data(), mode), rules, kSize);
}

const Register splits[] = {
    {"parser: every split of a compact stream", [] { everySplit(Mode::Simple); }},
    {"parser: every split of a structured stream", [] { everySplit(Mode::Structured); }},
    {"parser: every split of an extended stream", [] { everySplit(Mode::Extended); }},
};

const Register ranges("parser: ranges and limits have their error numbers", [] {
  for (const Mode mode : {Mode::Simple, Mode::Structured, Mode::Extended}) {
    const uint16_t payload = mode == Mode::Extended ? kFlagPayloadLength : 0;
    CHECK_EQUAL(judge(mode, 0, kRead, kSize - 1, 1).error, uint32_t{kOk});
    CHECK_EQUAL(judge(mode, 0, kRead, kSize, 1).error, uint32_t{kEinval});
    CHECK_EQUAL(judge(mode, 0, kRead, UINT64_MAX, 1).error, uint32_t{kEinval});
    CHECK_EQUAL(judge(mode, 0, kRead, 0, 0).error, uint32_t{kEinval});
    CHECK_EQUAL(judge(mode, payload, kWrite, UINT64_MAX - 1, 4).error, uint32_t{kEnospc});
    CHECK_EQUAL(judge(mode, 0, kWriteZeroes, kSize, 1).error, uint32_t{kEnospc});
    CHECK_EQUAL(judge(mode, 0, kTrim, kSize, 1).error, uint32_t{kEinval});
    CHECK_EQUAL(judge(mode, 0, kFlush, 0, 1).error, uint32_t{kEinval});
    CHECK_EQUAL(judge(mode, 0, kRead, 0, kPayloadMax).error, uint32_t{kOk});
    CHECK_EQUAL(judge(mode, 0, kRead, 0, kPayloadMax + 1).error, uint32_t{mode == Mode::Simple ? kEinval : kEoverflow});
    for (const uint16_t command : {kWrite, kTrim, kWriteZeroes}) {
      const uint16_t flags = command == kWrite ? payload : 0;
      CHECK_EQUAL(judge(mode, flags, command, 0, 1, true).error, uint32_t{kEperm});
    }
    CHECK(!judge(mode, payload, kWrite, 0, kPayloadMax).fatal);
    CHECK(judge(mode, payload, kWrite, 0, uint64_t{2} * kPayloadMax + 1).fatal);
    CHECK_EQUAL(judge(mode, payload, kWrite, 0, kPayloadMax + 1).fatal, mode == Mode::Extended);
  }
});

const Register flags("parser: flags a command does not know are refused", [] {
  CHECK_EQUAL(judge(Mode::Simple, kFlagDontFragment, kRead, 0, 1).error, uint32_t{kEinval});
  CHECK_EQUAL(judge(Mode::Structured, kFlagDontFragment, kRead, 0, 1).error, uint32_t{kOk});
  CHECK_EQUAL(judge(Mode::Structured, kFlagPayloadLength, kWrite, 0, 1).error, uint32_t{kEinval});
  CHECK_EQUAL(judge(Mode::Extended, 0, kWrite, 0, 1).error, uint32_t{kEinval});
  CHECK_EQUAL(judge(Mode::Extended, 0, kWrite, 0, 1).payload, uint64_t{0});
  CHECK_EQUAL(judge(Mode::Simple, kFlagFastZero, kTrim, 0, 1).error, uint32_t{kEinval});
  CHECK_EQUAL(judge(Mode::Simple, 0, kBlockStatus, 0, 1).error, uint32_t{kEinval});
  CHECK_EQUAL(judge(Mode::Structured, kFlagRequestOne, kBlockStatus, 0, 1).error, uint32_t{kOk});
  for (uint16_t command = 0; command < 8; command++) {
    if (command == kDisconnect) continue;
    CHECK_EQUAL(judge(Mode::Structured, 1 << 9, command, 0, command == kFlush ? 0 : 1).error, uint32_t{kEinval});
  }
});

const Register garbage("parser: a wrong magic number ends the stream at its fourth byte", [] {
  for (const Mode mode : {Mode::Simple, Mode::Extended}) {
    Bytes right;
    put(right, mode, 0, kRead, 1, 0, 1);
    for (int bit = 0; bit < 32; bit++) {
      Bytes wrong(right);
      wrong[static_cast<size_t>(bit / 8)] ^= static_cast<uint8_t>(1 << (bit % 8));
      RequestParser parser(rulesOf(mode));
      for (size_t have = 0; have < 4; have++) {
        CHECK(parser.next(Bytes(wrong.begin(), wrong.begin() + static_cast<long>(have)).data(), have, kSize) ==
              RequestParser::Step::NeedMore);
      }
      CHECK(parser.next(wrong.data(), 4, kSize) == RequestParser::Step::Ended);
      CHECK(parser.next(right.data(), right.size(), kSize) == RequestParser::Step::Ended);
    }
  }
});

const Register status("parser: the payload of an extended BLOCK_STATUS", [] {
  const uint32_t contexts[] = {5, 9};
  uint64_t length = 0, mask = 0;
  Bytes body(16);
  put64(body.data(), 777);
  put32(body.data() + 8, 9);
  put32(body.data() + 12, 5);
  CHECK(decodeStatusPayload(body.data(), 16, contexts, 2, &length, &mask));
  CHECK_EQUAL(length, uint64_t{777});
  CHECK_EQUAL(mask, uint64_t{3});
  CHECK(decodeStatusPayload(body.data(), 12, contexts, 2, &length, &mask));
  CHECK_EQUAL(mask, uint64_t{2});
  CHECK(!decodeStatusPayload(body.data(), 8, contexts, 2, &length, &mask));
  CHECK(!decodeStatusPayload(body.data(), 15, contexts, 2, &length, &mask));
  put32(body.data() + 12, 9);
  CHECK(!decodeStatusPayload(body.data(), 16, contexts, 2, &length, &mask));  // twice
  put32(body.data() + 12, 6);
  CHECK(!decodeStatusPayload(body.data(), 16, contexts, 2, &length, &mask));  // unknown
  CHECK_EQUAL(judge(Mode::Extended, kFlagPayloadLength, kBlockStatus, 0, 20).error, uint32_t{kEinval});  // three of two
});

const Register random("parser: random bytes and headers, one second", [] {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  uint64_t requests = 0;
  for (uint64_t seed = 1; std::chrono::steady_clock::now() < deadline; seed++) {
    Random random(seed);
    const Mode mode = static_cast<Mode>(random.below(3));
    Bytes stream;
    while (stream.size() < 600) {
      const size_t start = stream.size();
      put(stream, mode, static_cast<uint16_t>(random.chance(50) ? 0 : 1u << random.below(8)),
          static_cast<uint16_t>(random.below(10)), random.next(), random.below(2 * kSize),
          random.chance(90) ? random.below(64) : random.next() >> random.below(64));
      if (random.chance(5)) stream[start + random.below(stream.size() - start)] ^= static_cast<uint8_t>(random.next());
      for (uint64_t left = random.below(64); left > 0; left--) stream.push_back(static_cast<uint8_t>(random.next()));
      if (random.chance(50)) stream.resize(start + requestSize(mode));
    }
    const SessionRules rules = rulesOf(mode);
    const Outcome whole = feed(stream, rules, {});
    const size_t first = random.below(stream.size());
    CHECK(feed(stream, rules, {first, first + random.below(stream.size() - first)}) == whole);
    requests += whole.seen.size();
  }
  CHECK(requests > 100);
});

}  // namespace
}  // namespace nbd::test
