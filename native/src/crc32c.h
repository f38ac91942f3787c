// CRC-32C (Castagnoli): reflected polynomial 0x82f63b78, initial value and final xor 0xffffffff, the checksum of iSCSI and
// ext4. The link between two daemons guards its frames with it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nbd {

/// The checksum of `length` bytes; `before` is the checksum of what came before them, 0 for nothing.
uint32_t crc32c(uint32_t before, const void* data, size_t length);

/// The same by tables alone, which is what runs where the processor has no instruction for it.
uint32_t crc32cSoftware(uint32_t before, const void* data, size_t length);

/// Whether crc32c() uses the processor's instruction.
bool crc32cInHardware();

}  // namespace nbd
