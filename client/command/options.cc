#include "client/command/options.h"

#include <CLI/CLI.hpp>
#include <cctype>
#include <memory>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/command/help_text.h"
#include "client/command/pass_through.h"
#include "client/command/shared_flags.h"
#include "client/command/spare_cores.h"
#include "client/cpp/status.h"

namespace epserve::client {

namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 40;

CLI::Range AtLeast(std::int64_t least) { return CLI::Range(least, kMost); }

// What the flags of every subcommand are parsed into before one of them is chosen.
struct Parsed {
  UpOptions up;
  InferOptions infer;
  VerifyOptions verify;
  BenchOptions bench;
  StatusOptions status;
  HealthOptions health;
  DrainOptions drain;
  MakeCheckpointOptions make_checkpoint;

  std::vector<std::string> pass_through = std::vector<std::string>(std::size(kPassThrough));
  std::string log_format = "text";
  bool no_restart = false, allow_client_shm = false, insecure = false, plaintext_metrics = false;
  std::string verify_dtype = "all", verify_layers = "all";
  std::string bench_routing = "given", bench_shared_memory = "none";
  std::string watch;
  bool no_router = false;
  int cores = 1;
};

void AddUp(CLI::App& app, Parsed& parsed) {
  CLI::App* up = app.add_subcommand(
      "up", "Run a coordinator and its workers on this machine until SIGINT or SIGTERM");
  UpOptions& options = parsed.up;
  up->add_option("--checkpoint", options.checkpoint_dir, "Checkpoint directory to serve")
      ->required();
  up->add_option("--workers", options.num_workers, "Workers that the experts are spread over")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  up->add_option("--listen", options.listen,
                 "Address to serve gRPC on, HOST:PORT or unix:PATH; port 0: any free port")
      ->capture_default_str();
  up->add_option("--metrics-listen", options.metrics_listen,
                 "Address of the Prometheus endpoint, HOST:PORT; off: none")
      ->capture_default_str();
  up->add_option("--program-dir", options.program_dir,
                 "Directory of epserve-coordinator and epserve-worker (default: this program's)");
  up->add_option("--log-dir", options.log_dir,
                 "Write each child's log to a file in this directory (default: to stderr)");
  up->add_option("--ready-file", options.ready_file,
                 "Write addresses and process ids to this file once ready, as name=value lines");
  up->add_option("--ready-timeout", options.ready_timeout_s,
                 "Give up if not ready within so long, seconds; 0: never")
      ->check(Seconds(0))
      ->capture_default_str();
  up->add_flag("--no-restart", parsed.no_restart, "Do not restart a child that has failed");
  up->add_option("--drain-timeout-ms", options.drain_timeout_ms,
                 "Longest that stopping waits for running requests, milliseconds")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{86'400'000}))
      ->capture_default_str();
  up->add_option("--log-format", parsed.log_format, "Form of the logs: text, json")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  up->add_flag("--allow-client-shm", parsed.allow_client_shm,
               "Let clients pass tensors in system and CUDA shared memory");
  up->add_flag("--insecure", parsed.insecure,
               "Allow listening beyond this machine without TLS and secrets");
  up->add_flag("--plaintext-metrics", parsed.plaintext_metrics,
               "Serve the Prometheus endpoint in plaintext and to everybody, whatever TLS and "
               "secrets are set");
  AddSecurity(up, options.security);
  for (std::size_t i = 0; i < std::size(kPassThrough); ++i) {
    CLI::Option* option =
        up->add_option(kPassThrough[i].name, parsed.pass_through[i], kPassThrough[i].description);
    // The children know each flag's range; that it is a number at all is said before they start.
    if (kPassThrough[i].number) option->type_name("UINT")->check(WholeNumber());
  }
}

void AddInfer(CLI::App& app, Parsed& parsed) {
  CLI::App* infer = app.add_subcommand(
      "infer", "Send one request from a safetensors file, write the answer to another");
  InferOptions& options = parsed.infer;
  infer
      ->add_option(
          "--input", options.input_path,
          "File with hidden_states [T,H] BF16/F16/F32 and, unless the service is to route, "
          "topk_ids [T,K] I32/I64 and topk_weights [T,K] F32")
      ->required();
  infer->add_option("--output", options.output_path, "File to write hidden_states [T,H] to")
      ->required();
  infer
      ->add_option("--layer", options.layer,
                   "The model's layer number (default: its first with experts)")
      ->check(AtLeast(0));
  AddAttempts(infer, options.attempts);
  AddModel(infer, options.model);
  AddServer(infer, options.server, options.timeout_s, options.security);
}

void AddVerify(CLI::App& app, Parsed& parsed) {
  CLI::App* verify = app.add_subcommand(
      "verify", "Hold the running service against an independent fp64 reference");
  VerifyOptions& options = parsed.verify;
  verify->add_option("--checkpoint", options.checkpoint_dir, "The checkpoint that is served")
      ->required();
  verify
      ->add_option("--batches", options.batches,
                   "Random batches for each layer, dtype and way of routing")
      ->check(AtLeast(1))
      ->capture_default_str();
  verify->add_option("--tokens", options.tokens, "Tokens of a random batch")
      ->check(AtLeast(1))
      ->capture_default_str();
  verify->add_option("--dtype", parsed.verify_dtype, "Type of hidden_states: all, fp32, bf16, fp16")
      ->check(CLI::IsMember({"all", "fp32", "bf16", "fp16"}))
      ->capture_default_str();
  verify->add_option("--layers", parsed.verify_layers, "all, or layer numbers with commas between")
      ->capture_default_str();
  verify->add_option("--seed", options.seed, "Seed of the random batches")
      ->check(WholeNumber())
      ->capture_default_str();
  verify
      ->add_option("--max-error", options.max_error,
                   "Largest relative L2 error that is right (default: 1e-5 for fp32, else 1e-2); "
                   "GPUs compute in bf16, so give 1e-2 there, and 6e-2 with fp8 weights or rows")
      ->check(Between(1e-12, 1.0));
  verify->add_flag("--json", options.json, "Print one JSON object instead of a table");
  AddModel(verify, options.model);
  AddServer(verify, options.server, options.timeout_s, options.security);
}

void AddBench(CLI::App& app, Parsed& parsed) {
  CLI::App* bench = app.add_subcommand("bench", "Drive load and measure");
  BenchOptions& options = parsed.bench;
  bench->add_option("--tokens", options.tokens, "Tokens of a request")
      ->check(AtLeast(0))
      ->capture_default_str();
  bench->add_option("--dtype", options.dtype, "Type of hidden_states: fp32, bf16, fp16")
      ->check(CLI::IsMember({"fp32", "bf16", "fp16"}))
      ->capture_default_str();
  bench
      ->add_option("--layer", options.layer,
                   "The model's layer number (default: its first with experts)")
      ->check(AtLeast(0));
  bench
      ->add_option(
          "--routing", parsed.bench_routing,
          "Who decides the experts: given (random ids in the request), server (the router)")
      ->check(CLI::IsMember({"given", "server"}))
      ->capture_default_str();
  bench->add_option("--concurrency", options.concurrency, "Closed loop: requests under way at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  CLI::Option* const streaming = bench->add_flag(
      "--streaming", options.streaming,
      "Closed loop: send the requests over streams, one for each under way, not as calls");
  bench
      ->add_option(
          "--rate", options.rate,
          "Open loop: requests started a second, whatever the service does; 0: closed loop")
      ->excludes(streaming)
      ->check(Between(0.0, 1e6))
      ->capture_default_str();
  AddAttempts(bench, options.attempts)->excludes(streaming);  // A stream's are never retried.
  bench->add_option("--requests", options.requests, "Requests measured, unless --duration is given")
      ->check(AtLeast(1))
      ->capture_default_str();
  bench
      ->add_option("--duration", options.duration_s,
                   "Start requests for so long, seconds; 0: --requests decides. What is under way "
                   "then still ends, at most --timeout later")
      ->check(Seconds(0))
      ->capture_default_str();
  bench->add_option("--warmup", options.warmup, "Requests before the measurement")
      ->check(AtLeast(0))
      ->capture_default_str();
  bench
      ->add_option("--busy-poll-us", options.busy_poll_us,
                   "How long bench looks for the next answer before it sleeps, microseconds; costs "
                   "cores (default: 2000 where those that the service and bench look with leave "
                   "two, else 0)")
      ->check(CLI::Range(0, 1'000'000));
  bench->add_option("--seed", options.seed, "Seed of the random tokens and ids")
      ->check(WholeNumber())
      ->capture_default_str();
  CLI::Option* const shared_memory =
      bench
          ->add_option("--shared-memory", parsed.bench_shared_memory,
                       "Where tensors lie: none (in the messages), system (shared memory of this "
                       "machine, which the service must allow), cuda (memory of a GPU, likewise)")
          ->check(CLI::IsMember({"none", "system", "cuda"}))
          ->capture_default_str();
  bench
      ->add_option("--shm-key-prefix", options.shm_key_prefix,
                   "What the key of that memory begins with, as the service asks for")
      ->capture_default_str();
  bench->add_option("--cuda-device", options.cuda_device, "GPU of --shared-memory=cuda")
      ->check(AtLeast(0))
      ->needs(shared_memory)
      ->capture_default_str();
  bench->add_option("--trace", options.trace_path,
                    "Write a timeline of the requests and of every worker's phases to this file, "
                    "for Perfetto or chrome://tracing (default: none)");
  bench->add_flag("--allow-errors", options.allow_errors, "Exit 0 even if requests failed");
  bench->add_flag("--json", options.json, "Print one JSON object instead of tables");
  AddModel(bench, options.model);
  AddServer(bench, options.server, options.timeout_s, options.security);
}

void AddOperations(CLI::App& app, Parsed& parsed) {
  CLI::App* status = app.add_subcommand("status", "Show workers, epoch, load and queue");
  status
      ->add_option("--watch", parsed.watch,
                   "Show it again and again; --watch=SECONDS sets how often (default: 1)")
      ->expected(0, 1);
  status->add_flag("--json", parsed.status.json, "Print JSON instead of tables, one object a line");
  AddServer(status, parsed.status.server, parsed.status.timeout_s, parsed.status.security);

  CLI::App* health =
      app.add_subcommand("health", "Exit with 0 if the service is healthy; for probes");
  health
      ->add_option("--service", parsed.health.service,
                   "liveness: the coordinator runs; readiness: requests are served")
      ->check(CLI::IsMember({"liveness", "readiness"}))
      ->capture_default_str();
  AddServer(health, parsed.health.server, parsed.health.timeout_s, parsed.health.security);

  CLI::App* drain = app.add_subcommand(
      "drain", "Let a worker finish its batches and leave; its experts then have no worker");
  drain->add_option("WORKER_ID", parsed.drain.worker_id, "As `epserve status` shows it")
      ->required();
  AddServer(drain, parsed.drain.server, parsed.drain.timeout_s, parsed.drain.security);
}

void AddMakeCheckpoint(CLI::App& app, Parsed& parsed) {
  CLI::App* make = app.add_subcommand(
      "make-checkpoint",
      "Write a checkpoint of random experts and routers, for tests and measurements");
  MakeCheckpointOptions& options = parsed.make_checkpoint;
  make->add_option("--output", options.output_dir, "Directory to write, created where missing")
      ->required();
  make->add_option("--architecture", options.architecture, "mixtral, qwen3_moe, deepseek_v3")
      ->check(CLI::IsMember({"mixtral", "qwen3_moe", "deepseek_v3"}))
      ->capture_default_str();
  make->add_option("--layers", options.num_layers,
                   "Layers with experts; deepseek_v3 has one dense layer before them")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  const auto add = [&](const char* flag, std::int64_t& value, std::int64_t most, const char* text) {
    make->add_option(flag, value, text)
        ->check(CLI::Range(std::int64_t{1}, most))
        ->capture_default_str();
  };
  // What the service takes.
  add("--hidden", options.hidden, 1 << 17, "Hidden size H");
  add("--intermediate", options.intermediate, 1 << 18, "Intermediate size I of an expert");
  add("--experts", options.num_experts, 1 << 12, "Experts E of a layer");
  add("--topk", options.topk, 16, "Experts K of a token");
  make->add_option("--dtype", options.dtype,
                   "Type of the weights: bf16, fp16, fp32, fp8 (deepseek_v3 only)")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32", "fp8"}))
      ->capture_default_str();
  add("--shards", options.num_shards, 900, "Files to spread the tensors over");
  make->add_option("--seed", options.seed, "Seed of the random weights")
      ->check(WholeNumber())
      ->capture_default_str();
  make->add_flag("--no-router", parsed.no_router, "Leave the routers out");
  make->add_flag("--force", options.force, "Write into a directory that is not empty");
}

// "--max-batch-tokens" is EPSERVE_MAX_BATCH_TOKENS. Only the chosen subcommand's flags: CLI11 reads
// the environment of every subcommand, and a variable meant for one must not trip another.
void NameEnvironment(CLI::App* command) {
  for (CLI::Option* option : command->get_options()) {
    const std::string name = option->get_name(false, true);
    if (name.rfind("--", 0) != 0 || name.find(',') != std::string::npos) continue;
    std::string variable = "EPSERVE_";
    for (const char c : name.substr(2)) {
      variable += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    }
    option->envname(variable);
  }
}

std::string& PassedThrough(Parsed& parsed, std::string_view name) {
  std::size_t i = 0;
  while (kPassThrough[i].name != name) ++i;
  return parsed.pass_through[i];
}

// A batch on GPUs is short beside the wake-ups on its way, and leaves the cores to who looks; the
// host backend computes with them.
void ChooseBusyPoll(Parsed& parsed) {
  std::string& busy_poll = PassedThrough(parsed, "--busy-poll-us");
  const std::string& backend = PassedThrough(parsed, "--backend");
  if (!busy_poll.empty() || backend.empty() || backend == "host") return;
  int num_slots = 2;
  // The children refuse what is no number of slots.
  if (!absl::SimpleAtoi(PassedThrough(parsed, "--slots"), &num_slots)) num_slots = 2;
  const int num_threads = LookingThreads(parsed.up.num_workers, num_slots) + 1;  // and a client's
  if (const auto look_us = DefaultBusyPollUs(parsed.cores, num_threads); look_us > 0) {
    busy_poll = absl::StrCat(look_us);
  }
}

absl::Status FinishUp(Parsed& parsed) {
  UpOptions& up = parsed.up;
  ChooseBusyPoll(parsed);
  up.restart = !parsed.no_restart;
  up.json_logs = parsed.log_format == "json";
  for (std::size_t i = 0; i < std::size(kPassThrough); ++i) {
    if (parsed.pass_through[i].empty()) continue;
    const std::string argument = absl::StrCat(kPassThrough[i].name, "=", parsed.pass_through[i]);
    if (kPassThrough[i].coordinator) up.coordinator_args.push_back(argument);
    if (kPassThrough[i].worker) up.worker_args.push_back(argument);
  }
  if (parsed.allow_client_shm) up.coordinator_args.push_back("--allow-client-shm");
  if (parsed.insecure) up.coordinator_args.push_back("--insecure");
  if (parsed.plaintext_metrics) up.coordinator_args.push_back("--plaintext-metrics");
  const auto pass = [](const char* flag, const std::string& value, std::vector<std::string>& args) {
    if (!value.empty()) args.push_back(absl::StrCat(flag, "=", value));
  };
  const ChannelSecurity& security = up.security;
  up.metrics_tls = !security.tls_cert.empty() && !parsed.plaintext_metrics;
  for (std::vector<std::string>* args : {&up.coordinator_args, &up.worker_args}) {
    pass("--tls-cert", security.tls_cert, *args);
    pass("--tls-key", security.tls_key, *args);
    pass("--tls-ca", security.tls_ca, *args);
  }
  pass("--tls-server-name", security.tls_server_name, up.worker_args);
  pass("--secret-file", security.secret_file, up.worker_args);
  up.coordinator_args.push_back(absl::StrCat("--drain-timeout-ms=", up.drain_timeout_ms));
  up.coordinator_args.push_back("--log-format=" + parsed.log_format);
  up.worker_args.push_back("--log-format=" + parsed.log_format);
  return absl::OkStatus();
}

absl::Status FinishVerify(Parsed& parsed) {
  VerifyOptions& verify = parsed.verify;
  verify.dtypes = parsed.verify_dtype == "all" ? std::vector<std::string>{"fp32", "bf16", "fp16"}
                                               : std::vector<std::string>{parsed.verify_dtype};
  if (parsed.verify_layers == "all") return absl::OkStatus();
  std::set<std::int64_t> layers;
  for (const auto& part : absl::StrSplit(parsed.verify_layers, ',')) {
    std::int64_t layer = 0;
    if (!absl::SimpleAtoi(part, &layer) || layer < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--layers: '", part,
                       "' is not a layer number; give all, or numbers "
                       "with commas between"));
    }
    layers.insert(layer);
  }
  verify.layers.assign(layers.begin(), layers.end());
  return absl::OkStatus();
}

absl::Status FinishStatus(Parsed& parsed, bool watch) {
  parsed.status.watch = watch;
  if (!watch || parsed.watch.empty()) return absl::OkStatus();
  if (!absl::SimpleAtod(parsed.watch, &parsed.status.watch_interval_s) ||
      !(parsed.status.watch_interval_s >= 0.05 && parsed.status.watch_interval_s <= 1e6)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--watch: '", parsed.watch, "' is not a number of seconds from 0.05"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Command> Choose(const std::string& name, const CLI::App& command, Parsed& parsed) {
  for (const ChannelSecurity* security :
       {&parsed.up.security, &parsed.infer.security, &parsed.verify.security,
        &parsed.bench.security, &parsed.status.security, &parsed.drain.security}) {
    EPC_RETURN_IF_ERROR(CheckSecurity(*security));  // Those of the other commands are empty.
  }
  if (name == "up") {
    EPC_RETURN_IF_ERROR(FinishUp(parsed));
    return Command(parsed.up);
  }
  if (name == "verify") {
    EPC_RETURN_IF_ERROR(FinishVerify(parsed));
    return Command(parsed.verify);
  }
  if (name == "status") {
    EPC_RETURN_IF_ERROR(FinishStatus(parsed, command.get_option("--watch")->count() > 0));
    return Command(parsed.status);
  }
  if (name == "bench") {
    if (parsed.bench.rate > 0 && command.get_option("--concurrency")->count() > 0) {
      return absl::InvalidArgumentError(
          "--concurrency is for the closed loop, and --rate starts requests whatever is under way; "
          "give one of the two");
    }
    parsed.bench.server_routes = parsed.bench_routing == "server";
    if (parsed.bench_shared_memory == "system") parsed.bench.memory = BenchMemory::kSystem;
    if (parsed.bench_shared_memory == "cuda") parsed.bench.memory = BenchMemory::kCuda;
    if (parsed.bench.memory != BenchMemory::kMessages && parsed.bench.tokens == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--shared-memory: ", parsed.bench_shared_memory,
                       " needs tensors with bytes in them; give --tokens of at least 1"));
    }
    return Command(parsed.bench);
  }
  if (name == "infer") return Command(parsed.infer);
  if (name == "health") return Command(parsed.health);
  if (name == "drain") return Command(parsed.drain);
  parsed.make_checkpoint.router = !parsed.no_router;
  return Command(parsed.make_checkpoint);
}

}  // namespace

absl::StatusOr<ParsedCommand> ParseCommand(int argc, const char* const* argv, int cores) {
  const auto parsed = std::make_unique<Parsed>();
  parsed->cores = cores;
  CLI::App app(
      "epserve: the experts of a mixture-of-experts model as a service of their own.\n"
      "Every flag can also be given as the environment variable that its line names.");
  app.set_version_flag("--version", std::string("epserve ") + EPSERVE_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(36);
  AddUp(app, *parsed);
  AddInfer(app, *parsed);
  AddVerify(app, *parsed);
  AddBench(app, *parsed);
  AddOperations(app, *parsed);
  AddMakeCheckpoint(app, *parsed);
  std::string name;
  if (argc > 1) name = argv[1];
  for (CLI::App* command : app.get_subcommands([](CLI::App*) { return true; })) {
    HideRanges(command);
    if (command->get_name() == name) NameEnvironment(command);
  }
  ParsedCommand result;
  // CLI11 reports by exception; they end here.
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    result.text = app.help();
    return result;
  } catch (const CLI::CallForVersion&) {
    result.text = absl::StrCat("epserve ", EPSERVE_VERSION, "\n");
    return result;
  } catch (const CLI::ParseError& error) {
    const bool known = !app.get_subcommands().empty();
    if (!known && !name.empty() && name[0] != '-') {
      return absl::InvalidArgumentError(
          absl::StrCat("'", name, "' is not a subcommand; see epserve --help"));
    }
    // A word that nobody knows may be the very flag that is missing, misspelt: it comes first.
    const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
    const std::string what = unknown.empty()
                                 ? std::string(error.what())
                                 : absl::StrCat("not known: ", absl::StrJoin(unknown, " "));
    return absl::InvalidArgumentError(
        absl::StrCat(what, "; see epserve ", known ? name + " " : std::string(), "--help"));
  }
  result.name = app.get_subcommands().front()->get_name();
  EPC_ASSIGN_OR_RETURN(result.command,
                       Choose(result.name, *app.get_subcommands().front(), *parsed));
  return result;
}

}  // namespace epserve::client
