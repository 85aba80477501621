// Stands for epserve-coordinator or epserve-worker, by the name it is called by, in tests of
// `epserve up`. As the coordinator it binds --listen, writes --port-file and says that it is ready;
// as a worker it waits. Both end with code 0 on SIGTERM. Files in --checkpoint change what they do:
//   refuse-<name>   say so and exit with code 3, at once
//   started-<name>  receives a line at each start: the process id and the arguments
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include "epserve/v1/admin.grpc.pb.h"
#include "inference/grpc_service.grpc.pb.h"

namespace {

class Ready : public inference::GRPCInferenceService::Service {
  grpc::Status ServerReady(grpc::ServerContext*, const inference::ServerReadyRequest*,
                           inference::ServerReadyResponse* response) override {
    response->set_ready(true);
    return grpc::Status::OK;
  }
};

class Status : public epserve::v1::Admin::Service {
  grpc::Status GetClusterStatus(grpc::ServerContext*, const epserve::v1::GetClusterStatusRequest*,
                                epserve::v1::ClusterStatus* response) override {
    response->set_model("stand-in");
    response->set_state("serving");
    return grpc::Status::OK;
  }
};

std::map<std::string, std::string> ParseFlags(int argc, char** argv) {
  std::map<std::string, std::string> flags;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const std::size_t equals = word.find('=');
    flags[word.substr(0, equals)] = equals == std::string::npos ? "" : word.substr(equals + 1);
  }
  return flags;
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream(path + ".partial") << text << "\n";
  std::filesystem::rename(path + ".partial", path);
}

}  // namespace

int main(int argc, char** argv) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigprocmask(SIG_BLOCK, &set, nullptr);
  auto flags = ParseFlags(argc, argv);
  const bool coordinator = std::filesystem::path(argv[0]).filename() == "epserve-coordinator";
  const std::string name = coordinator ? "coordinator" : flags["--worker-id"];
  const std::string directory = flags["--checkpoint"];
  std::string line = std::to_string(getpid());
  for (int i = 1; i < argc; ++i) line += std::string(" ") + argv[i];
  std::ofstream(directory + "/started-" + name, std::ios::app) << line << "\n";
  std::fprintf(stderr, "%s has started\n", name.c_str());
  if (std::filesystem::exists(directory + "/refuse-" + name)) {
    std::fprintf(stderr, "%s refuses: the checkpoint is damaged\n", name.c_str());
    return 3;
  }
  Ready ready;
  Status status;
  std::unique_ptr<grpc::Server> server;
  if (coordinator) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(flags["--listen"], grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&ready);
    builder.RegisterService(&status);
    server = builder.BuildAndStart();
    if (server == nullptr) return 4;
    WriteFile(flags["--metrics-port-file"], "1");
    WriteFile(flags["--port-file"], std::to_string(port));
  }
  int received = 0;
  sigwait(&set, &received);
  std::ofstream(directory + "/stopped", std::ios::app) << name << "\n";
  if (server != nullptr) server->Shutdown(std::chrono::system_clock::now());
  return 0;
}
