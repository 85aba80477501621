// The flags that `epserve up` hands on to the coordinator and the workers.
#ifndef EPSERVE_CLIENT_COMMAND_PASS_THROUGH_H_
#define EPSERVE_CLIENT_COMMAND_PASS_THROUGH_H_

namespace epserve::client {

// A flag that `up` hands on to its children as it is.
struct PassThrough {
  const char* name;
  const char* description;
  bool coordinator;
  bool worker;
  bool number = false;
};

inline constexpr PassThrough kPassThrough[] = {
    {"--model-name", "Name the model is served under (default: the directory's base name)", true,
     false},
    {"--cluster-id", "Name that coordinator and workers share (default: epserve)", true, true},
    {"--max-batch-tokens", "Most tokens of one batch (default: 4096)", true, true, true},
    {"--merge", "When requests of one layer share a batch: never, queued (default: never)", true,
     false},
    {"--batch-window-us",
     "How long a request waits for others to merge with, microseconds (default: 0)", true, false,
     true},
    {"--queue-capacity", "Most requests that wait in the queue (default: 1024)", true, false, true},
    {"--slots", "Batches in flight (default: 2)", true, true, true},
    {"--max-message-bytes",
     "Largest gRPC message taken or sent, bytes (default: the coordinator's own)", true, false,
     true},
    {"--max-held-bytes",
     "Requests, outputs and unread replies of all callers together, bytes (default: the "
     "coordinator's own)",
     true, false, true},
    {"--max-connections",
     "Connections that may have calls under way at once, beside health checks and workers' "
     "streams (default: the "
     "coordinator's own)",
     true, false, true},
    {"--message-timeout-ms",
     "Longest that the message of a call may take to come whole, milliseconds (default: the "
     "coordinator's own)",
     true, false, true},
    {"--stream-idle-timeout-ms",
     "Longest that a caller's stream may bring no message, milliseconds (default: the "
     "coordinator's own)",
     true, false, true},
    {"--reply-timeout-ms",
     "Longest that a caller may take to read a reply, milliseconds (default: the coordinator's "
     "own)",
     true, false, true},
    {"--formation-timeout-ms",
     "Longest that an epoch may take to form, milliseconds (default: the coordinator's own)", true,
     false, true},
    {"--batch-timeout-ms",
     "Longest that a batch may take, milliseconds (default: the coordinator's own)", true, false,
     true},
    {"--trigger", "Dispatch and combine triggered together or separate (default: together)", true,
     false},
    {"--lease-ms", "A worker not heard of for so long is lost, milliseconds (default: 1000)", true,
     false, true},
    {"--shm-key-prefix", "Prefix that a client's shared-memory key must have (default: any)", true,
     false},
    {"--secrets-file",
     "File of lines '<frontend|worker|operator|metrics> <secret>' (default: none)", true, false},
    {"--count-exchange", "How the count matrix is made: coordinator, device, auto (default: auto)",
     true, false},
    {"--row-transport", "How rows reach the workers: shared or messages (default: shared)", true,
     false},
    {"--backend", "What computes and moves rows: host, cuda, nccl, auto (default: host)", false,
     true},
    {"--comm-blocks", "GPU blocks that move rows, per batch (default: the worker's own)", false,
     true, true},
    {"--dispatch-dtype", "Form of rows on their way to the experts (cuda): bf16, fp8", false, true},
    {"--handle-dir", "Directory of the sockets that hand GPU heaps to peers (default: none)", false,
     true},
    {"--handle-type", "How GPU heaps are handed to peers: auto, fd, fabric (default: auto)", false,
     true},
    {"--compute-threads", "Threads per slot of each worker (default: the worker's own)", false,
     true, true},
    {"--busy-poll-us",
     "How long each process looks before it sleeps, microseconds; costs cores (default: 2000 with "
     "--backend=cuda, nccl or auto where looking leaves two cores, else 0)",
     true, true, true},
    {"--peer-timeout-ms", "Longest wait for a peer, milliseconds (default: the worker's own)",
     false, true, true},
    {"--leave-timeout-ms",
     "Longest that a worker which is told to go waits for the coordinator, and then again for its "
     "own batches, milliseconds (default: the worker's own)",
     false, true, true},
    {"--log-level", "Least level logged: debug, info, warning, error (default: info)", true, true},
};

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_COMMAND_PASS_THROUGH_H_
