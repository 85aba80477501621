// An independent reference for what the service computes, read from a HuggingFace checkpoint and
// computed in fp64 by plain loops.
//
// It is deliberately written apart from runtime/ and shares no line with it: neither the reader of
// files, nor the conversion of types, nor the routers, nor the arithmetic. Two programs that agree
// by sharing a mistake would prove nothing. Do not "reuse" the runtime here.
//
// For a row x [H] with experts e_k and weights w_k the result is
//     sum over k with e_k >= 0 of  w_k * down_e( silu(gate_e(x)) * up_e(x) )
// An id given twice counts twice. FP8 weights are value * weight_scale_inv of their 128x128 block.
// Shared experts are not part of it, as they are not part of the service.
//
// Only the experts that a batch uses are read; the latest are kept, up to a limit of bytes.
//
// Thread safety: one thread at a time (the cache is not locked).
#ifndef EPSERVE_CLIENT_CPP_REFERENCE_MODEL_H_
#define EPSERVE_CLIENT_CPP_REFERENCE_MODEL_H_

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/checkpoint_files.h"
#include "client/cpp/reference_config.h"
#include "client/cpp/reference_router.h"
#include "client/cpp/tensor.h"

namespace epserve::client {

class ReferenceModel {
 public:
  static constexpr std::uint64_t kDefaultCacheBytes = 1u << 30;

  // NOT_FOUND, INVALID_ARGUMENT or DATA_LOSS for a checkpoint that is not there, not supported or
  // damaged. Expert tensors are checked when they are read.
  static absl::StatusOr<std::unique_ptr<ReferenceModel>> Open(
      const std::string& directory, std::uint64_t cache_bytes = kDefaultCacheBytes);

  const ReferenceConfig& config() const { return config_; }
  // Every layer with experts has its router in the checkpoint.
  bool has_router() const { return has_router_; }

  // One route for each of the T rows of `x` [T, H]. FAILED_PRECONDITION: no router.
  absl::StatusOr<std::vector<TokenRoute>> Route(std::int64_t layer, const std::vector<double>& x);

  // `x` [T, H]; `ids` and `weights` [T, K], with any K. Returns [T, H].
  // INVALID_ARGUMENT: an id outside [-1, E) or sizes that do not fit.
  absl::StatusOr<std::vector<double>> Compute(std::int64_t layer, const std::vector<double>& x,
                                              const std::vector<std::int64_t>& ids,
                                              const std::vector<double>& weights);

 private:
  // A weight matrix as the file holds it, with the scales of its blocks where it is FP8.
  struct Matrix {
    Tensor values;              // [rows, columns]
    std::vector<double> scale;  // [ceil(rows/128), ceil(columns/128)], empty: none
    std::int64_t rows() const { return values.shape[0]; }
    std::int64_t columns() const { return values.shape[1]; }
    std::uint64_t bytes() const { return values.bytes.size() + scale.size() * sizeof(double); }
    void DecodeRow(std::int64_t row, double* destination) const;
  };
  struct Expert {
    Matrix gate, up, down;
    std::uint64_t bytes() const { return gate.bytes() + up.bytes() + down.bytes(); }
  };
  using ExpertKey = std::pair<std::int64_t, std::int64_t>;  // layer, expert

  ReferenceModel() = default;
  absl::StatusOr<Matrix> ReadWeights(const std::string& name, std::int64_t rows,
                                     std::int64_t columns) const;
  absl::StatusOr<const Expert*> GetExpert(std::int64_t layer, std::int64_t expert);
  // For n columns: result[row, t] = sum over c of matrix[row, c] * x[c, t], sums in order of c.
  static std::vector<double> Multiply(const Matrix& matrix, const std::vector<double>& x,
                                      std::int64_t n);
  absl::Status CheckLayer(std::int64_t layer) const;

  ReferenceConfig config_;
  bool has_router_ = false;
  std::unique_ptr<CheckpointFiles> files_;

  std::uint64_t cache_limit_bytes_ = 0;
  std::uint64_t cached_bytes_ = 0;
  std::list<std::pair<ExpertKey, Expert>> cache_;  // latest used first
  std::map<ExpertKey, std::list<std::pair<ExpertKey, Expert>>::iterator> cached_;
};

// || actual - expected || / || expected ||, over the rows whose `skip` is false (`skip` may be
// empty). Where the expected norm is 0 the norm of `actual` itself; NaN anywhere gives infinity.
double RelativeL2Error(const std::vector<double>& actual, const std::vector<double>& expected,
                       std::int64_t row_size, const std::vector<bool>& skip);

}  // namespace epserve::client

#endif  // EPSERVE_CLIENT_CPP_REFERENCE_MODEL_H_
