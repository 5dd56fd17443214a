"""What computes the ops fast: one file an op on GPUs, one for oneDNN on CPUs. Nothing here knows a model."""
