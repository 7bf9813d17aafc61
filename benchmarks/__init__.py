"""The microbenchmark suite: the cost of each op, compared with alternatives and with the machine's limits."""
