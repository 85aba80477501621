// Requests as clients write them, read without the protocol library.
//
// The library makes an object of every tensor, parameter and string, forty allocations for a
// request of one token, which were a sixth of the coordinator's time. Clients write few of the
// forms that a message may have, and those are read here into views of the bytes themselves.
// Whatever is in another form is left to the library, to read or to refuse: so what is read here is
// exactly what it would have read.
//
// Pure function, safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_PLAIN_REQUEST_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_PLAIN_REQUEST_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "server/coordinator/front_door/request_view.h"

namespace epserve::coordinator {

// Where the shapes of a plain request's inputs are, one after another; its views point here.
struct PlainShapes {
  std::array<std::int64_t, 16> dims{};
  std::size_t num_dims = 0;
};

// The bytes of a ModelInferRequest, read into `view` and `id`, which point into `bytes` and
// `shapes`. False, and those three anything, where the message is not plain: fields that are given
// twice or are not known, typed contents, strings beyond ASCII, more than `limits` allow, more
// dimensions than `shapes` takes, and bytes that are no message.
bool ReadPlainRequest(std::string_view bytes, const RequestLimits& limits, PlainShapes& shapes,
                      RequestView& view, std::string_view& id);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_PLAIN_REQUEST_H_
