// inference.GRPCInferenceService: the whole front door. Every method takes the message's bytes and
// parses them itself, because the library answers bytes that it cannot parse with an empty error
// message, which clients of this protocol take for success.
//
// ModelStreamInfer, ModelStatistics, CudaSharedMemoryStatus and CudaSharedMemoryRegister answer
// UNIMPLEMENTED. So does CudaSharedMemoryUnregister of a name, while of "" (every region) it is OK:
// there are none, and perf_analyzer clears both kinds of shared memory before it uses either.
//
// Thread safety: gRPC calls every method from any of its threads; none blocks. `regions` and `sink`
// outlive the service, and the service outlives the server that it is registered with.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_

#include <grpcpp/impl/service_type.h>

#include <memory>

#include "server/coordinator/front_door/infer_call.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/shm_registry.h"

namespace epserve::coordinator {

// To be given to grpc::ServerBuilder::RegisterService; see also server_limits.h.
std::unique_ptr<grpc::Service> MakeInferService(FrontDoorOptions options, ShmRegistry* regions,
                                                RequestSink* sink);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
