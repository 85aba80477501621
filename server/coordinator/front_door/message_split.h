// A request's message, with the bytes of its large tensors left where gRPC put them.
//
// A prefill batch is 59 MB in a thousand pieces. The parser would copy them into one string, or one
// array, which grows as it goes, and the rows would be copied out of that again. So large raw
// entries and large packed fp32_contents, which are a tensor's bytes as they stand, are cut out
// before the parser sees the message, which gets an empty field in the place of each.
//
// Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_

#include <grpcpp/support/slice.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "server/coordinator/front_door/request_view.h"

namespace epserve::coordinator {

// The number of bytes of a field, as it stands on the wire.
struct FieldLength {
  std::size_t at = 0;         // in the message
  std::size_t num_bytes = 0;  // that it takes there
  std::size_t value = 0;
};

// Bytes of a message that are to be cut out of it.
struct LargeField {
  enum class Kind { kRawContents, kFp32Contents };

  Kind kind = Kind::kRawContents;
  std::size_t index = 0;  // which of raw_input_contents, or which of the inputs
  std::size_t begin = 0;  // in the message
  // Its own comes last, behind those of the fields that it lies in. No other large field has any of
  // them.
  absl::InlinedVector<FieldLength, 3> lengths;

  std::size_t size() const { return lengths.back().value; }
};

struct SplitMessage {
  // The message without the bytes of its large fields. It is one exactly where the whole was.
  std::string rest;
  // Those fields' bytes, in the slices' memory, in the order of the fields.
  std::vector<RawView> large;
};

// REQUIRES: `large` is what CheckRequestBounds has found in the bytes of `slices`.
SplitMessage SplitLargeFields(std::span<const grpc::Slice> slices,
                              std::span<const LargeField> large);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_
