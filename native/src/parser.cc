#include "parser.h"

#include "assert.h"

namespace nbd {

Request decodeRequest(const uint8_t* at, Mode mode) {
  Request request;
  request.flags = load16(at + 4);
  request.command = load16(at + 6);
  request.cookie = load64(at + 8);
  request.offset = load64(at + 16);
  request.length = mode == Mode::Extended ? load64(at + 24) : load32(at + 24);
  return request;
}

bool requestMagicMatches(const uint8_t* at, Mode mode) {
  return load32(at) == (mode == Mode::Extended ? kExtendedRequestMagic : kRequestMagic);
}

namespace {

/// Flags a command documents, beside FUA which the server must take with every command.
uint16_t allowedFlags(uint16_t command, Mode mode) {
  switch (command) {
    case kRead:
      return mode == Mode::Simple ? kFlagFua : kFlagFua | kFlagDontFragment;
    case kWrite:
      return mode == Mode::Extended ? kFlagFua | kFlagPayloadLength : kFlagFua;
    case kWriteZeroes:
      return kFlagFua | kFlagNoHole | kFlagFastZero;
    case kBlockStatus:
      return mode == Mode::Extended ? kFlagFua | kFlagRequestOne | kFlagPayloadLength : kFlagFua | kFlagRequestOne;
    default:
      return kFlagFua;
  }
}

uint32_t checkRequest(const Request& request, const SessionRules& rules, uint64_t exportSize) {
  if (request.command > kBlockStatus) return kEinval;
  if ((request.flags & ~allowedFlags(request.command, rules.mode)) != 0) return kEinval;
  const bool payloadFlag = (request.flags & kFlagPayloadLength) != 0;

  // An extended write always says that it has a payload; without the flag there is none to write.
  if (request.command == kWrite && rules.mode == Mode::Extended && !payloadFlag) return kEinval;

  if (request.command == kFlush) {
    return request.offset == 0 && request.length == 0 ? kOk : kEinval;  // both "MUST be set to all-zero"
  }
  const bool changes =
      request.command == kWrite || request.command == kTrim || request.command == kWriteZeroes;
  if (changes && rules.readOnly) return kEperm;

  if (request.command == kBlockStatus) {
    if (!rules.contexts) return kEinval;
    if (payloadFlag) {
      // The range is in the payload and is checked with it.
      const bool shaped = request.length >= 8 + 4 && (request.length - 8) % 4 == 0 &&
                          (request.length - 8) / 4 <= rules.contextCount;
      return shaped && request.offset <= exportSize ? kOk : kEinval;
    }
  }
  // "SHOULD NOT request a length of 0; the behavior of a server is unspecified": no silent success.
  if (request.length == 0) return kEinval;
  if (request.offset > exportSize || request.length > exportSize - request.offset) {
    return request.command == kWrite || request.command == kWriteZeroes ? kEnospc : kEinval;
  }
  if (request.command == kRead && request.length > rules.payloadMax) {
    return rules.mode == Mode::Simple ? kEinval : kEoverflow;
  }
  if (request.command == kWrite && request.length > rules.payloadMax) return kEinval;
  return kOk;
}

}  // namespace

Verdict validateRequest(const Request& request, const SessionRules& rules, uint64_t exportSize) {
  Verdict verdict;
  const bool hasPayload = rules.mode == Mode::Extended ? (request.flags & kFlagPayloadLength) != 0
                                                       : request.command == kWrite;
  if (hasPayload) {
    verdict.payload = request.length;
    // Extended: "a server SHOULD initiate hard disconnect". Compact headers know no such rule: there a payload somewhat
    // above the limit is swallowed and answered, and only a flood ends the connection.
    const uint64_t swallowed = rules.mode == Mode::Extended ? rules.payloadMax : uint64_t{2} * rules.payloadMax;
    if (request.length > swallowed) verdict.fatal = true;
  }
  if (request.command == kDisconnect) return verdict;
  verdict.error = checkRequest(request, rules, exportSize);
  return verdict;
}

bool decodeStatusPayload(const uint8_t* at, uint64_t length, const uint32_t* contexts, uint32_t contextCount,
                         uint64_t* effectLength, uint64_t* mask) {
  if (length < 8 + 4 || (length - 8) % 4 != 0) return false;
  *effectLength = load64(at);
  *mask = 0;
  for (uint64_t position = 8; position < length; position += 4) {
    const uint32_t id = load32(at + position);
    uint32_t index = 0;
    while (index < contextCount && contexts[index] != id) index++;
    if (index == contextCount) return false;
    const uint64_t bit = uint64_t{1} << index;
    if ((*mask & bit) != 0) return false;
    *mask |= bit;
  }
  return true;
}

RequestParser::Step RequestParser::next(const uint8_t* at, size_t available, uint64_t exportSize) {
  NBD_ASSERT(payloadLeft_ == 0);
  if (ended_) return Step::Ended;
  // A wrong magic number is told from the first four bytes: garbage that is shorter than a header must not wait.
  if (available >= 4 && !requestMagicMatches(at, rules_.mode)) {
    ended_ = true;
    return Step::Ended;
  }
  if (available < headerSize()) return Step::NeedMore;
  request_ = decodeRequest(at, rules_.mode);
  verdict_ = validateRequest(request_, rules_, exportSize);
  if (verdict_.fatal) {
    ended_ = true;
    return Step::Ended;
  }
  payloadLeft_ = verdict_.payload;
  return Step::Request;
}

void RequestParser::consumed(uint64_t bytes) {
  NBD_ASSERT(bytes <= payloadLeft_);
  payloadLeft_ -= bytes;
}

}  // namespace nbd
