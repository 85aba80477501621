// inference.GRPCInferenceService: the whole front door, over RpcServer. Bytes that are no message
// get an error that says so, and no error has an empty message, which clients of this protocol take
// for success.
//
// Where client shared memory is switched off, its calls answer UNIMPLEMENTED, but for
// CudaSharedMemoryUnregister of "" (every region), which is OK: there are none.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_

#include <memory>

#include "server/coordinator/front_door/device_region_host.h"
#include "server/coordinator/front_door/infer_call.h"
#include "server/coordinator/front_door/request_sink.h"
#include "server/coordinator/front_door/shm_registry.h"
#include "server/rpc/rpc_server.h"

namespace epserve::coordinator {

class InferService {
 public:
  // `regions`, `sink` and `devices` outlive the service, and it outlives the Stop() of the server
  // that it is added to; see also server_limits.h.
  InferService(FrontDoorOptions options, ShmRegistry* regions, RequestSink* sink,
               DeviceRegionHost* devices);
  ~InferService();

  void AddTo(server::RpcServer* server);

 private:
  struct Parts;
  const std::unique_ptr<Parts> parts_;
};

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_INFER_SERVICE_H_
