// grpc.health.v1 over RpcServer. Thread-safe; no call blocks.
#ifndef EPSERVE_SERVER_RPC_HEALTH_SERVICE_H_
#define EPSERVE_SERVER_RPC_HEALTH_SERVICE_H_

#include <memory>
#include <string>

#include "server/rpc/rpc_server.h"

namespace epserve::server {

class Health {
 public:
  Health();
  // Check and Watch; the object outlives the server's Stop().
  ~Health();

  void AddTo(RpcServer* server);

  // Names a service, or changes its state; every watcher of it is told.
  void Set(const std::string& service, bool serving);
  // Every service is NOT_SERVING from now on, whatever Set says, and new watchers are told so.
  void ShutDown();

 private:
  class Watch;
  struct State;
  const std::shared_ptr<State> state_;
};

}  // namespace epserve::server

#endif  // EPSERVE_SERVER_RPC_HEALTH_SERVICE_H_
