// Two implementations, chosen once: the processor's instruction, and eight tables (slicing by 8).
//
// The instruction takes eight bytes and answers three cycles later, but one can start each cycle. So long inputs are cut
// into three lanes that run side by side. A checksum without its initial value and final xor is linear, so the lanes are
// joined by moving the first over the length of the second, and so on: `state of A followed by B = shift(A, |B|) ^ B`.
// Shifting over a fixed length is a linear map of 32 bits, kept as four tables of 256 words.
#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nbd {

namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;

constexpr std::array<std::array<uint32_t, 256>, 8> makeTables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; byte++) {
    uint32_t state = byte;
    for (int bit = 0; bit < 8; bit++) state = (state & 1) != 0 ? (state >> 1) ^ kPolynomial : state >> 1;
    tables[0][byte] = state;
  }
  for (size_t table = 1; table < 8; table++) {
    for (uint32_t byte = 0; byte < 256; byte++) {
      const uint32_t state = tables[table - 1][byte];
      tables[table][byte] = (state >> 8) ^ tables[0][state & 0xff];
    }
  }
  return tables;
}

constexpr auto kTables = makeTables();

uint32_t softwareState(uint32_t state, const uint8_t* p, size_t length) {
  for (; length >= 8; p += 8, length -= 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    word ^= state;
    state = 0;
    for (size_t i = 0; i < 8; i++) state ^= kTables[7 - i][(word >> (8 * i)) & 0xff];
  }
  for (; length > 0; p++, length--) state = (state >> 8) ^ kTables[0][(state ^ *p) & 0xff];
  return state;
}

#if defined(__x86_64__)
#define NBD_CRC_TARGET __attribute__((target("sse4.2")))
NBD_CRC_TARGET inline uint32_t step8(uint32_t state, const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, 8);
  return static_cast<uint32_t>(_mm_crc32_u64(state, word));
}
NBD_CRC_TARGET inline uint32_t step1(uint32_t state, uint8_t byte) { return _mm_crc32_u8(state, byte); }
bool detect() { return __builtin_cpu_supports("sse4.2") != 0; }
#elif defined(__aarch64__)
#if defined(__clang__)
#define NBD_CRC_TARGET __attribute__((target("crc")))
#else
#define NBD_CRC_TARGET __attribute__((target("+crc")))
#endif
NBD_CRC_TARGET inline uint32_t step8(uint32_t state, const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, 8);
  return __crc32cd(state, word);
}
NBD_CRC_TARGET inline uint32_t step1(uint32_t state, uint8_t byte) { return __crc32cb(state, byte); }
bool detect() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#else
bool detect() { return false; }
#endif

#if defined(NBD_CRC_TARGET)

/// Moves a state over a fixed number of zero bytes.
struct Shift {
  uint32_t tables[4][256];

  explicit Shift(size_t length) {
    // One bit of the state at a time; every other state is a sum of those.
    uint32_t basis[32];
    const std::array<uint8_t, 64> zeros{};
    for (int bit = 0; bit < 32; bit++) {
      uint32_t state = 1u << bit;
      for (size_t left = length; left > 0; left -= zeros.size()) state = softwareState(state, zeros.data(), zeros.size());
      basis[bit] = state;
    }
    for (int table = 0; table < 4; table++) {
      for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t sum = 0;
        for (int bit = 0; bit < 8; bit++) {
          if ((byte >> bit & 1) != 0) sum ^= basis[8 * table + bit];
        }
        tables[table][byte] = sum;
      }
    }
  }

  uint32_t operator()(uint32_t state) const {
    return tables[0][state & 0xff] ^ tables[1][state >> 8 & 0xff] ^ tables[2][state >> 16 & 0xff] ^ tables[3][state >> 24];
  }
};

/// Lanes for long inputs and for what is left of them; both multiples of 64.
constexpr size_t kLongLane = 4096;
constexpr size_t kShortLane = 256;

NBD_CRC_TARGET inline uint32_t threeLanes(uint32_t state, const uint8_t* p, size_t lane, const Shift& shift) {
  uint32_t second = 0;
  uint32_t third = 0;
  for (size_t at = 0; at < lane; at += 8) {
    state = step8(state, p + at);
    second = step8(second, p + lane + at);
    third = step8(third, p + 2 * lane + at);
  }
  return shift(shift(state) ^ second) ^ third;
}

NBD_CRC_TARGET uint32_t hardwareState(uint32_t state, const uint8_t* p, size_t length) {
  static const Shift longShift(kLongLane);
  static const Shift shortShift(kShortLane);
  for (; length >= 3 * kLongLane; p += 3 * kLongLane, length -= 3 * kLongLane) {
    state = threeLanes(state, p, kLongLane, longShift);
  }
  for (; length >= 3 * kShortLane; p += 3 * kShortLane, length -= 3 * kShortLane) {
    state = threeLanes(state, p, kShortLane, shortShift);
  }
  for (; length >= 8; p += 8, length -= 8) state = step8(state, p);
  for (; length > 0; p++, length--) state = step1(state, *p);
  return state;
}

#else
uint32_t hardwareState(uint32_t state, const uint8_t* p, size_t length) { return softwareState(state, p, length); }
#endif

}  // namespace

bool crc32cInHardware() {
  static const bool has = detect();
  return has;
}

uint32_t crc32c(uint32_t before, const void* data, size_t length) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  return ~(crc32cInHardware() ? hardwareState(~before, bytes, length) : softwareState(~before, bytes, length));
}

uint32_t crc32cSoftware(uint32_t before, const void* data, size_t length) {
  return ~softwareState(~before, static_cast<const uint8_t*>(data), length);
}

}  // namespace nbd
