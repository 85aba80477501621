// A tensor by value: its type, shape and bytes. Not synchronised: like any struct.
#ifndef EPSERVE_CLIENT_CPP_TENSOR_H_
#define EPSERVE_CLIENT_CPP_TENSOR_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "client/cpp/element_type.h"
#include "client/cpp/tensor_bytes.h"

namespace epserve::client {

// A place in a region of shared memory that is registered with the service.
struct RegionPlace {
  std::string region;  // its name
  std::uint64_t offset_bytes = 0;
};

struct Tensor {
  ElementType type = ElementType::kF32;
  std::vector<std::int64_t> shape;
  TensorBytes bytes;  // row-major, unpadded, little-endian; empty where `place` is set
  std::optional<RegionPlace> place;  // where the bytes stand, if not here; see shared_region.h
};

// Product of the sizes; nullopt if one is negative or the product does not fit in 63 bits. A
// scalar (empty shape) has one element.
std::optional<std::int64_t> ElementCount(const std::vector<std::int64_t>& shape);

// "[4, 512]".
std::string ShapeString(const std::vector<std::int64_t>& shape);

// Rounds `values` to `type`. REQUIRES: IsConvertible(type), values.size() == ElementCount(shape).
Tensor MakeTensor(ElementType type, std::vector<std::int64_t> shape,
                  const std::vector<double>& values);

// Every element as a double, exactly. REQUIRES: IsConvertible(tensor.type).
std::vector<double> ToDoubles(const Tensor& tensor);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_TENSOR_H_
