// The few lines around absl::Status that this Abseil lacks. The client keeps its own, because it
// includes nothing of the runtime.
#ifndef EPSERVE_CLIENT_CPP_STATUS_H_
#define EPSERVE_CLIENT_CPP_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function if `expr` (a Status) is not OK.
#define EPC_RETURN_IF_ERROR(expr)            \
  do {                                       \
    ::absl::Status epc_status = (expr);      \
    if (!epc_status.ok()) return epc_status; \
  } while (false)

#define EPC_CONCAT_INNER(a, b) a##b
#define EPC_CONCAT(a, b) EPC_CONCAT_INNER(a, b)

// EPC_ASSIGN_OR_RETURN(auto value, MakeValue()); `lhs` may declare a variable.
#define EPC_ASSIGN_OR_RETURN(lhs, expr) \
  EPC_ASSIGN_OR_RETURN_IMPL(EPC_CONCAT(epc_or_, __LINE__), lhs, expr)
#define EPC_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return tmp.status();             \
  lhs = std::move(tmp).value()

#endif  // EPSERVE_CLIENT_CPP_STATUS_H_
