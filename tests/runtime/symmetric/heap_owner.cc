// epserve_heap_owner CLUSTER_ID EPOCH RANK BYTES: creates a heap, prints its handle in hex, and
// holds it until stdin ends.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "runtime/symmetric/symmetric_heap.h"
#include "tests/runtime/symmetric/child_process.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  epserve::runtime::HeapSpec spec;
  spec.cluster_id = argv[1];
  spec.epoch = std::strtoull(argv[2], nullptr, 10);
  spec.rank = std::atoi(argv[3]);
  spec.bytes = std::strtoull(argv[4], nullptr, 10);
  auto heap = epserve::runtime::SymmetricHeap::Create(spec);
  if (!heap.ok()) {
    std::cerr << heap.status() << "\n";
    return 1;
  }
  std::cout << epserve::runtime::ToHex(heap->handle()) << std::endl;
  while (std::getchar() != EOF) {
  }
  return 0;
}
