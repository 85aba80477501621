// How the served model and the server describe themselves to KServe v2 clients. Pure functions,
// safe from any thread.
#ifndef EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_METADATA_PROTO_CONVERT_H_
#define EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_METADATA_PROTO_CONVERT_H_

#include "inference/grpc_service.pb.h"
#include "server/coordinator/front_door/infer_statistics.h"
#include "server/coordinator/front_door/served_model.h"

namespace epserve::coordinator {

// "system_shared_memory" is named only where it is switched on.
void FillServerMetadata(bool shm_allowed, inference::ServerMetadataResponse* response);

// A tensor has one datatype here, while hidden_states may come as BF16, FP16 or FP32 and topk_ids
// as INT32 or INT64. FP32 and INT32 are named: they are what a load generator can write down as
// plain numbers, and every client knows them.
void FillModelMetadata(const ServedModel& model, inference::ModelMetadataResponse* response);

// max_batch_size is 0: shapes are given in full, and clients must not add a dimension of their own.
// Ids and weights are optional where the model has a router.
void FillModelConfig(const ServedModel& model, inference::ModelConfig* config);

// The one served model's entry. Every request is an execution of its own in these terms.
void FillModelStatistics(const ServedModel& model, const StatisticsSnapshot& totals,
                         inference::ModelStatisticsResponse* response);

// `ready_only`: the caller asked for ready models alone.
void FillRepositoryIndex(const ServedModel& model, bool ready, bool ready_only,
                         inference::RepositoryIndexResponse* response);

}  // namespace epserve::coordinator

#endif  // EPSERVE_SERVER_COORDINATOR_FRONT_DOOR_METADATA_PROTO_CONVERT_H_
