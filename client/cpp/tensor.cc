#include "client/cpp/tensor.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace epserve::client {

std::optional<std::int64_t> ElementCount(const std::vector<std::int64_t>& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(count, size, &count)) return std::nullopt;
  }
  return count;
}

std::string ShapeString(const std::vector<std::int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

Tensor MakeTensor(ElementType type, std::vector<std::int64_t> shape,
                  const std::vector<double>& values) {
  Tensor tensor;
  tensor.type = type;
  tensor.shape = std::move(shape);
  TensorMemory memory(values.size() * ElementSize(type));
  EncodeFromDouble(type, values.data(), values.size(), memory.data());
  tensor.bytes = std::move(memory);
  return tensor;
}

std::vector<double> ToDoubles(const Tensor& tensor) {
  std::vector<double> values(tensor.bytes.size() / ElementSize(tensor.type));
  DecodeToDouble(tensor.type, tensor.bytes.data(), values.size(), values.data());
  return values;
}

}  // namespace epserve::client
