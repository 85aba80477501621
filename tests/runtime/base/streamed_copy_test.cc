#include "runtime/base/streamed_copy.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace epserve::runtime {
namespace {

TEST(CopyBytesTest, EveryLengthIsCopiedExactlyAndNoByteBeyondFromAndToAnyPlace) {
  std::mt19937 random(3);
  for (const CopyKind kind : {CopyKind::kCached, CopyKind::kStreamed}) {
    for (std::size_t bytes = 0; bytes < 300; ++bytes) {
      for (const std::size_t begin : {0, 1, 16, 63}) {
        std::vector<std::byte> src(bytes + 1);  // One on, so that the source is unaligned.
        for (std::byte& byte : src) byte = static_cast<std::byte>(random());
        alignas(64) std::byte dst[400];
        std::memset(dst, 0xa5, sizeof(dst));
        CopyBytes(kind, src.data() + 1, dst + begin, bytes);
        FenceStreamedCopies();
        for (std::size_t i = 0; i < sizeof(dst); ++i) {
          const bool inside = i >= begin && i < begin + bytes;
          ASSERT_EQ(dst[i], inside ? src[i - begin + 1] : std::byte{0xa5}) << bytes << " at " << i;
        }
      }
    }
  }
}

}  // namespace
}  // namespace epserve::runtime
