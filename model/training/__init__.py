"""Fine-tuning: trainer, data, optimisers, state, parallel processes."""
