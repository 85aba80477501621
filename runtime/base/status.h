// The few lines around absl::Status that this Abseil lacks.
#ifndef EPSERVE_RUNTIME_BASE_STATUS_H_
#define EPSERVE_RUNTIME_BASE_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function if `expr` (a Status) is not OK.
#define EPS_RETURN_IF_ERROR(expr)                     \
  do {                                                \
    ::absl::Status eps_status = (expr);               \
    if (!eps_status.ok()) return eps_status;          \
  } while (false)

#define EPS_CONCAT_INNER(a, b) a##b
#define EPS_CONCAT(a, b) EPS_CONCAT_INNER(a, b)

// EPS_ASSIGN_OR_RETURN(auto value, MakeValue()); `lhs` may declare a variable.
#define EPS_ASSIGN_OR_RETURN(lhs, expr) \
  EPS_ASSIGN_OR_RETURN_IMPL(EPS_CONCAT(eps_or_, __LINE__), lhs, expr)
#define EPS_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return tmp.status();             \
  lhs = std::move(tmp).value()

#endif  // EPSERVE_RUNTIME_BASE_STATUS_H_
