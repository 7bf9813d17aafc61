"""The microbenchmark suite: what each op costs, beside what users would pick instead and the machine's limits."""
