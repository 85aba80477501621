// A request's message, with its large raw entries left where gRPC put them.
//
// A prefill batch is 59 MB in a thousand pieces. The parser would copy them into one string, which
// grows as it goes, and the rows would be copied out of that again. So the large entries are cut
// out before the parser sees the message, which gets an empty entry in the place of each.
//
// Pure functions, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_

#include <grpcpp/support/slice.h>

#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "server/coordinator/front_door/request_view.h"

namespace epserve::coordinator {

struct SplitMessage {
  // The message without the bytes of its large entries. It is one exactly where the whole was.
  std::string rest;
  // Those entries: which of raw_input_contents each is, and its bytes, in the slices' memory.
  std::vector<std::pair<std::size_t, RawView>> large;
};

// `slices` are the bytes of what should be a ModelInferRequest; entries of `large_bytes` and more
// are large. Whatever is not plain (groups, overlong numbers, lengths past the end) is left in
// `rest`, with all that follows it, for the parser to judge.
SplitMessage SplitLargeEntries(std::span<const grpc::Slice> slices, std::size_t large_bytes);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_MESSAGE_SPLIT_H_
