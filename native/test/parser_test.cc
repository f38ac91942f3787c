// The transmission parser: layout, every rule of validateRequest, and the same requests wherever the stream is cut.
#include "../src/parser.h"

#include <algorithm>

#include "harness.h"

using namespace nbd;

namespace {

constexpr uint64_t kSize = 1 << 20;
constexpr uint32_t kPayloadMax = 32 << 20;

SessionRules rulesOf(Mode mode) {
  SessionRules rules;
  rules.mode = mode;
  rules.payloadMax = kPayloadMax;
  rules.contexts = true;
  rules.contextCount = 2;
  return rules;
}

std::vector<uint8_t> encode(Mode mode, uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset,
                            uint64_t length) {
  std::vector<uint8_t> bytes(requestSize(mode));
  uint8_t* at = put32(bytes.data(), mode == Mode::Extended ? kExtendedRequestMagic : kRequestMagic);
  at = put16(at, flags);
  at = put16(at, command);
  at = put64(at, cookie);
  at = put64(at, offset);
  if (mode == Mode::Extended) {
    put64(at, length);
  } else {
    put32(at, static_cast<uint32_t>(length));
  }
  return bytes;
}

Request request(uint16_t command, uint64_t offset, uint64_t length, uint16_t flags = 0) {
  Request made;
  made.command = command;
  made.offset = offset;
  made.length = length;
  made.flags = flags;
  return made;
}

uint32_t errorOf(Mode mode, const Request& made, bool readOnly = false) {
  SessionRules rules = rulesOf(mode);
  rules.readOnly = readOnly;
  return validateRequest(made, rules, kSize).error;
}

constexpr Mode kModes[] = {Mode::Simple, Mode::Structured, Mode::Extended};

/// What a parser made of a stream, as text.
std::string parseAll(Mode mode, const std::vector<uint8_t>& stream, const std::vector<size_t>& cuts) {
  RequestParser parser(rulesOf(mode));
  std::vector<uint8_t> held;
  std::ostringstream out;
  size_t from = 0;
  for (size_t part = 0; part <= cuts.size(); part++) {
    const size_t to = part < cuts.size() ? cuts[part] : stream.size();
    held.insert(held.end(), stream.begin() + static_cast<long>(from), stream.begin() + static_cast<long>(to));
    from = to;
    for (;;) {
      if (parser.payloadLeft() > 0) {
        const size_t take = std::min<size_t>(held.size(), parser.payloadLeft());
        for (size_t i = 0; i < take; i++) out << static_cast<int>(held[i]) << ',';
        held.erase(held.begin(), held.begin() + static_cast<long>(take));
        parser.consumed(take);
        if (parser.payloadLeft() > 0) break;
      }
      const RequestParser::Step step = parser.next(held.data(), held.size(), kSize);
      if (step == RequestParser::Step::NeedMore) break;
      if (step == RequestParser::Step::Ended) {
        out << "ended";
        return out.str();
      }
      const Request& r = parser.request();
      out << '[' << r.command << ' ' << r.flags << ' ' << r.cookie << ' ' << r.offset << ' ' << r.length << " -> "
          << parser.verdict().error << ' ' << parser.verdict().payload << ']';
      held.erase(held.begin(), held.begin() + static_cast<long>(parser.headerSize()));
    }
  }
  out << "left " << held.size() << " payload " << parser.payloadLeft();
  return out.str();
}

}  // namespace

TEST("a header is decoded field by field") {
  for (Mode mode : kModes) {
    const uint64_t length = mode == Mode::Extended ? 0x123456789abcull : 0x89abcdefull;
    const auto bytes = encode(mode, kTrim, 0x1234, 0x0102030405060708ull, 0x1112131415161718ull, length);
    const Request decoded = decodeRequest(bytes.data(), mode);
    CHECK(requestMagicMatches(bytes.data(), mode));
    CHECK_EQUAL(decoded.command, kTrim);
    CHECK_EQUAL(decoded.flags, 0x1234);
    CHECK_EQUAL(decoded.cookie, 0x0102030405060708ull);
    CHECK_EQUAL(decoded.offset, 0x1112131415161718ull);
    CHECK_EQUAL(decoded.length, length);
  }
}

TEST("good requests are accepted") {
  for (Mode mode : kModes) {
    const uint16_t payload = mode == Mode::Extended ? kFlagPayloadLength : 0;
    CHECK_EQUAL(errorOf(mode, request(kRead, 0, kSize)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kRead, kSize - 1, 1, kFlagFua)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kWrite, 0, kSize, static_cast<uint16_t>(kFlagFua | payload))), kOk);
    CHECK_EQUAL(errorOf(mode, request(kFlush, 0, 0, kFlagFua)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kTrim, 512, 512, kFlagFua)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kCache, 0, kSize)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kWriteZeroes, 0, kSize, kFlagFua | kFlagNoHole | kFlagFastZero)), kOk);
    CHECK_EQUAL(errorOf(mode, request(kBlockStatus, 0, 1, kFlagRequestOne)), kOk);
  }
  CHECK_EQUAL(errorOf(Mode::Structured, request(kRead, 0, 1, kFlagDontFragment)), kOk);
}

TEST("each rule of the specification refuses with its error") {
  for (Mode mode : kModes) {
    const uint16_t payload = mode == Mode::Extended ? kFlagPayloadLength : 0;
    CHECK_EQUAL(errorOf(mode, request(8, 0, 1)), kEinval);       // unknown commands
    CHECK_EQUAL(errorOf(mode, request(0xffff, 0, 1)), kEinval);
    for (uint16_t command : {kRead, kWrite, kTrim, kCache, kWriteZeroes, kBlockStatus}) {
      const uint16_t flags = command == kWrite ? payload : 0;
      const bool filling = command == kWrite || command == kWriteZeroes;
      const uint32_t outside = filling ? kEnospc : kEinval;
      CHECK_EQUAL(errorOf(mode, request(command, 0, 0, flags)), kEinval);
      CHECK_EQUAL(errorOf(mode, request(command, 0, kSize + 1, flags)), outside);
      CHECK_EQUAL(errorOf(mode, request(command, kSize, 1, flags)), outside);
      CHECK_EQUAL(errorOf(mode, request(command, ~uint64_t{0}, 2, flags)), outside);  // their sum wraps around
      CHECK_EQUAL(errorOf(mode, request(command, 0, 1, static_cast<uint16_t>(flags | 0x40))), kEinval);
    }
    CHECK_EQUAL(errorOf(mode, request(kFlush, 1, 0)), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kFlush, 0, 1)), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kRead, 0, 1, kFlagNoHole)), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kTrim, 0, 1, kFlagNoHole)), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kCache, 0, 1, kFlagDontFragment)), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kWrite, 0, 1, static_cast<uint16_t>(payload | kFlagRequestOne))), kEinval);
    CHECK_EQUAL(errorOf(mode, request(kWrite, 0, 1, payload), true), kEperm);
    CHECK_EQUAL(errorOf(mode, request(kTrim, 0, 1), true), kEperm);
    CHECK_EQUAL(errorOf(mode, request(kWriteZeroes, 0, 1), true), kEperm);
    CHECK_EQUAL(errorOf(mode, request(kRead, 0, 1), true), kOk);
    CHECK_EQUAL(errorOf(mode, request(kFlush, 0, 0), true), kOk);
    SessionRules without = rulesOf(mode);
    without.contexts = false;
    CHECK_EQUAL(validateRequest(request(kBlockStatus, 0, 1), without, kSize).error, kEinval);
  }
  CHECK_EQUAL(errorOf(Mode::Simple, request(kRead, 0, 1, kFlagDontFragment)), kEinval);
  CHECK_EQUAL(errorOf(Mode::Extended, request(kWrite, 0, 1)), kEinval);  // a write without a payload
  CHECK_EQUAL(errorOf(Mode::Extended, request(kRead, 0, 1, kFlagPayloadLength)), kEinval);
  CHECK_EQUAL(errorOf(Mode::Structured, request(kWrite, 0, 1, kFlagPayloadLength)), kEinval);
}

TEST("sizes above the payload limit") {
  const uint64_t large = uint64_t{1} << 40;
  for (Mode mode : kModes) {
    const SessionRules rules = rulesOf(mode);
    const uint16_t payload = mode == Mode::Extended ? kFlagPayloadLength : 0;
    const uint32_t readError = mode == Mode::Simple ? kEinval : kEoverflow;
    CHECK_EQUAL(validateRequest(request(kRead, 0, kPayloadMax), rules, large).error, kOk);
    CHECK_EQUAL(validateRequest(request(kRead, 0, kPayloadMax + 1), rules, large).error, readError);
    CHECK_EQUAL(validateRequest(request(kTrim, 0, uint64_t{4} << 30), rules, large).error, kOk);
    CHECK(!validateRequest(request(kWrite, 0, kPayloadMax, payload), rules, large).fatal);
    const Verdict above = validateRequest(request(kWrite, 0, kPayloadMax + 1, payload), rules, large);
    CHECK_EQUAL(above.fatal, mode == Mode::Extended);
    if (!above.fatal) {
      CHECK_EQUAL(above.error, kEinval);
      CHECK_EQUAL(above.payload, kPayloadMax + 1);
    }
    CHECK(validateRequest(request(kWrite, 0, uint64_t{0xffffffff}, payload), rules, large).fatal);
  }
}

TEST("a refused write still has its payload consumed") {
  SessionRules rules = rulesOf(Mode::Simple);
  rules.readOnly = true;
  const Verdict verdict = validateRequest(request(kWrite, 0, 4096), rules, kSize);
  CHECK_EQUAL(verdict.error, kEperm);
  CHECK_EQUAL(verdict.payload, 4096u);
  const Verdict unknown =
      validateRequest(request(99, 0, 77, kFlagPayloadLength), rulesOf(Mode::Extended), kSize);
  CHECK_EQUAL(unknown.error, kEinval);
  CHECK_EQUAL(unknown.payload, 77u);
}

TEST("the context filter of a block status") {
  const uint32_t contexts[] = {7, 9};
  uint8_t payload[8 + 3 * 4];
  put64(payload, 4096);
  put32(payload + 8, 9);
  put32(payload + 12, 7);
  uint64_t length = 0, mask = 0;
  CHECK(decodeStatusPayload(payload, 16, contexts, 2, &length, &mask));
  CHECK_EQUAL(length, 4096u);
  CHECK_EQUAL(mask, 3u);
  CHECK(decodeStatusPayload(payload, 12, contexts, 2, &length, &mask));
  CHECK_EQUAL(mask, 2u);
  put32(payload + 12, 9);
  CHECK(!decodeStatusPayload(payload, 16, contexts, 2, &length, &mask));  // twice
  put32(payload + 12, 8);
  CHECK(!decodeStatusPayload(payload, 16, contexts, 2, &length, &mask));  // unknown
  CHECK(!decodeStatusPayload(payload, 8, contexts, 2, &length, &mask));   // none
  CHECK(!decodeStatusPayload(payload, 13, contexts, 2, &length, &mask));  // a part of one
  const SessionRules rules = rulesOf(Mode::Extended);
  CHECK_EQUAL(validateRequest(request(kBlockStatus, 0, 16, kFlagPayloadLength), rules, kSize).error, kOk);
  for (uint64_t wrong : {0, 8, 11, 13, 20}) {
    CHECK_EQUAL(validateRequest(request(kBlockStatus, 0, wrong, kFlagPayloadLength), rules, kSize).error, kEinval);
  }
}

TEST("garbage ends the stream from its fourth byte on, and for good") {
  for (Mode mode : kModes) {
    RequestParser parser(rulesOf(mode));
    const uint8_t garbage[] = {'G', 'E', 'T', ' ', '/'};
    CHECK(parser.next(garbage, 3, kSize) == RequestParser::Step::NeedMore);
    CHECK(parser.next(garbage, 4, kSize) == RequestParser::Step::Ended);
    const auto good = encode(mode, kRead, 0, 1, 0, 1);
    CHECK(parser.next(good.data(), good.size(), kSize) == RequestParser::Step::Ended);
  }
  RequestParser parser(rulesOf(Mode::Simple));
  const auto other = encode(Mode::Extended, kRead, 0, 1, 0, 1);
  CHECK(parser.next(other.data(), other.size(), kSize) == RequestParser::Step::Ended);
}

TEST("the same requests wherever the stream is cut") {
  for (Mode mode : kModes) {
    const uint16_t payloadFlag = mode == Mode::Extended ? kFlagPayloadLength : 0;
    std::vector<uint8_t> stream;
    auto add = [&](uint16_t command, uint16_t flags, uint64_t length, size_t payload) {
      const auto header = encode(mode, command, flags, stream.size(), 512, length);
      stream.insert(stream.end(), header.begin(), header.end());
      for (size_t i = 0; i < payload; i++) stream.push_back(static_cast<uint8_t>(i * 7));
    };
    add(kRead, 0, 4096, 0);
    add(kWrite, payloadFlag, 5, 5);
    add(kWrite, static_cast<uint16_t>(payloadFlag | kFlagNoHole), 3, 3);  // refused, and yet consumed
    add(kWrite, payloadFlag, 0, 0);                                       // complete at once
    add(kFlush, 0, 0, 0);
    if (mode == Mode::Extended) add(kBlockStatus, kFlagPayloadLength, 12, 12);
    add(kTrim, 0, 1, 0);
    stream.push_back(0x25);
    const std::string expected = parseAll(mode, stream, {});
    for (size_t cut = 0; cut <= stream.size(); cut++) CHECK_EQUAL(parseAll(mode, stream, {cut}), expected);
    test::Random random(test::seed);
    for (int round = 0; round < 200; round++) {
      std::vector<size_t> cuts;
      for (int i = 0; i < 8; i++) cuts.push_back(random.below(stream.size() + 1));
      std::sort(cuts.begin(), cuts.end());
      CHECK_EQUAL(parseAll(mode, stream, cuts), expected);
    }
  }
}
