// CRC-32C: the published check values, and hardware against tables at every length and offset.
#include <cstring>
#include <vector>

#include "crc32c.h"
#include "harness.h"

namespace nbd::test {
namespace {

Register values("crc32c: the published check values", [] {
  // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
  CHECK_EQUAL(crc32c(0, "123456789", 9), 0xe3069283u);
  std::vector<uint8_t> bytes(32, 0);
  CHECK_EQUAL(crc32c(0, bytes.data(), 32), 0x8a9136aau);
  memset(bytes.data(), 0xff, 32);
  CHECK_EQUAL(crc32c(0, bytes.data(), 32), 0x62a8ab43u);
  for (uint8_t i = 0; i < 32; i++) bytes[i] = i;
  CHECK_EQUAL(crc32c(0, bytes.data(), 32), 0x46dd794eu);
  CHECK_EQUAL(crc32c(0x12345678, nullptr, 0), 0x12345678u);
});

Register implementations("crc32c: hardware and tables agree at every length and offset, in any pieces", [] {
  if (!crc32cInHardware()) throw Skip{"this processor has no instruction for it"};
  Random random(7);
  std::vector<uint8_t> bytes(40 * 1024);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
  for (size_t length = 0; length < 900; length++) {
    const size_t offset = random.below(64);
    const uint32_t before = static_cast<uint32_t>(random.next());
    CHECK_EQUAL(crc32c(before, bytes.data() + offset, length), crc32cSoftware(before, bytes.data() + offset, length));
  }
  for (int i = 0; i < 200; i++) {
    const size_t offset = random.below(1024);
    const size_t length = random.below(bytes.size() - offset + 1);
    const size_t cut = random.below(length + 1);
    const uint8_t* p = bytes.data() + offset;
    const uint32_t whole = crc32cSoftware(0, p, length);
    CHECK_EQUAL(crc32c(0, p, length), whole);
    CHECK_EQUAL(crc32c(crc32c(0, p, cut), p + cut, length - cut), whole);
  }
});

}  // namespace
}  // namespace nbd::test
