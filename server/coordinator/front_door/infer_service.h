// inference.GRPCInferenceService: the whole front door, over RpcServer. Bytes that are no message
// get an error that says so, and no error has an empty message, which clients of this protocol take
// for success.
//
// CudaSharedMemoryStatus and CudaSharedMemoryRegister answer UNIMPLEMENTED. So does
// CudaSharedMemoryUnregister of a name, while of "" (every region) it is OK: there are none, and
// perf_analyzer clears both kinds of shared memory before it uses either.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_

#include <memory>

#include "server/coordinator/front_door/infer_call.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

class InferService {
 public:
  // `regions` and `sink` outlive the service, and it outlives the Stop() of the server that it is
  // added to; see also server_limits.h.
  InferService(FrontDoorOptions options, ShmRegistry* regions, RequestSink* sink);
  ~InferService();

  void AddTo(server::RpcServer* server);

 private:
  struct Parts;
  const std::unique_ptr<Parts> parts_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
