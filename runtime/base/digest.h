// FNV-1a over numbers: a digest that two processes compare to see whether they are set up alike.
// Not for secrets.
#ifndef EPSERVE_RUNTIME_BASE_DIGEST_H_
#define EPSERVE_RUNTIME_BASE_DIGEST_H_

#include <cstdint>

namespace epserve::runtime {

class Digest {
 public:
  Digest& Add(std::int64_t value) {
    for (int i = 0; i < 8; ++i) {
      hash_ = (hash_ ^ ((static_cast<std::uint64_t>(value) >> (8 * i)) & 0xffu)) * 0x100000001b3u;
    }
    return *this;
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_DIGEST_H_
