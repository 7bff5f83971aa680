// What the planner knows of a device: a few of the driver's attributes. A slice of a partitioned GPU
// reports the multiprocessors it has, so a plan for it fits it.
#pragma once

namespace rnnfast::cuda {

struct Device {
  int capability;       // 90 for 9.0
  int multiprocessors;
  int shared_bytes;     // that one block can have
  int largest_cluster;  // blocks; 1 where there are no clusters
  bool cooperative;     // can launch a grid whose blocks are all resident
};

}  // namespace rnnfast::cuda
