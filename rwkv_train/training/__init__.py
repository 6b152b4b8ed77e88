"""Training under Lightning: the module, the schedule, the callbacks and the run that joins them."""
