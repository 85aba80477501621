#include "client/cpp/reference_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/status.h"

namespace epserve::client {

namespace {

constexpr std::int64_t kScaleBlock = 128;
constexpr std::size_t kMaxConfigBytes = 16u << 20;

std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

double Silu(double value) { return value / (1.0 + std::exp(-value)); }

// Which rows of a batch go to one expert, and with what weight.
struct ExpertRows {
  std::vector<std::int64_t> rows;
  std::vector<double> weights;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ReferenceModel>> ReferenceModel::Open(const std::string& directory,
                                                                     std::uint64_t cache_bytes) {
  std::unique_ptr<ReferenceModel> model(new ReferenceModel());
  model->cache_limit_bytes_ = cache_bytes;
  EPC_ASSIGN_OR_RETURN(const std::string text,
                       ReadTextFile(directory + "/config.json", kMaxConfigBytes));
  EPC_ASSIGN_OR_RETURN(model->config_, ParseReferenceConfig(text));
  EPC_ASSIGN_OR_RETURN(model->files_, CheckpointFiles::Open(directory));
  const ReferenceConfig& config = model->config_;
  model->has_router_ =
      std::all_of(config.layers.begin(), config.layers.end(), [&](std::int64_t layer) {
        return model->files_->Find(RouterName(config.architecture, layer)) != nullptr;
      });
  return model;
}

void ReferenceModel::Matrix::DecodeRow(std::int64_t row, double* destination) const {
  const std::size_t row_bytes = static_cast<std::size_t>(columns()) * ElementSize(values.type);
  DecodeToDouble(values.type, values.bytes.data() + static_cast<std::size_t>(row) * row_bytes,
                 static_cast<std::size_t>(columns()), destination);
  if (scale.empty()) return;
  const double* block_scales = scale.data() + (row / kScaleBlock) * CeilDiv(columns(), kScaleBlock);
  for (std::int64_t c = 0; c < columns(); ++c) destination[c] *= block_scales[c / kScaleBlock];
}

absl::StatusOr<ReferenceModel::Matrix> ReferenceModel::ReadWeights(const std::string& name,
                                                                   std::int64_t rows,
                                                                   std::int64_t columns) const {
  Matrix matrix;
  EPC_ASSIGN_OR_RETURN(matrix.values, files_->ReadMatrix(name, rows, columns));
  if (matrix.values.type == ElementType::kF8E4m3) {
    EPC_ASSIGN_OR_RETURN(const Tensor scale,
                         files_->ReadMatrix(name + "_scale_inv", CeilDiv(rows, kScaleBlock),
                                            CeilDiv(columns, kScaleBlock)));
    matrix.scale = ToDoubles(scale);
  }
  return matrix;
}

absl::StatusOr<const ReferenceModel::Expert*> ReferenceModel::GetExpert(std::int64_t layer,
                                                                        std::int64_t expert) {
  const ExpertKey key(layer, expert);
  const auto found = cached_.find(key);
  if (found != cached_.end()) {
    cache_.splice(cache_.begin(), cache_, found->second);
    return &found->second->second;
  }
  const auto name = [&](Projection projection) {
    return ExpertName(config_.architecture, layer, expert, projection);
  };
  Expert loaded;
  EPC_ASSIGN_OR_RETURN(loaded.gate,
                       ReadWeights(name(Projection::kGate), config_.intermediate, config_.hidden));
  EPC_ASSIGN_OR_RETURN(loaded.up,
                       ReadWeights(name(Projection::kUp), config_.intermediate, config_.hidden));
  EPC_ASSIGN_OR_RETURN(loaded.down,
                       ReadWeights(name(Projection::kDown), config_.hidden, config_.intermediate));
  cached_bytes_ += loaded.bytes();
  cache_.emplace_front(key, std::move(loaded));
  cached_[key] = cache_.begin();
  while (cached_bytes_ > cache_limit_bytes_ && cache_.size() > 1) {
    cached_bytes_ -= cache_.back().second.bytes();
    cached_.erase(cache_.back().first);
    cache_.pop_back();
  }
  return &cache_.front().second;
}

std::vector<double> ReferenceModel::Multiply(const Matrix& matrix, const std::vector<double>& x,
                                             std::int64_t n) {
  std::vector<double> result(static_cast<std::size_t>(matrix.rows() * n), 0.0);
  std::vector<double> row(static_cast<std::size_t>(matrix.columns()));
  for (std::int64_t r = 0; r < matrix.rows(); ++r) {
    matrix.DecodeRow(r, row.data());
    double* sums = result.data() + r * n;
    for (std::int64_t c = 0; c < matrix.columns(); ++c) {
      const double weight = row[c];
      const double* inputs = x.data() + c * n;
      for (std::int64_t t = 0; t < n; ++t) sums[t] += weight * inputs[t];
    }
  }
  return result;
}

absl::Status ReferenceModel::CheckLayer(std::int64_t layer) const {
  if (std::find(config_.layers.begin(), config_.layers.end(), layer) == config_.layers.end()) {
    return absl::NotFoundError(absl::StrCat("reference: layer ", layer, " has no experts"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenRoute>> ReferenceModel::Route(std::int64_t layer,
                                                              const std::vector<double>& x) {
  EPC_RETURN_IF_ERROR(CheckLayer(layer));
  if (!has_router_) {
    return absl::FailedPreconditionError("reference: the checkpoint has no router");
  }
  EPC_ASSIGN_OR_RETURN(const Tensor gate,
                       files_->ReadMatrix(RouterName(config_.architecture, layer),
                                          config_.num_experts, config_.hidden));
  const std::vector<double> router = ToDoubles(gate);
  std::vector<double> bias;
  if (config_.architecture == Architecture::kDeepseekV3) {
    EPC_ASSIGN_OR_RETURN(const Tensor tensor, files_->Read(RouterBiasName(layer)));
    bias = ToDoubles(tensor);
    if (bias.size() != static_cast<std::size_t>(config_.num_experts)) {
      return absl::DataLossError(absl::StrCat("reference: tensor '", RouterBiasName(layer),
                                              "' has ", bias.size(), " values, not ",
                                              config_.num_experts));
    }
  }
  const std::int64_t hidden = config_.hidden;
  std::vector<TokenRoute> routes;
  for (std::size_t begin = 0; begin < x.size(); begin += static_cast<std::size_t>(hidden)) {
    std::vector<double> logits(static_cast<std::size_t>(config_.num_experts), 0.0);
    for (std::int64_t e = 0; e < config_.num_experts; ++e) {
      for (std::int64_t h = 0; h < hidden; ++h) logits[e] += router[e * hidden + h] * x[begin + h];
    }
    routes.push_back(RouteToken(config_, logits, bias));
  }
  return routes;
}

absl::StatusOr<std::vector<double>> ReferenceModel::Compute(std::int64_t layer,
                                                            const std::vector<double>& x,
                                                            const std::vector<std::int64_t>& ids,
                                                            const std::vector<double>& weights) {
  EPC_RETURN_IF_ERROR(CheckLayer(layer));
  const std::int64_t hidden = config_.hidden;
  const auto num_tokens = static_cast<std::int64_t>(x.size()) / hidden;
  if (static_cast<std::int64_t>(x.size()) != num_tokens * hidden || ids.size() != weights.size() ||
      (num_tokens == 0 ? !ids.empty() : ids.size() % static_cast<std::size_t>(num_tokens) != 0)) {
    return absl::InvalidArgumentError(absl::StrCat("reference: ", x.size(), " values, ", ids.size(),
                                                   " ids and ", weights.size(),
                                                   " weights do not fit H ", hidden));
  }
  std::map<std::int64_t, ExpertRows> by_expert;
  const std::size_t topk = num_tokens == 0 ? 0 : ids.size() / static_cast<std::size_t>(num_tokens);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] == -1) continue;
    if (ids[i] < -1 || ids[i] >= config_.num_experts) {
      return absl::InvalidArgumentError(
          absl::StrCat("reference: id ", ids[i], " is outside [-1, ", config_.num_experts, ")"));
    }
    by_expert[ids[i]].rows.push_back(static_cast<std::int64_t>(i / topk));
    by_expert[ids[i]].weights.push_back(weights[i]);
  }
  std::vector<double> result(x.size(), 0.0);
  for (const auto& [id, work] : by_expert) {
    EPC_ASSIGN_OR_RETURN(const Expert* expert, GetExpert(layer, id));
    const auto n = static_cast<std::int64_t>(work.rows.size());
    std::vector<double> columns(static_cast<std::size_t>(hidden * n));
    for (std::int64_t t = 0; t < n; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) columns[h * n + t] = x[work.rows[t] * hidden + h];
    }
    std::vector<double> gate = Multiply(expert->gate, columns, n);
    const std::vector<double> up = Multiply(expert->up, columns, n);
    for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = Silu(gate[i]) * up[i];
    const std::vector<double> down = Multiply(expert->down, gate, n);
    for (std::int64_t t = 0; t < n; ++t) {
      double* row = result.data() + work.rows[t] * hidden;
      for (std::int64_t h = 0; h < hidden; ++h) row[h] += work.weights[t] * down[h * n + t];
    }
  }
  return result;
}

double RelativeL2Error(const std::vector<double>& actual, const std::vector<double>& expected,
                       std::int64_t row_size, const std::vector<bool>& skip) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!skip.empty() && skip[i / static_cast<std::size_t>(row_size)]) continue;
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

}  // namespace epserve::client
