// FNV-1a, 64 bit, over numbers and texts: a digest that two processes compare to see whether they
// are set up alike. The same across builds and machines. Not for secrets.
#ifndef EPSERVE_RUNTIME_BASE_DIGEST_H_
#define EPSERVE_RUNTIME_BASE_DIGEST_H_

#include <cstdint>
#include <string_view>

namespace epserve::runtime {

class Digest {
 public:
  Digest& Add(std::int64_t value) {
    for (int i = 0; i < 8; ++i) AddByte((static_cast<std::uint64_t>(value) >> (8 * i)) & 0xffu);
    return *this;
  }
  Digest& AddText(std::string_view text) {
    for (const char c : text) AddByte(static_cast<unsigned char>(c));
    AddByte(0xffu);  // Ends it: no UTF-8 text holds this byte.
    return *this;
  }
  std::uint64_t value() const { return hash_; }

 private:
  void AddByte(std::uint64_t byte) { hash_ = (hash_ ^ byte) * 0x100000001b3u; }

  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_DIGEST_H_
