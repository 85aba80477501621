#include "server/microbench/options.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/alltoallv/exchange.h"
#include "server/common/command_line.h"

namespace epserve::microbench {
namespace {

using runtime::BenchBackend;
using runtime::BenchParams;
using runtime::DataType;
using runtime::FfnBenchParams;
using runtime::FfnKernelChoice;
using runtime::RowDistribution;

constexpr char kDescription[] =
    "Measures what epserve is made of, without the service: one process a rank or peer.";

#ifdef EPSERVE_WITH_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif
#ifdef EPSERVE_WITH_NCCL
constexpr bool kHasNccl = true;
#else
constexpr bool kHasNccl = false;
#endif
constexpr const char* kBuiltBackends = kHasNccl   ? "host, cuda, nccl"
                                       : kHasCuda ? "host, cuda"
                                                  : "host";

std::string CheckBackend(const std::string& backend) {
  if (backend == "host" || (kHasCuda && backend == "cuda") || (kHasNccl && backend == "nccl")) {
    return "";
  }
  return "backend \"" + backend + "\" is not in this build, which has: " + kBuiltBackends;
}

void AddCuda(CLI::App* app, BenchParams* p) {
  app->add_option_function<std::string>(
         "--mode", [p](const std::string& mode) { p->decode = mode == "decode"; },
         "Path of cuda and nccl: prefill, or decode (graph replay)")
      ->envname("EPSERVE_MODE")
      ->check(CLI::IsMember({"prefill", "decode"}))
      ->default_str("prefill");
  app->add_flag("--fp8", p->fp8, "Cast bf16 rows to fp8 on their way to the experts (cuda, nccl)")
      ->envname("EPSERVE_FP8");
  app->add_option("--comm-blocks", p->comm_blocks,
                  "Blocks of dispatch, and half of combine's (cuda, prefill); most that NCCL may "
                  "take (nccl)")
      ->envname("EPSERVE_COMM_BLOCKS")
      ->check(CLI::Range(1, 128))
      ->capture_default_str();
  app->add_option("--push-blocks", p->push_blocks,
                  "Blocks of combine's push role (cuda, prefill); 0: 2 * comm-blocks divided by "
                  "the rows that each role reads")
      ->envname("EPSERVE_PUSH_BLOCKS")
      ->check(CLI::Range(0, 128))
      ->capture_default_str();
  app->add_option("--reduce-blocks", p->reduce_blocks,
                  "Blocks of combine's reduce role (cuda, prefill); 0: likewise")
      ->envname("EPSERVE_REDUCE_BLOCKS")
      ->check(CLI::Range(0, 128))
      ->capture_default_str();
  app->add_option("--line-tokens", p->line_tokens,
                  "Up to so many tokens of a rank travel as lines of 128 bytes (cuda, decode), "
                  "where its GPU reaches the others over NVLink")
      ->envname("EPSERVE_LINE_TOKENS")
      ->check(CLI::Range(0, 512))
      ->capture_default_str();
}

void AddAllToAllV(CLI::App* app, MicrobenchOptions* options) {
  BenchParams& p = options->params;
  app->add_option_function<std::string>(
         "--backend",
         [&p](const std::string& name) {
           p.backend = name == "cuda"   ? BenchBackend::kCuda
                       : name == "nccl" ? BenchBackend::kNccl
                                        : BenchBackend::kHost;
         },
         std::string("What carries the rows; this build has: ") + kBuiltBackends)
      ->envname("EPSERVE_BACKEND")
      ->check(CLI::Validator(CheckBackend, "", "backend"))
      ->default_str("host");
  app->add_option("--ranks", p.num_ranks, "Processes that exchange rows")
      ->envname("EPSERVE_RANKS")
      ->check(CLI::Range(1, runtime::kMaxRanks))
      ->capture_default_str();
  app->add_option("--tokens", p.tokens_per_rank, "Tokens of each rank")
      ->envname("EPSERVE_TOKENS")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--hidden", p.hidden, "Elements of a token's row")
      ->envname("EPSERVE_HIDDEN")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--topk", p.topk, "Experts of each token, all different")
      ->envname("EPSERVE_TOPK")
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  app->add_option("--experts", p.num_experts, "Experts over all ranks")
      ->envname("EPSERVE_EXPERTS")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option_function<std::string>(
         "--dtype",
         [&p](const std::string& name) {
           p.dtype = name == "fp32"   ? DataType::kFp32
                     : name == "fp16" ? DataType::kFp16
                                      : DataType::kBf16;
         },
         "Element type")
      ->envname("EPSERVE_DTYPE")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32"}))
      ->default_str("bf16");
  app->add_option("--iterations", p.iterations, "Measured iterations")
      ->envname("EPSERVE_ITERATIONS")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app->add_option("--warmup", p.warmup, "Iterations before the measured ones")
      ->envname("EPSERVE_WARMUP")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  app->add_option("--seed", p.seed, "Seed of rows and routing")
      ->envname("EPSERVE_SEED")
      ->capture_default_str();
  app->add_option("--peer-timeout-ms", p.peer_timeout_ms, "Longest wait for another rank, in ms")
      ->envname("EPSERVE_PEER_TIMEOUT_MS")
      ->check(CLI::Range(1, 3'600'000))
      ->capture_default_str();
  AddCuda(app, &p);
  app->add_flag("--json", options->json, "Print one JSON object instead of a table")
      ->envname("EPSERVE_JSON");
}

void AddFfnShape(CLI::App* app, FfnBenchParams* p) {
  app->add_option("--rows", p->rows, "Rows of all experts together")
      ->envname("EPSERVE_ROWS")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  app->add_option("--experts", p->experts, "Experts on this GPU")
      ->envname("EPSERVE_EXPERTS")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  app->add_option("--hidden", p->hidden, "Elements of a row, a multiple of 16")
      ->envname("EPSERVE_HIDDEN")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str();
  app->add_option("--intermediate", p->intermediate,
                  "Elements of a row between the products, a multiple of 16")
      ->envname("EPSERVE_INTERMEDIATE")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str();
}

void AddFfn(CLI::App* app, MicrobenchOptions* options) {
  FfnBenchParams* p = &options->ffn;
  AddFfnShape(app, p);
  app->add_option_function<std::string>(
         "--weights",
         [p](const std::string& name) {
           p->weights = name == "fp8" ? DataType::kFp8E4m3 : DataType::kBf16;
         },
         "Type that weights are held in")
      ->envname("EPSERVE_WEIGHTS")
      ->check(CLI::IsMember({"bf16", "fp8"}))
      ->default_str("bf16");
  app->add_option_function<std::string>(
         "--distribution",
         [p](const std::string& name) {
           p->distribution = name == "skewed" ? RowDistribution::kSkewed : RowDistribution::kEven;
         },
         "Rows of each expert: the same, or as 1, 1/2, 1/3 and so on")
      ->envname("EPSERVE_DISTRIBUTION")
      ->check(CLI::IsMember({"even", "skewed"}))
      ->default_str("even");
  app->add_option_function<std::string>(
         "--kernel",
         [p](const std::string& name) {
           p->kernel = name == "hopper"     ? FfnKernelChoice::kHopper
                       : name == "portable" ? FfnKernelChoice::kPortable
                                            : FfnKernelChoice::kAuto;
         },
         "Kernel; auto takes the best that the GPU has")
      ->envname("EPSERVE_KERNEL")
      ->check(CLI::IsMember({"auto", "hopper", "portable"}))
      ->default_str("auto");
  app->add_option("--iterations", p->iterations, "Measured iterations")
      ->envname("EPSERVE_ITERATIONS")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  app->add_option("--warmup", p->warmup, "Iterations before the measured ones")
      ->envname("EPSERVE_WARMUP")
      ->check(CLI::Range(0, 100'000))
      ->capture_default_str();
  app->add_option("--seed", p->seed, "Seed of rows and weights")
      ->envname("EPSERVE_SEED")
      ->capture_default_str();
  app->add_flag("--json", options->json, "Print one JSON object instead of a table")
      ->envname("EPSERVE_JSON");
}

void AddRpcSizes(CLI::App* app, RpcBenchParams* p) {
  app->add_option("--workers", p->num_workers, "Clients that a server has a stream to")
      ->envname("EPSERVE_WORKERS")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app->add_option("--message-bytes", p->message_bytes, "Bytes of a small message, each way")
      ->envname("EPSERVE_MESSAGE_BYTES")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app->add_option("--inline-bytes", p->inline_bytes, "Bytes of a large message, each way")
      ->envname("EPSERVE_INLINE_BYTES")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app->add_option("--request-bytes", p->request_bytes,
                  "Bytes of the requests whose throughput is measured, each way")
      ->envname("EPSERVE_REQUEST_BYTES")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
}

void AddRpc(CLI::App* app, MicrobenchOptions* options) {
  RpcBenchParams* p = &options->rpc;
  AddRpcSizes(app, p);
  app->add_option("--concurrency", p->concurrency, "Such requests under way at once")
      ->envname("EPSERVE_CONCURRENCY")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app->add_option("--requests", p->requests, "Such requests in all")
      ->envname("EPSERVE_REQUESTS")
      ->check(CLI::Range(1, 100'000'000))
      ->capture_default_str();
  app->add_option("--iterations", p->iterations, "Measured round trips of small messages")
      ->envname("EPSERVE_ITERATIONS")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app->add_option("--inline-iterations", p->inline_iterations,
                  "Measured round trips of large messages")
      ->envname("EPSERVE_INLINE_ITERATIONS")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
  app->add_option("--warmup", p->warmup, "Round trips before the measured ones")
      ->envname("EPSERVE_WARMUP")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  app->add_flag("--json", options->json, "Print one JSON object instead of a table")
      ->envname("EPSERVE_JSON");
}

// Started by the program itself only, so they stand in no help.
void AddOwnProcesses(CLI::App* app, MicrobenchOptions* options) {
  CLI::App* rank = app->add_subcommand("alltoallv-rank", "One rank of alltoallv")->group("");
  rank->add_option("--rank", options->rank)->required();
  rank->add_option("--control-fd", options->control_fd)->required();
  CLI::App* echo = app->add_subcommand("rpc-echo", "The echo server of rpc")->group("");
  echo->add_option("--socket", options->socket)->required();
  CLI::App* worker = app->add_subcommand("rpc-worker", "One worker of rpc")->group("");
  worker->add_option("--target", options->target)->required();
}

Command CommandOf(const CLI::App& app) {
  const std::string name = app.get_subcommands().front()->get_name();
  if (name == "ffn") return Command::kFfn;
  if (name == "rpc") return Command::kRpc;
  if (name == "alltoallv-rank") return Command::kRank;
  if (name == "rpc-echo") return Command::kRpcEcho;
  if (name == "rpc-worker") return Command::kRpcWorker;
  return Command::kAllToAllV;
}

}  // namespace

int Print(const std::string& text) {
  return std::fputs(text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0 ? EXIT_SUCCESS
                                                                           : EXIT_FAILURE;
}

std::optional<MicrobenchOptions> ParseMicrobenchOptions(int argc, char** argv, int* exit_code) {
  MicrobenchOptions options;
  CLI::App app(kDescription, "epserve-microbench");
  app.set_version_flag("--version", std::string("epserve-microbench ") + EPSERVE_VERSION);
  app.require_subcommand(1);
  CLI::App* alltoallv = app.add_subcommand(
      "alltoallv",
      "Dispatch and combine under random routing, beside plain copies of the same "
      "bytes. Every flag can also be given as environment variable EPSERVE_<FLAG>");
  AddAllToAllV(alltoallv, &options);
  AddFfn(
      app.add_subcommand(
          "ffn", "The experts' feed-forward on a GPU, beside cuBLAS's products and a plain copy"),
      &options);
  AddRpc(app.add_subcommand("rpc",
                            "Bare gRPC on this machine: round trips, a server and its "
                            "workers, large messages, requests a second"),
         &options);
  AddOwnProcesses(&app, &options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {  // CLI11 reports by exception; they end here.
    *exit_code = Print(app.help());
    return std::nullopt;
  } catch (const CLI::CallForVersion&) {
    *exit_code = Print("epserve-microbench " EPSERVE_VERSION "\n");
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    const auto commands = app.get_subcommands();
    const std::string command = commands.empty() ? "" : commands.front()->get_name() + " ";
    std::fprintf(stderr, "epserve-microbench: options: %s; see epserve-microbench %s--help\n",
                 server::UsageError(app, error).c_str(), command.c_str());
    *exit_code = kUsageExitCode;
    return std::nullopt;
  }
  options.command = CommandOf(app);
  return options;
}

}  // namespace epserve::microbench
