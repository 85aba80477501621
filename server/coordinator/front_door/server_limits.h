// What every gRPC server of the front door is built with.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVER_LIMITS_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVER_LIMITS_H_

#include <grpcpp/server_builder.h>

#include <cstdint>

namespace epserve::coordinator {

// Bounds a message's size both ways, and refuses compressed messages (UNIMPLEMENTED): a message's
// size would be known only after it had been unpacked, and tensors hardly compress. Bounds the
// streams of one connection, and the memory of all connections' buffers.
void ApplyServerLimits(int max_message_bytes, grpc::ServerBuilder& builder);

// What gRPC may buffer then, over all connections, before it ends calls of its own choice.
std::int64_t MaxBufferedBytes(int max_message_bytes);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_SERVER_LIMITS_H_
